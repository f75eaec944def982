"""What is known of an object before it is looked for in 3D: prompted slices and what SAM says of them."""

from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.nets.refiner import GRID
from medseg.prompt.cleanup import CleanConfig
from medseg.prompt.rasterise import SliceBox, evidence, mask_box
from medseg.prompt.scene import Scene, plane_size
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.slicewise import Models, Zoom, crop_around
from medseg.prompt.target import Target
from medseg.types import BoolArray, FloatArray

# Side of the input of published weights of SAM, for the crop of a slice.
SIZE = 512


class VolumeConfig(Config):
    """Settings of the ``volume`` propagator.

    Attributes
    ----------
    zoom : float
        Voxels of the cube (of 40) that the longer side of the object takes at the first look.
    finest : float
        Smallest voxel of the cube, as a part of the image's smallest.
    looks : int
        Most cubes at each zoom.
    reach : float
        Farthest that the object goes from its prompted slice, in cubes of the first zoom.
    field : Zoom
        The crop of a slice that SAM is shown.
    size : int, optional
        Side of SAM's input, for that crop. None: that of its fine-tuning, or 512.
    ask_again : bool
        Show SAM the slice of a corrective click too.
    """

    zoom: float = Field(19.0, gt=4, le=GRID)
    finest: float = Field(0.5, gt=0)
    looks: int = Field(60, ge=1)
    reach: float = Field(5.0, ge=1)
    field: Zoom = Zoom()
    size: int | None = Field(None, ge=64)
    ask_again: bool = True
    clean: CleanConfig = CleanConfig()


@dataclass(frozen=True, eq=False)
class Known:
    """A prompted slice.

    Attributes
    ----------
    index : int
        Slice across the axis.
    box : SliceBox
        Edges of the box around the object there.
    mask : (rows, columns) bool, optional
        The object on the whole slice.
    """

    index: int
    box: SliceBox
    mask: BoolArray | None = None

    @property
    def middle(self) -> tuple[float, float]:
        """Row and column of the middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def ask(
    models: Models,
    axis: int,
    index: int,
    asked: SlicePrompts,
    config: VolumeConfig,
) -> Known | None:
    """Ask SAM what the prompts of a slice mean; a drawn mask is its own answer."""
    shape = plane_size(models.scene.shape, axis)
    if asked.mask is not None and not len(asked.points):
        mask = asked.mask > 0
        return Known(index, mask_box(mask), mask) if mask.any() else None
    if asked.box is None and not asked.positive.any():
        return None
    boxes = (
        [asked.box] if asked.box is not None else [_around(point) for point in asked.points[asked.positive]]
    )
    crop = crop_around(boxes, shape, config.field)
    segmenter = models.segmenter(models.clicks, config.size, SIZE)
    mask = segmenter.predict(axis, index, asked, crop).mask(shape)
    if not mask.any():
        return None if asked.box is None else Known(index, asked.box)
    return Known(index, asked.box or mask_box(mask), mask)


def _around(point: FloatArray) -> SliceBox:
    """Return a box around a click that has none."""
    row, column = (float(p) for p in point)
    return (row - 20, column - 20, row + 20, column + 20)


def steady(asked: SlicePrompts) -> SlicePrompts:
    """Round away what the order of a volume's axes leaves in the last digits of positions."""
    if asked.box is None:
        return replace(asked, points=np.round(asked.points, 4))
    first, left, end, right = (round(float(edge), 4) for edge in asked.box)
    return replace(asked, points=np.round(asked.points, 4), box=(first, left, end, right))


def clicked(scene: Scene, target: Target) -> tuple[FloatArray, BoolArray]:
    """Return clicks and scribbles as voxels of the scene, and their signs."""
    found = evidence(scene, target)
    return np.round(found.points, 4), found.positive


def side_mm(scene: Scene, axis: int, box: SliceBox) -> float:
    """Return the longer side of a box on a slice, in mm."""
    rows, columns = (scene.spacing[a] for a in range(3) if a != axis)
    return max((box[2] - box[0]) * rows, (box[3] - box[1]) * columns)


def voxel_of(axis: int, known: Known) -> FloatArray:
    """Return the voxel in the middle of a prompted slice's box."""
    return np.insert(np.array(known.middle), axis, known.index)
