"""The light 3D network behind the ``volume`` propagator: evidence on one slice in, the object in 3D out.

It knows no organs. It is shown a cube of the image around the object and what is known of the object (the
mask of a slice, the box, clicks, the mask so far), and answers with logits for that cube. It is trained on
shapes with random contrast (`medseg.train.refiner`), so it follows edges and texture rather than anatomy.
"""

from collections.abc import Sequence

import numpy as np
import SimpleITK
import torch
from scipy import ndimage
from torch import Tensor, nn

from medseg.types import BoolArray, FloatArray

# Voxels of the cube along each axis: three halvings must divide it.
GRID = 40
# What the network is shown, in this order; each in about -1..1, 0 = not known.
CHANNELS = ("image", "likeness", "slice mask", "box", "clicks", "previous mask", "flood")

# How far the floods go along the slices, in sides of the box. A round object needs a near bound, a long one
# none; where all floods agree, the image's own edges speak.
REACHES = (0.5, 1.0, float("inf"))


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
        """Return logits (n, 1, a, b, c) of what is shown, (n, 7, a, b, c); sizes divisible by 8."""
        skips = []
        for block in self.down:
            shown = block(shown)
            skips.append(shown)
        value = skips.pop()
        for raise_, up in zip(self.raise_, self.up, strict=True):
            value = up(raise_(value) + skips.pop())
        logits: Tensor = self.head(value)
        return logits


def show(
    image: Tensor,
    slice_mask: Tensor,
    box: Tensor,
    clicks: Tensor,
    previous: Tensor,
    flooding: bool = True,
) -> Tensor:
    """Build what the network is shown of one cube: (7, a, b, c) float32, in the order of `CHANNELS`.

    Parameters
    ----------
    image : (a, b, c) float32
        Voxel values, any scale.
    slice_mask, box, clicks, previous : (a, b, c) float32
        +1 where the object is known to be, -1 where it is known not to be, 0 where nothing is known. The
        slice mask and the box are known on the prompted slices only.
    flooding : bool
        Show the floods; else their channel says nothing.
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
    flooded = torch.zeros_like(normal)
    if flooding:
        flooded = flood(normal, likeness, slice_mask, box, clicks, previous)
    return torch.stack((normal, likeness, slice_mask, box, clicks, previous, flooded))


def flood(
    image: Tensor,
    likeness: Tensor,
    slice_mask: Tensor,
    box: Tensor,
    clicks: Tensor,
    previous: Tensor,
) -> Tensor:
    """Return what marker watersheds make of a cube, the mean over `REACHES` of +1 inside and -1 outside.

    Water rises from what is surely the object and from what surely is not, and meets on edges of the image.
    Where one of the two is not marked there is no flood: 0.
    """
    marks = [each.numpy() for each in (slice_mask, box, clicks, previous)]
    height = SimpleITK.GetImageFromArray(ndimage.gaussian_gradient_magnitude(image.numpy(), 0.7))
    found = np.zeros(image.shape, np.float32)
    # What is known of the whole cube bounds the object better than a length.
    reaches = (float("inf"),) if previous.any() else REACHES
    for reach in reaches:
        inside, outside = _markers(likeness.numpy(), marks[0], marks[1], marks[2], marks[3], reach)
        if inside.any() and outside.any():
            seeds = SimpleITK.GetImageFromArray(np.where(inside, 1, np.where(outside, 2, 0)).astype(np.uint8))
            met = SimpleITK.MorphologicalWatershedFromMarkers(height, seeds, markWatershedLine=False)
            found += np.where(SimpleITK.GetArrayViewFromImage(met) == 1, 1, -1)
    return torch.from_numpy(found / len(reaches))


def _markers(
    likeness: FloatArray,
    slice_mask: FloatArray,
    box: FloatArray,
    clicks: FloatArray,
    previous: FloatArray,
    reach: float,
) -> tuple[BoolArray, BoolArray]:
    """Return the voxels that surely are the object's, and those that surely are not."""
    cross = ndimage.generate_binary_structure(3, 1)
    flat = cross.copy()
    flat[:, :, [0, 2]] = False
    inside = ndimage.binary_erosion(slice_mask > 0, flat)
    if not inside.any():
        inside = slice_mask > 0
    outside = (slice_mask < 0) & ~ndimage.binary_dilation(slice_mask > 0, flat)
    if not previous.any():
        outside |= _beyond(box, reach)
    outside |= (np.abs(likeness) > 1.5) & ~ndimage.binary_dilation(inside, cross)
    inside |= ndimage.binary_erosion(previous > 0, cross, iterations=2)
    outside |= ndimage.binary_erosion(previous < 0, cross, iterations=3, border_value=1)
    inside = (inside & (clicks >= 0)) | (clicks > 0)
    return inside, (outside & (clicks <= 0)) | (clicks < 0)


def _beyond(box: FloatArray, reach: float) -> BoolArray:
    """Return what lies well beyond the box, in its slice's rows and columns, or along the slices."""
    held = np.argwhere(box > 0)
    if not len(held):
        return np.zeros(box.shape, dtype=bool)
    low, high = held.min(axis=0), held.max(axis=0)
    side = (high - low)[:2].max() + 1
    beyond = np.ones(box.shape, dtype=bool)
    margin = (max(2, round(0.25 * side)),) * 2 + (round(min(GRID, reach * side)),)
    beyond[tuple(slice(max(0, a - m), b + m + 1) for a, b, m in zip(low, high, margin, strict=True))] = False
    return beyond


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
