"""Networks rearranged for prediction compute what the planned ones do."""

import pytest
import torch
from torch import nn

from medseg.nets import build_network
from medseg.nets.fused import FoldedStage, NormAct, PlainStage, channels_last, fold
from medseg.plan.schema import Architecture

ISOTROPIC = {"kernel_sizes": ((3, 3, 3),) * 3, "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))}
FLAT = {"kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3)), "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2))}
SLICES = {"kernel_sizes": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (2, 1))}


def make(network, layout, features=(8, 12, 20), seed=0):
    architecture = Architecture(
        network=network,
        features_per_stage=features,
        blocks_per_stage=(1, 2, 2),
        decoder_convs_per_stage=(2, 1),
        **layout,
    )
    torch.manual_seed(seed)
    built = build_network(architecture, 2, 3).eval()
    with torch.no_grad():  # initial values of biases and norms would hide mistakes
        for name, value in built.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.randn_like(value) if name.endswith("bias") else 1 + torch.rand_like(value))
    return built


@pytest.mark.parametrize("layout", [ISOTROPIC, FLAT, SLICES])
@pytest.mark.parametrize("network", ["unet", "resenc-unet"])
def test_a_rearranged_network_gives_the_same_logits_up_to_the_border(network, layout):
    original = make(network, layout)
    tile = torch.randn(2, 2, *(8, 16, 12)[-len(layout["strides"][0]) :])
    with torch.inference_mode():
        expected = original(tile)
        folded = fold(original)
        torch.testing.assert_close(folded(tile), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(channels_last(folded)(tile), expected, rtol=1e-4, atol=1e-4)
        rounded = channels_last(folded, torch.bfloat16)(tile)
        assert rounded.dtype == torch.float32
        assert (rounded - expected).abs().mean() < 0.02 * expected.abs().max()
        torch.testing.assert_close(original(tile), expected, rtol=0, atol=0)  # the original is as it was


def test_only_what_saves_products_is_folded():
    assert all(isinstance(stage, FoldedStage) for stage in fold(make("unet", ISOTROPIC)).stages)
    # From 64 features to 4: upsampling them to few features first takes fewer products.
    original = make("unet", ISOTROPIC, features=(4, 64, 64))
    folded = fold(original)
    assert [type(stage) for stage in folded.stages] == [FoldedStage, PlainStage]
    tile = torch.randn(1, 2, 8, 8, 8)
    with torch.inference_mode():
        for network in (folded, channels_last(folded)):
            torch.testing.assert_close(network(tile), original(tile), rtol=1e-4, atol=1e-4)


def test_other_networks_come_back_as_they_are():
    other = nn.Conv3d(1, 2, 3)
    assert fold(other) is other
    assert channels_last(other) is other


@pytest.mark.parametrize("shape", [(2, 16, 8, 8, 8), (1, 5, 3, 5, 7), (1, 48, 40, 40, 40), (3, 4, 6, 10)])
def test_norm_and_activation_equal_torchs_far_from_zero_too(shape):
    norm = (nn.InstanceNorm3d if len(shape) == 5 else nn.InstanceNorm2d)(shape[1], affine=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    x = 50 + 0.5 * torch.randn(shape)
    with torch.inference_mode():
        # float32 itself resolves 50 in steps of 4e-6, an eighth of 1e-4 of the deviation.
        expected = nn.functional.leaky_relu(norm(x.double().float()), 0.01)
        ours = NormAct(norm, 0.01)(x.contiguous(memory_format=layout))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
