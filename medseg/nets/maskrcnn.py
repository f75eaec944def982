"""Mask R-CNN in two and three dimensions from one code: proposals, boxes, classes, masks, landmarks.

He et al., Mask R-CNN (ICCV 2017) on a feature pyramid (Lin et al., FPN, CVPR 2017) over the planned U-Net's
encoder. Images go in as ``(n, c, *patch)``, objects as label maps of the same grid: boxes and masks are made
of them here, so that no transform ever has to touch a box.

In a label map 0 is background, and object k (from 0) of class c (from 0) has the value
``1 + c + n_classes * k``; with one class any positive values will do. See :func:`class_of`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.geometry.boxes import label_boxes
from medseg.nets.boxes import (
    box_sizes,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms_per_class,
)
from medseg.nets.matching import match_atss, match_iou, sample_hard, sample_random
from medseg.nets.roi_align import crop_masks, roi_align_levels
from medseg.nets.unet import PlainEncoder, ResidualEncoder, _initialize
from medseg.types import Shape

if TYPE_CHECKING:
    from medseg.plan.detection import Detection
    from medseg.plan.schema import Architecture

_CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL = {2: F.max_pool2d, 3: F.max_pool3d}

WEIGHTED = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Codes of the box head count ten and five times, as Fast R-CNN has them (the inverse of standard deviations).
HEAD_WEIGHTS = (10.0, 5.0)
# Where the smooth L1 loss turns from a parabola into a line (Faster R-CNN's code: sigma = 3).
BETA = 1 / 9
# A box with a side below this has no inside.
LEAST_SIDE = 1e-3


def class_of(values: Tensor, n_classes: int) -> Tensor:
    """Return the class, from 0, of values of a label map.

    >>> class_of(torch.tensor([1, 2, 3, 4]), 2).tolist()
    [0, 1, 0, 1]
    """
    return (values - 1) % n_classes


@dataclass(frozen=True, eq=False)
class Objects:
    """What there is to find in one image.

    Attributes
    ----------
    labels : (*shape) integers
    values : (g,) int64, of each object in `labels`
    boxes : (g, 2d) float32
    classes : (g,) int64, from 0
    points : (g, landmarks, d) in edge coordinates, NaN where there is none; None without landmarks
    dropped : int
        Objects with too few voxels, which are left out.
    """

    labels: Tensor
    values: Tensor
    boxes: Tensor
    classes: Tensor
    points: Tensor | None = None
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, best first.

    Attributes
    ----------
    boxes : (k, 2d) float32
    scores : (k,) probability of the class
    classes : (k,) int64, from 0
    masks : (k, *cells) float32, probability of each cell of the box
    points : (k, landmarks, d), or None
    limited : bool
        More were found than the settings allow to keep.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor
    points: Tensor | None = None
    limited: bool = False


def list_objects(
    labels: Tensor, n_classes: int, least_voxels: int = 1, points: Tensor | None = None
) -> Objects:
    """Make boxes and classes of a label map (*shape).

    Parameters
    ----------
    least_voxels : objects of fewer are left out, and counted
    points : (largest value + 1, landmarks, d), by value
    """
    array = labels.cpu().numpy()
    values, boxes = label_boxes(array)
    sizes = np.unique(array, return_counts=True)[1][-len(values) :] if len(values) else values
    kept = sizes >= least_voxels
    found = torch.from_numpy(values[kept].astype(np.int64)).to(labels.device)
    return Objects(
        labels=labels,
        values=found,
        boxes=torch.from_numpy(boxes[kept]).to(labels.device),
        classes=class_of(found, n_classes),
        points=None if points is None else points.to(labels.device)[found],
        dropped=int(np.count_nonzero(~kept)),
    )


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Convolve, in float32 where half precision on a CPU would learn from a wrong gradient.

    oneDNN 3.12 (torch 2.13) gives the weights of a 3 x 3 x 3 convolution in bfloat16 a gradient of rubbish,
    or NaN, where the first axis has two voxels, and nowhere else; small top levels are such.
    """
    if x.ndim == 5 and x.shape[2] == 2 and x.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, conv(x.float()))
    return cast(Tensor, conv(x))


