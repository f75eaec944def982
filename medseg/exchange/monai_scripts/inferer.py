"""nnU-Net's sliding window as a MONAI inferer: evenly spread tiles, its Gaussian, the mean over flips."""

from collections.abc import Callable, Sequence
from itertools import combinations, product
from math import ceil
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from scipy.ndimage import gaussian_filter
from torch import Tensor

# nnU-Net: sigma = patch / 8, peak 10.
SIGMA = 1.0 / 8
PEAK = 10.0


class TiledInferer(SlidingWindowInferer):  # type: ignore[misc]
    """Logits of whole volumes.

    MONAI's own inferer moves by a fixed step and lets the last tile overlap more; nnU-Net spreads its tiles
    evenly and mirrors each of them.

    Parameters
    ----------
    roi_size : patch, three axes; or two for a network that sees one slice of the first axis at a time
    sw_batch_size : tiles that go through the network at once
    overlap : of neighbouring tiles, as a part of the patch
    mirror_axes : patch axes to flip
    sided : whether labels say left or right; then the axis that runs left-right in the world is not flipped
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int = 1,
        overlap: float = 0.5,
        mirror_axes: Sequence[int] = (),
        sided: bool = False,
    ) -> None:
        super().__init__(
            roi_size=tuple(roi_size),
            sw_batch_size=sw_batch_size,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=SIGMA,
        )
        self.patch = tuple(roi_size)
        self.step = 1.0 - overlap
        self.mirror_axes = tuple(mirror_axes)
        self.sided = sided

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """(n, c, a0, a1, a2) to logits (n, outputs, a0, a1, a2) on the CPU."""
        flips = self._flips(getattr(inputs, "affine", None))
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.stack([self._run(volume, network, flips) for volume in plain])

    def _flips(self, affine: Any) -> list[tuple[int, ...]]:
        """Return all combinations of the axes of a batch to flip, the first of none."""
        axes = self.mirror_axes
        if self.sided and affine is not None:
            matrix = np.asarray(affine, dtype=np.float64).reshape(-1, 4, 4)[0]
            left_right = int(np.argmax(np.abs(matrix[0, :3]) / np.linalg.norm(matrix[:3, :3], axis=0)))
            axes = tuple(axis for axis in axes if axis != left_right - (3 - len(self.patch)))
        shifted = [axis + 2 for axis in axes]
        return [flip for count in range(len(axes) + 1) for flip in combinations(shifted, count)]

    def _run(self, volume: Tensor, network: Callable[..., Any], flips: list[tuple[int, ...]]) -> Tensor:
        # 16 bits as nnU-Net, and 32 where its sums overflow.
        for dtype in (torch.float16, torch.float32):
            logits = self._slide(volume, network, flips, dtype)
            if bool(torch.isfinite(logits).all()):
                return logits
        raise ValueError("The network returned numbers that are not finite: its weights are damaged.")

    def _slide(
        self, volume: Tensor, network: Callable[..., Any], flips: list[tuple[int, ...]], dtype: torch.dtype
    ) -> Tensor:
        padded, inner = self._pad(volume)
        weight = torch.from_numpy(gaussian(self.patch)).reshape((1,) * (3 - len(self.patch)) + self.patch)
        tiles = self._tiles(padded.shape[1:])
        count = torch.zeros(padded.shape[1:], dtype=dtype)
        total: Tensor | None = None
        for start in range(0, len(tiles), self.sw_batch_size):
            group = tiles[start : start + self.sw_batch_size]
            for tile, logits in zip(group, self._predict(padded, group, network, flips), strict=True):
                if total is None:
                    total = torch.zeros((len(logits), *padded.shape[1:]), dtype=dtype)
                window = total[(slice(None), *tile)]
                window.copy_(logits * weight.float() + window.float())
                count[tile] += weight.to(dtype)
        assert total is not None  # a volume has at least one tile
        return total.div_(count)[inner]

    def _predict(
        self, padded: Tensor, tiles: list[Any], network: Callable[..., Any], flips: list[tuple[int, ...]]
    ) -> Tensor:
        """Return float32 logits (n, outputs, three axes) of some tiles, the mean over the flips."""
        batch = torch.stack([padded[(slice(None), *tile)] for tile in tiles])
        batch = batch.squeeze(2) if len(self.patch) == 2 else batch
        total: Tensor | None = None
        for flip in flips:
            logits = network(batch.flip(flip)).float().flip(flip).cpu()
            total = logits if total is None else total.add_(logits)
        assert total is not None  # no flip at all is the first
        total /= len(flips)
        return total.unsqueeze(2) if len(self.patch) == 2 else total

    def _pad(self, volume: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
        """Return the volume with zeros around it up to the patch, and where it lies in there."""
        shape = tuple(volume.shape[1:])
        patch = (1,) * (3 - len(self.patch)) + self.patch
        missing = [max(0, size - n) for size, n in zip(patch, shape, strict=True)]
        sides = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape, strict=True))
        return torch.nn.functional.pad(volume, sides), (slice(None), *inner)

    def _tiles(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        patch = (1,) * (3 - len(self.patch)) + self.patch
        starts = [tile_starts(n, p, self.step) for n, p in zip(shape, patch, strict=True)]
        if len(self.patch) == 2:
            starts[0] = list(range(shape[0]))
        return [tuple(slice(s, s + p) for s, p in zip(c, patch, strict=True)) for c in product(*starts)]


def tile_starts(size: int, patch: int, step: float) -> list[int]:
    """Return where tiles begin on one axis: evenly spread, at most ``step * patch`` apart."""
    count = ceil((size - patch) / (patch * step)) + 1
    if count == 1:
        return [0]
    return [int(np.round((size - patch) / (count - 1) * i)) for i in range(count)]


def gaussian(patch: Sequence[int]) -> Any:
    """Return the float16 weights of a tile; none is zero."""
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    weights = gaussian_filter(impulse, [n * SIGMA for n in patch], mode="constant")
    weights = (weights / (weights.max() / PEAK)).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights
