"""Logits resampled in small boxes of the wanted grid, as soon as the rows that they need are there.

Linear interpolation reads two neighbours along each axis. A brick of the wanted grid therefore needs a small
part of the logits, fits into the cache, and its values do not depend on how the grid is cut: each is the
same products and sums in float32, whatever lies around it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from medseg.geometry.resample import Taps, resample_rows, separate_axis, zoom_taps
from medseg.log import check_cancelled
from medseg.plan.schema import Configuration
from medseg.preprocess.record import Record
from medseg.types import FloatArray, IntArray, Shape, Spacing

# Voxels of a brick where one map at a time is held: as float32 with temporaries it stays in a 1 MB cache.
BRICK_VOXELS = 1 << 16
# Memory of a brick or slab with its temporaries where all maps are held, or whole rows.
SLAB_BYTES = 16 << 20
# float32 arrays of a slab's size that live at once while labels are decided.
SLAB_COPIES = 6
# float32 arrays of a brick that live at once for each map while probabilities are decided.
MAP_COPIES = 3
# Sides of a brick along the second and the last axis, at most: nearly a cube, so that few classes meet in it,
# and long enough for vector instructions.
BRICK_SIDES = (32, 64)

Region = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class Block:
    """Logits of some rows (first axis) and lines (second axis) of a volume, final.

    A producer that cuts a volume into blocks sends them in order, the lines of a band of rows after one
    another. Along each axis a block begins with the last row (line) of the one before it, since
    interpolation reads two neighbours.

    Attributes
    ----------
    values : (n_outputs, rows, lines, a2) float16 or float32
    rows, lines : which of the volume
    """

    values: Tensor
    rows: slice
    lines: slice

    @classmethod
    def whole(cls, values: Tensor) -> "Block":
        """Return one block of a whole volume (n_outputs, a0, a1, a2)."""
        return cls(values, slice(0, values.shape[1]), slice(0, values.shape[2]))


@dataclass(frozen=True, eq=False)
class Brick:
    """A box of the wanted grid.

    Attributes
    ----------
    region : its place in the wanted grid
    low, high : (n_outputs,)
        No value of a map in this box is below or above these; only where linear, else infinite.
    sample : returns the values of one map, (b0, b1, b2) float32 rounded to float16; safe to change
    """

    region: Region
    low: FloatArray
    high: FloatArray
    sample: Callable[[int], Tensor]


@dataclass(frozen=True)
class Way:
    """How logits are brought to `target`: nnU-Net's resampling_fn_probabilities."""

    shape: Shape
    target: Shape
    order: int
    separate: int | None
    order_z: int

    @classmethod
    def plan(
        cls, shape: Shape, target: Shape, configuration: Configuration, spacing: Spacing, new_spacing: Spacing
    ) -> "Way":
        """Return the way between two grids of these shapes and voxel sizes."""
        separate = separate_axis(spacing, new_spacing)
        order, order_z = configuration.order_probabilities, configuration.order_z
        return cls(tuple(shape), tuple(target), order, separate, order_z)

    @classmethod
    def back(cls, record: Record, configuration: Configuration) -> "Way":
        """Return the way from the network's grid to the cropped source grid."""
        return cls.plan(record.shape, record.cropped_shape, configuration, record.new_spacing, record.spacing)

    @property
    def taps(self) -> tuple[Taps, ...] | None:
        """What each axis reads, or None where splines above order 1 need the whole volume at once."""
        return zoom_taps(self.shape, self.target, self.order, self.separate, self.order_z)

    @property
    def streams(self) -> bool:
        """Whether parts of the logits give parts of the result."""
        return self.taps is not None

    def bricks(self, block: Block, maps: int = 1) -> Iterator[Brick]:
        """Yield the bricks that this block completes, sized for a caller that holds `maps` of each at once.

        The cut of a whole volume depends on the wanted grid and on `maps` alone.
        """
        taps = self.taps
        if taps is None:
            return self._splines(block, maps)
        return _Linear(taps, block, self.axis_order).bricks(_brick_voxels(maps))

    @property
    def axis_order(self) -> tuple[int, ...]:
        """Axes that shrink most go first, so that later ones have less to do."""
        growth = [m / n for n, m in zip(self.shape, self.target, strict=True)]
        return tuple(sorted(range(3), key=lambda axis: (growth[axis], -axis)))

    def _splines(self, block: Block, maps: int) -> Iterator[Brick]:
        """Splines need whole rows at once: they are computed together, and cut if several maps are held."""
        shape, n_outputs = self.target, len(block.values)
        low, high = np.full(n_outputs, -np.inf), np.full(n_outputs, np.inf)
        size = (slab_rows(shape), *shape[1:]) if maps == 1 else _brick_shape(shape, _brick_voxels(maps))
        for rows in _cut(shape[0], size[0]):
            check_cancelled()
            spline = partial(self._spline, block.values, rows)
            sample = spline if maps == 1 else [spline(n) for n in range(n_outputs)].__getitem__
            for lines, columns in product(_cut(shape[1], size[1]), _cut(shape[2], size[2])):
                inside = (slice(None), lines, columns)
                yield Brick((rows, lines, columns), low, high, partial(_part, sample, inside))

    def _spline(self, values: Tensor, rows: slice, number: int) -> Tensor:
        channel = values[number]
        rough = resample_rows(channel.numpy(), self.target, rows, self.order, self.separate, self.order_z)
        return _to_half(torch.from_numpy(np.ascontiguousarray(rough, dtype=np.float32)), channel.dtype)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some outputs of one axis: the part of a block that they read, and how."""

    outputs: slice
    window: slice
    lower: Tensor
    upper: Tensor
    weights: tuple[Tensor, Tensor]
    copies: bool
    same: bool

    @classmethod
    def cut(cls, taps: Taps, outputs: slice, start: int, axis: int) -> "_Piece":
        """Return the piece for `outputs` of a block whose first voxel is `start`."""
        lower, upper = taps.lower[outputs], taps.upper[outputs]
        first = int(lower[0])
        shape = (-1, *(1,) * (2 - axis))
        weights = torch.from_numpy(taps.weights[:, outputs])
        copies = bool((taps.weights[1, outputs] == 0).all())
        stop = int(lower[-1] if copies else upper[-1]) + 1
        return cls(
            outputs,
            slice(first - start, stop - start),
            torch.from_numpy(lower - first),
            torch.from_numpy(upper - first),
            (weights[0].reshape(shape), weights[1].reshape(shape)),
            copies,
            copies and stop - first == len(lower),
        )

    def apply(self, values: Tensor, axis: int) -> Tensor:
        """Interpolate one axis of the window's values."""
        if self.same:
            return values
        lower = values.index_select(axis, self.lower)
        if self.copies:
            return lower
        # A product and a sum each, never fused: the same roundings for one voxel as for many.
        upper = values.index_select(axis, self.upper).mul_(self.weights[1])
        return lower.mul_(self.weights[0]).add_(upper)


