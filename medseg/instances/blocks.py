"""Volumes that do not fit in memory: the same objects, block by block.

Each step is a map over blocks: it reads a box, writes at most its own block, and returns a small table.
Tables are joined by one global step between the maps. `mapper` runs a map: the built-in ``map``, that of a
pool of threads, or a scheduler's; blocks that share a chunk of the output must not be written at the same
time. What a map computes is in functions of arrays alone (``block_...``, ``seam_pairs``).
The result is the one of the whole volume, number by number, whatever the blocks are.

Memory: a few arrays of one block with its halo, and 20 bytes for each basin or component of each block,
counted again in every block that it reaches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import ConfigError
from medseg.instances.basins import from_levels, sweeps, to_levels
from medseg.instances.basins_compiled import highest, unpack
from medseg.instances.components import check_connectivity, label_components
from medseg.instances.distance import check_spacing, distance_map
from medseg.instances.dropped import Dropped
from medseg.instances.grid import Box, Chunked, Grid, check_same, read_box
from medseg.instances.hierarchy import Hierarchy
from medseg.instances.neighbours import BACKGROUND, STAY, as_volume, neighbourhood, steps_of
from medseg.instances.sizes import choose_large
from medseg.instances.split import BasinsConfig, depth_of
from medseg.types import Array, FloatArray, IntArray, Shape

Mapper = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Numbers that are local to each block: piece ``i`` of block ``b`` is row ``starts[b] + i - 1``.

    Attributes
    ----------
    grid : Grid
    starts : (blocks + 1,) int64
    voxels : (pieces,) int64
        Size of each piece.
    """

    grid: Grid
    starts: IntArray
    voxels: IntArray

    def look_up(self, numbers: Chunked, box: Box, table: IntArray) -> IntArray:
        """Read a box of local numbers and return the entry of each in a table of all pieces; 0 stays 0.

        Only the rows of blocks that the box overlaps are used.
        """
        local = read_box(numbers, box)
        found = np.zeros(local.shape, dtype=table.dtype)
        for block, part in self.grid.parts(box):
            rows = np.append(table.dtype.type(0), table[self.starts[block] : self.starts[block + 1]])
            found[part] = rows[local[part]]
        return found


@dataclass(frozen=True, eq=False)
class BlockBasins:
    """The basins of a height map that was read block by block.

    Attributes
    ----------
    pieces : Pieces
        Of the array that holds the parts of basins in each block.
    basins : (pieces,) int32
        The basin, 1 to k, of each piece.
    hierarchy : Hierarchy
        As of the whole height map.
    """

    pieces: Pieces
    basins: IntArray
    hierarchy: Hierarchy

    def table(self, h: float = 0.0, rel: float = 0.0) -> IntArray:
        """Return the object of each piece: see :meth:`Hierarchy.merge`."""
        return self.hierarchy.merge(h, rel)[self.basins]


def distance_in_blocks(
    mask: Chunked,
    distances: Chunked,
    spacing: Sequence[float],
    cap: float,
    grid: Grid,
    mapper: Mapper = map,
) -> int:
    """Write the distance to the background, at most `cap`; return how many voxels have reached it.

    Parameters
    ----------
    mask : what is not 0 is inside
    distances : float32 of the same shape, is written
    spacing : floats
    cap : float
        Each block is read with a halo of `cap`, so take no more than needed: above twice the largest radius
        that an object is expected to have. Deeper than the cap, an object is one plateau.
    grid, mapper : of the blocks
    """
    check_same(mask, distances)
    check_spacing(spacing, len(mask.shape))
    if not cap >= max(spacing):
        raise ConfigError(f"cap {cap:g}: expected at least the longest side of a voxel, {max(spacing):g}.")
    halo = [int(np.ceil(cap / size)) for size in spacing]

    def work(box: Box) -> int:
        outer, core = grid.around(box, halo)
        found = block_distance(read_box(mask, outer), core, spacing, cap, halo)
        distances[box] = found
        return int((found >= np.float32(cap)).sum())

    return sum(mapper(work, grid.boxes))


