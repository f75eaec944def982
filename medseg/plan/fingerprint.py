"""What a dataset looks like: sizes, spacings, and the intensities of its foreground.

Two ways to the intensity statistics, both giving every case the same weight whatever the size of its
foreground:

- *exact* repeats nnU-Net's random draws, ``RandomState(1234)`` per case, 10^8 samples in all, and
  sums them in the order and precision that NumPy would, so that every digit is equal. Nothing of
  that size is ever in memory: samples are drawn again for each pass over them.
- *weighted* is what those draws estimate: each voxel counts one over the foreground of its case.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import DatasetError
from medseg.log import progress, task
from medseg.plan.schema import ChannelStats, Fingerprint
from medseg.types import Array, FloatArray, IntArray

if TYPE_CHECKING:
    from medseg.io import Case, Dataset

# nnU-Net `DatasetFingerprintExtractor`: samples over all cases, seed per case, percentiles.
TOTAL_SAMPLES = 10**8
SEED = 1234
PERCENTILES = (0.5, 50.0, 99.5)
# A 2D image gets one coarse axis (nnU-Net's readers: 999 times the larger pixel edge).
FLAT_AXIS_FACTOR = 999
# Voxels drawn at a time: small enough for the cache, large enough to hide Python.
BLOCK = 2**16
# The weighted percentiles keep 22 of a float32's 32 bits: whole numbers below 16384 are exact, others
# are within 1.2e-4 of their value.
KEY_BITS = 22


def extract_fingerprint(dataset: "Dataset", exact: bool = True) -> Fingerprint:
    """Look at all training cases.

    Parameters
    ----------
    dataset : opened dataset
    exact : equal to nnU-Net digit by digit; False computes the same statistics without random draws,
        for about the cost of reading the images

    Raises
    ------
    DatasetError
        There is no labelled training case, an image holds NaN or infinity, all images are blank, or no
        case has any foreground.
    """
    cases = [case for case in dataset.training if case.label is not None]
    if not cases:
        raise DatasetError(f"{dataset.name}: no training case with a label. Add some to the dataset.")
    n_channels = len(dataset.channels)
    n_samples = TOTAL_SAMPLES // len(cases)
    statistics: list[_Drawn | _Weighted] = [_Drawn() if exact else _Weighted() for _ in dataset.channels]
    looks = []
    for case in progress(cases, "fingerprint"):
        look = _look_at(case, dataset.reader, n_channels)
        looks.append(look)
        random = np.random.RandomState(SEED)
        for channel, voxels in zip(statistics, look.foreground, strict=True):
            channel.add(voxels, n_samples, random, last=channel is statistics[-1])
        look.foreground.clear()
    if all(look.blank for look in looks):
        raise DatasetError(
            f"{dataset.name}: every image has one value everywhere. Export the images again; `medseg check` "
            "lists all."
        )
    with task("intensity statistics", n_channels) as running:
        intensity = {}
        for index, channel in enumerate(statistics):
            intensity[str(index)] = channel.summary(f"{dataset.name}, channel {dataset.channels[index]}")
            running.advance()
    return Fingerprint(
        foreground_intensity_properties_per_channel=intensity,
        median_relative_size_after_cropping=float(np.median([look.relative_size for look in looks])),
        shapes_after_crop=tuple(look.shape for look in looks),
        spacings=tuple(look.spacing for look in looks),
    )


@dataclass
class _Look:
    """One case: shape after cropping and spacing in reader order, and its foreground values per channel."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    relative_size: float
    blank: bool
    foreground: list[FloatArray]


def _look_at(case: "Case", reader: str, n_channels: int) -> _Look:
    from medseg.geometry.crop import bounding_box, box_slices
    from medseg.geometry.orient import reads_as_ras, to_ras
    from medseg.io import read_image, read_label

    image, label = read_image(case), read_label(case)
    if reads_as_ras(reader):
        image, label = to_ras(image), to_ras(label)
    if image.channels != n_channels:
        raise DatasetError(
            f"{case.name}: {image.channels} channels, the dataset has {n_channels}. Mend its image files."
        )
    _require_finite(case.name, image.array)
    array = image.array.transpose(0, 3, 2, 1)  # reader order: the random draws depend on it
    nonzero = array[0] != 0
    for channel in array[1:]:
        nonzero |= channel != 0
    box = box_slices(bounding_box(nonzero))
    mask = label.array[0].transpose(2, 1, 0)[box] > 0
    foreground = [np.asarray(channel[box][mask], dtype=np.float32) for channel in array]
    return _Look(
        shape=mask.shape,
        spacing=_reader_spacing(image.spacing, image.shape, reader),
        relative_size=mask.size / nonzero.size,
        blank=all(_is_constant(channel) for channel in array),
        foreground=foreground,
    )


