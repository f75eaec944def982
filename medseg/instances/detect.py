"""A detector over a whole volume: tiles, boxes of several tiles made one, masks in one label map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg import log
from medseg.bundle import Bundle
from medseg.errors import BundleError
from medseg.geometry.orient import from_ras, reads_as_ras
from medseg.geometry.tiles import pad_to, tile_slices
from medseg.infer import choose_device
from medseg.instances.dropped import Dropped
from medseg.instances.paste import Pasted, paste_masks
from medseg.instances.scale import with_spacing
from medseg.io.channels import set_channels
from medseg.nets.boxes import Clusters, box_centres, box_sizes, clip_boxes, cluster_boxes
from medseg.plan.detection import Detection, FindSettings
from medseg.preprocess import preprocess
from medseg.preprocess.record import Record
from medseg.types import FloatArray, IntArray, Shape
from medseg.volume import Geometry, Volume

if TYPE_CHECKING:
    from medseg.nets.maskrcnn import Detections, MaskRCNN

# Voxels of all tiles that go through the network at once.
BATCH_VOXELS = {"cpu": 1 << 18, "cuda": 1 << 22}
# nnDetection's weight of a box by its place in the tile: a Gaussian of 0.8 half tiles, a mean over axes.
PLACE_SIGMA = 0.8
# Masks that are moved at a time.
MASKS = 2048
# A box this near to the end of its tile, in voxels, is taken for cut by it.
CUT_MARGIN = 1.0


@dataclass(frozen=True, eq=False)
class Found:
    """Objects of one grid, best first.

    Attributes
    ----------
    shape : of the grid
    boxes : (k, 2d) float32
    scores : (k,) float32
    classes : (k,) int64, from 0
    masks : (k, *cells) float32, probability of each cell of the box
    limited : tiles in which more was found than the settings keep
    narrow : boxes left out because a side is shorter than the settings allow
    """

    shape: Shape
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor
    limited: int = 0
    narrow: int = 0

    def above(self, score: float) -> "Found":
        """Return the objects of at least this score."""
        sure = self.scores >= score
        parts = (self.boxes[sure], self.scores[sure], self.classes[sure], self.masks[sure])
        return replace(self, boxes=parts[0], scores=parts[1], classes=parts[2], masks=parts[3])

    def at_least(self, side: float) -> "Found":
        """Return the objects whose boxes have no shorter side, in voxels."""
        wide = (box_sizes(self.boxes) >= side).all(1)
        parts = (self.boxes[wide], self.scores[wide], self.classes[wide], self.masks[wide])
        return Found(self.shape, *parts, self.limited, self.narrow + int((~wide).sum()))

    def on(self, shape: Shape) -> "Found":
        """Return the same on another grid of the same field: boxes scaled."""
        factors = [new / old for new, old in zip(shape, self.shape, strict=True)]
        return replace(self, shape=shape, boxes=self.boxes * self.boxes.new_tensor([*factors, *factors]))


@dataclass(frozen=True, eq=False)
class ObjectMap:
    """Objects of one image on its own grid.

    Attributes
    ----------
    volume : Volume
        One channel of int32, 0 is background; the objects are 1 to k, best first (of a 2D network slice
        after slice).
    scores : (k,) float32
    classes : (k,) int64, values of the label set
    dropped : several Dropped
    limited : tiles in which more was found than the settings keep
    """

    volume: Volume
    scores: FloatArray
    classes: IntArray
    dropped: tuple[Dropped, ...]
    limited: int


class Detector:
    """A trained detector, ready to find objects.

    Attributes
    ----------
    finding : FindSettings
        How detections become objects: the plan's, with what the bundle's validation chose.

    Parameters
    ----------
    bundle : with a detector
    device : auto, cpu, cuda or mps
    fold : whose weights; by default the first's
    step : distance of tiles as a part of the patch

    Raises
    ------
    BundleError
        The bundle holds no detector, no weights, or not this fold.
    """

    def __init__(
        self, bundle: Bundle, device: str = "auto", fold: str | None = None, step: float = 0.5
    ) -> None:
        settings = bundle.settings.detection
        if settings is None:
            raise BundleError(f"{bundle}: segments, and finds no objects. Use medseg predict.")
        if not bundle.folds:
            raise BundleError(f"{bundle}: has no weights yet. Train at least one fold.")
        self.bundle, self.step, self.device = bundle, step, choose_device(device)
        self.settings: Detection = settings
        network = bundle.network(fold or bundle.folds[0]).to(self.device)
        self.network = cast("MaskRCNN", network)
        self.finding = settings.find.replace(**bundle.card.get("find", {}))

    @property
    def score(self) -> float:
        """Least score of an object: what the bundle's validation chose, else that of the settings."""
        return float(self.bundle.card.get("score", self.settings.find.score))

    def find(self, image: Volume, score: float | None = None) -> ObjectMap:
        """Find the objects of an image, on its own grid.

        Parameters
        ----------
        score : least score of an object; :attr:`score` by default

        Raises
        ------
        PlanError, DataError
            The image does not fit the model.
        """
        found, record = self.detect(image)
        return self.draw(image.geometry, found, record, self.score if score is None else score)

    def detect(self, image: Volume) -> tuple[list[Found], Record]:
        """Return all objects of an image of whatever score, and how it was preprocessed.

        One :class:`Found` in 3D, one a slice of the first network axis in 2D, on the cropped source grid.
        """
        candidates, record = self.look(image)
        return self.join(candidates, record), record

    def look(self, image: Volume) -> tuple[list["Candidates"], Record]:
        """Return what :meth:`join` makes objects of, for each part of an image as :meth:`detect` has them."""
        ready = preprocess(self._as_trained(image), self.bundle.plan, self.bundle.configuration)
        dims, patch = self.settings.dimensions, self.bundle.settings.patch_size
        parts = [ready.data] if dims == 3 else [ready.data[:, k] for k in range(ready.data.shape[1])]
        seen = [
            see_objects(self.network, data, patch, self.device, self.step)
            for data in log.progress(parts, "Finding objects")
        ]
        return seen, ready.record

    def _as_trained(self, image: Volume) -> Volume:
        """Return an image with the channels of the training's, and in pixels where those had no scale."""
        channels, pixels = self.bundle.card.get("channels"), self.bundle.card.get("pixels", False)
        if channels is not None:
            image = image.with_array(set_channels(image.array, int(channels)))
        return with_spacing(image, (1.0,), "mm") if pixels else image

    def join(self, candidates: Sequence["Candidates"], record: Record) -> list[Found]:
        """Make one object of what tiles agree on, on the cropped source grid; by :attr:`finding`."""
        shape = record.cropped_shape[3 - self.settings.dimensions :]
        return [each.join(self.finding).on(shape) for each in candidates]

    def draw(self, grid: Geometry, found: Sequence[Found], record: Record, score: float) -> ObjectMap:
        """Return the objects that :meth:`detect` found, of at least this score, on the image's grid."""
        sure = [each.above(score) for each in found]
        pasted = [_paste(each, self.finding) for each in sure]
        array = np.zeros((1, *record.geometry.shape), np.int32)
        inner = record.to_network(array)[record.inner][0]
        count = 0
        for number, part in enumerate(pasted):
            target = inner if self.settings.dimensions == 3 else inner[number]
            np.copyto(target, part.labels + count * (part.labels > 0))
            count += len(part.order)
        volume = Volume(array, record.geometry)
        if reads_as_ras(self.bundle.plan.reader):
            volume = from_ras(volume, grid)
        elif volume.shape == grid.shape:  # the same, or that of a picture which was told its scale
            volume = Volume(volume.array, grid, volume.notes)
        pairs = list(zip(sure, pasted, strict=True))
        kinds = np.array(self.bundle.labels.foreground_values, np.int64)
        return ObjectMap(
            volume=volume,
            scores=np.concatenate([each.scores.numpy()[part.order] for each, part in pairs]),
            classes=kinds[np.concatenate([each.classes.numpy()[part.order] for each, part in pairs])],
            dropped=_dropped(found, sure, pasted, score, self.finding.least_side),
            limited=sum(each.limited for each in found),
        )


