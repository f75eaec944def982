"""Masks cut to where they are: ten objects in a large volume must not cost ten volumes."""

from dataclasses import dataclass

import numpy as np

from medseg.geometry.crop import bounding_box
from medseg.types import BoolArray

Triple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Region:
    """A binary mask on a grid, held as the box that it fills.

    Attributes
    ----------
    shape : (int, int, int)
        The whole grid.
    start : (int, int, int)
        First voxel of the box.
    array : (a, b, c) bool
        The mask inside the box; read-only. Nothing outside it is set. An empty region has a box of size 0.
    """

    shape: Triple
    start: Triple
    array: BoolArray

    def __post_init__(self) -> None:
        array = np.ascontiguousarray(self.array, dtype=bool)
        array.flags.writeable = False
        object.__setattr__(self, "array", array)

    @classmethod
    def of(cls, mask: BoolArray) -> "Region":
        """Cut `mask`, an (i, j, k) array of the whole grid, to its box."""
        return cls.at(mask, (0, 0, 0), (mask.shape[0], mask.shape[1], mask.shape[2]))

    @classmethod
    def at(cls, mask: BoolArray, start: Triple, shape: Triple) -> "Region":
        """Place `mask` with its first voxel at `start` of a grid of `shape`, cut to its box and the grid."""
        low = [max(0, -s) for s in start]
        high = [max(0, min(n, size - s)) for n, size, s in zip(mask.shape, shape, start, strict=True)]
        inside = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        if not inside.any():
            return cls.empty(shape)
        box = bounding_box(np.asarray(inside, dtype=bool))
        cut = inside[tuple(slice(a, b) for a, b in box)]
        i, j, k = (s + a + b[0] for s, a, b in zip(start, low, box, strict=True))
        return cls(shape, (i, j, k), cut.copy())

    @classmethod
    def empty(cls, shape: Triple) -> "Region":
        """Return a region without a voxel."""
        return cls(shape, (0, 0, 0), np.zeros((0, 0, 0), dtype=bool))

    @property
    def stop(self) -> Triple:
        """One past the last voxel of the box."""
        i, j, k = (s + n for s, n in zip(self.start, self.array.shape, strict=True))
        return (i, j, k)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The index of the box in an array of the whole grid."""
        i, j, k = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return (i, j, k)

    @property
    def voxels(self) -> int:
        """Number of voxels set."""
        return int(np.count_nonzero(self.array))

    def full(self) -> BoolArray:
        """Return the mask of the whole grid, a new array."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[self.slices] = self.array
        return mask

    def window(self, start: Triple, stop: Triple) -> BoolArray:
        """Return the mask of a box, which may reach beyond the grid (False there), a new array."""
        mask = np.zeros(tuple(b - a for a, b in zip(start, stop, strict=True)), dtype=bool)
        low = [max(a, s) for a, s in zip(start, self.start, strict=True)]
        high = [min(b, s) for b, s in zip(stop, self.stop, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            to = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            of = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, self.start, strict=True))
            mask[to] = self.array[of]
        return mask

    def plane(self, axis: int, index: int) -> BoolArray:
        """Return the mask of one slice across `axis`, a new array of the two other axes in their order."""
        start, stop = [0, 0, 0], list(self.shape)
        start[axis], stop[axis] = index, index + 1
        cut = self.window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        return np.asarray(cut.take(0, axis), dtype=bool)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.start == other.start
            and np.array_equal(self.array, other.array)
        )

    __hash__ = None  # type: ignore[assignment]