def block_distance(
    mask: Array, core: Box, spacing: Sequence[float], cap: float, halo: Sequence[int]
) -> FloatArray:
    """Return the capped distances of the core of a block that was read with a halo."""
    # A background voxel within the cap is within the halo, so no distance up to the cap is too long.
    assert all(width * size >= cap for width, size in zip(halo, spacing, strict=True))
    return distance_map(mask, spacing, cap)[core]


def components_in_blocks(
    source: Chunked, numbers: Chunked, grid: Grid, connectivity: int = 26, mapper: Mapper = map
) -> tuple[Pieces, IntArray]:
    """Number connected voxels of equal value.

    Parameters
    ----------
    source : bool or int, 0 is background
    numbers : int32 of the same shape, is written
        Receives local numbers; :func:`relabel_in_blocks` makes them global.
    grid, mapper : of the blocks
    connectivity : 6, 18 or 26; 4 or 8 in two dimensions

    Returns
    -------
    pieces : Pieces
    table : (pieces,) int32
        The component of each, numbered as :func:`label_components` does.
    """
    check_same(source, numbers)
    kind = check_connectivity(connectivity, len(grid.shape))

    def label(box: Box) -> tuple[IntArray, IntArray]:
        labels, first, voxels = block_components(read_box(source, box), connectivity)
        numbers[box] = labels
        return to_global(first, box, grid.shape), voxels

    found = list(mapper(label, grid.boxes))
    pieces = _pieces(grid, [voxels for _, voxels in found])
    rows = np.arange(1, len(pieces.voxels) + 1)

    def seams(box: Box) -> IntArray:
        outer, core = grid.around(box, (1,) * len(box))
        return seam_pairs(read_box(source, outer), pieces.look_up(numbers, outer, rows), core, kind)

    pairs = np.concatenate([np.zeros((0, 2), np.int64), *mapper(seams, grid.boxes)])
    return pieces, join_components(pairs, np.concatenate([first for first, _ in found]))


