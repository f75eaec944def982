"""Seeded watershed: markers grow over a height map, the highest voxel first."""

import heapq

import numpy as np

from medseg.errors import GeometryError
from medseg.instances.basins import to_levels
from medseg.instances.compiled import jit
from medseg.instances.neighbours import as_volume, neighbourhood, steps_of
from medseg.types import Array, FloatArray, IntArray


def flood(height: Array, markers: IntArray, floor: float | None = 0.0, connectivity: int = 26) -> IntArray:
    """Give every voxel above `floor` to the marker that reaches it over the highest way.

    Of equally high voxels, the one that was reached first comes first (Meyer 1991); markers start in the
    order of their linear index. Voxels that no marker reaches stay 0.

    Parameters
    ----------
    height : (z, y, x) or (y, x)
        High is inside, taken as float32.
    markers : int, as `height`
        Any numbers, with gaps or not; 0 is no marker. Those in the background are ignored.
    floor : float or None
        Voxels that are not above it are background; None: there is none.
    connectivity : 26 or 6; 8 or 4 in two dimensions

    Returns
    -------
    int32, as `height`
        The numbers of the markers.

    Raises
    ------
    GeometryError
        The two arrays differ in shape.

    Examples
    --------
    >>> flood(np.array([[3, 2, 1, 2, 3, 0]]), np.array([[5, 0, 0, 0, 9, 0]]))
    array([[5, 5, 5, 9, 9, 0]], dtype=int32)
    """
    if markers.shape != height.shape:
        raise GeometryError(
            f"markers {markers.shape} on a height map {height.shape}: bring both on one grid."
        )
    kind = neighbourhood(connectivity, height.ndim)
    levels, lowest = to_levels(as_volume(height), floor)
    inside = np.pad(levels > lowest, 1)
    steps = np.array([step for step in steps_of(kind) if any(step)])
    strides = np.array([inside.shape[1] * inside.shape[2], inside.shape[2], 1])
    heights = np.pad(as_volume(height).astype(np.float32), 1)
    labels = np.pad(as_volume(markers).astype(np.int32), 1)
    labels[~inside] = 0
    _grow(heights.reshape(-1), inside.reshape(-1), labels.reshape(-1), steps @ strides)
    return np.ascontiguousarray(labels[1:-1, 1:-1, 1:-1]).reshape(height.shape)


@jit
def _grow(heights: FloatArray, inside: Array, labels: IntArray, steps: IntArray) -> None:
    queue = [(np.float32(0), np.int64(0), np.int64(0)) for _ in range(0)]
    age = np.int64(0)
    for start in np.flatnonzero(labels):
        queue.append((-heights[start], age, start))
        age += 1
    heapq.heapify(queue)
    while len(queue) > 0:
        voxel = heapq.heappop(queue)[2]
        for step in steps:
            other = voxel + step
            if inside[other] and labels[other] == 0:
                labels[other] = labels[voxel]
                heapq.heappush(queue, (-heights[other], age, other))
                age += 1
