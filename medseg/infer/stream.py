"""The weighted mean of overlapping tiles, handed on as soon as no later tile touches it.

Tiles come with the first axis outermost, then the second. What lies before the start of the next row of tiles
is final once the present row is through; within a row of tiles the same holds for lines. So the sums of
logits are kept in chunks between the starts of tiles, and a chunk goes as soon as its last tile has come:
memory holds about one patch of rows, whatever the length of the volume.
"""

import mmap
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medseg.geometry.tiles import gaussian_weights
from medseg.preprocess.bricks import Block
from medseg.types import Shape

# Values of a chunk, at least: smaller ones are not worth the calls.
CHUNK_VALUES = 1 << 21
# Lines of a chunk, at least, as a part of the patch: a tile then touches two bands of lines, seldom three.
# Sums of more than the bytes are cut at every tile instead, so that each line is gone as early as can be.
LINES_OF_PATCH = 0.7
LARGE_BYTES = 1 << 30
# Values of a tile that are weighted and added at once: float32 with two temporaries stays in the cache.
STEP_VALUES = 1 << 17
# Sums larger than this are kept in files, whose pages leave memory while no tile touches them.
MEMORY_BYTES = 2 << 30
# Logit of the background, and minus that of all else, where every tile was left out.
AIR_LOGIT = 20.0

Index = tuple[slice, ...]


class NotFiniteError(ArithmeticError):
    """The mean of some voxel is not finite: the sums overflowed, or the network returned no numbers."""


