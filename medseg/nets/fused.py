"""The two U-Nets rearranged for prediction: the same function, up to rounding, in less time.

Two steps, both exact in real numbers. :func:`fold` does algebra ahead of time, in modules that every runtime
knows; :func:`channels_last` writes what is left in the layout in which CPUs convolve fastest.
"""

import copy
from itertools import product
from math import gcd, prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.nets.unet import ConvNormAct, ConvStack, UNet, downsampling

# Or their forms in 2D, whose attributes are the same.
_Up = nn.ConvTranspose3d
_LAYOUT = {2: torch.channels_last, 3: torch.channels_last_3d}

# Elements that are normalised at once: a float32 part and its scratch stay in a core's second-level cache.
_PART = 1 << 17
# A row of a part is up to 64 voxels, so that few channels fill vector registers as well.
_VOXELS_A_ROW = 64


def fold(network: nn.Module) -> nn.Module:
    """Return `network` with the algebra done that does not depend on the image.

    A transposed convolution and the first convolution on its result are one transposed convolution with a
    larger kernel: 8 instead of 27 products a channel where both strides and kernels are (2, 2, 2) and
    (3, 3, 3). It needs no concatenation either. Anything but a U-Net of `medseg.nets.unet` comes back as is.

    Parameters
    ----------
    network : not changed; what need not be rewritten is shared with the result
    """
    return FoldedUNet(network) if isinstance(network, UNet) else network