def _require_finite(name: str, array: Array) -> None:
    wrong = sum(channel.size - int(np.count_nonzero(np.isfinite(channel))) for channel in array)
    if wrong:
        raise DatasetError(
            f"{name}: the image holds {wrong} NaN or infinite voxels. Repair it; `medseg check` lists all."
        )


def _is_constant(channel: Array) -> bool:
    first = channel[0, 0, 0]
    some = channel[::7, ::7, ::7]  # tells most images apart without looking at all voxels
    return bool((some == first).all() and (channel == first).all())


def _reader_spacing(spacing: tuple[float, ...], shape: tuple[int, ...], reader: str) -> tuple[float, ...]:
    """Reverse the spacing; pictures have no third axis, so theirs is made very coarse like nnU-Net does."""
    i, j, k = spacing
    if reader == "NaturalImage2DIO" and shape[2] == 1:
        k = FLAT_AXIS_FACTOR * max(i, j)
    return k, j, i


@dataclass
class _Pool:
    """Foreground values of one case, and how to draw samples from them.

    `state` is that of the generator before the draws; None means that `values` are the samples.
    """

    values: FloatArray
    n_samples: int
    state: Any

    def draws(self, random: np.random.RandomState) -> Iterator[IntArray]:
        """Yield the drawn indices, always the same."""
        random.set_state(self.state)
        for size in _blocks(self.n_samples):
            yield random.randint(0, len(self.values), size=size)


class _Drawn:
    """nnU-Net's statistics of one channel: 10^8 samples with replacement over all cases."""

    def __init__(self) -> None:
        self.pools: list[_Pool] = []
        self.dtype: type[np.floating[Any]] = np.float32

    def add(self, values: FloatArray, n_samples: int, random: np.random.RandomState, last: bool) -> None:
        """Take one case's foreground; `random` moves on as in nnU-Net, unless no channel follows."""
        if len(values) == 0:
            # nnU-Net appends an empty list, which NumPy takes for float64: all samples are promoted.
            self.dtype = np.float64
            return
        pool = _Pool(values, n_samples, random.get_state())
        if len(values) > n_samples:  # keep the samples, they are fewer
            pool = _Pool(np.concatenate([values[drawn] for drawn in pool.draws(random)]), n_samples, None)
        elif not last:
            for _ in pool.draws(random):
                pass
        self.pools.append(pool)

    def summary(self, where: str) -> ChannelStats:
        """Return the statistics; NumPy's order of summation and rounding is kept."""
        if not self.pools:
            raise DatasetError(f"{where}: no case has any foreground. Check the label files.")
        counts: list[IntArray] = [np.zeros(len(pool.values), dtype=np.int64) for pool in self.pools]
        n = sum(pool.n_samples for pool in self.pools)
        mean = self._mean(_pairwise_sum(n, _Stream(self._samples(counts)).take), n)
        squares = _Stream((block - mean) ** 2 for block in self._samples())
        variance = self._mean(_pairwise_sum(n, squares.take), n)
        ranked = _RankedValues([pool.values for pool in self.pools], counts)
        low, median, high = _percentiles(ranked, n, self.dtype)
        return ChannelStats(
            max=float(ranked.at(n - 1)),
            mean=float(mean),
            median=median,
            min=float(ranked.at(0)),
            percentile_00_5=low,
            percentile_99_5=high,
            std=float(np.sqrt(variance)),
        )

    def _mean(self, total: Any, n: int) -> Any:
        return self.dtype(total / np.intp(n))  # the division is float64, as in numpy.mean

    def _samples(self, counts: list[IntArray] | None = None) -> Iterator[FloatArray]:
        """Yield all samples in order, block by block; `counts` collects how often each value was drawn."""
        random = np.random.RandomState()
        for index, pool in enumerate(self.pools):
            values = pool.values.astype(self.dtype, copy=False)
            if pool.state is None:
                if counts is not None:
                    counts[index] += 1
                yield values
                continue
            for drawn in pool.draws(random):
                if counts is not None:
                    counts[index] += np.bincount(drawn, minlength=len(values))
                yield values[drawn]


def _blocks(n: int) -> Iterator[int]:
    for start in range(0, n, BLOCK):
        yield min(BLOCK, n - start)


class _Stream:
    """Blocks of any size, re-cut to the sizes that are asked for."""

    def __init__(self, blocks: Iterator[FloatArray]) -> None:
        self.blocks = blocks
        self.left: FloatArray = np.empty(0, dtype=np.float32)

    def take(self, n: int) -> FloatArray:
        """Return the next `n` values, contiguous."""
        parts, missing = [], n
        while missing > 0:
            if len(self.left) == 0:
                self.left = next(self.blocks)
            parts.append(self.left[:missing])
            self.left = self.left[missing:]
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pairwise_sum(n: int, take: Any) -> Any:
    """Sum `n` values from `take` as ``numpy.add.reduce`` does on one long array.

    NumPy halves the array (to a multiple of 8) down to blocks of 128; halving with the same rule and
    leaving the rest to NumPy gives the same roundings.
    """
    if n <= BLOCK:
        return np.add.reduce(take(n))
    half = n // 2
    half -= half % 8
    left = _pairwise_sum(half, take)
    return left + _pairwise_sum(n - half, take)


