"""LoRA: nothing changes at first, only adapters learn, and merged is the same as unmerged."""

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.nets.lora import LoraLinear, add_lora, merge_lora
from medseg.nets.tinyvit import TinyViT

TARGETS = ("qkv", "proj")


def adapted(seed: int = 0) -> tuple[TinyViT, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    encoder = TinyViT().eval()
    return encoder, dict(add_lora(encoder, 4, 8.0, TARGETS, torch.Generator().manual_seed(seed)))


def moved(adapters: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.normal_(0, 0.02)


def test_merged_equals_unmerged() -> None:
    encoder, adapters = adapted()
    moved(adapters)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(image)
        merge_lora(encoder)
        after = encoder(image)
    assert not any(isinstance(layer, LoraLinear) for layer in encoder.modules())
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)
    assert encoder.state_dict().keys() == TinyViT().state_dict().keys()


def test_an_adapter_changes_nothing_until_it_has_learned() -> None:
    image = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = TinyViT().eval()(image)
        encoder, adapters = adapted()
        assert torch.equal(encoder(image), plain)
        moved(adapters)
        assert not torch.allclose(encoder(image), plain, atol=1e-3)


def test_only_adapters_learn_and_they_are_few() -> None:
    encoder, adapters = adapted()
    encoder(torch.randn(1, 3, 64, 64)).mean().backward()
    learning = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * len(adapters) == 2 * 2 * 10  # qkv and proj of ten blocks with attention
    assert all(name.endswith(("adapter.up", "adapter.down")) for name in learning)
    assert all((p.grad is not None) == (name in learning) for name, p in encoder.named_parameters())
    count = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert count < 0.02 * sum(p.numel() for p in encoder.parameters())


def test_a_target_that_no_layer_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer is called so"):
        add_lora(TinyViT(), 2, 2.0, ("query",), torch.Generator())
