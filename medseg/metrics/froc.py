"""Sensitivity against false positives per scan (FROC) and its mean at seven points (CPM), as in LUNA16.

What a hit is, is up to the caller: IoU, a centre near enough, or a centre inside of the mask. The best score
among the hits of a reference is the score at which it is found. A further hit on a found reference is neither
true nor false, a detection that hits an irrelevant finding is left out, and all others are false positives
(Setio et al. 2017, Validation, comparison, and combination of algorithms for automatic detection of pulmonary
nodules; its script ``noduleCADEvaluationLUNA16``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import DatasetError, GeometryError
from medseg.metrics.overlap_table import OverlapTable
from medseg.types import Array, BoolArray, FloatArray, IntArray

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the sensitivity."""


@dataclass(frozen=True, eq=False)
class Scan:
    """References and scored detections of one scan.

    Attributes
    ----------
    n_ref : references, irrelevant ones included
    scores : (m,) float
    hits : (h, 2) int
        Reference and detection of every hit.
    irrelevant : (n_ref,) bool, optional
        Findings that need not be found, and may be.
    """

    n_ref: int
    scores: FloatArray
    hits: IntArray
    irrelevant: BoolArray | None = None


@dataclass(frozen=True, eq=False)
class Froc:
    """The curve.

    Attributes
    ----------
    rates, sensitivities : (k,) float64
        False positives per scan, and the part of the references found, from strict to lenient.
    n_ref, scans : relevant references, scans
    """

    rates: FloatArray
    sensitivities: FloatArray
    n_ref: int
    scans: int

    def sensitivity_at(self, rate: float) -> float:
        """Return the sensitivity at a rate of false positives per scan, linear between the points.

        Beyond the last point: that of the last point. NaN without references.
        """
        return float(np.interp(rate, self.rates, self.sensitivities)) if self.n_ref else math.nan

    @property
    def cpm(self) -> float:
        """Competition performance metric: mean sensitivity at the seven rates of RATES."""
        return float(np.mean([self.sensitivity_at(rate) for rate in RATES]))


def froc(scans: Sequence[Scan]) -> Froc:
    """Compute the curve over some scans.

    Raises
    ------
    DatasetError
        There is no scan.

    Examples
    --------
    >>> scan = Scan(2, np.array([0.9, 0.8, 0.3]), np.array([[0, 0], [1, 2]]))
    >>> curve = froc([scan])
    >>> curve.rates.tolist(), curve.sensitivities.tolist()
    ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0])
    """
    if not scans:
        raise DatasetError("no scan to measure. Pass at least one.")
    found, false = (np.concatenate(parts) for parts in zip(*map(_scored, scans), strict=True))
    n_ref = sum(s.n_ref - (0 if s.irrelevant is None else int(s.irrelevant.sum())) for s in scans)
    scores = np.concatenate([found, false])
    true = np.concatenate([np.ones(found.size, bool), np.zeros(false.size, bool)])
    order = np.argsort(-scores, kind="stable")
    scores, true = scores[order], true[order]
    # One point for each threshold: detections of one score come together.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if scores.size else np.zeros(0, int)
    rates = np.cumsum(~true)[last] / len(scans)
    sensitivities = np.cumsum(true)[last] / max(1, n_ref)
    return Froc(np.append(0.0, rates), np.append(0.0, sensitivities), n_ref, len(scans))


def hits_by_iou(table: OverlapTable, tau: float) -> IntArray:
    """Return (reference, prediction) of all pairs with IoU >= `tau`, (h, 2)."""
    return table.pairs[table.iou >= tau]


def hits_by_distance(references: Array, predictions: Array, radii: Array) -> IntArray:
    """Return the pairs whose centres are nearer than the radius of the reference, (h, 2): LUNA16's rule.

    Parameters
    ----------
    references, predictions : (n, d), (m, d) float
        Centres, all in one unit of length.
    radii : (n,) float
        In that unit.
    """
    from scipy.spatial import cKDTree

    a, b = (np.asarray(x, np.float64) for x in (references, predictions))
    if not (len(a) and len(b)):
        return np.zeros((0, 2), np.int64)
    if a.shape[1] != b.shape[1] or len(radii) != len(a):
        raise GeometryError(
            f"centres of {a.shape[1]} and {b.shape[1]} axes with {len(radii)} radii for {len(a)} references: "
            "expected as many axes, and a radius for each."
        )
    near = cKDTree(b).query_ball_point(a, np.asarray(radii, np.float64))
    return np.array(
        [(i, j) for i, row in enumerate(near) for j in sorted(row) if math.dist(a[i], b[j]) < radii[i]],
        np.int64,
    ).reshape(-1, 2)


def hits_by_centre(reference: IntArray, labels: IntArray, centres: Array) -> IntArray:
    """Return the pairs where the centre of a prediction lies in the mask of a reference, (h, 2).

    Parameters
    ----------
    reference : label map
    labels : (n,) its labels, ascending
    centres : (m, ndim) float
        In edge coordinates of voxels: voxel i spans [i, i + 1). Outside of the image nothing is hit.
    """
    cells = np.floor(np.asarray(centres, np.float64).reshape(-1, reference.ndim)).astype(np.int64)
    inside = ((cells >= 0) & (cells < reference.shape)).all(axis=1)
    values = np.zeros(len(cells), np.int64)
    values[inside] = reference[tuple(cells[inside].T)]
    hit = np.flatnonzero(np.isin(values, labels) & (values > 0))
    pairs = np.stack([np.searchsorted(labels, values[hit]), hit], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _scored(scan: Scan) -> tuple[FloatArray, FloatArray]:
    """Return the scores at which references are found, and those of the false positives."""
    scores = np.asarray(scan.scores, np.float64)
    hits = np.asarray(scan.hits, np.int64).reshape(-1, 2)
    best = np.full(scan.n_ref, -np.inf)
    np.maximum.at(best, hits[:, 0], scores[hits[:, 1]])
    relevant = np.ones(scan.n_ref, bool) if scan.irrelevant is None else ~scan.irrelevant
    false = np.ones(len(scores), bool)
    false[hits[:, 1]] = False
    return best[relevant & (best > -np.inf)], scores[false]
