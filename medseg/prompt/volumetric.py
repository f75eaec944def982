"""The ``volume`` propagator: a slice by SAM, then the object in 3D by a light network that follows edges.

What a box or a click means on its slice is SAM's answer. In 3D, the refiner (`medseg.nets.refiner`) is shown
cubes of the image at a zoom that the object's own size sets: first around the prompt, then wherever the
object leaves the cubes seen so far. A correction is a look at the click and no more: what lies beyond its
cube stays as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medseg.config import Config
from medseg.errors import BundleError
from medseg.infer.runtime import choose_runtime
from medseg.log import Task, task
from medseg.nets.refiner import GRID, REACH, Refiner, ball, channels_last, show
from medseg.prompt.cleanup import CleanConfig, clean
from medseg.prompt.lattice import SURE, Canvas, Lattice, cube_image, paint, sample
from medseg.prompt.overlap import subtract, union
from medseg.prompt.rasterise import SliceBox, anchors, evidence, mask_box, nearest
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene, plane_size
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.slicewise import Models, Zoom, crop_around, widened
from medseg.prompt.target import Propagation, Target
from medseg.types import BoolArray, FloatArray, IntArray

# A long object needs a flood without bounds, a round one a bounded flood, and where both leak none is best:
# each look is the mean of the three (`medseg.nets.refiner.show`, reach).
FLOODS = (None, REACH, float("inf"))
WEIGHTS = Path(__file__).parent.parent / "nets" / "refiner.safetensors"
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
        """Return what the network is shown of the cube at `start`, once for each flood."""
        image, prompts = cube_image(self.scene, self.lattice, start), self._prompts(start)
        return torch.stack([show(image, *prompts, before, reach) for reach in FLOODS])

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
        logits = self.canvas.logits()
        areas = (logits > 0).sum(axis=(0, 1))
        at = round(self._plane(known.index)) - int(self.canvas.start[2])
        here = areas[min(max(at, 0), len(areas) - 1)]
        reach = np.flatnonzero(areas[at:] if forward else areas[at::-1])
        last = int(reach[-1]) if len(reach) else 0
        plane = at + round(0.75 * last) * (1 if forward else -1)
        end = at + last * (1 if forward else -1)
        if last < 4 or not 3 <= end < len(areas) - 3 or areas[plane] < TAPERED * here:
            return None
        return self._known_at(logits, plane)

    def _known_at(self, logits: FloatArray, plane: int) -> Known | None:
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
        middle = self.lattice.to_lattice(_voxel(self.lattice.axes[2], known))
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
    """Return the mean logits, (GRID, GRID, GRID), of what was shown, (n, 7, GRID, GRID, GRID)."""
    autocast = choose_runtime("cpu", "auto").autocast
    with (
        torch.no_grad(),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        found = network(shown.contiguous(memory_format=torch.channels_last_3d))[:, 0].float()
    return np.asarray(found.mean(0).numpy())


def propagate_volume(models: Models, target: Target, config: VolumeConfig) -> Propagation:
    """Find the object of a target in 3D, or correct it where its newest clicks are."""
    given = {index: _steady(asked) for index, asked in anchors(models.scene, target).items()}
    with task("looks") as steps:
        if target.previous is not None and target.previous.voxels:
            return _correct(models, target, config, given, steps)
        known = [
            each
            for index, asked in given.items()
            if (each := _ask(models, target.axis, index, asked, config))
        ]
        if not known:
            return Propagation(
                Region.empty(models.scene.shape), {}, ("Nothing was found on the prompted slices.",)
            )
        return _find(models, target, config, known, steps)


def _steady(asked: SlicePrompts) -> SlicePrompts:
    """Round away what the order of a volume's axes leaves in the last digits of positions."""
    if asked.box is None:
        return replace(asked, points=np.round(asked.points, 4))
    first, left, end, right = (round(float(edge), 4) for edge in asked.box)
    return replace(asked, points=np.round(asked.points, 4), box=(first, left, end, right))


