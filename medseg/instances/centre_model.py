"""A centre-offset network at work: an image of any size in, objects out.

The image is brought to the size at which the network knows objects, the network goes over it in tiles, and
its maps, stored once, are read back on the image's own voxels in slabs, where every voxel goes to the centre
that it points to. So nothing depends on tiles once the maps are there, and no more is held than the maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import cc3d
import numpy as np
import torch
from pydantic import Field, model_validator

from medseg.config import Config
from medseg.errors import ConfigError
from medseg.infer.sliding import Window
from medseg.instances.centres import FAR, find_centres, group_votes
from medseg.instances.dropped import Dropped
from medseg.instances.rescale import Grid, normalise, one_if_equal, read_slab, to_grid
from medseg.instances.scale import Scale
from medseg.io.channels import set_channels
from medseg.nets.centre_heads import CentreHeads
from medseg.types import Array, FloatArray, IntArray, Shape

# Voxels of the image that are grouped at a time.
SLAB = 1 << 22


class CentreSettings(Config):
    """What a network needs to know to find objects; kept in the card of its bundle.

    Attributes
    ----------
    object_voxels : diameter of objects in the network's voxels
    diameter : usual diameter of objects; None: it is estimated or given
    diameter_unit : of `diameter`, "pixel" where images had no scale; None: not kept, or they differ
    percentiles : of each channel, which become 0 and 1
    classes : semantic classes, background included
    things : classes whose objects are told apart; the others are areas
    threshold : probability from which a voxel belongs to an object
    sigma : blur of the votes, in diameters
    least_votes : votes that make a centre, in voxels of a usual object
    reach : largest distance of a vote from its centre, in diameters
    least_content : smaller objects are dropped, in contents of a usual object
    least_score : and so are those of a lower mean probability
    """

    object_voxels: float = Field(20.0, gt=0)
    diameter: float | None = Field(None, gt=0)
    diameter_unit: Scale | None = None
    percentiles: tuple[float, float] = (0.1, 99.9)
    classes: int = Field(2, ge=2, le=255)
    things: tuple[int, ...] = (1,)
    threshold: float = Field(0.5, gt=0, lt=1)
    sigma: float = Field(0.08, gt=0)
    least_votes: float = Field(0.02, ge=0)
    reach: float = Field(0.75, gt=0)
    least_content: float = Field(0.03, ge=0)
    least_score: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check_things(self) -> Self:
        if not self.things or not set(self.things) <= set(range(1, self.classes)):
            raise ValueError(f"things {list(self.things)}: expected some of 1 to {self.classes - 1}.")
        return self


@dataclass(frozen=True, eq=False)
class Found:
    """Objects of an image.

    Attributes
    ----------
    labels : (*shape) int32
        Objects 1..K; 0 = background.
    scores : (K,) float32
        Mean probability of the voxels of each.
    diameter : float or None
        Of objects, physical, that the image was read with; None: by something that does not ask for it.
    unassigned : int
        Voxels of objects whose vote was far from any centre; they are among what was dropped.
    dropped : tuple of Dropped
        What was left out.
    classes : (K,) int64
        Of the things of the network, that to which the voxels of each object give most of their probability;
        1 where it knows only one.
    areas : (*shape) uint8 or None
        Most probable of background and stuff, everywhere; None from a network without stuff.
    notes : tuple of str
        What else a reader of the result should know.
    source_ids : (K,) int64 or None
        Their numbers in the label map that they were read from.
    """

    labels: IntArray
    scores: FloatArray
    diameter: float | None
    unassigned: int
    dropped: tuple[Dropped, ...]
    classes: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    areas: IntArray | None = None
    notes: tuple[str, ...] = ()
    source_ids: IntArray | None = None

    def __post_init__(self) -> None:
        if not len(self.classes):
            object.__setattr__(self, "classes", np.ones(len(self.scores), np.int64))


@dataclass(frozen=True, eq=False)
class Maps:
    """What a network says of an image, on its own grid.

    Attributes
    ----------
    grid : Grid
    values : (classes + n, *grid.shape) float16
        Probability of each class but background, distance, offset in physical units.
    """

    grid: Grid
    values: FloatArray


@dataclass(frozen=True, eq=False)
class CentreNetwork:
    """A network, ready to be called, with its settings.

    Attributes
    ----------
    call : maps (n, channels, *patch) to outputs
    channels : of its input
    patch_size : voxels of a tile
    settings : CentreSettings
    device : where `call` computes
    threads : CPU threads
    """

    call: Callable[[Any], Any]
    channels: int
    patch_size: Shape
    settings: CentreSettings
    device: torch.device
    threads: int

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    def maps(self, image: FloatArray, spacing: Sequence[float], diameter: float) -> Maps:
        """Return what the network says of a normalised image (channel, *shape)."""
        n = self.dimensions
        grid = Grid.of(image.shape[1:], spacing, diameter / self.settings.object_voxels)
        data = to_grid(image, grid.shape)
        padding = [(0, max(0, p - m)) for m, p in zip(grid.shape, self.patch_size, strict=True)]
        data = _reflected(data, padding)
        heads = CentreHeads(self.settings.classes, n)
        window = Window(
            (self.call,),
            self.patch_size,
            heads.channels,
            (),
            0.5,
            self.device,
            self.threads,
            label="Find objects",
        )
        outputs = window.whole(data[:, None] if n == 2 else data, torch.float32)
        outputs = outputs[:, 0] if n == 2 else outputs
        kept = tuple(slice(0, m) for m in grid.shape)
        return Maps(grid, _meaning(outputs[(slice(None), *kept)], heads, diameter / 2))

    def find(self, image: FloatArray, spacing: Sequence[float], diameter: float) -> Found:
        """Return the objects of a normalised image (channel, *shape)."""
        return group_maps(self.maps(image, spacing, diameter), diameter, self.settings)


def _reflected(data: FloatArray, padding: Sequence[tuple[int, int]]) -> FloatArray:
    """Return an image at least as large as a tile: it goes on as its mirror image."""
    if not any(after for _, after in padding):
        return data
    return np.pad(data, [(0, 0), *padding], mode="symmetric")


def _meaning(outputs: FloatArray, heads: CentreHeads, radius: float) -> FloatArray:
    """Return the values of :class:`Maps` for outputs (channels, ...)."""
    last = heads.classes - 1
    values = np.empty((heads.classes + heads.dimensions, *outputs.shape[1:]), np.float16)
    for row, part in enumerate(outputs.swapaxes(0, 1)):  # a row at a time: nothing as large as all
        logits = torch.from_numpy(np.ascontiguousarray(part[: heads.classes])).float()
        values[:last, row] = torch.softmax(logits, 0)[1:].numpy()
        values[last, row] = part[heads.classes]
        values[last + 1 :, row] = np.clip(part[heads.classes + 1 :], -20, 20) * radius
    return values


def group_maps(maps: Maps, diameter: float, settings: CentreSettings) -> Found:
    """Return the objects that a network's maps show, on the voxels of the image.

    Parameters
    ----------
    diameter : of a usual object, physical
    """
    centres = find_map_centres(maps, diameter, settings)
    grid, last = maps.grid, settings.classes - 1
    labels = np.zeros(grid.source, np.int32)
    areas = np.zeros(grid.source, np.uint8) if len(settings.things) < last else None
    sums = np.zeros((len(settings.things), len(centres) + 1))
    unassigned = 0
    rows = max(1, SLAB // max(1, int(np.prod(grid.source[1:]))))
    for start in range(0, grid.source[0], rows):
        stop = min(grid.source[0], start + rows)
        slab = read_slab(maps.values, grid, start, stop)
        inside = thing_probability(slab, settings) >= settings.threshold
        origin = (start, *[0] * (labels.ndim - 1))
        moved, reach = slab[last + 1 :], settings.reach * diameter
        grouped = group_votes(inside, moved, centres, grid.source_spacing, reach, "drop", origin=origin)
        labels[start:stop] = grouped.labels
        owner = grouped.labels.ravel()
        for row, value in enumerate(settings.things):
            sums[row] += np.bincount(owner, slab[value - 1].ravel(), minlength=sums.shape[1])
        unassigned += grouped.unassigned
        if areas is not None:
            areas[start:stop] = most_probable_area(slab[:last], settings)
    return _clean(labels, sums, areas, unassigned, diameter, settings, grid)


def thing_probability(values: FloatArray, settings: CentreSettings) -> FloatArray:
    """Return the probability that a voxel belongs to an object of whatever class, of :class:`Maps` values."""
    first, *others = settings.things
    total: FloatArray = values[first - 1]
    for value in others:
        total = total + values[value - 1]
    return total


def most_probable_area(probabilities: FloatArray, settings: CentreSettings) -> IntArray:
    """Return the most probable of background and stuff, uint8, of probabilities (classes - 1, *shape)."""
    best = 1 - probabilities.sum(axis=0, dtype=np.float32)
    result = np.zeros(best.shape, np.uint8)
    for value in range(1, settings.classes):
        if value not in settings.things:
            better = probabilities[value - 1] > best
            best = np.where(better, probabilities[value - 1], best)
            result[better] = value
    return result


def find_map_centres(maps: Maps, diameter: float, settings: CentreSettings) -> FloatArray:
    """Return where votes agree, (K, n) physical; votes from deep inside of an object count more."""
    grid = maps.grid
    distance = settings.classes - 1
    inside = thing_probability(maps.values, settings) >= settings.threshold
    weights = np.clip(maps.values[distance].astype(np.float32), 0.1, 1)
    typical = usual_content(diameter, len(grid.shape)) / float(np.prod(grid.spacing))
    return find_centres(
        inside,
        maps.values[distance + 1 :],
        grid.spacing,
        settings.sigma * diameter,
        weights,
        settings.least_votes * typical,
    )


def usual_content(diameter: float, dimensions: int) -> float:
    """Return the area of a disc or the volume of a ball."""
    return float(np.pi / 4 * diameter**2 if dimensions == 2 else np.pi / 6 * diameter**3)


def _clean(
    labels: IntArray,
    sums: FloatArray,
    areas: IntArray | None,
    unassigned: int,
    diameter: float,
    settings: CentreSettings,
    grid: Grid,
) -> Found:
    """Keep the largest part of each object, drop the small and the unlikely, and number the rest.

    Parameters
    ----------
    sums : (things, objects + 1) probability of each thing, added up over the voxels of each object
    """
    scores = sums.sum(axis=0) / np.maximum(np.bincount(labels.ravel(), minlength=sums.shape[1]), 1)
    dropped = [Dropped(FAR, 0, unassigned)] if unassigned else []
    labels, apart = largest_parts(labels)
    if apart.count:
        dropped.append(apart)
    sizes = np.bincount(labels.ravel(), minlength=len(scores))
    least = (
        settings.least_content * usual_content(diameter, labels.ndim) / float(np.prod(grid.source_spacing))
    )
    small = (sizes > 0) & (sizes < least)
    unlikely = (sizes > 0) & ~small & (scores < settings.least_score)
    for rule, wrong in ((f"smaller than {least:.1f} voxels", small), ("low score", unlikely)):
        wrong[0] = False
        if wrong.any():
            dropped.append(Dropped(rule, int(wrong.sum()), int(sizes[wrong].sum())))
    kept = (sizes > 0) & ~small & ~unlikely
    kept[0] = False
    table = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    found = np.asarray(scores[kept], np.float32)
    values = np.array(settings.things, np.int64)[sums[:, kept].argmax(axis=0)]
    return Found(table[labels], found, diameter, unassigned, tuple(dropped), values, areas)


def largest_parts(labels: IntArray) -> tuple[IntArray, Dropped]:
    """Return a label map in which every object is connected, by faces, edges or corners.

    Parts that do not hang together with the largest of their object are left out; of equally large ones the
    first is kept.
    """
    parts = cc3d.connected_components(labels, connectivity=26 if labels.ndim == 3 else 8)
    sizes = np.bincount(parts.ravel())
    owner = np.zeros(len(sizes), np.int64)
    owner[parts.ravel()] = labels.ravel()
    order = np.lexsort((np.arange(len(sizes)), -sizes, owner))
    first = np.ones(len(sizes), bool)
    first[1:] = owner[order][1:] != owner[order][:-1]
    keep = np.zeros(len(sizes), bool)
    keep[order[first]] = True
    lost = ~keep & (owner > 0)
    result = np.where(keep, owner, 0).astype(np.int32)[parts]
    return result, Dropped("parts apart from their object", int(lost.sum()), int(sizes[lost].sum()))


def channels_first(image: Array, dimensions: int, channel_axis: int | None = None) -> Array:
    """Return an image as (channel, *shape).

    Parameters
    ----------
    image : with as many axes as `dimensions`, or one more of channels
        Without `channel_axis`, that is the last one if it has 3 or 4, else the first one if it has at most 4.

    Raises
    ------
    ConfigError
        It has another number of axes, or which is that of channels cannot be told.
    """
    if image.ndim == dimensions:
        return image[None]
    if image.ndim != dimensions + 1:
        raise ConfigError(
            f"image of {image.ndim} axes: the model takes {dimensions}, and one of channels. Choose a slice, "
            "a channel, or another model."
        )
    if channel_axis is None:
        last, first = image.shape[-1] in (3, 4), image.shape[0] <= 4
        if not last and not first:
            raise ConfigError(
                f"image {image.shape}: no axis of 1 to 4 channels. Say which it is (channel_axis)."
            )
        channel_axis = -1 if last else 0
    return np.moveaxis(image, channel_axis, 0)


def prepare_image(image: Array, network: CentreNetwork, channel_axis: int | None = None) -> FloatArray:
    """Return an image as the network is shown it, (channels, *shape) float32, on its own voxels."""
    shown = one_if_equal(channels_first(image, network.dimensions, channel_axis))
    shown = normalise(shown, network.settings.percentiles)
    return np.asarray(set_channels(shown, network.channels), np.float32)
