"""A picture of objects on their image: exact outlines, a colour for each, for the eye to judge.

A picture is shown whole. Of a volume there are three planes, each where most objects lie, and below them
slices from the first object to the last. Anatomy (mm) is in the radiologist's view: the patient's right on
the left, front or head up; microscopy is as its array lies, i to the right and j or k down.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import GeometryError
from medseg.files import atomic_path
from medseg.geometry.orient import to_ras
from medseg.instances.panoptic import Panoptic
from medseg.instances.schema import Instances
from medseg.io.grids import grid_difference
from medseg.metrics.report import PALETTE
from medseg.types import Array, FloatArray, IntArray, PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels: a small picture is enlarged to the first, a large one is thinned out to the second.
_SMALL, _LARGE = 900, 4000
_PLANE, _GAP, _HEAD = 520, 8, 30
_COLUMNS, _ROWS = 6, 2
_GROUND, _INK, _MUTED = (17, 21, 27), (242, 245, 248), (154, 167, 181)
# Part of the values that may be darker than black or brighter than white.
_CLIPPED = (0.5, 99.5)
# Successive hues are a golden angle apart, so that neighbours in number differ.
_GOLDEN = 0.618033988749895
# Opacity of things and stuff, shades of the objects of a class, and the legend below the picture in pixels.
_THING, _STUFF = 0.4, 0.22
_SHADES = (0.0, 0.35, 0.18)
_LINE, _SWATCH = 28, 13
_NAMES = ("sagittal", "coronal", "axial")
_EDGES = (("A", "P", "S", "I"), ("R", "L", "S", "I"), ("R", "L", "A", "P"))


@dataclass(frozen=True, eq=False)
class _Shown:
    """What is drawn: grey values in 0..1 or RGB, labels, spacing, and whether it is anatomy."""

    image: FloatArray
    labels: IntArray
    spacing: tuple[float, ...]
    anatomy: bool
    paint: "Paint | None" = None

    @property
    def focus(self) -> IntArray:
        """What the slices are chosen by: objects, or all that is painted if there are none."""
        if self.paint is None:
            return self.labels
        objects = np.where(self.labels <= self.paint.objects, self.labels, 0)
        return objects if objects.any() else self.labels


@dataclass(frozen=True, eq=False)
class Paint:
    """How labels are painted.

    Attributes
    ----------
    colours : (K + 1, 3) uint8
    opacity : (K + 1,) float
        Of the inside of each; the line around it is opaque.
    objects : int
        Labels up to this one are objects, the others areas.
    """

    colours: IntArray
    opacity: FloatArray
    objects: int


def write_overlay(instances: Instances, image: Volume, path: PathLike, title: str = "") -> None:
    """Draw the outlines of all objects on their image and write a PNG.

    Parameters
    ----------
    instances : Instances
    image : Volume
        On the same grid. Three channels of uint8 are colours; else the first channel is shown, from its 0.5
        to its 99.5 percentile.
    path : file
    title : of the picture

    Raises
    ------
    GeometryError
        The image is on another grid.
    """
    count = f"{len(instances)} object{'' if len(instances) == 1 else 's'}"
    _save(instances.volume, image, path, f"{title}  ·  {count}" if title else count)


def write_panoptic_overlay(panoptic: Panoptic, image: Volume | None, path: PathLike, title: str = "") -> None:
    """Paint things and stuff over their image and write a PNG with a legend.

    A class has one colour, the objects of a class shades of it. Without an image the ground is black.

    Raises
    ------
    GeometryError
        The image is on another grid.
    """
    instances, classes = panoptic.instances, panoptic.classes
    count = len(instances)
    named = (*classes.things, *classes.stuff)  # things first: they get the colours that stand out
    kinds = dict(zip(named, _class_colours(len(named)), strict=True))
    stuff = list(panoptic.stuff_voxels())
    table = np.zeros(max(classes.labels.values(), default=0) + 1, np.int32)
    table[[classes.labels[name] for name in stuff]] = count + 1 + np.arange(len(stuff))
    objects = instances.volume.array
    labels = np.where(objects > 0, objects, table[panoptic.semantic.array])
    shades = [_shade(kinds[classes.names[int(v)]], n) for n, v in enumerate(instances.classes)]
    colours = np.array([(0, 0, 0), *shades, *(kinds[name] for name in stuff)], np.uint8)
    opacity = np.concatenate([[0.0], np.full(count, _THING), np.full(len(stuff), _STUFF)])
    things = [(name, int((instances.classes == classes.labels[name]).sum())) for name in classes.things]
    legend = [(f"{n} {name}", kinds[name]) for name, n in things] + [(name, kinds[name]) for name in stuff]
    ground = image if image is not None else panoptic.semantic.with_array(np.zeros_like(objects))
    paint = Paint(colours, opacity, count)
    _save(panoptic.semantic.with_array(labels), ground, path, title, paint, legend)


def _save(
    labels: Volume,
    image: Volume,
    path: PathLike,
    title: str,
    paint: Paint | None = None,
    legend: Sequence[tuple[str, IntArray]] = (),
) -> None:
    if not labels.geometry.matches(image.geometry):
        difference = grid_difference(labels.geometry, image.geometry, "the objects") or "its place differs"
        raise GeometryError(f"image: {difference}. Resample it onto the grid of the objects.")
    shown = _prepare(labels, image, paint)
    body = _picture(shown) if labels.shape[2] == 1 else _volume(shown)
    sheet = _titled(body, title, legend)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def colours_of(count: int) -> IntArray:
    """Return (K + 1, 3) uint8: a bright colour for each object, black for background."""
    hues = np.arange(count) * _GOLDEN % 1.0
    bright = [colorsys.hsv_to_rgb(hue, 0.45 + 0.3 * (n % 2), 1.0) for n, hue in enumerate(hues.tolist())]
    return np.round(np.array([(0.0, 0.0, 0.0), *bright]) * 255).astype(np.uint8)


def _class_colours(count: int) -> IntArray:
    """Return (n, 3) uint8: colours that stay apart for colour-blind eyes, then hues a golden angle apart."""
    known = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in PALETTE]
    return np.array([*known, *colours_of(max(0, count - len(known)))[1:]], np.uint8)[:count]


def _shade(colour: IntArray, number: int) -> IntArray:
    """Return a lighter colour of the same hue, so that neighbours in number differ."""
    return np.round(colour + (255 - colour) * _SHADES[number % len(_SHADES)]).astype(np.uint8)


def draw_outlines(image: FloatArray, labels: IntArray, zoom: int = 1, paint: Paint | None = None) -> IntArray:
    """Return (rows, columns, 3) uint8: an image with a line along the inside of each object's edge.

    Parameters
    ----------
    image : (rows, columns) or (rows, columns, 3)
        In 0..1.
    labels : (rows, columns) int
    zoom : int
        Pixels of the result for each pixel, whose line is one pixel of the result wide (two from zoom 4 on).
    paint : Paint, optional
        Other colours than those of :func:`colours_of`, and how opaque the inside is.
    """
    large = np.kron(labels, np.ones((zoom, zoom), labels.dtype)) if zoom > 1 else labels
    grey = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    picture = np.round(np.repeat(np.repeat(grey, zoom, axis=0), zoom, axis=1) * 255).astype(np.uint8)
    edge = np.zeros(large.shape, bool)
    for width in range(1, 3 if zoom >= 4 else 2):
        padded = np.pad(large, width, mode="edge")
        for axis in range(2):
            for shift in (-width, width):
                moved = np.roll(padded, shift, axis=axis)[width:-width, width:-width]
                edge |= moved != large
    edge &= large > 0
    colours = colours_of(int(labels.max(initial=0))) if paint is None else paint.colours
    if paint is not None:
        part = paint.opacity[large][..., None]
        picture = np.round(picture * (1 - part) + colours[large] * part).astype(np.uint8)
    picture[edge] = colours[large[edge]]
    return picture


def _prepare(labels: Volume, image: Volume, paint: Paint | None) -> _Shown:
    anatomy = labels.shape[2] > 1 and labels.geometry.unit == "mm"
    colour = image.channels == 3 and image.array.dtype == np.uint8
    channels = image if colour else Volume(image.array[:1], image.geometry)
    both = [to_ras(each) for each in (channels, labels)] if anatomy else [channels, labels]
    grey = both[0].array
    values = grey.transpose(1, 2, 3, 0) / 255.0 if colour else _window(grey[0])
    return _Shown(values, both[1].array[0], both[1].geometry.spacing, anatomy, paint)


def _window(values: Array) -> FloatArray:
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return np.zeros(values.shape, np.float32)
    low, high = np.percentile(finite[:: max(1, finite.size // 2_000_000)], _CLIPPED)
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) / max(high - low, 1e-12)
    return np.asarray(np.clip(scaled, 0.0, 1.0))


def _picture(shown: _Shown) -> IntArray:
    image, labels = shown.image[:, :, 0].swapaxes(0, 1), shown.labels[:, :, 0].T
    step = max(1, -(-max(labels.shape) // _LARGE))
    zoom = max(1, _SMALL // max(labels.shape))
    return draw_outlines(image[::step, ::step], labels[::step, ::step], zoom, shown.paint)


def _volume(shown: _Shown) -> IntArray:
    """Return three planes over a strip of slices."""
    planes = [
        _panel(shown, axis, _fullest(shown.focus, axis), _PLANE, letters=shown.anatomy) for axis in (2, 1, 0)
    ]
    width = 3 * _PLANE + 2 * _GAP
    cell = (width - (_COLUMNS - 1) * _GAP) // _COLUMNS
    rows = [_row(planes)]
    slices = _slices(shown.focus)
    for start in range(0, len(slices), _COLUMNS):
        chosen = slices[start : start + _COLUMNS]
        row = _row([_panel(shown, 2, index, cell, letters=False) for index in chosen])
        rows.append(np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))))
    for row in rows:
        row[(row == 0).all(axis=2)] = _GROUND
    gap = np.full((_GAP, width, 3), _GROUND, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1])


def _row(panels: list[IntArray]) -> IntArray:
    gap = np.full((panels[0].shape[0], _GAP, 3), _GROUND, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def _fullest(labels: IntArray, axis: int) -> int:
    """Return the slice that crosses most objects' voxels; the middle one if there are none."""
    others = tuple(a for a in range(3) if a != axis)
    area = np.count_nonzero(labels, axis=others)
    return int(np.argmax(area)) if area.any() else labels.shape[axis] // 2


