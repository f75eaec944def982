"""A picture of things and stuff on their image: classes tinted, objects outlined, a legend below."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg.errors import GeometryError
from medseg.files import atomic_path
from medseg.instances.export.overlay import colours_of, font_of, write_overlay
from medseg.instances.panoptic import Panoptic
from medseg.io.grids import grid_difference
from medseg.metrics.report import PALETTE
from medseg.types import Array, FloatArray, IntArray, PathLike
from medseg.volume import Volume

# How much of the colour of a class is mixed in.
_THING, _STUFF = 0.45, 0.28
# Of the values of an image, what becomes black and white, as in `overlay`.
_CLIPPED = (0.5, 99.5)
_SAMPLED = 2_000_000
# Pixels: a line of the legend, a swatch, what is between a swatch and its name, and between two of them.
_LINE, _SWATCH, _NEAR, _FAR = 28, 13, 7, 22
_GROUND, _INK = (17, 21, 27), (242, 245, 248)

Entry = tuple[str, tuple[int, ...]]


def write_panoptic_overlay(panoptic: Panoptic, image: Volume | None, path: PathLike, title: str = "") -> None:
    """Tint each class in its colour, draw the outline of each object, and write a PNG with a legend.

    Parameters
    ----------
    panoptic : Panoptic
    image : Volume, optional
        On the same grid, shown as by :func:`write_overlay`. Without one the ground is black.
    path : file
    title : of the picture

    Raises
    ------
    GeometryError
        The image is on another grid.
    """
    classes = panoptic.classes
    named = (*classes.things, *classes.stuff)  # things first: they get the colours that stand out
    colours = dict(zip(named, _colours(len(named)), strict=True))
    table = np.zeros((max(classes.labels.values(), default=0) + 1, 4), np.float32)
    for name, colour in colours.items():
        table[classes.labels[name]] = (*colour, _THING if name in classes.things else _STUFF)
    tinted = _tinted(panoptic.semantic, image, table)
    counts = {
        name: int((panoptic.instances.classes == classes.labels[name]).sum()) for name in classes.things
    }
    legend = [(f"{count} {name}", colours[name]) for name, count in counts.items()]
    legend += [(name, colours[name]) for name in panoptic.stuff_voxels()]
    with atomic_path(path) as temporary:
        write_overlay(panoptic.instances, tinted, temporary, title)
        _add_legend(temporary, legend)


def _colours(count: int) -> list[tuple[int, ...]]:
    """Return colours that stay apart for colour-blind eyes, then hues a golden angle apart."""
    known = [tuple(int(text[k : k + 2], 16) for k in (1, 3, 5)) for text in PALETTE]
    further = colours_of(max(0, count - len(known)))[1:]
    return [*known, *(tuple(int(v) for v in row) for row in further)][:count]


def _tinted(semantic: Volume, image: Volume | None, table: FloatArray) -> Volume:
    """Return an image in colour, uint8, with the colour of the class of each voxel mixed in."""
    if image is not None and not semantic.geometry.matches(image.geometry):
        difference = grid_difference(semantic.geometry, image.geometry, "the maps") or "its place differs"
        raise GeometryError(f"image: {difference}. Resample it onto the grid of the maps.")
    result = np.empty((3, *semantic.shape), np.uint8)
    opacity = table[:, 3][semantic.array[0]]
    for channel, ground in enumerate(_ground(semantic, image)):
        colour = table[:, channel][semantic.array[0]]
        result[channel] = np.round(ground * (1 - opacity) + colour * opacity)
    return semantic.with_array(result)


def _ground(semantic: Volume, image: Volume | None) -> Sequence[Array]:
    """Return red, green and blue of an image, 0 to 255."""
    if image is None:
        return [np.zeros(semantic.shape, np.float32)] * 3
    if image.channels == 3 and image.array.dtype == np.uint8:
        return list(image.array)
    values = image.array[0]
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (
        np.percentile(finite[:: max(1, finite.size // _SAMPLED)], _CLIPPED) if finite.size else (0.0, 1.0)
    )
    seen = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return [(255 * np.clip((seen - low) / max(high - low, 1e-12), 0, 1)).astype(np.float32)] * 3


def _add_legend(path: PathLike, legend: Sequence[Entry]) -> None:
    """Write the names of the classes below a picture."""
    from PIL import Image, ImageDraw

    with Image.open(path) as picture:
        body: IntArray = np.asarray(picture.convert("RGB"))
    font = font_of(15)
    lines = _lines(legend, body.shape[1], font)
    ground = np.full((_LINE * len(lines), *body.shape[1:]), _GROUND, np.uint8)
    sheet = Image.fromarray(np.concatenate([body, ground]))
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        top = body.shape[0] + row * _LINE + 8
        for left, name, colour in line:
            draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=colour)
            draw.text((left + _SWATCH + _NEAR, top - 2), name, fill=_INK, font=font)
    sheet.save(path, format="PNG")


def _lines(legend: Sequence[Entry], width: int, font: Any) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Return lines of (left, name, colour) that fit in the width."""
    lines: list[list[tuple[int, str, tuple[int, ...]]]] = []
    left = width
    for name, colour in legend:
        needed = _SWATCH + _NEAR + int(font.getlength(name)) + _FAR
        if left + needed > width or not lines:
            lines.append([])
            left = 8
        lines[-1].append((left, name, colour))
        left += needed
    return lines
