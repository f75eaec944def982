"""Overlap and volume metrics of any number of classes, from one pass over two label maps."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import GeometryError
from medseg.labels import LabelValue
from medseg.types import Array, BoolArray, IntArray

# Voxels counted at a time: the pair codes of one chunk (int64) stay near the processor's cache.
_CHUNK = 1 << 20
# Label maps whose values stay below this are counted without being renumbered.
_DIRECT = 256


@dataclass(frozen=True)
class Counts:
    """Voxels of one class or region: true and false positives and negatives."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def n_ref(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def n_pred(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp

    @property
    def dice(self) -> float:
        """Dice coefficient 2 tp / (2 tp + fp + fn), in [0, 1]; NaN where both masks are empty.

        Equals ``Dice`` of nnU-Net's ``summary.json`` (nnunetv2.evaluation.evaluate_predictions).
        """
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else math.nan

    @property
    def iou(self) -> float:
        """Intersection over union tp / (tp + fp + fn), in [0, 1]; NaN where both masks are empty.

        Equals ``IoU`` of nnU-Net's ``summary.json``.
        """
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else math.nan

    @property
    def volume_error_relative(self) -> float:
        """(n_pred - n_ref) / n_ref: signed, 0 is best.

        Infinite where only the reference is empty, NaN where both are. Equals MedPy's ``ravd``, which is
        signed in spite of its name.
        """
        if self.n_ref == 0:
            return math.inf if self.n_pred else math.nan
        return (self.n_pred - self.n_ref) / self.n_ref

    def volume_error_ml(self, voxel_ml: float) -> float:
        """Volume of the prediction minus volume of the reference, in millilitres."""
        return (self.n_pred - self.n_ref) * voxel_ml


@dataclass(frozen=True)
class Contingency:
    """How often each value of the reference meets each value of the prediction.

    Attributes
    ----------
    values : (n,) int
        Label values that occur, ascending.
    table : (n, n) int64
        Voxels by reference value (row) and prediction value (column), ignored voxels left out.
    """

    values: IntArray
    table: IntArray

    def counts(self, label: LabelValue) -> Counts:
        """Return the counts of one label, or of a region (a tuple of labels)."""
        inside = np.isin(self.values, label)
        by_reference = self.table[inside].sum(axis=0)
        tp = int(by_reference[inside].sum())
        n_ref = int(by_reference.sum())
        n_pred = int(self.table[:, inside].sum())
        return Counts(tp, n_pred - tp, n_ref - tp, int(self.table.sum()) - n_ref - n_pred + tp)


def contingency(reference: Array, prediction: Array, ignore: int | None = None) -> Contingency:
    """Count all pairs of values of two label maps at once.

    Parameters
    ----------
    reference, prediction : integer arrays of one shape, any axis order
        Label maps.
    ignore : int, optional
        Voxels where the reference has this value are not counted (nnU-Net's ignore label).

    Raises
    ------
    GeometryError
        The shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> pairs = contingency(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
    >>> pairs.counts(1)
    Counts(tp=1, fp=0, fn=1, tn=2)
    >>> pairs.counts((1, 2)).dice
    1.0
    """
    if reference.shape != prediction.shape:
        raise GeometryError(
            f"reference of shape {reference.shape} and prediction of shape {prediction.shape}: expected "
            "one shape. Resample one onto the grid of the other first."
        )
    if reference.flags.f_contiguous:  # walk memory in order: nibabel's arrays are Fortran-ordered
        reference, prediction = reference.T, prediction.T
    values, (rows, columns) = _renumber(reference.reshape(-1), prediction.reshape(-1))
    n = len(values)
    table = np.zeros(n * n, dtype=np.int64)
    for start in range(0, rows.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        codes = rows[part].astype(np.int64) * n + columns[part]
        table += np.bincount(codes, minlength=n * n)
    square = table.reshape(n, n)
    square[values == ignore] = 0
    used = square.any(axis=0) | square.any(axis=1)
    return Contingency(values[used], square[np.ix_(used, used)])


def _renumber(reference: IntArray, prediction: IntArray) -> tuple[IntArray, tuple[IntArray, IntArray]]:
    if reference.dtype == bool or prediction.dtype == bool:
        reference, prediction = reference.astype(np.uint8), prediction.astype(np.uint8)
    lowest = min(reference.min(), prediction.min())
    highest = max(reference.max(), prediction.max())
    if lowest >= 0 and highest < _DIRECT:
        return np.arange(int(highest) + 1), (reference, prediction)
    values: IntArray = np.union1d(np.unique(reference), np.unique(prediction))
    return values, (np.searchsorted(values, reference), np.searchsorted(values, prediction))


def mask_of(label_map: Array, label: LabelValue) -> BoolArray:
    """Return where `label_map` has one label, or any label of a region."""
    if isinstance(label, tuple):
        return np.isin(label_map, label)
    mask: np.ndarray[Any, np.dtype[np.bool_]] = label_map == label
    return mask
