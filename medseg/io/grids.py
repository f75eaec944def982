"""What readers share about grids: exact voxel sizes, flat images, and how two grids differ."""

import numpy as np

from medseg.geometry.orient import direction_cosines
from medseg.types import FloatArray
from medseg.volume import Geometry

# The third axis of a 2D image has no size; nnU-Net gives it 999 times the largest one, so that
# every anisotropy rule sees it as the coarse axis (nnunetv2/imageio/simpleitk_reader_writer.py).
FLAT_FACTOR = 999.0
FLAT_NOTE = "2D image: the size of the third axis is nominal"
# For an image that is measured in pixels, whatever its file says.
NO_SCALE_NOTE = "the size of a voxel is left open: 1 stands for a pixel"
# Two files of one case may differ by what exporters round: this part of a voxel, or of the spacing.
GRID_TOLERANCE = 0.01
SPACING_TOLERANCE = 1e-3
# Found by trial on random rotations; undamped steps jump to and fro over the last bit.
_NEWTON_STEPS = 8
_DAMPING = 0.6
# A smaller component would have to move too far to change the length.
_STEEP = 1e-3


def set_spacing(affine: FloatArray, spacing: FloatArray) -> None:
    """Give the columns of an affine exactly these lengths, in place.

    Exactly, because plans are compared number by number, and an oblique column that is scaled is
    off by the last bit. Newton steps on one component after the other reach :attr:`Geometry.spacing`
    equal to `spacing` (all but 1 in 1000 random rotations) and turn a direction by less than 1e-12.
    """
    affine[:3, :3] *= spacing / np.linalg.norm(affine[:3, :3], axis=0)
    for step in range(_NEWTON_STEPS):
        error = np.linalg.norm(affine[:3, :3], axis=0) - spacing
        for column in np.flatnonzero(error):
            row = np.argsort(np.abs(affine[:3, column]))[step % 3]
            if abs(affine[row, column]) > _STEEP * spacing[column]:
                affine[row, column] -= _DAMPING * error[column] * spacing[column] / affine[row, column]


def grid_difference(first: Geometry, second: Geometry, name: str) -> str:
    """Say in what `second` differs from `first`, which is called `name`; an empty string if in nothing."""
    if first.shape != second.shape:
        return f"shape {second.shape} differs from {first.shape} of {name}"
    if first.unit != second.unit:
        return f"unit {second.unit} differs from {first.unit} of {name}"
    if not np.allclose(first.spacing, second.spacing, rtol=SPACING_TOLERANCE):
        return f"spacing {_short(second.spacing)} differs from {_short(first.spacing)} of {name}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in first.shape], [1])).reshape(4, -1)
    moved = (second.affine - first.affine) @ corners
    voxels = np.abs(np.linalg.solve(first.affine, moved))[:3].max()
    if voxels <= GRID_TOLERANCE * max(1.0, max(first.shape) / 100):
        return ""
    turned = np.abs(direction_cosines(first.affine) - direction_cosines(second.affine)).max() > 1e-3
    apart = f"{np.linalg.norm(moved[:3], axis=0).max():.3g} {first.unit}"
    return f"{'direction' if turned else 'position'} differs from {name}: voxels are up to {apart} apart"


def _short(spacing: tuple[float, ...]) -> str:
    return "x".join(f"{value:.4g}" for value in spacing)
