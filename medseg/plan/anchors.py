"""Anchors that fit the objects of a data set.

A cell's anchors are the product of a few sides an axis, multiplied from level to level by its stride; the
sides are chosen so that the objects' boxes overlap the best anchor of their centre as much as can be
(Baumgartner et al., nnDetection, MICCAI 2021, section 2; its optimiser is another).
"""

import logging
from collections.abc import Sequence
from itertools import product

import numpy as np

from medseg.plan.detection import AnchorFit
from medseg.types import FloatArray

logger = logging.getLogger("medseg")

# Sides that the search begins with, and that are used where objects are too few to fit (nnDetection's).
START = (4, 8, 16)
FEWEST_BOXES = 20
# Objects outside these percentiles of any side do not count.
PERCENTILES = (0.5, 99.5)
POOR_IOU = 0.5
SEED = 1234
# The search: objects that it looks at, members of its population a number, generations.
SEARCHED_BOXES, POPULATION, GENERATIONS = 500, 8, 50

Sizes = tuple[tuple[float, ...], ...]


def plan_anchors(
    sizes: FloatArray, strides: Sequence[Sequence[int]], count: int = len(START)
) -> tuple[tuple[Sizes, ...], AnchorFit]:
    """Choose the anchors of every level.

    Parameters
    ----------
    sizes : (k, d) sides of the training objects' boxes in voxels of the network
    strides : of every level, finest first, a number an axis
    count : sides an axis, at most three; a cell has as many anchors as combinations

    Returns
    -------
    anchors : sizes of the anchors of each level
    fit : how well they cover the objects

    Notes
    -----
    Differential evolution (Storn and Price, 1997) over whole numbers with a fixed seed: the same objects
    give the same anchors.
    """
    dims = len(strides[0])
    factors = np.array(strides, float) / np.array(strides[0], float)
    if len(sizes) < FEWEST_BOXES:
        note = f"only {len(sizes)} objects to fit anchors to: sides of {START[:count]} are used as they come"
        logger.warning("Anchors: %s.", note)
        return expand([START[:count]] * dims, factors), AnchorFit(boxes=len(sizes), note=note)
    kept = _usual(sizes)
    sides = _search(kept, factors, count)
    anchors = expand(sides, factors)
    best = best_overlap(kept, np.array([size for level in anchors for size in level]))
    fit = AnchorFit(
        boxes=len(kept),
        mean_iou=round(float(best.mean()), 4),
        iou_percentile_5=round(float(np.percentile(best, 5)), 4),
    )
    if best.mean() < POOR_IOU:
        note = f"anchors overlap the objects by {best.mean():.2f} on average: sizes differ too much"
        logger.warning("%s. Leave out the smallest or largest objects, or plan more levels.", note)
        fit = fit.replace(note=note)
    return anchors, fit


def expand(sides: Sequence[Sequence[float]], factors: FloatArray) -> tuple[Sizes, ...]:
    """Return the anchors of every level: all combinations of sides, times the factor of the level and axis.

    >>> expand([(2, 4), (3,)], np.array([[1.0, 1.0], [1.0, 2.0]]))
    (((2.0, 3.0), (4.0, 3.0)), ((2.0, 6.0), (4.0, 6.0)))
    """
    shapes = np.array(list(product(*sides)), float)
    return tuple(tuple(tuple(row) for row in (shapes * factor).tolist()) for factor in factors)


def best_overlap(sizes: FloatArray, anchors: FloatArray) -> FloatArray:
    """Return for each box (k, d) the IoU with the best of the anchors (m, d), all of one centre."""
    both = np.ones((len(sizes), len(anchors)))
    for axis in range(sizes.shape[1]):
        both *= np.minimum(sizes[:, axis, None], anchors[None, :, axis])
    union = sizes.prod(1)[:, None] + anchors.prod(1)[None] - both
    best: FloatArray = (both / union).max(1)
    return best


def _usual(sizes: FloatArray) -> FloatArray:
    low, high = np.percentile(sizes, PERCENTILES, axis=0)
    usual: FloatArray = sizes[((sizes >= low) & (sizes <= high)).all(1)]
    return usual if len(usual) else sizes


def _search(sizes: FloatArray, factors: FloatArray, count: int) -> list[tuple[float, ...]]:
    from scipy.optimize import differential_evolution

    dims = sizes.shape[1]
    generator = np.random.default_rng(SEED)
    if len(sizes) > SEARCHED_BOXES:
        sizes = sizes[generator.choice(len(sizes), SEARCHED_BOXES, replace=False)]
    highest = np.maximum(np.ceil(sizes.max(0)), 2)
    bounds = [(1, high) for high in highest for _ in range(count)]
    start = [min(side, high) for high in highest for side in START[:count]]

    def cost(numbers: FloatArray) -> float:
        shapes = np.array(list(product(*np.rint(numbers).reshape(dims, count))))
        anchors = np.concatenate([shapes * factor for factor in factors])
        return -float(best_overlap(sizes, anchors).mean())

    found = differential_evolution(
        cost,
        bounds,
        popsize=POPULATION,
        maxiter=GENERATIONS,
        seed=SEED,
        x0=start,
        integrality=[True] * len(bounds),
        polish=False,
    )
    return [tuple(sorted(axis)) for axis in np.rint(found.x).reshape(dims, count).tolist()]
