"""Images on the grid of a network that wants objects of one size, and its maps back on theirs.

Normalisation by percentiles of the whole image, never of a tile, is InstanSeg's (Goldsborough et al., 2024,
arXiv 2408.15954); here the range is that of each channel, however narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.errors import DataError
from medseg.types import Array, FloatArray, IntArray, Shape

# Percentiles of more voxels than this are those of every n-th one.
SAMPLED = 1 << 24
# Where values are cut, where the percentiles are 0 and 1: a hot pixel must not fill a tile's statistics.
CUT = (-1.0, 2.0)

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Grid:
    """Voxels of a network over an image.

    Attributes
    ----------
    shape : voxels an axis
    spacing : their size, physical
    source : voxels of the image
    source_spacing : their size
    """

    shape: Shape
    spacing: tuple[float, ...]
    source: Shape
    source_spacing: tuple[float, ...]

    @classmethod
    def of(cls, source: Shape, spacing: Sequence[float], voxel: float) -> "Grid":
        """Return the grid whose voxels are as near to cubes of side `voxel` as whole numbers allow."""
        sizes = [max(1, round(n * s / voxel)) for n, s in zip(source, spacing, strict=True)]
        actual = tuple(n * s / m for n, s, m in zip(source, spacing, sizes, strict=True))
        return cls(tuple(sizes), actual, tuple(source), tuple(map(float, spacing)))

    def places(self, axis: int, start: int, stop: int) -> FloatArray:
        """Return where voxels `start` to `stop` of the image lie along an axis, in voxels of this grid."""
        centres = (np.arange(start, stop) + 0.5) * self.source_spacing[axis] / self.spacing[axis] - 0.5
        return np.asarray(np.clip(centres, 0, self.shape[axis] - 1))


def normalise(
    image: Array, percentiles: tuple[float, float] = (0.1, 99.9), cut: tuple[float, float] = CUT
) -> FloatArray:
    """Return (channel, *shape) float32 where the percentiles of each channel are 0 and 1.

    Parameters
    ----------
    image : (channel, *shape), any real dtype
        A channel of one value becomes 0.
    percentiles : which become 0 and 1
    cut : lowest and highest value of the result

    Raises
    ------
    DataError
        It holds values that are not finite, or complex numbers.
    """
    if image.dtype.kind not in "biuf":
        raise DataError(f"image of {image.dtype}: expected real numbers. Convert it, e.g. to float32.")
    result = np.empty(image.shape, np.float32)
    for channel, values in enumerate(image):
        flat = values.reshape(-1)
        some = flat[:: max(1, flat.size // SAMPLED)].astype(np.float64)
        if not np.isfinite(some).all() or (values.dtype.kind == "f" and not np.isfinite(values).all()):
            raise DataError("image: holds NaN or infinite values. Repair it; `medseg check` lists them.")
        low, high = np.percentile(some, percentiles) if some.size else (0.0, 1.0)
        if high <= low:  # nearly all of one value: what stands out is all there is to see
            low, high = (float(some.min()), float(some.max())) if some.size else (0.0, 1.0)
        scale = 1 / (high - low) if high > low else 0.0
        np.multiply(values.astype(np.float64) - low, scale, out=result[channel], casting="same_kind")
    return np.clip(result, *cut, out=result)


def one_if_equal(image: Array) -> Array:
    """Return a grey picture that was saved in colour as one channel, any other as it is."""
    if len(image) > 1 and all(np.array_equal(image[0], other) for other in image[1:3]):
        return image[:1]
    return image


def to_grid(image: FloatArray, shape: Shape) -> FloatArray:
    """Return (channel, *shape): means of voxels where an axis shrinks, linear where it grows."""
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None]
    n = len(shape)
    smaller = [min(a, b) for a, b in zip(image.shape[1:], shape, strict=True)]
    if smaller != list(image.shape[1:]):
        tensor = _shrink(tensor, smaller)
    if tuple(smaller) != tuple(shape):
        tensor = F.interpolate(tensor, size=list(shape), mode=_LINEAR[n], align_corners=False)
    result: FloatArray = tensor[0].numpy()
    return result


def _shrink(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Average along each axis, with parts of voxels counted as parts."""
    for axis, size in enumerate(shape, start=2):
        length = tensor.shape[axis]
        if length == size:
            continue
        edges = np.linspace(0, length, size + 1)
        sums = torch.cat([torch.zeros_like(tensor.narrow(axis, 0, 1)), tensor], axis).double().cumsum(axis)
        whole = np.minimum(np.floor(edges).astype(np.int64), length)
        part = torch.from_numpy(edges - whole).reshape(-1, *[1] * (tensor.ndim - axis - 1))
        upper = torch.from_numpy(np.minimum(whole + 1, length))
        lower = torch.from_numpy(whole)
        at = sums.index_select(axis, lower) * (1 - part) + sums.index_select(axis, upper) * part
        tensor = (at.diff(dim=axis) * (size / length)).float()
    return tensor


def labels_to_grid(labels: IntArray, shape: Shape) -> IntArray:
    """Return a label map on another grid, each voxel that of the nearest centre; int32."""
    result = labels
    for axis, (n, m) in enumerate(zip(labels.shape, shape, strict=True)):
        if n != m:
            nearest = np.minimum(((np.arange(m) + 0.5) * n / m).astype(np.int64), n - 1)
            result = np.take(result, nearest, axis)
    return result.astype(np.int32)


def read_slab(maps: FloatArray, grid: Grid, start: int, stop: int) -> FloatArray:
    """Return maps (channel, *grid.shape) on voxels `start` to `stop` of the image's first axis, linear."""
    result = maps
    for axis in range(len(grid.shape)):
        first, last = (start, stop) if axis == 0 else (0, grid.source[axis])
        result = _interpolate(result, axis + 1, grid.places(axis, first, last))
    return result


def _interpolate(array: FloatArray, axis: int, places: FloatArray) -> FloatArray:
    lower = np.minimum(np.floor(places).astype(np.int64), max(0, array.shape[axis] - 2))
    upper = np.minimum(lower + 1, array.shape[axis] - 1)
    shape = [1] * array.ndim
    shape[axis] = -1
    part = (places - lower).astype(np.float32).reshape(shape)
    low, high = np.take(array, lower, axis), np.take(array, upper, axis)
    return np.asarray(low + (high - low) * part, dtype=np.float32)
