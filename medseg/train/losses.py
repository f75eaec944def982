"""Cross entropy plus soft Dice, for classes and for regions, with ignored voxels and deep supervision.

The formulas are nnU-Net's (spec 1.12), not MONAI's DiceCELoss: that has no ignore mask, and puts its
smoothing term elsewhere.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from medseg.train.config import LossConfig


def deep_supervision_weights(n_outputs: int) -> list[float]:
    """Return 1, 1/2, 1/4, ... with the coarsest set to 0 (if there are several), summing to 1."""
    weights = [0.5**k for k in range(n_outputs)]
    if n_outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def class_loss(
    logits: Tensor,
    target: Tensor,
    ignore: int | None,
    batch_dice: bool,
    config: LossConfig,
    shared: bool = False,
) -> Tensor:
    """Return CE + Dice for exclusive classes.

    Parameters
    ----------
    logits : (batch, class, *space) float
    target : (batch, *space) int64, ignored voxels hold `ignore`
    shared : whether other processes hold parts of the batch, which `batch_dice` then pools
    """
    logits = logits.float()
    valid = None if ignore is None else target != ignore
    index = target if valid is None else torch.where(valid, target, 0)
    onehot = F.one_hot(index, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    dice = soft_dice_loss(
        torch.softmax(logits, 1)[:, 1:], onehot[:, 1:], valid, batch_dice, config.smooth, shared
    )
    loss = F.cross_entropy(logits, target, ignore_index=-100 if ignore is None else ignore, reduction="sum")
    count = target.numel() if valid is None else valid.sum().clamp(min=1)
    return config.ce_weight * loss / count + config.dice_weight * dice


def region_loss(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    batch_dice: bool,
    config: LossConfig,
    shared: bool = False,
) -> Tensor:
    """Return BCE + Dice for overlapping regions; `target` is (batch, region, *space) of 0 and 1."""
    logits, target = logits.float(), target.float()
    dice = soft_dice_loss(torch.sigmoid(logits), target, valid, batch_dice, config.smooth, shared)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if valid is None:
        return config.ce_weight * bce.mean() + config.dice_weight * dice
    weight = valid[:, None].float()
    # nnU-Net divides by the voxels, not by voxels times regions, when there is an ignore label
    mean = (bce * weight).sum() / weight.sum().clamp(min=1e-8)
    return config.ce_weight * mean + config.dice_weight * dice


def soft_dice_loss(
    probabilities: Tensor,
    target: Tensor,
    valid: Tensor | None,
    batch_dice: bool,
    smooth: float,
    shared: bool = False,
) -> Tensor:
    """Return the mean of -(2 I + s) / (P + T + s) over classes (and samples, unless `batch_dice`)."""
    if valid is not None:
        probabilities, target = probabilities * valid[:, None], target * valid[:, None]
    axes = tuple(range(2, probabilities.ndim))
    intersection = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    if batch_dice:
        intersection, total = intersection.sum(0), total.sum(0)
        if shared:  # nnU-Net's AllGatherGrad: Dice of the whole batch, not the mean of its parts
            intersection, total = all_reduce(torch.stack([intersection, total]))  # type: ignore[no-untyped-call]
    return -((2 * intersection + smooth) / (total + smooth).clamp(min=1e-8)).mean()


def downsample_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-exact downsampling of an integer or binary map (batch, [channel,] *space)."""
    spatial = len(size)
    if tuple(target.shape[-spatial:]) == tuple(size):
        return target
    lifted = target if target.ndim == spatial + 2 else target[:, None]
    small = F.interpolate(lifted.float(), size=tuple(size), mode="nearest-exact").to(target.dtype)
    return small if target.ndim == spatial + 2 else small[:, 0]
