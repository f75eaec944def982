"""Which objects touch, over how large a face, and how far the nearest other one is."""

from dataclasses import dataclass

import numpy as np

from medseg.types import FloatArray, IntArray

# Voxels compared at a time.
_SLAB_VOXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class Contacts:
    """Pairs of objects that share a face of a voxel.

    Attributes
    ----------
    pairs : (m, 2) int64
        a < b, ascending.
    faces : (m, n) int64
        Shared faces, by the axis across which they lie.
    """

    pairs: IntArray
    faces: IntArray

    def degree(self, count: int) -> IntArray:
        """Return (K,) int64: how many others each object touches."""
        return np.bincount(self.pairs.ravel(), minlength=count + 1)[1:]

    def sizes(self, spacing: tuple[float, ...]) -> FloatArray:
        """Return (m,) float64: the shared area of each pair (2D: length), in squares of the unit."""
        across = np.array([np.prod(spacing) / s for s in spacing])
        return np.asarray(self.faces @ across)


def find_contacts(labels: IntArray, count: int) -> Contacts:
    """Find all pairs of touching objects.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
        Values 0 (background) to `count`.
    count : int

    Examples
    --------
    >>> found = find_contacts(np.array([[1, 1, 2], [0, 3, 2]], np.int32), 3)
    >>> found.pairs.tolist(), found.faces.tolist()
    ([[1, 2], [1, 3], [2, 3]], [[0, 1], [1, 0], [0, 1]])
    """
    n = labels.ndim
    if labels.flags.f_contiguous and not labels.flags.c_contiguous:
        found = find_contacts(labels.T, count)
        return Contacts(found.pairs, found.faces[:, ::-1])
    keys: list[IntArray] = [np.zeros(0, np.int64)]
    axes: list[IntArray] = [np.zeros(0, np.int64)]
    thick = max(1, _SLAB_VOXELS // max(1, labels[0].size))
    for start in range(0, len(labels), thick):
        for axis in range(n):
            slab = labels[start : start + thick + (axis == 0)]
            key = _meetings(slab, axis, count + 1)
            keys.append(key)
            axes.append(np.full(len(key), axis, np.int64))
    # Count every (pair, axis) once more over all slabs.
    code = np.concatenate(keys) * n + np.concatenate(axes)
    code, times = np.unique(code, return_counts=True)
    pairs, place = np.unique(code // n, return_inverse=True)
    faces = np.zeros((len(pairs), n), np.int64)
    np.add.at(faces, (place, code % n), times)
    return Contacts(np.column_stack([pairs // (count + 1), pairs % (count + 1)]), faces)


def _meetings(slab: IntArray, axis: int, base: int) -> IntArray:
    """Return smaller * base + larger for each face along an axis between two objects."""
    here = slab[tuple(slice(None, -1) if a == axis else slice(None) for a in range(slab.ndim))]
    there = slab[tuple(slice(1, None) if a == axis else slice(None) for a in range(slab.ndim))]
    meet = np.flatnonzero((here != there).ravel())
    first, second = here.ravel()[meet].astype(np.int64), there.ravel()[meet].astype(np.int64)
    both = (first > 0) & (second > 0)
    first, second = first[both], second[both]
    return np.asarray(np.minimum(first, second) * base + np.maximum(first, second))


def nearest_neighbours(points: FloatArray) -> tuple[FloatArray, IntArray]:
    """Return for each of K points (K, n) the distance to the nearest other one, and its number (1..K).

    A lone point has infinity and 0. Of equally near ones the lower number is taken.
    """
    from scipy.spatial import cKDTree

    count = len(points)
    if count < 2:
        return np.full(count, np.inf), np.zeros(count, np.int64)
    tree = cKDTree(points)
    near, index = tree.query(points, k=min(4, count))
    index = np.where(index == np.arange(count)[:, None], count, index)  # not itself
    near = np.where(index == count, np.inf, near)
    best = near.min(axis=1)
    tied = near <= best[:, None] * (1 + 1e-12)
    return best, np.where(tied, index, count).min(axis=1) + 1
