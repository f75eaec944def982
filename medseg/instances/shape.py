"""Shapes of objects from their moments and from crops: axes, surface, sphericity, Feret diameter, hull."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medseg.instances.compiled import COMPILED, jit
from medseg.instances.sums import Sums
from medseg.log import check_cancelled
from medseg.metrics.surface import element_sizes
from medseg.types import BoolArray, FloatArray, IntArray

# Histograms of this many objects are held at a time.
_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Axes:
    """Principal axes of K objects.

    Attributes
    ----------
    lengths : (K, n) float64
        Full lengths, longest first.
    directions : (K, n, n) float64
        ``directions[k, a]`` is the unit vector of axis a, in the frame of the steps. Its largest component
        is positive.
    """

    lengths: FloatArray
    directions: FloatArray


def principal_axes(sums: Sums, steps: FloatArray, voxel_extent: bool = True) -> Axes:
    """Return the axes of the ellipsoid (2D: ellipse) that has the moments of each object.

    The full length is ``2 sqrt(5 e)`` in 3D and ``4 sqrt(e)`` in 2D, e being an eigenvalue of the covariance:
    exact for an ellipsoid, whose covariance along a half-axis r is r^2 / 5 (ellipse: r^2 / 4).

    Parameters
    ----------
    sums : Sums
    steps : (n, n) float64
        Column a is one voxel step along axis a, in mm: ``numpy.diag(spacing)``, or those of an affine.
    voxel_extent : bool
        Add the covariance of a voxel's own extent, spacing^2 / 12, so that one voxel has a size. Without it
        lengths equal scikit-image's ``axis_major_length`` and ``axis_minor_length``.

    Examples
    --------
    >>> from medseg.instances.sums import sum_objects
    >>> row = np.ones((1, 5), np.int32)
    >>> principal_axes(sum_objects(row, 1), np.diag([1.0, 2.0])).lengths.round(3).tolist()
    [[11.547, 1.155]]
    """
    n = steps.shape[0]
    covariance = sums.covariance + (np.eye(n) / 12 if voxel_extent else 0.0)
    values, vectors = np.linalg.eigh(steps @ covariance @ steps.T)
    scale = 2 * np.sqrt(5.0) if n == 3 else 4.0
    lengths = scale * np.sqrt(np.maximum(values[:, ::-1], 0.0))
    directions = np.swapaxes(vectors[:, :, ::-1], 1, 2)
    largest = np.argmax(np.abs(directions), axis=2)[..., None]
    return Axes(lengths, directions * np.where(np.take_along_axis(directions, largest, 2) < 0, -1.0, 1.0))


def surface_sizes(labels: IntArray, sums: Sums, spacing: tuple[float, ...]) -> FloatArray:
    """Return the surface area of each object (2D: the length of its outline), (K,) float64.

    The surface is that of marching cubes (Lorensen & Cline 1987) at 0.5 through the object's mask, also where
    the object meets the border of the image. On masks it is larger than the true surface: by 8 to 9 % for a
    large sphere (5 % for the outline of a disc), whatever the resolution.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
    sums : Sums
        Of `labels`.
    spacing : one length per axis; the axes are taken to be at right angles
    """
    areas = element_sizes(tuple(float(s) for s in spacing))
    sizes = np.zeros(len(sums.voxels))
    for start in range(0, len(sizes), _BATCH):
        check_cancelled()
        rows = range(start, min(start + _BATCH, len(sizes)))
        histogram = np.zeros((len(rows), areas.size), np.int64)
        for row in rows:
            add = _add_codes if COMPILED else _add_codes_numpy
            add(crop_of(labels, sums, row), histogram[row - start])
        sizes[start : rows.stop] = (histogram * areas).sum(axis=1)
    return sizes


def crop_of(labels: IntArray, sums: Sums, row: int) -> BoolArray:
    """Return the mask of object `row` + 1 in its box, in C order."""
    box = tuple(slice(int(a), int(b)) for a, b in zip(sums.low[row], sums.high[row], strict=True))
    return np.ascontiguousarray(labels[box] == row + 1)


def sphericity(volume: FloatArray, surface: FloatArray, ndim: int) -> FloatArray:
    """Return how round objects are, 1 for a sphere: the surface of a sphere of equal volume over the surface.

    In 2D: circularity, 4 pi area / outline^2 (ISO 9276-6). NaN for an object without a surface.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if ndim == 2:
            return np.asarray(4 * np.pi * volume / surface**2)
        return np.asarray(np.cbrt(36 * np.pi * volume**2) / surface)


