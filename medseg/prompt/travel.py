"""Through the volume slice by slice: every prompted slice is an anchor, its neighbours follow from it.

One walk serves every way of asking. From the outermost anchors it goes outward until the object ends; between
two anchors it goes from both to the middle, and what is expected of a slice is interpolated from both sides.
A correction changes the slices around it until its effect fades, and no further than the next anchor.

Source: ``segment_mask_in_volume`` of micro-sam (Archit et al., Nature Methods 2025) for anchors, the walk
between them from both ends and the stop at a drop of the IoU; the other stops and corrections are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import cc3d
import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import DataError
from medseg.geometry.crop import bounding_box
from medseg.log import Task, task
from medseg.prompt import rasterise
from medseg.prompt.cleanup import CleanConfig, clean, keep_touching
from medseg.prompt.overlap import union
from medseg.prompt.prompts import Prompt
from medseg.prompt.rasterise import SliceBox
from medseg.prompt.regions import Region, Triple
from medseg.prompt.scene import Scene, plane_size
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.target import Propagation, Target
from medseg.types import BoolArray, FloatArray, IntArray

# Pixels around a mask whose grey values are compared with those inside.
RING = 3


class Stops(Config):
    """When the object has ended, walking away from an anchor. A slice that fails is not written.

    Attributes
    ----------
    iou : float
        Least IoU with the mask of the slice before.
    growth : float
        Most times that the area may grow or shrink from one slice to the next.
    swell : float
        Most times that the area may grow over that of the anchor.
    score : float
        Least IoU that the network itself expects of its answer.
    contrast : float
        Least difference of the grey value inside from that around, as a part of the anchor's.
    drift : float
        Most difference of the mean grey value inside from the anchor's, in the anchor's deviations.
    empty : int
        Failing slices in a row that end the object; with 2, a gap of one slice is passed.
    """

    iou: float = Field(0.0, ge=0, le=1)
    growth: float = Field(100.0, ge=1)
    swell: float = Field(100.0, ge=1)
    score: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(-10.0)
    drift: float = Field(100.0, gt=0)
    empty: int = Field(1, ge=1)


class Travel(Config):
    """How far to walk, and what is cleaned at the end.

    Attributes
    ----------
    stops : Stops
    clean : CleanConfig
    trust_limits : bool
        Walk a range that the user gave to its ends, whatever is found there.
    restart : bool
        After an empty slice ask with the box of the anchor again, instead of with the last mask.
    deep : float
        How far a correction reaches across slices, as a multiple of how wide it is on its own.
    """

    stops: Stops = Stops()
    clean: CleanConfig = CleanConfig()
    trust_limits: bool = False
    restart: bool = False
    deep: float = Field(1.0, ge=0)


@dataclass(frozen=True, eq=False)
class Seen:
    """The object on one slice.

    Attributes
    ----------
    mask : (rows, columns) bool
    score : float
        IoU that the network itself expects.
    logits : (rows, columns) float, optional
    box : SliceBox, optional
        With which it was asked.
    hints : SlicePrompts, optional
        Of what is expected: points that a correction beside it suggests. Unlike clicks they may be wrong.
    inside, around, spread : float
        Mean grey value of the mask and of the ring around it, and the deviation inside.
    """

    mask: BoolArray
    score: float = 1.0
    logits: FloatArray | None = None
    box: SliceBox | None = None
    hints: SlicePrompts | None = None
    inside: float = 0.0
    around: float = 0.0
    spread: float = 1.0

    @property
    def area(self) -> int:
        """Pixels set."""
        return int(np.count_nonzero(self.mask))


Ask = Callable[[int, SlicePrompts | None, Seen | None], Seen]
"""Slice index, what the user said of it, what is expected of it -> the object on it."""


@dataclass(eq=False)
class Stack:
    """Slices of one object across an axis, each held as the box that it fills."""

    shape: Triple
    axis: int
    held: dict[int, tuple[int, int, BoolArray]] = field(default_factory=dict)

    @classmethod
    def of(cls, region: Region, axis: int) -> "Stack":
        """Take a region apart."""
        stack = cls(region.shape, axis)
        for index in range(region.start[axis], region.stop[axis]):
            stack.put(index, region.plane(axis, index))
        return stack

    def put(self, index: int, mask: BoolArray) -> None:
        """Keep a (rows, columns) mask in place of what was on its slice."""
        self.held.pop(index, None)
        if mask.any():
            (top, bottom), (left, right) = bounding_box(mask)
            self.held[index] = (top, left, mask[top:bottom, left:right].copy())

    def get(self, index: int) -> BoolArray:
        """Return the mask of a slice, a new array."""
        mask = np.zeros(plane_size(self.shape, self.axis), dtype=bool)
        if index in self.held:
            top, left, part = self.held[index]
            mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        return mask

    def region(self) -> Region:
        """Put the slices together."""
        if not self.held:
            return Region.empty(self.shape)
        low, high = min(self.held), max(self.held) + 1
        top = min(r for r, _, _ in self.held.values())
        left = min(c for _, c, _ in self.held.values())
        bottom = max(r + part.shape[0] for r, _, part in self.held.values())
        right = max(c + part.shape[1] for _, c, part in self.held.values())
        whole = np.zeros((high - low, bottom - top, right - left), dtype=bool)
        for index, (r, c, part) in self.held.items():
            whole[index - low, r - top : r - top + part.shape[0], c - left : c - left + part.shape[1]] = part
        start = [top, left]
        start.insert(self.axis, low)
        turned = np.moveaxis(whole, 0, self.axis)
        return Region.at(turned, (start[0], start[1], start[2]), self.shape)


def observe(scene: Scene, axis: int, index: int, seen: Seen) -> Seen:
    """Return what was seen with the grey values in and around the mask."""
    from scipy.ndimage import binary_dilation

    if not seen.mask.any():
        return seen
    box = bounding_box(seen.mask)
    limits = seen.mask.shape
    cut = [(max(0, a - RING), min(n, b + RING)) for (a, b), n in zip(box, limits, strict=True)]
    mask = seen.mask[tuple(slice(a, b) for a, b in cut)]
    grey = scene.slice(axis, index, (cut[0][0], cut[1][0], cut[0][1], cut[1][1]))
    ring = binary_dilation(mask, iterations=RING) & ~mask
    values = grey[mask]
    around = float(grey[ring].mean()) if ring.any() else 0.0
    return replace(seen, inside=float(values.mean()), around=around, spread=float(values.std()))


def overlap(a: BoolArray, b: BoolArray) -> float:
    """Return the IoU; 0 where both are empty."""
    both = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / both if both else 0.0


def failure(now: Seen, last: Seen, anchor: Seen, stops: Stops) -> str | None:
    """Say why `now`, after `last`, is not the object of `anchor` any more; None if it is."""
    area, before = now.area, last.area
    if not area:
        return "nothing was found there"
    same = overlap(now.mask, last.mask)
    if same < stops.iou:
        return f"it overlaps the slice before by {same:.2f} only (stops.iou {stops.iou:g})"
    if before and not 1 / stops.growth <= area / before <= stops.growth:
        return f"its area changes {area / before:.2f} times (stops.growth {stops.growth:g})"
    if anchor.area and area > stops.swell * anchor.area:
        return f"it is {area / anchor.area:.2f} times as large as where it was pointed at (stops.swell)"
    if now.score < stops.score:
        return f"the network expects an IoU of {now.score:.2f} only (stops.score {stops.score:g})"
    return _looks_different(now, anchor, stops)


def _looks_different(now: Seen, anchor: Seen, stops: Stops) -> str | None:
    contrast = anchor.inside - anchor.around
    if (now.inside - now.around) * np.sign(contrast) < stops.contrast * abs(contrast):
        return "it does not stand out any more (stops.contrast)"
    # A flat patch has no deviation: two grey levels of 256 are no difference.
    if abs(now.inside - anchor.inside) > stops.drift * max(anchor.spread, 2.0):
        return "it is much brighter or darker (stops.drift)"
    return None


def interpolate(near: BoolArray, far: BoolArray, share: float) -> BoolArray:
    """Return the shape `share` of the way from one mask to the other, by their signed distances.

    Shape-based interpolation (Raya and Udupa, IEEE TMI 1990). Masks that do not overlap give `near`.
    """
    from scipy.ndimage import distance_transform_edt

    if not (near & far).any():
        return near
    box = bounding_box(near | far)
    part = tuple(slice(max(0, a - 1), b + 1) for a, b in box)

    def signed(mask: BoolArray) -> FloatArray:
        framed = np.pad(mask[part], 1)
        return np.asarray(distance_transform_edt(framed) - distance_transform_edt(~framed))[1:-1, 1:-1]

    mixed = np.zeros_like(near)
    mixed[part] = (1 - share) * signed(near) + share * signed(far) > 0
    return mixed


def touching(mask: BoolArray, other: BoolArray) -> BoolArray:
    """Return the components (8 neighbours) of a mask that share a pixel with another, or lie beside one."""
    from scipy.ndimage import binary_dilation

    if not (mask.any() and other.any()):
        return np.zeros_like(mask)
    parts = components(mask)
    chosen = np.unique(parts[mask & binary_dilation(other, np.ones((3, 3), dtype=bool))])
    return np.asarray(np.isin(parts, chosen) & mask)


def components(mask: BoolArray) -> IntArray:
    """Number the components (8 neighbours) of a (rows, columns) mask from 1."""
    found: IntArray = cc3d.connected_components(np.pad(mask, 1), connectivity=8)[1:-1, 1:-1]
    return found


def travel(scene: Scene, target: Target, ask: Ask, config: Travel) -> Propagation:
    """Find an object in 3D by asking slice after slice.

    Parameters
    ----------
    scene, target
    ask : what answers one slice
    config : where to stop, what to clean

    Raises
    ------
    DataError
        No prompt says where the object is.
    Cancelled
        The listener wants to stop.
    """
    with task("Following the object", scene.shape[target.axis]) as steps:
        trip = _Trip(scene, target, ask, config, steps)
        if target.previous is not None and target.fresh:
            trip.correct(target.previous)
        else:
            trip.run()
    gap = max(config.clean.gap, config.stops.empty - 1)
    region = clean(trip.stack.region(), trip.target, trip.held(), config.clean.replace(gap=gap))
    return Propagation(region, dict(sorted(trip.confidence.items())), tuple(trip.notes))


class _Trip:
    """The state of one walk: what was found so far."""

    def __init__(self, scene: Scene, target: Target, ask: Ask, config: Travel, steps: Task) -> None:
        self.scene = scene
        self.axis = target.axis
        self.limits = rasterise.limits(scene, target)
        self.target = replace(target, limits=self.limits)
        self.answer = ask
        self.config = config
        self.steps = steps
        self.given = rasterise.anchors(scene, target)
        self.exact = _exact(scene, target, self.given)
        self.stack = Stack(scene.shape, target.axis)
        self.confidence: dict[int, float] = {}
        self.notes: list[str] = []
        self.strays: Region | None = None

    def ask(self, index: int, expected: Seen | None) -> Seen:
        self.steps.advance(1, f"slice {index}")
        if index in self.exact:
            return observe(self.scene, self.axis, index, Seen(self.exact[index]))
        return observe(self.scene, self.axis, index, self.answer(index, self.given.get(index), expected))

    def keep(self, index: int, seen: Seen, confidence: float) -> None:
        self.stack.put(index, seen.mask)
        self.confidence[index] = float(np.clip(confidence, 0, 1))

    def ends(self) -> tuple[int, int]:
        """Return the first and last slice to look at."""
        return self.limits or (0, self.scene.shape[self.axis] - 1)

    # All of it

    def run(self) -> None:
        seeds = {index: self.ask(index, None) for index in self.starts()}
        for index, seen in seeds.items():
            self.keep(index, seen, seen.score)
        low, high = self.ends()
        first, last = min(seeds), max(seeds)
        self.outward(seeds[first], range(first - 1, low - 1, -1))
        self.outward(seeds[last], range(last + 1, high + 1))
        for a, b in pairwise(sorted(seeds)):
            self.between(a, seeds[a], b, seeds[b])

    def starts(self) -> list[int]:
        """Return the slices that say by themselves where the object is: boxes and masks, or else clicks."""
        strong = [i for i, known in self.given.items() if known.box is not None or known.mask is not None]
        found = strong or [i for i, known in self.given.items() if known.positive.any()]
        if not found:
            raise DataError(
                "the prompts say only where the object is not. Give a box, a mask, or a click inside of it."
            )
        return found

    def outward(self, anchor: Seen, indices: range) -> None:
        """Walk from the outermost anchor until the object ends."""
        last, failures = anchor, 0
        sure = self.sure(indices)
        for n, index in enumerate(indices):
            now = self.ask(index, last)
            reason = None if n < sure and now.area else failure(now, last, anchor, self.config.stops)
            if reason is None:
                self.keep(index, now, now.score * overlap(now.mask, last.mask) ** 0.5)
                last, failures = now, 0
                continue
            self.confidence[index] = 1 - now.score if now.area else 1.0
            failures += n >= sure
            if failures >= self.config.stops.empty:
                self.notes.append(f"ended before slice {index}: {reason}")
                return
            if self.config.restart and n < sure:
                last = replace(anchor, mask=np.zeros_like(anchor.mask))

    def sure(self, indices: range) -> int:
        """Return how many of the slices are known to be within the object's range."""
        if self.config.trust_limits and self.limits is not None:
            return len(indices)
        clicked = [n for n, i in enumerate(indices) if i in self.given and self.given[i].positive.any()]
        return clicked[-1] + 1 if clicked else 0

    def between(self, a: int, left: Seen, b: int, right: Seen) -> None:
        """Walk from two neighbouring anchors to the middle, each slice expected between both sides."""
        middle = (a + b) // 2
        for index in range(a + 1, middle + 1):
            left = self.gap(index, left, right, 1 / (b - index + 1))
        for index in range(b - 1, middle, -1):
            right = self.gap(index, right, left, 1 / (index - middle + 1))

    def gap(self, index: int, near: Seen, far: Seen, share: float) -> Seen:
        expected = Seen(interpolate(near.mask, far.mask, share), near.score, box=near.box)
        now = self.ask(index, expected)
        self.keep(index, now, now.score * overlap(now.mask, near.mask) ** 0.5)
        return now if now.area else near

    # What a correction changes

    def correct(self, previous: Region) -> None:
        self.stack = Stack.of(previous, self.axis)
        older, newer = self.target.prompts[: -self.target.fresh], self.target.prompts[-self.target.fresh :]
        self.strays = self.untouched(previous, older)
        fresh = rasterise.anchors(self.scene, replace(self.target, prompts=newer))
        for index in fresh:
            old = self.stack.get(index)
            seen = self.ask(index, self.nearest(previous, index))
            if fresh[index].box is None and fresh[index].mask is None:
                seen = replace(seen, mask=_changed_at(fresh[index].points, old, seen.mask))
            self.keep(index, seen, seen.score)
            for indices in self.ways(index):
                self.spread(old, seen, indices)

    def ways(self, index: int) -> tuple[range, range]:
        """Return the slices on both sides, as far as the next anchor."""
        low, high = self.ends()
        low = max([low, *(i + 1 for i in self.given if i < index)])
        high = min([high, *(i - 1 for i in self.given if i > index)])
        return range(index - 1, low - 1, -1), range(index + 1, high + 1)

    def nearest(self, previous: Region, index: int) -> Seen | None:
        """Return the object so far on a slice, or on the nearest one that has it."""
        if not previous.voxels:
            return None
        near = min(max(index, previous.start[self.axis]), previous.stop[self.axis] - 1)
        return Seen(previous.plane(self.axis, near))

    def spread(self, old: BoolArray, anchor: Seen, indices: range) -> None:
        """Carry what a correction has added and removed to the next slices, less and less of it."""
        added, removed = anchor.mask & ~old, old & ~anchor.mask
        last = anchor
        within = indices[: self.depth(int(np.count_nonzero(added | removed)))]
        for step, index in enumerate(within, 1):
            before = self.stack.get(index)
            expected = Seen((before | added) & ~removed, hints=_hints(added, removed))
            now = self.ask(index, expected)
            added = touching(now.mask & ~before, added)
            removed = touching(before & ~now.mask, removed)
            # Fading is worth little by itself (mean Dice of five objects after five clicks 0.59 without, 0.60
            # with it). Most comes from changing only what holds the click: with neither it was 0.51.
            mixed = interpolate((before | added) & ~removed, before, step / (len(within) + 1))
            added, removed = mixed & ~before, before & ~mixed
            if not (added.any() or removed.any()):
                return
            seen = observe(self.scene, self.axis, index, replace(now, mask=mixed))
            if not before.any() and failure(seen, last, anchor, self.config.stops):
                return
            self.keep(index, seen, now.score)
            last = seen

    def depth(self, pixels: int) -> int:
        """Return how many slices an error of so many pixels may reach: it is as deep as it is wide."""
        rows, columns = (step for a, step in enumerate(self.scene.spacing) if a != self.axis)
        wide = 2 * np.sqrt(pixels * rows * columns / np.pi)
        return int(np.ceil(self.config.deep * wide / self.scene.spacing[self.axis]))

    def untouched(self, previous: Region, prompts: tuple[Prompt, ...]) -> Region | None:
        """Return the parts of the previous mask that stand though no earlier prompt touches them."""
        if not previous.voxels:
            return None
        slices = rasterise.anchors(self.scene, replace(self.target, prompts=prompts))
        held = self.at(Stack.of(previous, self.axis), slices)
        kept = keep_touching(previous.array, held.window(previous.start, previous.stop), self.axis, 1)
        return Region.at(previous.array & ~kept, previous.start, previous.shape)

    # What cleaning must leave

    def held(self) -> Region:
        """Return voxels that are known to be of the object: its slices that the user pointed at."""
        held = self.at(self.stack, self.given)
        return held if self.strays is None else union(held, self.strays)

    def at(self, stack: Stack, given: Mapping[int, SlicePrompts]) -> Region:
        chosen = {
            index: stack.held[index]
            for index, known in given.items()
            if index in stack.held and (known.box or known.mask is not None or known.positive.any())
        }
        return Stack(stack.shape, stack.axis, chosen).region()


