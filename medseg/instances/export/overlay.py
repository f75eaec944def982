"""A picture of objects on their image: exact outlines, a colour for each, for the eye to judge.

A picture is shown whole. Of a volume there are three planes, each where most objects lie, and below them
slices from the first object to the last. A page (:func:`draw_views`) shows the same as pictures of their own,
and a volume in one look besides. Anatomy (mm) is in the radiologist's view: the patient's right on
the left, front or head up; microscopy is as its array lies, i to the right and j or k down.
"""

import colorsys
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import GeometryError
from medseg.files import atomic_path
from medseg.geometry.orient import to_ras
from medseg.instances.schema import Instances
from medseg.io.grids import grid_difference
from medseg.types import Array, FloatArray, IntArray, PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels: a small picture is enlarged to the first, a large one is thinned out to the second.
_SMALL, _LARGE, _LARGE_ON_PAGE = 900, 4000, 1800
_THUMBNAIL = 420
_PLANE, _GAP, _HEAD = 520, 8, 30
_COLUMNS, _ROWS = 6, 2
_SLICES_ON_PAGE = 5
_GROUND, _INK, _MUTED = (17, 21, 27), (242, 245, 248), (154, 167, 181)
# Part of the values that may be darker than black or brighter than white.
_CLIPPED = (0.5, 99.5)
# Successive hues are a golden angle apart, so that neighbours in number differ.
_GOLDEN = 0.618033988749895
_NAMES = ("sagittal", "coronal", "axial")
_EDGES = (("A", "P", "S", "I"), ("R", "L", "S", "I"), ("R", "L", "A", "P"))


@dataclass(frozen=True, eq=False)
class _Shown:
    """What is drawn: grey values in 0..1 or RGB, labels, spacing, and whether it is anatomy."""

    image: FloatArray
    labels: IntArray
    spacing: tuple[float, ...]
    anatomy: bool


@dataclass(frozen=True, eq=False)
class View:
    """A PNG of objects on their image, and what is to be seen on it."""

    png: bytes
    caption: str


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
    shown = _prepare(instances, image)
    body = _picture(shown, _LARGE) if instances.ndim == 2 else _volume(shown)
    count = f"{len(instances)} object{'' if len(instances) == 1 else 's'}"
    sheet = _titled(body, f"{title}  ·  {count}" if title else count)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def draw_views(instances: Instances, image: Volume) -> list[View]:
    """Return what a page shows of an image: all of a picture; of a volume planes, a projection and slices.

    The planes lie where most objects are. The projection is of the brightest values, with the outline of the
    object that a ray meets first: anatomy (mm) seen from the front, microscopy along k.

    Raises
    ------
    GeometryError
        The image is on another grid.
    """
    shown = _prepare(instances, image)
    if instances.ndim == 2:
        return [View(_png(_picture(shown, _LARGE_ON_PAGE)), "the whole picture")]
    views = [_plane(shown, axis, _fullest(shown.labels, axis)) for axis in (2, 1, 0)]
    along = 1 if shown.anatomy else 2
    projected = _panel(_projected(shown, along), along, 0, _PLANE, shown.anatomy, "projection")
    name = _NAMES[along] if shown.anatomy else f"along {'ijk'[along]}"
    views.append(View(_png(projected), f"projection ({name}): brightest values, first objects"))
    return views + [_plane(shown, 2, index) for index in _slices(shown.labels, _SLICES_ON_PAGE)]


def read_thumbnail(path: PathLike) -> bytes:
    """Return a small PNG of what :func:`write_overlay` wrote, without its headline."""
    from PIL import Image

    with Image.open(path) as sheet:
        small = sheet.convert("RGB").crop((0, _HEAD, *sheet.size))
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _png(np.asarray(small))


def colours_of(count: int) -> IntArray:
    """Return (K + 1, 3) uint8: a bright colour for each object, black for background."""
    hues = np.arange(count) * _GOLDEN % 1.0
    bright = [colorsys.hsv_to_rgb(hue, 0.45 + 0.3 * (n % 2), 1.0) for n, hue in enumerate(hues.tolist())]
    return np.round(np.array([(0.0, 0.0, 0.0), *bright]) * 255).astype(np.uint8)