def block_components(values: Array, connectivity: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return local components of a block, the linear index of the first voxel of each, and their sizes."""
    labels = label_components(values, connectivity)
    flat = labels.reshape(-1)
    inside = np.flatnonzero(flat)
    first = np.full(int(flat.max(initial=0)), flat.size, dtype=np.int64)
    np.minimum.at(first, flat[inside] - 1, inside)
    return labels, first, np.bincount(flat, minlength=len(first) + 1)[1:]


def seam_pairs(values: Array, rows: IntArray, core: Box, connectivity: int) -> IntArray:
    """Return pairs (n, 2) of pieces that are one component: a voxel of the core, its neighbour outside."""
    flat = values.ndim == 2
    values, rows = as_volume(values), as_volume(rows)
    core = (slice(0, 1), *core) if flat else core
    found = [np.zeros((0, 2), dtype=np.int64)]
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    for step in steps_of(26):
        if not 0 < sum(map(abs, step)) <= most:
            continue
        # Only the core's outermost layer can have a neighbour outside; others give equal rows.
        here, there = _shifted(core, step, values.shape)
        same = (values[here] == values[there]) & (rows[here] > 0) & (rows[here] != rows[there])
        found.append(np.stack([rows[here][same], rows[there][same]], axis=1) - 1)
    return np.unique(np.concatenate(found), axis=0)


def join_components(pairs: IntArray, first: IntArray) -> IntArray:
    """Return the component of each piece, numbered by the first voxel of all its pieces."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(len(first),) * 2)
    count, groups = connected_components(graph, directed=False)
    earliest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(earliest, groups, first)
    order: IntArray = np.empty(count, dtype=np.int32)
    order[np.argsort(earliest)] = np.arange(1, count + 1)
    result: IntArray = order[groups]
    return result


def basins_in_blocks(
    height: Chunked,
    numbers: Chunked,
    grid: Grid,
    floor: float | None = 0.0,
    connectivity: int = 26,
    mapper: Mapper = map,
) -> BlockBasins:
    """Find the basins of a height map and the saddles between them.

    Parameters
    ----------
    height : see :func:`medseg.instances.basins.find_basins`
    numbers : int32 of the same shape, is written
        Receives the parts of basins in each block, numbered from 1 in each;
        ``relabel_in_blocks(numbers, labels, found.pieces, found.table(h))`` makes them objects.
    grid, mapper : of the blocks
    floor, connectivity : as for the whole
    """
    check_same(height, numbers)
    kind = neighbourhood(connectivity, len(grid.shape))
    halo = (1,) * len(grid.shape)

    def climb(box: Box) -> tuple[IntArray, FloatArray, IntArray]:
        outer, core = grid.around(box, halo)
        labels, ends, peaks, voxels = block_ascent(read_box(height, outer), core, floor, kind)
        numbers[box] = labels
        return to_global(ends, outer, grid.shape), peaks, voxels

    found = list(mapper(climb, grid.boxes))
    pieces = _pieces(grid, [voxels for *_, voxels in found])
    rows = np.arange(1, len(pieces.voxels) + 1)

    def link(box: Box, ends: IntArray) -> IntArray:
        outer, _ = grid.around(box, halo)
        return pieces.look_up(numbers, outer, rows).reshape(-1)[to_local(ends, outer, grid.shape)] - 1

    links = np.concatenate([np.zeros(0, np.int64), *mapper(link, grid.boxes, [ends for ends, *_ in found])])
    ends = np.concatenate([np.zeros(0, np.int64), *(ends for ends, *_ in found)])
    peaks = np.concatenate([np.zeros(0, np.float32), *(peaks for _, peaks, _ in found)])
    basins, roots, tops = resolve_links(links, ends, peaks)

    def saddles(box: Box) -> tuple[IntArray, IntArray]:
        outer, _ = grid.around(box, halo)
        levels, _ = to_levels(as_volume(read_box(height, outer)), floor)
        labels = as_volume(pieces.look_up(numbers, outer, basins))
        found: tuple[IntArray, IntArray] = sweeps.find_saddles(levels, labels, kind)
        return found

    pairs, depths = join_saddles(list(mapper(saddles, grid.boxes)))
    return BlockBasins(pieces, basins, Hierarchy(roots, tops, pairs, from_levels(depths)))


def block_ascent(
    height: Array, core: Box, floor: float | None, kind: int
) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
    """Climb inside the core of a block that was read with a halo of one voxel.

    Returns
    -------
    labels : int32, as the core
        Voxels of one number come to one end.
    ends : (n,) int64
        Linear index in the block with its halo: a summit in the core, or the first voxel outside of it.
    peaks : (n,) float32
        Height there.
    voxels : (n,) int64
    """
    volume = as_volume(height)
    levels, lowest = to_levels(volume, floor)
    codes = sweeps.ascend(levels, lowest, kind)
    ending = np.ones(height.shape, dtype=bool)
    ending[core] = False
    codes[ending.reshape(codes.shape) & (codes != BACKGROUND)] = STAY
    labels, roots = sweeps.resolve(codes)
    inner = labels.reshape(height.shape)[core]
    counts = np.bincount(inner.reshape(-1), minlength=len(roots) + 1)
    counts[0] = 0
    used = np.flatnonzero(counts)
    table = np.zeros(len(counts), dtype=np.int32)
    table[used] = np.arange(1, len(used) + 1)
    ends = roots[used - 1]
    return table[inner], ends, from_levels(levels.reshape(-1)[ends]), counts[used]


def resolve_links(
    links: IntArray, ends: IntArray, peaks: FloatArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Follow pieces through blocks to their summit; number basins by its linear index.

    Parameters
    ----------
    links : (pieces,) int
        The piece in which the end of each lies; its own for one with its summit.
    ends, peaks : (pieces,)
        Linear index of the end in the volume, and the height there.

    Returns
    -------
    basins : (pieces,) int32
        From 1.
    roots, peaks : (k,)
        Of the basins.
    """
    while not np.array_equal(further := links[links], links):  # the order is strict: no circles
        links = further
    summits = np.flatnonzero(links == np.arange(len(links)))
    order = summits[np.argsort(ends[summits])]
    basins = np.zeros(len(links), dtype=np.int32)
    basins[order] = np.arange(1, len(order) + 1)
    return basins[links], ends[order], peaks[order]


def join_saddles(found: Sequence[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
    """Return each pair of basins once, with the highest of its saddles in all blocks."""
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(pairs for pairs, _ in found)])
    levels = np.concatenate([np.zeros(0, np.int32), *(levels for _, levels in found)])
    return unpack(*highest((pairs[:, 0] << 32) | pairs[:, 1], levels))


def relabel_in_blocks(
    numbers: Chunked, labels: Chunked, pieces: Pieces, table: IntArray, mapper: Mapper = map
) -> None:
    """Write the entry of `table` for each piece; `labels` may be the array of the numbers itself."""
    check_same(numbers, labels)

    def work(box: Box) -> None:
        labels[box] = pieces.look_up(numbers, box, table)

    for _ in mapper(work, pieces.grid.boxes):
        pass


@dataclass(frozen=True, eq=False)
class BlockSplit:
    """What :func:`split_in_blocks` found.

    Attributes
    ----------
    count : int
        Objects.
    dropped : tuple of Dropped
    capped : int
        Voxels whose distance has reached the cap: none, if the cap was above every radius.
    """

    count: int
    dropped: tuple[Dropped, ...]
    capped: int


def split_in_blocks(
    mask: Chunked,
    distances: Chunked,
    labels: Chunked,
    spacing: Sequence[float],
    cap: float,
    grid: Grid,
    config: BasinsConfig | None = None,
    min_volume: float = 0.0,
    mapper: Mapper = map,
) -> BlockSplit:
    """Split a mask into objects: `medseg.instances.split.split` with "basins", block by block.

    Parameters
    ----------
    mask : what is not 0 is inside
    distances, labels : float32 and int32 of the same shape, are written
    spacing, cap, grid, mapper : as for :func:`distance_in_blocks`
    config : BasinsConfig
    min_volume : float
        Smaller objects are removed, in the cubed (or squared) unit of the spacing.
    """
    config = config or BasinsConfig()
    capped = distance_in_blocks(mask, distances, spacing, cap, grid, mapper)
    found = basins_in_blocks(distances, labels, grid, 0.0, config.connectivity, mapper)
    table = found.table(depth_of(config, spacing), config.rel)
    sizes = np.bincount(table, weights=found.pieces.voxels, minlength=1).astype(np.int64)
    kept, dropped = choose_large(sizes, min_volume, float(np.prod(spacing)))
    relabel_in_blocks(labels, labels, found.pieces, kept[table], mapper)
    return BlockSplit(int(kept.max(initial=0)), dropped, capped)


def to_global(indices: IntArray, box: Box, shape: Shape) -> IntArray:
    """Return linear indices in a box as linear indices in the volume."""
    sides = tuple(s.stop - s.start for s in box)
    places = np.unravel_index(indices, sides)
    moved = [np.asarray(p, np.int64) + s.start for p, s in zip(places, box, strict=True)]
    return _linear(moved, shape)


def to_local(indices: IntArray, box: Box, shape: Shape) -> IntArray:
    """Return linear indices in the volume as linear indices in a box."""
    moved = [p - s.start for p, s in zip(np.unravel_index(indices, shape), box, strict=True)]
    return _linear(moved, tuple(s.stop - s.start for s in box))


def _linear(places: Sequence[IntArray], shape: Shape) -> IntArray:
    total: IntArray = np.zeros(len(places[0]), dtype=np.int64)
    for place, size in zip(places, shape, strict=True):
        total = total * size + place
    return total


def _pieces(grid: Grid, voxels: Sequence[IntArray]) -> Pieces:
    starts = np.cumsum([0, *(len(sizes) for sizes in voxels)])
    return Pieces(grid, starts, np.concatenate([np.zeros(0, np.int64), *voxels]))


def _shifted(core: Box, step: tuple[int, int, int], shape: Shape) -> tuple[Box, Box]:
    """Return where both a voxel is in the core and its neighbour in the array, and these neighbours."""
    here = tuple(
        slice(max(c.start, -s), min(c.stop, n - s)) for c, s, n in zip(core, step, shape, strict=True)
    )
    return here, tuple(slice(h.start + s, h.stop + s) for h, s in zip(here, step, strict=True))
