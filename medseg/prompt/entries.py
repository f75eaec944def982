"""Prompts as people write them: numbers on a command line or in YAML, made into prompts in the world.

Coordinates are world millimetres (RAS+: to the patient's right, front and head grow x, y and z), or, where
that is said, indices of the voxels of the file's own array, from 0. A box of voxels names the first and the
last voxel, both included; a box in mm names two opposite corners. A box, lasso or scribble whose positions
agree along exactly one axis is flat: it lies on a slice, and nobody has to name the plane.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from medseg.config import Config
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.geometry.orient import to_ras
from medseg.io import read
from medseg.io.grids import grid_difference
from medseg.prompt.prompts import (
    PLANES,
    Box,
    Lasso,
    Mask,
    ObjectMask,
    Plane,
    Point,
    Position,
    Prompt,
    Scribble,
)
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.session import PromptSession, choose_axis
from medseg.prompt.state import Name
from medseg.types import FloatArray

Corners = tuple[float, float, float, float, float, float]


def check_axis(axis: int | str) -> int | str:
    """Return a plane, or the number of an axis of the file, or refuse it (ValueError)."""
    if axis not in (*PLANES, 0, 1, 2):
        raise ValueError(f"axis {axis!r}: use axial, coronal, sagittal, or 0, 1, 2 of the file's own array.")
    return axis


Axis = Annotated[int | str, AfterValidator(check_axis)]
Unit = Literal["mm", "voxel"]

# What a prompt may be, in the order in which the command line shows them.
SHAPES = (
    *("box", "point", "not_point", "scribble", "not_scribble"),
    *("lasso", "not_lasso", "mask", "like"),
)
# Positions nearer than this, in mm or voxels, are equal: what is typed has few digits.
_SAME = 1e-3


class PromptEntry(Config):
    """One prompt: exactly one of these keys, and the plane where it has to be said.

    Attributes
    ----------
    box : six numbers
        Two opposite corners. Flat: on a slice, and the object is looked for in both directions. Else in 3D,
        and the object does not leave it along the slices.
    point, not_point : three numbers
        A click inside the object, or outside of it.
    scribble, not_scribble : positions
        A line through the object, or through what is not the object.
    lasso, not_lasso : positions on one slice
        A closed line around the object, or around what is not the object.
    mask : path
        A label map on the grid of the image; ``FILE:VALUE`` takes one value, else all but 0.
    like : name
        The mask of another object of the session.
    plane : ``axial``, ``coronal`` or ``sagittal``
        Of the slice of a box or line that is not flat along one axis (an oblique volume in mm), and of the
        slice on which a click was made.
    """

    box: Corners | None = None
    point: Position | None = None
    not_point: Position | None = None
    scribble: Annotated[tuple[Position, ...], Field(min_length=1)] | None = None
    not_scribble: Annotated[tuple[Position, ...], Field(min_length=1)] | None = None
    lasso: Annotated[tuple[Position, ...], Field(min_length=3)] | None = None
    not_lasso: Annotated[tuple[Position, ...], Field(min_length=3)] | None = None
    mask: str | None = None
    like: str | None = None
    plane: Plane | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in SHAPES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a prompt is one of {', '.join(SHAPES)}, found {' and '.join(given) or 'none of them'}"
            )
        return self

    @property
    def shape(self) -> str:
        """Which of the keys is given."""
        return next(name for name in SHAPES if getattr(self, name) is not None)


class ObjectEntry(Config):
    """What is said about one object.

    Attributes
    ----------
    name : str
    prompts : at least one
    axis : plane, or 0, 1, 2
        Across which slices are taken; a number is an axis of the file's own array.
    range : two numbers
        First and last slice that the object may reach: mm along the axis, or voxel indices.
    """

    name: Name = "object"
    prompts: Annotated[tuple[PromptEntry, ...], Field(min_length=1)]
    axis: Axis | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """An object as a session takes it."""

    name: str
    prompts: tuple[Prompt, ...]
    axis: int | None
    limits: tuple[int, int] | None


def parse_numbers(text: str, what: str, count: int | None = None) -> tuple[float, ...]:
    """Return the numbers of a text, separated by commas, semicolons or spaces.

    Raises
    ------
    ConfigError
        Something else is there, or another number of them.

    >>> parse_numbers("-10, 4.5 7", "--point", 3)
    (-10.0, 4.5, 7.0)
    """
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError:
        numbers = (float("nan"),)
    if not np.isfinite(numbers).all() or not numbers:
        raise ConfigError(f"{what} {text[:60]!r}: expected numbers such as 12.5,-30,48.")
    if count is not None and len(numbers) != count:
        raise ConfigError(f"{what} {text[:60]!r}: expected {count} numbers, found {len(numbers)}.")
    return numbers


def parse_positions(text: str, what: str) -> tuple[tuple[float, ...], ...]:
    """Return positions ``X,Y,Z X,Y,Z ...``.

    Raises
    ------
    ConfigError
        The numbers are no triples.
    """
    numbers = parse_numbers(text, what)
    if len(numbers) % 3:
        raise ConfigError(
            f"{what} {text[:60]!r}: expected three numbers a position, found {len(numbers)} in all."
        )
    return tuple(numbers[n : n + 3] for n in range(0, len(numbers), 3))


def prepare(
    session: PromptSession, objects: Sequence[ObjectEntry], unit: Unit = "mm", folder: Path | None = None
) -> list[Request]:
    """Make requests of what was written, and refuse what cannot be meant, before anything is computed.

    Parameters
    ----------
    session : of the image
    objects : what was written
    unit : of its coordinates
    folder : where the paths of masks begin; None: where the process is

    Raises
    ------
    DataError
        A prompt lies outside the image, has no area, or names an object that is not there.
    GeometryError
        A mask lies on another grid.
    ReadError
        A mask cannot be read.
    """
    from medseg.prompt.rasterise import check_prompts

    grid = Grid(session.scene, unit, folder or Path())
    known = list(session.objects)
    requests = []
    for entry in objects:
        request = grid.request(entry, session)
        check_prompts(session.scene, [each for each in request.prompts if not isinstance(each, ObjectMask)])
        grid.check_reach(request, session)
        for each in request.prompts:
            if isinstance(each, ObjectMask) and each.object not in known:
                raise DataError(
                    f"object {entry.name!r} is like {each.object!r}, which is not there; there are: "
                    f"{', '.join(known) or 'none yet'}. Name it, or point at it first."
                )
        known.append(entry.name)
        requests.append(request)
    return requests


@dataclass(frozen=True, eq=False)
class Grid:
    """What numbers mean: positions in the world, or in the array of the file.

    Attributes
    ----------
    scene : of the image
    unit : of the numbers
    folder : where the paths of masks begin
    """

    scene: Scene
    unit: Unit = "mm"
    folder: Path = Path()

    def request(self, entry: ObjectEntry, session: PromptSession) -> Request:
        """Make a request of what was written about one object."""
        prompts = tuple(self.prompt(each) for each in entry.prompts)
        axis = None if entry.axis is None else self.axis(entry.axis)
        limits = None
        if entry.range is not None:
            axis = self.axis_of(entry.name, prompts, session) if axis is None else axis
            limits = self.limits(entry.range, axis, prompts)
        return Request(entry.name, prompts, axis, limits)

    def prompt(self, entry: PromptEntry) -> Prompt:
        """Make one prompt."""
        if self.unit == "voxel" and entry.mask is None and entry.like is None:
            self.check_voxels(entry)
        if entry.box is not None:
            return self.box(entry.box, entry.plane)
        if entry.mask is not None:
            return self.mask(entry.mask, entry.plane)
        if entry.like is not None:
            return ObjectMask(object=entry.like)
        positive = not entry.shape.startswith("not_")
        if entry.shape.endswith("point"):
            (position,) = self.world([getattr(entry, entry.shape)])
            return Point(position_mm=position, positive=positive, plane=entry.plane)
        written = getattr(entry, entry.shape)
        plane = entry.plane or self.flat(np.array(written))
        points = tuple(self.world(written))
        if entry.shape.endswith("scribble"):
            return Scribble(points_mm=points, positive=positive, plane=plane)
        if plane is None:
            raise DataError(
                "the lasso does not lie on one slice: its positions agree along no axis. Say its plane "
                "(axial, coronal or sagittal)."
            )
        return Lasso(points_mm=points, positive=positive, plane=plane)

    def box(self, corners: Corners, plane: Plane | None) -> Box:
        """Make a box of two corners."""
        both = np.array(corners).reshape(2, 3)
        plane = plane or self.flat(both)
        if self.unit == "voxel":
            if np.abs(both[0] - both[1]).max() < _SAME:
                raise DataError(
                    f"the box from voxel {_text(both[0])} to itself has no area. Give two opposite corners."
                )
            both = np.array((both.min(axis=0) - 0.5, both.max(axis=0) + 0.5))
        first, last = self.world(both)
        return Box(corner_mm=first, opposite_mm=last, plane=plane)

    def check_voxels(self, entry: PromptEntry) -> None:
        """Refuse voxels that the file does not have, in the numbers of its user."""
        places = np.array(getattr(entry, entry.shape)).reshape(-1, 3)
        low, high = np.floor(places.min(axis=0) + 0.5), np.floor(places.max(axis=0) + 0.5)
        shape = self.scene.source.shape
        if (high < 0).any() or (low >= shape).any():
            shown = " to ".join(_text(place) for place in places[:2])
            raise DataError(
                f"the {entry.shape.replace('_', '-')} {shown} lies outside of the volume of "
                f"{' x '.join(map(str, shape))} voxels, counted from 0. Check the order of the numbers; "
                "if they are mm in the world, leave --voxel out (coordinates: mm)."
            )

    def mask(self, text: str, plane: Plane | None) -> Mask:
        """Read a mask."""
        path, value = split_value(text, self.folder)
        volume = read(path)
        difference = grid_difference(self.scene.source, volume.geometry, "the image")
        if volume.channels != 1 or difference:
            why = difference or f"it has {volume.channels} channels"
            raise GeometryError(f"{path}: {why}. Give a mask on the grid of the image.")
        array = to_ras(volume).array[0]
        region = Region.of(np.asarray(array != 0 if value is None else array == value))
        if not region.voxels:
            what = "no voxel but 0" if value is None else f"no voxel of value {value}"
            raise DataError(f"{path}: has {what}. Check the file and the value.")
        return Mask.of(region, plane or self.flat_region(region))

    def world(self, positions: Sequence[Position] | FloatArray) -> Iterator[Position]:
        """Yield positions in the world."""
        points = np.asarray(positions, dtype=np.float64)
        if self.unit == "voxel":
            affine = self.scene.source.affine
            points = points @ affine[:3, :3].T + affine[:3, 3]
        yield from ((x, y, z) for x, y, z in points.tolist())

    def spoken(self, position: Position) -> tuple[float, ...]:
        """Return a position in the world as its user would write it: to 0.1 mm, or the nearest voxel."""
        if self.unit == "mm":
            return tuple(round(x, 1) for x in position)
        inverse = np.linalg.inv(self.scene.source.affine)
        return tuple(float(round(x)) for x in inverse[:3, :3] @ np.array(position) + inverse[:3, 3])

    def flat(self, positions: FloatArray) -> Plane | None:
        """Return the plane of positions that agree along exactly one axis, else None."""
        same = np.flatnonzero(np.ptp(positions, axis=0) < _SAME)
        if len(same) != 1:
            return None
        axis = int(same[0])
        return PLANES[self.turned(axis) if self.unit == "voxel" else axis]

    def flat_region(self, region: Region) -> Plane | None:
        """Return the plane of a mask that is one slice of a thicker volume, else None."""
        sizes = zip(region.array.shape, region.shape, strict=True)
        thin = [axis for axis, (size, whole) in enumerate(sizes) if size == 1 < whole]
        return PLANES[thin[0]] if len(thin) == 1 else None

    def axis(self, axis: Axis) -> int:
        """Return an axis of the turned grid."""
        return self.turned(axis) if isinstance(axis, int) else [str(plane) for plane in PLANES].index(axis)

    def axis_of(self, name: str, prompts: Sequence[Prompt], session: PromptSession) -> int:
        """Return the axis across which slices of an object are taken if nobody says it."""
        known = session.state.find(name).axis if name in session.objects else None
        return choose_axis(self.scene, prompts) if known is None else known

    def check_reach(self, request: Request, session: PromptSession) -> None:
        """Refuse a prompt outside of the slices that its object may reach, in the numbers of its user."""
        from medseg.prompt.rasterise import beyond

        known = session.state.find(request.name) if request.name in session.objects else None
        limits = request.limits or (None if known is None else known.limits)
        if limits is None:
            return
        axis = request.axis
        if axis is None:
            axis = self.axis_of(request.name, request.prompts, session)
        lost = beyond(self.scene, request.prompts, axis, limits)
        if lost is not None:
            prompt, place = lost
            at, *ends = (self.slice(n, axis, request.prompts) for n in (place, *limits))
            raise DataError(
                f"object {request.name!r}: the {prompt.kind} lies on {PLANES[axis]} slice {at:g} "
                f"({self.unit}), outside of the range {min(ends):g},{max(ends):g}. Give a range that holds "
                "every prompt (--z-range FIRST,LAST), or move the prompt."
            )

    def slice(self, index: int, axis: int, prompts: Sequence[Prompt]) -> float:
        """Return a slice across an axis of the turned grid as its user would write it."""
        place = self.scene.to_voxel(_middle(self.scene, prompts))
        place[axis] = index
        x, y, z = self.scene.to_world(place)
        across = axis if self.unit == "mm" else int(np.argmax(np.abs(self.matrix[axis, :3])))
        return self.spoken((float(x), float(y), float(z)))[across]

    def turned(self, axis: int) -> int:
        """Return the axis of the turned grid that runs along an axis of the file."""
        return int(np.argmax(np.abs(self.matrix[:3, axis])))

    @property
    def matrix(self) -> FloatArray:
        """From voxels of the file to voxels of the turned grid."""
        return np.asarray(np.linalg.solve(self.scene.geometry.affine, self.scene.source.affine))

    def limits(self, ends: tuple[float, float], axis: int, prompts: Sequence[Prompt] = ()) -> tuple[int, int]:
        """Return first and last slice across an axis of the turned grid; the ends may come in any order."""
        size = self.scene.shape[axis]
        if self.unit == "voxel":
            across = int(np.argmax(np.abs(self.matrix[axis, :3])))
            places = self.matrix[axis, across] * np.array(ends) + self.matrix[axis, 3]
        else:
            points = np.tile(_middle(self.scene, prompts), (2, 1))
            points[:, axis] = ends
            places = self.scene.to_voxel(points)[:, axis]
        first, last = (int(place) for place in np.sort(np.floor(places + 0.5 + 1e-6)))
        if last < 0 or first >= size:
            raise DataError(
                f"the range {_text(ends)} ({self.unit}) lies outside of the {size} {PLANES[axis]} slices. "
                "Give first and last slice of the object."
            )
        return max(0, first), min(size - 1, last)


def _middle(scene: Scene, prompts: Sequence[Prompt]) -> FloatArray:
    """Return a position amid the prompts: in an oblique volume, a height in mm is a slice only there."""
    found: list[Position] = []
    for prompt in prompts:
        if isinstance(prompt, Point):
            found.append(prompt.position_mm)
        elif isinstance(prompt, Box):
            found += [prompt.corner_mm, prompt.opposite_mm]
        elif isinstance(prompt, Scribble | Lasso):
            found += prompt.points_mm
    if not found:
        return scene.to_world((np.array(scene.shape) - 1) / 2)
    return np.asarray(np.mean(found, axis=0))


def split_value(text: str, folder: Path) -> tuple[Path, int | None]:
    """Return path and value of a mask, ``FILE`` or ``FILE:VALUE``; relative paths begin at `folder`."""
    match = re.fullmatch(r"(.+):(\d{1,9})", text)
    if match and not (folder / text).exists():
        return folder / match[1], int(match[2])
    return folder / text, None


def _text(values: Sequence[float] | FloatArray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def parse_objects(objects: Mapping[str, object] | Sequence[object]) -> list[object]:
    """Return entries of objects that may be written as ``NAME: [prompts]`` or ``NAME: {prompts, axis}``."""
    if not isinstance(objects, Mapping):
        return list(objects)
    return [
        {"name": name, **value} if isinstance(value, Mapping) else {"name": name, "prompts": value}
        for name, value in objects.items()
    ]
