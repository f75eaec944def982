"""World frames: medseg speaks RAS+ (nibabel), ITK and DICOM speak LPS+."""

import numpy as np

from medseg.types import FloatArray

# x and y change sign between the two; applying it twice gives the identity.
_FLIP_XY = np.diag([-1.0, -1.0, 1.0, 1.0])


def ras_to_lps(affine: FloatArray) -> FloatArray:
    """Return a (4, 4) voxel-to-RAS affine as voxel-to-LPS."""
    return np.asarray(_FLIP_XY @ affine)


def lps_to_ras(affine: FloatArray) -> FloatArray:
    """Return a (4, 4) voxel-to-LPS affine as voxel-to-RAS."""
    return np.asarray(_FLIP_XY @ affine)
