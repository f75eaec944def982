"""Which objects of one image are which objects of another: shared voxels first, then distance.

1. Two objects are linked if they share enough voxels, measured on the smaller of them and after growing by a
   few millimetres. Both grids may differ: voxels are looked up where they lie in the world, so nothing is
   resampled and no small object is lost.
2. Objects that share with none are paired one to one by the distance of their centroids, so that the sum of
   what the distances stay below the limit is largest (the assignment problem).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import GeometryError
from medseg.instances.schema import Instances
from medseg.types import FloatArray, IntArray

Kind = Literal[
    "persistent",
    "new",
    "gone",
    "outside the follow-up",
    "outside the baseline",
    "merged",
    "split",
    "regrouped",
]
# A k-d tree of voxels and the object of each.
Edge = tuple[Any, IntArray]
# Voxels looked up at a time.
_SLAB_VOXELS = 1 << 22
KINDS: tuple[Kind, ...] = (
    "new",
    "gone",
    "outside the follow-up",
    "outside the baseline",
    "merged",
    "split",
    "regrouped",
    "persistent",
)


class LinkConfig(Config):
    """When two objects are one.

    Attributes
    ----------
    min_share : float
        Part of the smaller object's voxels that must be shared.
    grow : float
        Voxels count as shared up to this far from the other object, in the unit of the grid (mm or micron).
    max_distance : float
        Of centroids, for objects that share with none, in the unit of the grid; 0: none is linked so.
    """

    min_share: float = Field(0.3, gt=0, le=1)
    grow: float = Field(1.0, ge=0)
    max_distance: float = Field(10.0, ge=0)


@dataclass(frozen=True, eq=False)
class Links:
    """Pairs of objects, ascending.

    Attributes
    ----------
    pairs : (m, 2) int64
        Label in the first image, label in the second.
    share : (m,) float64
        Part of the smaller object that is shared; 0 for pairs by distance alone.
    distance : (m,) float64
        Of centroids, in the frame of the first image.
    """

    pairs: IntArray
    share: FloatArray
    distance: FloatArray


@dataclass(frozen=True)
class Event:
    """What became of objects between two images.

    Attributes
    ----------
    kind : one of :data:`KINDS`
        ``regrouped`` is several objects that became several others with shared parts. Which are outside,
        :func:`medseg.instances.field_of_view.mark_outside` tells.
    first, second : tuple of int
        Labels in the first and in the second image.
    """

    kind: Kind
    first: tuple[int, ...]
    second: tuple[int, ...]


def link_objects(
    first: Instances,
    second: Instances,
    transform: FloatArray | None = None,
    config: LinkConfig | None = None,
) -> Links:
    """Find which objects are the same.

    Parameters
    ----------
    first, second : Instances
        On any two grids of one unit.
    transform : (4, 4) float64, optional
        From world positions of the first image to those of the second; None: the same frame.
    config : LinkConfig, optional

    Raises
    ------
    GeometryError
        The units of the grids differ.
    """
    config = config or LinkConfig()
    shares = shared_voxels(first, second, transform, config.grow)
    kept = shares.share >= config.min_share
    pairs, share, distance = shares.pairs[kept], shares.share[kept], shares.distance[kept]
    free = [np.setdiff1d(np.arange(1, len(each) + 1), pairs[:, n]) for n, each in enumerate((first, second))]
    near, far = _by_distance(first, second, transform, free, config.max_distance)
    order = np.lexsort(np.concatenate((pairs, near))[:, ::-1].T)
    return Links(
        np.concatenate((pairs, near))[order],
        np.concatenate((share, np.zeros(len(near))))[order],
        np.concatenate((distance, far))[order],
    )


def shared_voxels(
    first: Instances, second: Instances, transform: FloatArray | None = None, grow: float = 0.0
) -> Links:
    """Return every pair of objects that share a voxel, with their share; see :func:`link_objects`."""
    if first.unit != second.unit:
        raise GeometryError(
            f"the first image is in {first.unit}, the second in {second.unit}. Give one unit."
        )
    there = np.eye(4) if transform is None else transform
    back = np.linalg.inv(there)
    # Who holds the voxels of the second image, and who those of the first.
    counts = _hits(second, first, back, grow)
    reverse = _hits(first, second, there, grow)
    pairs = np.array(sorted(counts.keys() | {(a, b) for b, a in reverse}), np.int64).reshape(-1, 2)
    share = np.array(
        [
            max(counts.get((a, b), 0) / second.voxels[b - 1], reverse.get((b, a), 0) / first.voxels[a - 1])
            for a, b in pairs.tolist()
        ]
    )
    here, moved = centroids(first), _moved(centroids(second), back)
    distance = np.linalg.norm(here[pairs[:, 0] - 1] - moved[pairs[:, 1] - 1], axis=1)
    return Links(pairs, share.reshape(-1), distance)


def group_events(links: Links, first: int, second: int) -> list[Event]:
    """Return what became of objects 1..`first` and where 1..`second` come from; each is in one event.

    >>> links = Links(np.array([[1, 1], [2, 2], [2, 3]]), np.ones(3), np.zeros(3))
    >>> [(event.kind, event.first, event.second) for event in group_events(links, 3, 4)]
    [('persistent', (1,), (1,)), ('split', (2,), (2, 3)), ('gone', (3,), ()), ('new', (), (4,))]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = first + second
    rows, columns = links.pairs[:, 0] - 1, links.pairs[:, 1] - 1 + first
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    group = connected_components(graph, directed=False)[1] if size else np.zeros(0, np.int64)
    members: dict[int, tuple[list[int], list[int]]] = {}
    for node, number in enumerate(group.tolist()):
        sides = members.setdefault(number, ([], []))
        sides[node >= first].append(node + 1 if node < first else node + 1 - first)
    return [Event(_kind(len(a), len(b)), tuple(a), tuple(b)) for a, b in members.values()]


