"""TinyViT, the small image encoder of LiteMedSAM and MobileSAM.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022, in the variant
with 5 million parameters, its class head replaced by SAM's neck (Zhang et al., "Faster Segment Anything",
2023). Parameters have the names of the published checkpoints.
"""

import copy
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F

# Of the 5M variant (TinyViT, table 6), by stage; the first stage convolves and has neither heads nor windows.
WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
EXPANSION = 4
# Pixels that the first stage computes at once. On a core with 1 MB of second-level cache, at a width of
# 256: 0.50 of the time of the whole map in fp32, 0.63 in bf16.
_STRIP = 32 * 256
# What SAM's decoder reads.
EMBEDDING = 256


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of an (n, c, h, w) map, with SAM's epsilon of 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """A convolution and its batch norm; :func:`fold` makes them one convolution."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) to (n, outside, h / stride, w / stride)."""
        return cast(Tensor, self.bn(self.c(x)))

    def folded(self) -> nn.Conv2d:
        """Return the one convolution that does the same in evaluation."""
        with torch.no_grad():
            variance, mean = cast(Tensor, self.bn.running_var), cast(Tensor, self.bn.running_mean)
            scale = self.bn.weight / torch.sqrt(variance + self.bn.eps)
            one = nn.Conv2d(
                self.c.in_channels,
                self.c.out_channels,
                cast(tuple[int, int], self.c.kernel_size),
                cast(tuple[int, int], self.c.stride),
                cast(tuple[int, int], self.c.padding),
                groups=self.c.groups,
            )
            one.weight.copy_(self.c.weight * scale[:, None, None, None])
            cast(Tensor, one.bias).copy_(self.bn.bias - mean * scale)
        return one.requires_grad_(False)


class MBConv(nn.Module):
    """Inverted bottleneck of the first stage: widen, convolve each channel, narrow, add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * EXPANSION
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same, in strips of rows that fit a core's cache."""
        rows = max(1, _STRIP // x.shape[3])
        if self.training or x.shape[2] <= rows:
            return self._strip(x)
        strips = []
        for row in range(0, x.shape[2], rows):
            above = min(row, 1)  # what the 3 x 3 kernel sees beyond the strip
            end = min(row + rows, x.shape[2])
            strips.append(self._strip(x[:, :, row - above : end + 1])[:, :, above : above + end - row])
        return torch.cat(strips, dim=2)

    def _strip(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv1(x))
        y = F.gelu(self.conv2(y))
        return F.gelu(x + self.conv3(y))


class Downsample(nn.Module):
    """Change of width between stages; halves the grid, except before the last stage."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 1 if outside == WIDTHS[-1] else 2
        self.conv1 = ConvNorm(inside, outside)
        self.conv2 = ConvNorm(outside, outside, 3, stride, groups=outside)
        self.conv3 = ConvNorm(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) to (n, outside, h / stride, w / stride)."""
        return cast(Tensor, self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Attention(nn.Module):
    """Attention within a window, with a learned bias for each distance in rows and columns."""

    index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("index", _distances(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, pixels, width) to the same."""
        windows, pixels, width = x.shape
        # Rows of the weight are grouped by head, each with its queries, keys and values.
        parts = self.qkv(self.norm(x)).view(windows, pixels, self.heads, -1).transpose(1, 2)
        query, key, value = parts.chunk(3, dim=-1)
        bias = self.attention_biases[:, self.index].to(query.dtype)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        return cast(Tensor, self.proj(x.transpose(1, 2).reshape(windows, pixels, width)))


class Mlp(nn.Module):
    """Pre-normed perceptron of one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width * EXPANSION)
        self.fc2 = nn.Linear(width * EXPANSION, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm(x)))))


class Block(nn.Module):
    """Attention within windows, a depthwise convolution across them, a perceptron."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, width) to the same."""
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + cast(Tensor, self.mlp(x))

    def _attend(self, x: Tensor) -> Tensor:
        """Pad with zeros to whole windows (they pass the norm and are not masked), attend, crop."""
        n, h, w, width = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x.view(n, rows, size, columns, size, width).transpose(2, 3)
        x = self.attn(x.reshape(-1, size * size, width))
        x = x.view(n, rows, columns, size, size, width).transpose(2, 3)
        return x.reshape(n, rows * size, columns * size, width)[:, :h, :w]


class Stage(nn.Module):
    """Blocks at one width and, but for the last stage, the way to the next."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        width = WIDTHS[stage]
        self.convolves = stage == 0
        self.blocks = nn.ModuleList(
            MBConv(width) if self.convolves else Block(width, HEADS[stage], WINDOWS[stage])
            for _ in range(DEPTHS[stage])
        )
        self.downsample = Downsample(width, WIDTHS[stage + 1]) if stage + 1 < len(WIDTHS) else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, next width, ...)."""
        if not self.convolves:
            x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        if not self.convolves:
            x = x.permute(0, 3, 1, 2)
        return x if self.downsample is None else cast(Tensor, self.downsample(x))


class _PatchEmbed(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        kernel = 1 if stride == 1 else 3
        half = WIDTHS[0] // 2
        self.seq = nn.Sequential(
            ConvNorm(3, half, kernel, stride), nn.GELU(), ConvNorm(half, WIDTHS[0], kernel, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.seq(x))


class TinyViT(nn.Module):
    """The encoder: (n, 3, H, W) to an embedding (n, 256, H / stride, W / stride).

    Parameters
    ----------
    stem_stride : of each of the two convolutions of the stem: 2 in MobileSAM; 1, with kernels of one pixel,
        in LiteMedSAM, which so keeps the full resolution in its first stage

    Attributes
    ----------
    stride : pixels of the input, along each axis, to one of the embedding
    """

    def __init__(self, stem_stride: int = 2) -> None:
        super().__init__()
        self.stride = 4 * stem_stride**2
        self.patch_embed = _PatchEmbed(stem_stride)
        self.layers = nn.ModuleList(Stage(stage) for stage in range(len(WIDTHS)))
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], EMBEDDING, 1, bias=False),
            LayerNorm2d(EMBEDDING),
            nn.Conv2d(EMBEDDING, EMBEDDING, 3, padding=1, bias=False),
            LayerNorm2d(EMBEDDING),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sides of the image are multiples of `stride`."""
        # The stem stays in fp32 under autocast: grey levels in bf16 cost LiteMedSAM 0.003 of Dice, and these
        # cost it 8 % of its time (mean of nine slices of sarcoma and brain tumour).
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
            x = self.patch_embed(x.float().contiguous(memory_format=torch.channels_last))
        for stage in self.layers:
            x = stage(x)
        return cast(Tensor, self.neck(x))


def fold(encoder: nn.Module) -> nn.Module:
    """Return `encoder` with each convolution and its batch norm made one convolution.

    The same function in evaluation, up to rounding. An encoder without batch norms comes back as is; else the
    result is a copy, which cannot read a checkpoint any more.
    """
    if not any(isinstance(module, ConvNorm) for module in encoder.modules()):
        return encoder
    encoder = copy.deepcopy(encoder)
    _fold_below(encoder)
    return encoder


def _fold_below(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            folded = child.folded()
            folded.weight.data = folded.weight.data.contiguous(memory_format=torch.channels_last)
            setattr(module, name, folded)
        else:
            _fold_below(child)


def _distances(window: int) -> Tensor:
    """(pixels, pixels): index of the bias of each pair of pixels of a window, |dy| * window + |dx|."""
    rows = torch.arange(window).repeat_interleave(window)
    columns = torch.arange(window).repeat(window)
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