class Pyramid(nn.Module):
    """Features of every level with the coarser ones added, all of the same width (Lin et al., 2017)."""

    def __init__(self, features: Sequence[int], channels: int, dimensions: int, extra: bool) -> None:
        super().__init__()
        conv = _CONV[dimensions]
        self.lateral = nn.ModuleList(conv(width, channels, 1) for width in features)
        self.smooth = nn.ModuleList(conv(channels, channels, 3, padding=1) for _ in features)
        self.pool = _POOL[dimensions] if extra else None

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return levels, finest first; the extra one last."""
        sums = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for level in range(len(sums) - 2, -1, -1):
            sums[level] = sums[level] + F.interpolate(sums[level + 1], sums[level].shape[2:])
        levels = [convolve(smooth, x) for smooth, x in zip(self.smooth, sums, strict=True)]
        return levels if self.pool is None else [*levels, self.pool(levels[-1], 1, 2)]


class ProposalHead(nn.Module):
    """Whether each anchor is an object, and the code of its box; one set of weights for all levels."""

    def __init__(self, channels: int, anchors: int, dimensions: int) -> None:
        super().__init__()
        conv = _CONV[dimensions]
        self.anchors, self.codes = anchors, 2 * dimensions
        self.conv = conv(channels, channels, 3, padding=1)
        self.score = conv(channels, anchors, 1)
        self.box = conv(channels, anchors * self.codes, 1)

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return for each level logits (n, cells * anchors) and codes (n, cells * anchors, 2d)."""
        result = []
        for level in levels:
            x = F.relu(convolve(self.conv, level))
            scores, codes = self.score(x).float(), self.box(x).float()
            n = len(x)
            scores = scores.movedim(1, -1).reshape(n, -1)
            result.append((scores, codes.movedim(1, -1).reshape(n, -1, self.codes)))
        return result


