"""Every network of the table keeps the same promises."""

import warnings
from itertools import product

import pytest
import torch
from safetensors.torch import load, save

from medseg.errors import PlanError
from medseg.nets import NETS, build_network
from medseg.nets.unet import PlainUNet, downsampling
from medseg.plan.schema import Architecture

CASES = list(product(NETS, (2, 3)))


@pytest.fixture(autouse=True)
def _quiet_monai():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        yield


def architecture(network="unet", dimensions=3, strides=None, **changes):
    values = {
        "network": network,
        "features_per_stage": (8, 16, 24),
        "strides": strides or ((1,) * dimensions, (2,) * dimensions, (2,) * dimensions),
        "kernel_sizes": ((3,) * dimensions,) * 3,
        "blocks_per_stage": (1, 2, 2),
        "decoder_convs_per_stage": (1, 1),
    }
    return Architecture(**{**values, **changes})


def patch(dimensions):
    return (64, 32, 32)[:dimensions]


@pytest.mark.parametrize(("network", "dimensions"), CASES)
def test_logits_have_the_shape_of_the_patch(network, dimensions):
    net = build_network(architecture(network, dimensions), 2, 3, deep_supervision=False).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 2, *patch(dimensions))).shape == (1, 3, *patch(dimensions))


@pytest.mark.parametrize(("network", "dimensions"), CASES)
def test_deep_supervision_lists_logits_finest_first_in_training_and_evaluation(network, dimensions):
    net = build_network(architecture(network, dimensions), 1, 2, deep_supervision=True)
    x = torch.randn(1, 1, *patch(dimensions))
    with torch.no_grad():
        outputs = net.train()(x)
        halved = tuple(n // 2 for n in patch(dimensions))
        assert [tuple(o.shape[2:]) for o in outputs] == [patch(dimensions), halved][: len(outputs)]
        assert isinstance(net.eval()(x), list)
        net.deep_supervision = False
        single = net(x)
        net.deep_supervision = True
        torch.testing.assert_close(net(x)[0], single)
    assert len(outputs) == (1 if network == "swin-unetr" else 2)


@pytest.mark.parametrize("network", NETS)
def test_every_weight_that_is_used_gets_a_gradient(network):
    net = build_network(architecture(network, 2), 1, 2, deep_supervision=True)
    outputs = net(torch.randn(2, 1, *patch(2)))
    sum(o.square().mean() for o in outputs).backward()
    without = [name for name, value in net.named_parameters() if value.grad is None]
    assert not without


@pytest.mark.parametrize(("network", "dimensions"), CASES)
def test_weights_survive_safetensors(network, dimensions):
    first = build_network(architecture(network, dimensions), 1, 2).eval()
    second = build_network(architecture(network, dimensions), 1, 2).eval()
    second.load_state_dict(load(save({k: v.contiguous() for k, v in first.state_dict().items()})))
    x = torch.randn(1, 1, *patch(dimensions))
    with torch.inference_mode():
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


@pytest.mark.parametrize("network", NETS)
def test_deep_supervision_does_not_change_the_weights(network):
    names = [set(build_network(architecture(network, 2), 1, 2, deep).state_dict()) for deep in (True, False)]
    assert names[0] == names[1]


@pytest.mark.parametrize("network", ["unet", "resenc-unet", "segresnet"])
def test_anisotropic_strides_keep_the_coarse_axis(network):
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    net = build_network(architecture(network, strides=strides), 1, 2, deep_supervision=True)
    with torch.no_grad():
        shapes = [tuple(o.shape[2:]) for o in net(torch.randn(1, 1, 6, 16, 16))]
    assert shapes == [(6, 16, 16), (6, 8, 8)]
    assert downsampling(strides) == (2, 4, 4)


@pytest.mark.parametrize(("network", "near"), [("segresnet", "(20, 32, 32)"), ("swin-unetr", "(32, 32, 32)")])
def test_a_patch_that_cannot_be_halved_is_a_plan_error_with_the_next_size(network, near):
    net = build_network(architecture(network), 1, 2)
    with pytest.raises(PlanError, match="multiples") as caught:
        net(torch.zeros(1, 1, 18, 32, 32))
    assert near in str(caught.value)


def test_an_unknown_network_is_a_plan_error():
    unknown = architecture().model_copy(update={"network": "vnet"})
    with pytest.raises(PlanError, match="vnet"):
        build_network(unknown, 1, 2)


def test_plain_unet_has_nnunets_names_and_no_aliases():
    names = set(PlainUNet(architecture(), 1, 2).state_dict())
    assert "encoder.stages.1.0.convs.1.norm.weight" in names
    assert {
        "decoder.transpconvs.0.bias",
        "decoder.stages.1.convs.0.conv.weight",
        "decoder.seg_layers.1.bias",
    } <= names
    assert not any("all_modules" in name or name.startswith("decoder.encoder") for name in names)
    # 5 encoder and 2 decoder convolutions with norm, 2 transposed convolutions, 2 heads
    assert len(names) == 7 * 4 + 2 * 2 + 2 * 2


def test_residual_skips_are_named_as_in_nnunet():
    wide = architecture("resenc-unet", features_per_stage=(8, 16, 16))
    names = set(build_network(wide, 1, 2).state_dict())
    assert "encoder.stages.1.blocks.0.skip.1.conv.weight" in names
    assert "encoder.stages.1.blocks.0.skip.1.conv.bias" not in names
    assert not any(
        name.startswith("encoder.stages.2.blocks.0.skip") for name in names
    )  # 16 to 16: pooling only
    assert not any(name.startswith("encoder.stages.0.blocks.0.skip") for name in names)
    assert "encoder.stem.convs.0.conv.weight" in names


def test_initialisation_is_kaiming_and_residual_blocks_start_as_their_skip():
    torch.manual_seed(0)
    net = build_network(architecture("resenc-unet", features_per_stage=(32, 64, 64)), 1, 2)
    block = net.encoder.stages[1].blocks[0]
    assert not block.conv2.norm.weight.any() and not block.conv1.conv.bias.any()
    gain = (2 / (1 + 0.01**2)) ** 0.5
    assert block.conv1.conv.weight.std().item() == pytest.approx(gain / (32 * 27) ** 0.5, rel=0.05)
