"""One pass over a label map: voxels, boxes and moments of every object, and its intensities in an image.

Everything about places is summed in integers, so it is exact, and the compiled loop and its numpy twin give
the same bits. Intensities are summed in raster order as differences from the object's first value, which
keeps a standard deviation right where values are large and close to each other (a CT with an offset).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medseg.instances.compiled import COMPILED, jit
from medseg.types import Array, FloatArray, IntArray

# Bytes of temporaries per slab in the numpy twins, about.
_SLAB_VOXELS = 1 << 21


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the voxels of objects 1..K; row k - 1 belongs to object k.

    Attributes
    ----------
    voxels : (K,) int64
    low, high : (K, n) int64
        Half-open box in indices. An object without voxels has an empty box at 0.
    first : (K, n) int64
        Sums of index minus `low`.
    second : (K, n, n) int64
        Sums of products of index minus `low`.
    """

    voxels: IntArray
    low: IntArray
    high: IntArray
    first: IntArray
    second: IntArray

    @property
    def centroid(self) -> FloatArray:
        """(K, n) float64: mean index; voxel i is at i."""
        count = np.maximum(self.voxels, 1)[:, None]
        return np.asarray(self.low + self.first / count)

    @property
    def covariance(self) -> FloatArray:
        """(K, n, n) float64: covariance of indices (divided by the count), without the voxel's own extent."""
        count = np.maximum(self.voxels, 1)[:, None, None]
        mean = self.first[:, :, None] / count
        return np.asarray(self.second / count - mean * np.swapaxes(mean, 1, 2))


@dataclass(frozen=True, eq=False)
class Intensities:
    """Statistics of an image over objects 1..K, in the units of the image; (K,) float64 each.

    Values that are not finite are left out and counted in `missing` (int64); an object without a finite
    value has NaN. `std` divides by the count, like ``numpy.std``.
    """

    mean: FloatArray
    std: FloatArray
    minimum: FloatArray
    maximum: FloatArray
    total: FloatArray
    missing: IntArray


def sum_objects(labels: IntArray, count: int) -> Sums:
    """Sum voxels, boxes and moments of every object.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
        Values 0 (background) to `count`; any axis order, fastest if one end of the axes is contiguous.
    count : int
        K, the number of objects.

    Examples
    --------
    >>> found = sum_objects(np.array([[1, 1, 0], [0, 2, 2]], np.int32), 2)
    >>> found.voxels.tolist(), found.centroid.tolist()
    ([2, 2], [[0.0, 0.5], [1.0, 1.5]])
    """
    turned, axes = _row_major(labels)
    scan = _scan_compiled if COMPILED else _scan_numpy
    voxels, low, high, first, second = scan(turned, count)
    order = [axis + 3 - labels.ndim for axis in axes]  # where the axes of `labels` are among the three
    voxels, low, high = voxels[1:], low[1:, order], high[1:, order]
    first, second = first[1:, order], second[1:][:, order][:, :, order]
    low = np.where(voxels[:, None] > 0, low, 0)
    # From sums about the origin to sums about the corner of the box: small numbers, and still exact.
    shifted = first - voxels[:, None] * low
    cross = low[:, :, None] * first[:, None, :]
    outer = low[:, :, None] * low[:, None, :] * voxels[:, None, None]
    return Sums(voxels, low, high, shifted, second - cross - np.swapaxes(cross, 1, 2) + outer)


def count_voxels(labels: IntArray, count: int) -> IntArray:
    """Return (K + 1,) int64: the voxels of background and of objects 1..K."""
    turned, _ = _row_major(labels)
    voxels = np.zeros(count + 1, np.int64)
    if COMPILED:
        _count_runs(turned, voxels)
    else:
        for slab in _slabs(turned):
            voxels += np.bincount(turned[slab].ravel(), minlength=count + 1)
    return voxels


def sum_intensities(labels: IntArray, image: Array, count: int) -> Intensities:
    """Take mean, standard deviation, minimum, maximum and sum of an image over every object.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
    image : array of the same shape, any real type
    count : int
    """
    turned, axes = _row_major(labels)
    values = image.transpose(np.argsort(axes))[(None,) * (3 - image.ndim)]
    table = np.zeros((4, count + 1))  # first value, sum and sum of squares of differences from it
    table[3] = np.inf
    highest = np.full(count + 1, -np.inf)
    tally = np.zeros((2, count + 1), np.int64)  # finite, not finite
    wide = values.dtype.itemsize > 2 and values.dtype != np.float32
    for slab in _slabs(turned):
        part: FloatArray = np.ascontiguousarray(values[slab], dtype=np.float64 if wide else np.float32)
        add = _add_values if COMPILED else _add_values_numpy
        add(np.ascontiguousarray(turned[slab]), part, table, highest, tally)
    return _statistics(table[:, 1:], highest[1:], tally[:, 1:])


def _statistics(table: FloatArray, highest: FloatArray, tally: IntArray) -> Intensities:
    pivot, total, squares, lowest = table
    finite, missing = tally
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = total / finite
        std = np.sqrt(np.maximum(squares / finite - shift**2, 0.0))
    nothing = finite == 0
    return Intensities(
        np.where(nothing, np.nan, pivot + shift),
        np.where(nothing, np.nan, std),
        np.where(nothing, np.nan, lowest),
        np.where(nothing, np.nan, highest),
        np.where(nothing, np.nan, total + pivot * finite),
        missing,
    )


