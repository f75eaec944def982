"""LoRA: a linear layer learns a change of low rank, which is merged into its weight in the end.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: W + (alpha / rank) B A, with A
drawn at random and B zero, so that training starts from the network as it was.
"""

import math
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import ConfigError


class Adapter(nn.Module):
    """The change: `down` is A (rank, inputs), `up` is B (outputs, rank)."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to what is added, (..., outputs)."""
        return self.scale * F.linear(F.linear(x, self.down), self.up)

    def change(self) -> Tensor:
        """Return what is added to the weight, (outputs, inputs)."""
        return self.scale * (self.up @ self.down)


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return cast(Tensor, self.base(x)) + cast(Tensor, self.adapter(x))

    def merged(self) -> nn.Linear:
        """Return the one layer that does the same; the base is changed."""
        with torch.no_grad():
            self.base.weight += self.adapter.change()
        return self.base


def add_lora(
    network: nn.Module, rank: int, alpha: float, targets: Collection[str], generator: torch.Generator
) -> dict[str, Adapter]:
    """Freeze `network` and give an adapter to each linear layer whose own name is in `targets`.

    Returns
    -------
    dict of str to Adapter
        By the full name of the layer; their parameters are all that is left to train.

    Raises
    ------
    ConfigError
        No layer has such a name.
    """
    network.requires_grad_(False)
    found = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets
    }
    if not found:
        raise ConfigError(f"lora.targets {', '.join(targets)}: no linear layer is called so. Use qkv, proj.")
    adapters = {}
    for name, layer in found.items():
        adapters[name] = Adapter(layer.in_features, layer.out_features, rank, alpha, generator)
        _replace(network, name, LoraLinear(layer, adapters[name]))
    return adapters


def merge_lora(network: nn.Module) -> None:
    """Merge every adapter of `network` into its layer; names of weights are those before `add_lora`."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLinear):
            _replace(network, name, layer.merged())


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
