"""From prompts in the world to voxels of the scene: what is known on which slice, and what cannot be meant.

Everything is on the turned grid of the :class:`~medseg.prompt.scene.Scene`. Voxel r covers r - 0.5 to
r + 0.5, so the edges of a grid of n voxels are -0.5 and n - 0.5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, assert_never

import numpy as np

from medseg.errors import DataError
from medseg.geometry.crop import bounding_box
from medseg.prompt.prompts import PLANES, Box, Lasso, Mask, ObjectMask, Plane, Point, Prompt, Scribble
from medseg.prompt.regions import Region, Triple
from medseg.prompt.scene import Scene, plane_size
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.target import Target
from medseg.types import BoolArray, FloatArray

SliceBox = tuple[float, float, float, float]
"""First row, first column, end row, end column of a box on a slice, as voxel edges."""

# The logit of a binary mask that is given as a prompt: logit(1 - 1e-3), as micro-sam's
# ``_compute_logits_from_mask``.
SURE = 6.907
# A side shorter than this many voxels is no side. World positions from float32 headers are good to 1e-3.
NO_SIDE = 1e-3
# Clicks that one scribble or lasso gives on one slice; SAM was trained on up to 9 (its paper, appendix A).
POINTS_A_SLICE = 8


class Area(NamedTuple):
    """Voxels that a lasso or a mask has marked.

    Attributes
    ----------
    region : Region
    positive : bool
        Whether they belong to the object.
    axis : int or None
        It is known on slices across this axis only; None: in 3D, so all other voxels are outside.
    exact : bool
        Drawn voxel by voxel, not by a line around.
    """

    region: Region
    positive: bool
    axis: int | None
    exact: bool


class Evidence(NamedTuple):
    """Clicks and scribbles as points in 3D: (n, 3) voxel positions and (n,) whether inside the object."""

    points: FloatArray
    positive: BoolArray


def check_prompts(scene: Scene, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Refuse what cannot be meant.

    Returns
    -------
    tuple of str
        What may not be meant: clicks on black, boxes that reach out of the volume.

    Raises
    ------
    DataError
        A prompt lies outside the volume, has no area, was made on another grid, or names an object.
    """
    return tuple(note for n, prompt in enumerate(prompts, 1) for note in _check(scene, prompt, f"prompt {n}"))


def _check(scene: Scene, prompt: Prompt, where: str) -> Iterator[str]:
    if isinstance(prompt, Point):
        yield from _check_point(scene, prompt, where)
    elif isinstance(prompt, Box):
        yield from _check_box(scene, prompt, where)
    elif isinstance(prompt, Scribble | Lasso):
        yield from _check_line(scene, prompt, where)
    elif isinstance(prompt, Mask):
        _check_mask(scene, prompt, where)
    elif isinstance(prompt, ObjectMask):
        raise DataError(
            f"{where} is the mask of object {prompt.object!r}, which is known in a session only. "
            "Open a session that has this object, or give the mask itself."
        )
    else:
        assert_never(prompt)


def _check_point(scene: Scene, prompt: Point, where: str) -> Iterator[str]:
    voxel = nearest(scene.to_voxel(prompt.position_mm))
    if not _inside(scene, voxel).all():
        raise DataError(_outside(scene, f"{where} (point {_text(prompt.position_mm)})"))
    i, j, k = (int(v) for v in voxel)
    if prompt.positive and scene.grey((i, j, k)) <= 0:
        yield (
            f"{where}: the point {_text(prompt.position_mm)} lies on black (air or background, or darker "
            "than the window shows). Check its position, or the window."
        )


def _check_box(scene: Scene, box: Box, where: str) -> Iterator[str]:
    low, high = _edges(scene, box)
    flat = None if box.plane is None else PLANES.index(box.plane)
    sides = high - low
    if any(side < NO_SIDE for axis, side in enumerate(sides) if axis != flat):
        raise DataError(
            f"{where}: the box {_text(box.corner_mm)} to {_text(box.opposite_mm)} has no "
            f"{'volume' if flat is None else 'area'}. Give two opposite corners of the object"
            f"{', or the plane of a flat box (--plane)' if flat is None else ''}."
        )
    size = np.array(scene.shape)
    if flat is not None:
        low[flat], high[flat] = _slice_of(low, high, flat) + np.array((-0.5, 0.5))
    if (high <= -0.5 + NO_SIDE).any() or (low >= size - 0.5 - NO_SIDE).any():
        raise DataError(_outside(scene, f"{where} (box {_text(box.corner_mm)} to {_text(box.opposite_mm)})"))
    if (low < -0.5 - NO_SIDE).any() or (high > size - 0.5 + NO_SIDE).any():
        yield f"{where}: the box reaches out of the volume; what lies outside was cut off."


