"""Networks over a whole volume: overlapping tiles, weighted by a Gaussian, averaged over flips.

Source: nnU-Net v2 ``inference/predict_from_raw_data.py``.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from medseg import log
from medseg.errors import BundleError, ResourceError
from medseg.geometry.tiles import pad_to, tile_slices
from medseg.infer.runtime import (
    BYTES_PER_VOXEL,
    count_threads,
    is_out_of_memory,
    tile_batch,
    tiles_at_once,
    torch_threads,
)
from medseg.infer.stream import Grid, Index, NotFiniteError, Place, Sums
from medseg.infer.workers import in_order
from medseg.preprocess.bricks import Block
from medseg.types import FloatArray, Shape

# Voxels of all tiles that go through the network at once on a CPU: small tiles (slices) are grouped.
BATCH_VOXELS = 1 << 16
# Tiles below this many voxels gain nothing from several threads inside one operation.
SMALL_VOXELS = 1 << 17
# Logits of constant tiles that are kept for others of the same values.
REUSE_BYTES = 1 << 28
# A voxel counts as air up to this part of a channel's range above its minimum: what resampling adds.
AIR_TOLERANCE = 1e-4

T = TypeVar("T")
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
    """Return the logits of a whole preprocessed volume; :class:`Window` streams them instead.

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
    ResourceError
        Not even one tile fits into memory.
    """
    window = Window(
        (network,),
        tuple(patch_size),
        n_outputs,
        tuple(mirror_axes),
        step,
        torch.device(device),
        count_threads(threads),
        label=label,
    )
    return in_half_or_single(lambda dtype: window.whole(data, dtype), compatible)


def in_half_or_single(run: Callable[[torch.dtype], T], compatible: bool) -> T:
    """Return ``run(float16)``, or where its sums overflow or `compatible` is False, ``run(float32)``.

    Raises
    ------
    BundleError
        The network returns numbers that are not finite.
    """
    if compatible:
        try:
            return run(torch.float16)
        except NotFiniteError:
            log.logger.warning(
                "The network's outputs are too large for 16-bit numbers: predicting again with 32 bits."
            )
    try:
        return run(torch.float32)
    except NotFiniteError as error:
        raise BundleError(
            "the network returned numbers that are not finite. Predict with precision fp32; "
            "if that fails too, the weights are damaged."
        ) from error


@dataclass
class Room:
    """What has been learnt about the memory of a device: found out, and said, once for all volumes.

    Attributes
    ----------
    batch : tiles that fit at a time, where fewer than planned
    sums_fit : whether the sums may be on the network's device
    """

    batch: int | None = None
    sums_fit: bool = True


@dataclass(frozen=True)
class Window:
    """How networks go over a volume.

    Attributes
    ----------
    networks : one a fold; each sees every tile, and the mean of their means is what comes out
    patch_size, n_outputs, mirror_axes, step, device, label : as for :func:`sliding_window`
    threads : CPU threads
    skip_air : leave out tiles that hold only a channel's minimum or padding; see `medseg.infer.Options`
    room : what earlier volumes have shown about the device's memory
    """

    networks: Sequence[Network]
    patch_size: Shape
    n_outputs: int
    mirror_axes: tuple[int, ...]
    step: float
    device: torch.device
    threads: int
    skip_air: bool = False
    label: str = "Predict tiles"
    room: "Room" = field(default_factory=Room)

    def whole(self, data: FloatArray, dtype: torch.dtype) -> FloatArray:
        """Return the logits of a volume (c, a0, a1, a2) as one array; memory-mapped where very large.

        Raises
        ------
        NotFiniteError
            They are not finite.
        """
        (block,) = self.blocks(data, dtype, cut=False)
        result: FloatArray = block.values.numpy()
        return result

    def blocks(self, data: FloatArray, dtype: torch.dtype, cut: bool = True) -> Iterator[Block]:
        """Yield the logits of a volume (c, a0, a1, a2) in blocks, each as soon as it is final.

        Raises
        ------
        NotFiniteError
            They are not finite.
        """
        padded, inner = pad_to(data, (1, *self.patch_size) if self.flat else self.patch_size)
        tiles = tile_slices(padded.shape[1:], self.patch_size, self.step)
        maps = self.n_outputs * len(self.networks) if cut else 0
        grid = Grid.plan(tiles, padded.shape[1:], inner[1:], maps)
        return _Pass(self, torch.from_numpy(padded), grid, dtype).blocks()

    @property
    def flat(self) -> bool:
        """Whether the networks see slices."""
        return len(self.patch_size) == 2

    @property
    def flips(self) -> list[tuple[int, ...]]:
        """All combinations of tensor axes, in nnU-Net's order; the first is no flip at all."""
        axes = [axis + 2 for axis in self.mirror_axes]
        return [flip for n in range(len(axes) + 1) for flip in combinations(axes, n)]

    @property
    def voxels(self) -> int:
        """Of one tile."""
        return int(np.prod(self.patch_size))

    @property
    def batch(self) -> int:
        """How many tiles go through a network at once."""
        if self.device.type == "cpu":
            return max(1, BATCH_VOXELS // self.voxels)
        # Logits count twice: those of a flip are added to those of the others.
        return tile_batch(self.device, self.voxels * (BYTES_PER_VOXEL + 8 * self.n_outputs))

    def share_threads(self, units: int) -> tuple[int, int]:
        """Return how many units run at once, and on how many threads each."""
        if self.device.type != "cpu":
            return 1, 1
        workers = min(units, tiles_at_once(self.voxels, self.n_outputs, self.threads))
        if workers == 1 and self.voxels < SMALL_VOXELS:
            return 1, 1
        return workers, self.threads if workers == 1 else 1


@dataclass(frozen=True)
class _Group:
    """Some tiles that go through the networks as one batch.

    Attributes
    ----------
    tiles : their index in the padded volume
    first : the number of the first of them
    values : one a channel where the tiles hold nothing else, else None
    air : nothing but the minimum or padding, and not to be run
    """

    tiles: list[Index]
    first: int
    values: tuple[float, ...] | None
    air: bool

    @property
    def key(self) -> tuple[int, tuple[float, ...]] | None:
        """Equal for groups that give equal logits."""
        return None if self.values is None or self.air else (len(self.tiles), self.values)


@dataclass(frozen=True)
class _Unit:
    """One call of a network: some tiles of the image, seen in one mirror."""

    network: Network
    tiles: list[Index]
    flip: tuple[int, ...]


class _Pass:
    """One way over a volume."""

    def __init__(self, window: Window, source: Tensor, grid: Grid, dtype: torch.dtype) -> None:
        self.window, self.source, self.grid = window, source, grid
        folds = len(window.networks)
        self.sums = Sums(grid, window.n_outputs, folds, dtype, torch.device("cpu"))
        if self._fits():
            self.sums.to(window.device)
        self.groups = self._group()
        self.repeated = self._repeated()
        self.kept: dict[Any, list[Tensor]] = {}

    def blocks(self) -> Iterator[Block]:
        """Yield the final blocks."""
        units = self._units()
        workers, inside = self.window.share_threads(len(units))
        tiles, final = self.grid.tiles, self.grid.final_places()
        with (
            closing(in_order(self._forward, units, workers)) as outputs,
            log.task(self.window.label, len(units)) as task,
        ):
            for group in self.groups:
                log.check_cancelled()
                with torch.inference_mode(), torch_threads(inside):
                    means = [] if group.air else self._means(group, outputs, task)
                for number, tile in enumerate(group.tiles):
                    self._add(tile, [each[number] for each in means])
                    if number + 1 == len(group.tiles):
                        means = []  # not needed while the receiver works
                    if tile[2].stop == self.grid.shape[2]:  # the next line of tiles is elsewhere
                        self.sums.rest(tiles[min(group.first + number + 1, len(tiles) - 1)])
                    for place in final.get(group.first + number, ()):
                        yield self._finish(place)  # held by the receiver alone

    def _finish(self, place: Place) -> Block:
        with torch.inference_mode():
            return self.sums.finish(place)

    def _units(self) -> list[_Unit]:
        """Return every call of a network, in order; what gives the logits of an earlier one is left out."""
        seen = set()
        units = []
        for group in self.groups:
            if group.air or group.key in seen:
                continue
            if group.key in self.repeated:
                seen.add(group.key)
            networks, flips = self.window.networks, self.window.flips
            units += [_Unit(network, group.tiles, flip) for network in networks for flip in flips]
        return units

    def _means(self, group: _Group, outputs: Iterator[Tensor], task: log.Task) -> list[Tensor]:
        """Return the logits (n, n_outputs, *patch) of each network for a group, mean over its flips."""
        if group.key in self.kept:
            return self.kept[group.key]
        means = []
        for _ in self.window.networks:
            total = next(outputs)
            task.advance()
            for _ in self.window.flips[1:]:
                total += next(outputs)
                task.advance()
            if len(self.window.flips) > 1:
                total /= len(self.window.flips)
            means.append(total)
        if group.key in self.repeated:
            self.kept[group.key] = means
        return means

    def _add(self, tile: Index, means: list[Tensor]) -> None:
        """Add the logits (n_outputs, *patch) of every network for a tile; none where it is left out."""
        with torch.inference_mode():
            if means:
                self.sums.add_weights(tile)
            for fold, logits in enumerate(means):
                self.sums.add(fold, tile, logits.unsqueeze(1) if self.window.flat else logits)

    def _forward(self, unit: _Unit) -> Tensor:
        """Return float32 logits (n, n_outputs, *patch) of one batch, flipped there and back."""
        parts, done = [], 0
        while done < len(unit.tiles):  # the batch may become smaller on the way
            tiles = unit.tiles[done : done + (self.window.room.batch or len(unit.tiles))]
            parts.append(self._run(replace(unit, tiles=tiles)))
            done += len(tiles)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, unit: _Unit) -> Tensor:
        """Call the network; where memory runs out, in smaller batches, then with the sums off its device."""
        try:
            return self._call(unit)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block, whose traceback would keep the tensors of the failed call alive.
        self._make_room(len(unit.tiles))
        return self._forward(unit)

    def _call(self, unit: _Unit) -> Tensor:
        with torch.inference_mode():
            batch = torch.stack([self.source[(slice(None), *tile)] for tile in unit.tiles])
            batch = (batch.squeeze(2) if self.window.flat else batch).to(self.window.device)
            outputs = unit.network(batch.flip(unit.flip) if unit.flip else batch)
            logits: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
            return (logits.flip(unit.flip) if unit.flip else logits).float()

    def _make_room(self, tiles: int) -> None:
        """Take the next step against lack of memory, and say so.

        Raises
        ------
        ResourceError
            There is none left.
        """
        if self.window.device.type == "cuda":
            torch.cuda.empty_cache()
        room = self.window.room
        if tiles > 1:
            if room.batch is None:
                log.logger.warning("Memory ran out for %d tiles at a time: going on with fewer.", tiles)
            room.batch = tiles // 2
        elif self.sums.device.type != "cpu":
            log.logger.warning("Memory of %s ran out: going on with sums on the CPU.", self.sums.device)
            room.sums_fit = False
            self.sums.to(torch.device("cpu"))
        else:
            patch = " x ".join(map(str, self.window.patch_size))
            on_cpu = self.window.device.type == "cpu"
            other = "with more memory" if on_cpu else "on another device (--device cpu)"
            raise ResourceError(
                f"memory of {self.window.device} ran out for one tile of {patch} voxels. Close other "
                f"programs, predict {other}, or use a model with a smaller patch."
            )

    def _group(self) -> list[_Group]:
        """Cut the list of tiles into batches, and see which hold nothing."""
        tiles = self.grid.tiles
        size = self.window.batch
        limits = self._air_limits() if self.window.skip_air else None
        groups = []
        for start in range(0, len(tiles), size):
            some = list(tiles[start : start + size])
            values = self._values(some[0])
            if any(self._values(tile) != values for tile in some[1:] if values is not None):
                values = None
            air = limits is not None and all(self._is_air(tile, limits) for tile in some)
            groups.append(_Group(some, start, values, air))
        return groups

    def _values(self, tile: Index) -> tuple[float, ...] | None:
        """Return the value of every channel where a tile is constant in each, else None."""
        part = self.source[(slice(None), *tile)]
        first = part[:, :1, :1, :1]
        middle = part[:, part.shape[1] // 2, part.shape[2] // 2]
        if bool((middle != first[:, 0, 0]).any()) or bool((part != first).any()):
            return None
        return tuple(first.flatten().tolist())

    def _repeated(self) -> set[Any]:
        """Return the keys of constant groups that come more than once, as many as may be kept."""
        counts = Counter(group.key for group in self.groups if group.key is not None)
        common = [(key, key[0]) for key, count in counts.most_common() if count > 1]
        chosen, room = set(), REUSE_BYTES
        for key, tiles in common:
            size = 4 * tiles * self.window.voxels * self.window.n_outputs * len(self.window.networks)
            if size <= room:
                chosen.add(key)
                room -= size
        return chosen

    def _air_limits(self) -> Tensor:
        """Return the value of each channel up to which a voxel is air, (c, 1, 1, 1)."""
        inside = self.source[(slice(None), *self.grid.inner)].flatten(1)
        low, high = inside.amin(1), inside.amax(1)
        return (low + AIR_TOLERANCE * (high - low)).reshape(-1, 1, 1, 1)

    def _is_air(self, tile: Index, limits: Tensor) -> bool:
        inner = [
            slice(max(part.start, whole.start), min(part.stop, whole.stop))
            for part, whole in zip(tile, self.grid.inner, strict=True)
        ]
        return bool((self.source[(slice(None), *inner)] <= limits).all())

    def _fits(self) -> bool:
        """Return whether the sums fit onto the network's device, beside its features."""
        device = self.window.device
        if device.type != "cuda" or not self.window.room.sums_fit:
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return self.sums.bytes < 0.5 * free
