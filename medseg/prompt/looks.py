"""Looking for one object in 3D: cubes shown to the refiner, put together on a canvas, followed and walked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medseg.errors import BundleError
from medseg.infer.runtime import choose_runtime
from medseg.log import Task
from medseg.nets.refiner import GRID, Refiner, ball, channels_last, show
from medseg.prompt.known import Known, voxel_of
from medseg.prompt.lattice import SURE, Canvas, Lattice, cube_image, paint, sample
from medseg.prompt.overlap import subtract, union
from medseg.prompt.rasterise import mask_box, nearest
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.target import Target
from medseg.types import BoolArray, FloatArray, IntArray

WEIGHTS = Path(__file__).parent.parent / "nets" / "refiner.safetensors"
# What keeps this part of its area three quarters of the way to its end has not ended (a ball: 0.44).
TAPERED = 0.7


@lru_cache(maxsize=2)
def load_refiner(path: Path = WEIGHTS) -> Refiner:
    """Load the network of the package.

    Raises
    ------
    BundleError
        The file is missing or holds something else.
    """
    network = Refiner()
    try:
        network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path.name}: is missing or is not the refiner's. Reinstall medseg.") from error
    return channels_last(network).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _tent() -> FloatArray:
    """Return the weight of each voxel of a look: 1 in the middle, falling towards the faces."""
    along = np.minimum(np.arange(GRID) + 1, GRID - np.arange(GRID)) / (GRID / 4)
    profile = np.minimum(along, 1).astype(np.float32) ** 2
    return np.asarray(np.einsum("i,j,k->ijk", profile, profile, profile) + np.float32(1e-4))


@dataclass(eq=False)
class Search:
    """One object being looked for on one lattice.

    Attributes
    ----------
    points, positive : (n, 3) float and (n,) bool
        Clicks, as voxels of the scene.
    """

    scene: Scene
    lattice: Lattice
    canvas: Canvas
    known: Sequence[Known]
    points: FloatArray
    positive: BoolArray
    network: Refiner
    steps: Task
    most: int
    cubes: list[IntArray] = field(default_factory=list)

    @property
    def looks(self) -> int:
        """How many cubes were looked at."""
        return len(self.cubes)

    def look(self, middle: FloatArray, anew: bool = False) -> IntArray:
        """Look at the cube around a lattice position; return its first voxel.

        `anew` puts the answer in place of what the canvas had, towards the middle of the cube.
        """
        start: IntArray = np.rint(np.asarray(middle) - (GRID - 1) / 2).astype(int)
        shown = self._shown(start, self.canvas.previous(start))
        put = self.canvas.replace if anew else self.canvas.add
        put(start, run(self.network, shown), _tent())
        self.cubes.append(start)
        self.steps.advance()
        return start

    def _shown(self, start: IntArray, before: Tensor) -> Tensor:
        """Return what the network is shown of the cube at `start`."""
        return show(cube_image(self.scene, self.lattice, start), *self._prompts(start), before)

    def _prompts(self, start: IntArray) -> tuple[Tensor, Tensor, Tensor]:
        marks, box, clicks = torch.zeros(3, GRID, GRID, GRID)
        for known in self.known:
            self._mark(known, start, marks, box)
        places = self.lattice.to_lattice(self.points) - start
        for place, positive in zip(places, self.positive, strict=True):
            ball(clicks, place.tolist(), 1.0 if positive else -1.0)
        return marks, box, clicks

    def _mark(self, known: Known, start: IntArray, marks: Tensor, box: Tensor) -> None:
        """Mark a prompted slice on the planes of the cube that it spans."""
        axis, step = self.lattice.axes[2], self.lattice.steps[2]
        middle = (known.index - self.lattice.origin[axis]) / step - start[2]
        half = max(0.5, 0.5 / step)
        first, end = (int(np.clip(np.ceil(middle + side), 0, GRID)) for side in (-half, half))
        if first >= end:
            return
        rows, columns = self._positions(start)
        edges = zip((rows, columns), known.box[:2], known.box[2:], strict=True)
        frame = np.outer(*((along >= low) & (along <= high) for along, low, high in edges))
        box[:, :, first:end] = torch.from_numpy(np.where(frame, 1, -1).astype(np.float32))[:, :, None]
        if known.mask is not None:
            flat = sample(
                np.where(known.mask, 1, -1)[:, :, None],
                np.array([rows[0], columns[0], 0.0]),
                np.array([*self.lattice.steps[:2], 1.0]),
                (GRID, GRID, 1),
            )
            marks[:, :, first:end] = torch.where(flat > 0, 1.0, -1.0)

    def _positions(self, start: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return rows and columns of the slice that the voxels of a cube fall on."""
        along = self.lattice.to_scene((start + np.arange(GRID)[:, None]).astype(float))
        return along[:, self.lattice.axes[0]], along[:, self.lattice.axes[1]]

    def follow(self, start: IntArray, anew: bool = False) -> None:
        """Look on where the object leaves the cubes seen so far, the widest face first."""
        fresh = [start]
        while fresh and self.looks < self.most:
            found = sorted((face for each in fresh for face in self._faces(each)), key=lambda face: -face[0])
            fresh = []
            for _, middle in found:
                if self.looks < self.most and not self.seen(middle):
                    fresh.append(self.look(middle, anew))

    def seen(self, middle: FloatArray) -> bool:
        """Return whether a lattice position was well inside a look, or lies outside the canvas."""
        at = np.rint(middle).astype(int) - self.canvas.start
        inside = ((at >= 0) & (at < self.canvas.total.shape)).all()
        return not inside or bool(self.canvas.weight[tuple(at)] > 0.2)

    def _faces(self, start: IntArray) -> Iterator[tuple[int, FloatArray]]:
        """Yield for each face of a cube that the object reaches: its area, the middle of the next look."""
        mine, _ = self.canvas.overlap(start)
        mask = self.canvas.total[mine] > 0
        corner = np.array([part.start for part in mine]) + self.canvas.start
        for axis in range(3):
            for end in (False, True):
                count = mask.shape[axis]
                depth = range(max(0, count - 4), count) if end else range(min(4, count))
                rim = np.take(mask, depth, axis)
                area = int(rim.sum())
                if area >= 8:
                    middle = np.argwhere(rim).mean(axis=0) + corner
                    middle[axis] = start[axis] + (GRID if end else 0)
                    yield area, middle

    def walk(self, from_: Known, forward: bool) -> None:
        """Go on along the slices while the object is cut off rather than ending: from slice to slice.

        Where the object is still about as large three quarters of the way to its last slice as where it was
        known, it does not taper off, and the network only saw too little. That slice is the next known one.
        """
        while self.looks < self.most:
            found = self._cut_end(from_, forward)
            if found is None:
                return
            from_ = found
            self.known = (*self.known, from_)
            self._look_beyond(from_, forward)

    def _cut_end(self, known: Known, forward: bool) -> Known | None:
        """Return the slice to go on from, or None where the object ends."""
        part = self.canvas.part()
        areas = np.zeros(self.canvas.total.shape[2], int)
        first = int(part.start[2] - self.canvas.start[2])
        areas[first : first + part.total.shape[2]] = (part.logits() > 0).sum(axis=(0, 1))
        at = round(self._plane(known.index)) - int(self.canvas.start[2])
        here = areas[min(max(at, 0), len(areas) - 1)]
        reach = np.flatnonzero(areas[at:] if forward else areas[at::-1])
        last = int(reach[-1]) if len(reach) else 0
        plane = at + round(0.75 * last) * (1 if forward else -1)
        end = at + last * (1 if forward else -1)
        if last < 4 or not 3 <= end < len(areas) - 3 or areas[plane] < TAPERED * here:
            return None
        return self._known_at(plane)

    def _known_at(self, plane: int) -> Known | None:
        """Return the mask of a plane of the canvas as a known slice of the scene."""
        axis = self.lattice.axes[2]
        place = (plane + int(self.canvas.start[2])) * self.lattice.steps[2] + self.lattice.origin[axis]
        index = round(float(place))
        region = paint(self.scene, self.lattice, self.canvas)
        mask = region.plane(axis, index) if 0 <= index < self.scene.shape[axis] else None
        if mask is None or not mask.any() or any(each.index == index for each in self.known):
            return None
        return Known(index, mask_box(mask), mask)

    def _plane(self, index: int) -> float:
        axis = self.lattice.axes[2]
        return float((index - self.lattice.origin[axis]) / self.lattice.steps[2])

    def _look_beyond(self, known: Known, forward: bool) -> None:
        """Look from a slice on as if nothing were known beyond it."""
        middle = self.lattice.to_lattice(voxel_of(self.lattice.axes[2], known))
        start = np.rint(middle - (GRID - 1) / 2).astype(int)
        plane = round(middle[2]) - start[2]
        beyond = slice(plane + 1, None) if forward else slice(0, plane)
        weights = np.zeros_like(_tent())
        weights[:, :, beyond] = np.minimum(1, 4 * _tent()[:, :, beyond])
        shown = self._shown(start, torch.zeros(GRID, GRID, GRID))
        self.canvas.replace(start, run(self.network, shown), weights)
        self.cubes.append(start)
        self.steps.advance()


