"""SAM's prompt encoder and mask decoder, the small half that runs at every click.

Kirillov et al., "Segment Anything", ICCV 2023, appendix A. Parameters have the names of the published
checkpoints. Positions are (x, y) = (column, row) in pixels of the encoder's input.
"""

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.nets.tinyvit import EMBEDDING, LayerNorm2d

# Signs of a click; a padding point stands for "no further click".
POSITIVE, NEGATIVE, PADDING = 1, 0, -1
MASKS = 4  # token 0 answers alone, tokens 1 to 3 answer an ambiguous prompt together
_HEADS = 8
_HIDDEN = 2048


class Positions(nn.Module):
    """Random Fourier features of a position in the unit square."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, EMBEDDING // 2))

    def forward(self, positions: Tensor) -> Tensor:
        """(..., 2) in 0..1 to (..., 256)."""
        turns = (2 * positions - 1) @ self.positional_encoding_gaussian_matrix
        turns = 2 * math.pi * turns
        return torch.cat([turns.sin(), turns.cos()], dim=-1)

    def grid(self, h: int, w: int) -> Tensor:
        """Features of the middles of h x w cells: (1, 256, h, w)."""
        device = self.positional_encoding_gaussian_matrix.device
        rows = (torch.arange(h, device=device) + 0.5) / h
        columns = (torch.arange(w, device=device) + 0.5) / w
        middles = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], dim=-1)
        return cast(Tensor, self(middles)).permute(2, 0, 1)[None]


class PromptEncoder(nn.Module):
    """Points, box corners and a mask to what the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = Positions()
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, EMBEDDING) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, EMBEDDING)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            LayerNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, EMBEDDING, 1),
        )
        self.no_mask_embed = nn.Embedding(1, EMBEDDING)

    def sparse(
        self, size: tuple[int, int], points: Tensor | None, signs: Tensor | None, box: Tensor | None
    ) -> Tensor:
        """Return the tokens of points and box: (n, tokens, 256).

        Parameters
        ----------
        size : height and width of the encoder's input
        points : (n, points, 2) x, y
        signs : (n, points) of POSITIVE, NEGATIVE, PADDING
        box : (n, 4) x, y of the first corner, x, y of the last
        """
        tokens = []
        scale = torch.tensor([size[1], size[0]], dtype=torch.float32, device=self.no_mask_embed.weight.device)
        if points is not None and signs is not None:
            if box is None:  # one padding point, where there is no box that ends the list
                points, signs = F.pad(points, (0, 0, 0, 1)), F.pad(signs, (0, 1), value=PADDING)
            tokens.append(self._points((points + 0.5) / scale, signs))
        if box is not None:
            corners = self.pe_layer((box.view(-1, 2, 2) + 0.5) / scale)
            kinds = [self._weight(kind) for kind in (2, 3)]
            tokens.append(corners + torch.cat(kinds))
        return torch.cat(tokens, dim=1)

    def dense(self, mask: Tensor | None, h: int, w: int) -> Tensor:
        """Return the features of a mask of logits (n, 1, 4 h, 4 w), or of its absence: (n, 256, h, w)."""
        if mask is None:
            return self.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, h, w)
        return cast(Tensor, self.mask_downscaling(mask))

    def _points(self, positions: Tensor, signs: Tensor) -> Tensor:
        signs = signs[..., None]
        found = self.pe_layer(positions) + torch.where(signs == POSITIVE, self._weight(1), self._weight(0))
        return torch.where(signs == PADDING, self.not_a_point_embed.weight, found)

    def _weight(self, kind: int) -> Tensor:
        return cast(nn.Embedding, self.point_embeddings[kind]).weight


class Attention(nn.Module):
    """Attention with separate projections; `inner` may be narrower than the tokens."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(EMBEDDING, inner)
        self.k_proj = nn.Linear(EMBEDDING, inner)
        self.v_proj = nn.Linear(EMBEDDING, inner)
        self.out_proj = nn.Linear(inner, EMBEDDING)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(n, queries, 256) and (n, keys, 256) twice to (n, queries, 256)."""
        heads = [
            each.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for each in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        ]
        x = F.scaled_dot_product_attention(*heads)
        return cast(Tensor, self.out_proj(x.transpose(1, 2).flatten(2)))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(EMBEDDING, _HIDDEN)
        self.lin2 = nn.Linear(_HIDDEN, EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lin2(F.relu(self.lin1(x))))


