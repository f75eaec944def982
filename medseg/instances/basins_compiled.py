"""The three sweeps of the basin merge as compiled loops; `basins_numpy` has the same without numba.

Heights come as `levels`: int32 that order as the float32 do (:func:`medseg.instances.basins.to_levels`).
"""

import numpy as np

from medseg.errors import ResourceError
from medseg.instances.compiled import each_slab, jit
from medseg.instances.neighbours import ALL, BACKGROUND, STAY, offsets
from medseg.types import IntArray

# A key of the ascent: level, then the number of the step; background is below every key.
_NOTHING = -(1 << 62)
_LOAD = 0.6
# Fibonacci hashing (Knuth, The Art of Computer Programming 3, section 6.4): 2**64 by the golden ratio.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def ascend(levels: IntArray, floor: int, connectivity: int, threads: int = 1) -> IntArray:
    """Return for each voxel the number of its step to the best neighbour; 255 where it is not above `floor`.

    Best is the highest level, and of equal ones the lowest linear index: a strict order, so that no path
    returns.
    """
    codes = np.empty(levels.shape, dtype=np.uint8)
    kernel = _ascend_all if connectivity == ALL else _ascend_faces
    each_slab(lambda start, stop: kernel(levels, floor, codes, start, stop), len(levels), threads)
    return codes


def resolve(codes: IntArray, threads: int = 1) -> tuple[IntArray, IntArray]:
    """Follow every path; return the number (1, 2, ... by linear index) of its root, and the roots."""
    flat, labels = codes.reshape(-1), np.zeros(codes.size, dtype=np.int32)
    count = _count_roots(flat)
    if count > np.iinfo(labels.dtype).max:
        raise ResourceError(f"{count} basins are more than a label map can number. Smooth the height map.")
    roots = _number_roots(flat, labels, count)
    steps = offsets(codes.shape)
    # Threads may walk the same path and write the same number: the end of a path does not depend on who asks.
    each_slab(lambda start, stop: _follow(flat, steps, labels, start, stop), codes.size, threads)
    return labels.reshape(codes.shape), roots


def find_saddles(
    levels: IntArray, labels: IntArray, connectivity: int, threads: int = 1
) -> tuple[IntArray, IntArray]:
    """Return pairs (n, 2) of basins a < b that touch, ascending, and the highest level between each (n,)."""
    forward = np.array([(0, 1), (1, -1), (1, 0), (1, 1)] if connectivity == ALL else [(0, 1), (1, 0)])
    wide = int(connectivity == ALL)
    tables = each_slab(
        lambda start, stop: _saddles(levels, labels, forward, wide, start, stop), len(levels), threads
    )
    keys = np.concatenate([table[0] for table in tables])
    found = np.concatenate([table[1] for table in tables])
    return unpack(*highest(keys, found))


def highest(keys: IntArray, levels: IntArray) -> tuple[IntArray, IntArray]:
    """Return each key once, ascending, with the highest of its levels."""
    order = np.lexsort((-levels.astype(np.int64), keys))
    keys, levels = keys[order], levels[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], levels[first]


def unpack(keys: IntArray, levels: IntArray) -> tuple[IntArray, IntArray]:
    """Return keys ``a << 32 | b`` as pairs, beside their levels."""
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1), levels


@jit
def _ascend_all(levels: IntArray, floor: int, codes: IntArray, start: int, stop: int) -> None:
    # The best of 27 in the strict order is the best along x, of these along y, of these along z: 6
    # comparisons instead of 26. The number of the step fills the lowest bits of the key, z highest.
    depth, height, width = levels.shape
    rows = np.empty((height, width), dtype=np.int64)
    planes = np.full((3, height, width), _NOTHING, dtype=np.int64)
    for z in range(max(start - 1, 0), min(stop + 1, depth)):
        plane = planes[z % 3]
        _best_in_plane(levels[z], floor, rows, plane)
        if z > start:
            _write_codes(planes, levels[z - 1], floor, codes[z - 1], z - 1)
    if stop == depth:
        planes[depth % 3] = _NOTHING
        _write_codes(planes, levels[depth - 1], floor, codes[depth - 1], depth - 1)


@jit
def _best_in_plane(levels: IntArray, floor: int, rows: IntArray, plane: IntArray) -> None:
    height, width = levels.shape
    for y in range(height):
        line, row = levels[y], rows[y]
        for x in range(width):
            level = np.int64(line[x])
            row[x] = (level << 6) | 1 if level > floor else _NOTHING
        before = np.int64(_NOTHING)
        for x in range(width - 1):
            here = row[x]
            row[x] = max(max(before + 1, here), row[x + 1] - 1)
            before = here
        row[width - 1] = max(before + 1, row[width - 1])
    for y in range(height):
        here, out = rows[y], plane[y]
        above, below = rows[max(y - 1, 0)], rows[min(y + 1, height - 1)]
        for x in range(width):
            out[x] = max(
                max(above[x] + (8 if y else 4), here[x] + 4), below[x] + (0 if y + 1 < height else 4)
            )


@jit
def _write_codes(planes: IntArray, levels: IntArray, floor: int, codes: IntArray, z: int) -> None:
    height, width = levels.shape
    above, here, below = planes[(z + 2) % 3], planes[z % 3], planes[(z + 1) % 3]
    for y in range(height):
        up, middle, down, line, out = above[y], here[y], below[y], levels[y], codes[y]
        for x in range(width):
            key = max(max(up[x] + 32, middle[x] + 16), down[x])
            out[x] = np.uint8(key & 63) if line[x] > floor else np.uint8(BACKGROUND)


