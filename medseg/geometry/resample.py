"""Resampling between two grids that share axes and extent, as matrix products.

A spline zoom along the axes is linear and separable: each axis is one matrix (:func:`axis_weights`), and
a volume is resized by at most three products in BLAS instead of a 64-point sum a voxel. Values follow
nnU-Net v2 ``preprocessing/resampling/default_resampling.py``, that is ``skimage.transform.resize``
(mode edge, no anti-aliasing) = ``scipy.ndimage.zoom(mode="nearest", grid_mode=True)`` clipped to the range of
the input, and batchgenerators 0.25.5 ``resize_segmentation`` for label maps.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage

from medseg.types import Array, BoolArray, FloatArray, IntArray, Shape, Spacing

# nnU-Net's ANISO_THRESHOLD: slices thicker than 3 in-plane voxels are resampled one by one.
ANISOTROPY_THRESHOLD = 3.0
# Weights below this are dropped: the cubic prefilter decays by 0.268 a voxel, so 18 neighbours remain.
NEGLIGIBLE_WEIGHT = 1e-10
# Output rows a product makes at once; more rows read a wider band of the input, fewer waste calls.
BLOCK_ROWS = 48
# Border voxels of a label map that are decided at once.
BLOCK_VOXELS = 1 << 16


def target_shape(shape: Shape, spacing: Spacing, new_spacing: Spacing) -> Shape:
    """Return the voxels an axis at `new_spacing`, with nnU-Net's order of operations.

    >>> target_shape((10, 20), (3.0, 1.0), (1.5, 2.0))
    (20, 10)
    """
    return tuple(round(old / new * size) for old, new, size in zip(spacing, new_spacing, shape, strict=True))


def separate_axis(spacing: Spacing, new_spacing: Spacing) -> int | None:
    """Return the axis across which slices are resampled one by one, or None for plain 3D.

    The current spacing decides if it is anisotropic (largest / smallest > 3), else the new one. No
    axis is separate where two share the largest spacing.
    """
    for candidate in (spacing, new_spacing):
        if max(candidate) / min(candidate) > ANISOTROPY_THRESHOLD:
            coarse = [axis for axis, size in enumerate(candidate) if max(candidate) / size == 1]
            return coarse[0] if len(coarse) == 1 else None
    return None


@lru_cache(maxsize=64)
def axis_weights(n_in: int, n_out: int, order: int) -> FloatArray:
    """Return the matrix that a spline zoom along one axis is.

    Parameters
    ----------
    n_in, n_out : voxels before and after
    order : 0 (nearest) to 5; 1 is linear, 3 cubic with prefilter

    Returns
    -------
    (n_out, n_in) float64, read-only; rows sum to 1
    """
    if n_in == n_out:
        weights = np.eye(n_in)
    else:
        # The second axis has factor 1, so each column is the response to one input voxel.
        factors = (n_out / n_in, 1.0)
        zoom: Any = ndimage.zoom
        weights = zoom(np.eye(n_in), factors, order=order, mode="nearest", grid_mode=True)
        weights[np.abs(weights) < NEGLIGIBLE_WEIGHT] = 0.0
    weights.flags.writeable = False
    return weights


def source_positions(n_in: int, n_out: int) -> FloatArray:
    """Return where the centre of each output voxel lies on the input axis, in voxels; may leave it by half.

    The operations are scipy's, in scipy's order, so that ties round alike.
    """
    positions: FloatArray = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    return positions


def nearest_voxels(n_in: int, n_out: int) -> IntArray:
    """Return the index of the input voxel that each output voxel copies (order 0; halves go up)."""
    indices: IntArray = np.floor(source_positions(n_in, n_out) + 0.5).astype(np.intp)
    return np.clip(indices, 0, n_in - 1)


@dataclass(frozen=True, eq=False)
class Taps:
    """The two neighbours that each output voxel of one axis reads, for order 0 and 1.

    Attributes
    ----------
    lower, upper : (m,)
        Input voxels, ascending; `upper` is `lower` or the one after it.
    weights : (2, m) float32
        Of lower and upper: at least 0, sum 1; the upper one is 0 where `upper` is `lower`.
    n_in : int
        Input voxels of the axis.
    """

    lower: IntArray
    upper: IntArray
    weights: FloatArray
    n_in: int

    def ready(self, start: int, stop: int) -> slice:
        """Return the outputs that input voxels [start, stop) suffice for, and [0, start + 1) do not.

        Consecutive parts of the input that overlap by one voxel give consecutive parts of the output.
        """
        first = 0 if start == 0 else int(np.searchsorted(self.lower, start))
        last = len(self.lower) if stop == self.n_in else int(np.searchsorted(self.lower, stop - 1))
        return slice(first, max(first, last))


def axis_taps(n_in: int, n_out: int, order: int) -> Taps:
    """Return what a zoom of order 0 or 1 along one axis reads; equal to :func:`axis_weights`."""
    if n_in == n_out or order == 0:
        voxels = nearest_voxels(n_in, n_out)
        return Taps(voxels, voxels, np.repeat(np.array([[1], [0]], np.float32), n_out, axis=1), n_in)
    (lower, upper), weights = _linear_neighbours(n_in, n_out)
    weights = np.where(upper == lower, np.array([[1.0], [0.0]]), weights).astype(np.float32)
    return Taps(lower, upper, weights, n_in)


def zoom_taps(
    shape: Shape, target: Shape, order: int, separate: int | None = None, order_z: int = 0
) -> tuple[Taps, ...] | None:
    """Return the taps of each axis of :func:`resample`, or None where a spline above order 1 is wanted."""
    orders = [order_z if axis == separate else order for axis in range(len(shape))]
    if any(n != m and o > 1 for n, m, o in zip(shape, target, orders, strict=True)):
        return None
    return tuple(axis_taps(n, m, o) for n, m, o in zip(shape, target, orders, strict=True))


def resample(
    array: Array, shape: Shape, order: int, separate: int | None = None, order_z: int = 0
) -> FloatArray:
    """Resample an image to `shape`.

    Parameters
    ----------
    array : (c, a0, a1, a2), floating
    shape : (m0, m1, m2)
    order : spline order; within slices only where `separate` is given
    separate : axis from :func:`separate_axis`
    order_z : spline order across the slices

    Returns
    -------
    (c, m0, m1, m2) of the input's dtype, at least float32 inside; the input itself where `shape` is its own.
    Clipped to the range of each channel (of each slice with `separate`).
    """
    if tuple(array.shape[1:]) == tuple(shape):
        return array
    result = np.empty((array.shape[0], *shape), dtype=array.dtype)
    for channel, out in zip(array, result, strict=True):
        out[...] = resample_rows(channel, shape, slice(0, shape[0]), order, separate, order_z)
    return result


def resample_rows(
    channel: Array, shape: Shape, rows: slice, order: int, separate: int | None = None, order_z: int = 0
) -> FloatArray:
    """Return some rows along the first axis of one resampled channel, reading only what they need.

    Parameters
    ----------
    channel : (a0, a1, a2), floating, may be memory-mapped
    shape : (m0, m1, m2) of the whole result
    rows : slice of range(m0), both ends given
    order, separate, order_z : as for :func:`resample`

    Returns
    -------
    (rows, m1, m2), at least float32; equal to those rows of :func:`resample`
    """
    if separate is None:
        return _clip_like(_resize(channel, shape, order, rows), channel, order, (0, 1, 2))
    if order_z != 0:
        whole = _resize_slices(
            channel, shape, order, separate, slice(0, _in_plane(channel, shape, separate)[0])
        )
        return _resize(whole, shape, order_z, rows)
    # Take only the slices that are used, before the work in the plane.
    slices = nearest_voxels(channel.shape[separate], shape[separate])
    used, repeat = np.unique(slices[rows] if separate == 0 else slices, return_inverse=True)
    picked = np.take(channel, used, axis=separate)
    plane = _resize_slices(picked, shape, order, separate, slice(0, len(used)) if separate == 0 else rows)
    return np.take(plane, repeat, axis=separate)


def _in_plane(channel: Array, shape: Shape, separate: int) -> Shape:
    return tuple(channel.shape[a] if a == separate else n for a, n in enumerate(shape))


def _resize_slices(channel: Array, shape: Shape, order: int, separate: int, rows: slice) -> FloatArray:
    plane_axes = tuple(axis for axis in range(3) if axis != separate)
    resized = _resize(channel, _in_plane(channel, shape, separate), order, rows)
    return _clip_like(resized, channel, order, plane_axes)


def _clip_like(resized: FloatArray, source: Array, order: int, axes: tuple[int, ...]) -> FloatArray:
    if order < 2:  # weights are positive and sum to 1: nothing can leave the range
        return resized
    low = source.min(axis=axes, keepdims=True)
    high = source.max(axis=axes, keepdims=True)
    return np.clip(resized, low, high)


def _resize(channel: Array, shape: Shape, order: int, rows: slice) -> FloatArray:
    """Zoom one (a0, a1, a2) channel to `shape` without clipping and return some rows of it.

    Axes that shrink most go first, so that later ones have less to do; among equals the last axis, whose
    products cost most.
    """
    wanted = (rows.stop - rows.start, *shape[1:])
    for axis in sorted(range(3), key=lambda a: (wanted[a] / channel.shape[a], -a)):
        n_in = channel.shape[axis]
        if axis == 0 and n_in == shape[0]:
            channel = channel[rows]
        elif n_in != shape[axis]:
            weights = axis_weights(n_in, shape[axis], order)
            channel = apply_weights(channel, weights[rows] if axis == 0 else weights, axis)
    return channel.astype(np.result_type(channel.dtype, np.float32), copy=False)


def apply_weights(channel: Array, weights: FloatArray, axis: int) -> FloatArray:
    """Multiply one axis of a (a0, a1, a2) array by a (m, n) matrix, skipping the zeros off its band."""
    dtype = np.result_type(channel.dtype, np.float32)
    rows = weights.shape[0]
    result = np.empty((*channel.shape[:axis], rows, *channel.shape[axis + 1 :]), dtype=dtype)
    for start in range(0, rows, BLOCK_ROWS):
        block = weights[start : start + BLOCK_ROWS]
        used = np.flatnonzero(block.any(axis=0))
        band = slice(int(used[0]), int(used[-1]) + 1)
        source = channel[(slice(None),) * axis + (band,)].astype(dtype, copy=False)
        target = result[(slice(None),) * axis + (slice(start, start + BLOCK_ROWS),)]
        _multiply(np.ascontiguousarray(block[:, band], dtype=dtype), source, target, axis)
    return result


def _multiply(block: FloatArray, source: FloatArray, target: FloatArray, axis: int) -> None:
    """Write ``block @ source`` along `axis` into `target`."""
    if axis == 0:
        np.matmul(block, source.reshape(source.shape[0], -1), out=target.reshape(target.shape[0], -1))
    elif axis == 1:
        np.matmul(block, source, out=target)
    else:
        target[...] = source @ block.T


def resample_labels(array: IntArray, shape: Shape, order: int, separate: int | None = None) -> IntArray:
    """Resample a label map to `shape`: each label's indicator is zoomed, the largest wins.

    Exact ties go to the label of the nearest voxel if it is among them, else to the smallest label.
    Across the slices of a `separate` axis the nearest one is taken.

    Parameters
    ----------
    array : (c, a0, a1, a2), integer
    shape : (m0, m1, m2)
    order : spline order of the indicators

    Returns
    -------
    (c, m0, m1, m2) of the input's dtype; the input itself where `shape` is its own
    """
    if tuple(array.shape[1:]) == tuple(shape):
        return array
    return np.stack([_resample_label_map(channel, shape, order, separate) for channel in array])


def _resample_label_map(labels: IntArray, shape: Shape, order: int, separate: int | None) -> IntArray:
    if separate is None:
        return _resize_labels(labels, shape, order)
    slices = nearest_voxels(labels.shape[separate], shape[separate])
    used, repeat = np.unique(slices, return_inverse=True)
    in_plane = tuple(len(used) if axis == separate else n for axis, n in enumerate(shape))
    return np.take(
        _resize_labels(np.take(labels, used, axis=separate), in_plane, order), repeat, axis=separate
    )


def _resize_labels(labels: IntArray, shape: Shape, order: int) -> IntArray:
    nearest = labels[np.ix_(*[nearest_voxels(n, m) for n, m in zip(labels.shape, shape, strict=True)])]
    if order == 0:
        return nearest
    if order == 1:
        return _linear_vote(labels, nearest)
    return _spline_vote(labels, nearest, order)


class _Election:
    """The running winner among labels whose scores are counted one after the other, ascending."""

    def __init__(self, nearest: IntArray) -> None:
        self.nearest = nearest
        self.winner = nearest.copy()
        self.best = np.full(nearest.shape, -np.inf)
        self.of_nearest = np.zeros(nearest.shape)

    def count(self, label: int, score: FloatArray) -> None:
        np.copyto(self.of_nearest, score, where=self.nearest == label)
        np.copyto(self.winner, label, where=score > self.best)
        np.maximum(self.best, score, out=self.best)

    def result(self) -> IntArray:
        np.copyto(self.winner, self.nearest, where=self.of_nearest == self.best)
        return self.winner


def _spline_vote(labels: IntArray, nearest: IntArray, order: int) -> IntArray:
    election = _Election(nearest)
    for label in np.unique(labels):
        indicator = (labels == label).astype(np.float64)
        score = _resize(indicator, nearest.shape, order, slice(0, nearest.shape[0]))
        election.count(label, np.clip(score, 0.0, 1.0))
    return election.result()


def _linear_vote(labels: IntArray, nearest: IntArray) -> IntArray:
    """Decide order 1 only where the eight neighbours differ; elsewhere their one label has all the weight.

    Weights are multiplied and added in the order of scipy's ``NI_ZoomShift`` (first axis first, last
    axis fastest) in float64, so that even ties that hang on a rounding are decided as there.
    """
    axes = [_linear_neighbours(n, m) for n, m in zip(labels.shape, nearest.shape, strict=True)]
    mixed = np.flatnonzero(~_uniform_cells(labels)[np.ix_(*[voxels[0] for voxels, _ in axes])])
    winner = nearest.reshape(-1)  # np.ix_ made `nearest` a fresh array
    for start in range(0, mixed.size, BLOCK_VOXELS):
        chosen = mixed[start : start + BLOCK_VOXELS]
        index = np.unravel_index(chosen, nearest.shape)
        corners = []
        for corner in np.ndindex(2, 2, 2):
            sides = [axes[a][0][side][index[a]] for a, side in enumerate(corner)]
            parts = [axes[a][1][side][index[a]] for a, side in enumerate(corner)]
            corners.append((labels[tuple(sides)], parts[0] * parts[1] * parts[2]))
        winner[chosen] = _vote(corners, winner[chosen])
    return winner.reshape(nearest.shape)


def _vote(corners: list[tuple[IntArray, FloatArray]], nearest: IntArray) -> IntArray:
    election = _Election(nearest)
    for label in np.unique(np.concatenate([found for found, _ in corners])):
        score = np.zeros(nearest.shape)
        for found, weight in corners:
            score += np.where(found == label, weight, 0.0)
        election.count(label, np.minimum(score, 1.0))
    return election.result()


def _linear_neighbours(n_in: int, n_out: int) -> tuple[IntArray, FloatArray]:
    """Return (2, n_out) lower and upper source voxel of each output voxel, and (2, n_out) their weights."""
    position = source_positions(n_in, n_out)
    floor = np.floor(position)
    voxels: IntArray = np.clip(np.stack([floor, floor + 1]).astype(np.intp), 0, n_in - 1)
    lower = 1.0 - (position - floor)
    return voxels, np.stack([lower, 1.0 - lower])  # scipy makes the last weight the rest to 1


def _uniform_cells(labels: IntArray) -> BoolArray:
    """Return for each voxel whether it and its upper neighbours (up to eight) hold one label."""
    uniform = np.ones(labels.shape, dtype=bool)
    for axis in range(3):
        low = (slice(None),) * axis + (slice(None, -1),)
        high = (slice(None),) * axis + (slice(1, None),)
        # Equal edges along this axis, and cells of both ends uniform along the axes before it.
        joined = uniform.copy()
        joined[low] &= uniform[high] & (labels[low] == labels[high])
        uniform = joined
    return uniform
