"""A network over a whole volume: overlapping tiles, weighted by a Gaussian, averaged over flips.

Source: nnU-Net v2 ``inference/predict_from_raw_data.py``.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg import log
from medseg.errors import BundleError
from medseg.geometry.tiles import gaussian_weights, pad_to, tile_slices
from medseg.infer.runtime import count_threads, in_order, torch_threads
from medseg.types import FloatArray, Shape

# Voxels of all tiles that go through the network at once; small tiles (slices) are grouped up to this.
BATCH_VOXELS = {"cpu": 1 << 16, "cuda": 1 << 21}
# Tiles below this many voxels gain nothing from several threads inside one operation.
SMALL_VOXELS = 1 << 17
# Features of a tile: about four maps of 32 float32 channels at once.
BYTES_PER_VOXEL = 512
# Tiles run side by side up to this estimate of their memory.
TILE_MEMORY_BYTES = 3 << 29
# Logits larger than this are kept in a file instead of memory.
MEMORY_BYTES = 2 << 30

Index = tuple[slice, ...]
Network = Callable[[Tensor], Any]
"""A module, or any function from a batch to logits."""


def sliding_window(
    network: Network,
    data: FloatArray,
    patch_size: Shape,
    n_outputs: int,
    mirror_axes: Sequence[int] = (),
    step: float = 0.5,
    compatible: bool = True,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    label: str = "Predict tiles",
) -> FloatArray:
    """Return the logits of a whole preprocessed volume.

    Parameters
    ----------
    network : maps (n, c, *patch) to logits (n, n_outputs, *patch), or to a list with these first
    data : (c, a0, a1, a2) float32; smaller axes are padded with zeros, centred
    patch_size : three axes, or two for a network that sees one slice of the first axis at a time
    mirror_axes : patch axes; logits are the mean over all combinations of flips
    step : distance of tiles as a part of the patch
    compatible : accumulate in float16, with nnU-Net's roundings; else in float32
    device : where `network` computes; sums stay there too if they fit
    threads : CPU threads, None for every core; they take one tile each where tiles are small
    label : name of the progress bar

    Returns
    -------
    (n_outputs, a0, a1, a2) float16 (float32 unless `compatible`); memory-mapped where very large

    Raises
    ------
    BundleError
        The network returns numbers that are not finite.
    """
    plan = _Pass(
        network,
        tuple(patch_size),
        n_outputs,
        tuple(mirror_axes),
        step,
        torch.device(device),
        count_threads(threads),
        label,
    )
    logits = plan.run(data, torch.float16 if compatible else torch.float32)
    if logits is None and compatible:
        log.logger.warning(
            "The network's outputs are too large for 16-bit numbers: predicting again with 32 bits."
        )
        logits = plan.run(data, torch.float32)
    if logits is None:
        raise BundleError(
            "the network returned numbers that are not finite. Predict with precision fp32; "
            "if that fails too, the weights are damaged."
        )
    return logits


@dataclass(frozen=True)
class _Pass:
    """One way over a volume."""

    network: Network
    patch_size: Shape
    n_outputs: int
    mirror_axes: tuple[int, ...]
    step: float
    device: torch.device
    threads: int
    label: str

    def run(self, data: FloatArray, dtype: torch.dtype) -> FloatArray | None:
        """Return the mean logits, or None where they are not finite."""
        padded, inner = pad_to(data, (1, *self.patch_size) if self.flat else self.patch_size)
        source, shape = torch.from_numpy(padded), padded.shape[1:]
        groups = self.groups(tile_slices(shape, self.patch_size, self.step))
        flips = _flips(self.mirror_axes)
        units = [_Unit(source, group, flip) for group in groups for flip in flips]
        workers, inside = self.share_threads(len(units))
        with torch.inference_mode(), log.task(self.label, len(units)) as task, torch_threads(inside):
            sums = _Sums(self.n_outputs, shape, self.patch_size, dtype, self.device)
            outputs = in_order(self.forward, units, workers)
            for group in groups:
                total = next(outputs)
                task.advance()
                for _ in flips[1:]:
                    total += next(outputs)
                    task.advance()
                total /= len(flips)
                for tile, logits in zip(group, total.unsqueeze(2) if self.flat else total, strict=True):
                    sums.add(tile, logits)
            mean = sums.mean()
        return None if mean is None else mean[(slice(None), *inner[1:])]

    @property
    def flat(self) -> bool:
        """Whether the network sees slices."""
        return len(self.patch_size) == 2

    @property
    def voxels(self) -> int:
        """Of one tile."""
        return int(np.prod(self.patch_size))

    def groups(self, tiles: list[Index]) -> list[list[Index]]:
        """Cut the list of tiles into batches."""
        size = max(1, BATCH_VOXELS.get(self.device.type, 1) // self.voxels)
        return [tiles[start : start + size] for start in range(0, len(tiles), size)]

    def share_threads(self, units: int) -> tuple[int, int]:
        """Return how many units run at once, and on how many threads each."""
        if self.device.type != "cpu":
            return 1, 1
        room = max(1, TILE_MEMORY_BYTES // (self.voxels * BYTES_PER_VOXEL))
        workers = min(self.threads, units, room)
        if workers == 1 and self.voxels < SMALL_VOXELS:
            return 1, 1
        return workers, self.threads if workers == 1 else 1

    def forward(self, unit: "_Unit") -> Tensor:
        """Return float32 logits (n, n_outputs, *patch) of one batch, flipped there and back."""
        with torch.inference_mode():
            batch = torch.stack([unit.source[(slice(None), *tile)] for tile in unit.tiles])
            batch = (batch.squeeze(2) if self.flat else batch).to(self.device)
            outputs = self.network(batch.flip(unit.flip) if unit.flip else batch)
            logits: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
            return (logits.flip(unit.flip) if unit.flip else logits).float()


@dataclass(frozen=True)
class _Unit:
    """One call of the network: some tiles of the image, seen in one mirror."""

    source: Tensor
    tiles: list[Index]
    flip: tuple[int, ...]


def _flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all combinations of tensor axes, in nnU-Net's order; the first is no flip at all."""
    tensor_axes = [axis + 2 for axis in axes]
    return [flip for n in range(len(axes) + 1) for flip in combinations(tensor_axes, n)]


