"""The heads of a centre-offset network: the output channels of a planned network, by their meaning.

Source: Cheng et al., Panoptic-DeepLab, CVPR 2020 (arXiv 1911.10194); here all heads share one decoder, as in
every planned network, so that any of :data:`medseg.nets.NETS` can have them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from medseg.plan.schema import Architecture


@dataclass(frozen=True)
class CentreHeads:
    """Channels of the output: classes, background first; distance; one offset an axis.

    Attributes
    ----------
    classes : int
        Semantic classes, background included.
    dimensions : int
        2 or 3.
    """

    classes: int
    dimensions: int

    @property
    def channels(self) -> int:
        """Output channels in all."""
        return self.classes + 1 + self.dimensions

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, classes, ...), distance (n, 1, ...) and offset (n, dimensions, ...).

        The distance is 1 in the middle of an object and 0 outside; the offset is in usual radii of objects.
        """
        end = self.classes + 1
        return outputs[:, : self.classes], outputs[:, self.classes : end], outputs[:, end:]


def build_centre_network(architecture: "Architecture", in_channels: int, classes: int) -> "nn.Module":
    """Return the planned network with these heads, freshly initialised."""
    from medseg.nets import build_network

    heads = CentreHeads(classes, architecture.dimensions)
    return build_network(architecture, in_channels, heads.channels, deep_supervision=False)
