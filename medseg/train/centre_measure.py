"""How well a bundle finds the objects of held-out cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg import log
from medseg.bundle import Bundle
from medseg.instances.models import open_object_model
from medseg.io import Case
from medseg.metrics.matching import match_objects
from medseg.metrics.overlap_table import overlap_table
from medseg.types import IntArray

THRESHOLDS = (0.5, 0.7)


@dataclass(frozen=True)
class Measured:
    """True, invented and missed objects of each case, at each IoU.

    Attributes
    ----------
    rows : case name to IoU threshold to (true, invented, missed)
    """

    rows: Mapping[str, Mapping[float, tuple[int, int, int]]] = field(default_factory=dict)

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
        }

    def table(self) -> dict[str, str]:
        """Return a line a case."""
        first = THRESHOLDS[0]
        return {
            name: "{} found, {} invented, {} missed".format(*row[first]) for name, row in self.rows.items()
        }


def measure_objects(bundle: Bundle, cases: Sequence[Case], fold: str) -> Measured:
    """Find the objects of cases as a user would, and compare them."""
    from medseg.train.centre import open_objects

    if not cases:
        return Measured()
    model = open_object_model(bundle, str(bundle), fold=fold)
    rows = {}
    for case in log.progress(cases, "Measuring objects"):
        image, labels, spacing = open_objects(case)
        found = model.segment(image, spacing, channel_axis=0)
        rows[case.name] = count_matches(labels, found.labels)
    return Measured(rows)


def count_matches(
    reference: IntArray, found: IntArray, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, tuple[int, int, int]]:
    """Return true, invented and missed objects at each IoU (>=)."""
    table = overlap_table(reference, found)
    matches = {threshold: match_objects(table, threshold) for threshold in thresholds}
    return {threshold: (match.tp, match.fp, match.fn) for threshold, match in matches.items()}