def _check_line(scene: Scene, prompt: Scribble | Lasso, where: str) -> Iterator[str]:
    name = prompt.kind
    inside = _inside(scene, nearest(scene.to_voxel(np.array(prompt.points_mm))))
    if isinstance(prompt, Lasso):
        flat = PLANES.index(prompt.plane)
        if _area(_flat(scene.to_voxel(np.array(prompt.points_mm)), flat)) < NO_SIDE:
            raise DataError(f"{where}: the lasso encloses nothing. Draw a closed line around the object.")
        if not lasso_region(scene, prompt).voxels:
            raise DataError(_outside(scene, f"{where} (lasso from {_text(prompt.points_mm[0])})"))
    elif not inside.any():
        raise DataError(_outside(scene, f"{where} ({name} from {_text(prompt.points_mm[0])})"))
    if not inside.all():
        yield f"{where}: the {name} reaches out of the volume; what lies outside was cut off."


def _check_mask(scene: Scene, prompt: Mask, where: str) -> None:
    if prompt.shape != scene.shape:
        raise DataError(
            f"{where}: the mask was made on a grid of {prompt.shape} voxels, the image turned to RAS has "
            f"{scene.shape}. Give a mask of this image."
        )
    if not prompt.region().voxels:
        raise DataError(f"{where}: the mask is empty. Draw it again, or leave it out.")


def beyond(
    scene: Scene, prompts: Sequence[Prompt], axis: int, limits: tuple[int, int]
) -> tuple[Prompt, int] | None:
    """Return the first prompt that points at the object outside of its limits only, and on which slice.

    What says where the object is not may lie anywhere.
    """
    for prompt in prompts:
        if not getattr(prompt, "positive", True) or isinstance(prompt, ObjectMask):
            continue
        first, last = _extent(scene, prompt, axis)
        if last < limits[0]:
            return prompt, last
        if first > limits[1]:
            return prompt, first
    return None


def _extent(scene: Scene, prompt: Prompt, axis: int) -> tuple[int, int]:
    """Return the first and last slice that a prompt touches."""
    if isinstance(prompt, Box):
        start, stop = box_voxels(scene, prompt)
        return start[axis], stop[axis] - 1
    if isinstance(prompt, Mask):
        region = prompt.region()
        return region.start[axis], region.stop[axis] - 1
    assert not isinstance(prompt, ObjectMask)
    points = (prompt.position_mm,) if isinstance(prompt, Point) else prompt.points_mm
    places = nearest(scene.to_voxel(np.array(points)))[:, axis]
    return int(places.min()), int(places.max())


def _inside(scene: Scene, voxels: FloatArray) -> BoolArray:
    return np.asarray(((voxels >= 0) & (voxels < np.array(scene.shape))).all(axis=-1))


def _outside(scene: Scene, what: str) -> str:
    corners = scene.to_world(np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in scene.shape])).reshape(3, -1).T)
    ends = f"{_text(corners.min(axis=0))} to {_text(corners.max(axis=0))}"
    return (
        f"{what} lies outside of the volume, whose world coordinates (RAS+, {scene.geometry.unit}) run from "
        f"{ends}. Check that the position is in the world and not in voxels, nor LPS."
    )


def _text(position: Sequence[float] | FloatArray) -> str:
    return "(" + ", ".join(f"{x:.1f}" for x in position) + ")"


def nearest(voxels: FloatArray) -> FloatArray:
    """Return the voxels, as whole numbers, that hold the positions."""
    # What lies on an edge belongs to the upper voxel, whichever way rounding in the affine went.
    return np.asarray(np.floor(np.asarray(voxels) + 0.5 + 1e-6))


