"""InstanSeg's published nets (Goldsborough et al., 2024, arXiv 2408.15954): nuclei and cells of pictures.

The nets are TorchScript. Its `forward` does all of an image at once, so that memory grows with the square of
the number of objects; the Python package around newer ones answers more than 2,000 seeds in a tile with an
empty label map and a printed line. Here only the parts of a net are called, and what comes between them is
done in this module, without a limit:

1. The convolutions go over the whole image in tiles with a halo wider than their field of view, so that tiles
   do not show in the maps: coordinates of each pixel, their spread, and how central it is.
2. Peaks of the last map are seeds.
3. Around each seed, in a window of 64 pixels, the small classifier of the net says which pixels are of its
   object. The part that holds the seed is kept, holes are filled.
4. Objects of which one covers more than 0.3 of the other are one. A pixel belongs to the most probable.

Result: that of `forward` (test_instanseg.py), pixel by pixel, but for images of less than 64 pixels, in which
the windows of `forward` wrap around.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from medseg import assets
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.infer.runtime import choose_device, count_threads, torch_threads
from medseg.instances.centre_model import Found
from medseg.instances.channels import check_channels
from medseg.instances.dropped import Dropped
from medseg.instances.rescale import Grid, labels_to_grid, normalise, one_if_equal, to_grid
from medseg.io.channels import set_channels
from medseg.log import logger, progress
from medseg.types import Array, BoolArray, FloatArray, IntArray, PathLike, Shape
from medseg.volume import Volume

# Pixels around a tile: beyond 112 (brightfield) and 144 (fluorescence) nothing changes the maps.
HALO = 144
# Side of a tile, a multiple of what the nets halve.
TILE = 480
_STEP = 16
# Seeds whose windows are looked at together: 4096 pixels each.
SEEDS_AT_ONCE = 128
# The net was trained with these sizes; larger pixels show no nuclei.
LARGEST_PIXEL_UM = 2.0
# An object of a known diameter is shown as this: a usual nucleus.
USUAL_UM = 10.0
# What the net itself cuts.
_CUT = (-2.0, 3.0)
# Windows of a stack are apart; in each, neighbours share a side or a corner.
_IN_WINDOW = np.zeros((3, 3, 3), bool)
_IN_WINDOW[1] = True
# Background this far from an object (pixels, along axes and diagonals) is outside of it, not a hole.
_OUTSIDE = 3


@dataclass(frozen=True)
class Kind:
    """What a net finds.

    Attributes
    ----------
    asset : its file
    channels : that it takes; None: any number
    target : which of its outputs, 0 or 1
    object_name : of one object
    """

    asset: str
    channels: int | None
    target: int
    object_name: str


KINDS: dict[str, Kind] = {
    "instanseg-fluorescence": Kind("instanseg-fluorescence", None, 0, "nucleus"),
    "instanseg-cells": Kind("instanseg-fluorescence", None, 1, "cell"),
    "instanseg-brightfield": Kind("instanseg-brightfield", 3, 0, "nucleus"),
}


@dataclass(frozen=True, eq=False)
class InstanSeg:
    """A net, ready to be asked.

    Attributes
    ----------
    name : of :data:`KINDS`
    net : TorchScript module
    pixel_um : size of a pixel that it knows, micrometres
    device, threads : where and with how many CPU threads it computes
    """

    name: str
    net: Any
    pixel_um: float
    device: torch.device
    threads: int

    @property
    def class_names(self) -> dict[int, str]:
        """What an object is called."""
        return {1: KINDS[self.name].object_name}

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find the objects of a picture.

        Parameters
        ----------
        image : Volume
            One voxel along k.
        diameter : float, optional
            Of objects, in the unit of the image; they are then shown as 10 um, whatever a pixel measures.
        in_pixels : bool
            The image has no scale.

        Raises
        ------
        GeometryError
            Neither the size of a pixel nor that of objects is known, or a pixel is larger than 2 um.
        DataError
            It is a volume, or holds values that are not finite.
        """
        if image.shape[2] != 1:
            raise DataError(
                f"{self.name} finds objects in pictures, and the image is a volume of {image.shape[2]} "
                "slices. Take one slice, or a model of volumes (nuclei3d)."
            )
        pixels = self._pixel_sizes(image, diameter, in_pixels)
        return replace(self.segment(image.array[..., 0], pixels), diameter=diameter)

    def _pixel_sizes(self, image: Volume, diameter: float | None, in_pixels: bool) -> tuple[float, float]:
        """Return the sizes of a pixel, in micrometres."""
        spacing = (1.0, 1.0) if in_pixels else (image.spacing[0], image.spacing[1])
        if diameter is not None:
            if not np.isfinite(diameter) or diameter <= 0:
                raise ConfigError(f"diameter {diameter}: expected more than 0.")
            unit = USUAL_UM / diameter
        elif in_pixels:
            raise GeometryError(
                f"{self.name} knows objects at {self.pixel_um:g} micrometres a pixel, and the image has no "
                "scale. Give --pixel-size '0.5 micron', or --diameter, in pixels, of a usual object."
            )
        else:
            unit = 1.0 if image.geometry.unit == "micron" else 1000.0
        sizes = (spacing[0] * unit, spacing[1] * unit)
        if max(sizes) > LARGEST_PIXEL_UM and diameter is None:
            raise GeometryError(
                f"a pixel of {max(sizes):g} micrometres: {self.name} sees no objects above "
                f"{LARGEST_PIXEL_UM:g}. If that size is wrong, give the right one with --pixel-size."
            )
        return sizes

    def segment(self, image: Array, pixel_um: tuple[float, float]) -> Found:
        """Find the objects of an array, (channel, i, j) of any real dtype, whose pixels are `pixel_um` large.

        Raises
        ------
        ConfigError
            The net does not take so many channels.
        DataError
            Values are not finite.
        """
        shape = image.shape[1:]
        if not image.size or image.min() == image.max():
            return Found(np.zeros(shape, np.int32), np.zeros(0, np.float32), None, 0, ())
        grid = Grid.of(shape, pixel_um, self.pixel_um)
        if max(abs(a / self.pixel_um - 1) for a in pixel_um) < 0.01:  # as InstanSeg: not worth a blur
            grid = Grid(shape, pixel_um, shape, pixel_um)
        # Without a cast, an image of whole numbers would be cut to whole numbers again.
        channels = KINDS[self.name].channels
        image = one_if_equal(image)
        if channels is not None:
            check_channels(image, channels)
        shown = normalise(to_grid(image.astype(np.float32), grid.shape), cut=_CUT)
        shown = shown if channels is None else set_channels(shown, channels)
        side = 2 * int(self.net.default_window_size)
        padding = [(0, max(0, side - n)) for n in shown.shape[1:]]
        with torch_threads(self.threads), torch.no_grad():
            maps = self.maps(np.pad(shown, [(0, 0), *padding], mode="symmetric"))
            found = decode(self.net, maps, shown.shape[1:], self.device)
        return self._on_source(found, grid)

    def maps(self, shown: FloatArray) -> FloatArray:
        """Return the 5 maps of a normalised image (channel, i, j), tile by tile; tiles leave no trace.

        They are x and y (relative), two spreads, and how central a pixel is.
        """
        rows, columns = shown.shape[1:]
        pad = [(0, -(-n // _STEP) * _STEP - n) for n in (rows, columns)]
        data = np.pad(shown, [(0, 0), *pad], mode="reflect")
        target = KINDS[self.name].target
        result = np.empty((5, *data.shape[1:]), np.float32)
        for outer, inner, core in progress(list(_tiles(data.shape[1:])), "Find objects"):
            part = torch.from_numpy(np.ascontiguousarray(data[(slice(None), *outer)]))[None]
            output = self.net.fcn(part.to(self.device))[0].float().cpu().numpy()
            result[(slice(None), *core)] = output[(slice(5 * target, 5 * target + 5), *inner)]
        return result[:, :rows, :columns]

    def _on_source(self, found: "Decoded", grid: Grid) -> Found:
        """Return the objects on the pixels of the image, those that are too small for them counted."""
        labels = labels_to_grid(found.labels, grid.source)
        seen = np.unique(labels)
        seen = seen[seen > 0]
        lost = len(found.scores) - len(seen)
        dropped = []
        if lost:
            gone = np.setdiff1d(np.arange(1, len(found.scores) + 1), seen)
            voxels = int(np.isin(found.labels, gone).sum())
            dropped.append(Dropped("smaller than a pixel of the image (pixels of the net)", lost, voxels))
        notes: tuple[str, ...] = ()
        if found.cut:
            notes = (
                f"{found.cut} objects reach the edge of the window of {64 * self.pixel_um:g} micrometres that"
                f" {self.name} looks at, and may be cut. If objects are larger, say so with --diameter.",
            )
            logger.warning("%s", notes[0])
        table = np.zeros(len(found.scores) + 1, np.int32)
        table[seen] = np.arange(1, len(seen) + 1)
        return Found(table[labels], found.scores[seen - 1], None, 0, tuple(dropped), notes=notes)


def load_instanseg(
    name: str,
    device: str = "auto",
    threads: int | None = None,
    given: PathLike | None = None,
) -> InstanSeg:
    """Open a published net: TorchScript of a file whose hash is known, never a pickle.

    Parameters
    ----------
    name : of :data:`KINDS`
    device : auto, cpu, cuda
    threads : CPU threads; None uses every core that this process may use
    given : its file, if it is not to be fetched

    Raises
    ------
    AssetError
        The file cannot be had, or is another one.
    """
    path = assets.find(KINDS[name].asset, given)
    place = choose_device(device)
    net = _load(path, place)
    return InstanSeg(name, net, float(net.pixel_size), place, count_threads(threads))


def _load(path: Path, device: torch.device) -> Any:
    with warnings.catch_warnings():  # torch would rather have torch.export, which the nets are not
        warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=DeprecationWarning)
        load: Any = torch.jit.load
        return load(str(path), map_location=device).eval()


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield what is read, where the core is in that, and the core; all edges are multiples of 16."""
    for top in range(0, shape[0], TILE):
        for left in range(0, shape[1], TILE):
            core = (slice(top, min(top + TILE, shape[0])), slice(left, min(left + TILE, shape[1])))
            outer = tuple(
                slice(max(0, s.start - HALO), min(n, s.stop + HALO)) for s, n in zip(core, shape, strict=True)
            )
            inner = tuple(
                slice(s.start - o.start, s.stop - o.start) for s, o in zip(core, outer, strict=True)
            )
            yield outer, inner, core


@dataclass(frozen=True, eq=False)
class Decoded:
    """Objects on the net's own grid.

    Attributes
    ----------
    labels : (i, j) int32, objects 1..K
    scores : (K,) float32, mean probability of the pixels of each
    cut : objects that reach the edge of their window inside of the image
    """

    labels: IntArray
    scores: FloatArray
    cut: int


def decode(net: Any, maps: FloatArray, kept: Shape, device: torch.device) -> Decoded:
    """Make objects of the maps of an image, however many they are.

    Parameters
    ----------
    net : whose classifier and thresholds are used
    maps : (5, i, j), at least as large as a window
    kept : (i, j) of the maps that is the image; the rest is padding
    """
    window, threshold = int(net.default_window_size), float(net.default_mask_threshold)
    features = np.concatenate([_coordinates(maps), maps[2:4]])
    seeds = find_seeds(maps[4] / 15 + 0.5, int(net.default_peak_distance), float(net.default_seed_threshold))
    shape = np.array(maps.shape[1:])
    canvas = Canvas.of(maps.shape[1:], threshold)
    for start in progress(range(0, len(seeds), SEEDS_AT_ONCE), "Outline objects"):
        some = seeds[start : start + SEEDS_AT_ONCE]
        corners = np.clip(some, window, shape - window) - window
        crops = _classify(net.pixel_classifier, features, some, corners, 2 * window, device)
        tidy(crops, some - corners, threshold)
        for corner, crop in zip(corners, crops, strict=True):
            canvas.put(crop, corner)
    merged = merge_overlapping(canvas.pixels, float(net.default_overlap_threshold))
    inside = tuple(slice(0, n) for n in kept)
    return _numbered(merged[canvas.owner[inside]], canvas.best[inside], canvas.cut)


def find_seeds(middle: FloatArray, distance: int, least: float) -> IntArray:
    """Return (n, 2) pixels above `least` that no other within `distance` exceeds; of equal ones the first."""
    tensor = torch.from_numpy(np.ascontiguousarray(middle))[None, None]
    top, where = F.max_pool2d(tensor, 2 * distance + 1, 1, distance, return_indices=True)
    own = torch.arange(middle.size).reshape(middle.shape)
    return np.asarray(torch.nonzero((where[0, 0] == own) & (top[0, 0] > least)).numpy())


def _coordinates(maps: FloatArray) -> FloatArray:
    """Return x and y of the middle that each pixel points to; 64 are 256 pixels, from edge to edge."""
    rows, columns = maps.shape[1:]
    fields = (1 / (1 + np.exp(-maps[:2])) - 0.5) * 8
    fields[0] += np.linspace(0, columns / 4, columns, dtype=np.float32)[None, :]
    fields[1] += np.linspace(0, rows / 4, rows, dtype=np.float32)[:, None]
    return np.asarray(fields, np.float32)


def _classify(
    classifier: Any, features: FloatArray, seeds: IntArray, corners: IntArray, side: int, device: torch.device
) -> FloatArray:
    """Return the probability (seed, side, side) that a pixel of a window is of the object of its seed."""
    along = np.arange(side)
    rows, columns = corners[:, :1] + along, corners[:, 1:] + along
    shown = features[:, rows[:, :, None], columns[:, None, :]]
    shown[:2] -= features[:2, seeds[:, 0], seeds[:, 1]][:, :, None, None]
    flat = torch.from_numpy(np.ascontiguousarray(shown.reshape(len(features), -1).T))
    answer = torch.sigmoid(classifier(flat.to(device))).float().cpu().numpy()
    return np.asarray(answer.reshape(len(seeds), side, side))


def tidy(crops: FloatArray, seeds: IntArray, threshold: float) -> None:
    """Keep in each window the part at its seed, and fill its holes with the threshold; in place.

    Neighbours share a side or a corner. What is near the object and cannot be reached from further away is a
    hole.

    Parameters
    ----------
    crops : (n, side, side)
    seeds : (n, 2)
        Where the seed is in its window. Parts that touch one of its 9 pixels are kept.
    """
    near = np.zeros(crops.shape, bool)
    near[np.arange(len(seeds)), seeds[:, 0], seeds[:, 1]] = True
    kept = _parts_at(crops >= threshold, ndimage.maximum_filter(near, (1, 3, 3), mode="constant"))
    width = 2 * _OUTSIDE + 1
    outside = _parts_at(~kept, ~ndimage.maximum_filter(kept, (1, width, width), mode="constant"))
    crops[~kept] = 0
    crops[~kept & ~outside] = threshold


def _parts_at(mask: BoolArray, places: BoolArray) -> BoolArray:
    """Return the parts of masks (n, i, j) that hold one of `places`."""
    parts, count = ndimage.label(mask, _IN_WINDOW)
    wanted = np.zeros(count + 1, bool)
    wanted[parts[places & mask]] = True
    return np.asarray(wanted[parts])


@dataclass(eq=False)
class Canvas:
    """Windows of objects 1, 2, ... put over each other; a pixel belongs to the most probable.

    Attributes
    ----------
    threshold : from which a pixel belongs to an object
    best, owner : (i, j), the highest probability so far, and the object that has it; the first of equal ones
    pixels : of each object, as linear indices, whoever else claims them
    cut : objects that reach the edge of their window inside of the image
    """

    threshold: float
    best: FloatArray
    owner: IntArray
    pixels: list[IntArray]
    cut: int = 0

    @classmethod
    def of(cls, shape: Shape, threshold: float) -> "Canvas":
        """Return an empty one."""
        return cls(threshold, np.zeros(shape, np.float32), np.zeros(shape, np.int32), [])

    def put(self, crop: FloatArray, corner: IntArray) -> None:
        """Add the next object, whose window begins at a corner."""
        mask = crop >= self.threshold
        here = tuple(slice(a, a + n) for a, n in zip(corner.tolist(), crop.shape, strict=True))
        best, owner = self.best[here], self.owner[here]
        rows, columns = np.nonzero(mask)
        self.pixels.append((rows + corner[0]) * self.best.shape[1] + columns + corner[1])
        better = mask & (crop > best)
        best[better] = crop[better]
        owner[better] = len(self.pixels)
        inner = [(s.start > 0, s.stop < n) for s, n in zip(here, self.best.shape, strict=True)]
        edges = ((mask[0], mask[-1]), (mask[:, 0], mask[:, -1]))
        self.cut += any(
            is_inner and bool(edge.any())
            for sides, along in zip(inner, edges, strict=True)
            for is_inner, edge in zip(sides, along, strict=True)
        )


def merge_overlapping(pixels: Sequence[IntArray], most: float) -> IntArray:
    """Return the number of each object, 0 first, after objects have become one that share too much.

    That is more than the part `most` of the smaller one. The smallest of their numbers stays.
    """
    count = len(pixels)
    if not count:
        return np.zeros(1, np.int64)
    sizes = np.array([len(each) for each in pixels], np.int64)
    columns = np.concatenate(pixels)
    rows = np.repeat(np.arange(count), sizes)
    ones = np.ones(len(columns), np.int32)
    table = csr_array((ones, (rows, columns)), shape=(count, int(columns.max(initial=0)) + 1))
    shared = (table @ table.T).tocoo()
    close = shared.data > most * np.minimum(sizes[shared.row], sizes[shared.col])
    graph = coo_array((shared.data[close], (shared.row[close], shared.col[close])), shape=(count, count))
    _, first, group = np.unique(
        connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
    )
    return np.append(0, first[group] + 1)


def _numbered(labels: IntArray, best: FloatArray, cut: int) -> Decoded:
    """Return objects without gaps in their numbers."""
    sizes = np.bincount(labels.ravel(), minlength=1)
    sizes[0] = 0
    table = np.where(sizes > 0, np.cumsum(sizes > 0), 0).astype(np.int32)
    sums = np.bincount(labels.ravel(), best.ravel(), minlength=len(sizes))
    return Decoded(table[labels], (sums[sizes > 0] / sizes[sizes > 0]).astype(np.float32), cut)