class BoxHead(nn.Module):
    """Class (0 is background) and one box code a class, from the features of a region."""

    def __init__(self, channels: int, cells: Shape, width: int, n_classes: int) -> None:
        super().__init__()
        self.codes = 2 * len(cells)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * int(np.prod(cells)), width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
        )
        self.score = nn.Linear(width, n_classes + 1)
        self.box = nn.Linear(width, n_classes * self.codes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(k, c, *cells) to logits (k, classes + 1) and codes (k, classes, 2d)."""
        x = self.layers(x)
        return self.score(x).float(), self.box(x).float().view(len(x), -1, self.codes)


class CellHead(nn.Module):
    """Convolutions, twice the resolution, and a map a class (masks) or landmark."""

    def __init__(self, channels: int, width: int, convs: int, outputs: int, dimensions: int) -> None:
        super().__init__()
        conv, up = _CONV[dimensions], _UP[dimensions]
        layers: list[nn.Module] = []
        for number in range(convs):
            layers += [conv(width if number else channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, up(width, width, 2, 2), nn.ReLU(inplace=True))
        self.maps = conv(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(k, c, *cells) to logits (k, outputs, *2 cells)."""
        return cast(Tensor, self.maps(self.layers(x))).float()


class MaskRCNN(nn.Module):
    """Finds objects and draws their masks.

    Attributes
    ----------
    settings : anchors, samples, thresholds
    strides : of each level, the extra one too, image voxels a cell and axis
    """

    def __init__(self, architecture: "Architecture", settings: "Detection", in_channels: int) -> None:
        super().__init__()
        n = architecture.dimensions
        kinds = {"unet": PlainEncoder, "resenc-unet": ResidualEncoder}
        self.settings, self.strides = settings, level_strides(architecture, settings)
        self._made: tuple[object, list[Tensor]] | None = None
        self.encoder = kinds[architecture.network](in_channels, architecture)
        self.encoder.apply(_initialize)
        width, heads, classes = settings.pyramid_channels, settings.heads, settings.n_classes
        features = architecture.features_per_stage[settings.finest_stage :]
        self.pyramid = Pyramid(features, width, n, settings.extra_level)
        self.proposal = ProposalHead(width, len(settings.anchors[0]), n)
        self.box = BoxHead(width, heads.box_cells, heads.width, classes)
        self.mask = CellHead(width, heads.mask_channels, heads.mask_convs, classes, n)
        self.landmark: CellHead | None = None
        if heads.landmarks:
            self.landmark = CellHead(width, heads.mask_channels, heads.mask_convs, heads.landmarks, n)
        self._begin()

    def _begin(self) -> None:
        """Small weights where a score or a code comes out, Kaiming's elsewhere (Detectron's choice)."""
        for part in (self.pyramid, self.proposal, self.box, self.mask, self.landmark):
            for module in () if part is None else part.modules():
                if isinstance(
                    module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
                ):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(cast(Tensor, module.bias))
        for module, deviation in (
            (self.proposal.score, 0.01),
            (self.proposal.box, 0.01),
            (self.box.score, 0.01),
            (self.box.box, 0.001),
            (self.mask.maps, 0.01),
        ):
            nn.init.normal_(cast(Tensor, module.weight), std=deviation)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        points: Tensor | None = None,
    ) -> "dict[str, Tensor] | list[Detections]":
        """Return the losses of a batch, or without `labels` what is found in it.

        Parameters
        ----------
        images : (n, c, *patch)
        labels : (n, *patch) integers, values as the module says
        generator : of the CPU; decides which anchors and regions a step learns from
        points : (n, largest value + 1, landmarks, d), by value, NaN where there is none

        Returns
        -------
        dict of scalars, or one :class:`Detections` an image
        """
        levels = self.pyramid(self.encoder(images)[self.settings.finest_stage :])
        scored = self.proposal(levels)
        anchors = self._anchors(levels)
        shape = tuple(images.shape[2:])
        proposals = self._propose(scored, anchors, shape, training=labels is not None)
        if labels is None:
            return [self._find([x[k] for x in levels], boxes, shape) for k, boxes in enumerate(proposals)]
        settings = self.settings
        objects = [
            list_objects(
                each, settings.n_classes, settings.least_voxels, None if points is None else points[k]
            )
            for k, each in enumerate(labels)
        ]
        generator = generator or torch.Generator().manual_seed(0)
        losses = self._proposal_losses(scored, anchors, objects, generator)
        return losses | self._head_losses(levels, proposals, objects, generator)

    def _anchors(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of every level; those of the last shapes are kept."""
        shapes = tuple(tuple(level.shape[2:]) for level in levels)
        if self._made is None or self._made[0] != (shapes, levels[0].device):
            rows = zip(shapes, self.strides, self.settings.anchors, strict=True)
            made = [make_anchors(*row).to(levels[0].device) for row in rows]
            self._made = ((shapes, levels[0].device), made)
        return self._made[1]

    def _propose(
        self, scored: list[tuple[Tensor, Tensor]], anchors: list[Tensor], shape: Shape, training: bool
    ) -> list[Tensor]:
        """Return for each image the boxes that the heads look at, best first."""
        settings = self.settings.proposals
        most = settings.candidates_train if training else settings.candidates_test
        kept = settings.proposals_train if training else settings.proposals_test
        result = []
        for image in range(len(scored[0][0])):
            boxes, scores, level_of = [], [], []
            for level, ((logits, codes), of_level) in enumerate(zip(scored, anchors, strict=True)):
                best = logits[image].detach().topk(min(most, logits.shape[1]))
                boxes.append(decode_boxes(codes[image].detach()[best.indices], of_level[best.indices]))
                scores.append(best.values)
                level_of.append(torch.full_like(best.indices, level))
            together, score = clip_boxes(torch.cat(boxes), shape), torch.cat(scores)
            real = torch.nonzero((box_sizes(together) >= LEAST_SIDE).all(1))[:, 0]
            together, score = together[real], score[real]
            chosen = nms_per_class(together, score, torch.cat(level_of)[real], settings.nms)[:kept]
            result.append(together[chosen])
        return result

    def _proposal_losses(
        self,
        scored: list[tuple[Tensor, Tensor]],
        levels: list[Tensor],
        objects: list[Objects],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        anchors = torch.cat(levels)
        logits, codes = (torch.cat([part[k] for part in scored], 1) for k in (0, 1))
        score, box = logits.sum() * 0, codes.sum() * 0  # where nothing is drawn, a zero with a graph
        drawn = 0
        for image, each in enumerate(objects):
            matches = self._match(each.boxes, levels)
            positive, negative = self._draw(matches, logits[image].detach(), generator)
            chosen = torch.cat((positive, negative))
            wanted = (matches[chosen] >= 0).to(logits.dtype)
            score = score + F.binary_cross_entropy_with_logits(logits[image, chosen], wanted, reduction="sum")
            goal = encode_boxes(each.boxes[matches[positive]], anchors[positive])
            box = box + F.smooth_l1_loss(codes[image, positive], goal, reduction="sum", beta=BETA)
            drawn += len(chosen)
        return {"proposal": score / max(1, drawn), "proposal_box": box / max(1, drawn)}

    def _match(self, boxes: Tensor, levels: list[Tensor]) -> Tensor:
        """Return which object each anchor stands for."""
        settings, anchors = self.settings.proposals, torch.cat(levels)
        if settings.matcher == "iou":
            return match_iou(boxes, anchors, settings.high, settings.low)
        return match_atss(boxes, anchors, tuple(map(len, levels)), len(self.settings.anchors[0]))

    def _draw(self, matches: Tensor, scores: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the anchors that this step learns from."""
        settings = self.settings.proposals
        if settings.sampler == "random":
            return sample_random(matches, settings.samples, settings.positive_fraction, generator)
        return sample_hard(matches, scores, settings.samples, settings.positive_fraction, generator)

    def _head_losses(
        self,
        levels: list[Tensor],
        proposals: list[Tensor],
        objects: list[Objects],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        regions = [
            self._sample(boxes, each, generator) for boxes, each in zip(proposals, objects, strict=True)
        ]
        heads, settings = self.settings.heads, self.settings
        features = self._read(levels, [region.boxes for region in regions], heads.box_cells)
        logits, codes = self.box(features)
        kinds = torch.cat([region.classes for region in regions])
        losses = {
            "class": _mean_or_zero(F.cross_entropy(logits, kinds, reduction="sum"), logits, len(kinds)),
            "box": heads.box_weight * _box_loss(codes, regions, objects),
        }
        found = [region.boxes[region.classes > 0] for region in regions]
        cells = self._read(levels, found, heads.mask_cells)
        goals = [
            crop_masks(each.labels, each.values[region.owners], boxes, settings.mask_shape)
            for each, region, boxes in zip(objects, regions, found, strict=True)
        ]
        losses["mask"] = mask_loss(self.mask(cells), torch.cat(goals) >= 0.5, kinds[kinds > 0] - 1)
        if self.landmark is not None:
            points = [
                locate_points(each.points[region.owners], boxes, settings.mask_shape)
                for each, region, boxes in zip(objects, regions, found, strict=True)
                if each.points is not None
            ]
            maps = self.landmark(cells)
            losses["landmark"] = landmark_loss(maps, torch.cat(points)) if points else maps.sum() * 0
        return losses

    def _sample(self, proposals: Tensor, objects: Objects, generator: torch.Generator) -> "_Regions":
        """Draw the regions of an image that the heads learn from; the objects' own boxes are among them."""
        heads = self.settings.heads
        boxes = torch.cat((proposals, objects.boxes))
        matches = match_iou(objects.boxes, boxes, heads.high, heads.low, low_quality=False)
        positive, negative = sample_random(matches, heads.samples, heads.positive_fraction, generator)
        owners = matches[positive]
        background = torch.zeros_like(negative)
        classes = torch.cat((objects.classes[owners] + 1, background))
        return _Regions(boxes[torch.cat((positive, negative))], classes, owners)

    def _read(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], cells: Shape) -> Tensor:
        """Return features (k, c, *cells) of the regions of all images, each from its level."""
        own = levels[: len(self.pyramid.lateral)]
        parts = [
            roi_align_levels(
                [level[image] for level in own], some, self.assign(some), self.strides[: len(own)], cells
            )
            for image, some in enumerate(boxes)
        ]
        return torch.cat(parts)

    def assign(self, boxes: Tensor) -> Tensor:
        """Return the level (k,) whose anchors are nearest in size, by the geometric mean in the plane."""
        anchors = self.settings.anchors[: len(self.pyramid.lateral)]
        sides = [torch.tensor([size[-2:] for size in level]) for level in anchors]
        typical = torch.stack([side.log2().mean() for side in sides]).to(boxes)
        n = boxes.shape[1] // 2
        own = box_sizes(boxes)[:, n - 2 :].clamp(min=LEAST_SIDE).log2().mean(1)
        return (own[:, None] - typical).abs().argmin(1)

    def _find(self, levels: list[Tensor], proposals: Tensor, shape: Shape) -> Detections:
        """Return the objects of one image; `levels` are (c, *shape) each."""
        find, heads = self.settings.find, self.settings.heads
        batch = [level[None] for level in levels]
        logits, codes = self.box(self._read(batch, [proposals], heads.box_cells))
        probability = logits.softmax(1)[:, 1:]
        boxes = decode_boxes(codes, proposals[:, None].expand(codes.shape), HEAD_WEIGHTS)
        boxes = clip_boxes(boxes, shape)
        likely = (probability > find.score) & (box_sizes(boxes) >= LEAST_SIDE).all(-1)
        region, classes = torch.nonzero(likely, as_tuple=True)
        boxes, scores = boxes[region, classes], probability[region, classes]
        every = nms_per_class(boxes, scores, classes, find.nms)
        kept = every[: find.detections]
        boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        cells = self._read(batch, [boxes], heads.mask_cells)
        masks = self.mask(cells)[torch.arange(len(kept), device=boxes.device), classes].sigmoid()
        points = None if self.landmark is None else place_points(self.landmark(cells), boxes)
        return Detections(boxes, scores, classes, masks, points, len(every) > len(kept))


@dataclass(frozen=True, eq=False)
class _Regions:
    """Regions of one image, objects first.

    Attributes
    ----------
    boxes : (k, 2d)
    classes : (k,) 0 is background
    owners : (positive,) index of the object of each of the first
    """

    boxes: Tensor
    classes: Tensor
    owners: Tensor


def level_strides(architecture: "Architecture", settings: "Detection") -> tuple[tuple[int, ...], ...]:
    """Return image voxels a cell and axis of every level, the extra one too."""
    total = np.cumprod(np.array(architecture.strides), axis=0)[settings.finest_stage :]
    levels = [tuple(int(n) for n in row) for row in total]
    return (*levels, tuple(2 * n for n in levels[-1])) if settings.extra_level else tuple(levels)


def make_anchors(shape: Shape, stride: Sequence[float], sizes: Sequence[Sequence[float]]) -> Tensor:
    """Return anchors (cells * sizes, 2d) of a level: around the centre of every cell, sizes innermost.

    >>> make_anchors((1, 2), (4, 4), [(2, 6)]).tolist()
    [[1.0, -1.0, 3.0, 5.0], [1.0, 3.0, 3.0, 9.0]]
    """
    axes = [(torch.arange(n) + 0.5) * step for n, step in zip(shape, stride, strict=True)]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, len(shape))
    half = torch.tensor(sizes, dtype=torch.float32)[None] / 2
    anchors = torch.cat((centres - half, centres + half), -1).reshape(-1, 2 * len(shape))
    return anchors.T.contiguous().T  # what reads them does so an edge at a time


