"""What a centre-offset network learns of a label map: how deep in an object a voxel is, and where its centre.

Source: Cheng et al., Panoptic-DeepLab, CVPR 2020 (arXiv 1911.10194), section 3, with lengths in physical
units; the distance map, 1 in the middle of every object, is that of Schmidt et al., StarDist, MICCAI 2018.
Positions are physical: voxel i of an axis lies at (i + 0.5) * spacing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import edt
import numpy as np
from scipy import ndimage

from medseg.errors import ConfigError, LabelError
from medseg.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class CentreTargets:
    """Maps of one image.

    Attributes
    ----------
    distance : (*shape) float32
        Distance to the nearest voxel that is not of the same object, as a part of the object's largest; 0
        in the background.
    offset : (n, *shape) float32
        From each voxel of an object to its centre, physical; 0 in the background.
    """

    distance: FloatArray
    offset: FloatArray


def make_targets(labels: IntArray, spacing: Sequence[float]) -> CentreTargets:
    """Return the maps of a label map.

    Parameters
    ----------
    labels : (*shape) int
        Objects by number, gaps allowed; 0 = background. An object need not be connected.
    spacing : one number an axis

    Raises
    ------
    LabelError
        A label is negative or not whole.
    """
    check_labels(labels, spacing)
    index, count = number_objects(labels)
    offset = np.zeros((labels.ndim, *labels.shape), np.float32)
    if not count:
        return CentreTargets(np.zeros(labels.shape, np.float32), offset)
    centres = find_mass_centres(index, count, spacing)
    inside = np.nonzero(index)
    number = index[inside] - 1
    for axis, (places, size) in enumerate(zip(inside, spacing, strict=True)):
        offset[axis][inside] = centres[number, axis] - (places + 0.5) * size
    return CentreTargets(normal_distance(index, count, spacing), offset)


def check_labels(labels: IntArray, spacing: Sequence[float]) -> None:
    """Refuse what is no label map.

    Raises
    ------
    LabelError
        A label is negative or not whole.
    ConfigError
        The spacing does not fit.
    """
    if labels.dtype.kind not in "iu":
        raise LabelError(f"label map of {labels.dtype}: expected whole numbers. Convert it, e.g. to int32.")
    if labels.dtype.kind == "i" and labels.size and int(labels.min()) < 0:
        raise LabelError(f"label map: holds {int(labels.min())}; expected 0 and above. Renumber the objects.")
    if len(spacing) != labels.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ConfigError(f"spacing {tuple(spacing)}: expected {labels.ndim} numbers above 0, one an axis.")


def number_objects(labels: IntArray) -> tuple[IntArray, int]:
    """Return the label map with objects numbered 1..K in the order of their labels, int32, and K."""
    highest = int(labels.max(initial=0))
    if highest > 4 * labels.size + 1024:  # a table of all labels would be larger than the image
        values, index = np.unique(labels, return_inverse=True)
        shift = 0 if values[0] == 0 else 1
        return (index.reshape(labels.shape) + shift).astype(np.int32), len(values) - 1 + shift
    present = np.zeros(highest + 1, bool)
    present[labels.ravel()] = True
    present[0] = False
    table = np.where(present, np.cumsum(present), 0).astype(np.int32)
    return table[labels], int(present.sum())


def find_mass_centres(index: IntArray, count: int, spacing: Sequence[float]) -> FloatArray:
    """Return the centre of every object, (count, n) float64, physical.

    It is the mass centre, or where that lies outside of its object, the nearest voxel of the object.

    Parameters
    ----------
    index : objects 1..count, each with a voxel
    """
    inside = np.nonzero(index)
    number = index[inside] - 1
    sizes = np.bincount(number, minlength=count)
    sums = [np.bincount(number, weights=places, minlength=count) for places in inside]
    middles = np.stack(sums, 1) / np.maximum(sizes, 1)[:, None]
    nearest = np.rint(middles).astype(np.int64)
    outside = np.flatnonzero(index[tuple(nearest.T)] != np.arange(1, count + 1))
    if outside.size:
        boxes = ndimage.find_objects(index)
        for each in outside:
            middles[each] = _nearest_voxel(index, int(each) + 1, boxes[each], middles[each], spacing)
    return np.asarray((middles + 0.5) * np.asarray(spacing, float))


def _nearest_voxel(
    index: IntArray, number: int, box: tuple[slice, ...], middle: FloatArray, spacing: Sequence[float]
) -> FloatArray:
    """Return the voxel of an object nearest to `middle` (voxels), the first of equals."""
    voxels = np.argwhere(index[box] == number) + [part.start for part in box]
    squared = (((voxels - middle) * np.asarray(spacing, float)) ** 2).sum(axis=1)
    return np.asarray(voxels[int(squared.argmin())], float)


def normal_distance(index: IntArray, count: int, spacing: Sequence[float]) -> FloatArray:
    """Return the distance to what is not of the same object, as a part of each object's largest, float32.

    The border of the image is no border of an object. Where an object fills the image, it is 1.
    """
    lines = np.ascontiguousarray(index, dtype=np.uint32)
    distance = np.asarray(
        edt.edt(lines, anisotropy=tuple(map(float, spacing)), black_border=False, parallel=1)
    )
    distance = np.where(np.isfinite(distance), distance, 1.0).astype(np.float32)
    largest = np.ones(count + 1, np.float32)
    if count:
        largest[1:] = ndimage.maximum(distance, index, np.arange(1, count + 1))
    return np.asarray(distance / np.maximum(largest, 1e-12)[index])
