"""Size of objects, and removal of those that are too small to be any."""

import numpy as np

from medseg.instances.basins import relabel
from medseg.instances.dropped import Dropped
from medseg.instances.sums import count_voxels
from medseg.types import IntArray


def remove_small(
    labels: IntArray, min_volume: float, voxel_volume: float, threads: int = 1
) -> tuple[IntArray, IntArray, tuple[Dropped, ...]]:
    """Remove objects below a physical size, and number the others 1, 2, ... in the same order.

    Parameters
    ----------
    labels : (z, y, x) or (y, x) int
        0 is background; gaps are allowed and close.
    min_volume, voxel_volume : float
        Smallest volume (area, in two dimensions) that stays, and that of a voxel, in the same unit.
    threads : int

    Returns
    -------
    labels : int32, as `labels`
    kept : (k,) int64
        The former number of objects 1 to k.
    dropped : tuple of Dropped
        What was removed; empty if nothing was.

    Examples
    --------
    >>> remove_small(np.array([[1, 1, 0, 4]]), min_volume=1.0, voxel_volume=0.5)[2]
    (Dropped(rule='smaller than 1', count=1, voxels=1),)
    """
    counts = count_voxels(labels, int(labels.max(initial=0)))
    table, dropped = choose_large(counts, min_volume, voxel_volume)
    kept = np.flatnonzero(table)
    changed = dropped or len(kept) != len(table) - 1
    result = relabel(labels, table, threads) if changed else labels.astype(np.int32, copy=False)
    return result, kept, dropped


def choose_large(
    counts: IntArray, min_volume: float, voxel_volume: float
) -> tuple[IntArray, tuple[Dropped, ...]]:
    """Return the new number of each label, 0 for one below `min_volume` or without voxels, and what goes.

    `counts` are the voxels of labels 0, 1, ...; label 0 is background.
    """
    present = counts > 0
    present[0] = False
    small = present & (counts * voxel_volume < min_volume)
    kept = np.flatnonzero(present & ~small)
    table = np.zeros(len(counts), dtype=np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    if not small.any():
        return table, ()
    return table, (Dropped(f"smaller than {min_volume:g}", int(small.sum()), int(counts[small].sum())),)
