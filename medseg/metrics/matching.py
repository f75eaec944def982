"""Which predicted object is which reference object, at a threshold of their IoU.

Every reference is matched to at most one prediction and the reverse. Of all assignments the one with the
most pairs of IoU >= tau is taken, and among those the one with the largest sum of IoU, which is the rule of
StarDist (``stardist.matching``) and cellpose. Both solve it on a dense matrix of all objects against all;
here only pairs that meet enter a sparse solver, with the same optimum.
"""

import math
from dataclasses import dataclass

import numpy as np

from medseg.config import Config
from medseg.errors import ConfigError
from medseg.metrics.overlap_table import OverlapTable
from medseg.types import BoolArray, FloatArray, IntArray

# Two pairs of one object cannot both be above; at exactly .5 they can (an object cut into equal halves).
UNIQUE = 0.5


class EmptyPolicy(Config):
    """What a ratio of one image is where there is nothing to divide by; None: undefined, in no mean.

    Attributes
    ----------
    both : neither side has an object
    reference : predictions, but nothing to find
    prediction : nothing was found
    """

    both: float | None = None
    reference: float | None = 0.0
    prediction: float | None = 0.0

    def value(self, n_ref: int, n_pred: int, measured: float) -> float:
        """Return the measured value, or what this policy says where a side is empty (NaN: undefined)."""
        if n_ref and n_pred:
            return measured
        policy = self.prediction if n_ref else self.reference if n_pred else self.both
        return math.nan if policy is None else policy


@dataclass(frozen=True, eq=False)
class Matching:
    """The result of :func:`match_objects`.

    Attributes
    ----------
    tau : threshold that was used
    pairs : (k, 2) int64
        Positions of the matched objects in the table's `references` and `predictions`, ascending.
    iou : (k,) float64
        Of each matched pair.
    n_ref, n_pred : objects of either side
    """

    tau: float
    pairs: IntArray
    iou: FloatArray
    n_ref: int
    n_pred: int

    @property
    def tp(self) -> int:
        """References that were found (matched pairs)."""
        return len(self.pairs)

    @property
    def fp(self) -> int:
        """Predictions without a reference."""
        return self.n_pred - self.tp

    @property
    def fn(self) -> int:
        """References without a prediction."""
        return self.n_ref - self.tp

    @property
    def precision(self) -> float:
        """TP / (TP + FP); NaN without predictions."""
        return self.tp / self.n_pred if self.n_pred else math.nan

    @property
    def recall(self) -> float:
        """TP / (TP + FN); NaN without references."""
        return self.tp / self.n_ref if self.n_ref else math.nan

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN without any object."""
        total = self.n_ref + self.n_pred
        return 2 * self.tp / total if total else math.nan

    @property
    def accuracy(self) -> float:
        """TP / (TP + FP + FN), the "average precision" of cell segmentation; NaN without any object."""
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else math.nan

    @property
    def mean_matched_iou(self) -> float:
        """Mean IoU of the matched pairs (StarDist's ``mean_matched_score``); NaN without any."""
        return float(self.iou.mean()) if self.tp else math.nan

    @property
    def mean_true_iou(self) -> float:
        """Sum of matched IoU over all references (StarDist's ``mean_true_score``); NaN without any."""
        return float(self.iou.sum()) / self.n_ref if self.n_ref else math.nan

    @property
    def panoptic_quality(self) -> float:
        """Sum of matched IoU / (TP + FP/2 + FN/2), at IoU >= tau as StarDist has it; NaN without any object.

        The panoptic quality proper is at > .5: :func:`medseg.metrics.panoptic.panoptic_quality`.
        """
        total = self.n_ref + self.n_pred
        return 2 * float(self.iou.sum()) / total if total else math.nan

    def found(self) -> BoolArray:
        """Return which references are matched, (n_ref,) bool."""
        return _chosen(self.n_ref, self.pairs[:, 0])

    def true(self) -> BoolArray:
        """Return which predictions are matched, (n_pred,) bool."""
        return _chosen(self.n_pred, self.pairs[:, 1])


def match_objects(table: OverlapTable, tau: float = 0.5) -> Matching:
    """Match references and predictions one to one at IoU >= `tau`.

    Parameters
    ----------
    table : OverlapTable
    tau : float in (0, 1]
        Inclusive. (The panoptic quality uses > 0.5, see :mod:`medseg.metrics.panoptic`.)

    Raises
    ------
    ConfigError
        `tau` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from medseg.metrics.overlap_table import overlap_table
    >>> match = match_objects(overlap_table(np.array([1, 1, 1, 2]), np.array([5, 5, 0, 0])))
    >>> match.tp, match.fp, match.fn
    (1, 0, 1)
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}: expected a threshold of IoU above 0 and at most 1.")
    iou = table.iou
    # From .5 on, other pairs cannot change the optimum: what is accepted is unique but for ties at .5,
    # which all weigh the same. Below, StarDist's rule also counts what lies under the threshold.
    candidates = np.flatnonzero(iou >= tau) if tau >= UNIQUE else np.arange(iou.size)
    gain = (iou[candidates] >= tau) + iou[candidates] / (2 * max(1, min(table.n_ref, table.n_pred)))
    chosen = candidates[assign(table.pairs[candidates], gain)]
    chosen = chosen[iou[chosen] >= tau]
    return Matching(tau, table.pairs[chosen], iou[chosen], table.n_ref, table.n_pred)


def assign(pairs: IntArray, gain: FloatArray) -> IntArray:
    """Return the rows of `pairs` of the one-to-one assignment with the largest total gain, ascending.

    Parameters
    ----------
    pairs : (p, 2) int
        Allowed pairs, each once; whatever is not listed cannot be assigned.
    gain : (p,) float
        At least 0; leaving an object alone gains nothing.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    lonely = _alone(pairs)
    rest = np.flatnonzero(~lonely)
    if not rest.size:
        return np.arange(len(pairs))
    _, rows = np.unique(pairs[rest, 0], return_inverse=True)
    _, columns = np.unique(pairs[rest, 1], return_inverse=True)
    n, m = rows.max() + 1, columns.max() + 1
    # The solver wants every row assigned: each gets a column of its own that stands for "nobody". As all
    # rows are assigned, a constant on every weight changes nothing and keeps them above 0.
    nobody = float(gain.max()) + 1.0
    graph = csr_matrix(
        (
            np.concatenate([nobody - gain[rest], np.full(n, nobody)]),
            (np.concatenate([rows, np.arange(n)]), np.concatenate([columns, m + np.arange(n)])),
        ),
        shape=(n, m + n),
    )
    _, partner = min_weight_full_bipartite_matching(graph)
    lonely[rest[partner[rows] == columns]] = True
    return np.flatnonzero(lonely)


def _alone(pairs: IntArray) -> BoolArray:
    """Return which pairs share neither of their objects with another pair: nothing to choose there."""
    alone = np.ones(len(pairs), bool)
    for side in pairs.T:
        _, place, times = np.unique(side, return_inverse=True, return_counts=True)
        alone &= times[place] == 1
    return alone


def _chosen(n: int, positions: IntArray) -> BoolArray:
    mask = np.zeros(n, bool)
    mask[positions] = True
    return mask