def _row_major(labels: IntArray) -> tuple[IntArray, tuple[int, ...]]:
    """Return the label map with three axes in C order, and where each of its axes went among the last ones.

    Arrays of a NIfTI file have their first axis contiguous: they are turned around, which copies nothing.
    """
    reverse = labels.flags.f_contiguous and not labels.flags.c_contiguous
    axes = tuple(range(labels.ndim))[:: -1 if reverse else 1]
    turned = np.ascontiguousarray(labels.transpose(axes), dtype=np.int32)
    return turned[(None,) * (3 - labels.ndim)], axes


def _slabs(labels: IntArray) -> Iterator[slice]:
    thick = max(1, _SLAB_VOXELS // max(1, labels[0].size))
    for start in range(0, labels.shape[0], thick):
        yield slice(start, start + thick)


def _scan_compiled(labels: IntArray, count: int) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    voxels, low, high, first, second = _tables(labels, count)
    _scan(labels, voxels, low, high, first, second)
    return voxels, low, high, first, second


def _tables(labels: IntArray, count: int) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    low = np.broadcast_to(np.array(labels.shape, np.int64), (count + 1, 3)).copy()
    high, first = np.zeros((count + 1, 3), np.int64), np.zeros((count + 1, 3), np.int64)
    return np.zeros(count + 1, np.int64), low, high, first, np.zeros((count + 1, 3, 3), np.int64)


def _scan_numpy(labels: IntArray, count: int) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Do what :func:`_scan` does; sums of a slab stay below 2**53, where float64 holds integers exactly."""
    voxels, low, high, first, second = _tables(labels, count)
    for slab in _slabs(labels):
        places = np.nonzero(labels[slab])
        found = labels[slab][places]
        index = [places[0] + slab.start, *places[1:]]
        voxels += np.bincount(found, minlength=count + 1)
        for a in range(3):
            np.minimum.at(low[:, a], found, index[a])
            np.maximum.at(high[:, a], found, index[a] + 1)
            first[:, a] += _bincount(found, index[a], count)
            for b in range(a, 3):
                second[:, a, b] += _bincount(found, index[a] * index[b], count)
                second[:, b, a] = second[:, a, b]
    return voxels, low, high, first, second


def _bincount(found: IntArray, weights: IntArray, count: int) -> IntArray:
    return np.bincount(found, weights=weights, minlength=count + 1).astype(np.int64)


def _add_values_numpy(
    labels: IntArray, values: FloatArray, table: FloatArray, highest: FloatArray, tally: IntArray
) -> None:
    """Do what :func:`_add_values` does, in the same order."""
    inside = labels > 0
    found, value = labels[inside], values[inside].astype(np.float64)
    finite = np.isfinite(value)
    tally[1] += np.bincount(found[~finite], minlength=tally.shape[1])
    found, value = found[finite], value[finite]
    new = tally[0][found] == 0
    table[0][found[new][::-1]] = value[new][::-1]  # of equal indices the last one stays: the first voxel
    tally[0] += np.bincount(found, minlength=tally.shape[1])
    difference = value - table[0][found]
    np.add.at(table[1], found, difference)
    np.add.at(table[2], found, difference * difference)
    np.minimum.at(table[3], found, value)
    np.maximum.at(highest, found, value)


@jit
def _count_runs(labels: IntArray, voxels: IntArray) -> None:
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            row = labels[i, j]
            k = 0
            while k < row.size:
                start, k = k, _run_end(row, k)
                voxels[row[start]] += k - start


@jit
def _scan(
    labels: IntArray, voxels: IntArray, low: IntArray, high: IntArray, first: IntArray, second: IntArray
) -> None:
    """Add runs along the last axis: the tables are touched once a run."""
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            row = labels[i, j]
            k = 0
            while k < row.size:
                start, k = k, _run_end(row, k)
                label = row[start]
                if label > 0:
                    voxels[label] += k - start
                    _grow(low[label], high[label], i, j, start, k)
                    _add_run(first[label], second[label], i, j, start, k)


@jit
def _run_end(row: IntArray, start: int) -> int:
    stop = start + 1
    while stop < row.size and row[stop] == row[start]:
        stop += 1
    return stop


@jit
def _grow(low: IntArray, high: IntArray, i: int, j: int, start: int, stop: int) -> None:
    low[0] = min(low[0], i)
    low[1] = min(low[1], j)
    low[2] = min(low[2], start)
    high[0] = max(high[0], i + 1)
    high[1] = max(high[1], j + 1)
    high[2] = max(high[2], stop)


@jit
def _add_run(first: IntArray, second: IntArray, i: int, j: int, start: int, stop: int) -> None:
    """Add the voxels (i, j, start..stop - 1): sums of k and of k squared have closed forms."""
    n = stop - start
    line = (start + stop - 1) * n // 2
    squares = ((stop - 1) * stop * (2 * stop - 1) - (start - 1) * start * (2 * start - 1)) // 6
    first[0] += i * n
    first[1] += j * n
    first[2] += line
    second[0, 0] += i * i * n
    second[1, 1] += j * j * n
    second[2, 2] += squares
    second[0, 1] += i * j * n
    second[1, 0] += i * j * n
    second[0, 2] += i * line
    second[2, 0] += i * line
    second[1, 2] += j * line
    second[2, 1] += j * line


@jit
def _add_values(
    labels: IntArray, values: FloatArray, table: FloatArray, highest: FloatArray, tally: IntArray
) -> None:
    flat, value = labels.ravel(), values.ravel()
    for at in range(flat.size):
        label = flat[at]
        if label > 0:
            now = np.float64(value[at])
            if not np.isfinite(now):
                tally[1, label] += 1
                continue
            if tally[0, label] == 0:
                table[0, label] = now
            tally[0, label] += 1
            difference = now - table[0, label]
            table[1, label] += difference
            table[2, label] += difference * difference
            table[3, label] = min(table[3, label], now)
            highest[label] = max(highest[label], now)