def _slices(labels: IntArray) -> list[int]:
    hit = np.flatnonzero(labels.any(axis=(0, 1)))
    low, high = (int(hit[0]), int(hit[-1])) if hit.size else (0, labels.shape[2] - 1)
    count = min(_COLUMNS * _ROWS, high - low + 1)
    return sorted({round(float(index)) for index in np.linspace(low, high, count)})


def _panel(shown: _Shown, axis: int, index: int, side: int, letters: bool) -> IntArray:
    """Return a square picture of one slice, in the aspect of the body, with its name and index."""
    across, down = (a for a in range(3) if a != axis)
    image: FloatArray = np.swapaxes(shown.image.take(index, axis), 0, 1)
    labels: IntArray = np.transpose(shown.labels.take(index, axis))
    if shown.anatomy:
        image, labels = image[::-1, ::-1], labels[::-1, ::-1]
    size = np.array([labels.shape[0] * shown.spacing[down], labels.shape[1] * shown.spacing[across]])
    height, width = (max(1, int(n)) for n in np.round(size * (side / size.max())))
    rows = np.minimum((np.arange(height) + 0.5) * labels.shape[0] / height, labels.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * labels.shape[1] / width, labels.shape[1] - 1).astype(int)
    place = np.ix_(rows, columns)
    drawn = draw_outlines(image[place], labels[place], paint=shown.paint)
    panel = np.full((side, side, 3), (1, 1, 1), np.uint8)  # not quite the black that is filled between rows
    top, left = (side - height) // 2, (side - width) // 2
    panel[top : top + height, left : left + width] = np.maximum(drawn, 1)
    name = f"{_NAMES[axis] if shown.anatomy else 'ijk'[axis]} {index}"
    return _lettered(panel, name, _EDGES[axis] if letters else ())


