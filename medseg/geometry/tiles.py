"""Where a sliding window stands, how much each of its voxels counts, and padding to its size.

Source: nnU-Net v2 ``inference/sliding_window_prediction.py`` and acvl_utils ``pad_nd_image``.
"""

from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any, cast

import numpy as np
from scipy import ndimage

from medseg.errors import ConfigError
from medseg.types import Array, FloatArray, Shape

# nnU-Net's predictor: sigma = patch / 8, maximum 10 (so that float16 keeps the tails).
GAUSSIAN_SIGMA = 1.0 / 8
GAUSSIAN_PEAK = 10.0


def tile_starts(size: int, patch: int, step: float = 0.5) -> list[int]:
    """Return the first voxel of each tile along one axis.

    Tiles are evenly spread, at most ``step * patch`` apart, the last one flush with the end.

    >>> tile_starts(110, 64)
    [0, 23, 46]

    Raises
    ------
    ConfigError
        The axis is shorter than the patch (pad it first) or the step is not in (0, 1].
    """
    if not 0 < step <= 1:
        raise ConfigError(f"step {step}: expected more than 0 and at most 1 patch.")
    if size < patch:
        raise ConfigError(f"axis of {size} voxels is shorter than the patch of {patch}. Pad it with pad_to.")
    count = ceil((size - patch) / (patch * step)) + 1
    if count == 1:
        return [0]
    spread = (size - patch) / (count - 1)
    return [int(np.round(spread * i)) for i in range(count)]


def tile_slices(shape: Shape, patch: Shape, step: float = 0.5) -> list[tuple[slice, ...]]:
    """Return the index of every tile of a volume, first axis outermost.

    A patch with one axis less than `shape` (2D network) visits every slice of the first axis.
    """
    if len(patch) == len(shape) - 1:
        patch = (1, *patch)
        starts = [list(range(shape[0]))]
    else:
        starts = [tile_starts(shape[0], patch[0], step)]
    starts += [tile_starts(n, p, step) for n, p in zip(shape[1:], patch[1:], strict=True)]
    return [tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True)) for corner in product(*starts)]


@lru_cache(maxsize=4)
def gaussian_weights(patch: Shape, dtype: Any = np.float16) -> FloatArray:
    """Return how much each voxel of a tile counts: a Gaussian with its peak at ``patch // 2``.

    Parameters
    ----------
    patch : tile size, any number of axes
    dtype : of the result; values that it rounds to 0 become its smallest nonzero one of the tile

    Returns
    -------
    (patch) array, read-only, all values > 0, maximum 10
    """
    weights = np.ones((), dtype=np.float64)
    for size in patch:
        weights = np.multiply.outer(weights, _gaussian_profile(size))
    weights = (weights / (weights.max() / GAUSSIAN_PEAK)).astype(dtype)
    weights[weights == 0] = weights[weights > 0].min()
    weights.flags.writeable = False
    return cast(FloatArray, weights)


def _gaussian_profile(size: int) -> FloatArray:
    impulse = np.zeros(size)
    impulse[size // 2] = 1
    profile: FloatArray = ndimage.gaussian_filter1d(impulse, size * GAUSSIAN_SIGMA, mode="constant")
    return profile


def pad_to(array: Array, patch: Shape) -> tuple[Array, tuple[slice, ...]]:
    """Pad the last axes with zeros, centred, to at least `patch`.

    Parameters
    ----------
    array : (..., a0, a1, a2)
    patch : as many or fewer axes, aligned with the last ones

    Returns
    -------
    padded : the array itself where it is large enough
    inner : index of the original voxels in `padded` (all axes)
    """
    lead = array.ndim - len(patch)
    missing = [0] * lead + [max(0, p - n) for p, n in zip(patch, array.shape[lead:], strict=True)]
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, array.shape, strict=True))
    if not any(missing):
        return array, inner
    padded = np.zeros(tuple(n + m for n, m in zip(array.shape, missing, strict=True)), dtype=array.dtype)
    padded[inner] = array
    return padded, inner