class _Linear:
    """The bricks of one block where every axis is linear, nearest, or stays."""

    def __init__(self, taps: tuple[Taps, ...], block: Block, axis_order: tuple[int, ...]) -> None:
        self.taps, self.values, self.axis_order = taps, block.values, axis_order
        self.starts = (block.rows.start, block.lines.start, 0)
        self.ready = (
            taps[0].ready(block.rows.start, block.rows.stop),
            taps[1].ready(block.lines.start, block.lines.stop),
            slice(0, len(taps[2].lower)),
        )

    def bricks(self, voxels: int) -> Iterator[Brick]:
        """Yield the bricks, each with the range of every map in what it reads."""
        shape = tuple(part.stop - part.start for part in self.ready)
        if min(shape) < 1:
            return
        pieces = [self._pieces(axis, size) for axis, size in enumerate(_brick_shape(shape, voxels))]
        low, high = self._ranges(pieces)
        for places in product(*(range(len(each)) for each in pieces)):
            if places[2] == 0:
                check_cancelled()
            brick = (pieces[0][places[0]], pieces[1][places[1]], pieces[2][places[2]])
            region = (brick[0].outputs, brick[1].outputs, brick[2].outputs)
            at = np.s_[:, places[0], places[1], places[2]]
            yield Brick(region, low[at], high[at], partial(self._sample, brick))

    def _sample(self, brick: tuple[_Piece, ...], number: int) -> Tensor:
        part = self.values[number][tuple(piece.window for piece in brick)]
        values = part.float()
        for axis in self.axis_order:
            values = brick[axis].apply(values, axis)
        return _to_half(values, part.dtype)

    def _pieces(self, axis: int, size: int) -> list[_Piece]:
        ready, start = self.ready[axis], self.starts[axis]
        return [
            _Piece.cut(self.taps[axis], slice(ready.start + part.start, ready.start + part.stop), start, axis)
            for part in _cut(ready.stop - ready.start, size)
        ]

    def _ranges(self, pieces: list[list[_Piece]]) -> tuple[FloatArray, FloatArray]:
        """Return the smallest and largest logit of every map that each brick reads, (n_outputs, *bricks)."""
        lows, highs = [], []
        for channel in self.values:
            low, high = [], []
            for piece in pieces[0]:
                rows = channel[piece.window].float()
                low.append(rows.amin(0))
                high.append(rows.amax(0))
            lows.append(_shrink(torch.stack(low), pieces, Tensor.amin))
            highs.append(_shrink(torch.stack(high), pieces, Tensor.amax))
        return torch.stack(lows).numpy(), torch.stack(highs).numpy()