class _RankedValues:
    """Order statistics of float32 values that each count several times, without sorting them.

    A float32's bits, with the sign handled, sort like the number; a histogram of the upper half finds
    the bucket of a rank, one of the lower half inside the bucket finds the value.
    """

    def __init__(self, values: list[FloatArray], counts: list[IntArray]) -> None:
        self.keys = [_sortable(v.astype(np.float32, copy=False)) for v in values]
        self.counts = counts
        upper = np.zeros(2**16, dtype=np.int64)
        for key, count in zip(self.keys, counts, strict=True):
            upper += _weighted_bincount(key >> 16, count)
        self.upper = np.cumsum(upper)

    def at(self, rank: int) -> np.float32:
        """Return the value at a 0-based rank."""
        bucket = int(np.searchsorted(self.upper, rank, side="right"))
        before = int(self.upper[bucket - 1]) if bucket else 0
        lower = np.zeros(2**16, dtype=np.int64)
        for key, count in zip(self.keys, self.counts, strict=True):
            inside = key >> 16 == bucket
            lower += _weighted_bincount(key[inside] & 0xFFFF, count[inside])
        low = int(np.searchsorted(np.cumsum(lower), rank - before, side="right"))
        return _from_sortable(np.uint32(bucket << 16 | low))


def _weighted_bincount(bins: IntArray, counts: IntArray) -> IntArray:
    # float64 weights are exact: counts stay far below 2^53.
    return np.bincount(bins, weights=counts, minlength=2**16).astype(np.int64)


def _sortable(values: FloatArray) -> IntArray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    flip: IntArray = np.where(bits >> 31 == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return bits ^ flip


def _from_sortable(key: np.uint32) -> np.float32:
    flip = np.uint32(0x80000000) if key >> 31 == 1 else np.uint32(0xFFFFFFFF)
    value: np.float32 = np.array([key ^ flip]).view(np.float32)[0]
    return value


def _percentiles(ranked: _RankedValues, n: int, dtype: type[np.floating[Any]]) -> list[float]:
    """Return the percentiles by linear interpolation, rounded as in ``numpy.percentile``."""
    result = []
    for q in np.array(PERCENTILES) / 100:
        position = (n - 1) * q
        rank = min(math.floor(position), n - 1)
        a, b = dtype(ranked.at(rank)), dtype(ranked.at(min(rank + 1, n - 1)))
        t, step = np.float64(position - rank), b - a
        result.append(float(a + step * t if t < 0.5 else b - step * (1 - t)))
    return result


class _Weighted:
    """Statistics of one channel where the voxels of each case share the weight one."""

    def __init__(self) -> None:
        self.n_cases = 0
        self.sums = np.zeros(2)  # of the cases' means and mean squares
        self.min, self.max = math.inf, -math.inf
        self.histogram: FloatArray = np.zeros(2**KEY_BITS, dtype=np.float64)

    def add(self, values: FloatArray, n_samples: int, random: np.random.RandomState, last: bool) -> None:
        """Take one case's foreground (nothing is drawn)."""
        if len(values) == 0:
            return
        self.n_cases += 1
        wide = values.astype(np.float64)
        self.sums += wide.mean(), (wide * wide).mean()
        self.min, self.max = min(self.min, float(wide.min())), max(self.max, float(wide.max()))
        keys, counts = np.unique(_sortable(_shorten(values)) >> (32 - KEY_BITS), return_counts=True)
        self.histogram[keys] += counts / len(values)

    def summary(self, where: str) -> ChannelStats:
        """Return the statistics."""
        if self.n_cases == 0:
            raise DatasetError(f"{where}: no case has any foreground. Check the label files.")
        mean, square = self.sums / self.n_cases
        share = np.cumsum(self.histogram) / self.n_cases
        low, median, high = (self._value_at(int(np.searchsorted(share, q / 100))) for q in PERCENTILES)
        return ChannelStats(
            max=self.max,
            mean=float(mean),
            median=median,
            min=self.min,
            percentile_00_5=low,
            percentile_99_5=high,
            std=math.sqrt(max(square - mean * mean, 0.0)),
        )

    def _value_at(self, key: int) -> float:
        shift = 32 - KEY_BITS
        negative = key < 2 ** (KEY_BITS - 1)
        bits = key << shift | (2**shift - 1 if negative else 0)
        return float(_from_sortable(np.uint32(bits)))


def _shorten(values: FloatArray) -> Array:
    """Drop the bits that the histogram does not keep, towards zero for either sign."""
    bits = np.ascontiguousarray(values).view(np.uint32) & np.uint32(2**32 - 2 ** (32 - KEY_BITS))
    return bits.view(np.float32)