def _edges(scene: Scene, box: Box) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest corner in voxel coordinates."""
    corners = scene.to_voxel(np.array((box.corner_mm, box.opposite_mm)))
    return corners.min(axis=0), corners.max(axis=0)


def _slice_of(low: FloatArray, high: FloatArray, axis: int) -> float:
    # A middle between two slices is on the lower one, whichever way rounding in the affine went.
    return float(np.ceil((low[axis] + high[axis]) / 2 - 0.5 - 1e-6))


def box_voxels(scene: Scene, box: Box) -> tuple[Triple, Triple]:
    """Return the half-open box of the voxels whose centres a box holds, within the volume.

    It has at least one voxel: a box inside a voxel is that voxel.
    """
    low, high = _edges(scene, box)
    if box.plane is not None:
        axis = PLANES.index(box.plane)
        low[axis] = high[axis] = _slice_of(low, high, axis)
    size = np.array(scene.shape)
    start, stop = np.ceil(low - NO_SIDE), np.floor(high + NO_SIDE) + 1
    middle = nearest((low + high) / 2)
    start = np.clip(np.where(stop > start, start, middle), 0, size - 1)
    stop = np.clip(np.where(stop > start, stop, middle + 1), start + 1, size)
    return _triple(start), _triple(stop)


def _triple(values: FloatArray) -> Triple:
    i, j, k = (int(v) for v in values)
    return i, j, k


def slice_box(scene: Scene, box: Box, axis: int) -> SliceBox:
    """Return the edges of a box on a slice across `axis`, cut to the slice."""
    low, high = _edges(scene, box)
    rows, columns = (a for a in range(3) if a != axis)
    ends = [scene.shape[a] - 0.5 for a in (rows, columns)]
    return (
        float(np.clip(low[rows], -0.5, ends[0])),
        float(np.clip(low[columns], -0.5, ends[1])),
        float(np.clip(high[rows], -0.5, ends[0])),
        float(np.clip(high[columns], -0.5, ends[1])),
    )


def limits(scene: Scene, target: Target) -> tuple[int, int] | None:
    """Return the first and last slice that the object may reach, or None if nothing says so.

    The limits of the target, else of its boxes and masks in 3D together.
    """
    last = scene.shape[target.axis] - 1
    if target.limits is not None:
        first, end = sorted(target.limits)
        return max(0, first), min(last, end)
    spans = [_span(scene, prompt, target.axis) for prompt in target.prompts]
    known = [span for span in spans if span is not None]
    return (min(a for a, _ in known), max(b for _, b in known)) if known else None


def _span(scene: Scene, prompt: Prompt, axis: int) -> tuple[int, int] | None:
    if isinstance(prompt, Box) and prompt.plane is None:
        start, stop = box_voxels(scene, prompt)
        return start[axis], stop[axis] - 1
    if isinstance(prompt, Mask) and prompt.plane is None:
        region = prompt.region()
        return (region.start[axis], region.stop[axis] - 1) if region.voxels else None
    return None


def evidence(scene: Scene, target: Target) -> Evidence:
    """Return all clicks and scribbles as points in 3D; scribbles every half voxel, joined in order."""
    points: list[FloatArray] = []
    signs: list[bool] = []
    for prompt in target.prompts:
        if isinstance(prompt, Point):
            found = scene.to_voxel(prompt.position_mm)[None]
        elif isinstance(prompt, Scribble):
            found = _along(scene.to_voxel(np.array(prompt.points_mm)))
        else:
            continue
        found = found[_inside(scene, nearest(found))]
        points.append(found)
        signs += [prompt.positive] * len(found)
    return Evidence(np.concatenate(points) if points else np.zeros((0, 3)), np.array(signs, dtype=bool))


def _along(corners: FloatArray) -> FloatArray:
    """Return one position in every voxel that a line through `corners` visits, in its order."""
    pieces = [corners[:1]]
    for a, b in pairwise(corners):
        count = max(1, int(np.ceil(2 * np.abs(b - a).max())))
        pieces.append(a + (b - a) * np.linspace(0, 1, count + 1)[1:, None])
    line = np.concatenate(pieces)
    voxels = nearest(line)
    new = np.concatenate(([True], (voxels[1:] != voxels[:-1]).any(axis=1)))
    return np.asarray(line[new])


def areas(scene: Scene, target: Target) -> tuple[Area, ...]:
    """Return what lassos and masks have marked, in order."""
    found = []
    for prompt in target.prompts:
        if isinstance(prompt, Lasso):
            axis = PLANES.index(prompt.plane)
            found.append(Area(lasso_region(scene, prompt), prompt.positive, axis, False))
        elif isinstance(prompt, Mask):
            found.append(Area(prompt.region(), True, _axis(prompt.plane), True))
    return tuple(found)


def _axis(plane: Plane | None) -> int | None:
    return None if plane is None else PLANES.index(plane)


def lasso_region(scene: Scene, lasso: Lasso) -> Region:
    """Fill a lasso on the slice that holds the middle of its points."""
    axis = PLANES.index(lasso.plane)
    voxels = scene.to_voxel(np.array(lasso.points_mm))
    index = int(_slice_of(voxels.min(axis=0), voxels.max(axis=0), axis))
    if not 0 <= index < scene.shape[axis]:
        return Region.empty(scene.shape)
    mask = fill_polygon(_flat(voxels, axis), plane_size(scene.shape, axis))
    start = [0, 0, 0]
    start[axis] = index
    return Region.at(np.expand_dims(mask, axis), (start[0], start[1], start[2]), scene.shape)


def _flat(voxels: FloatArray, axis: int) -> FloatArray:
    return np.delete(voxels, axis, axis=1)


def _area(corners: FloatArray) -> float:
    """Return the area of a polygon by the shoelace formula."""
    following = np.roll(corners, -1, axis=0)
    return float(abs((corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]).sum()) / 2)


def fill_polygon(corners: FloatArray, shape: tuple[int, int]) -> BoolArray:
    """Return the pixels whose centres a closed line encloses, by the even-odd rule, and those of the line.

    Parameters
    ----------
    corners : (n, 2) float
        (row, column); may lie outside of `shape`.
    shape : (rows, columns)

    Examples
    --------
    >>> fill_polygon(np.array([(0.0, 0.0), (0.0, 2.0), (2.0, 2.0), (2.0, 0.0)]), (3, 4)).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0]])
    """
    mask = np.zeros(shape, dtype=bool)
    following = np.roll(corners, -1, axis=0)
    columns = np.arange(shape[1])
    for row in range(shape[0]):
        crossing = (corners[:, 0] <= row) != (following[:, 0] <= row)
        a, b = corners[crossing], following[crossing]
        hits = np.sort(a[:, 1] + (row - a[:, 0]) * (b[:, 1] - a[:, 1]) / (b[:, 0] - a[:, 0]))
        mask[row] = np.searchsorted(hits, columns) % 2 == 1
    line = nearest(_along(np.concatenate((corners, corners[:1])))).astype(int)
    line = line[((line >= 0) & (line < shape)).all(axis=1)]
    mask[line[:, 0], line[:, 1]] = True
    return mask


@dataclass
class _Known:
    """What has been gathered of one slice."""

    points: list[FloatArray] = field(default_factory=list)
    positive: list[bool] = field(default_factory=list)
    boxes: list[SliceBox] = field(default_factory=list)
    mask: BoolArray | None = None

    def add(self, points: FloatArray, positive: bool) -> None:
        self.points += list(points)
        self.positive += [positive] * len(points)

    def prompts(self) -> SlicePrompts:
        logits = None if self.mask is None else np.where(self.mask, SURE, -SURE).astype(np.float32)
        box = _enclosing(self.boxes) if self.boxes else None
        if box is None and self.mask is not None:
            box = mask_box(self.mask)
        points = np.array(self.points).reshape(-1, 2)
        return SlicePrompts(points, np.array(self.positive, dtype=bool), box, logits)


def anchors(scene: Scene, target: Target) -> dict[int, SlicePrompts]:
    """Return what is known on each prompted slice across the axis of the target, in order of the slices.

    - A click is on the slice that holds it, whatever plane it was made on.
    - A box in 3D is on its middle slice; a flat one on its slice, and a box on another plane gives a click in
      its middle. Several boxes on a slice are enclosed by one.
    - A scribble gives up to 8 clicks on each slice that it visits.
    - A lasso or mask gives its mask, as logits, and the box around it; one on another plane, and one around
      what is not the object, gives clicks where it is deepest.
    """
    known: dict[int, _Known] = {}
    for prompt in target.prompts:
        _gather(scene, prompt, target.axis, known)
    return {index: known[index].prompts() for index in sorted(known)}


def boxes(scene: Scene, target: Target) -> dict[int, tuple[SliceBox, ...]]:
    """Return every box of each prompted slice, where the two islands of an object were boxed one by one."""
    known: dict[int, _Known] = {}
    for prompt in target.prompts:
        if isinstance(prompt, Box):
            _gather_box(scene, prompt, target.axis, known)
    return {index: tuple(found.boxes) for index, found in sorted(known.items()) if found.boxes}


def _gather(scene: Scene, prompt: Prompt, axis: int, known: dict[int, _Known]) -> None:
    if isinstance(prompt, Point):
        _spread(scene.to_voxel(prompt.position_mm)[None], prompt.positive, axis, known)
    elif isinstance(prompt, Box):
        _gather_box(scene, prompt, axis, known)
    elif isinstance(prompt, Scribble):
        line = _along(scene.to_voxel(np.array(prompt.points_mm)))
        _spread(line[_inside(scene, nearest(line))], prompt.positive, axis, known)
    elif isinstance(prompt, Lasso):
        area = Area(lasso_region(scene, prompt), prompt.positive, PLANES.index(prompt.plane), False)
        _gather_area(area, axis, known)
    elif isinstance(prompt, Mask):
        _gather_area(Area(prompt.region(), True, _axis(prompt.plane), True), axis, known)


def _spread(points: FloatArray, positive: bool, axis: int, known: dict[int, _Known]) -> None:
    """Give each slice its points, thinned evenly."""
    slices = nearest(points[:, axis]).astype(int)
    for index in np.unique(slices):
        mine = _flat(points[slices == index], axis)
        chosen = np.unique(np.linspace(0, len(mine) - 1, POINTS_A_SLICE).round().astype(int))
        known.setdefault(int(index), _Known()).add(mine[chosen], positive)


def _gather_box(scene: Scene, box: Box, axis: int, known: dict[int, _Known]) -> None:
    start, stop = box_voxels(scene, box)
    # LiteMedSAM's middle: ``z_min + int((z_max - z_min) / 2)``, both ends included.
    middle = start[axis] + (stop[axis] - 1 - start[axis]) // 2
    if box.plane is None or PLANES.index(box.plane) == axis:
        known.setdefault(middle, _Known()).boxes.append(slice_box(scene, box, axis))
    else:
        centre = (np.array(start) + np.array(stop) - 1) / 2
        known.setdefault(middle, _Known()).add(_flat(centre[None], axis), True)


def _gather_area(area: Area, axis: int, known: dict[int, _Known]) -> None:
    region = area.region
    for index in range(region.start[axis], region.stop[axis]):
        mask = region.plane(axis, index)
        if not mask.any():
            continue
        slot = known.setdefault(index, _Known())
        if area.positive and area.axis in (None, axis):
            # A newer mask of the voxels replaces the older one; lassos around islands add up.
            slot.mask = mask if area.exact or slot.mask is None else slot.mask | mask
        else:
            if slot.mask is not None and area.axis == axis:
                slot.mask &= ~mask
            slot.add(deepest(mask, 2), area.positive)


def deepest(mask: BoolArray, most: int) -> FloatArray:
    """Return up to `most` pixels (row, column) of a mask, far from its edge and from each other.

    The first is the deepest; each next one is the deepest of those that no disc of an earlier one's depth
    covers (micro-sam takes local maxima of the smoothed distance transform; this needs no smoothing).
    """
    depth = _depth(mask)
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    found: list[tuple[float, float]] = []
    while len(found) < most and depth.max() > 0:
        row, column = divmod(int(depth.argmax()), mask.shape[1])
        found.append((float(row), float(column)))
        covered = (rows - row) ** 2 + (columns - column) ** 2 <= max(1.0, float(depth[row, column])) ** 2
        depth[covered] = 0
    return np.array(found).reshape(-1, 2)


def _depth(mask: BoolArray) -> FloatArray:
    """Return the distance of each pixel to the edge of the mask; that of a straight line, to its ends."""
    from scipy.ndimage import distance_transform_edt

    depth = np.zeros(mask.shape)
    if mask.any():
        box = tuple(slice(a, b) for a, b in bounding_box(mask))
        frame = [(1, 1) if b.stop - b.start > 1 else (0, 0) for b in box]
        inner = tuple(slice(a, a + b.stop - b.start) for (a, _), b in zip(frame, box, strict=True))
        framed = np.pad(mask[box], frame)
        depth[box] = 1.0 if framed.all() else distance_transform_edt(framed)[inner]
    return depth


def mask_box(mask: BoolArray) -> SliceBox:
    """Return the edges of the box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0] - 0.5, columns[0] - 0.5, rows[-1] + 0.5, columns[-1] + 0.5


def _enclosing(found: Sequence[SliceBox]) -> SliceBox:
    low, high = np.array(found)[:, :2].min(axis=0), np.array(found)[:, 2:].max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
