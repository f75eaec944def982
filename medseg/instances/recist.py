"""RECIST diameters: the longest in the acquisition plane, and the longest across it on the same slice.

RECIST 1.1 (Eisenhauer et al. 2009, Eur J Cancer 45:228-247) measures a lesion by its longest diameter in the
plane of acquisition, and a lymph node by its short axis, the longest diameter at right angles to that. Both
are taken between corners of pixels, so a lesion of one pixel measures its diagonal; or, on request, between
their centres.

What decides is the convex hull of the object's pixels on a slice. It is found in whole numbers of pixels, so
ties are ties on every machine: the lower slice wins, then the smaller end points.
"""

from dataclasses import dataclass

import numpy as np

from medseg.geometry.orient import axis_codes
from medseg.instances.compiled import jit
from medseg.instances.shape import crop_of
from medseg.instances.sums import Sums
from medseg.log import check_cancelled
from medseg.types import BoolArray, FloatArray, IntArray

# Two lengths that agree to this part are one length with rounding.
_TIE = 1e-9
# Diameters inside the object are looked for at this many points per pixel.
_PER_PIXEL = 4


@dataclass(frozen=True, eq=False)
class Diameters:
    """Diameters of K objects, in the unit of the steps.

    Attributes
    ----------
    longest, across : (K,) float64
    slice_index : (K,) int64
        Slice along the chosen axis.
    ends : (K, 4, n) float64
        Indices (voxel i is at i): both ends of the longest diameter, both ends of the one across.
    """

    longest: FloatArray
    across: FloatArray
    slice_index: IntArray
    ends: FloatArray


def acquisition_axis(affine: FloatArray) -> int:
    """Return the array axis that runs nearest to feet-head, across which axial slices lie.

    >>> acquisition_axis(np.diag([1.0, 1.0, 3.0, 1.0]))
    2
    """
    return next(axis for axis, code in enumerate(axis_codes(affine)) if code in "SI")


def measure_diameters(
    labels: IntArray,
    sums: Sums,
    steps: FloatArray,
    axis: int = 2,
    centres: bool = False,
    inside: bool = False,
) -> Diameters:
    """Measure every object on the slice where its longest diameter is largest.

    Parameters
    ----------
    labels : (a, b) or (a, b, c) int32
    sums : Sums
        Of `labels`.
    steps : (n, n) or (3, n) float64
        Column a is one voxel step along axis a, in mm. The two axes of a slice may be oblique to each other.
    axis : int
        Across which slices are taken; unused in 2D.
    centres : bool
        Between centres of pixels instead of corners.
    inside : bool
        Only diameters that lie inside the object all the way (to a quarter of a pixel), which differ for
        lesions that are not convex.
    """
    count, n = sums.low.shape
    planar = [a for a in range(n) if n == 2 or a != axis]
    frame = _flattened(steps[:, planar])
    longest, across, index = np.zeros(count), np.zeros(count), np.zeros(count, np.int64)
    ends = np.zeros((count, 4, n))
    for row in np.flatnonzero(sums.voxels):
        check_cancelled()
        mask = crop_of(labels, sums, int(row))
        mask = mask[None] if n == 2 else np.ascontiguousarray(np.moveaxis(mask, axis, 0))
        found, at, points = _of_object(mask, frame, centres, inside)
        longest[row], across[row] = found
        ends[row][:, planar] = points + sums.low[row][planar] - (0.0 if centres else 0.5)
        if n == 3:
            index[row] = at + sums.low[row, axis]
            ends[row][:, axis] = index[row]
    return Diameters(longest, across, index, ends)


def _of_object(
    mask: BoolArray, frame: FloatArray, centres: bool, inside: bool
) -> tuple[tuple[float, float], int, FloatArray]:
    if inside:
        from medseg.instances.chords import longest_inside

        return longest_inside(mask, frame, centres, _PER_PIXEL)
    points = np.zeros((4, 2))
    at, long, across = _longest(mask, frame, np.linalg.inv(frame), centres, points)
    return (long, across), at, points


def _flattened(steps: FloatArray) -> FloatArray:
    """Return the (2, 2) steps of a slice within its own plane; lengths and angles stay."""
    first, second = steps.T
    u = first / np.linalg.norm(first)
    along = float(second @ u)
    beside = float(np.linalg.norm(second - along * u))
    return np.array([[np.linalg.norm(first), along], [0.0, beside]])


@jit
def _longest(
    mask: BoolArray, frame: FloatArray, inverse: FloatArray, centres: bool, ends: FloatArray
) -> tuple[int, float, float]:
    """Return slice, longest diameter and the one across; `ends` (4, 2) takes their ends in pixel edges."""
    best, at = -1.0, 0
    size = mask.shape[1] + 1
    lines = np.zeros((size, 2), np.int64)
    hull = np.zeros((2 * size, 2), np.int64)
    kept, kept_hull = 0, np.zeros((2 * size, 2), np.int64)
    pair = np.zeros(2, np.int64)
    for index in range(mask.shape[0]):
        first, last = _outline(mask[index], lines, centres)
        if last < first or _bound(lines, first, last, frame) <= best:
            continue
        count = _convex(lines, first, last, hull)
        long, a, b = _farthest(hull, count, frame)
        if long > best * (1 + _TIE):
            best, at, kept = long, index, count
            kept_hull[:count] = hull[:count]
            pair[0], pair[1] = a, b
    ends[0] = kept_hull[pair[0]]
    ends[1] = kept_hull[pair[1]]
    across = _across(kept_hull[:kept], frame, inverse, ends)
    return at, best, across


