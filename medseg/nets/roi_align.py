"""RoIAlign (He et al., Mask R-CNN, ICCV 2017) in two and three dimensions, from ``grid_sample``.

Features are read at points between voxels by (bi- or tri-)linear interpolation, a few points a bin, and
averaged: no coordinate is ever rounded, so a mask is not shifted against its box.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.types import Shape

# Of the samples of all boxes that are read at a time.
SAMPLE_BYTES = 1 << 27


def roi_align(
    features: Tensor,
    boxes: Tensor,
    strides: Sequence[float],
    output: Shape,
    samples: int = 2,
    max_bytes: int = SAMPLE_BYTES,
) -> Tensor:
    """Read the part of a feature map under each box, resampled to `output` cells.

    Parameters
    ----------
    features : (c, *shape) of one image, two or three axes
    boxes : (k, 2d) in image coordinates (edges of voxels); no gradient goes through them
    strides : image voxels a feature voxel, an axis
    output : cells an axis
    samples : points a cell and axis
    max_bytes : boxes are read in groups whose samples need no more than this

    Returns
    -------
    (k, c, *output)

    Notes
    -----
    The aligned form: feature voxel i has its centre at stride * (i + 0.5), so a box is at box / stride -
    0.5. Points up to one voxel outside take the border's value, points beyond are 0 (as in detectron2).
    ``align_corners=False`` divides by the size of an axis, never by size - 1, so one voxel is enough.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    channels, points = features.shape[0], [cells * samples for cells in output]
    size = max(1, channels * math.prod(points) * features.element_size())
    parts = [
        _read(features, some, strides, output, samples)
        for some in torch.split(boxes.detach().to(features), max(1, max_bytes // size))
        if len(some)
    ]
    if not parts:
        return features.new_zeros(0, channels, *output)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(features: Tensor, boxes: Tensor, strides: Sequence[float], output: Shape, samples: int) -> Tensor:
    """Read a group of boxes by one ``grid_sample``: their grids lie one after the other on the first axis."""
    n, k, channels = len(output), len(boxes), features.shape[0]
    places, valid = [], []
    for axis, (stride, cells, size) in enumerate(zip(strides, output, features.shape[1:], strict=True)):
        position = _positions(boxes[:, axis], boxes[:, n + axis], stride, cells * samples)
        valid.append(_along((position >= -1) & (position <= size), axis, n))
        position = (2 * position.clamp(0, size - 1) + 1) / size - 1
        places.append(_along(position, axis, n))
    shape = (k, *(cells * samples for cells in output))
    # grid_sample wants the last axis first
    grid = torch.stack([place.expand(shape) for place in reversed(places)], -1)
    grid = grid.reshape(1, -1, *grid.shape[2:])
    read = F.grid_sample(features[None], grid, "bilinear", "border", align_corners=False)
    inside = torch.stack([part.expand(shape) for part in valid]).all(0)
    pool = F.avg_pool2d if n == 2 else F.avg_pool3d
    return pool(read.view(channels, *shape) * inside, samples).transpose(0, 1)


def _positions(low: Tensor, high: Tensor, stride: float, count: int) -> Tensor:
    """Return (k, count) coordinates along an axis at which voxel i of the features sits at i."""
    low, high = (low / stride - 0.5)[:, None], (high / stride - 0.5)[:, None]
    steps = (torch.arange(count, dtype=low.dtype, device=low.device) + 0.5) / count
    return low + steps * (high - low)


def _along(values: Tensor, axis: int, n: int) -> Tensor:
    """Reshape (k, count) so that the second axis is spatial axis `axis` of n."""
    shape = [values.shape[0], *[1] * n]
    shape[1 + axis] = values.shape[1]
    return values.view(shape)


def roi_align_levels(
    pyramid: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    strides: Sequence[Sequence[float]],
    output: Shape,
    samples: int = 2,
) -> Tensor:
    """Read each box from its own level of a feature pyramid.

    Parameters
    ----------
    pyramid : a feature map (c, *shape) a level, of one image
    boxes : (k, 2d) in image coordinates
    levels : (k,) int64, index into `pyramid`
    strides : of each level, a number an axis
    output, samples : as for :func:`roi_align`

    Returns
    -------
    (k, c, *output)
    """
    order, parts = [], []
    for level, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
        members = torch.nonzero(levels == level)[:, 0]
        order.append(members)
        parts.append(roi_align(features, boxes[members], stride, output, samples))
    back = torch.argsort(torch.cat(order))
    return torch.cat(parts)[back]


def crop_masks(labels: Tensor, values: Tensor, boxes: Tensor, output: Shape, samples: int = 2) -> Tensor:
    """Read the mask of one object under each box, as features are read: targets of a mask head.

    Parameters
    ----------
    labels : (*shape) integer label map of one image
    values : (k,) which object of it each box is for
    boxes : (k, 2d)
    output, samples : as for :func:`roi_align`

    Returns
    -------
    (k, *output) float32
        Part of each cell that is object. Equal to the whole mask read at once, but only a window of the
        label map around each box is ever turned into floats.
    """
    n = labels.ndim
    result = torch.zeros(len(boxes), *output, device=labels.device)
    for number, (value, box) in enumerate(zip(values.tolist(), boxes.detach().double().cpu(), strict=True)):
        # A point needs its two neighbours; where the image ends the window ends with it.
        starts = [max(0, math.floor(low) - 2) for low in box[:n].tolist()]
        stops = [min(s, math.ceil(high) + 2) for high, s in zip(box[n:].tolist(), labels.shape, strict=True)]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            continue
        window = labels[tuple(slice(*pair) for pair in zip(starts, stops, strict=True))]
        moved = (box - torch.tensor([*starts, *starts])).to(labels.device)
        mask = (window == value)[None].float()
        result[number] = roi_align(mask, moved[None], (1.0,) * n, output, samples)[0, 0]
    return result
