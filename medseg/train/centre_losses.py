"""Loss of a centre-offset network.

Source: Cheng et al., Panoptic-DeepLab, CVPR 2020 (arXiv 1911.10194), section 3.2: cross entropy, squared
error of the map with its maxima in centres, absolute error of offsets inside of objects.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.nets.centre_heads import CentreHeads
from medseg.train.centre_config import CentreLoss
from medseg.train.config import LossConfig
from medseg.train.losses import class_loss


def centre_loss(
    outputs: Tensor | Sequence[Tensor],
    goal: Tensor,
    heads: CentreHeads,
    weights: CentreLoss,
    ignore: int | None = None,
) -> Tensor:
    """Return the weighted sum of the three terms.

    Parameters
    ----------
    outputs : (n, heads.channels, ...), or a list with these first
    goal : (n, 2 + dimensions, ...) float
        Class, distance, and offset in typical radii.
    ignore : class of voxels that count in no term
    """
    finest = outputs if isinstance(outputs, Tensor) else outputs[0]
    semantic, distance, offset = loss_terms(finest, goal, heads, weights, ignore)
    return weights.semantic * semantic + weights.distance * distance + weights.offset * offset


def loss_terms(
    outputs: Tensor, goal: Tensor, heads: CentreHeads, weights: CentreLoss, ignore: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms without their weights: semantic, distance, offset.

    The squared error of the distance is that inside of objects plus that outside, each a mean over its
    voxels; the absolute error of the offset is a mean over axes and over voxels of objects.
    """
    logits, distance, offset = (part.float() for part in heads.split(outputs))
    classes = goal[:, 0].long()
    inside = goal[:, 1:2] > 0  # in objects, and nowhere else, there is a distance
    beyond = ~inside if ignore is None else ~inside & (classes != ignore)[:, None]
    count = inside.sum().clamp(min=1)
    squared = (distance - goal[:, 1:2]) ** 2
    outside = beyond.sum().clamp(min=1)
    depth = (squared * inside).sum() / count + (squared * beyond).sum() / outside
    moved = ((offset - goal[:, 2:]).abs() * inside).mean(1).sum() / count
    return _semantic(logits, classes, weights, ignore), depth, moved


def _semantic(logits: Tensor, classes: Tensor, weights: CentreLoss, ignore: int | None) -> Tensor:
    """Cross entropy and soft Dice; of the cross entropy, only that of the hardest voxels if asked."""
    if weights.hard_share >= 1:
        return 1 + class_loss(logits, classes, ignore, True, LossConfig())
    dice = class_loss(logits, classes, ignore, True, LossConfig(ce_weight=0))
    left_out = -100 if ignore is None else ignore
    each = F.cross_entropy(logits, classes, ignore_index=left_out, reduction="none").flatten()
    hardest = torch.topk(each, max(1, round(weights.hard_share * each.numel()))).values
    return 1 + dice + hardest.mean()


def count_overlap(outputs: Tensor, goal: Tensor, heads: CentreHeads, ignore: int | None = None) -> Tensor:
    """Return (3, classes - 1): voxels in both, predicted, and in the reference."""
    predicted = heads.split(outputs)[0].argmax(1)
    if ignore is not None:
        predicted = torch.where(goal[:, 0] == ignore, 0, predicted)
    counts = []
    for value in range(1, heads.classes):
        found, true = predicted == value, goal[:, 0] == value
        counts.append(torch.stack([(found & true).sum(), found.sum(), true.sum()]).float())
    return torch.stack(counts, 1)