def _paste(found: Found, settings: FindSettings) -> Pasted:
    return paste_masks(found.boxes, found.masks, found.scores, found.shape, settings.mask)


def _dropped(
    found: Sequence[Found], sure: Sequence[Found], pasted: Sequence[Pasted], score: float, side: float
) -> tuple[Dropped, ...]:
    """Sum what was left out over slices; boxes of too low a score have no mask on the grid yet."""
    unsure = sum(len(a.scores) - len(b.scores) for a, b in zip(found, sure, strict=True))
    total: dict[str, Dropped] = {}
    for each in (d for part in pasted for d in part.dropped):
        before = total.get(each.rule, Dropped(each.rule, 0, 0))
        total[each.rule] = Dropped(each.rule, before.count + each.count, before.voxels + each.voxels)
    narrow = sum(each.narrow for each in found)
    first = [Dropped(f"box with a side below {side:g} voxels", narrow, 0)] if narrow else []
    first += [Dropped(f"score below {score:g}", unsure, 0)] if unsure else []
    return (*first, *total.values())


def find_objects(
    network: "MaskRCNN",
    data: FloatArray,
    patch: Shape,
    settings: FindSettings,
    device: torch.device,
    step: float = 0.5,
) -> Found:
    """Find the objects of a preprocessed image; parameters as for :func:`see_objects`, and the settings."""
    return see_objects(network, data, patch, device, step).join(settings)


