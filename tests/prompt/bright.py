"""A stand-in for a promptable network: what is bright on the slice; and scenes to point at."""

from dataclasses import dataclass, field

import cc3d
import numpy as np

from medseg.prompt.prompts import Box, Plane, Point
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.prompt.segmenter import SliceMask, SlicePrompts
from medseg.prompt.slicewise import Models
from medseg.types import BoolArray
from medseg.volume import Geometry, Volume

BRIGHT = 128


@dataclass
class Bright:
    """Answers with what is bright in a box and beside it, or in components that clicks or a mask touch."""

    scene: Scene
    asked: list[tuple[int, int, SlicePrompts, Rectangle | None]] = field(default_factory=list)

    def predict(
        self,
        axis: int,
        index: int,
        prompts: SlicePrompts,
        field: Rectangle | None = None,
        multimask: bool | None = None,
    ) -> SliceMask:
        self.asked.append((axis, index, prompts, field))
        bright = self.scene.slice(axis, index) > BRIGHT
        mask = bright & self._near(bright, prompts)
        part = field or (0, 0, *plane_size(self.scene.shape, axis))
        logits = np.where(mask, 5.0, -5.0).astype(np.float32)[part[0] : part[2], part[1] : part[3]]
        return SliceMask(logits, part, 0.9 if mask.any() else 0.1)

    def _near(self, bright: BoolArray, prompts: SlicePrompts) -> BoolArray:
        near = np.zeros_like(bright)
        if prompts.box is not None:
            top, left, bottom, right = (round(edge + 0.5) for edge in prompts.box)
            near[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True  # boxes are loose
        components = cc3d.connected_components(np.pad(bright, 1), connectivity=8)[1:-1, 1:-1]
        if prompts.mask is not None and prompts.box is None:
            near |= np.isin(components, np.unique(components[(prompts.mask > 0) & bright]))
        for (row, column), positive in zip(
            np.rint(prompts.points).astype(int), prompts.positive, strict=True
        ):
            if components[row, column]:
                near[components == components[row, column]] = positive
        return near


def scene_of(mask: BoolArray) -> Scene:
    """Return a scene in which `mask`, (i, j, k), is bright; slices across k are 2 mm thick."""
    array = np.where(mask, 200, 40).astype(np.int16)
    return Scene.of(Volume(array[None], Geometry(mask.shape, np.diag([1.0, 1.0, 2.0, 1.0]))), (0.0, 255.0))


def models_of(scene: Scene) -> tuple[Models, Bright]:
    """Return models whose networks all are one stand-in, and it."""
    models, fake = Models.open(scene), Bright(scene)
    for size in (None, 256, 512):
        for asset in (models.lite, models.clicks):
            models.ready[asset, size] = fake
    return models, fake


def box_of(scene: Scene, start: tuple[int, ...], stop: tuple[int, ...], plane: Plane | None = None) -> Box:
    """Return the box of a half-open range of voxels of the turned grid."""
    low, high = scene.to_world(np.array((start, stop)) - 0.5)
    return Box(corner_mm=tuple(low), opposite_mm=tuple(high), plane=plane)


def click(scene: Scene, *voxel: float, positive: bool = True) -> Point:
    """Return a click at a voxel of the turned grid."""
    x, y, z = scene.to_world(np.array(voxel))
    return Point(position_mm=(float(x), float(y), float(z)), positive=positive)


def tube(shape: tuple[int, int, int], low: int, high: int, radius: float = 6.0) -> BoolArray:
    """Return a tube along k, leaning a little, from slice `low` to `high`, both included."""
    i, j, k = np.indices(shape)
    mask = (i - shape[0] / 2 - 0.3 * (k - shape[2] / 2)) ** 2 + (j - shape[1] / 2) ** 2 <= radius**2
    return np.asarray(mask & (k >= low) & (k <= high))
