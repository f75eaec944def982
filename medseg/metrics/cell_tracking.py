"""SEG and DET of the Cell Tracking Challenge, from the overlap table of each frame.

Both use one association: a reference belongs to the prediction that holds more than half of it, so it has
one at most, while a prediction may have several. SEG (Maska et al. 2014) divides by references only: false
positives cost nothing. DET (Matula et al. 2015) weighs what a person would have to repair.
"""

import math
from dataclasses import dataclass

import numpy as np

from medseg.metrics.overlap_table import OverlapTable

# Matula et al. 2015 and the challenge's documentation of DET: to split, to add, to delete an object.
SPLIT, ADD, DELETE = 5, 10, 1


@dataclass(frozen=True)
class TrackingCounts:
    """Counts of one frame, or of the sum of many (``+``).

    Attributes
    ----------
    n_ref : references
    found : references of which some prediction holds more than half
    splits : references to be cut out of a prediction that holds several (one of them is free)
    fp : predictions that hold no reference
    iou_sum : IoU of the associated pairs, added up
    """

    n_ref: int = 0
    found: int = 0
    splits: int = 0
    fp: int = 0
    iou_sum: float = 0.0

    def __add__(self, other: "TrackingCounts") -> "TrackingCounts":
        return TrackingCounts(
            self.n_ref + other.n_ref,
            self.found + other.found,
            self.splits + other.splits,
            self.fp + other.fp,
            self.iou_sum + other.iou_sum,
        )

    @property
    def fn(self) -> int:
        """References that no prediction holds."""
        return self.n_ref - self.found

    @property
    def seg(self) -> float:
        """SEG: iou_sum / n_ref, in [0, 1]; NaN without references."""
        return self.iou_sum / self.n_ref if self.n_ref else math.nan

    @property
    def det(self) -> float:
        """DET: 1 - min(A, A0) / A0, A = 5 splits + 10 fn + 1 fp, A0 = 10 n_ref; NaN without references."""
        if not self.n_ref:
            return math.nan
        cost, empty = SPLIT * self.splits + ADD * self.fn + DELETE * self.fp, ADD * self.n_ref
        return 1.0 - min(cost, empty) / empty


def tracking_counts(table: OverlapTable) -> TrackingCounts:
    """Associate the objects of one frame, 2D or 3D.

    Examples
    --------
    >>> from medseg.metrics.overlap_table import overlap_table
    >>> counts = tracking_counts(overlap_table(np.array([1, 1, 2, 2, 0]), np.array([7, 7, 7, 7, 8])))
    >>> counts.splits, counts.fn, counts.fp, counts.seg, round(counts.det, 3)
    (1, 0, 1, 0.5, 0.7)
    """
    holds = 2 * table.pair_voxels > table.reference_voxels[table.pairs[:, 0]]
    found = int(holds.sum())
    holders = len(np.unique(table.pairs[holds, 1]))
    return TrackingCounts(
        table.n_ref, found, found - holders, table.n_pred - holders, float(table.iou[holds].sum())
    )