@jit
def _ascend_faces(levels: IntArray, floor: int, codes: IntArray, start: int, stop: int) -> None:
    depth, height, width = levels.shape
    for z in range(start, stop):
        for y in range(height):
            # Beyond the border is the line itself, without a step.
            line, up, down = levels[z, y], levels[max(z - 1, 0), y], levels[min(z + 1, depth - 1), y]
            above, below = levels[z, max(y - 1, 0)], levels[z, min(y + 1, height - 1)]
            to_up, to_down = 37 if z > 0 else STAY, 5 if z + 1 < depth else STAY
            to_above, to_below = 25 if y > 0 else STAY, 17 if y + 1 < height else STAY
            for x in range(width):
                key = max(_key(line[x], STAY), max(_key(up[x], to_up), _key(down[x], to_down)))
                key = max(key, max(_key(above[x], to_above), _key(below[x], to_below)))
                key = max(key, _key(line[max(x - 1, 0)], 22 if x > 0 else STAY))
                key = max(key, _key(line[min(x + 1, width - 1)], 20 if x + 1 < width else STAY))
                codes[z, y, x] = np.uint8(key & 63) if line[x] > floor else np.uint8(BACKGROUND)


@jit
def _key(level: int, code: int) -> int:
    return (np.int64(level) << 6) | code  # type: ignore[return-value]


@jit
def _count_roots(codes: IntArray) -> int:
    count = 0
    for i in range(len(codes)):
        count += codes[i] == STAY
    return count


@jit
def _number_roots(codes: IntArray, labels: IntArray, count: int) -> IntArray:
    roots = np.empty(count, dtype=np.int64)
    found = 0
    for i in range(len(codes)):
        if codes[i] == STAY:
            roots[found] = i
            found += 1
            labels[i] = found
    return roots


@jit
def _follow(codes: IntArray, steps: IntArray, labels: IntArray, start: int, stop: int) -> None:
    for i in range(start, stop):
        if codes[i] == BACKGROUND or labels[i] != 0:
            continue
        j = i
        while labels[j] == 0:
            j += steps[codes[j]]
        label = labels[j]
        j = i
        while labels[j] == 0:
            labels[j] = label
            j += steps[codes[j]]


@jit
def _saddles(
    levels: IntArray, labels: IntArray, rows: IntArray, wide: int, start: int, stop: int
) -> tuple[IntArray, IntArray]:
    depth, height, _ = labels.shape
    keys: IntArray = np.full(1 << 12, -1, dtype=np.int64)
    found: IntArray = np.empty(1 << 12, dtype=np.int32)
    state = np.array([0, -1, 0])
    for z in range(start, stop):
        for y in range(height):
            line = (labels[z, y], levels[z, y])
            keys, found = _saddles_of_lines(line, line, 1, 1, keys, found, state)
            for row in range(len(rows)):
                zz, yy = z + rows[row, 0], y + rows[row, 1]
                if zz < depth and 0 <= yy < height:
                    other = (labels[zz, yy], levels[zz, yy])
                    keys, found = _saddles_of_lines(line, other, -wide, wide, keys, found, state)
    kept = keys >= 0
    return keys[kept], found[kept]


@jit
def _saddles_of_lines(
    line: tuple[IntArray, IntArray],
    other: tuple[IntArray, IntArray],
    first: int,
    last: int,
    keys: IntArray,
    found: IntArray,
    state: IntArray,
) -> tuple[IntArray, IntArray]:
    """Enter pairs of a line and another one, `first` to `last` voxels further; return the (grown) table.

    `state` is the number of pairs, the last one, which neighbouring voxels mostly repeat, and its slot.
    """
    width = len(line[0])
    marks = _meeting(line[0], other[0], first, last)
    for x in range(width):
        a = line[0][x]
        if a == 0 or not marks[x]:
            continue
        for xx in range(max(x + first, 0), min(x + last + 1, width)):
            b = other[0][xx]
            if b == a or b == 0:
                continue
            key = (np.int64(min(a, b)) << 32) | np.int64(max(a, b))
            level = min(line[1][x], other[1][xx])
            if key != state[1]:
                if state[0] > _LOAD * len(keys):  # a full table would be searched for ever
                    keys, found = _grown(keys, found)
                slot = _slot(keys, int(key))
                if keys[slot] == -1:
                    keys[slot], found[slot] = key, level
                    state[0] += 1
                state[1], state[2] = key, slot
            if level > found[state[2]]:
                found[state[2]] = level
    return keys, found


@jit
def _meeting(own: IntArray, other: IntArray, first: int, last: int) -> IntArray:
    """Mark where another basin is among the neighbours, and both ends; most voxels are far from any.

    Plain loops, which the compiler turns into vector instructions: the table is a fifth of the work then.
    """
    marks: IntArray = np.ones(len(own), dtype=np.uint8)
    marks[1:-1] = 0
    for step in range(first, last + 1):
        for x in range(1, len(own) - 1):
            marks[x] |= np.uint8((own[x] != other[x + step]) & (other[x + step] != 0))
    return marks


@jit
def _slot(keys: IntArray, key: int) -> int:
    mask = len(keys) - 1
    slot = int(np.int64((np.uint64(key) * _GOLDEN) >> np.uint64(32)) & mask)
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@jit
def _grown(keys: IntArray, found: IntArray) -> tuple[IntArray, IntArray]:
    more_keys = np.full(2 * len(keys), -1, dtype=np.int64)
    more_found = np.empty(2 * len(keys), dtype=np.int32)
    for i in range(len(keys)):
        if keys[i] != -1:
            slot = _slot(more_keys, int(keys[i]))
            more_keys[slot], more_found[slot] = keys[i], found[i]
    return more_keys, more_found
