"""The network of this bundle from plain numbers, and the mean of several folds."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from medseg.nets.unet import PlainUNet, ResidualEncoderUNet


@dataclass(frozen=True)
class Architecture:
    """A U-Net as values: one entry a resolution, finest first, each with one number an axis."""

    features_per_stage: Sequence[int]
    strides: Sequence[tuple[int, ...]]
    kernel_sizes: Sequence[tuple[int, ...]]
    blocks_per_stage: Sequence[int]
    decoder_convs_per_stage: Sequence[int]

    @property
    def n_stages(self) -> int:
        """Number of resolutions."""
        return len(self.features_per_stage)

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.strides[0])


def build_unet(
    in_channels: int,
    out_channels: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]],
    blocks_per_stage: Sequence[int],
    decoder_convs_per_stage: Sequence[int],
    residual: bool = False,
) -> nn.Module:
    """Return nnU-Net's plain or residual encoder U-Net: (n, in_channels, ...) to logits."""
    architecture = Architecture(
        tuple(features_per_stage),
        tuple(tuple(axes) for axes in strides),
        tuple(tuple(axes) for axes in kernel_sizes),
        tuple(blocks_per_stage),
        tuple(decoder_convs_per_stage),
    )
    network = ResidualEncoderUNet if residual else PlainUNet
    return network(cast(Any, architecture), in_channels, out_channels, deep_supervision=False)


class FoldMean(nn.Module):
    """The same network with the weights of several folds; logits are their mean."""

    def __init__(self, network: nn.Module, folds: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network, *(deepcopy(network) for _ in range(folds - 1))])

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, ...) to logits (n, out_channels, ...)."""
        total = cast(Tensor, self.networks[0](x))
        for network in self.networks[1:]:
            total = total + network(x)
        return total / len(self.networks)


def load_weights(network: nn.Module, path: str, device: Any) -> nn.Module:
    """Return the network with the weights of a file, ready to predict; no pickle is executed."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.to(device).eval()
