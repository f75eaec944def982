"""How deep a valley must be: tried on an image whose objects are known, in milliseconds a depth.

Basins, their saddles and their overlap with the reference are found once. Another depth only joins rows of
the table of overlaps, so that no voxel is looked at again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import ConfigError, GeometryError
from medseg.instances.basins import Basins, find_basins
from medseg.instances.distance import check_spacing, distance_map
from medseg.instances.split import DEFAULT_DEPTH, BasinsConfig
from medseg.metrics.matching import match_objects
from medseg.metrics.overlap_table import OverlapTable, overlap_table
from medseg.types import Array

# Of the finest voxel size for distances, of the range of the heights otherwise.
DEPTHS = {
    "distances": (0.0, 0.25, 0.5, DEFAULT_DEPTH, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "heights": (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
}
RELATIVE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
IOU = 0.5


@dataclass(frozen=True)
class Trial:
    """One setting and how good its objects are.

    Attributes
    ----------
    h, rel : as in :class:`~medseg.instances.split.BasinsConfig`
    objects : int
        That it finds.
    f1 : float
        2 TP / (2 TP + FP + FN) at an IoU of one half.
    pq : float
        Sum of the IoU of what is found / (TP + FP/2 + FN/2).
    """

    h: float
    rel: float
    objects: int
    f1: float
    pq: float


@dataclass(frozen=True)
class Tuned:
    """What was tried.

    Attributes
    ----------
    config : BasinsConfig
        With the best depth: the highest F1, of those the highest PQ, then the smallest `rel` and the middle
        one of the `h`, which is farthest from where another image may want something else.
    best : Trial
    trials : tuple of Trial
        All, the best first.
    """

    config: BasinsConfig
    best: Trial
    trials: tuple[Trial, ...]


def tune(
    image: Array,
    reference: Array,
    spacing: Sequence[float],
    config: BasinsConfig | None = None,
    depths: Sequence[float] | None = None,
    relative: Sequence[float] = RELATIVE,
    threads: int = 1,
) -> Tuned:
    """Find the depth with which a mask or a height map is split most like a reference.

    Parameters
    ----------
    image : (z, y, x) or (y, x)
        Integers or booleans are a mask (what is not 0), floats a height map.
    reference : label map of the same shape
    spacing : floats
        Size of a voxel along each axis, all in one unit.
    config : BasinsConfig, optional
        For its floor and connectivity.
    depths : floats, optional
        Tried as `h`. By default ten: multiples of the finest voxel size, or parts of the range of heights.
    relative : floats
        Tried as `rel` with each of them; only 0 for heights below 0, which have no parts.
    threads : int

    Raises
    ------
    ConfigError
        The reference has no object, or nothing is to be tried.
    GeometryError
        The shapes differ.

    Examples
    --------
    >>> height = np.array([[1.0, 5.0, 4.0, 5.0, 1.0, 6.0]])
    >>> found = tune(height, np.array([[1, 1, 1, 1, 2, 2]]), (1.0, 1.0), depths=(0.0, 2.0, 5.0))
    >>> found.config.h, found.best.f1
    (2.0, 1.0)
    """
    if image.shape != reference.shape:
        raise GeometryError(f"reference {reference.shape}: expected {image.shape}, the shape of the image.")
    check_spacing(spacing, image.ndim)
    config = config or BasinsConfig()
    masked = image.dtype.kind != "f"
    heights = distance_map(image, spacing, threads=threads) if masked else image
    basins = find_basins(heights, 0.0 if masked else config.floor, config.connectivity, threads)
    table = overlap_table(reference, basins.numbers)
    if not table.n_ref:
        raise ConfigError("the reference has no object. Give a label map with a number for each.")
    unit = min(spacing) if masked else float(np.ptp(basins.hierarchy.peaks)) if table.n_pred else 0.0
    if depths is None:
        parts = DEPTHS["distances" if masked else "heights"]
        depths = [part * (unit or 1.0) for part in parts]
    if basins.hierarchy.peaks.min(initial=0.0) < 0:
        relative = (0.0,)
    trials = [_try(basins, table, float(h), float(rel)) for h in depths for rel in relative]
    if not trials:
        raise ConfigError("nothing is to be tried. Give at least one of depths and relative.")
    trials.sort(key=lambda trial: (-trial.f1, -trial.pq, trial.rel, trial.h))
    best = _middle([t for t in trials if (t.f1, t.pq, t.rel) == (trials[0].f1, trials[0].pq, trials[0].rel)])
    trials.remove(best)
    return Tuned(config.replace(h=best.h, rel=best.rel), best, (best, *trials))


def _middle(trials: list[Trial]) -> Trial:
    return trials[(len(trials) - 1) // 2]


def _try(basins: Basins, table: OverlapTable, h: float, rel: float) -> Trial:
    joined = table.joined(basins.hierarchy.merge(h, rel)[table.predictions])
    match = match_objects(joined, IOU)
    half = (match.n_ref + match.n_pred) / 2
    f1 = 0.0 if math.isnan(match.f1) else match.f1
    return Trial(h, rel, joined.n_pred, f1, float(match.iou.sum()) / half)
