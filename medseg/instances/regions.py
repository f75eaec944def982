"""Objects inside regions of another label map: the parent of each, and counts and densities of a region."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medseg.errors import GeometryError, LabelError
from medseg.types import FloatArray, IntArray

_SLAB_VOXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class Parents:
    """The region of each object.

    Attributes
    ----------
    region : (K,) int64
        The region that holds most of the object's voxels (of equal ones the lowest number); 0 where none of
        its voxels lies in a region.
    fraction : (K,) float64
        The part of the object's voxels that lie in it.
    """

    region: IntArray
    fraction: FloatArray


@dataclass(frozen=True, eq=False)
class RegionCounts:
    """What is inside each region; one row per region, ascending.

    Attributes
    ----------
    region : (R,) int64
    voxels : (R,) int64
        Of the region itself.
    count : (R,) int64
        Objects whose parent it is.
    object_voxels : (R,) int64
        Voxels of the region that any object covers, whoever is its parent.
    """

    region: IntArray
    voxels: IntArray
    count: IntArray
    object_voxels: IntArray


def find_parents(labels: IntArray, regions: IntArray, voxels: IntArray) -> tuple[Parents, RegionCounts]:
    """Give each object to a region, and count them.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
        Objects 1..K.
    regions : int array of the same shape
        0 is no region.
    voxels : (K,) int64
        Of each object.

    Raises
    ------
    GeometryError
        Shapes differ.
    LabelError
        Regions are not whole numbers from 0.

    Examples
    --------
    >>> labels, regions = np.array([1, 1, 1, 0, 2], np.int32), np.array([0, 5, 5, 5, 7])
    >>> parents, counts = find_parents(labels[None], regions[None], np.array([3, 1]))
    >>> parents.region.tolist(), counts.region.tolist(), counts.count.tolist()
    ([5, 7], [5, 7], [1, 1])
    """
    if labels.shape != regions.shape:
        raise GeometryError(f"regions of shape {regions.shape} do not fit objects of shape {labels.shape}.")
    if regions.dtype.kind not in "uib" or (regions.size and int(regions.min()) < 0):
        raise LabelError("regions: expected a label map of whole numbers from 0.")
    known, sizes, objects, inside, overlap = _overlaps(labels, regions)
    region, best = np.zeros(len(voxels), np.int64), np.zeros(len(voxels), np.int64)
    kept = (objects > 0) & (known[inside] > 0)
    # Ascending overlap, then descending region: the last one written is the largest, of equals the lowest.
    order = np.lexsort((-inside[kept], overlap[kept]))
    row = objects[kept][order] - 1
    region[row] = known[inside[kept][order]]
    best[row] = overlap[kept][order]
    covered = np.bincount(inside[objects > 0], overlap[objects > 0], len(known)).astype(np.int64)
    listed = known > 0
    count = np.array([np.count_nonzero(region == value) for value in known[listed]], np.int64)
    counts = RegionCounts(known[listed], sizes[listed], count, covered[listed])
    return Parents(region, best / np.maximum(voxels, 1)), counts


def _overlaps(labels: IntArray, regions: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Return region numbers and sizes, and for each overlap its object, place of the region, and voxels."""
    if labels.flags.f_contiguous and not labels.flags.c_contiguous:
        labels, regions = labels.T, regions.T
    first, second = labels.ravel(), regions.ravel()
    keys, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for start in range(0, first.size, _SLAB_VOXELS):
        objects = first[start : start + _SLAB_VOXELS].astype(np.uint64)
        inside = second[start : start + _SLAB_VOXELS].astype(np.uint64)
        if int(inside.max()) >= 1 << 32:
            raise LabelError("regions: numbers above 4294967295. Renumber them.")
        key = objects << np.uint64(32) | inside
        edges = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1], [True])))  # of runs
        part, place = np.unique(key[edges[:-1]], return_inverse=True)
        keys.append(part)
        counts.append(np.bincount(place, np.diff(edges), len(part)).astype(np.int64))
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    overlap = np.bincount(place, np.concatenate(counts), len(pairs)).astype(np.int64)
    values = (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    known, rank = np.unique(values, return_inverse=True)
    sizes = np.bincount(rank, overlap, len(known)).astype(np.int64)
    return known, sizes, (pairs >> np.uint64(32)).astype(np.int64), rank, overlap


def region_names(regions: IntArray, names: Mapping[int, str] | None) -> list[str]:
    """Return a name for each region number: the given one, or ``region 3``."""
    given = names or {}
    return [given.get(int(value), f"region {int(value)}") for value in regions]
