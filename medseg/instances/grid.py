"""A volume cut in blocks: their boxes, the same with a halo, and which block a voxel is in."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medseg.errors import ConfigError
from medseg.types import Array, Shape

Box = tuple[slice, ...]


class Chunked(Protocol):
    """What is read and written by boxes: a numpy array, a zarr array, a memory map."""

    @property
    def shape(self) -> Shape:
        """Voxels along each axis."""

    def __getitem__(self, box: Any, /) -> Any:
        """Return the voxels of a box."""

    def __setitem__(self, box: Any, values: Any, /) -> None:
        """Set the voxels of a box."""


@dataclass(frozen=True)
class Grid:
    """Blocks in the order of their first voxel.

    Attributes
    ----------
    edges : one tuple of int for each axis
        Where blocks begin, ascending from 0, and the size of the volume.
    """

    edges: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: Shape, block: Sequence[int], offset: Sequence[int] | None = None) -> "Grid":
        """Cut a volume in blocks of a size; with an offset, the first block of each axis is so long.

        Raises
        ------
        ConfigError
            A size is not positive, or not one for each axis.

        Examples
        --------
        >>> Grid.of((10, 4), (4, 4), offset=(3, 0)).edges
        ((0, 3, 7, 10), (0, 4))
        """
        shifts = tuple(offset or (0,) * len(shape))
        if len(block) != len(shape) or len(shifts) != len(shape) or min(block, default=1) < 1:
            raise ConfigError(
                f"blocks {tuple(block)}: expected {len(shape)} positive sizes, one for each axis."
            )
        starts = (
            sorted({0, *range(shift % size, n, size)})
            for n, size, shift in zip(shape, block, shifts, strict=True)
        )
        return cls(tuple((*found, n) for found, n in zip(starts, shape, strict=True)))

    @property
    def shape(self) -> Shape:
        """Voxels along each axis."""
        return tuple(edges[-1] for edges in self.edges)

    @property
    def boxes(self) -> list[Box]:
        """The box of every block."""
        along = [itertools.starmap(slice, itertools.pairwise(edges)) for edges in self.edges]
        return list(itertools.product(*along))

    def around(self, box: Box, halo: Sequence[int]) -> tuple[Box, Box]:
        """Return a box with its halo, as far as the volume goes, and where the box is inside of that."""
        outer = tuple(
            slice(max(s.start - width, 0), min(s.stop + width, n))
            for s, width, n in zip(box, halo, self.shape, strict=True)
        )
        return outer, within(box, outer)

    def parts(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Yield the blocks that a box overlaps: the number of the block, and the part inside the box."""
        along = []
        for wanted, edges in zip(box, self.edges, strict=True):
            pairs = enumerate(itertools.pairwise(edges))
            along.append([(i, slice(max(a, wanted.start), min(b, wanted.stop))) for i, (a, b) in pairs])
        for choice in itertools.product(*([p for p in axis if p[1].start < p[1].stop] for axis in along)):
            number = 0
            for (index, _), edges in zip(choice, self.edges, strict=True):
                number = number * (len(edges) - 1) + index
            yield number, within(tuple(part for _, part in choice), box)


def within(box: Box, outer: Box) -> Box:
    """Return a box in the coordinates of another one around it."""
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer, strict=True))


def check_same(a: Chunked, b: Chunked) -> None:
    """Raise ConfigError unless two arrays have one shape."""
    if tuple(a.shape) != tuple(b.shape):
        raise ConfigError(f"arrays of {tuple(a.shape)} and {tuple(b.shape)}: make the output as the input.")


def read_box(source: Chunked, box: Box) -> Array:
    """Return the voxels of a box as a numpy array."""
    values: Array = source[box]
    return values