def equivalent_diameter(volume: FloatArray, ndim: int) -> FloatArray:
    """Return the diameter of the sphere (2D: disc) of equal volume."""
    return np.asarray(np.cbrt(6 * volume / np.pi) if ndim == 3 else np.sqrt(4 * volume / np.pi))


@dataclass(frozen=True, eq=False)
class Hulls:
    """Convex hulls of K objects: longest diameter, and volume (2D: area); (K,) float64 each."""

    feret: FloatArray
    volume: FloatArray


def convex_hulls(labels: IntArray, sums: Sums, steps: FloatArray) -> Hulls:
    """Measure the convex hull of the corners of each object's voxels.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
    sums : Sums
        Of `labels`.
    steps : (n, n) float64
        Column a is one voxel step along axis a, in mm.
    """
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist

    feret, volume = np.zeros(len(sums.voxels)), np.zeros(len(sums.voxels))
    for row, corners in _corners(labels, sums):
        check_cancelled()
        hull = ConvexHull(corners @ steps.T)
        volume[row] = hull.volume
        feret[row] = pdist(hull.points[hull.vertices]).max()
    return Hulls(feret, volume)


def _corners(labels: IntArray, sums: Sums) -> Iterator[tuple[int, FloatArray]]:
    """Yield the first and last corner, in indices, of each object on every line along the last axis."""
    for row in np.flatnonzero(sums.voxels):
        mask = crop_of(labels, sums, int(row))
        size, hit = mask.shape[-1], mask.any(axis=-1)
        first = np.where(hit, np.argmax(mask, axis=-1), size + 1)
        last = np.where(hit, size - np.argmax(mask[..., ::-1], axis=-1), -1)  # its far edge
        for axis in range(hit.ndim):  # a line of corners belongs to the voxels on both sides of it
            ends = [(int(a == axis), int(a == axis)) for a in range(hit.ndim)]
            low, high = np.pad(first, ends, constant_values=size + 1), np.pad(last, ends, constant_values=-1)
            here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(hit.ndim))
            there = tuple(slice(1, None) if a == axis else slice(None) for a in range(hit.ndim))
            first, last = np.minimum(low[here], low[there]), np.maximum(high[here], high[there])
        lines = np.argwhere(last >= 0)
        edges = [np.column_stack([lines, edge[last >= 0]]) for edge in (first, last)]
        yield int(row), np.concatenate(edges).astype(np.float64)


def _add_codes_numpy(mask: BoolArray, histogram: IntArray) -> None:
    """Count the 2x2x2 (2x2) neighbourhoods of a mask by the code of :func:`element_sizes`."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = tuple(n + 1 for n in mask.shape)
    codes = np.zeros(shape, np.uint8)
    for corner in np.ndindex(*[2] * mask.ndim):
        codes <<= 1
        codes |= padded[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))]
    histogram += np.bincount(codes.ravel(), minlength=histogram.size)


def _add_codes(mask: BoolArray, histogram: IntArray) -> None:
    padded = np.pad(mask, 1)
    if mask.ndim == 2:
        _add_squares(padded, histogram)
    else:
        _add_cubes(padded, histogram)


@jit
def _add_squares(padded: BoolArray, histogram: IntArray) -> None:
    for i in range(padded.shape[0] - 1):
        for j in range(padded.shape[1] - 1):
            code = 8 * padded[i, j] + 4 * padded[i, j + 1] + 2 * padded[i + 1, j] + padded[i + 1, j + 1]
            histogram[code] += 1


@jit
def _add_cubes(padded: BoolArray, histogram: IntArray) -> None:
    """Slide along the last axis: a code is the four new voxels and the four of the code before."""
    for i in range(padded.shape[0] - 1):
        for j in range(padded.shape[1] - 1):
            a, b = padded[i, j], padded[i, j + 1]
            c, d = padded[i + 1, j], padded[i + 1, j + 1]
            before = 128 * a[0] + 32 * b[0] + 8 * c[0] + 2 * d[0]
            for k in range(1, padded.shape[2]):
                now = 64 * a[k] + 16 * b[k] + 4 * c[k] + 1 * d[k]
                histogram[before + now] += 1
                before = 2 * now