@dataclass(frozen=True)
class Grid:
    """The tiles of a volume, and the bands of rows and lines that become final one after the other.

    Attributes
    ----------
    tiles : index of each tile in the padded volume, first axis outermost
    shape : of the padded volume
    patch : of a tile, three axes
    inner : index of the volume in the padded one
    rows, lines : borders of the bands, from 0 to the length of the axis
    """

    tiles: Sequence[Index]
    shape: Shape
    patch: Shape
    inner: Index
    rows: tuple[int, ...]
    lines: tuple[int, ...]

    @classmethod
    def plan(cls, tiles: Sequence[Index], shape: Shape, inner: Index, n_values: int) -> "Grid":
        """Cut at the starts of tiles; `n_values` a voxel, 0 for one band that holds the whole volume."""
        patch = tuple(part.stop - part.start for part in tiles[0])
        starts = [sorted({tile[axis].start for tile in tiles}) for axis in (0, 1)]
        wanted = CHUNK_VALUES // n_values if n_values else 0
        rows = _borders(starts[0], shape[0], wanted // (shape[1] * shape[2]) if n_values else shape[0])
        thickest = _widest(rows)
        least = wanted // (thickest * shape[2])
        if 2 * n_values * patch[0] * shape[1] * shape[2] <= LARGE_BYTES:
            least = max(least, ceil(LINES_OF_PATCH * patch[1]))
        lines = _borders(starts[1], shape[1], least if n_values else shape[1])
        return cls(tiles, shape, patch, inner, rows, lines)

    def places(self, tile: Index) -> list["Place"]:
        """Return the chunks that a tile touches."""
        lines = _bands(self.lines, tile[1])
        return [Place(row, line) for row in _bands(self.rows, tile[0]) for line in lines]

    def final_places(self) -> dict[int, list["Place"]]:
        """Return which chunks are final after a tile, by the tile's number."""
        last: dict[Place, int] = {}
        for number, tile in enumerate(self.tiles):
            for place in self.places(tile):
                last[place] = number
        final: dict[int, list[Place]] = {}
        for place in sorted(last):
            final.setdefault(last[place], []).append(place)
        return final


def _borders(starts: list[int], length: int, least: int) -> tuple[int, ...]:
    """Return those starts that lie at least `least` after the one before, and the end."""
    chosen = [0]
    for start in starts[1:]:
        if start - chosen[-1] >= least:
            chosen.append(start)
    return (*chosen, length)


class Place(NamedTuple):
    """A chunk: the number of its band of rows and of its band of lines."""

    row: int
    line: int


@dataclass
class _Chunk:
    """Sums between two borders along the first two axes; a row and a line in front are for the neighbours'.

    Attributes
    ----------
    sums : one tensor a fold, (n_outputs, front + rows, front + lines, a2)
    weights : (front + rows, front + lines, a2)
    origin : padded row and line of the first of the sums
    files : what the sums are mapped to, if anything
    """

    sums: list[Tensor]
    weights: Tensor
    origin: tuple[int, int]
    files: list[mmap.mmap]

    def rest(self) -> None:
        """Let the pages of mapped sums go to their files; the next access brings them back."""
        for file in self.files:
            if hasattr(mmap, "MADV_DONTNEED"):  # of a shared mapping this loses nothing
                file.madvise(mmap.MADV_DONTNEED)


@dataclass
class Sums:
    """Weighted logits of every fold, in chunks.

    Attributes
    ----------
    grid : the tiles and bands
    n_outputs, folds : maps, and networks whose means are averaged
    dtype : float16 rounds as nnU-Net does; or float32
    device : where the sums are kept
    """

    grid: Grid
    n_outputs: int
    folds: int
    dtype: torch.dtype
    device: torch.device
    _chunks: dict[Place, _Chunk] = field(default_factory=dict)
    _row_end: Tensor | None = None
    _line_end: Tensor | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        flat = grid.patch[0] == 1
        gaussian = np.array(gaussian_weights(grid.patch[1:] if flat else grid.patch))
        self.gaussian = torch.from_numpy(gaussian).reshape(grid.patch).to(self.device)
        self._take_buffers()

    def _take_buffers(self) -> None:
        """Take what :meth:`add` works in; it is kept, so that it stays in the cache."""
        self.weighting = self.gaussian.float()
        self.weighted, self.single = torch.empty_like(self.weighting), torch.empty_like(self.weighting)
        self.half = torch.empty_like(self.weighting, dtype=torch.float16)

    @property
    def bytes(self) -> int:
        """What the sums take: the rows that tiles of one place along the first axis touch, of all folds."""
        rows = self.grid.patch[0] if len(self.grid.rows) > 2 else self.grid.shape[0]
        values = rows * self.grid.shape[1] * self.grid.shape[2]
        return int(values * (self.n_outputs * self.folds + 1) * self.dtype.itemsize)

    def to(self, device: torch.device) -> None:
        """Move all sums to another device."""
        self.device = device
        self.gaussian = self.gaussian.to(device)
        self._take_buffers()
        for chunk in self._chunks.values():
            chunk.sums = [each.to(device) for each in chunk.sums]
            chunk.weights = chunk.weights.to(device)
        self._row_end = None if self._row_end is None else self._row_end.to(device)
        self._line_end = None if self._line_end is None else self._line_end.to(device)

    def add_weights(self, tile: Index) -> None:
        """Count a tile, whose logits of every fold are added too."""
        for chunk, where, part in self._parts(tile):
            chunk.weights[where] += self.gaussian[part]

    def add(self, fold: int, tile: Index, logits: Tensor) -> None:
        """Add float32 logits (n_outputs, *patch) of one fold, which are left as they are."""
        logits = logits.to(self.device)
        parts = [(chunk.sums[fold], where, part) for chunk, where, part in self._parts(tile)]
        rows, lines, columns = self.grid.patch
        step = max(1, STEP_VALUES // (lines * columns)) if self.device.type == "cpu" else rows
        for first in range(0, rows, step):
            some = slice(first, min(first + step, rows))
            weighted, weighting = self.weighted[: some.stop - first], self.weighting[some]
            adders = [
                self._adder(sums, *_overlap(where, part, some))
                for sums, where, part in parts
                if part[0].start < some.stop and some.start < part[0].stop
            ]
            for number, channel in enumerate(logits[:, some]):
                torch.mul(channel, weighting, out=weighted)
                for adder in adders:
                    adder(number)

    def _adder(self, sums: Tensor, where: Index, part: Index) -> Callable[[int], object]:
        """Return what adds a part of the weighted rows to the sums of one map, as nnU-Net does.

        That is in float32, then rounded to float16. One operation on mixed types that lie apart takes torch
        twice as long as the five that go through contiguous buffers.
        """
        targets, values = sums[(slice(None), *where)], self.weighted[part]
        if self.dtype == torch.float32 or self.device.type != "cpu":
            return lambda number: targets[number].add_(values)
        half = self.half.flatten()[: values.numel()].view(values.shape)
        single = self.single.flatten()[: values.numel()].view(values.shape)

        def add(number: int) -> None:
            target = targets[number]
            half.copy_(target)
            single.copy_(half).add_(values)
            target.copy_(half.copy_(single))

        return add

    def rest(self, tile: Index) -> None:
        """Let mapped sums go that a tile, the next one, does not touch."""
        touched = self.grid.places(tile)
        for place, chunk in self._chunks.items():
            if place not in touched:
                chunk.rest()

    def finish(self, place: Place) -> Block:
        """Return the mean logits of a chunk, all of whose tiles have come, and forget it.

        Raises
        ------
        NotFiniteError
            Some mean is not finite.
        """
        chunk = self._chunks.pop(place, None) or self._new(place)
        front = (int(place.row > 0), int(place.line > 0))
        own = (slice(None), slice(front[0], None), slice(front[1], None))
        mean = self._mean(chunk, own)
        lines = slice(*self.grid.lines[place.line : place.line + 2])
        if front[0]:
            assert self._row_end is not None  # the band before has gone through here
            mean[:, 0, front[1] :] = self._row_end[:, lines]
        if front[1]:
            assert self._line_end is not None
            mean[:, :, 0] = self._line_end
        self._keep_ends(mean, lines, front[1], place)
        return self._block(mean, chunk.origin)

    def _mean(self, chunk: _Chunk, own: Index) -> Tensor:
        weights = chunk.weights[own[1:]]
        missing = weights == 0
        some_missing = bool(missing.any())
        if some_missing:
            weights[missing] = 1
        total = chunk.sums[0]
        for channel in range(self.n_outputs):  # one at a time: a mapped file is never in memory as a whole
            target = total[channel][own[1:]]
            target.div_(weights)
            for other in chunk.sums[1:]:
                target.add_(other[channel][own[1:]].div_(weights))
            if self.folds > 1:
                target.div_(self.folds)
            if some_missing:
                target[missing] = AIR_LOGIT if channel == 0 else -AIR_LOGIT
            if not _is_finite(target):
                raise NotFiniteError
        return total

    def _keep_ends(self, mean: Tensor, lines: slice, front: int, place: Place) -> None:
        """Keep what the next chunks begin with."""
        if place.row < len(self.grid.rows) - 2:
            if self._row_end is None:
                size = (self.n_outputs, *self.grid.shape[1:])
                self._row_end = torch.empty(size, dtype=self.dtype, device=self.device)
            self._row_end[:, lines] = mean[:, -1, front:]
        if place.line < len(self.grid.lines) - 2:
            self._line_end = mean[:, :, -1].clone()

    def _block(self, mean: Tensor, origin: tuple[int, int]) -> Block:
        """Return the part of a chunk that is not padding."""
        inside, places = [], []
        for axis in (0, 1):
            inner, start = self.grid.inner[axis], origin[axis]
            first, stop = max(inner.start, start), min(inner.stop, start + mean.shape[axis + 1])
            inside.append(slice(first - start, stop - start))
            places.append(slice(first - inner.start, stop - inner.start))
        values = mean[:, inside[0], inside[1], self.grid.inner[2]]
        return Block(values.cpu(), places[0], places[1])

    def _parts(self, tile: Index) -> Iterator[tuple[_Chunk, Index, Index]]:
        """Yield the chunks that a tile touches, where in them, and with which part of the tile."""
        for place in self.grid.places(tile):
            if place not in self._chunks:
                self._chunks[place] = self._new(place)
            chunk = self._chunks[place]
            row, line = place
            borders = (self.grid.rows[row : row + 2], self.grid.lines[line : line + 2])
            where, part = [], []
            for axis, (start, stop) in enumerate(borders):
                first, last = max(tile[axis].start, start), min(tile[axis].stop, stop)
                where.append(slice(first - chunk.origin[axis], last - chunk.origin[axis]))
                part.append(slice(first - tile[axis].start, last - tile[axis].start))
            yield chunk, (*where, tile[2]), (*part, slice(None))

    def _new(self, place: Place) -> _Chunk:
        front = (int(place.row > 0), int(place.line > 0))
        origin = (self.grid.rows[place.row] - front[0], self.grid.lines[place.line] - front[1])
        size = (
            self.grid.rows[place.row + 1] - origin[0],
            self.grid.lines[place.line + 1] - origin[1],
            self.grid.shape[2],
        )
        sums, files = [], []
        for _ in range(self.folds):
            zeros, file = self._zeros(size)
            sums.append(zeros)
            files += [] if file is None else [file]
        return _Chunk(sums, torch.zeros(size, dtype=self.dtype, device=self.device), origin, files)

    def _zeros(self, size: Shape) -> tuple[Tensor, mmap.mmap | None]:
        """Return (n_outputs, *size) zeros, and the file that they are mapped to if memory would be short.

        On a CPU their pages are taken where they are written. Rows run outermost where there are bands,
        since the later rows of a band are written later.
        """
        banded = len(self.grid.rows) > 2
        shape = (size[0], self.n_outputs, *size[1:]) if banded else (self.n_outputs, *size)
        file = None
        if self.device.type != "cpu":
            zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
        else:
            kind = np.float16 if self.dtype == torch.float16 else np.float32
            size_bytes = prod(shape) * self.dtype.itemsize
            if self.bytes > MEMORY_BYTES:
                file = _temporary_file(size_bytes)
                array = np.frombuffer(file, dtype=kind).reshape(shape)
            elif self.bytes > LARGE_BYTES:  # numpy asks for huge pages, which take all that is near
                array = np.frombuffer(mmap.mmap(-1, size_bytes), dtype=kind).reshape(shape)
            else:
                array = np.zeros(shape, dtype=kind)
            zeros = torch.from_numpy(array)
        return zeros.transpose(0, 1) if banded else zeros, file


def _temporary_file(size: int) -> mmap.mmap:
    """Return the memory map of a file of zeros that disappears with it."""
    with tempfile.TemporaryFile(prefix="medseg-logits-") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _overlap(where: Index, part: Index, some: slice) -> tuple[Index, Index]:
    """Return which of some rows of a tile lie in a part of it: where in the sums, and among the rows."""
    first, stop = max(part[0].start, some.start), min(part[0].stop, some.stop)
    shift = where[0].start - part[0].start
    return (
        (slice(first + shift, stop + shift), *where[1:]),
        (slice(first - some.start, stop - some.start), *part[1:]),
    )


def _widest(borders: tuple[int, ...]) -> int:
    return max(stop - start for start, stop in pairwise(borders))


def _bands(borders: tuple[int, ...], part: slice) -> range:
    """Return the numbers of the bands that a part of an axis touches."""
    return range(bisect_right(borders, part.start) - 1, bisect_left(borders, part.stop))


def _is_finite(values: Tensor) -> bool:
    """Return whether no value is infinite or NaN, by their exponents: ten times as fast as torch.isfinite."""
    if values.device.type != "cpu":
        return bool(torch.isfinite(values).all())
    half = values.dtype == torch.float16
    bits = values.view(torch.int16 if half else torch.int32)
    limit = 0x7C00 if half else 0x7F800000
    return bool((bits & (0x7FFF if half else 0x7FFFFFFF)).max() < limit)
