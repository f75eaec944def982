"""Outlines of the objects of a picture: exact polygons along the edges of pixels, traced box by box."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from medseg.errors import GeometryError
from medseg.instances.compiled import jit
from medseg.instances.shape import crop_of
from medseg.instances.sums import Sums
from medseg.log import check_cancelled
from medseg.types import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Polygon:
    """One piece of an object and its holes.

    Attributes
    ----------
    outer : (n, 2) int64
        Corners in edges of pixels (pixel (i, j) covers i to i + 1, j to j + 1), the first not repeated. The
        signed area in (i, j) is positive.
    holes : tuple of (n, 2) int64
        Their signed area is negative.
    """

    outer: IntArray
    holes: tuple[IntArray, ...] = ()

    @property
    def area(self) -> float:
        """Pixels inside."""
        return signed_area(self.outer) + sum(signed_area(hole) for hole in self.holes)


def trace_outlines(labels: IntArray, sums: Sums) -> Iterator[tuple[int, list[Polygon]]]:
    """Yield each object's label and its polygons; the pixels inside them are exactly the object's.

    Pixels that meet at a corner only are separate polygons that touch, so no ring meets itself: what GeoJSON
    and its readers call valid.

    Parameters
    ----------
    labels : (i, j) int32
    sums : Sums
        Of `labels`.

    Raises
    ------
    GeometryError
        The label map has not two axes.

    Examples
    --------
    >>> from medseg.instances.sums import sum_objects
    >>> labels = np.array([[0, 1], [0, 1]], np.int32)
    >>> next(trace_outlines(labels, sum_objects(labels, 1)))[1][0].outer.tolist()
    [[0, 1], [2, 1], [2, 2], [0, 2]]
    """
    if labels.ndim != 2:
        raise GeometryError(f"outlines of {labels.ndim} axes: expected a picture of two. Take one slice.")
    for row in range(len(sums.voxels)):
        check_cancelled()
        rings = [ring + sums.low[row] for ring in _rings(crop_of(labels, sums, row))]
        yield row + 1, _polygons(rings)


def signed_area(ring: IntArray) -> float:
    """Return the area of a ring in (i, j), negative where it runs the other way round."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _rings(mask: BoolArray) -> list[IntArray]:
    padded = np.pad(mask, 1)
    edges = sum(int(np.count_nonzero(np.diff(padded, axis=axis))) for axis in range(2))
    points = np.zeros((edges + 1, 2), np.int64)
    stops = np.zeros(edges // 4 + 1, np.int64)
    count = _trace(padded, points, stops)
    stops_of = [0, *stops[:count].tolist()]
    return [_corners(points[a:b]) - 1 for a, b in pairwise(stops_of)]


def _corners(ring: IntArray) -> IntArray:
    """Leave out the points at which a ring does not turn."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return np.asarray(ring[turns])


def _polygons(rings: list[IntArray]) -> list[Polygon]:
    outer = [ring for ring in rings if signed_area(ring) > 0]
    holes: list[list[IntArray]] = [[] for _ in outer]
    for ring in rings:
        if signed_area(ring) < 0:
            around = [n for n, candidate in enumerate(outer) if _contains(candidate, _beside(ring))]
            holes[min(around, key=lambda n: signed_area(outer[n]))].append(ring)
    return [Polygon(ring, tuple(inner)) for ring, inner in zip(outer, holes, strict=True)]


def _beside(hole: IntArray) -> FloatArray:
    """Return a point just outside a hole, within the object: its inside is on the left of the way."""
    along = np.sign(hole[1] - hole[0]).astype(np.float64)
    return np.asarray(hole[0] + along / 2 + np.array([-along[1], along[0]]) / 4)


def _contains(ring: IntArray, point: FloatArray) -> bool:
    """Return whether a point that is on no line of the pixel grid lies inside (even-odd rule)."""
    here, there = ring, np.roll(ring, -1, axis=0)
    upright = here[:, 0] == there[:, 0]
    low, high = np.minimum(here[:, 1], there[:, 1]), np.maximum(here[:, 1], there[:, 1])
    crossed = upright & (here[:, 0] > point[0]) & (low < point[1]) & (point[1] < high)
    return bool(np.count_nonzero(crossed) % 2)


@jit
def _trace(padded: BoolArray, points: IntArray, stops: IntArray) -> int:
    """Walk all edges between inside and outside; cut off a ring whenever the way meets itself.

    `points` is filled from the front with finished rings; the way walked so far is a stack of its own.
    """
    used = np.zeros((padded.shape[0] + 1, padded.shape[1] + 1), np.uint8)
    place = np.full(used.shape, -1, np.int64)
    stack = np.zeros(points.shape, np.int64)
    filled, rings = 0, 0
    for x in range(1, padded.shape[0]):
        for y in range(1, padded.shape[1]):
            while _leaving(padded, used, x, y, 0) >= 0:
                height, direction, a, b = 0, 0, x, y
                while True:
                    if place[a, b] >= 0:
                        base = place[a, b]
                        for n in range(base, height):
                            points[filled] = stack[n]
                            filled += 1
                            place[stack[n, 0], stack[n, 1]] = -1
                        stops[rings] = filled
                        rings += 1
                        height = base
                        if height == 0:
                            break
                    place[a, b] = height
                    stack[height, 0], stack[height, 1] = a, b
                    height += 1
                    direction = _leaving(padded, used, a, b, direction)
                    used[a, b] |= 1 << direction
                    a += (direction == 0) - (direction == 2)
                    b += (direction == 1) - (direction == 3)
    return rings


@jit
def _leaving(padded: BoolArray, used: IntArray, x: int, y: int, direction: int) -> int:
    """Return an unused edge that leaves a corner, first the one that turns to the inside; -1 if none does."""
    a, b, c, d = padded[x - 1, y - 1], padded[x, y - 1], padded[x - 1, y], padded[x, y]
    for turn in (1, 0, 3):
        way = (direction + turn) % 4
        there = (
            (way == 0 and d and not b)
            or (way == 1 and c and not d)
            or (way == 2 and a and not c)
            or (way == 3 and b and not a)
        )
        if there and not used[x, y] >> way & 1:
            return way
    return -1