class _Sums:
    """Weighted logits and the weights, of all tiles so far."""

    def __init__(
        self, n_outputs: int, shape: Shape, patch_size: Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (n_outputs + 1) * int(np.prod(shape)) * dtype.itemsize
        self.device = device if _fits(size, device) else torch.device("cpu")
        self.logits = _zeros((n_outputs, *shape), dtype, self.device)
        self.weights = torch.zeros(shape, dtype=dtype, device=self.device)
        gaussian = np.array(gaussian_weights(patch_size))
        self.gaussian = torch.from_numpy(gaussian).to(self.device)
        if len(patch_size) == 2:
            self.gaussian = self.gaussian.unsqueeze(0)

    def add(self, tile: Index, logits: Tensor) -> None:
        """Add the logits of one tile; they are used up.

        Mixed types in one operation take torch three times as long as a conversion before and after.
        """
        weighted = logits.to(self.device).mul_(self.gaussian.float())
        for values, channel in zip(weighted, self.logits, strict=True):
            target = channel[tile]
            target.copy_(values.add_(target.float()))
        self.weights[tile] += self.gaussian

    def mean(self) -> FloatArray | None:
        """Return the weighted mean, or None where it is not finite; the sums are used up."""
        for channel in self.logits:  # one at a time: a mapped file is never in memory as a whole
            channel.div_(self.weights)
            if not bool(torch.isfinite(channel).all()):
                return None
        result: FloatArray = self.logits.cpu().numpy()
        return result


def _fits(size: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return size < 0.5 * free


def _zeros(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, in a temporary file if they are many (it disappears with the tensor)."""
    if device.type != "cpu" or int(np.prod(shape)) * dtype.itemsize <= MEMORY_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    kind = np.float16 if dtype == torch.float16 else np.float32
    with tempfile.TemporaryFile(prefix="medseg-logits-") as file:
        file.truncate(int(np.prod(shape)) * dtype.itemsize)
        return torch.from_numpy(np.memmap(file, dtype=kind, mode="r+", shape=shape))
