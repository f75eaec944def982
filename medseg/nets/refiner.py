"""The light 3D network behind the ``volume`` propagator: evidence on one slice in, the object in 3D out.

It knows no organs. It is shown a cube of the image around the object and what is known of the object (the
mask of a slice, the box, clicks, the mask so far), and answers with logits for that cube. It is trained on
shapes with random contrast (`medseg.train.refiner`), so it follows edges and texture rather than anatomy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Voxels of the cube along each axis: three halvings must divide it.
GRID = 40
# What the network is shown, in this order; each in about -1..1, 0 = not known.
CHANNELS = ("image", "likeness", "slice mask", "box", "clicks", "previous mask")


class _Block(nn.Sequential):
    """Convolution, instance norm, leaky ReLU."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(ins, outs, 3, stride=stride, padding=1, bias=False),
            nn.InstanceNorm3d(outs, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        )


class Refiner(nn.Module):
    """A U-Net of four levels.

    Parameters
    ----------
    widths : sequence of int
        Feature maps by level, finest first; multiples of 16 suit the CPU's vector units.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        ins = (len(CHANNELS), *self.widths[:-1])
        # One convolution at full size, and skips that are added: half the time of the usual U-Net.
        self.down = nn.ModuleList(
            _Block(a, b) if level == 0 else nn.Sequential(_Block(a, b, stride=2), _Block(b, b))
            for level, (a, b) in enumerate(zip(ins, self.widths, strict=True))
        )
        pairs = list(zip(self.widths[1:], self.widths[:-1], strict=True))[::-1]
        self.raise_ = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2, bias=False) for a, b in pairs)
        self.up = nn.ModuleList(_Block(b, b) for _, b in pairs)
        self.head = nn.Conv3d(self.widths[0], 1, 1)

    def forward(self, shown: Tensor) -> Tensor:
        """Return logits (n, 1, a, b, c) of what is shown, (n, 6, a, b, c); sizes divisible by 8."""
        skips = []
        for block in self.down:
            shown = block(shown)
            skips.append(shown)
        value = skips.pop()
        for raise_, up in zip(self.raise_, self.up, strict=True):
            value = up(raise_(value) + skips.pop())
        logits: Tensor = self.head(value)
        return logits


def show(image: Tensor, slice_mask: Tensor, box: Tensor, clicks: Tensor, previous: Tensor) -> Tensor:
    """Build what the network is shown of one cube: (6, a, b, c) float32, in the order of `CHANNELS`.

    Parameters
    ----------
    image : (a, b, c) float32
        Voxel values, any scale.
    slice_mask, box, clicks, previous : (a, b, c) float32
        +1 where the object is known to be, -1 where it is known not to be, 0 where nothing is known. The
        slice mask and the box are known on the prompted slices only.
    """
    spread = image.std() + 1e-6
    normal = ((image - image.mean()) / spread).clamp(-5, 5) / 2
    inside = slice_mask > 0
    if not inside.any():
        inside = previous > 0
    likeness = torch.zeros_like(normal)
    if inside.any():
        values = image[inside]
        middle = values.median()
        # The spread of the object itself, but never so small that noise looks like another tissue.
        wide = 1.5 * (values - middle).abs().median() + 0.15 * spread
        likeness = ((image - middle) / wide).clamp(-6, 6) / 3
    return torch.stack((normal, likeness, slice_mask, box, clicks, previous))


def channels_last(network: Refiner) -> Refiner:
    """Return the network with its weights in the order that the CPU's convolutions like best."""
    for parameter in network.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network


def ball(cube: Tensor, middle: Sequence[float], sign: float, radius: float = 2.0) -> None:
    """Mark a click at `middle` (voxels of the cube) in place."""
    low = [max(0, int(m - radius)) for m in middle]
    high = [min(n, int(m + radius) + 2) for m, n in zip(middle, cube.shape, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return
    part = cube[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    squared = torch.zeros(part.shape)
    for axis, (a, b, m) in enumerate(zip(low, high, middle, strict=True)):
        lengths = [1, 1, 1]
        lengths[axis] = -1
        squared = squared + (torch.arange(a, b) - m).square().reshape(lengths)
    part[squared <= radius**2] = sign