def see_objects(
    network: "MaskRCNN", data: FloatArray, patch: Shape, device: torch.device, step: float = 0.5
) -> "Candidates":
    """Let a detector look at all tiles of a preprocessed image.

    Parameters
    ----------
    network : a detector in evaluation mode
    data : (c, *shape) float32, as many axes as `patch`
    patch : size of a tile
    step : distance of tiles as a part of the patch
    """
    padded, inner = pad_to(data, patch)
    tiles = tile_slices(padded.shape[1:], patch, step)
    source = torch.from_numpy(np.ascontiguousarray(padded))
    size = max(1, BATCH_VOXELS.get(device.type, BATCH_VOXELS["cpu"]) // int(np.prod(patch)))
    seen: list[Detections] = []
    with torch.inference_mode():
        for first in range(0, len(tiles), size):
            log.check_cancelled()
            batch = torch.stack([source[(slice(None), *tile)] for tile in tiles[first : first + size]])
            seen += cast("list[Detections]", network(batch.to(device)))
    starts = tuple(axis.start for axis in inner[1:])
    return Candidates.collect(seen, tiles, padded.shape[1:], data.shape[1:], starts)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Boxes of all tiles, (n, ...) each, in coordinates of the padded image.

    `shape` is that of the image, `inner` where it starts in the padded one.
    """

    shape: Shape
    inner: Shape
    limited: int
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor
    weights: Tensor
    tiles: Tensor
    windows: Tensor
    cut: Tensor
    expected: Tensor

    @classmethod
    def collect(
        cls,
        seen: "Sequence[Detections]",
        tiles: Sequence[tuple[slice, ...]],
        padded: Shape,
        shape: Shape,
        inner: Shape,
    ) -> "Candidates":
        """Collect what was seen in the tiles of a padded image."""
        n = len(padded)
        boxes, weights, numbers, windows = [], [], [], []
        for number, (each, tile) in enumerate(zip(seen, tiles, strict=True)):
            window = torch.tensor([*(s.start for s in tile), *(s.stop for s in tile)], dtype=torch.float32)
            local = each.boxes.float().cpu()
            weights.append(place_weight(local, window[n:] - window[:n]))
            boxes.append(local + torch.cat((window[:n], window[:n])))
            numbers.append(torch.full((len(local),), number))
            windows.append(window.expand(len(local), -1))
        together, window = torch.cat(boxes), torch.cat(windows)
        size = torch.tensor(padded, dtype=torch.float32)
        starts = (together[:, :n] <= window[:, :n] + CUT_MARGIN) & (window[:, :n] > 0)
        stops = (together[:, n:] >= window[:, n:] - CUT_MARGIN) & (window[:, n:] < size)
        return cls(
            shape=shape,
            inner=inner,
            limited=sum(each.limited for each in seen),
            boxes=together,
            scores=torch.cat([each.scores.cpu() for each in seen]),
            classes=torch.cat([each.classes.cpu() for each in seen]),
            masks=torch.cat([each.masks.cpu() for each in seen]),
            weights=torch.cat(weights),
            tiles=torch.cat(numbers),
            windows=window,
            cut=(starts | stops).any(1),
            expected=coverage(together, tiles, padded),
        )

    def join(self, settings: FindSettings) -> Found:
        """Make one object of what tiles agree on.

        Boxes of overlapping tiles are clustered (see `medseg.nets.boxes.cluster_boxes`), and so are their
        masks: averaged on the cluster's box. What a tile cuts is compared with others in what both saw of it.
        """
        found = self.cluster(settings.cluster)
        low = found.boxes.new_tensor(self.inner)
        boxes = clip_boxes(found.boxes - torch.cat((low, low)), self.shape)
        kept = (box_sizes(boxes) > 0).all(1)
        parts = (boxes[kept], found.scores[kept], found.classes[kept], self.fuse(found)[kept])
        return Found(self.shape, *parts, self.limited).at_least(settings.least_side)

    def cluster(self, threshold: float) -> Clusters:
        """Cluster boxes whose IoU is above the threshold."""
        return cluster_boxes(
            self.boxes,
            self.scores,
            self.classes,
            self.weights,
            self.tiles,
            self.expected,
            self.windows,
            self.cut,
            threshold,
        )

    def fuse(self, found: Clusters) -> Tensor:
        """Return the masks (k, *cells) of the clusters."""
        result = self.masks.new_zeros((len(found.scores), *self.masks.shape[1:]))
        if not len(result):
            return result
        members, shares = torch.cat(found.members), torch.cat(found.shares)
        owner = torch.repeat_interleave(torch.tensor([len(each) for each in found.members]))
        for part in torch.split(torch.nonzero(shares > 0)[:, 0], MASKS):
            some, cluster = members[part], owner[part]
            moved = move_masks(self.masks[some], self.boxes[some], found.boxes[cluster])
            weight = shares[part].reshape(-1, *[1] * (moved.ndim - 1))
            result.index_add_(0, cluster, moved * weight)
        return result


def move_masks(masks: Tensor, boxes: Tensor, targets: Tensor) -> Tensor:
    """Read masks (k, *cells) of boxes (k, 2d) under others (k, 2d): 0 outside, as many cells."""
    n = masks.ndim - 1
    low, high = boxes.chunk(2, 1)
    padded = F.pad(masks, [1] * (2 * n))[:, None]
    places, valid = [], torch.ones((len(masks), *[1] * n), dtype=torch.bool)
    for axis, cells in enumerate(masks.shape[1:]):
        cell = ((high[:, axis] - low[:, axis]) / cells).clamp(min=1e-6)[:, None]
        start, stop = ((targets[:, axis + k, None] - low[:, axis, None]) / cell for k in (0, n))
        place = start + (torch.arange(cells) + 0.5) / cells * (stop - start) + 0.5  # in the padded mask
        size = padded.shape[2 + axis]
        shape = [len(masks), *[1] * n]
        shape[1 + axis] = cells
        valid = valid & ((place >= -1) & (place <= size)).view(shape)
        places.append(((2 * place.clamp(0, size - 1) + 1) / size - 1).view(shape).expand(masks.shape))
    grid = torch.stack(places[::-1], -1)  # grid_sample wants the last axis first
    moved = F.grid_sample(padded, grid, "bilinear", "border", align_corners=False)[:, 0] * valid
    same = (boxes == targets).all(1)
    moved[same] = masks[same]
    return moved


def place_weight(boxes: Tensor, patch: Tensor) -> Tensor:
    """Return how much boxes (n, 2d) of a tile count by their place: most in its middle."""
    half = patch / 2
    away = (box_centres(boxes) - half) / (PLACE_SIGMA * half)
    return torch.exp(-0.5 * away**2).mean(1)


def coverage(boxes: Tensor, tiles: Sequence[tuple[slice, ...]], shape: Shape) -> Tensor:
    """Return how many tiles see a box (n, 2d), as a mean over its inside.

    Tiles are all combinations of their starts along each axis, so the mean is a product over axes.
    """
    n = len(shape)
    result = np.ones(len(boxes))
    for axis, size in enumerate(shape):
        count = np.zeros(size)
        for start, stop in {(tile[axis].start, tile[axis].stop) for tile in tiles}:
            count[start:stop] += 1
        total = np.concatenate([[0.0], np.cumsum(count)])
        low, high = (boxes[:, k].double().numpy().clip(0, size) for k in (axis, n + axis))
        inside = np.interp(high, np.arange(size + 1), total) - np.interp(low, np.arange(size + 1), total)
        result *= inside / np.maximum(high - low, 1e-6)
    return torch.from_numpy(result).float()