def draw_outlines(image: FloatArray, labels: IntArray, zoom: int = 1) -> IntArray:
    """Return (rows, columns, 3) uint8: an image with a line along the inside of each object's edge.

    Parameters
    ----------
    image : (rows, columns) or (rows, columns, 3)
        In 0..1.
    labels : (rows, columns) int
    zoom : int
        Pixels of the result for each pixel, whose line is one pixel of the result wide (two from zoom 4 on).
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
    picture[edge] = colours_of(int(labels.max(initial=0)))[large[edge]]
    return picture


def _png(pixels: IntArray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _prepare(instances: Instances, image: Volume) -> _Shown:
    if not instances.geometry.matches(image.geometry):
        difference = grid_difference(instances.geometry, image.geometry, "the objects") or "its place differs"
        raise GeometryError(f"image: {difference}. Resample it onto the grid of the objects.")
    anatomy = instances.ndim == 3 and instances.unit == "mm"
    colour = image.channels == 3 and image.array.dtype == np.uint8
    channels = image if colour else Volume(image.array[:1], image.geometry)
    both = (
        [to_ras(each) for each in (channels, instances.volume)] if anatomy else [channels, instances.volume]
    )
    grey = both[0].array
    values = grey.transpose(1, 2, 3, 0) / 255.0 if colour else _window(grey[0])
    return _Shown(values, both[1].array[0], both[1].geometry.spacing, anatomy)


def _window(values: Array) -> FloatArray:
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return np.zeros(values.shape, np.float32)
    low, high = np.percentile(finite[:: max(1, finite.size // 2_000_000)], _CLIPPED)
    exact = np.float64 if values.dtype.itemsize > 4 else np.float32
    seen = np.nan_to_num(values.astype(exact), nan=low, posinf=high, neginf=low)
    scaled = (seen - low) / max(high - low, 1e-12)
    return np.asarray(np.clip(scaled, 0.0, 1.0), np.float32)


def _projected(shown: _Shown, axis: int) -> _Shown:
    """Return one slice: along an axis the brightest value, and the first object."""
    labels = np.flip(shown.labels, axis) if shown.anatomy else shown.labels  # the patient's front is last
    first = np.expand_dims((labels > 0).argmax(axis), axis)
    labels = np.take_along_axis(labels, first, axis)
    brightest: FloatArray = shown.image.max(axis, keepdims=True)
    if brightest.ndim == 3:  # of a noisy volume all are bright
        brightest = _window(brightest)
    return _Shown(brightest, labels, shown.spacing, shown.anatomy)


def _picture(shown: _Shown, most: int) -> IntArray:
    image, labels = shown.image[:, :, 0].swapaxes(0, 1), shown.labels[:, :, 0].T
    step = max(1, -(-max(labels.shape) // most))
    zoom = max(1, _SMALL // max(labels.shape))
    return draw_outlines(image[::step, ::step], labels[::step, ::step], zoom)


def _volume(shown: _Shown) -> IntArray:
    """Return three planes over a strip of slices."""
    planes = [
        _panel(shown, axis, _fullest(shown.labels, axis), _PLANE, letters=shown.anatomy) for axis in (2, 1, 0)
    ]
    width = 3 * _PLANE + 2 * _GAP
    cell = (width - (_COLUMNS - 1) * _GAP) // _COLUMNS
    rows = [_row(planes)]
    slices = _slices(shown.labels)
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


def _slices(labels: IntArray, most: int = _COLUMNS * _ROWS) -> list[int]:
    hit = np.flatnonzero(labels.any(axis=(0, 1)))
    low, high = (int(hit[0]), int(hit[-1])) if hit.size else (0, labels.shape[2] - 1)
    count = min(most, high - low + 1)
    return sorted({round(float(index)) for index in np.linspace(low, high, count)})


def _name(shown: _Shown, axis: int, index: int) -> str:
    return f"{_NAMES[axis] if shown.anatomy else 'ijk'[axis]} {index}"


def _plane(shown: _Shown, axis: int, index: int) -> View:
    panel = _panel(shown, axis, index, _PLANE, shown.anatomy)
    return View(_png(panel), f"slice {_name(shown, axis, index)}")


def _panel(shown: _Shown, axis: int, index: int, side: int, letters: bool, name: str = "") -> IntArray:
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
    drawn = draw_outlines(image[place], labels[place])
    panel = np.full((side, side, 3), (1, 1, 1), np.uint8)  # not quite the black that is filled between rows
    top, left = (side - height) // 2, (side - width) // 2
    panel[top : top + height, left : left + width] = np.maximum(drawn, 1)
    return _lettered(panel, name or _name(shown, axis, index), _EDGES[axis] if letters else ())


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


def _titled(body: IntArray, title: str) -> "Image":
    from PIL import Image, ImageDraw

    width = max(body.shape[1], 240)
    sheet = np.full((body.shape[0] + _HEAD, width, 3), _GROUND, np.uint8)
    sheet[_HEAD:, : body.shape[1]] = body
    picture = Image.fromarray(sheet)
    ImageDraw.Draw(picture).text((8, 6), title, fill=_MUTED, font=font_of(15))
    return picture


def font_of(size: int) -> Any:
    """Return a font that has arrows and superscripts: the one that comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
