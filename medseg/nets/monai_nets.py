"""MONAI's SegResNet and Swin UNETR, built from the same architecture values as the U-Nets.

This file imports MONAI, which takes seconds; `medseg.nets` loads it only when one of them is asked for.
"""

from math import ceil, log2
from typing import TYPE_CHECKING, Any, cast

from monai.networks.nets import SegResNetDS, SwinUNETR
from torch import Tensor, nn

from medseg.errors import PlanError

if TYPE_CHECKING:
    from medseg.plan.schema import Architecture

# Attention heads are 3, 6, 12, 24, so MONAI's features come in multiples of 12.
SWIN_MULTIPLE = 12
# Five halvings: the patch embedding and four mergings.
SWIN_DOWNSAMPLING = 32


class SegResNet(nn.Module):
    """SegResNet with a head at every resolution (Myronenko, arXiv 1810.11654; MONAI's SegResNetDS).

    From the architecture come the number of stages, ``features_per_stage[0]`` (doubled a stage),
    ``blocks_per_stage`` and ``decoder_convs_per_stage`` as numbers of residual blocks, and from the strides
    how often each axis is halved; anisotropic axes are halved last, with flat kernels until then.

    Attributes
    ----------
    deep_supervision : as of `medseg.nets.unet.UNet`
    """

    def __init__(
        self, architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.network: Any = SegResNetDS(**segresnet_arguments(architecture, in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(n, in_channels, ...) to logits (n, out_channels, ...), or a list of them, finest first.

        MONAI's own forward would return one tensor in evaluation whatever is asked.

        Raises
        ------
        PlanError
            An axis cannot be halved as often as the network does.
        """
        _check_divisible(x, [int(n) for n in self.network.shape_factor()], "SegResNet")
        features = self.network.encoder(x)
        x = features.pop()
        outputs: list[Tensor] = []
        last = len(self.network.up_layers) - 1
        for step, level in enumerate(self.network.up_layers):
            x = level["blocks"](level["upsample"](x) + features.pop())
            if self.deep_supervision or step == last:
                outputs.append(level["head"](x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class SwinUnet(nn.Module):
    """Swin UNETR (Hatamizadeh et al., arXiv 2201.01266).

    Its depth and heads are fixed; ``features_per_stage[0]``, rounded up to a multiple of 12, is its width.
    It has one head, so with deep supervision the list holds one tensor.

    Attributes
    ----------
    deep_supervision : as of `medseg.nets.unet.UNet`
    """

    def __init__(
        self, architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.network = SwinUNETR(**swin_arguments(architecture, in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(n, in_channels, ...) to logits (n, out_channels, ...), in a list with deep supervision.

        Raises
        ------
        PlanError
            An axis is not a multiple of 32.
        """
        _check_divisible(x, [SWIN_DOWNSAMPLING] * (x.ndim - 2), "Swin UNETR")
        logits = cast(Tensor, self.network(x))
        return [logits] if self.deep_supervision else logits


def segresnet_arguments(architecture: "Architecture", in_channels: int, out_channels: int) -> dict[str, Any]:
    """Return the arguments of MONAI's SegResNetDS, as plain data that an exported bundle can hold."""
    return {
        "spatial_dims": architecture.dimensions,
        "init_filters": architecture.features_per_stage[0],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "act": ("leakyrelu", {"negative_slope": 0.01}),
        "norm": "instance",
        "blocks_down": architecture.blocks_per_stage,
        "blocks_up": architecture.decoder_convs_per_stage,
        "dsdepth": architecture.n_stages - 1,
        "resolution": _resolution(architecture),
    }


def swin_arguments(architecture: "Architecture", in_channels: int, out_channels: int) -> dict[str, Any]:
    """Return the arguments of MONAI's SwinUNETR, as plain data that an exported bundle can hold."""
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "feature_size": SWIN_MULTIPLE * ceil(architecture.features_per_stage[0] / SWIN_MULTIPLE),
        "spatial_dims": architecture.dimensions,
    }


def _resolution(architecture: "Architecture") -> tuple[float, ...] | None:
    """Return relative voxel sizes from which MONAI derives the planned number of halvings an axis."""
    halvings = [
        sum(log2(stride[axis]) for stride in architecture.strides) for axis in range(architecture.dimensions)
    ]
    if len(set(halvings)) == 1:
        return None
    return tuple(2.0 ** (min(halvings) - count) for count in halvings)


def _check_divisible(x: Tensor, factors: list[int], name: str) -> None:
    shape = tuple(x.shape[2:])
    if any(size % factor for size, factor in zip(shape, factors, strict=True)):
        near = tuple(factor * ceil(size / factor) for size, factor in zip(shape, factors, strict=True))
        raise PlanError(
            f"patch {shape}: {name} needs multiples of {tuple(factors)}. Plan a patch_size of {near}."
        )
