"""The aggregated Jaccard index of nucleus segmentation, in its original form and with one-to-one matching.

Three different numbers carry this name. Here are the first two:

- **AJI** (Kumar et al. 2017, A Dataset and a Technique for Generalized Nuclear Segmentation): every
  reference takes the prediction of best IoU, also one that another has taken already.
- **AJI+** (Graham et al. 2019, HoVer-Net): references and predictions are first matched one to one, with the
  largest sum of IoU.

The function of that name in cellpose divides the overlap of matched objects by the union of all foreground,
which forgives every error of the borders between touching objects: a third quantity, not offered here.
"""

import math

import numpy as np

from medseg.metrics.matching import assign
from medseg.metrics.overlap_table import OverlapTable
from medseg.types import IntArray


def aggregated_jaccard(table: OverlapTable) -> float:
    """Return AJI: sum of intersections / (sum of unions + predictions that nobody took), in [0, 1].

    A reference that meets no prediction adds its size to the unions. Of equal IoU the lower label is
    taken. NaN where neither side has an object.

    Examples
    --------
    >>> from medseg.metrics.overlap_table import overlap_table
    >>> aggregated_jaccard(overlap_table(np.array([1, 1, 0, 2]), np.array([5, 5, 5, 0])))
    0.5
    """
    order = np.lexsort((table.pairs[:, 1], -table.iou, table.pairs[:, 0]))
    _, first = np.unique(table.pairs[order, 0], return_index=True)
    return _ratio(table, order[first])


def aggregated_jaccard_plus(table: OverlapTable) -> float:
    """Return AJI+: as AJI, but every prediction is taken by one reference at most."""
    return _ratio(table, assign(table.pairs, table.iou))


def _ratio(table: OverlapTable, taken: IntArray) -> float:
    b = table.pairs[taken, 1]
    inside = int(table.pair_voxels[taken].sum())
    union = int(table.reference_voxels.sum()) + int(table.prediction_voxels[b].sum()) - inside
    union += int(table.prediction_voxels.sum() - table.prediction_voxels[np.unique(b)].sum())
    return inside / union if union else math.nan
