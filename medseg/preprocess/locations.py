"""Where the labels of a case are: the voxels that training patches may be forced onto."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from medseg.labels import LabelSet
from medseg.types import IntArray

# nnU-Net's `_sample_foreground_locations`: at least 1 % of a class, and 10000 voxels where it has so many.
MIN_SHARE = 0.01
MAX_VOXELS = 10_000
ANNOTATED = "annotated"


def class_locations(
    seg: IntArray, labels: LabelSet, seed: int = 1234, limit: int = MAX_VOXELS
) -> dict[str, IntArray]:
    """Draw voxels of every foreground entry, without replacement.

    Equal, voxel by voxel and in order, to nnU-Net's ``class_locations`` (there with a leading channel 0).

    Parameters
    ----------
    seg : (1, a0, a1, a2) integer, -1 outside the image
    labels : the label set; classes are drawn by ascending label, regions in file order
    seed : of one ``RandomState`` for the case
    limit : voxels an entry, unless 1 % of it is more

    Returns
    -------
    dict of entry name to (n, 3) int32
        Network order; empty for an entry that does not occur. With an ignore label there is one more,
        ``annotated``: all voxels that have a label or lie outside the image's nonzero region.
    """
    wanted = _wanted(labels)
    rng = np.random.RandomState(seed)
    flat = seg[0].reshape(-1)
    requested = sorted({value for values in wanted.values() for value in values})
    voxels = np.flatnonzero(np.isin(flat, requested))
    order = np.argsort(flat[voxels], kind="stable")
    found, voxels = flat[voxels][order], voxels[order]  # grouped by label, each in raster order
    result = {}
    for name, values in wanted.items():
        bounds = [np.searchsorted(found, value, side=s) for value in values for s in ("left", "right")]
        groups = [voxels[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
        result[name] = _coordinates(_draw(groups, rng, limit), seg.shape[1:])
    return result


def object_locations(seg: IntArray, classes: Sequence[str]) -> dict[str, IntArray]:
    """Return one voxel of every object: the middle one of its voxels in raster order.

    Parameters
    ----------
    seg : (1, a0, a1, a2) integer, objects numbered as in `medseg.plan.objects`, -1 outside the image
    classes : names of all classes

    Returns
    -------
    dict of class name to (n, 3) int32
        Network order; empty for a class that does not occur.
    """
    flat = seg[0].reshape(-1)
    voxels = np.flatnonzero(flat > 0)
    order = np.argsort(flat[voxels], kind="stable")
    values, first, count = np.unique(flat[voxels][order], return_index=True, return_counts=True)
    middle = voxels[order][first + count // 2]
    kinds = (values.astype(np.int64) - 1) % len(classes)
    return {name: _coordinates(middle[kinds == k], seg.shape[1:]) for k, name in enumerate(classes)}


def _wanted(labels: LabelSet) -> dict[str, tuple[int, ...]]:
    entries = {n: v if isinstance(v, tuple) else (v,) for n, v in labels.foreground.items()}
    if not labels.has_regions:
        entries = dict(sorted(entries.items(), key=lambda item: item[1]))
    if labels.ignore is not None:
        entries[ANNOTATED] = (-1, *(value for value in labels.values if value != labels.ignore))
    return entries


def _draw(groups: Sequence[IntArray], rng: np.random.RandomState, limit: int) -> IntArray:
    voxels = np.concatenate(groups)
    if voxels.size == 0:
        return voxels
    count = max(min(limit, voxels.size), ceil(voxels.size * MIN_SHARE))
    chosen: IntArray = voxels[rng.choice(voxels.size, count, replace=False)]
    return chosen


def _coordinates(flat: IntArray, shape: tuple[int, ...]) -> IntArray:
    return np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int32)
