import numpy as np
import pytest
import torch

from medseg.train.config import LossConfig
from medseg.train.losses import class_loss, deep_supervision_weights, downsample_target, region_loss

# nnunetv2 2.8.1: DC_and_CE_loss / DC_and_BCE_loss with MemoryEfficientSoftDiceLoss, smooth 1e-5, on the
# tensors of `drawn` (do_bg False for classes, True for regions): batch_dice -> (plain, with ignore).
PEER_CLASSES = {False: (1.4624660015, 1.5103220940), True: (1.4623405933, 1.5103276968)}
PEER_REGIONS = {False: (0.3243140578, 2.7271955013), True: (0.3364892006, 2.7616710663)}


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[bool, tuple[torch.Tensor, torch.Tensor]]]:
    r = np.random.RandomState(7)
    logits = torch.tensor(r.randn(2, 4, 5, 6, 7), dtype=torch.float32)
    target = torch.tensor(r.randint(0, 4, (2, 1, 5, 6, 7)))[:, 0]
    with_ignore = torch.tensor(r.randint(0, 5, (2, 1, 5, 6, 7)))[:, 0]
    regions = {}
    for batch_dice in (False, True):
        maps = torch.tensor(r.randint(0, 2, (2, 4, 5, 6, 7)))
        ignored = torch.tensor(r.randint(0, 2, (2, 1, 5, 6, 7)))[:, 0]
        regions[batch_dice] = (maps, ignored == 0)
    return logits, target, with_ignore, regions


@pytest.mark.parametrize("batch_dice", [False, True])
def test_class_loss_equals_nnunet(batch_dice: bool) -> None:
    logits, target, with_ignore, _ = drawn()
    plain = class_loss(logits, target, None, batch_dice, LossConfig())
    ignoring = class_loss(logits, with_ignore, 4, batch_dice, LossConfig())
    assert (float(plain), float(ignoring)) == pytest.approx(PEER_CLASSES[batch_dice], abs=1e-5)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_region_loss_equals_nnunet(batch_dice: bool) -> None:
    logits, _, _, regions = drawn()
    maps, valid = regions[batch_dice]
    plain = region_loss(logits, maps, None, batch_dice, LossConfig())
    ignoring = region_loss(logits, maps, valid, batch_dice, LossConfig())
    assert (float(plain), float(ignoring)) == pytest.approx(PEER_REGIONS[batch_dice], abs=1e-5)


def test_ignored_voxels_do_not_change_the_loss() -> None:
    logits, _, target, _ = drawn()
    noisy = torch.where((target == 4)[:, None], logits + 5 * torch.randn_like(logits), logits)
    expected = class_loss(logits, target, 4, True, LossConfig())
    assert torch.allclose(class_loss(noisy, target, 4, True, LossConfig()), expected, atol=1e-6)


def test_deep_supervision_weights_halve_and_the_coarsest_is_zero() -> None:
    assert deep_supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert deep_supervision_weights(1) == [1.0]


def test_downsampled_targets_stay_labels() -> None:
    target = torch.randint(0, 5, (2, 8, 8, 8))
    small = downsample_target(target, (4, 4, 4))
    assert small.dtype == target.dtype and small.shape == (2, 4, 4, 4)
    assert torch.equal(small, target[:, 1::2, 1::2, 1::2])