def _clicks(scene: Scene, target: Target) -> tuple[FloatArray, BoolArray]:
    """Return clicks and scribbles as voxels of the scene, and their signs."""
    found = evidence(scene, target)
    return np.round(found.points, 4), found.positive


def _ask(
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


def _find(
    models: Models, target: Target, config: VolumeConfig, known: Sequence[Known], steps: Task
) -> Propagation:
    scene, axis = models.scene, target.axis
    points, positive = _clicks(scene, target)
    widest = max(known, key=lambda each: _side(scene, axis, each.box))
    step = max(_side(scene, axis, widest.box) / config.zoom, config.finest * min(scene.spacing))
    lattice = Lattice.around(scene, axis, _voxel(axis, widest), step)
    canvas = _canvas(lattice, scene, config.reach)
    search = Search(scene, lattice, canvas, known, points, positive, load_refiner(), steps, config.looks)
    search.follow(search.look(np.zeros(3)))
    for forward in (True, False):
        search.walk(widest, forward)
    for each in known:
        middle = lattice.to_lattice(_voxel(axis, each))
        if not search.seen(middle):
            search.follow(search.look(middle))
    notes = () if search.looks < config.looks else ("The object goes on: the most cubes were looked at.",)
    return _finish(search, target, config, notes)


def _side(scene: Scene, axis: int, box: SliceBox) -> float:
    """Return the longer side of a box on a slice, in mm."""
    rows, columns = (scene.spacing[a] for a in range(3) if a != axis)
    return max((box[2] - box[0]) * rows, (box[3] - box[1]) * columns)


def _voxel(axis: int, known: Known) -> FloatArray:
    return np.insert(np.array(known.middle), axis, known.index)


def _canvas(lattice: Lattice, scene: Scene, reach: float) -> Canvas:
    low, high = lattice.extent(scene.shape)
    most = int(reach * GRID)
    return Canvas.over(np.clip(low, -most, 0), np.clip(high, 0, most))


def _finish(search: Search, target: Target, config: VolumeConfig, notes: tuple[str, ...]) -> Propagation:
    region = paint(search.scene, search.lattice, search.canvas)
    region = _obeying(clean(region, target, _held(search, target), config.clean), search)
    return Propagation(region, _confidence(search, region, target.axis), notes)


def _held(search: Search, target: Target) -> Region:
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


def _confidence(search: Search, region: Region, axis: int) -> Mapping[int, float]:
    """Return for each slice how sure the network is of what it drew there, 0 to 1."""
    if not region.voxels:
        return {}
    logits = search.canvas.logits()
    certain = np.abs(np.tanh(logits / 2)) * (logits > -SURE)
    near = (logits > -2).astype(np.float32)
    flat = (0, 1)
    each = (certain * near).sum(axis=flat) / np.maximum(near.sum(axis=flat), 1)
    found = {}
    for index in range(region.start[axis], region.stop[axis]):
        place = (index - search.lattice.origin[axis]) / search.lattice.steps[2] - search.canvas.start[2]
        found[index] = float(np.clip(each[int(np.clip(round(place), 0, len(each) - 1))], 0, 1))
    return found


def _correct(
    models: Models, target: Target, config: VolumeConfig, given: Mapping[int, SlicePrompts], steps: Task
) -> Propagation:
    """Look again where the newest prompts are; beyond the cubes of these looks, the mask stays as it was."""
    assert target.previous is not None
    scene, axis, previous = models.scene, target.axis, target.previous
    newest = replace(target, prompts=target.prompts[len(target.prompts) - target.fresh :])
    fresh = anchors(scene, newest)
    known = [
        each
        for index, asked in given.items()
        if (each := _recall(models, axis, index, asked, previous, config, index in fresh))
    ]
    points, positive = _clicks(scene, target)
    places = _places(axis, known, _clicks(scene, newest)[0], fresh)
    side = max([_side(scene, axis, each.box) for each in known] or [_reach(scene, axis, previous)])
    step = max(side / config.zoom, config.finest * min(scene.spacing))
    lattice = Lattice.around(scene, axis, places[0], step)
    canvas = _recalled(lattice, previous, places)
    search = Search(scene, lattice, canvas, known, points, positive, load_refiner(), steps, config.looks)
    for place in places:
        search.look(lattice.to_lattice(place), anew=True)
    return _patch(search, target, config)


def _recall(
    models: Models,
    axis: int,
    index: int,
    asked: SlicePrompts,
    previous: Region,
    config: VolumeConfig,
    fresh: bool,
) -> Known | None:
    """Return what is known of a prompted slice: what was drawn there, or, after new prompts, SAM's answer."""
    before = previous.plane(axis, index)
    box = asked.box or (mask_box(before) if before.any() else None)
    if not fresh:
        return Known(index, box, before) if box is not None and before.any() else None
    if box is None or not config.ask_again:
        return None
    return _ask(models, axis, index, replace(asked, box=widened(box, asked.points[asked.positive])), config)


def _places(
    axis: int, known: Sequence[Known], points: FloatArray, fresh: Mapping[int, SlicePrompts]
) -> list[FloatArray]:
    """Return the voxels to look at: new clicks (of a scribble, some), and the middles of new boxes."""
    places = list(points[:: max(1, len(points) // 8)]) if len(points) > 8 else list(points)
    if not places:
        places = [_voxel(axis, each) for each in known if each.index in fresh]
    return places


def _reach(scene: Scene, axis: int, region: Region) -> float:
    """Return the longer side of a region across the slices, in mm."""
    return max(
        float(n * s)
        for a, (n, s) in enumerate(zip(region.array.shape, scene.spacing, strict=True))
        if a != axis
    )


def _recalled(lattice: Lattice, previous: Region, places: Sequence[FloatArray]) -> Canvas:
    """Return a canvas that covers all cubes around `places`, filled with the mask so far."""
    middles = lattice.to_lattice(np.array(places))
    low = np.floor(middles.min(axis=0)).astype(int) - GRID
    high = np.ceil(middles.max(axis=0)).astype(int) + GRID
    canvas = Canvas.over(low, high)
    ends = np.sort(lattice.to_scene(np.array([low, high], float)), axis=0)
    start, stop = np.floor(ends[0]).astype(int) - 1, np.ceil(ends[1]).astype(int) + 2
    mask = previous.window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    axes = list(lattice.axes)
    first = (lattice.to_scene(low.astype(float)) - start)[axes]
    shape = canvas.total.shape
    found = sample(
        np.where(mask, 4, -4).transpose(axes), first, lattice.steps, (shape[0], shape[1], shape[2])
    )
    canvas.total[:], canvas.weight[:] = found.numpy(), 1
    return canvas


def _patch(search: Search, target: Target, config: VolumeConfig) -> Propagation:
    """Put what was seen anew in place of what the mask had there."""
    assert target.previous is not None
    previous = target.previous
    seen = _cubes(search)
    drawn = paint(search.scene, search.lattice, search.canvas)
    kept = subtract(previous, seen)
    region = union(kept, _within(drawn, seen))
    region = clean(_obeying(region, search), target, union(kept, _held(search, target)), config.clean)
    region = _obeying(region, search)  # filling holes may undo a click
    return Propagation(region, _confidence(search, region, target.axis), ())


def _cubes(search: Search) -> Region:
    """Return the voxels of the scene that the looks have covered."""
    shape = search.scene.shape
    found = Region.empty(shape)
    for start in search.cubes:
        ends = np.sort(search.lattice.to_scene(np.array([start, start + GRID - 1], float)), axis=0)
        low = np.clip(np.ceil(ends[0]), 0, shape).astype(int)
        high = np.clip(np.floor(ends[1]) + 1, low, shape).astype(int)
        cube = np.ones(tuple(int(n) for n in high - low), bool)
        found = union(found, Region.at(cube, (int(low[0]), int(low[1]), int(low[2])), shape))
    return found


def _within(region: Region, other: Region) -> Region:
    return Region.at(region.array & other.window(region.start, region.stop), region.start, region.shape)


def _obeying(region: Region, search: Search) -> Region:
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
