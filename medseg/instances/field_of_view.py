"""Objects that another image does not show, because they lie outside of its grid.

An object is outside if more than half of its voxels have their centre outside of the other grid. What is not
seen has neither gone nor is it new, and its size is not known.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medseg.errors import GeometryError
from medseg.instances.link import Event
from medseg.instances.schema import Instances
from medseg.types import FloatArray, IntArray
from medseg.volume import Geometry

# Part of the voxels of an object.
MOST = 0.5
# Grids that only touch share no voxel. In voxels.
_TOUCH = 1e-6
# Voxels looked up at a time.
_SLAB_VOXELS = 1 << 22


def require_overlap(first: Geometry, second: Geometry, transform: FloatArray) -> None:
    """Refuse two grids that share no place of the world.

    Parameters
    ----------
    first, second : Geometry
    transform : (4, 4) float64
        From world positions of the first to those of the second.

    Raises
    ------
    GeometryError
        They share none.
    """
    from scipy.optimize import linprog

    matrix = np.linalg.inv(second.affine) @ transform @ first.affine
    low, high = np.full(3, -0.5 + _TOUCH), np.array(second.shape) - 0.5 - _TOUCH
    found = linprog(
        np.zeros(3),
        A_ub=np.concatenate((matrix[:3, :3], -matrix[:3, :3])),
        b_ub=np.concatenate((high - matrix[:3, 3], matrix[:3, 3] - low)),
        bounds=[(-0.5 + _TOUCH, size - 0.5 - _TOUCH) for size in first.shape],
    )
    if found.status == 2:
        raise GeometryError(
            "the grids of the baseline and of the follow-up do not overlap, so that no object can be found "
            "again. Register the images (--images BASELINE FOLLOW_UP), or check the positions in the headers."
        )


def outside_voxels(instances: Instances, other: Geometry, matrix: FloatArray) -> IntArray:
    """Return (K,) int64, how many voxels of each object have their centre outside of another grid.

    `matrix` takes world positions of the objects to those of the grid.
    """
    there = np.linalg.inv(other.affine) @ matrix @ instances.geometry.affine
    labels, count = instances.volume.array[0], np.zeros(len(instances) + 1, np.int64)
    thick = max(1, _SLAB_VOXELS // max(1, labels[0].size))
    for start in range(0, len(labels), thick):
        slab = labels[start : start + thick]
        where = np.argwhere(slab)
        index = np.round((where + np.array([start, 0, 0])) @ there[:3, :3].T + there[:3, 3])
        beyond = ((index < 0) | (index >= other.shape)).any(axis=1)
        count += np.bincount(slab[tuple(where[beyond].T)], minlength=len(count))
    return count[1:]


def mark_outside(
    events: Sequence[Event], baseline: Instances, later: Instances, transform: FloatArray
) -> list[Event]:
    """Return the events, with a kind of their own for those that one image does not show.

    ``outside the follow-up``: most voxels of the baseline objects lie outside of the follow-up's grid, also
    where it shows the rest of them. ``outside the baseline``: an object without any at baseline that lies
    mostly outside of the baseline's grid.

    Parameters
    ----------
    events : of :func:`medseg.instances.link.group_events`
    baseline, later : Instances
    transform : (4, 4) float64
        From world positions at baseline to those at follow-up.
    """
    unseen = outside_voxels(baseline, later.geometry, transform)
    unknown = outside_voxels(later, baseline.geometry, np.linalg.inv(transform))
    marked = []
    for event in events:
        if event.first and _mostly(event.first, unseen, baseline.voxels):
            event = replace(event, kind="outside the follow-up")
        elif not event.first and _mostly(event.second, unknown, later.voxels):
            event = replace(event, kind="outside the baseline")
        marked.append(event)
    return marked


def _mostly(labels: tuple[int, ...], outside: IntArray, voxels: IntArray) -> bool:
    places = np.array(labels) - 1
    return bool(outside[places].sum() > MOST * voxels[places].sum())
