"""Masks of several objects against each other, inside their boxes only."""

import numpy as np

from medseg.prompt.regions import Region


def union(first: Region, *others: Region) -> Region:
    """Return the voxels of any of several regions of one grid."""
    filled = [region for region in (first, *others) if region.voxels]
    if len(filled) < 2:
        return filled[0] if filled else Region.empty(first.shape)
    i, j, k = (min(region.start[axis] for region in filled) for axis in range(3))
    stop = tuple(max(region.stop[axis] for region in filled) for axis in range(3))
    mask = np.zeros((stop[0] - i, stop[1] - j, stop[2] - k), dtype=bool)
    for region in filled:
        at = tuple(slice(a - s, b - s) for a, b, s in zip(region.start, region.stop, (i, j, k), strict=True))
        mask[at] |= region.array
    return Region.at(mask, (i, j, k), first.shape)


def subtract(region: Region, other: Region) -> Region:
    """Return the voxels of `region` that are not of `other`."""
    if not count_shared(region, other):
        return region
    left = region.array & ~other.window(region.start, region.stop)
    return Region.at(left, region.start, region.shape)


def count_shared(region: Region, other: Region) -> int:
    """Return the number of voxels that both have."""
    low = [max(a, b) for a, b in zip(region.start, other.start, strict=True)]
    high = [min(a, b) for a, b in zip(region.stop, other.stop, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return 0
    start, stop = (low[0], low[1], low[2]), (high[0], high[1], high[2])
    return int(np.count_nonzero(region.window(start, stop) & other.window(start, stop)))
