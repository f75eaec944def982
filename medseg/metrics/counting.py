"""How well a count of objects agrees with the true count, over images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import DatasetError
from medseg.types import FloatArray

# Of a normal distribution, 95 % lies within so many standard deviations (Bland & Altman 1986).
_LIMITS = 1.96


@dataclass(frozen=True)
class CountAgreement:
    """Agreement of counts; NaN where an entry is not defined.

    Attributes
    ----------
    n_ref, n_pred : objects of all images together
    error : mean of n_pred - n_ref over images (the bias of Bland & Altman)
    absolute_error : mean of abs(n_pred - n_ref)
    relative_error : mean of abs(n_pred - n_ref) / n_ref over the images with n_ref > 0
    relative_images : how many images that are
    relative_total : (n_pred - n_ref) / n_ref of the totals, signed
    r2 : 1 - sum (n_pred - n_ref)^2 / sum (n_ref - mean n_ref)^2, of the line n_pred = n_ref (not of a fit)
    low, high : limits of agreement, error -+ 1.96 standard deviations (n - 1) of the errors
    """

    images: int
    n_ref: int
    n_pred: int
    error: float
    absolute_error: float
    relative_error: float
    relative_images: int
    relative_total: float
    r2: float
    low: float
    high: float


def count_agreement(n_ref: Sequence[int], n_pred: Sequence[int]) -> CountAgreement:
    """Compare the counts of some images.

    Raises
    ------
    DatasetError
        There is no image, or the two lists differ in length.

    Examples
    --------
    >>> agreement = count_agreement([10, 20], [9, 23])
    >>> agreement.error, agreement.absolute_error, agreement.relative_error, agreement.r2
    (1.0, 2.0, 0.125, 0.8)
    """
    if len(n_ref) != len(n_pred) or not n_ref:
        raise DatasetError(
            f"{len(n_ref)} reference counts and {len(n_pred)} predicted: expected as many, at least one."
        )
    truth, guess = np.asarray(n_ref, np.float64), np.asarray(n_pred, np.float64)
    error = guess - truth
    counted = truth > 0
    spread = float(((truth - truth.mean()) ** 2).sum())
    deviation = float(error.std(ddof=1)) if error.size > 1 else math.nan
    return CountAgreement(
        images=error.size,
        n_ref=int(truth.sum()),
        n_pred=int(guess.sum()),
        error=float(error.mean()),
        absolute_error=float(np.abs(error).mean()),
        relative_error=_mean(np.abs(error[counted]) / truth[counted]),
        relative_images=int(counted.sum()),
        relative_total=float(error.sum() / truth.sum()) if truth.any() else math.nan,
        r2=1.0 - float((error**2).sum()) / spread if spread else math.nan,
        low=float(error.mean()) - _LIMITS * deviation,
        high=float(error.mean()) + _LIMITS * deviation,
    )


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if values.size else math.nan
