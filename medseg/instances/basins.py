"""Splitting by basins: voxels climb to summits, and summits with no valley between them are one object.

Equal to h-maxima as seeds and a flooding of the height map, but without reconstruction and without a priority
queue: linear in the voxels. Another depth `h` needs neither the ascent nor the saddles again.
"""

from dataclasses import dataclass

import numpy as np

from medseg.errors import DataError
from medseg.instances import basins_compiled, basins_numpy
from medseg.instances.compiled import COMPILED, each_slab
from medseg.instances.hierarchy import Hierarchy
from medseg.instances.neighbours import as_volume, neighbourhood
from medseg.types import Array, FloatArray, IntArray

# What the three sweeps are taken from: equal results, a tenth of the time where numba is installed.
sweeps = basins_compiled if COMPILED else basins_numpy

_SIGN = np.int32(0x7FFFFFFF)
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Basins:
    """The basins of a height map, and how they join.

    Attributes
    ----------
    numbers : int32, as the height map
        0 outside, 1 to k by the linear index of the summits.
    hierarchy : Hierarchy
        Peaks and saddles.
    """

    numbers: IntArray
    hierarchy: Hierarchy

    def labels(self, h: float = 0.0, rel: float = 0.0, threads: int = 1) -> IntArray:
        """Return the label map for another depth: see :meth:`Hierarchy.merge`. Costs one look-up a voxel."""
        return relabel(self.numbers, self.hierarchy.merge(h, rel), threads)


def find_basins(height: Array, floor: float | None = 0.0, connectivity: int = 26, threads: int = 1) -> Basins:
    """Find the basins of a height map and the saddles between them.

    Parameters
    ----------
    height : (z, y, x) or (y, x)
        Distance to the background, probability, intensity: any number, taken as float32. High is inside.
    floor : float or None
        Voxels that are not above it are background. None: there is none; see also :func:`outside`.
    connectivity : 26 or 6; 8 or 4 in two dimensions
        Of the climb and of the saddles, which must be the same: else one summit counts several times.
    threads : int
        The result does not depend on it.

    Returns
    -------
    Basins
        Memory: the height map as float32 and 5 bytes a voxel.

    Raises
    ------
    DataError
        A height is not a number, or infinite.

    Examples
    --------
    >>> find_basins(np.array([[1, 3, 2, 3, 0, 1]])).labels(h=1.0)
    array([[1, 1, 1, 2, 0, 3]], dtype=int32)
    >>> find_basins(np.array([[1, 3, 2, 3, 0, 1]])).labels(h=1.5)
    array([[1, 1, 1, 1, 0, 2]], dtype=int32)
    """
    kind = neighbourhood(connectivity, height.ndim)
    levels, lowest = to_levels(as_volume(height), floor)
    codes = sweeps.ascend(levels, lowest, kind, threads)
    numbers, roots = sweeps.resolve(codes, threads)
    del codes
    pairs, saddles = sweeps.find_saddles(levels, numbers, kind, threads)
    peaks = from_levels(levels.reshape(-1)[roots])
    return Basins(numbers.reshape(height.shape), Hierarchy(roots, peaks, pairs, from_levels(saddles)))


def to_levels(height: Array, floor: float | None) -> tuple[IntArray, int]:
    """Return heights as integers that order like them, and the level of the floor.

    The bits of positive floats order as integers do; those of negative ones in reverse (IEEE 754). A copy is
    made only where the floor is negative, and where the heights are no float32 yet.

    Raises
    ------
    DataError
        A height is not finite.
    """
    heights = height.astype(np.float32, copy=False)
    if heights.size and not (np.isfinite(heights.max()) and np.isfinite(heights.min())):
        raise DataError(
            "height map: some values are not finite numbers. Replace NaN and infinity, for example by 0."
        )
    levels: IntArray = heights.view(np.int32)
    if floor is None:
        return ordered(levels), np.iinfo(np.int32).min
    lowest = ordered(np.array([floor], dtype=np.float32).view(np.int32))[0]
    return (levels if floor >= 0 else ordered(levels)), int(lowest)


def from_levels(levels: IntArray) -> FloatArray:
    """Return the heights of levels."""
    return ordered(levels.astype(np.int32, copy=False)).view(np.float32)


def ordered(bits: IntArray) -> IntArray:
    """Turn the order of negative floats' bits; the same again turns it back."""
    return bits ^ ((bits >> 31) & _SIGN)


def relabel(numbers: IntArray, table: IntArray, threads: int = 1, in_place: bool = False) -> IntArray:
    """Return ``table[numbers]`` as int32, by slabs; in place, where the numbers are not needed any more."""
    labels = numbers if in_place else np.empty(numbers.shape, dtype=np.int32)
    flat, into = numbers.reshape(-1), labels.reshape(-1)

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, _CHUNK):  # so few that the copy of "take" stays in the cache
            part = slice(first, min(first + _CHUNK, stop))
            into[part] = np.take(table, flat[part])

    each_slab(work, flat.size, threads)
    return labels