def channels_last(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a folded network that computes in the channels-last layout on a CPU.

    Parameters
    ----------
    network : what :func:`fold` returned; anything but a U-Net comes back as is
    dtype : of weights and features, float32 or bfloat16; logits are float32, norms count in float32
    """
    return ChannelsLastUNet(network, dtype) if isinstance(network, FoldedUNet) else network


class FoldedUNet(nn.Module):
    """A U-Net without deep supervision, its decoder folded where that takes fewer products.

    Attributes
    ----------
    downsampling : by how much the coarsest stage is smaller than the input, an axis
    """

    def __init__(self, network: UNet) -> None:
        super().__init__()
        decoder = network.decoder
        ups = [cast(_Up, up) for up in decoder.transpconvs]
        self.encoder = network.encoder
        self.stages = nn.ModuleList(
            _fold_stage(up, cast(ConvStack, stage)) for up, stage in zip(ups, decoder.stages, strict=True)
        )
        self.head = decoder.seg_layers[-1]
        self.downsampling = downsampling([up.stride for up in ups])

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, ...) to logits (n, out_channels, ...)."""
        features = self.encoder(x)
        x = features.pop()
        for stage in self.stages:
            x = stage(x, features.pop())
        return cast(Tensor, self.head(x))


class FoldedStage(nn.Module):
    """One resolution of the decoder with its upsampling folded into the first convolution."""

    def __init__(self, up: _Up, stage: ConvStack) -> None:
        super().__init__()
        first = cast(ConvNormAct, stage.convs[0])
        conv = cast(nn.Conv3d, first.conv)
        self.up = _composite(up, conv)
        self.skip = _second_part(conv, up.out_channels)
        self.norm = first.norm
        self.nonlin = first.nonlin
        self.rest = nn.Sequential(*list(stage.convs)[1:])
        self.one_more_channel = (0, 0) * len(up.stride) + (0, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Coarse features and those of the encoder to fine features."""
        # The bias of the upsampling ends at the border: as weights of a channel of ones it does so by itself.
        up = self.up(F.pad(x, self.one_more_channel, value=1.0))
        return cast(Tensor, self.rest(self.nonlin(self.norm(self.skip(skip).add_(up)))))


class PlainStage(nn.Module):
    """One resolution of the decoder as it is."""

    def __init__(self, up: nn.Module, stage: nn.Module) -> None:
        super().__init__()
        self.up, self.stage = up, stage

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Coarse features and those of the encoder to fine features."""
        return cast(Tensor, self.stage(torch.cat((self.up(x), skip), 1)))


def _fold_stage(up: _Up, stage: ConvStack) -> nn.Module:
    conv = cast(nn.Conv3d, cast(ConvNormAct, stage.convs[0]).conv)
    kernel, stride = conv.kernel_size, up.stride
    larger = prod(k + s - 1 for k, s in zip(kernel, stride, strict=True)) / prod(stride)
    together = up.in_channels * conv.out_channels * larger
    apart = up.out_channels * (up.in_channels + conv.out_channels * prod(kernel))
    return FoldedStage(up, stage) if together < apart else PlainStage(up, stage)


def _composite(up: _Up, conv: nn.Conv3d) -> nn.Module:
    """Return the transposed convolution that is `up` followed by its part of `conv`.

    The product of the weights w of `up` with tap t of `conv` belongs t places before w; sums of these are
    the weights of both. One more input channel, which must hold ones, stands for the bias of `up`.
    """
    taps = conv.weight.detach()[:, : up.out_channels].permute(*range(2, conv.weight.ndim), 1, 0).contiguous()
    ones = cast(Tensor, up.bias).detach().reshape(1, -1, *(1 for _ in up.stride))
    images = torch.cat([up.weight.detach(), ones.expand(1, *up.weight.shape[1:])])
    rows = images.movedim(1, -1).flatten(0, -2)
    size = [k + s - 1 for k, s in zip(conv.kernel_size, up.stride, strict=True)]
    result = torch.zeros(len(images), *size, conv.out_channels)
    for tap in product(*(range(k) for k in conv.kernel_size)):
        starts = [k - 1 - t for k, t in zip(conv.kernel_size, tap, strict=True)]
        place: Any = (
            slice(None),
            *(slice(n, n + s) for n, s in zip(starts, up.stride, strict=True)),
        )
        result[place] += (rows @ taps[tap]).view(len(images), *up.stride, -1)
    padding = tuple(k - 1 - p for k, p in zip(conv.kernel_size, _padding(conv), strict=True))
    kind: Any = type(up)
    sizes = (tuple(size), up.stride, padding)
    module = kind(len(images), conv.out_channels, *sizes, bias=False, device="meta")
    module.weight = nn.Parameter(result.movedim(-1, 1).contiguous(), requires_grad=False)
    return cast(nn.Module, module)


def _second_part(conv: nn.Conv3d, start: int) -> nn.Module:
    """Return `conv` for its inputs from `start` on, to which the other part is added."""
    weight = conv.weight.detach()[:, start:].contiguous()
    kind: Any = type(conv)
    sizes = (conv.kernel_size, conv.stride, conv.padding)
    module = kind(weight.shape[1], conv.out_channels, *sizes, bias=conv.bias is not None, device="meta")
    module.weight, module.bias = nn.Parameter(weight, requires_grad=False), conv.bias
    return cast(nn.Module, module)


def _padding(conv: nn.Conv3d) -> tuple[int, ...]:
    assert not isinstance(conv.padding, str)  # ConvNormAct gives numbers
    return conv.padding


class ChannelsLastUNet(nn.Module):
    """A folded U-Net in channels-last layout."""

    def __init__(self, network: FoldedUNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.dtype = dtype
        self.layout = _LAYOUT[len(network.downsampling)]
        _replace(self.network)
        for module in self.network.modules():
            if not isinstance(module, NormAct):
                for name, value in module.named_parameters(recurse=False):
                    layout = self.layout if value.ndim > 1 else torch.preserve_format
                    setattr(module, name, nn.Parameter(value.to(dtype, memory_format=layout), False))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, ...) to float32 logits (n, out_channels, ...)."""
        logits = self.network(x.to(self.dtype, memory_format=self.layout))
        return cast(Tensor, logits.float())


def _replace(module: nn.Module) -> None:
    """Put our convolutions and norms into the places of torch's."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.Conv3d):
            setattr(module, name, Convolution(cast(nn.Conv3d, child)))
        elif isinstance(child, nn.AvgPool2d | nn.AvgPool3d):
            setattr(module, name, _Float32(child))
        else:
            _replace(child)
    if isinstance(module, ConvNormAct | FoldedStage):
        slope = module.nonlin.negative_slope if isinstance(module.nonlin, nn.LeakyReLU) else None
        norm = cast(nn.InstanceNorm3d, module.norm)
        module.norm, module.nonlin = NormAct(norm, slope), nn.Identity()


class Convolution(nn.Module):
    """A convolution by oneDNN, also where torch's rule of thumb would take its slow loop (small batches)."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.arguments = (_padding(conv), conv.stride, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, ...) to (n, outputs, ...)."""
        return torch.mkldnn_convolution(x, self.weight, self.bias, *self.arguments)


class _Float32(nn.Module):
    """A module that has no bfloat16 form."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module(x.float()).to(x.dtype))


class NormAct(nn.Module):
    """Instance norm and LeakyReLU in place, part by part while a part is in the cache.

    torch takes six times as long in this layout, and its group norm loses three digits of the variance.
    """

    def __init__(self, norm: nn.InstanceNorm3d, slope: float | None) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.slope = norm.weight, norm.bias, norm.eps, slope

    def forward(self, x: Tensor) -> Tensor:
        """Change (n, channels, ...) in place and return it."""
        x = x.contiguous(memory_format=_LAYOUT[x.ndim - 2])
        for image in x.movedim(1, -1):
            self._normalize(image.view(-1, image.shape[-1]))
        return x

    def _normalize(self, voxels: Tensor) -> None:
        count, channels = voxels.shape
        wide = gcd(count, _VOXELS_A_ROW)
        rows = voxels.view(-1, wide * channels)
        parts = torch.split(rows, max(1, _PART * torch.get_num_threads() // rows.shape[1]))
        mean = _per_channel(sum(part.sum(0, dtype=torch.float32) for part in parts), wide) / count
        shift = mean.repeat(wide)
        squares = sum((part.float() - shift).square_().sum(0) for part in parts)
        variance = _per_channel(squares, wide) / count
        scale = self.weight * torch.rsqrt(variance + self.eps)
        offset = (self.bias - mean * scale).repeat(wide)
        scale = scale.repeat(wide)
        for part in parts:
            self._finish(part, scale, offset)

    def _finish(self, part: Tensor, scale: Tensor, offset: Tensor) -> None:
        same = part.dtype == offset.dtype
        values = torch.addcmul(offset, part, scale, out=part) if same else torch.addcmul(offset, part, scale)
        if self.slope is not None:
            F.leaky_relu_(values, self.slope)
        if not same:
            part.copy_(values)


def _per_channel(row: Any, wide: int) -> Tensor:
    return cast(Tensor, row.view(wide, -1).sum(0))
