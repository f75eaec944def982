"""How well a bundle finds the objects of held-out cases, and the stuff around them where it knows any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg import log
from medseg.bundle import Bundle
from medseg.instances.models import open_object_model
from medseg.instances.panoptic import merge_found
from medseg.io import Case
from medseg.io.semantic import SemanticMaps
from medseg.metrics.matching import match_objects
from medseg.metrics.overlap_table import overlap_table
from medseg.metrics.panoptic import PanopticClasses
from medseg.metrics.panoptic_maps import PanopticMap, compare_panoptic, describe_quality
from medseg.types import IntArray

THRESHOLDS = (0.5, 0.7)


@dataclass(frozen=True)
class Measured:
    """True, invented and missed objects of each case, at each IoU.

    Attributes
    ----------
    rows : case name to IoU threshold to (true, invented, missed)
    panoptic : counts of all cases by class, of a network with things and stuff
    """

    rows: Mapping[str, Mapping[float, tuple[int, int, int]]] = field(default_factory=dict)
    panoptic: PanopticClasses | None = None

    def pooled(self) -> dict[float, float]:
        """Return TP / (TP + FP + FN) over all cases, for each IoU; empty without cases."""
        result = {}
        for threshold in THRESHOLDS if self.rows else ():
            sums = np.sum([row[threshold] for row in self.rows.values()], axis=0)
            result[threshold] = float(sums[0] / max(1, sums.sum()))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "accuracy": {f"{t:g}": round(value, 5) for t, value in self.pooled().items()},
            "objects": {
                name: {f"{t:g}": list(counts) for t, counts in row.items()} for name, row in self.rows.items()
            },
            **({} if self.panoptic is None else {"panoptic": describe_quality(self.panoptic)}),
        }

    def panoptic_facts(self) -> dict[str, str]:
        """Return panoptic quality in words; nothing from a network of objects alone."""
        if self.panoptic is None:
            return {}
        means = (self.panoptic.overall, self.panoptic.overall_things, self.panoptic.overall_stuff)
        titles = ("PQ", "PQ of things", "PQ of stuff")
        return {title: f"{mean.pq:.3f}" for title, mean in zip(titles, means, strict=True)}

    def table(self) -> dict[str, str]:
        """Return a line a case."""
        first = THRESHOLDS[0]
        return {
            name: "{} found, {} invented, {} missed".format(*row[first]) for name, row in self.rows.items()
        }


def measure_objects(
    bundle: Bundle, cases: Sequence[Case], fold: str, semantic: SemanticMaps | None = None
) -> Measured:
    """Find the objects of cases as a user would, and compare them."""
    from medseg.train.centre import open_scaled

    if not cases:
        return Measured()
    model = open_object_model(bundle, str(bundle), fold=fold)
    rows = {}
    parts = []
    for case in log.progress(cases, "Measuring objects"):
        (image, labels, spacing), unit = open_scaled(case)
        found = model.segment(image, spacing, channel_axis=0, unit=unit)
        rows[case.name] = count_matches(labels, found.labels)
        if semantic is not None:
            merged, classes = merge_found(found, semantic.classes), semantic.classes
            known = PanopticMap(semantic.read(case, labels), labels, classes)
            parts.append(compare_panoptic(known, PanopticMap(merged.semantic, merged.labels, classes)))
    return Measured(rows, PanopticClasses.merged(parts) if parts else None)


def count_matches(
    reference: IntArray, found: IntArray, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, tuple[int, int, int]]:
    """Return true, invented and missed objects at each IoU (>=)."""
    table = overlap_table(reference, found)
    matches = {threshold: match_objects(table, threshold) for threshold in thresholds}
    return {threshold: (match.tp, match.fp, match.fn) for threshold, match in matches.items()}
