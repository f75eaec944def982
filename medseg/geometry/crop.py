"""The box of voxels that carry signal, and the mask of what lies inside it.

Source: nnU-Net v2 ``preprocessing/cropping/cropping.py``.
"""

import numpy as np
from scipy import ndimage

from medseg.types import Array, BoolArray

Box = tuple[tuple[int, int], ...]


def bounding_box(mask: BoolArray) -> Box:
    """Return the half-open box of the True voxels, one (start, stop) an axis.

    An empty mask gives the whole array, as in nnU-Net.

    >>> bounding_box(np.array([[0, 1, 1], [0, 0, 0]], dtype=bool))
    ((0, 1), (1, 3))
    """
    return tuple(_extent(mask, axis) for axis in range(mask.ndim))


def _extent(mask: BoolArray, axis: int) -> tuple[int, int]:
    others = tuple(a for a in range(mask.ndim) if a != axis)
    hits = np.flatnonzero(mask.any(axis=others))
    return (int(hits[0]), int(hits[-1]) + 1) if hits.size else (0, mask.shape[axis])


def box_slices(box: Box) -> tuple[slice, ...]:
    """Return the index that cuts `box` out of an array (without its channel axis)."""
    return tuple(slice(start, stop) for start, stop in box)


def fill_holes(mask: BoolArray) -> BoolArray:
    """Close every hole: background that no path of face neighbours joins to the border.

    Equal to ``scipy.ndimage.binary_fill_holes`` with its default structure, by labelling the
    background once instead of dilating until nothing changes.
    """
    if mask.all():
        return mask
    # A frame of background joins everything that touches the border into the component of voxel 0.
    background = np.pad(~mask, 1, constant_values=True)
    components, _ = ndimage.label(background)
    inner = (slice(1, -1),) * mask.ndim
    outside: BoolArray = components[inner] == components[(0,) * mask.ndim]
    return ~outside


def crop_to_nonzero(array: Array) -> tuple[Box, BoolArray]:
    """Find where a multi-channel image is not zero.

    Parameters
    ----------
    array : (c, a0, a1, a2)
        Any axis order.

    Returns
    -------
    box : half-open, of the voxels with any channel != 0
    mask : bool, shape of the box
        The same voxels with holes filled. Filling cannot enlarge the box, so it is done inside.
    """
    nonzero = _nonzero(array)
    box = bounding_box(nonzero)
    return box, fill_holes(nonzero[box_slices(box)])


def nonzero_box(array: Array) -> Box:
    """Return the box of :func:`crop_to_nonzero` alone, which takes a tenth of the time and memory."""
    return bounding_box(_nonzero(array))


def _nonzero(array: Array) -> BoolArray:
    """Return where any channel is not zero as float32, in which images are preprocessed."""
    nonzero: BoolArray = np.zeros_like(array[0], dtype=bool)
    for channel in array:
        nonzero |= (channel.astype(np.float32) if channel.dtype.itemsize == 8 else channel) != 0
    return nonzero


def nonzero_mask(array: Array) -> BoolArray:
    """Return the (a0, a1, a2) mask of :func:`crop_to_nonzero` on the whole grid."""
    box, inside = crop_to_nonzero(array)
    mask = np.zeros(array.shape[1:], dtype=bool)
    mask[box_slices(box)] = inside
    return mask