class TwoWayBlock(nn.Module):
    """Tokens look at each other and at the image, then the image looks at the tokens."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(EMBEDDING)
        self.norm1 = nn.LayerNorm(EMBEDDING)
        self.cross_attn_token_to_image = Attention(EMBEDDING // 2)
        self.norm2 = nn.LayerNorm(EMBEDDING)
        self.mlp = _Mlp()
        self.norm3 = nn.LayerNorm(EMBEDDING)
        self.norm4 = nn.LayerNorm(EMBEDDING)
        self.cross_attn_image_to_token = Attention(EMBEDDING // 2)

    def forward(self, tokens: Tensor, image: Tensor, where: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, t, 256) and image (n, p, 256); `where` and `places` are their positional terms."""
        if self.first:  # here neither positional term nor residual
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            asked = tokens + where
            tokens = tokens + self.self_attn(asked, asked, tokens)
        tokens = self.norm1(tokens)
        seen = image + places
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + where, seen, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(seen, tokens + where, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two blocks and a last look of the tokens at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(first) for first in (True, False))
        self.final_attn_token_to_image = Attention(EMBEDDING // 2)
        self.norm_final_attn = nn.LayerNorm(EMBEDDING)

    def forward(self, tokens: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, t, 256), image and its positions (n, p, 256) to tokens and image."""
        where = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, where, places)
        tokens = tokens + self.final_attn_token_to_image(tokens + where, image + places, image)
        return cast(Tensor, self.norm_final_attn(tokens)), image


class _Perceptron(nn.Module):
    def __init__(self, outside: int) -> None:
        super().__init__()
        widths = (EMBEDDING, EMBEDDING, EMBEDDING, outside)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return cast(Tensor, self.layers[-1](x))


class MaskDecoder(nn.Module):
    """Embedding and prompt to masks of four times its grid, each with the IoU that it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer()
        self.iou_token = nn.Embedding(1, EMBEDDING)
        self.mask_tokens = nn.Embedding(MASKS, EMBEDDING)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(EMBEDDING, EMBEDDING // 4, 2, 2),
            LayerNorm2d(EMBEDDING // 4),
            nn.GELU(),
            nn.ConvTranspose2d(EMBEDDING // 4, EMBEDDING // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Perceptron(EMBEDDING // 8) for _ in range(MASKS))
        self.iou_prediction_head = _Perceptron(MASKS)

    def forward(
        self, embedding: Tensor, places: Tensor, sparse: Tensor, dense: Tensor, masks: slice
    ) -> tuple[Tensor, Tensor]:
        """Decode n prompts.

        Parameters
        ----------
        embedding : (n or 1, 256, h, w)
        places : (1, 256, h, w) positional features of its cells
        sparse : (n, tokens, 256)
        dense : (n or 1, 256, h, w)
        masks : which of the four masks are wanted

        Returns
        -------
        logits : (n, masks, 4 h, 4 w)
        iou : (n, masks), may exceed 1
        """
        n = sparse.shape[0]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)
        image = (embedding + dense).expand(n, -1, -1, -1)
        h, w = image.shape[-2:]
        tokens, image = self.transformer(
            torch.cat([own, sparse], dim=1),
            image.flatten(2).transpose(1, 2),
            places.flatten(2).transpose(1, 2),
        )
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, (h, w)))
        wanted = range(MASKS)[masks]
        weights = torch.stack(
            [self.output_hypernetworks_mlps[each](tokens[:, 1 + each]) for each in wanted], dim=1
        )
        logits = (weights @ upscaled.flatten(2)).unflatten(2, (4 * h, 4 * w))
        return logits, self.iou_prediction_head(tokens[:, 0])[:, masks]
