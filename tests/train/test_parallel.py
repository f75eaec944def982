from typing import Any

import pytest
import torch
from torch import nn

from medseg.nets.unet import PlainUNet
from medseg.plan.schema import Architecture
from medseg.train.parallel import SplitBatch, is_per_sample

ARCHITECTURE = Architecture(
    network="unet",
    features_per_stage=(4, 8, 16),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 3,
    blocks_per_stage=(1, 1, 1),
    decoder_convs_per_stage=(1, 1),
)


def unet(deep_supervision: bool = True) -> PlainUNet:
    torch.manual_seed(0)
    return PlainUNet(ARCHITECTURE, 1, 3, deep_supervision)


def step(network: nn.Module, called: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """Return outputs, and the gradients of a loss that mixes the samples and leaves the last output out."""
    network.zero_grad()
    outputs = called(images)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    used = outputs[:-1] if len(outputs) > 1 else outputs
    sum((o.float().softmax(1)[:, 1:].sum((0, 2, 3, 4)) ** 2).mean() for o in used).backward()  # type: ignore[union-attr]
    return outputs, {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize(("samples", "threads"), [(2, 2), (3, 2), (4, 3), (2, 4), (1, 2), (5, 2)])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_outputs_and_gradients_are_those_of_the_whole_batch(
    samples: int, threads: int, deep_supervision: bool
) -> None:
    network = unet(deep_supervision).double()
    images = torch.randn(samples, 1, 8, 8, 8, dtype=torch.float64)
    expected, gradients = step(network, network, images)
    outputs, found = step(network, SplitBatch(network, max(samples, 2), threads), images)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for name, gradient in gradients.items():
        assert (found[name] is None) == (gradient is None)  # a head without a weight in the loss
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


def test_two_calls_give_the_same_bits() -> None:
    network = unet()
    images = torch.randn(4, 1, 8, 8, 8)
    called = SplitBatch(network, 4, 2)
    first, second = (step(network, called, images)[1] for _ in range(2))
    assert all(a is None or torch.equal(a, second[name]) for name, a in first.items())


def test_its_threads_compute_in_the_callers_precision() -> None:
    network = unet(deep_supervision=False)
    seen = []
    network.decoder.seg_layers[-1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = SplitBatch(network, 2, 2)(torch.randn(2, 1, 8, 8, 8))
    assert seen == [torch.bfloat16] * 2 and outputs.dtype == torch.bfloat16


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        SplitBatch(unet(), 2, 2)(torch.randn(2, 3, 8, 8, 8))


@pytest.mark.parametrize(
    ("module", "independent"),
    [
        (nn.InstanceNorm3d(3), True),
        (nn.Dropout3d(0.0), True),
        (nn.BatchNorm3d(3), False),
        (nn.SyncBatchNorm(3), False),
        (nn.Dropout3d(0.1), False),
    ],
)
def test_networks_that_mix_samples_or_roll_dice_are_told_apart(module: nn.Module, independent: bool) -> None:
    assert is_per_sample(nn.Sequential(unet(), module)) == independent