def _shrink(planes: Tensor, pieces: list[list[_Piece]], function: Callable[..., Tensor]) -> Tensor:
    lines = torch.stack([function(planes[:, piece.window], 1) for piece in pieces[1]], dim=1)
    return torch.stack([function(lines[:, :, piece.window], 2) for piece in pieces[2]], dim=2)


def _part(sample: Callable[[int], Tensor], inside: tuple[slice, ...], number: int) -> Tensor:
    return sample(number)[inside]


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _brick_voxels(maps: int) -> int:
    return BRICK_VOXELS if maps == 1 else max(1, SLAB_BYTES // (4 * MAP_COPIES * maps))


def _brick_shape(shape: Shape, voxels: int) -> tuple[int, ...]:
    """Return the sides of a brick of at most `voxels`: long along the last axis, flat along the first."""
    length = min(shape[2], BRICK_SIDES[1], voxels)
    width = min(shape[1], BRICK_SIDES[0], max(1, voxels // length))
    height = min(shape[0], max(1, voxels // (length * width)))
    return height, width, length


def slab_rows(shape: Shape) -> int:
    """Return how many rows of a float32 map may be computed at once."""
    return max(1, SLAB_BYTES // (4 * SLAB_COPIES * shape[1] * shape[2]))


def _to_half(values: Tensor, source: torch.dtype) -> Tensor:
    """Round float32 to float16; `values` may be changed."""
    if source == torch.float16:
        return values.half().float()
    return torch.from_numpy(round_to_half(np.array(values.numpy(), order="C")))


def round_to_half(values: FloatArray) -> FloatArray:
    """Round a contiguous float32 array to the 11 significant bits of float16, halves to even, in place.

    Equal to a cast to float16 and back for magnitudes from 6.2e-5 to 65504; smaller ones keep more digits
    than float16 would, larger ones stay finite.
    """
    bits: IntArray = values.view(np.uint32)
    half = bits >> 13
    half &= 1
    half += 0x0FFF
    bits += half
    bits &= np.uint32(0xFFFFE000)
    return values