@jit
def _outline(pixels: BoolArray, lines: IntArray, centres: bool) -> tuple[int, int]:
    """Fill for each line of corners (or centres) the first and last one; return the first and last line."""
    first, last = pixels.shape[0] + 1, -1
    extent = 0 if centres else 1
    lines[:, 0] = pixels.shape[1] + 1
    lines[:, 1] = -1
    for a in range(pixels.shape[0]):
        low, high = -1, -1
        for b in range(pixels.shape[1]):
            if pixels[a, b]:
                if low < 0:
                    low = b
                high = b
        if low >= 0:
            for line in range(a, a + extent + 1):
                lines[line, 0] = min(lines[line, 0], low)
                lines[line, 1] = max(lines[line, 1], high + extent)
            first, last = min(first, a), a + extent
    return first, last


@jit
def _bound(lines: IntArray, first: int, last: int, frame: FloatArray) -> float:
    """Return the longer diagonal of the box around the lines: no diameter exceeds it."""
    low, high = lines[first, 0], lines[first, 1]
    for line in range(first, last + 1):
        if lines[line, 1] >= 0:
            low, high = min(low, lines[line, 0]), max(high, lines[line, 1])
    return max(
        _length(float(last - first), float(high - low), frame),
        _length(float(last - first), float(low - high), frame),
    )


@jit
def _length(a: float, b: float, frame: FloatArray) -> float:
    return float(np.hypot(frame[0, 0] * a + frame[0, 1] * b, frame[1, 0] * a + frame[1, 1] * b))


@jit
def _convex(lines: IntArray, first: int, last: int, hull: IntArray) -> int:
    """Write the corners of the convex hull, in order around it; return how many (monotone chain)."""
    count = _chain(lines, first, last, 1, 0, hull, 0)
    return _chain(lines, last, first, -1, 1, hull, count)


@jit
def _chain(lines: IntArray, start: int, stop: int, step: int, side: int, hull: IntArray, begin: int) -> int:
    """Append the hull of one side, which always turns the same way; the ends of the sides may coincide."""
    count = begin
    for line in range(start, stop + step, step):
        b = lines[line, side]
        if lines[line, 1] < 0:
            continue
        while count - begin >= 2:
            across = hull[count - 1, 0] - hull[count - 2, 0]
            along = hull[count - 1, 1] - hull[count - 2, 1]
            if across * (b - hull[count - 2, 1]) - along * (line - hull[count - 2, 0]) > 0:
                break
            count -= 1
        hull[count, 0] = line
        hull[count, 1] = b
        count += 1
    return count


@jit
def _farthest(hull: IntArray, count: int, frame: FloatArray) -> tuple[float, int, int]:
    """Return the longest distance of two corners, and which they are, the smaller one first."""
    best, first, second = -1.0, 0, 0
    for p in range(count):
        for q in range(count):
            if not _before(hull, p, q):
                continue
            long = _length(float(hull[q, 0] - hull[p, 0]), float(hull[q, 1] - hull[p, 1]), frame)
            tied = abs(long - best) <= _TIE * best
            smaller = _before(hull, p, first) or (
                hull[p, 0] == hull[first, 0] and hull[p, 1] == hull[first, 1] and _before(hull, q, second)
            )
            if (not tied and long > best) or (tied and smaller):
                best, first, second = long, p, q
    return max(best, 0.0), first, second


@jit
def _before(hull: IntArray, p: int, q: int) -> bool:
    return bool(hull[p, 0] < hull[q, 0] or (hull[p, 0] == hull[q, 0] and hull[p, 1] < hull[q, 1]))


@jit
def _across(hull: IntArray, frame: FloatArray, inverse: FloatArray, ends: FloatArray) -> float:
    """Return the longest chord of the hull at right angles to the long axis; it starts at a corner.

    The chord's length is concave and piecewise linear along the long axis, with knots at the corners.
    """
    long = frame @ (ends[1] - ends[0])
    length = np.hypot(long[0], long[1])
    ends[2] = ends[0]
    ends[3] = ends[0]
    if length == 0.0:
        return 0.0
    turn = np.array([[long[0], long[1]], [-long[1], long[0]]]) / length
    points = (turn @ frame @ hull.astype(np.float64).T).T  # along and across the long axis
    best = -1.0
    for corner in range(points.shape[0]):
        along = points[corner, 0]
        low, high = points[corner, 1], points[corner, 1]
        for p in range(points.shape[0]):
            q = (p + 1) % points.shape[0]
            here, there = points[p, 0] - along, points[q, 0] - along
            if here * there < 0:
                crossing = points[p, 1] + (points[q, 1] - points[p, 1]) * here / (here - there)
                low, high = min(low, crossing), max(high, crossing)
            elif abs(here) <= _TIE * length:
                low, high = min(low, points[p, 1]), max(high, points[p, 1])
        if high - low > best * (1 + _TIE):
            best = high - low
            back = inverse @ turn.T
            ends[2] = back @ np.array([along, low])
            ends[3] = back @ np.array([along, high])
    return best