def _mean_or_zero(total: Tensor, outputs: Tensor, count: int) -> Tensor:
    """Return a mean that is a zero with a graph where nothing is summed."""
    return total / count if count else outputs.sum() * 0


def _box_loss(codes: Tensor, regions: Sequence[_Regions], objects: Sequence[Objects]) -> Tensor:
    """Return the smooth L1 loss of the codes (k, classes, 2d): of objects, and of their true class, only."""
    kinds = torch.cat([region.classes for region in regions])
    positive = torch.nonzero(kinds > 0)[:, 0]
    goals = [
        encode_boxes(each.boxes[region.owners], region.boxes[region.classes > 0], HEAD_WEIGHTS)
        for region, each in zip(regions, objects, strict=True)
    ]
    own = codes[positive, kinds[positive] - 1]
    total = F.smooth_l1_loss(own, torch.cat(goals).to(own), reduction="sum", beta=BETA)
    return total / max(1, len(kinds)) + codes.sum() * 0


def mask_loss(logits: Tensor, goals: Tensor, classes: Tensor) -> Tensor:
    """Return the mean binary cross entropy of the true class's mask; others' masks do not compete with it.

    Parameters
    ----------
    logits : (k, classes, *cells)
    goals : (k, *cells) bool
    classes : (k,) from 0
    """
    if not len(logits):
        return logits.sum() * 0
    own = logits[torch.arange(len(logits), device=logits.device), classes]
    return F.binary_cross_entropy_with_logits(own, goals.to(own))


