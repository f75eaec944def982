"""The plain vision transformer of the original SAM, in its three sizes (ViT-B, ViT-L, ViT-H).

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022: most blocks attend
within windows of 14 x 14 patches, four attend to everything; relative positions are decomposed into rows and
columns. Parameters have the names of the published checkpoints.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.nets.tinyvit import EMBEDDING, LayerNorm2d

PATCH = 16
WINDOW = 14


@dataclass(frozen=True)
class VitSize:
    """One size: width of tokens, blocks, heads, and which blocks attend to everything."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


# segment-anything, build_sam.py.
SIZES = {
    "vit-b": VitSize(768, 12, 12, (2, 5, 8, 11)),
    "vit-l": VitSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit-h": VitSize(1280, 32, 16, (7, 15, 23, 31)),
}


class Attention(nn.Module):
    """Attention with a bias that is a product of the query with learned relative rows and columns."""

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, width) to the same."""
        n, h, w, width = x.shape
        qkv = self.qkv(x).view(n, h * w, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(query, h, w))
        return cast(Tensor, self.proj(x.transpose(1, 2).reshape(n, h, w, width)))

    def _bias(self, query: Tensor, h: int, w: int) -> Tensor:
        """(n, heads, h * w, h * w)."""
        n, heads, pixels, width = query.shape
        grid = query.reshape(n * heads, h, w, width)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, _relative(self.rel_pos_h, h).to(grid.dtype))
        columns = torch.einsum("bhwc,wkc->bhwk", grid, _relative(self.rel_pos_w, w).to(grid.dtype))
        bias = rows[..., :, None] + columns[..., None, :]
        return bias.reshape(n, heads, pixels, pixels)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, 4 * width)
        self.lin2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lin2(F.gelu(self.lin1(x))))


class Block(nn.Module):
    """Attention (within windows, unless `window` is 0) and a perceptron, both pre-normed."""

    def __init__(self, width: int, heads: int, window: int, grid: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, window or grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, width) to the same."""
        y = self.norm1(x)
        x = x + (self._attend(y) if self.window else self.attn(y))
        return x + cast(Tensor, self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        """Pad the normed map with zeros to whole windows (they are not masked), attend, crop."""
        n, h, w, width = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x.view(n, rows, size, columns, size, width).transpose(2, 3)
        x = self.attn(x.reshape(-1, size, size, width))
        x = x.view(n, rows, columns, size, size, width).transpose(2, 3)
        return x.reshape(n, rows * size, columns * size, width)[:, :h, :w]


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).permute(0, 2, 3, 1)


class ImageEncoderViT(nn.Module):
    """The encoder: (n, 3, H, W) to an embedding (n, 256, H / 16, W / 16).

    Parameters
    ----------
    size : of the transformer
    grid : patches along a side for which its positions were learned (64: images of 1024 pixels). Images of
        other sizes get positions interpolated between these.
    """

    stride = PATCH

    def __init__(self, size: VitSize, grid: int = 64) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(size.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, size.width))
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, 0 if block in size.global_blocks else WINDOW, grid)
            for block in range(size.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(size.width, EMBEDDING, 1, bias=False),
            LayerNorm2d(EMBEDDING),
            nn.Conv2d(EMBEDDING, EMBEDDING, 3, padding=1, bias=False),
            LayerNorm2d(EMBEDDING),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sides of the image are multiples of 16."""
        x = self.patch_embed(x)
        x = x + self._positions(x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.neck(x.permute(0, 3, 1, 2)))

    def _positions(self, h: int, w: int) -> Tensor:
        if self.pos_embed.shape[1:3] == (h, w):
            return self.pos_embed
        learned = self.pos_embed.permute(0, 3, 1, 2)
        fitted = F.interpolate(learned, size=(h, w), mode="bicubic", align_corners=False, antialias=True)
        return fitted.permute(0, 2, 3, 1)


def _relative(positions: Tensor, side: int) -> Tensor:
    """(side, side, width): what was learned for each difference of two rows, or of two columns."""
    span = 2 * side - 1
    if positions.shape[0] != span:
        positions = F.interpolate(positions.T[None], size=span, mode="linear", align_corners=False)[0].T
    steps = torch.arange(side, device=positions.device)
    return positions[steps[:, None] - steps + side - 1]
