"""A network over a whole volume: overlapping tiles, weighted by a Gaussian, averaged over flips.

Source: nnU-Net v2 ``inference/predict_from_raw_data.py``.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg import log
from medseg.errors import BundleError
from medseg.geometry.tiles import gaussian_weights, pad_to, tile_slices
from medseg.types import FloatArray, Shape

# Voxels of all tiles that go through the network at once; small tiles (slices) are grouped up to this.
BATCH_VOXELS = {"cpu": 1 << 16, "cuda": 1 << 21}
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
    label : name of the progress bar

    Returns
    -------
    (n_outputs, a0, a1, a2) float16 (float32 unless `compatible`); memory-mapped where very large

    Raises
    ------
    BundleError
        The network returns numbers that are not finite.
    """
    plan = _Pass(network, tuple(patch_size), n_outputs, tuple(mirror_axes), step, torch.device(device), label)
    logits = plan.run(data, torch.float16 if compatible else torch.float32)
    if logits is None and compatible:
        log.logger.warning("Sums of logits exceed float16, so they are made in float32.")
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
    label: str

    def run(self, data: FloatArray, dtype: torch.dtype) -> FloatArray | None:
        """Return the mean logits, or None where they are not finite."""
        flat = len(self.patch_size) == 2
        padded, inner = pad_to(data, (1, *self.patch_size) if flat else self.patch_size)
        source, shape = torch.from_numpy(padded), padded.shape[1:]
        sums = _Sums(self.n_outputs, shape, self.patch_size, dtype, self.device)
        tiles = tile_slices(shape, self.patch_size, self.step)
        with torch.inference_mode(), log.task(self.label, len(tiles)) as task:
            for group in _groups(tiles, self.patch_size, self.device):
                batch = torch.stack([source[(slice(None), *tile)] for tile in group])
                batch = (batch.squeeze(2) if flat else batch).to(self.device)
                logits = _mirrored(self.network, batch, self.mirror_axes)
                for tile, one in zip(group, logits.unsqueeze(2) if flat else logits, strict=True):
                    sums.add(tile, one)
                task.advance(len(group))
            mean = sums.mean()
        return None if mean is None else mean[(slice(None), *inner[1:])]


def _groups(tiles: list[Index], patch_size: Shape, device: torch.device) -> Iterator[list[Index]]:
    """Cut the list of tiles into batches."""
    size = max(1, BATCH_VOXELS.get(device.type, 1) // int(np.prod(patch_size)))
    for start in range(0, len(tiles), size):
        yield tiles[start : start + size]


def _mirrored(network: Network, batch: Tensor, axes: Sequence[int]) -> Tensor:
    """Return float32 logits, averaged over all flips of `axes`; the sum runs in nnU-Net's order."""
    total = _first(network(batch))
    if not axes:
        return total
    flips = [c for n in range(1, len(axes) + 1) for c in combinations([axis + 2 for axis in axes], n)]
    for flip in flips:
        total += _first(network(batch.flip(flip))).flip(flip)
    return total.div_(len(flips) + 1)


def _first(outputs: Any) -> Tensor:
    logits: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return logits.float()


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
        """Add the logits of one tile."""
        self.logits[(slice(None), *tile)] += logits.to(self.device) * self.gaussian
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