def locate_points(points: Tensor, boxes: Tensor, cells: Shape) -> Tensor:
    """Return the cell (k, landmarks) that each point (k, landmarks, d) is in, counted in raster order.

    -1 where there is no point, or it lies outside of the box (k, 2d).
    """
    low, high = boxes.chunk(2, -1)
    place = (points - low[:, None]) / (high - low)[:, None]
    inside = ((place >= 0) & (place < 1)).all(-1)  # False for NaN
    size = torch.tensor(cells, device=boxes.device)
    index = torch.nan_to_num(place * size).long().clamp(min=0)
    flat = torch.zeros_like(index[..., 0])
    for axis, count in enumerate(cells):
        flat = flat * count + index[..., axis]
    return torch.where(inside, flat, -1)


def landmark_loss(logits: Tensor, cells: Tensor) -> Tensor:
    """Return the cross entropy over all cells of each map (k, landmarks, *cells), where there is a point."""
    known = cells >= 0
    if not bool(known.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(2)[known], cells[known])


def place_points(logits: Tensor, boxes: Tensor) -> Tensor:
    """Return the centre (k, landmarks, d) of each map's best cell, in image coordinates."""
    k, landmarks = logits.shape[:2]
    best = logits.flatten(2).argmax(2) if len(logits) else logits.new_zeros((k, landmarks)).long()
    parts = []
    for count in reversed(logits.shape[2:]):
        parts.append((best % count + 0.5) / count)
        best = best // count
    low, high = boxes.chunk(2, -1)
    return low[:, None] + torch.stack(parts[::-1], -1) * (high - low)[:, None]
