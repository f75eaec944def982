"""How deep inside an object a voxel lies."""

from collections.abc import Sequence

import edt
import numpy as np

from medseg.errors import GeometryError
from medseg.types import Array, FloatArray


def distance_map(
    mask: Array, spacing: Sequence[float], cap: float | None = None, threads: int = 1
) -> FloatArray:
    """Return the distance to the middle of the nearest background voxel, 0 in the background.

    The border of the image is no background: an object that the image cuts has its summit where it is
    thickest, not where it would be if it ended there. Without any background, the distance is the diagonal
    of the image (or the cap).

    Parameters
    ----------
    mask : (z, y, x) or (y, x)
        What is not 0 is inside.
    spacing : floats
        Size of a voxel along each axis.
    cap : float, optional
        Larger distances become this one.
    threads : int

    Returns
    -------
    float32, as `mask`
        In the unit of `spacing`. Exact (Felzenszwalb and Huttenlocher 2012, through the `edt` package).

    Examples
    --------
    >>> distance_map(np.array([[0, 1, 1, 1]]), (1.0, 0.5))
    array([[0. , 0.5, 1. , 1.5]], dtype=float32)
    """
    check_spacing(spacing, mask.ndim)
    inside = np.ascontiguousarray(mask if mask.dtype == bool else mask != 0)
    sizes = tuple(float(size) for size in spacing)
    distances: FloatArray = edt.edt(inside, anisotropy=sizes, black_border=False, parallel=threads)
    most = float(np.linalg.norm(np.multiply(sizes, mask.shape))) if cap is None else cap
    if distances.size and distances.max() > most:
        np.minimum(distances, np.float32(most), out=distances)
    return distances


def label_distances(labels: Array, spacing: Sequence[float], threads: int = 1) -> FloatArray:
    """Return the distance to the nearest voxel of another label or of the background, in one sweep.

    Of each label it is the :func:`distance_map` of its mask, where there is more than one value.

    Parameters
    ----------
    labels : (z, y, x) or (y, x) unsigned or not negative int
    spacing, threads : as for :func:`distance_map`

    Examples
    --------
    >>> label_distances(np.array([[3, 3, 7, 7, 7]]), (1.0, 1.0))
    array([[2., 1., 1., 2., 3.]], dtype=float32)
    """
    check_spacing(spacing, labels.ndim)
    sizes = tuple(float(size) for size in spacing)
    whole = np.ascontiguousarray(labels)
    distances: FloatArray = edt.edt(whole, anisotropy=sizes, black_border=False, parallel=threads)
    return distances


def check_spacing(spacing: Sequence[float], ndim: int) -> None:
    """Raise GeometryError unless there is one positive size for each axis."""
    if len(spacing) != ndim or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise GeometryError(f"spacing {tuple(spacing)}: expected {ndim} positive sizes, one for each axis.")
