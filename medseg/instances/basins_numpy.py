"""The three sweeps of `basins_compiled` in numpy, for machines without numba: slower, with equal results."""

import numpy as np

from medseg.instances.basins_compiled import highest, unpack
from medseg.instances.neighbours import BACKGROUND, STAY, code_of, forward_steps, offsets, steps_of
from medseg.types import IntArray

_LOWEST = np.iinfo(np.int64).min


def ascend(levels: IntArray, floor: int, connectivity: int, threads: int = 1) -> IntArray:
    """Return for each voxel the number of its step to the best neighbour; 255 where not above `floor`."""
    inside = levels > floor
    padded = np.pad(np.where(inside, levels.astype(np.int64), _LOWEST), 1, constant_values=_LOWEST)
    best = np.full(levels.shape, _LOWEST)
    codes = np.full(levels.shape, BACKGROUND, dtype=np.uint8)
    for step in steps_of(connectivity):
        there = padded[tuple(slice(1 + s, 1 + s + n) for s, n in zip(step, levels.shape, strict=True))]
        better = inside & (there > best)
        best[better] = there[better]
        codes[better] = code_of(step)
    return codes


def resolve(codes: IntArray, threads: int = 1) -> tuple[IntArray, IntArray]:
    """Follow every path; return the number (1, 2, ... by linear index) of its root, and the roots."""
    flat = codes.reshape(-1)
    inside = np.flatnonzero(flat != BACKGROUND)
    parents = np.arange(flat.size, dtype=np.int64)
    parents[inside] += offsets(codes.shape)[flat[inside]]
    while True:
        further = parents[parents[inside]]
        if np.array_equal(further, parents[inside]):
            break
        parents[inside] = further
    roots = np.flatnonzero(flat == STAY)
    labels = np.zeros(flat.size, dtype=np.int32)
    labels[inside] = np.searchsorted(roots, parents[inside]) + 1
    return labels.reshape(codes.shape), roots


def find_saddles(
    levels: IntArray, labels: IntArray, connectivity: int, threads: int = 1
) -> tuple[IntArray, IntArray]:
    """Return pairs (n, 2) of basins a < b that touch, ascending, and the highest level between each (n,)."""
    keys, found = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    for step in forward_steps(connectivity):
        here = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(step, labels.shape, strict=True))
        there = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(step, labels.shape, strict=True))
        touch = (labels[here] != labels[there]) & (labels[here] > 0) & (labels[there] > 0)
        a, b = labels[here][touch].astype(np.int64), labels[there][touch].astype(np.int64)
        keys.append((np.minimum(a, b) << 32) | np.maximum(a, b))
        found.append(np.minimum(levels[here][touch], levels[there][touch]))
    return unpack(*highest(np.concatenate(keys), np.concatenate(found)))
