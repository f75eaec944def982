"""Networks: architecture values to torch modules, one table.

>>> sorted(NETS)
['resenc-unet', 'segresnet', 'swin-unetr', 'unet']
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from medseg.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

    from medseg.plan.schema import Architecture, NetworkName

Builder = Callable[["Architecture", int, int, bool], "nn.Module"]


def _plain_unet(
    architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
) -> "nn.Module":
    from medseg.nets.unet import PlainUNet

    return PlainUNet(architecture, in_channels, out_channels, deep_supervision)


def _resenc_unet(
    architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
) -> "nn.Module":
    from medseg.nets.unet import ResidualEncoderUNet

    return ResidualEncoderUNet(architecture, in_channels, out_channels, deep_supervision)


def _segresnet(
    architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
) -> "nn.Module":
    from medseg.nets.monai_nets import SegResNet

    return SegResNet(architecture, in_channels, out_channels, deep_supervision)


def _swin_unetr(
    architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool
) -> "nn.Module":
    from medseg.nets.monai_nets import SwinUnet

    return SwinUnet(architecture, in_channels, out_channels, deep_supervision)


NETS: dict["NetworkName", Builder] = {
    "unet": _plain_unet,
    "resenc-unet": _resenc_unet,
    "segresnet": _segresnet,
    "swin-unetr": _swin_unetr,
}


def build_network(
    architecture: "Architecture", in_channels: int, out_channels: int, deep_supervision: bool = False
) -> "nn.Module":
    """Return the network that `architecture` describes, freshly initialised.

    Its ``forward`` takes (n, in_channels, ...) and returns logits (n, out_channels, ...); with
    `deep_supervision` a list of them, finest first. ``network.deep_supervision`` may be set later.

    Raises
    ------
    PlanError
        The network is unknown, or the values do not make one.
    """
    if architecture.network not in NETS:
        raise PlanError(f"network {architecture.network!r} is unknown. Use one of {', '.join(NETS)}.")
    return NETS[architecture.network](architecture, in_channels, out_channels, deep_supervision)
