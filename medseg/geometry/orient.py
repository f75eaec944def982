"""Which way the voxel axes of a grid point."""

import numpy as np

from medseg.types import FloatArray

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