def _exact(scene: Scene, target: Target, given: Mapping[int, SlicePrompts]) -> dict[int, BoolArray]:
    """Return the slices that were drawn voxel by voxel and not clicked at: nobody need be asked."""
    found: dict[int, BoolArray] = {}
    for area in rasterise.areas(scene, target):
        if area.exact and area.axis in (None, target.axis):
            for index in range(area.region.start[target.axis], area.region.stop[target.axis]):
                if index in given and not len(given[index].points):
                    found[index] = area.region.plane(target.axis, index)
    return found


def _changed_at(points: FloatArray, old: BoolArray, new: BoolArray) -> BoolArray:
    """Return the old mask with those components of its change to the new one that hold a click."""
    clicked = np.zeros_like(old)
    rows, columns = rasterise.nearest(points).astype(int).T
    clicked[rows, columns] = True
    return (old | touching(new & ~old, clicked)) & ~touching(old & ~new, clicked)


def _hints(added: BoolArray, removed: BoolArray) -> SlicePrompts:
    """Return clicks that say what a correction was: into what it added, and into what it removed."""
    inside, outside = rasterise.deepest(added, 1), rasterise.deepest(removed, 1)
    signs = np.array([True] * len(inside) + [False] * len(outside), dtype=bool)
    return SlicePrompts(np.concatenate((inside, outside)), signs)
