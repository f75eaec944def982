"""Diameters that stay inside an object on their whole way: for lesions that are not convex."""

import numpy as np

from medseg.types import BoolArray, FloatArray, IntArray

# Pairs of border points that are tried at a time.
_CHUNK = 4096


def longest_inside(
    mask: BoolArray, frame: FloatArray, centres: bool, per_pixel: int
) -> tuple[tuple[float, float], int, FloatArray]:
    """Find the longest diameter inside a mask, and the longest one across it on the same slice.

    Parameters
    ----------
    mask : (s, a, b) bool
        Slices along the first axis.
    frame : (2, 2) float64
        Column a is one pixel step along axis a, in mm.
    centres : bool
        Between centres of pixels instead of corners.
    per_pixel : int
        How densely a diameter is looked at.

    Returns
    -------
    (longest, across), slice, ends
        `ends` (4, 2) in pixel edges (with `centres`: indices).
    """
    best, at = -1.0, 0
    ends = np.zeros((4, 2))
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        pixels = mask[index]
        found = _farthest_inside(pixels, frame, centres, per_pixel, best)
        if found is not None:
            ends[:2] = found
            best, at = float(np.linalg.norm(frame @ (found[1] - found[0]))), int(index)
    across, ends[2:] = _across_inside(mask[at], frame, ends[:2], centres, per_pixel)
    return (best, across), at, ends


def _farthest_inside(
    pixels: BoolArray, frame: FloatArray, centres: bool, per_pixel: int, best: float
) -> FloatArray | None:
    """Return the ends of the longest segment inside that is longer than `best`, or None."""
    points = _border_points(pixels, centres)
    first, second = np.triu_indices(len(points))
    lengths = np.linalg.norm((points[second] - points[first]) @ frame.T, axis=1)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > best * (1 + 1e-9)]
    for start in range(0, len(order), _CHUNK):
        chosen = order[start : start + _CHUNK]
        for pair in chosen:
            ends = points[[first[pair], second[pair]]].astype(np.float64)
            if _is_inside(pixels, ends, centres, per_pixel):
                return ends
    return None


def _border_points(pixels: BoolArray, centres: bool) -> IntArray:
    """Return the corners (or centres) of pixels with a neighbour outside, in lexicographic order."""
    padded = np.pad(pixels, 1)
    middle = padded[1:-1, 1:-1]
    deep = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    border = np.argwhere(middle & ~deep)
    if centres:
        return border
    corners = border[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return np.unique(corners.reshape(-1, 2), axis=0)


def _is_inside(pixels: BoolArray, ends: FloatArray, centres: bool, per_pixel: int) -> bool:
    steps = int(np.ceil(np.abs(ends[1] - ends[0]).max() * per_pixel)) + 1
    line = ends[0] + np.linspace(0, 1, steps + 1)[:, None] * (ends[1] - ends[0])
    return bool(_at(pixels, line, centres).all())


def _at(pixels: BoolArray, points: FloatArray, centres: bool) -> BoolArray:
    """Return which points lie in a pixel of the mask, or on its edge."""
    places = points + 0.5 if centres else points
    hit = np.zeros(len(points), bool)
    for a in (-1e-6, 1e-6):
        for b in (-1e-6, 1e-6):
            index = np.floor(places + np.array([a, b])).astype(np.int64)
            valid = ((index >= 0) & (index < pixels.shape)).all(axis=1)
            hit[valid] |= pixels[tuple(index[valid].T)]
    return hit


def _across_inside(
    pixels: BoolArray, frame: FloatArray, ends: FloatArray, centres: bool, per_pixel: int
) -> tuple[float, FloatArray]:
    """Return the longest run inside, at right angles to the long axis, on a lattice of 1 / `per_pixel`."""
    long = frame @ (ends[1] - ends[0])
    length = float(np.linalg.norm(long))
    if length == 0.0:
        return 0.0, ends[[0, 0]]
    along = long / length
    across = np.array([-along[1], along[0]])
    step = float(np.linalg.norm(frame, axis=0).min()) / per_pixel
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * pixels.shape
    reach = float(np.abs((corners - ends[0]) @ frame.T @ across).max())
    width = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1) * step
    best, found = 0.0, ends[[0, 0]]
    for at in np.arange(0.0, length + step / 2, step):
        places = (frame @ ends[0] + at * along) + width[:, None] * across
        points = np.linalg.solve(frame, places.T).T
        first, last = _longest_run(_at(pixels, points, centres))
        if last > first and width[last] - width[first] > best * (1 + 1e-9):
            best, found = float(width[last] - width[first]), points[[first, last]]
    return best, found


def _longest_run(inside: BoolArray) -> tuple[int, int]:
    """Return the first and last index of the longest run of True; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inside.astype(np.int8), [0]))))
    if not edges.size:
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    k = int(np.argmax(stops - starts))
    return int(starts[k]), int(stops[k]) - 1