def _lettered(panel: IntArray, name: str, edges: tuple[str, ...]) -> IntArray:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(panel)
    draw, side = ImageDraw.Draw(picture), panel.shape[0]
    font = font_of(15 if side == _PLANE else 12)
    places = (
        (8, side // 2, "lm"),
        (side - 8, side // 2, "rm"),
        (side // 2, 6, "mt"),
        (side // 2, side - 6, "mb"),
    )
    draw.text((6, 5), name, fill=_INK, font=font, stroke_width=2, stroke_fill=_GROUND)
    for letter, (x, y, anchor) in zip(edges, places, strict=False):
        draw.text((x, y), letter, fill=_INK, font=font, anchor=anchor, stroke_width=2, stroke_fill=_GROUND)
    return np.asarray(picture).copy()


def _titled(body: IntArray, title: str, legend: Sequence[tuple[str, IntArray]] = ()) -> "Image":
    from PIL import Image, ImageDraw

    width = max(body.shape[1], 240)
    font = font_of(15)
    lines = _legend_lines(legend, width, font)
    sheet = np.full((body.shape[0] + _HEAD + _LINE * len(lines), width, 3), _GROUND, np.uint8)
    sheet[_HEAD : _HEAD + body.shape[0], : body.shape[1]] = body
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), title, fill=_MUTED, font=font)
    for row, line in enumerate(lines):
        top = _HEAD + body.shape[0] + row * _LINE
        for left, text, colour in line:
            fill = tuple(int(v) for v in colour)
            draw.rectangle((left, top + 8, left + _SWATCH, top + 8 + _SWATCH), fill=fill)
            draw.text((left + _SWATCH + 7, top + 6), text, fill=_INK, font=font)
    return picture


def _legend_lines(
    legend: Sequence[tuple[str, IntArray]], width: int, font: Any
) -> list[list[tuple[int, str, IntArray]]]:
    """Return lines of (left, text, colour) that fit in the width."""
    lines: list[list[tuple[int, str, IntArray]]] = []
    left = width
    for text, colour in legend:
        needed = _SWATCH + 7 + int(font.getlength(text)) + 22
        if left + needed > width or not lines:
            lines.append([])
            left = 8
        lines[-1].append((left, text, colour))
        left += needed
    return lines


def font_of(size: int) -> Any:
    """Return a font that has arrows and superscripts: the one that comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
