"""Marker watershed from the same box: what a prompted network has to be better than, without any network.

The image's own edges (Gaussian gradient, in mm) are flooded in 3D from a marker inside the box and one
outside (Meyer 1991, through ITK's ``MorphologicalWatershedFromMarkers``). It is meant to be a strong
baseline: it sees 3D, costs a fiftieth of a second, and takes clicks as further markers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.prompt.regions import Region, Triple
from medseg.prompt.simulate import BoxPrompt, Click
from medseg.types import BoolArray, FloatArray, IntArray

Spacing = tuple[float, float, float]
_INSIDE, _OUTSIDE = 1, 2
# Parts of the box whose grey values are typical of the object, and that are object whatever their value.
_MIDDLE, _CENTRE = 0.5, 0.25
# Of 256 grey levels: a flat object is not without noise.
_LEAST_SPREAD = 5.0


class WatershedConfig(Config):
    """Where the markers lie, and how smooth the edges are.

    Attributes
    ----------
    inside : float
        Axes of the ellipse that is surely object, as a part of the box.
    outside : float
        Squared distance from the middle, in half sides of the box and its slices, from where on it is
        surely not object: 1 is the ellipsoid within the box, 3 its corners. Organs do not fill corners.
    tone : float
        Voxels of that ellipse whose grey value is further from the median in the middle of the box, in robust
        standard deviations (1.4826 times the median deviation), are not sure.
    margin : int
        Voxels around the box before the outside begins.
    sigma : float
        Of the gradient, in voxels of the finest axis.
    depth : float
        Without a range of slices: how far the object may reach up and down from the prompted slice, as a
        part of the mean side of the box in mm (1: as far as the box is wide, in both directions).
    core : float
        Part of that reach, or of the known range, over which the inner marker tapers to nothing.
    click : float
        Part of the mean side of the box from which on the neighbours of a clicked voxel are marked with it,
        along each axis on which a voxel is no longer than this.
    free : float
        Radius around a positive click beyond the box where the outside is not sure any more, as a part of the
        mean side of the box.
    """

    inside: float = Field(0.9, gt=0, lt=1)
    outside: float = Field(1.5, gt=1)
    tone: float = Field(3.0, gt=0)
    margin: int = Field(1, ge=0)
    sigma: float = Field(1.0, gt=0)
    depth: float = Field(0.5, gt=0)
    core: float = Field(0.6, ge=0, lt=1)
    click: float = Field(0.1, ge=0)
    free: float = Field(0.5, ge=0)


@dataclass(frozen=True, eq=False)
class _Crop:
    start: Triple
    stop: Triple

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        i, j, k = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return i, j, k

    @property
    def shape(self) -> Triple:
        i, j, k = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return i, j, k


def watershed(
    image: FloatArray,
    spacing: Spacing,
    prompt: BoxPrompt,
    limits: tuple[int, int] | None = None,
    clicks: Sequence[Click] = (),
    config: WatershedConfig | None = None,
) -> Region:
    """Flood the gradient of an image from a box.

    Parameters
    ----------
    image : (i, j, k)
        Grey values through a window, 0 to 255 (``Scene.grey``).
    spacing : three floats
        Voxel size along i, j, k.
    prompt : BoxPrompt
        The box on its slice.
    limits : (int, int), optional
        First and last slice of the object, where known; else guessed from the size of the box.
    clicks : sequence of Click
        Further markers, a later one over an earlier one.
    config : WatershedConfig, optional

    Returns
    -------
    Region
        On the grid of the image.
    """
    config = config or WatershedConfig()
    shape: Triple = (image.shape[0], image.shape[1], image.shape[2])
    low, high = guess_reach(shape, spacing, prompt, limits, config)
    crop = _crop(shape, prompt, low, high, clicks)
    seen = image[crop.slices]
    markers = _markers(seen, crop, prompt, (low, high), config)
    side = _side(prompt, spacing)
    _add_clicks(markers, crop, clicks, spacing, config.free * side, config.click * side)
    flooded = _flood(_gradient(seen, spacing, config.sigma), markers)
    return Region.at(flooded == _INSIDE, crop.start, shape)


def guess_reach(
    shape: Triple,
    spacing: Spacing,
    prompt: BoxPrompt,
    limits: tuple[int, int] | None,
    config: WatershedConfig,
) -> tuple[int, int]:
    """Return the first and last slice that the object can reach: `limits`, or as deep as the box is wide."""
    if limits is not None:
        return max(0, limits[0]), min(shape[prompt.axis] - 1, limits[1])
    slices = max(1, round(config.depth * _side(prompt, spacing) / spacing[prompt.axis]))
    return max(0, prompt.index - slices), min(shape[prompt.axis] - 1, prompt.index + slices)


def _side(prompt: BoxPrompt, spacing: Spacing) -> float:
    """Return the mean side of the box in mm."""
    rows, columns = (a for a in range(3) if a != prompt.axis)
    first_row, first_column, end_row, end_column = prompt.box
    return ((end_row - first_row) * spacing[rows] + (end_column - first_column) * spacing[columns]) / 2


def _crop(shape: Triple, prompt: BoxPrompt, low: int, high: int, clicks: Sequence[Click]) -> _Crop:
    """Return the box and its slices with a rim for the outer marker, wide enough for every click."""
    rows, columns = (a for a in range(3) if a != prompt.axis)
    start, stop = [0, 0, 0], [0, 0, 0]
    start[rows], stop[rows] = round(prompt.box[0] + 0.5), round(prompt.box[2] + 0.5)
    start[columns], stop[columns] = round(prompt.box[1] + 0.5), round(prompt.box[3] + 0.5)
    start[prompt.axis], stop[prompt.axis] = low, high + 1
    rim = 4
    for axis in range(3):
        clicked = [click.voxel[axis] for click in clicks]
        start[axis] = max(0, min([start[axis], *clicked]) - rim)
        stop[axis] = min(shape[axis], max([stop[axis], *(c + 1 for c in clicked)]) + rim)
    return _Crop((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _markers(
    image: FloatArray, crop: _Crop, prompt: BoxPrompt, reach: tuple[int, int], config: WatershedConfig
) -> IntArray:
    """Mark a tapering ellipse inside, and everything beyond the box and its slices outside."""
    rows, columns = (a for a in range(3) if a != prompt.axis)
    r, c, s = (_along(crop, axis) for axis in (rows, columns, prompt.axis))
    top, left, bottom, right = prompt.box
    v = (r - (top + bottom) / 2) / ((bottom - top) / 2)
    h = (c - (left + right) / 2) / ((right - left) / 2)
    depth = np.where(s < prompt.index, prompt.index - reach[0], reach[1] - prompt.index)
    far = v**2 + h**2
    beyond = (r < top - config.margin) | (r > bottom + config.margin)
    beyond = beyond | (c < left - config.margin) | (c > right + config.margin)
    beyond = beyond | (s < reach[0]) | (s > reach[1])
    beyond = beyond | (far + ((s - prompt.index) / (depth + 0.5)) ** 2 > config.outside)
    core = ((s - prompt.index) / np.maximum(config.core * depth, 0.5)) ** 2
    middle = np.broadcast_to((far <= _MIDDLE**2) & (s == prompt.index), crop.shape)
    inside = (far / config.inside**2 + core <= 1) & _alike(image, middle, config.tone)
    inside = inside | (far / _CENTRE**2 + core / _CENTRE <= 1)
    markers = np.where(beyond, _OUTSIDE, 0).astype(np.uint8)
    markers[inside & ~beyond] = _INSIDE
    if not (markers == _INSIDE).any():
        markers[_middle_voxel(crop, prompt)] = _INSIDE
    return markers


def _alike(image: FloatArray, middle: BoolArray, tone: float) -> BoolArray:
    """Return where grey values are like those in the middle of the box."""
    values = image[middle]
    if not values.size:
        return np.ones(image.shape, dtype=bool)
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))
    return np.asarray(np.abs(image - median) <= tone * max(spread, _LEAST_SPREAD))


def _along(crop: _Crop, axis: int) -> FloatArray:
    shape = [1, 1, 1]
    shape[axis] = -1
    return np.arange(crop.start[axis], crop.stop[axis], dtype=np.float64).reshape(shape)


def _middle_voxel(crop: _Crop, prompt: BoxPrompt) -> Triple:
    where = [int((prompt.box[0] + prompt.box[2]) / 2), int((prompt.box[1] + prompt.box[3]) / 2)]
    where.insert(prompt.axis, prompt.index)
    i, j, k = (min(max(a - s, 0), n - 1) for a, s, n in zip(where, crop.start, crop.shape, strict=True))
    return i, j, k


def _add_clicks(
    markers: IntArray, crop: _Crop, clicks: Sequence[Click], spacing: Spacing, free: float, wide: float
) -> None:
    """Mark clicks; a positive one beyond the box frees `free` mm around it, or it could win nothing."""
    place = np.ogrid[tuple(slice(n) for n in crop.shape)]
    for click in clicks:
        middle = [v - s for v, s in zip(click.voxel, crop.start, strict=True)]
        if click.positive and markers[tuple(middle)] == _OUTSIDE:
            away = sum(((p - m) * step) ** 2 for p, m, step in zip(place, middle, spacing, strict=True))
            markers[(away <= free**2) & (markers == _OUTSIDE)] = 0
        reach = [int(step <= wide) for step in spacing]
        near = tuple(slice(max(0, m - n), m + n + 1) for m, n in zip(middle, reach, strict=True))
        markers[near] = _INSIDE if click.positive else _OUTSIDE


def _gradient(image: FloatArray, spacing: Spacing, sigma: float) -> FloatArray:
    from scipy.ndimage import gaussian_gradient_magnitude

    # In mm: a step between thick slices is as steep as the distance makes it.
    finest = min(spacing)
    parts = [max(sigma * finest / step, 0.3) for step in spacing]
    return np.asarray(gaussian_gradient_magnitude(image.astype(np.float32), parts), dtype=np.float32)


def _flood(gradient: FloatArray, markers: IntArray) -> IntArray:
    import SimpleITK

    flooded = SimpleITK.MorphologicalWatershedFromMarkers(
        SimpleITK.GetImageFromArray(gradient), SimpleITK.GetImageFromArray(markers), False, False
    )
    return np.asarray(SimpleITK.GetArrayFromImage(flooded))
