"""From offsets to objects: every voxel votes for a centre, and the votes near one are an object.

Source: Cheng et al., Panoptic-DeepLab, CVPR 2020 (arXiv 1911.10194), section 3.3, which compares every voxel
with every centre. Here votes are rounded to half a voxel, and a tree is asked once for each place that was
voted for, so that the time is that of a sort of the voxels, however many objects there are.
Positions are physical: voxel i of an axis lies at (i + 0.5) * spacing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from medseg.errors import ConfigError
from medseg.instances.dropped import Dropped
from medseg.types import BoolArray, FloatArray, IntArray

# Voxels that are grouped at a time: a few hundred megabytes of positions.
CHUNK = 1 << 22
# Rounded votes are kept within this many steps, which whole numbers hold.
FARTHEST = 2.0**50

FAR = "voxels whose vote is far from any centre"
"""Why voxels without an object are dropped."""

Unassigned = Literal["grow", "drop"]


@dataclass(frozen=True, eq=False)
class Grouped:
    """Objects by their votes.

    Attributes
    ----------
    labels : (*shape) int32
        The number of the centre that each voxel voted for, from 1; 0 = background. A centre that nothing
        voted for has no voxel.
    unassigned : int
        Voxels whose vote was too far from any centre, whatever became of them.
    dropped : tuple of Dropped
        What was left out.
    """

    labels: IntArray
    unassigned: int
    dropped: tuple[Dropped, ...] = ()


def group_votes(
    foreground: BoolArray,
    offset: FloatArray,
    centres: FloatArray,
    spacing: Sequence[float],
    reach: float | None = None,
    unassigned: Unassigned = "grow",
    resolution: float = 0.5,
    origin: Sequence[int] | None = None,
) -> Grouped:
    """Give every voxel to the centre nearest to its vote.

    Parameters
    ----------
    foreground : (*shape) bool
        Voxels of objects.
    offset : (n, *shape) float
        From voxel to centre, physical.
    centres : (K, n) float
        Positions, physical. Of equally near ones the first is taken.
    spacing : one number an axis
    reach : float, optional
        A vote that, rounded, is farther from every centre is unassigned, and so is one that is not finite.
    unassigned : "grow" or "drop"
        These voxels go to the object of the nearest voxel that has one (within this block), or to none.
    resolution : float
        Votes are rounded to this part of a voxel.
    origin : several int, optional
        First voxel of this block in the whole image, where centres are those of the whole.

    Raises
    ------
    ConfigError
        Shapes do not fit together.
    """
    _check_shapes(foreground, offset, spacing)
    centres = np.asarray(centres, float).reshape(-1, foreground.ndim)
    labels = np.zeros(foreground.shape, np.int32)
    far = np.zeros(foreground.shape, bool)
    tree = cKDTree(centres) if len(centres) else None
    size = np.asarray(spacing, float)
    for inside in _chunks(foreground):
        votes = _positions(inside, offset, size, origin)
        number, lost = _nearest_centres(tree, votes, size * resolution, reach)
        labels[inside] = number
        far[inside] = lost
    lost_voxels = int(np.count_nonzero(far))
    if not lost_voxels:
        return Grouped(labels, 0)
    if unassigned == "grow" and labels.any():
        where = ndimage.distance_transform_edt(
            labels == 0, sampling=size, return_distances=False, return_indices=True
        )
        labels[far] = labels[tuple(axis[far] for axis in where)]
        return Grouped(labels, lost_voxels)
    return Grouped(labels, lost_voxels, (Dropped(FAR, 0, lost_voxels),))


def count_votes(
    foreground: BoolArray, offset: FloatArray, spacing: Sequence[float], weights: FloatArray | None = None
) -> FloatArray:
    """Return how many votes each voxel gets, (*shape) float32; votes outside of the image are lost.

    Parameters
    ----------
    foreground, offset, spacing : as for :func:`group_votes`
    weights : (*shape) float, optional
        What a vote of each voxel counts.
    """
    _check_shapes(foreground, offset, spacing)
    density = np.zeros(foreground.size, np.float64)
    size = np.asarray(spacing, float)
    for inside in _chunks(foreground):
        votes = _positions(inside, offset, size, None) / size
        kept = np.isfinite(votes).all(axis=1)
        kept &= ((votes >= 0) & (votes < foreground.shape)).all(axis=1)
        places = np.ravel_multi_index(tuple(votes[kept].astype(np.int64).T), foreground.shape)
        counted = None if weights is None else weights[inside][kept]
        density += np.bincount(places, counted, minlength=foreground.size)
    return density.reshape(foreground.shape).astype(np.float32)


def find_peaks(
    height: FloatArray, spacing: Sequence[float], radius: float, threshold: float = 0.0
) -> IntArray:
    """Return the voxels, (K, n) by linear index, that are the highest within a box around them.

    Parameters
    ----------
    height : (*shape) float
        A map that has its maxima in centres, such as smoothed votes or a distance map.
    spacing : one number an axis
    radius : float
        Half the side of the box, physical; at least one voxel along each axis.
    threshold : float
        Only what is higher counts.

    Notes
    -----
    Equally high voxels in each other's boxes count as one plateau, and the first of its voxels is taken.
    """
    sides = [2 * max(1, round(radius / size)) + 1 for size in spacing]
    pooled = ndimage.maximum_filter(height, sides, mode="constant", cval=-np.inf)
    peaks = (height == pooled) & (height > threshold)
    places = np.flatnonzero(peaks)
    if len(places) < 2:
        return np.stack(np.unravel_index(places, height.shape), 1)
    first = np.full(height.size, -1, np.int32 if height.size < 2**31 else np.int64)
    first[places] = height.size - places
    ranks = first.reshape(height.shape)
    lowest = ndimage.maximum_filter(ranks, sides, mode="constant", cval=-1)
    return np.argwhere(peaks & (ranks == lowest))


def find_centres(
    foreground: BoolArray,
    offset: FloatArray,
    spacing: Sequence[float],
    sigma: float,
    weights: FloatArray | None = None,
    least_votes: float = 0.0,
) -> FloatArray:
    """Return the centres that votes agree on, (K, n) float64, physical, without a map of centres.

    Parameters
    ----------
    foreground, offset, spacing, weights : as for :func:`count_votes`
    sigma : float
        Votes are blurred by a Gaussian of this length; centres nearer than twice that are one.
    least_votes : float
        A centre needs more votes than that: the sum of a Gaussian window around it.
    """
    size = np.asarray(spacing, float)
    votes = count_votes(foreground, offset, spacing, weights)
    blurred = ndimage.gaussian_filter(votes, sigma / size, mode="constant", truncate=3.0)
    # what one vote adds to its own voxel
    alone = np.prod([_peak_of_gaussian(sigma / each) for each in size])
    peaks = find_peaks(blurred, spacing, 2 * sigma, max(least_votes, 1e-6) * float(alone))
    return np.asarray((peaks + 0.5) * size)


def _peak_of_gaussian(sigma: float) -> float:
    """Return the largest weight of a sampled Gaussian whose weights sum to 1."""
    reach = int(3.0 * sigma + 0.5)
    return float(1 / np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2).sum())


def _check_shapes(foreground: BoolArray, offset: FloatArray, spacing: Sequence[float]) -> None:
    n = foreground.ndim
    if offset.shape != (n, *foreground.shape) or len(spacing) != n:
        raise ConfigError(
            f"offsets {offset.shape} and spacing {tuple(spacing)} do not fit a foreground of "
            f"{foreground.shape}. Give one offset and one spacing an axis."
        )


def _chunks(foreground: BoolArray) -> Iterator[tuple[IntArray, ...]]:
    """Yield the indices of foreground voxels, in slabs of a bounded size."""
    rows = max(1, CHUNK // max(1, foreground[:1].size))
    for start in range(0, len(foreground), rows):
        inside = np.nonzero(foreground[start : start + rows])
        if len(inside[0]):
            yield (inside[0] + start, *inside[1:])


def _positions(
    inside: tuple[IntArray, ...], offset: FloatArray, size: FloatArray, origin: Sequence[int] | None
) -> FloatArray:
    """Return the votes of voxels, (m, n) float64, physical."""
    starts = (0,) * len(inside) if origin is None else tuple(origin)
    votes = np.empty((len(inside[0]), len(inside)))
    for axis, places in enumerate(inside):
        votes[:, axis] = (places + starts[axis] + 0.5) * size[axis] + offset[(axis, *inside)]
    return votes


def _nearest_centres(
    tree: cKDTree | None, votes: FloatArray, step: FloatArray, reach: float | None
) -> tuple[IntArray, BoolArray]:
    """Return the number of the nearest centre of each vote, 0 for none, and which have none."""
    number = np.zeros(len(votes), np.int32)
    if tree is None:
        return number, np.ones(len(votes), bool)
    known = np.isfinite(votes).all(axis=1)
    if reach is not None:
        known &= ((votes >= tree.mins - 2 * reach) & (votes <= tree.maxes + 2 * reach)).all(axis=1)
    if known.any():
        places = np.rint(np.clip(votes[known] / step, -FARTHEST, FARTHEST)).astype(np.int64)
        distinct, back = _distinct(places)
        number[known] = _ask(tree, distinct * step, reach)[back]
    return number, number == 0


def _distinct(places: IntArray) -> tuple[IntArray, IntArray]:
    """Return the different rows of (m, n) int64, and which of them each row is."""
    corner = places.min(axis=0)
    sides = tuple(int(side) for side in places.max(axis=0) - corner + 1)
    if math.prod(sides) >= 2**62:  # too far apart for one number a place
        rows, back = np.unique(places, axis=0, return_inverse=True)
        return rows, back.ravel()
    keys = np.ravel_multi_index(tuple((places - corner).T), sides)
    distinct, back = np.unique(keys, return_inverse=True)
    return np.stack(np.unravel_index(distinct, sides), 1) + corner, back


def _ask(tree: cKDTree, points: FloatArray, reach: float | None) -> IntArray:
    """Return the number (from 1) of the centre nearest to each point, the first of equals; 0 beyond."""
    most = min(tree.n, 2 ** points.shape[1])
    distance, nearest = tree.query(points, k=min(2, most))
    if most > 1:
        tied = np.flatnonzero(distance[:, 0] == distance[:, 1])
        distance, nearest = distance[:, 0], nearest[:, 0]
        if tied.size:
            lengths, several = tree.query(points[tied], k=most)
            equal = lengths == lengths[:, :1]
            nearest[tied] = np.where(equal, several, tree.n).min(axis=1)
    number = nearest.astype(np.int32) + 1
    if reach is not None:
        number[distance > reach] = 0
    return np.asarray(number)
