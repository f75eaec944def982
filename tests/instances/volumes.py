"""Small heights and masks that break assumptions, and what other programs say of them."""

import numpy as np
from hypothesis import strategies as st

from medseg.types import Array, BoolArray, FloatArray, IntArray

# No voxel of the background may be a way from one object to another.
_ABYSS = -1000.0


@st.composite
def integer_heights(draw: st.DrawFn, ndim: int | None = None) -> FloatArray:
    """Whole numbers on a small grid, so that plateaus, saddles and ties are everywhere."""
    axes = ndim or draw(st.sampled_from((2, 3)))
    shape = tuple(draw(st.integers(1, 11 if axes == 2 else 7)) for _ in range(axes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, draw(st.integers(2, 12)), shape).astype(np.float32)


def structure(ndim: int, connectivity: int) -> BoolArray:
    from scipy.ndimage import generate_binary_structure

    return np.asarray(generate_binary_structure(ndim, ndim if connectivity in (8, 26) else 1))


def maxima_by_reconstruction(height: FloatArray, h: float, connectivity: int) -> IntArray:
    """Label the maxima of dynamics `h` or more of whole numbers, by scikit-image's reconstruction.

    Regional maxima of the reconstruction of ``height - h`` under ``height`` have dynamics above h, so that
    half a step less gives "h or more". A second reconstruction finds regional maxima.
    """
    from scipy.ndimage import label
    from skimage.morphology import reconstruction

    footprint = structure(height.ndim, connectivity)
    barred = np.where(height > 0, height, _ABYSS).astype(np.float64)
    tops = reconstruction(barred - max(h - 0.5, 0.25), barred, footprint=footprint)
    higher = tops - reconstruction(tops - 0.125, tops, footprint=footprint)
    return np.asarray(label((higher > 0) & (height > 0), footprint)[0])


def discs(
    shape: tuple[int, ...], centres: list[tuple[float, ...]], radius: float, spacing: tuple[float, ...]
) -> BoolArray:
    """Return the union of balls; centres and radius in the unit of the spacing."""
    places = np.indices(shape).astype(float)
    scale = np.array(spacing).reshape(-1, *[1] * len(shape))
    mask = np.zeros(shape, dtype=bool)
    for centre in centres:
        away = (((places + 0.5) * scale - np.array(centre).reshape(scale.shape)) ** 2).sum(axis=0)
        mask |= away <= radius**2
    return mask


def same_partition(a: Array, b: Array) -> bool:
    """Return whether two label maps have the same background and the same objects under other numbers."""
    if a.shape != b.shape or ((a == 0) != (b == 0)).any():
        return False
    pairs = np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1)
    return bool(len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1])
