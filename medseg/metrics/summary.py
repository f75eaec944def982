"""Means over cases with bootstrap confidence intervals, and what empty cases do to them."""

import math
from dataclasses import dataclass

import numpy as np

from medseg.types import FloatArray


@dataclass(frozen=True)
class Statistic:
    """One metric of one class over all cases.

    Attributes
    ----------
    mean, median : float
        Over the cases with a finite value; NaN where there is none.
    low, high : float
        95 % bootstrap percentile interval of the mean; NaN with fewer than two cases.
    n : int
        Finite values that entered.
    n_infinite : int
        Infinite values, left out and told here: distances where only one of the two masks is empty.
    n_undefined : int
        NaN values, left out and told here: both masks are empty (or the one whose surface is averaged).
    """

    mean: float
    median: float
    low: float
    high: float
    n: int
    n_infinite: int
    n_undefined: int


def bootstrap_weights(n_cases: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Draw how often each case occurs in each resample; (resamples, n_cases), rows sum to `n_cases`.

    Cases are resampled, not rows: all classes of a case stay together (Efron & Tibshirani 1993, ch. 6).
    """
    draws = generator.integers(0, n_cases, size=(resamples, n_cases))
    draws += np.arange(resamples)[:, None] * n_cases
    counts = np.bincount(draws.ravel(), minlength=resamples * n_cases)
    return counts.reshape(resamples, n_cases).astype(np.float64)


def summarize(values: FloatArray, weights: FloatArray) -> list[Statistic]:
    """Summarize one metric of several classes, and of their mean.

    Parameters
    ----------
    values : (n_cases, n_classes)
        NaN: undefined; infinite: unbounded. Neither enters a mean, both are counted.
    weights : (resamples, n_cases)
        From :func:`bootstrap_weights`; the same for all metrics, so that their intervals are comparable.

    Returns
    -------
    list of Statistic
        One for each class, then one for the mean over classes: the plain mean of the classes' means (as
        nnU-Net's ``foreground_mean``, but over the classes that have one), resampled by case.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    draws = _resampled_means(finite, weights)
    singles = [_statistic(values[:, k], draws[:, k]) for k in range(values.shape[1])]
    across = nanmean(finite, axis=1)
    mean = nanmean(np.array([[s.mean for s in singles]]), axis=1)[0]
    low, high = _interval(nanmean(draws, axis=1), int(np.isfinite(across).sum()))
    together = Statistic(
        float(mean),
        _median(across),
        low,
        high,
        int(np.isfinite(across).sum()),
        sum(s.n_infinite for s in singles),
        sum(s.n_undefined for s in singles),
    )
    return [*singles, together]


def _statistic(values: FloatArray, draws: FloatArray) -> Statistic:
    finite = values[np.isfinite(values)]
    low, high = _interval(draws, finite.size)
    return Statistic(
        float(finite.mean()) if finite.size else math.nan,
        _median(finite),
        low,
        high,
        int(finite.size),
        int(np.isinf(values).sum()),
        int(np.isnan(values).sum()),
    )


def _resampled_means(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return (resamples, n_classes) means of the finite values; NaN where a resample drew none."""
    finite = np.isfinite(values)
    total = weights @ np.where(finite, values, 0.0)
    count = weights @ finite.astype(np.float64)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _interval(draws: FloatArray, n: int) -> tuple[float, float]:
    draws = draws[np.isfinite(draws)]
    if n < 2 or not draws.size:
        return math.nan, math.nan
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _median(values: FloatArray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def nanmean(values: FloatArray, axis: int) -> FloatArray:
    """Return the mean of what is not NaN along `axis`, NaN (without a warning) where nothing is left."""
    known = ~np.isnan(values)
    count = np.asarray(known.sum(axis=axis), dtype=np.float64)
    total = np.where(known, values, 0.0).sum(axis=axis)
    result: FloatArray = np.divide(total, count, out=np.full_like(count, np.nan), where=count > 0)
    return result