def assign(pairs: IntArray, gain: FloatArray) -> IntArray:
    """Return the places of the pairs that a one-to-one assignment of largest total gain takes, ascending.

    Parameters
    ----------
    pairs : (m, 2) int64
    gain : (m,) float64
        Positive; a pair that is not listed gains nothing.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return np.zeros(0, np.int64)
    rows, row = np.unique(pairs[:, 0], return_inverse=True)
    columns, column = np.unique(pairs[:, 1], return_inverse=True)
    size = len(rows) + len(columns)
    graph = coo_array((np.ones(len(pairs)), (row, column + len(rows))), shape=(size, size))
    group = connected_components(graph, directed=False)[1][row]
    order = np.argsort(group, kind="stable")
    taken: list[int] = []
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        a, at_a = np.unique(row[part], return_inverse=True)
        b, at_b = np.unique(column[part], return_inverse=True)
        matrix = np.zeros((len(a), len(b)))
        matrix[at_a, at_b] = gain[part]
        place = np.full(matrix.shape, -1)
        place[at_a, at_b] = part
        chosen = place[linear_sum_assignment(matrix, maximize=True)]
        taken += chosen[chosen >= 0].tolist()
    return np.array(sorted(taken), np.int64)


def centroids(instances: Instances) -> FloatArray:
    """Return (K, 3) world positions of the objects' centroids."""
    from medseg.instances.sums import sum_objects

    found = sum_objects(np.asarray(instances.volume.array[0]), len(instances)).centroid
    return _moved(found, instances.geometry.affine)


def _kind(first: int, second: int) -> Kind:
    if first == 0 or second == 0:
        return "new" if first == 0 else "gone"
    if first == 1:
        return "persistent" if second == 1 else "split"
    return "merged" if second == 1 else "regrouped"


def _moved(points: FloatArray, matrix: FloatArray) -> FloatArray:
    return np.asarray(points @ matrix[:3, :3].T + matrix[:3, 3])


def _hits(
    source: Instances, target: Instances, matrix: FloatArray, grow: float
) -> dict[tuple[int, int], int]:
    """Count voxels of `source` by the object of `target` that holds them; keys (target, source).

    `matrix` takes world positions of the source to those of the target.
    """
    counts: Counter[tuple[int, int]] = Counter()
    if not len(source) or not len(target):
        return counts
    labels, base = source.volume.array[0], len(source) + 1
    edge = _edge_of(target) if grow > 0 else None
    thick = max(1, _SLAB_VOXELS // labels[0].size)
    for start in range(0, len(labels), thick):
        slab = labels[start : start + thick]
        where = np.argwhere(slab)
        own = slab[tuple(where.T)]
        world = _moved(where + np.array([start, 0.0, 0.0]), matrix @ source.geometry.affine)
        key = _holders(target, world, edge, grow) * base + own
        found, times = np.unique(key[key >= base], return_counts=True)
        rows = zip((found // base).tolist(), (found % base).tolist(), strict=True)
        counts.update(dict(zip(rows, times.tolist(), strict=True)))
    return counts


def _holders(target: Instances, world: FloatArray, edge: Edge | None, grow: float) -> IntArray:
    """Return the object that holds each position, or whose edge is within `grow` of it; 0 for none."""
    grid = target.volume.array[0]
    index = np.round(_moved(world, np.linalg.inv(target.geometry.affine))).astype(np.int64)
    inside = ((index >= 0) & (index < grid.shape)).all(axis=1)
    held = np.zeros(len(world), np.int64)
    held[inside] = grid[tuple(index[inside].T)]
    if edge is not None:
        missed = np.flatnonzero(held == 0)
        tree, labels = edge
        held[missed] = labels[tree.query(world[missed], distance_upper_bound=grow)[1]]
    return held


def _edge_of(target: Instances) -> Edge:
    """Return a tree of the voxels with a neighbour outside of their object, and the object of each.

    The last label is 0: the tree answers the number of its points where none is near enough.
    """
    from scipy.spatial import cKDTree

    grid = np.pad(target.volume.array[0], 1)
    inner = grid[1:-1, 1:-1, 1:-1]
    edge = np.zeros(inner.shape, bool)
    for axis in range(3):
        for shift in (-1, 1):
            edge |= np.roll(grid, shift, axis)[1:-1, 1:-1, 1:-1] != inner
    where = np.argwhere(edge & (inner > 0))
    tree = cKDTree(_moved(where.astype(np.float64), target.geometry.affine))
    return tree, np.concatenate((inner[tuple(where.T)], [0])).astype(np.int64)


def _by_distance(
    first: Instances, second: Instances, transform: FloatArray | None, free: list[IntArray], limit: float
) -> tuple[IntArray, FloatArray]:
    from scipy.spatial import cKDTree

    back = np.eye(4) if transform is None else np.linalg.inv(transform)
    here, there = centroids(first)[free[0] - 1], _moved(centroids(second), back)[free[1] - 1]
    if limit <= 0 or not len(here) or not len(there):
        return np.zeros((0, 2), np.int64), np.zeros(0)
    near = cKDTree(here).query_ball_point(there, limit)
    pairs = np.array([(a, b) for b, some in enumerate(near) for a in sorted(some)], np.int64).reshape(-1, 2)
    distance = np.linalg.norm(here[pairs[:, 0]] - there[pairs[:, 1]], axis=1)
    taken = assign(pairs, limit - distance + 1e-9)
    chosen = pairs[taken]
    return np.column_stack([free[0][chosen[:, 0]], free[1][chosen[:, 1]]]), distance[taken]
