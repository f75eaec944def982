"""The voxels in which the refiner thinks: cubes of a lattice over the scene, and a canvas that joins them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg.nets.refiner import GRID
from medseg.prompt.regions import Region, Triple
from medseg.prompt.scene import Scene
from medseg.types import FloatArray, IntArray

# Logits are kept within this, so that no look outvotes the others for ever.
SURE = 8.0


@dataclass(frozen=True, eq=False)
class Lattice:
    """The voxels of the cubes: isotropic, the slice axis last, its origin in the middle of the object.

    Attributes
    ----------
    axes : (int, int, int)
        Axes of the scene along the lattice's.
    origin : (3,) float
        Voxel of the scene at lattice (0, 0, 0), in the scene's order.
    steps : (3,) float
        Voxels of the scene in one step, in the lattice's order.
    """

    axes: Triple
    origin: FloatArray
    steps: FloatArray

    @classmethod
    def around(cls, scene: Scene, axis: int, middle: FloatArray, step_mm: float) -> "Lattice":
        """Lay a lattice of `step_mm` with its origin at voxel `middle` of the scene."""
        rows, columns = (a for a in range(3) if a != axis)
        axes = (rows, columns, axis)
        return cls(axes, np.asarray(middle, float), step_mm / np.array(scene.spacing)[list(axes)])

    def to_lattice(self, voxels: FloatArray) -> FloatArray:
        """Scene voxels, (n, 3), to lattice positions."""
        return np.asarray(((np.asarray(voxels) - self.origin)[..., list(self.axes)]) / self.steps)

    def to_scene(self, positions: FloatArray) -> FloatArray:
        """Lattice positions, (n, 3), to scene voxels."""
        turned = np.asarray(positions) * self.steps
        back = np.empty_like(turned)
        back[..., list(self.axes)] = turned
        return np.asarray(back + self.origin)

    def extent(self, shape: Triple) -> tuple[IntArray, IntArray]:
        """First and last lattice position whose voxel lies in the scene."""
        ends = np.sort(self.to_lattice(np.array([(0, 0, 0), [n - 1 for n in shape]], float)), axis=0)
        return np.ceil(ends[0]).astype(int), np.floor(ends[1]).astype(int)


def sample(values: FloatArray, first: FloatArray, step: FloatArray, shape: Triple) -> Tensor:
    """Interpolate an array at a regular grid: first + step * index, by axis; beyond it, its border."""
    given = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None, None]
    at = []
    for axis in range(3):
        position = first[axis] + step[axis] * torch.arange(shape[axis], dtype=torch.float64)
        at.append(((2 * position + 1) / values.shape[axis] - 1).float())
    grid = torch.stack(torch.meshgrid(*at, indexing="ij"), -1).flip(-1)[None]
    found = functional.grid_sample(given, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, 0]


def cube_image(scene: Scene, lattice: Lattice, start: IntArray) -> Tensor:
    """Return the image of the cube whose first voxel is lattice `start`; larger steps average."""
    low = lattice.to_scene(start.astype(float))
    high = lattice.to_scene((start + GRID - 1).astype(float))
    steps = np.empty(3)
    steps[list(lattice.axes)] = lattice.steps
    factor = np.maximum(1, np.floor(steps + 0.25)).astype(int)
    begin = np.floor(low - factor).astype(int)
    count = np.ceil((high + factor + 1 - begin) / factor).astype(int)
    block = _averaged(scene, begin, factor, count)
    # The middle of averaged voxel n lies at begin + factor * n + (factor - 1) / 2.
    first = (low - begin - (factor - 1) / 2) / factor
    order = list(lattice.axes)
    turned = block.transpose(order)
    return sample(turned, first[order], (steps / factor)[order], (GRID, GRID, GRID))


def _averaged(scene: Scene, begin: IntArray, factor: IntArray, count: IntArray) -> FloatArray:
    """Average blocks of `factor` voxels from `begin` on; beyond the scene its border is repeated."""
    # Of large blocks, a few voxels along each axis say enough.
    thin = np.maximum(1, factor // 3)
    taken = factor // thin
    index = []
    for axis in range(3):
        inset = (factor[axis] - 1 - thin[axis] * (taken[axis] - 1)) // 2
        within = inset + thin[axis] * np.arange(taken[axis])
        voxels = begin[axis] + factor[axis] * np.arange(count[axis])[:, None] + within
        index.append(np.clip(voxels.ravel(), 0, scene.shape[axis] - 1))
    grey = scene.through_window(scene.array[np.ix_(*index)])
    shape = [int(n) for pair in zip(count, taken, strict=True) for n in pair]
    return np.asarray(grey.reshape(shape).mean(axis=(1, 3, 5)), dtype=np.float32)


@dataclass(eq=False)
class Canvas:
    """The answer so far on the lattice: logits in a box that covers all looks.

    Attributes
    ----------
    start : (3,) int
        Lattice position of the first voxel.
    total, weight : (a, b, c) float32
        Weighted sum of the logits, and the sum of the weights (0: not looked at).
    looked : (2, 3) int, optional
        First and end of the part that was looked at; None: all of it may have been.
    """

    start: IntArray
    total: FloatArray
    weight: FloatArray
    looked: IntArray | None = None

    @classmethod
    def over(cls, low: IntArray, high: IntArray) -> "Canvas":
        """Make an empty canvas from lattice position `low` to `high`, both included."""
        shape = tuple(int(n) for n in high - low + 1)
        nowhere = np.array([shape, (0, 0, 0)])
        return cls(low, np.zeros(shape, np.float32), np.zeros(shape, np.float32), nowhere)

    def filled(self, total: FloatArray) -> "Canvas":
        """Return the canvas with logits everywhere."""
        return Canvas(self.start, total, np.ones_like(total))

    def part(self) -> "Canvas":
        """Return the part that was looked at with a rim of one voxel: views, not copies.

        A canvas reaches as far as an object may; of a small lesion it is hundreds of times what is looked at.
        """
        if self.looked is None:
            return self
        low = np.clip(self.looked[0] - 1, 0, self.total.shape)
        high = np.clip(self.looked[1] + 1, low, self.total.shape)
        inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return Canvas(self.start + low, self.total[inside], self.weight[inside])

    def logits(self) -> FloatArray:
        """Return the mean logits; where nothing was seen, that of absence."""
        return self._mean((slice(None),) * 3)

    def overlap(self, start: IntArray) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where a cube lies in the canvas, and where the canvas lies in the cube."""
        first = start - self.start
        low = np.maximum(first, 0)
        high = np.maximum(np.minimum(first + GRID, self.total.shape), low)
        mine = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        its = tuple(slice(int(a - f), int(b - f)) for a, b, f in zip(low, high, first, strict=True))
        return mine, its

    def previous(self, start: IntArray) -> Tensor:
        """Return the mask so far in a cube: +1, -1, and 0 where nothing was seen."""
        mine, its = self.overlap(start)
        found = np.zeros((GRID, GRID, GRID), np.float32)
        found[its] = np.sign(self.total[mine]) * (self.weight[mine] > 0)
        return torch.from_numpy(found)

    def add(self, start: IntArray, logits: FloatArray, weights: FloatArray) -> None:
        """Add a look."""
        mine, its = self._looking(start)
        self.total[mine] += np.clip(logits, -SURE, SURE)[its] * weights[its]
        self.weight[mine] += weights[its]

    def replace(self, start: IntArray, logits: FloatArray, weights: FloatArray) -> None:
        """Put a look in place of what was there, by its weights (0..1)."""
        mine, its = self._looking(start)
        old = self._mean(mine)
        self.total[mine] = old + weights[its] * (np.clip(logits, -SURE, SURE)[its] - old)
        self.weight[mine] = 1

    def _looking(self, start: IntArray) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        mine, its = self.overlap(start)
        if self.looked is not None:
            low, high = np.array([(part.start, part.stop) for part in mine]).T
            self.looked = np.stack((np.minimum(self.looked[0], low), np.maximum(self.looked[1], high)))
        return mine, its

    def _mean(self, part: tuple[slice, ...]) -> FloatArray:
        seen = self.weight[part] > 0
        return np.where(seen, self.total[part] / np.where(seen, self.weight[part], 1), np.float32(-SURE))


def paint(scene: Scene, lattice: Lattice, canvas: Canvas, threshold: float = 0.0) -> Region:
    """Bring the canvas to the voxels of the scene: linear between its logits."""
    canvas = canvas.part()
    logits = canvas.logits()
    hits = np.argwhere(logits > threshold)
    if not len(hits):
        return Region.empty(scene.shape)
    ends = np.array([hits.min(axis=0) - 1, hits.max(axis=0) + 1]) + canvas.start
    voxels = np.sort(lattice.to_scene(ends.astype(float)), axis=0)
    low = np.maximum(np.floor(voxels[0]), 0).astype(int)
    high = np.minimum(np.ceil(voxels[1]) + 1, scene.shape).astype(int)
    first = lattice.to_lattice(low.astype(float)) - canvas.start
    axes = list(lattice.axes)
    shape = (high - low)[axes]
    found = sample(logits, first, 1 / lattice.steps, (int(shape[0]), int(shape[1]), int(shape[2])))
    mask = (found.numpy() > threshold).transpose(np.argsort(axes))
    return Region.at(mask, (int(low[0]), int(low[1]), int(low[2])), scene.shape)
