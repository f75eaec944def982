"""Where to look next: the slice of an object that is most likely wrong."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from medseg.prompt.regions import Region

Reason = Literal["low confidence", "neighbouring slices disagree"]


@dataclass(frozen=True)
class Suggestion:
    """A slice worth a look.

    Attributes
    ----------
    axis, index : int
        The slice, on the turned grid of the scene.
    reason : str
    doubt : float
        0 (nothing to see) to 1.
    position_mm : (float, float, float)
        Middle of what is to be looked at, in the world.
    """

    axis: int
    index: int
    reason: Reason
    doubt: float
    position_mm: tuple[float, float, float]


def find_doubt(
    region: Region, confidence: Mapping[int, float], axis: int, known: Collection[int] = ()
) -> tuple[int, Reason, float] | None:
    """Return the slice with the largest doubt, why, and how large it is; None without a mask.

    Doubt is one minus the confidence of a slice, or how much of the object changes from it to a neighbour,
    whichever is larger. The change is counted in voxels over the largest slice (not as an IoU, by which the
    thin ends of every object would be the worst), and not towards the outside of the object.

    Parameters
    ----------
    known : slices that the user has prompted; they are suggested only where there is no other
    """
    if not region.array.size:
        return None
    low, stop = region.start[axis], region.stop[axis]
    doubts: dict[int, tuple[float, Reason]] = {
        index: (1.0 - confidence[index] if index in confidence else 0.0, "low confidence")
        for index in range(low, stop)
    }
    for index, change in zip(range(low, stop), _changes(region, axis), strict=True):
        if change > doubts[index][0]:
            doubts[index] = (change, "neighbouring slices disagree")
    asked = [index for index in doubts if index not in known] or list(doubts)
    worst = max(asked, key=lambda index: doubts[index][0])
    doubt, reason = doubts[worst]
    return worst, reason, doubt


def middle_of(region: Region, axis: int, index: int) -> tuple[float, float, float]:
    """Return the middle of the mask on a slice (of its whole box where the slice is empty), in voxels."""
    where = np.argwhere(region.plane(axis, index))
    if where.size:
        centre = list(where[len(where) // 2].astype(float))  # a voxel of the mask, also of a ring
        centre.insert(axis, float(index))
    else:
        centre = [(a + b - 1) / 2 for a, b in zip(region.start, region.stop, strict=True)]
        centre[axis] = float(index)
    return (float(centre[0]), float(centre[1]), float(centre[2]))


def _changes(region: Region, axis: int) -> list[float]:
    """Return for each slice of the box the larger change to its two neighbours, over the largest area."""
    planes = np.moveaxis(region.array, axis, 0)
    largest = max(int(np.count_nonzero(plane)) for plane in planes)
    steps = [np.count_nonzero(a ^ b) / largest for a, b in pairwise(planes)]
    before, after = [0.0, *steps], [*steps, 0.0]
    return [float(min(1.0, max(pair))) for pair in zip(before, after, strict=True)]
