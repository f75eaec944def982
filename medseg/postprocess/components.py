"""Connected components of a label map: keep the largest, remove the small, close holes.

Components are joined over faces, edges and corners (26 neighbours, 8 in a slice), as nnU-Net does
(acvl_utils ``remove_all_but_largest_component``, scikit-image's full connectivity). All functions return a
new array of the same dtype; removed voxels become background, 0.
"""

import cc3d
import numpy as np
from scipy.ndimage import binary_fill_holes

from medseg.errors import GeometryError
from medseg.labels import LabelValue
from medseg.metrics.overlap import mask_of
from medseg.types import Array, BoolArray, IntArray


def keep_largest(label_map: Array, label: LabelValue) -> Array:
    """Keep the largest component of a label, or of the union of several; equally large ones all stay.

    Parameters
    ----------
    label_map : (i, j, k) or (i, j) int
        Any axis order.
    label : int or tuple of int
        A tuple is one object: its labels are joined before components are formed.

    Examples
    --------
    >>> keep_largest(np.array([[1, 1, 0, 2], [0, 0, 0, 0], [1, 0, 2, 2]]), 1)
    array([[1, 1, 0, 2],
           [0, 0, 0, 0],
           [0, 0, 2, 2]])
    """
    components, sizes = _components(mask_of(label_map, label))
    return _without(label_map, components, sizes < sizes.max(initial=0))


def remove_small(label_map: Array, label: LabelValue, min_mm3: float, voxel_mm3: float) -> Array:
    """Remove components of a label (or of a union) that are smaller than `min_mm3`.

    Parameters
    ----------
    label_map, label
        As for :func:`keep_largest`.
    min_mm3, voxel_mm3 : float
        Smallest volume that stays, and the volume of a voxel.
    """
    components, sizes = _components(mask_of(label_map, label))
    return _without(label_map, components, sizes * voxel_mm3 < min_mm3)


def fill_holes(label_map: Array, label: int) -> Array:
    """Give background that a label encloses completely (not even open by a corner) to that label.

    Other labels inside of it stay what they are.
    """
    filled = binary_fill_holes(label_map == label)
    result = label_map.copy()
    result[filled & (label_map == 0)] = label
    return result


def _components(mask: BoolArray) -> tuple[IntArray, IntArray]:
    """Return component numbers (0 outside of the mask) and the voxels of components 1, 2, ..."""
    if mask.ndim not in (2, 3):
        raise GeometryError(f"label map with {mask.ndim} axes: expected 2 or 3. Take one channel.")
    connectivity = 26 if mask.ndim == 3 else 8
    # cc3d 4.1 raises on grids of one slice that hold many single voxels; one empty layer more avoids it
    padded = np.pad(mask, [(0, 1)] * mask.ndim)
    labelled: IntArray = cc3d.connected_components(padded, connectivity=connectivity)
    components = labelled[tuple(slice(n) for n in mask.shape)]
    return components, np.bincount(labelled.ravel(order="K"))[1:]


def _without(label_map: Array, components: IntArray, removed: BoolArray) -> Array:
    """Return a copy in which component ``k`` is background where ``removed[k - 1]``."""
    result = label_map.copy()
    if removed.any():
        result[np.concatenate(([False], removed))[components]] = 0
    return result
