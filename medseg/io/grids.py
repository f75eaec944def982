"""What readers share about grids: exact voxel sizes, flat images, and how two grids differ."""

import numpy as np

from medseg.geometry.orient import direction_cosines
from medseg.types import FloatArray
from medseg.volume import Geometry

# The third axis of a 2D image has no size; nnU-Net gives it 999 times the largest one, so that
# every anisotropy rule sees it as the coarse axis (nnunetv2/imageio/simpleitk_reader_writer.py).
FLAT_FACTOR = 999.0
FLAT_NOTE = "2D image: the size of the third axis is nominal"
# Two files of one case may differ by what exporters round: this part of a voxel, or of the spacing.
GRID_TOLERANCE = 0.01
SPACING_TOLERANCE = 1e-3
# Steps of one float64 unit that reach an exact length; a column needs one or two.
_NUDGES = 8


def set_spacing(affine: FloatArray, spacing: FloatArray) -> None:
    """Give the columns of an affine exactly these lengths, in place.

    Exactly, because plans are compared number by number, and an oblique column that is scaled is
    off by the last bit: its largest component is moved until :attr:`Geometry.spacing` says `spacing`.
    """
    affine[:3, :3] *= spacing / np.linalg.norm(affine[:3, :3], axis=0)
    for _ in range(_NUDGES):
        error = np.linalg.norm(affine[:3, :3], axis=0) - spacing
        for column in np.flatnonzero(error):
            row = int(np.argmax(np.abs(affine[:3, column])))
            longer = np.copysign(np.inf, affine[row, column])
            affine[row, column] = np.nextafter(affine[row, column], -longer if error[column] > 0 else longer)


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