def run(network: Refiner, shown: Tensor) -> FloatArray:
    """Return the logits, (GRID, GRID, GRID), of what is shown, (7, GRID, GRID, GRID)."""
    autocast = choose_runtime("cpu", "auto").autocast
    with (
        torch.no_grad(),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        found = network(shown[None].contiguous(memory_format=torch.channels_last_3d))[0, 0].float()
    return np.asarray(found.numpy())


def held(search: Search, target: Target) -> Region:
    """Return voxels that the prompts say are the object's: what is connected to none of them is dropped."""
    scene, axis = search.scene, target.axis
    held = Region.empty(scene.shape)
    for known in search.known:
        if known.mask is not None:
            start = [0, 0, 0]
            start[axis] = known.index
            flat = Region.at(np.expand_dims(known.mask, axis), (start[0], start[1], start[2]), scene.shape)
            held = union(held, flat)
    for point in nearest(search.points[search.positive]).astype(int):
        held = union(held, Region.at(np.ones((1, 1, 1), bool), tuple(point.tolist()), scene.shape))
    return held


def confidence(search: Search, region: Region, axis: int) -> Mapping[int, float]:
    """Return for each slice how sure the network is of what it drew there, 0 to 1."""
    if not region.voxels:
        return {}
    canvas = search.canvas.part()
    logits = canvas.logits()
    certain = np.abs(np.tanh(logits / 2)) * (logits > -SURE)
    near = (logits > -2).astype(np.float32)
    flat = (0, 1)
    each = (certain * near).sum(axis=flat) / np.maximum(near.sum(axis=flat), 1)
    found = {}
    for index in range(region.start[axis], region.stop[axis]):
        place = (index - search.lattice.origin[axis]) / search.lattice.steps[2] - canvas.start[2]
        found[index] = float(np.clip(each[int(np.clip(round(place), 0, len(each) - 1))], 0, 1))
    return found


def obeying(region: Region, search: Search) -> Region:
    """Return the region with the clicks that it does not obey painted in, as small balls."""
    radius = 1.5 * search.lattice.steps.max()
    for point, positive in zip(nearest(search.points).astype(int), search.positive, strict=True):
        start = (int(point[0]), int(point[1]), int(point[2]))
        stop = (start[0] + 1, start[1] + 1, start[2] + 1)
        if bool(region.window(start, stop)[0, 0, 0]) != bool(positive):
            dot = _dot(search.scene, point, radius * min(search.scene.spacing))
            region = union(region, dot) if positive else subtract(region, dot)
    return region


def _dot(scene: Scene, voxel: IntArray, radius_mm: float) -> Region:
    reach = np.floor(radius_mm / np.array(scene.spacing)).astype(int)
    along = [(np.arange(-r, r + 1) * s) ** 2 for r, s in zip(reach, scene.spacing, strict=True)]
    ball_ = along[0][:, None, None] + along[1][:, None] + along[2] <= radius_mm**2
    low = voxel - reach
    return Region.at(ball_, (int(low[0]), int(low[1]), int(low[2])), scene.shape)
