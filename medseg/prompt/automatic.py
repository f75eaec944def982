"""Everything on a slice or in a volume, without a prompt: for pre-annotation and for instances.

Source: ``SamAutomaticMaskGenerator`` of segment-anything (Kirillov et al., "Segment Anything", ICCV 2023,
appendix B): a grid of clicks on one embedding, three masks for each, those kept of which the network expects
a high IoU and that change little with the threshold, doubles removed, and the same in crops if wished.
Departures:

- Clicks are asked from a coarse grid to the fine one. What lies in the smallest mask that was kept at a click
  is settled if that mask is small (``settled_cells``): asking there again would give the same three masks.
- Air around the body is not asked: black voxels that are connected with the border of the slice.
- Two masks are doubles if their boxes and their voxels overlap; the original looks at boxes only, and so
  loses what is inside a ring.

Slices are linked to objects by the IoU of their masks on neighbouring slices, the best pair first, each mask
in one object. Overlaps are settled last, in 3D: a smaller object lies in front of a larger one, so that a
part stays visible in its whole on every slice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

from medseg import log
from medseg.config import Config
from medseg.errors import ConfigError, DataError
from medseg.geometry.crop import bounding_box, box_slices
from medseg.geometry.orient import from_ras
from medseg.prompt.regions import Triple
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.types import Array, BoolArray, FloatArray
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.slicewise import Models

# Axis, slice, field, (n, 2) row and column of clicks in voxels of the slice, and the least IoU of interest,
# to logits (masks, rows, columns of the field) and the IoU that is expected of each (masks,).
Ask = Callable[[int, int, Rectangle, FloatArray, float], tuple[FloatArray, FloatArray]]


# Side of the input of published weights; see `AutomaticConfig.size`.
SIZE = 768


class AutomaticConfig(Config):
    """What is asked, what is kept, and how slices are linked.

    Attributes
    ----------
    points : int
        Clicks along the longer side of a slice; in crops of layer n, 2^n times fewer.
    batch : int
        Clicks that are decoded at once: memory is that of so many times three masks.
    settled_cells : int
        Leave out clicks in the smallest mask that another click has found, where it is no larger than so many
        cells of the grid; in a larger one a part may hide. 0 asks all.
    crops : int
        Layers of crops; layer n cuts the slice into 2^n x 2^n parts, each of which is encoded again.
    crop_overlap : float
        By which part of the shorter side crops of the first layer overlap.
    least_iou, least_stability : float
        A mask is kept if the network expects this IoU of it, and if the masks at thresholds that are
        `stability_offset` logits lower and higher have this IoU.
    box_iou, mask_iou : float
        Of two masks whose boxes and voxels overlap more than this the less certain one is a double.
    least_area_mm2 : float
        Of a mask on a slice, in the square of the image's unit; smaller islands and holes are removed too.
    largest_part : float
        Of a slice that a mask may cover: more is background.
    most : int
        Masks of one slice, the most certain ones.
    link_iou : float
        Masks of neighbouring slices are one object from this IoU on.
    gap : int
        Slices on which an object may be missing in between.
    gap_mm : float
        The same as a distance, in the unit of the image: the longer of both holds.
    least_slices : int
        Of an object, where so many slices are looked at.
    least_extent_mm : float
        Of an object across the slices, likewise; slices count with their thickness.
    least_visible : float
        Part of an object that is not behind smaller ones; else it is left out.
    asset : str, optional
        Network that answers clicks; by default the one of the models.
    size : int, optional
        Side of its input. None: that of its fine-tuning, or 768. On a slice of a CT with 13 organs the
        objects that MobileSAM finds have a mean best Dice with these of 0.15 at 512 pixels (0.32 with
        `least_stability` 0.8), 0.40 at 768 and at 1024.
    """

    points: int = Field(16, ge=1, le=128)
    batch: int = Field(16, ge=1, le=256)
    settled_cells: int = Field(16, ge=0)
    crops: int = Field(0, ge=0, le=3)
    crop_overlap: float = Field(512 / 1500, ge=0, lt=0.5)
    least_iou: float = Field(0.8, ge=0, le=1)
    least_stability: float = Field(0.9, ge=0, le=1)
    stability_offset: float = Field(1.0, gt=0)
    box_iou: float = Field(0.5, gt=0, le=1)
    mask_iou: float = Field(0.7, gt=0, le=1)
    least_area_mm2: float = Field(10.0, ge=0)
    largest_part: float = Field(0.6, gt=0, le=1)
    most: int = Field(200, ge=1)
    link_iou: float = Field(0.4, gt=0, le=1)
    gap: int = Field(1, ge=0)
    gap_mm: float = Field(0.0, ge=0)
    least_slices: int = Field(2, ge=1)
    least_extent_mm: float = Field(0.0, ge=0)
    least_visible: float = Field(0.3, ge=0, le=1)
    asset: str | None = None
    size: int | None = Field(None, ge=32)


@dataclass(frozen=True)
class FoundObject:
    """One row of the table.

    Attributes
    ----------
    label : int
        In the label map; 1 is the largest object.
    iou : float
        That the network expects, mean over the object's voxels.
    stability : float
        IoU of its masks at a lower and a higher threshold, likewise.
    voxels : int
    volume_mm3 : float
        In the cube of the image's unit.
    first, last : int
        Slices that it reaches, across the axis of the turned grid.
    centre_mm : (float, float, float)
        Mean of its voxels in the world.
    """

    label: int
    iou: float
    stability: float
    voxels: int
    volume_mm3: float
    first: int
    last: int
    centre_mm: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "centre_mm": list(self.centre_mm)}


@dataclass(frozen=True)
class LeftOut:
    """Masks or objects that a rule left out, and their voxels, shared ones more than once."""

    rule: str
    count: int
    voxels: int

    @classmethod
    def of(cls, rule: str, voxels: Sequence[int]) -> "tuple[LeftOut, ...]":
        """Return one, or none if nothing was left out."""
        return (cls(rule, len(voxels), sum(voxels)),) if voxels else ()


class Everything(NamedTuple):
    """The label map (i, j, k) on the turned grid of the scene, 0 is nothing, and the table of its objects."""

    labels: Array
    objects: tuple[FoundObject, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, eq=False)
class SliceObject:
    """A mask on one slice, held as the packed bits of its box.

    Attributes
    ----------
    box : first row, first column, end row, end column in voxels of the slice, half open
    bits : of the mask in its box
    area : voxels
    iou, stability : of the mask
    layer : of crops that it was found in
    """

    box: Rectangle
    bits: Array
    area: int
    iou: float
    stability: float = 1.0
    layer: int = 0

    @classmethod
    def of(
        cls, mask: BoolArray, origin: tuple[int, int], iou: float, stability: float, layer: int
    ) -> "SliceObject":
        """Pack a mask that is not empty, whose first voxel is `origin` of the slice."""
        box = bounding_box(mask)
        (top, bottom), (left, right) = box
        cut = mask[box_slices(box)]
        where = (origin[0] + top, origin[1] + left, origin[0] + bottom, origin[1] + right)
        return cls(where, np.packbits(cut), int(np.count_nonzero(cut)), iou, stability, layer)

    @property
    def mask(self) -> BoolArray:
        """The mask in its box."""
        rows, columns = self.box[2] - self.box[0], self.box[3] - self.box[1]
        return np.unpackbits(self.bits, count=rows * columns).reshape(rows, columns).astype(bool)

    def overlap(self, other: "SliceObject") -> float:
        """Return the IoU of two masks of one slice, or of two."""
        top, left = max(self.box[0], other.box[0]), max(self.box[1], other.box[1])
        bottom, right = min(self.box[2], other.box[2]), min(self.box[3], other.box[3])
        if top >= bottom or left >= right:
            return 0.0
        mine, yours = (
            each.mask[top - each.box[0] : bottom - each.box[0], left - each.box[1] : right - each.box[1]]
            for each in (self, other)
        )
        both = int(np.count_nonzero(mine & yours))
        return both / (self.area + other.area - both)


@dataclass(eq=False)
class Track:
    """An object while slices are linked: its masks by slice, in the order in which they were found."""

    masks: dict[int, SliceObject] = field(default_factory=dict)
    seen: int = 0  # number of the slice, among those looked at, on which it was seen last

    @property
    def newest(self) -> SliceObject:
        """The mask that was found last."""
        return self.masks[next(reversed(self.masks))]

    @property
    def voxels(self) -> int:
        """Of all slices, whatever lies in front."""
        return sum(mask.area for mask in self.masks.values())


def segment_everything(
    models: "Models",
    config: AutomaticConfig | None = None,
    axis: int = 2,
    slices: Iterable[int] | None = None,
    ask: Ask | None = None,
) -> Everything:
    """Find every object, slice by slice across an axis, and link the slices.

    The same volume gives the same objects in each of its 48 orders of axes, since all is done on the turned
    grid. Memory is that of the label map, of one batch of masks, and of the masks kept, one bit a voxel.

    Parameters
    ----------
    models : Models
        Of the scene.
    config : AutomaticConfig, optional
    axis : int
        Of the turned grid, across which slices are taken.
    slices : several int, optional
        Slices to look at; all by default. A single one gives a label map of that slice.
    ask : optional
        What answers clicks; by default the network of clicks of `models`.

    Returns
    -------
    Everything
        Labels are 1 to the number of objects, the largest first, in the smallest unsigned type that holds
        them. :func:`restore_labels` brings them to the grid of the source.

    Raises
    ------
    ConfigError
        The axis does not exist, or the network does not understand clicks.
    DataError
        A slice does not exist, or none is given.
    Cancelled
        The listener wants to stop.
    """
    config, scene = config or AutomaticConfig(), models.scene
    if axis not in (0, 1, 2):
        raise ConfigError(f"axis {axis}: expected 0 (sagittal), 1 (coronal) or 2 (axial).")
    chosen = _check_slices(slices, scene.shape[axis], axis)
    answer = ask or ask_clicks(models, config)
    beyond: list[int] = []

    def look() -> Iterator[tuple[int, list[SliceObject]]]:
        for index in log.progress(chosen, "Segmenting everything"):
            masks = find_on_slice(scene, axis, index, answer, config)
            beyond.extend(each.area for each in masks[config.most :])
            yield index, masks[: config.most]

    tracks, short = _long_enough(link(look(), config, scene.spacing[axis]), config, len(chosen), scene, axis)
    found = paint(tracks, scene, axis, config)
    over = LeftOut.of(f"beyond the {config.most} most certain masks of a slice", beyond)
    return found._replace(left_out=(*over, *short, *found.left_out))


def _long_enough(
    tracks: Sequence[Track], config: AutomaticConfig, slices: int, scene: Scene, axis: int
) -> tuple[list[Track], tuple[LeftOut, ...]]:
    """Return the objects that reach over enough slices, and what was left out."""
    kept: list[Track] = []
    short: list[int] = []
    for track in tracks:
        reach = (max(track.masks) - min(track.masks) + 1) * scene.spacing[axis]
        if len(track.masks) >= min(config.least_slices, slices) and reach >= config.least_extent_mm:
            kept.append(track)
        else:
            short.append(track.voxels)
    extent = f", or shorter than {config.least_extent_mm:g}" if config.least_extent_mm else ""
    return kept, LeftOut.of(f"on fewer than {config.least_slices} slices{extent}", short)


def restore_labels(scene: Scene, labels: Array) -> Volume:
    """Bring a label map of the turned grid back to the grid of the source."""
    return from_ras(Volume(labels, scene.geometry), scene.source)


def _check_slices(slices: Iterable[int] | None, count: int, axis: int) -> list[int]:
    chosen = sorted(set(range(count) if slices is None else slices))
    if not chosen:
        raise DataError("slices: none is given. Leave them out to look at all.")
    if chosen[0] < 0 or chosen[-1] >= count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise DataError(f"slice {wrong} across axis {axis}: the volume has slices 0 to {count - 1} there.")
    return chosen


def ask_clicks(models: "Models", config: AutomaticConfig) -> Ask:
    """Return what asks the network of clicks: each click alone, three masks for each.

    Raises
    ------
    ConfigError
        The network understands boxes only.
    """
    import torch

    from medseg.prompt.segmenter import SliceSegmenter

    name = config.asset or models.clicks
    segmenter = models.segmenter(name, config.size, SIZE)
    if not isinstance(segmenter, SliceSegmenter) or "point" not in segmenter.model.spec.understands:
        raise ConfigError(f"{name}: does not understand clicks. Use mobile-sam or a SAM for everything.")

    def ask(
        axis: int, index: int, area: Rectangle, clicks: FloatArray, least: float
    ) -> tuple[FloatArray, FloatArray]:
        frame, embedding = segmenter.frame(area), segmenter.embed(axis, index, area)
        points = torch.as_tensor(frame.points(clicks - np.array(area[:2])), dtype=torch.float32)
        signs = torch.ones(len(points), 1)
        with torch.no_grad():
            low, scores = segmenter.model.decode(
                embedding,
                points=points[:, None].to(segmenter.device),
                signs=signs.to(segmenter.device),
                multimask=True,
            )
        good = scores >= least
        return frame.logits(low[good].cpu()), scores[good].cpu().numpy()

    return ask


def find_on_slice(
    scene: Scene, axis: int, index: int, ask: Ask, config: AutomaticConfig
) -> list[SliceObject]:
    """Return the masks of one slice, which may overlap, the most certain first."""
    from scipy.ndimage import label

    grey = scene.slice(axis, index)
    dark, _ = label(grey <= 0)
    border = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]])
    air = np.isin(dark, border[border > 0])
    spacing = [size for a, size in enumerate(scene.spacing) if a != axis]
    least = max(1, round(config.least_area_mm2 / (spacing[0] * spacing[1])))
    found: list[SliceObject] = []
    for layer, area in crop_fields(plane_size(scene.shape, axis), config):
        found += _Look(axis, index, area, layer, air, least, config).find(ask)
    return without_doubles(found, config)


def crop_fields(shape: tuple[int, int], config: AutomaticConfig) -> Iterator[tuple[int, Rectangle]]:
    """Yield the whole slice (layer 0) and its crops, with their layer.

    >>> list(crop_fields((64, 64), AutomaticConfig(crops=1, crop_overlap=0.25)))[:3]
    [(0, (0, 0, 64, 64)), (1, (0, 0, 40, 40)), (1, (0, 24, 40, 64))]
    """
    yield 0, (0, 0, *shape)
    for layer in range(1, config.crops + 1):
        parts = 2**layer
        overlap = int(config.crop_overlap * min(shape) * 2 / parts)
        rows, columns = (-(-(overlap * (parts - 1) + side) // parts) for side in shape)
        for a in range(parts):
            for b in range(parts):
                top, left = a * (rows - overlap), b * (columns - overlap)
                yield layer, (top, left, min(top + rows, shape[0]), min(left + columns, shape[1]))


def grid_points(area: Rectangle, along: int) -> FloatArray:
    """Return a grid of clicks, (n, 2) row and column, every fourth along both sides first, then every second.

    `along` is their number along the longer side; the distance is the same along both.
    """
    sides = np.array([area[2] - area[0], area[3] - area[1]])
    rows, columns = (max(1, round(along * side / sides.max())) for side in sides)
    r, c = np.divmod(np.arange(rows * columns), columns)
    level = np.where((r % 4 == 1) & (c % 4 == 1), 0, np.where((r % 2 == 1) & (c % 2 == 1), 1, 2))
    order = np.argsort(level, kind="stable")
    r, c = r[order], c[order]
    return np.stack(
        [area[0] + (r + 0.5) * sides[0] / rows - 0.5, area[1] + (c + 0.5) * sides[1] / columns - 0.5], axis=1
    )


@dataclass(eq=False)
class _Look:
    """One look at a field: which clicks are left, which masks are kept."""

    axis: int
    index: int
    area: Rectangle
    layer: int
    air: BoolArray
    least: int
    config: AutomaticConfig

    def find(self, ask: Ask) -> list[SliceObject]:
        """Ask all clicks."""
        points = grid_points(self.area, max(1, self.config.points // 2**self.layer))
        cell = (self.area[2] - self.area[0]) * (self.area[3] - self.area[1]) / len(points)
        places = np.clip(np.rint(points).astype(int), 0, np.array(self.air.shape) - 1)
        settled = self.air.copy()
        found: list[SliceObject] = []
        waiting = list(range(len(points)))
        while waiting:
            log.check_cancelled()
            waiting = [n for n in waiting if not settled[tuple(places[n])]]
            now, waiting = waiting[: self.config.batch], waiting[self.config.batch :]
            if not now:
                break
            answer = ask(self.axis, self.index, self.area, points[now], self.config.least_iou)
            kept = list(self._kept(*answer))
            small = [each for each in kept if each.area <= self.config.settled_cells * cell]
            _settle(settled, small, places[now])
            found += kept
        return found

    def _kept(self, logits: FloatArray, scores: FloatArray) -> Iterator[SliceObject]:
        """Yield what passes the filters."""
        offset = self.config.stability_offset
        for each, score in zip(logits, scores, strict=True):
            wide = int(np.count_nonzero(each > -offset))
            stability = int(np.count_nonzero(each > offset)) / max(wide, 1)
            if score < self.config.least_iou or stability < self.config.least_stability:
                continue
            mask = tidy(each > 0, self.least)
            if mask.any() and self._is_object(mask):
                yield SliceObject.of(mask, self.area[:2], min(float(score), 1.0), stability, self.layer)

    def _is_object(self, mask: BoolArray) -> bool:
        voxels = int(np.count_nonzero(mask))
        rows, columns = slice(self.area[0], self.area[2]), slice(self.area[1], self.area[3])
        in_air = int(np.count_nonzero(mask & self.air[rows, columns]))
        if voxels < self.least or voxels > self.config.largest_part * self.air.size or 2 * in_air > voxels:
            return False
        return not (self.layer and self._is_cut(mask))

    def _is_cut(self, mask: BoolArray) -> bool:
        """Return whether a mask ends where the crop does and the slice does not."""
        rows, columns = self.air.shape
        top, left, bottom, right = self.area
        return bool(
            (top > 0 and mask[0].any())
            or (left > 0 and mask[:, 0].any())
            or (bottom < rows and mask[-1].any())
            or (right < columns and mask[:, -1].any())
        )


def _settle(settled: BoolArray, masks: Sequence[SliceObject], asked: Array) -> None:
    """Mark the smallest of masks around each click that was asked."""
    for place in asked:
        around = [each for each in masks if _holds(each, place)]
        if around:
            smallest = min(around, key=lambda each: each.area)
            top, left, bottom, right = smallest.box
            settled[top:bottom, left:right] |= smallest.mask


def _holds(each: SliceObject, place: Array) -> bool:
    row, column = int(place[0]) - each.box[0], int(place[1]) - each.box[1]
    inside = 0 <= row < each.box[2] - each.box[0] and 0 <= column < each.box[3] - each.box[1]
    return inside and bool(each.mask[row, column])


def tidy(mask: BoolArray, least: int) -> BoolArray:
    """Remove islands and fill holes of fewer than `least` voxels (neighbours share a side)."""
    from scipy.ndimage import label

    mask = mask.copy()
    for value in (True, False):
        parts, count = label(mask == value)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        small = sizes < least
        small[0] = False
        if small.any():
            mask[small[parts]] = not value
    return mask


def without_doubles(found: Sequence[SliceObject], config: AutomaticConfig) -> list[SliceObject]:
    """Return masks of which no two are the same, those of deeper crops and higher IoU first."""
    order = sorted(found, key=lambda each: (-each.layer, -each.iou, -each.stability, each.box))
    kept: list[SliceObject] = []
    boxes = np.zeros((0, 4))
    for each in order:
        near = np.flatnonzero(box_overlaps(each.box, boxes) > config.box_iou)
        if any(each.overlap(kept[n]) > config.mask_iou for n in near):
            continue
        kept.append(each)
        boxes = np.array([one.box for one in kept], dtype=float)
    return kept


def box_overlaps(box: Rectangle, boxes: FloatArray) -> FloatArray:
    """Return the IoU of a box with each of (n, 4) boxes.

    >>> box_overlaps((0, 0, 2, 2), np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]]))
    array([1.        , 0.33333333, 0.        ])
    """
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.clip(sides, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(both / (areas + (box[2] - box[0]) * (box[3] - box[1]) - both))


def link(
    slices: Iterable[tuple[int, Sequence[SliceObject]]], config: AutomaticConfig, thickness: float = 1.0
) -> list[Track]:
    """Join masks of slices, given in their order, to objects.

    On each slice all pairs of an object and a mask are ranked by IoU with the object's last mask, and taken
    from the best on while both are free. A mask without an object begins one; an object that was not seen for
    more than `gap` slices, each `thickness` thick, is closed.
    """
    gap = max(config.gap, int(config.gap_mm / thickness + 1e-6))
    tracks: list[Track] = []
    for now, (index, masks) in enumerate(slices):
        open_ones = [track for track in tracks if now - track.seen <= gap + 1]
        pairs = [
            (overlap, n, m)
            for n, track in enumerate(open_ones)
            for m, mask in enumerate(masks)
            if (overlap := track.newest.overlap(mask)) >= config.link_iou
        ]
        taken: dict[int, Track] = {}
        for _, n, m in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
            if m not in taken and open_ones[n] not in taken.values():
                taken[m] = open_ones[n]
        for m, mask in enumerate(masks):
            track = taken.get(m)
            if track is None:
                track = Track()
                tracks.append(track)
            track.masks[index] = mask
            track.seen = now
    return tracks


def paint(tracks: Sequence[Track], scene: Scene, axis: int, config: AutomaticConfig) -> Everything:
    """Make the label map, smaller objects in front, and the table."""
    order = sorted(
        tracks, key=lambda track: (track.voxels, min(track.masks), track.masks[min(track.masks)].box)
    )
    labels = np.zeros(scene.shape, dtype=np.min_scalar_type(len(order)))
    shown: list[tuple[int, int, Track]] = []  # visible voxels, number in the map so far, object
    hidden: list[int] = []
    for number, track in enumerate(order, 1):
        visible = _put(labels, track, axis, number, config.least_visible)
        if visible:
            shown.append((visible, number, track))
        else:
            hidden.append(track.voxels)
    shown.sort(key=lambda each: (-each[0], each[1]))
    final = np.zeros(len(order) + 1, dtype=np.min_scalar_type(len(shown)))
    for label, (_, number, _) in enumerate(shown, 1):
        final[number] = label
    labels = final[labels]
    rows = tuple(_rows(labels, [track for _, _, track in shown], scene, axis))
    rule = f"less than {config.least_visible:g} of it not behind smaller ones"
    return Everything(labels, rows, LeftOut.of(rule, hidden))


def _put(labels: Array, track: Track, axis: int, number: int, least_visible: float) -> int:
    """Paint an object where nothing is yet, if enough of it is seen; return how many voxels that is.

    Slices on which it is hidden are taken from it.
    """
    views = {}
    for index, each in track.masks.items():
        top, left, bottom, right = each.box
        where: list[slice | int] = [slice(top, bottom), slice(left, right)]
        where.insert(axis, index)
        part = labels[tuple(where)]
        views[index] = part, each.mask & (part == 0)
    visible = sum(int(np.count_nonzero(free)) for _, free in views.values())
    if visible < least_visible * track.voxels:
        return 0
    for part, free in views.values():
        part[free] = number
    track.masks = {index: mask for index, mask in track.masks.items() if views[index][1].any()}
    return visible


def _rows(labels: Array, tracks: Sequence[Track], scene: Scene, axis: int) -> Iterator[FoundObject]:
    counts, sums = _moments(labels, len(tracks))
    for label, track in enumerate(tracks, 1):
        areas = [each.area for each in track.masks.values()]
        iou, stability = (
            float(np.average([getattr(each, name) for each in track.masks.values()], weights=areas))
            for name in ("iou", "stability")
        )
        i, j, k = scene.to_world(sums[label] / counts[label]).tolist()
        voxels = int(counts[label])
        volume = voxels * scene.geometry.voxel_volume
        yield FoundObject(
            label, iou, stability, voxels, volume, min(track.masks), max(track.masks), (i, j, k)
        )


def _moments(labels: Array, count: int) -> tuple[Array, FloatArray]:
    """Return voxels of each label (count + 1,), and the sum of their positions (count + 1, 3)."""
    counts = np.zeros(count + 1, dtype=np.int64)
    sums = np.zeros((count + 1, 3))
    shape: Triple = (labels.shape[0], labels.shape[1], labels.shape[2])
    for i in range(shape[0]):  # slab by slab: positions of a whole volume would be three volumes
        flat = labels[i].ravel()
        here = np.bincount(flat, minlength=count + 1)
        counts += here
        sums[:, 0] += i * here
        j, k = np.divmod(np.arange(flat.size), shape[2])
        sums[:, 1] += np.bincount(flat, weights=j, minlength=count + 1)
        sums[:, 2] += np.bincount(flat, weights=k, minlength=count + 1)
    return counts, sums
