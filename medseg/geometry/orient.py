"""Which way the voxel axes of a grid point, and how to turn them without touching a value."""

import numpy as np

from medseg.types import FloatArray
from medseg.volume import Geometry, Volume

# Positive and negative direction of the world axes x, y, z in RAS+.
_CODES = (("R", "L"), ("A", "P"), ("S", "I"))


def axis_codes(affine: FloatArray) -> str:
    """Return the three letters of where i, j, k increase to, such as ``RAS``.

    An oblique axis takes the letter of its largest component; each world axis is used once,
    the clearest first.

    >>> axis_codes(np.diag([-1.0, -1.0, 2.0, 1.0]))
    'LPS'
    """
    directions = direction_cosines(affine)
    strength = np.abs(directions)
    codes = [""] * 3
    for _ in range(3):
        world, voxel = np.unravel_index(int(np.argmax(strength)), (3, 3))
        codes[voxel] = _CODES[world][int(directions[world, voxel] < 0)]
        strength[world, :] = strength[:, voxel] = -1.0
    return "".join(codes)


def direction_cosines(affine: FloatArray) -> FloatArray:
    """Return the (3, 3) matrix whose columns are the unit directions of i, j, k."""
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    return np.asarray(columns / np.linalg.norm(columns, axis=0))


def skew(affine: FloatArray) -> float:
    """Return the largest |cosine| between two voxel axes: 0 for a right-angled grid."""
    directions = direction_cosines(affine)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def is_orthonormal(affine: FloatArray, tolerance: float = 1e-4) -> bool:
    """Return whether the voxel axes are at right angles, as ITK and DICOM require."""
    return skew(affine) <= tolerance


def reads_as_ras(reader: str) -> bool:
    """Return whether an nnU-Net reader of that name turns images to RAS+ (``NibabelIOWithReorient``)."""
    return reader.endswith("WithReorient")


def to_ras(volume: Volume) -> Volume:
    """Turn a volume by flips and swaps of axes until i, j, k run most nearly to R, A, S; a view.

    Source: nibabel's ``io_orientation``, which nnU-Net's readers ``...WithReorient`` use.
    """
    axes, flips = _turns(volume.geometry)
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        turned[old, new] = -1 if flip else 1
        turned[old, 3] = volume.shape[old] - 1 if flip else 0
    i, j, k = (volume.shape[axis] for axis in axes)
    geometry = Geometry((i, j, k), volume.geometry.affine @ turned, volume.geometry.unit)
    array = volume.array.transpose(0, *(axis + 1 for axis in axes))
    return Volume(array[_flipped(flips)], geometry, volume.notes)


def from_ras(volume: Volume, geometry: Geometry) -> Volume:
    """Undo :func:`to_ras`: bring what lies on the turned grid of `geometry` back onto it."""
    axes, flips = _turns(geometry)
    array = volume.array[_flipped(flips)].transpose(0, *(int(axis) + 1 for axis in np.argsort(axes)))
    return Volume(np.ascontiguousarray(array), geometry, volume.notes)


def _turns(geometry: Geometry) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return for each of R, A, S the voxel axis that runs along it, and whether against it."""
    from nibabel.orientations import io_orientation

    found = io_orientation(geometry.affine)  # by voxel axis: world axis, direction
    axes = tuple(int(axis) for axis in np.argsort(found[:, 0]))
    return axes, tuple(bool(found[axis, 1] < 0) for axis in axes)


def _flipped(flips: tuple[bool, ...]) -> tuple[slice, ...]:
    return (slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))
