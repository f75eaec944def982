"""How well a bundle finds the objects of held-out cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array

from medseg import log
from medseg.bundle import Bundle
from medseg.instances.models import open_object_model
from medseg.io import Case
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
        rows[case.name] = match_objects(labels, found.labels)
    return Measured(rows)


def match_objects(
    reference: IntArray, found: IntArray, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, tuple[int, int, int]]:
    """Return true, invented and missed objects at each IoU (>=), by the assignment with most true ones."""
    ious, references, objects = _ious(reference, found)
    result = {}
    for threshold in thresholds:
        rows, columns = np.nonzero(ious >= threshold) if ious.size else (np.zeros(0, int),) * 2
        if threshold > 0.5 or len(rows) == len(set(rows)) == len(set(columns)):
            true = len(rows)
        else:
            true = int((ious[linear_sum_assignment(-(ious >= threshold) * (1 + ious))] >= threshold).sum())
        result[threshold] = (true, objects - true, references - true)
    return result


def _ious(reference: IntArray, found: IntArray) -> tuple[Any, int, int]:
    """Return the IoU of every pair of objects, and the numbers of both."""
    _, a = np.unique(reference, return_inverse=True)
    _, b = np.unique(found, return_inverse=True)
    a, b = (x.ravel() + (0 if (m == 0).any() else 1) for x, m in ((a, reference), (b, found)))
    table = coo_array((np.ones(len(a), np.int64), (a, b)), shape=(a.max() + 1, b.max() + 1)).toarray()
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    union = rows[1:, None] + columns[None, 1:] - table[1:, 1:]
    return table[1:, 1:] / np.maximum(union, 1), len(rows) - 1, len(columns) - 1
