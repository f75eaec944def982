"""Target spacing, order of the axes, and the sizes that follow (Isensee et al. 2021, Methods).

All functions take and return plain tuples. "Reader order" is ``(k, j, i)``, see :mod:`medseg.plan.schema`.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from medseg.plan.schema import Fingerprint
from medseg.types import Spacing

T = TypeVar("T")

# An axis is coarse beyond three times the others (nnU-Net `ANISO_THRESHOLD`).
ANISOTROPY = 3
# Spacing of a coarse axis: this percentile over the cases instead of the median.
COARSE_PERCENTILE = 10
# 3d_lowres exists when a full-resolution patch sees less than this share of the median case ...
LOWRES_SHARE = 0.25
# ... is searched for in steps of 3 % ...
LOWRES_STEP = 1.03
# ... and dropped unless it has at most half the voxels.
LOWRES_MIN_REDUCTION = 2


@dataclass(frozen=True)
class SpacingChoice:
    """A target spacing and how it came about.

    Attributes
    ----------
    spacing : target, reader order
    median : median spacing over the cases
    size : median shape after cropping
    axis : the coarsest axis
    rule : "median"; "percentile" for a coarse axis; "in-plane" where that would have been finer than
        the other axes; "given" by the user
    """

    spacing: Spacing
    median: Spacing
    size: tuple[float, ...]
    axis: int
    rule: Literal["median", "percentile", "in-plane", "given"]


def choose_spacing(fingerprint: Fingerprint, given: Spacing | None = None) -> SpacingChoice:
    """Return the target spacing of 3d_fullres in reader order.

    The median over the cases, except where one axis is more than three times coarser *and* has less
    than a third of the voxels of the others: there the 10th percentile, so that cases with many
    slices are not blurred, but never finer than the other axes.
    """
    spacings = np.array(fingerprint.spacings, dtype=np.float64)
    median = np.percentile(spacings, 50, axis=0)
    size = np.percentile(np.array(fingerprint.shapes_after_crop), 50, axis=0)
    axis = int(np.argmax(median))
    target, rule = median.copy(), "median"
    if given is not None:
        target, rule = np.array(given, dtype=np.float64), "given"
    elif _is_coarse(median, size, axis):
        finest = max(np.delete(median, axis))
        target[axis], rule = np.percentile(spacings[:, axis], COARSE_PERCENTILE), "percentile"
        if target[axis] < finest:
            target[axis], rule = finest + 1e-5, "in-plane"
    return SpacingChoice(_floats(target), _floats(median), _floats(size), axis, rule)  # type: ignore[arg-type]


def _is_coarse(spacing: np.ndarray, size: np.ndarray, axis: int) -> bool:
    coarse = spacing[axis] > ANISOTROPY * max(np.delete(spacing, axis))
    few = size[axis] * ANISOTROPY < min(np.delete(size, axis))
    return bool(coarse and few)


def choose_transpose(spacing: Spacing, suppress: bool = False) -> tuple[int, int, int]:
    """Return the permutation of reader order that puts the coarsest axis first.

    >>> choose_transpose((0.9, 0.9, 4.0))
    (2, 0, 1)
    """
    first = 0 if suppress else int(np.argmax(spacing))
    second, third = (axis for axis in range(3) if axis != first)
    return first, second, third


def invert(permutation: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the inverse permutation.

    >>> invert((2, 0, 1))
    (1, 2, 0)
    """
    a, b, c = (permutation.index(axis) for axis in range(3))
    return a, b, c


def median_shape(fingerprint: Fingerprint, spacing: Spacing) -> tuple[float, ...]:
    """Median over the cases of the shape after resampling to `spacing`, reader order; may end in .5."""
    old = np.array(fingerprint.spacings, dtype=np.float64)
    shapes = np.array(fingerprint.shapes_after_crop)
    resampled = np.rint(old / np.array(spacing) * shapes)  # rounds halves to even, like nnU-Net
    return _floats(np.median(resampled, axis=0))


def coarsen(spacing: Spacing) -> Spacing:
    """Return the next coarser spacing in the search for a low resolution.

    Axes finer than half of the coarsest grow alone until they are no more; then all grow together.
    """
    coarsest = max(spacing)
    fine = [coarsest / s > 2 for s in spacing]
    grows = fine if any(fine) else [True] * len(spacing)
    return tuple(s * LOWRES_STEP if g else s for s, g in zip(spacing, grows, strict=True))


def rescale_shape(shape: tuple[float, ...], old: Spacing, new: Spacing) -> tuple[float, ...]:
    """Return `shape` at another spacing, unrounded."""
    return tuple(o / n * size for size, o, n in zip(shape, old, new, strict=True))


def coarsen_to(spacing: Spacing, shape: tuple[float, ...], max_voxels: float) -> Spacing:
    """Coarsen `spacing` until the rescaled `shape` has at most `max_voxels` voxels."""
    coarse = spacing
    while math.prod(rescale_shape(shape, spacing, coarse)) > max_voxels:
        coarse = coarsen(coarse)
    return coarse


def permute(values: tuple[T, ...], order: tuple[int, ...]) -> tuple[T, ...]:
    """Return ``values[order]``."""
    return tuple(values[axis] for axis in order)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
