"""Which anchors stand for which objects, and which of them a step learns from."""

import torch
from torch import Tensor

from medseg.nets.boxes import box_centres, box_iou, paired_iou

NEGATIVE, IGNORED = -1, -2
"""What an anchor is matched with where it is no object: background, or neither of the two."""

# Of one matrix of objects and anchors; there are several of them at a time.
MATRIX_BYTES = 1 << 26
# Anchors that are compared at a time with the objects near to them. Anchors of a level run along its rows, so
# that few thousands are a strip of the image, which most objects are far from.
BLOCK = 1 << 13


def match_iou(
    targets: Tensor,
    anchors: Tensor,
    high: float,
    low: float,
    low_quality: bool = True,
    max_bytes: int = MATRIX_BYTES,
) -> Tensor:
    """Match each anchor with the object that it overlaps most, where it overlaps enough.

    Parameters
    ----------
    targets : (g, 2d) boxes of objects; may be none
    anchors : (n, 2d)
    high, low : an IoU of at least `high` makes an anchor positive, below `low` background
    low_quality : every anchor that overlaps an object as much as any does is positive too, ties included,
        and belongs to the object that it overlaps most itself (Ren et al., Faster R-CNN, section 3.1.2)
    max_bytes : memory of a block of the matrix of overlaps

    Returns
    -------
    (n,) int64
        Index of the object, :data:`NEGATIVE` or :data:`IGNORED`.

    Notes
    -----
    An object that no anchor touches makes none positive; its largest overlap is 0, which others call a tie.
    """
    matches = torch.full((len(anchors),), NEGATIVE, device=anchors.device)
    if not len(targets) or not len(anchors):
        return matches
    rows = max(1, min(BLOCK, max_bytes // (8 * len(targets))))
    best, owner = [], []
    peak = targets.new_zeros(len(targets))
    for block in torch.split(anchors, rows):
        near = _near(targets, block)
        overlap = box_iou(targets[near], block)
        highest = overlap.amax(0) if len(near) else block.new_zeros(len(block))
        best.append(highest)
        owner.append(near[_first_equal(overlap, highest)] if len(near) else torch.zeros_like(highest).long())
        peak[near] = torch.maximum(peak[near], overlap.amax(1))
    most = torch.cat(best)
    positive = most >= high
    if low_quality and bool((peak > 0).any()):
        # who attains the largest overlap of an object has at least the smallest of these
        for some in torch.split(torch.nonzero(most >= peak[peak > 0].min())[:, 0], rows):
            ties = (box_iou(targets, anchors[some]) == peak[:, None]) & (peak > 0)[:, None]
            positive[some] |= ties.any(0)
    matches[(most >= low) & ~positive] = IGNORED
    return torch.where(positive, torch.cat(owner), matches)


def _near(targets: Tensor, anchors: Tensor) -> Tensor:
    """Return the indices of targets that meet the smallest box around some anchors; no other overlaps one."""
    n = anchors.shape[1] // 2
    low, high = anchors[:, :n].amin(0), anchors[:, n:].amax(0)
    return torch.nonzero(((targets[:, n:] > low) & (targets[:, :n] < high)).all(1))[:, 0]


def _first_equal(overlap: Tensor, best: Tensor) -> Tensor:
    """Return the first row of each column that holds its largest value (argmax leaves ties open)."""
    rows = torch.arange(len(overlap), device=overlap.device)[:, None]
    return torch.where(overlap == best, rows, len(overlap)).amin(0)


def match_atss(
    targets: Tensor,
    anchors: Tensor,
    level_sizes: tuple[int, ...],
    per_cell: int,
    k: int = 4,
    centre_inside: bool = False,
    max_bytes: int = MATRIX_BYTES,
) -> Tensor:
    """Match anchors with a threshold of IoU that each object sets itself.

    Parameters
    ----------
    targets : (g, 2d) boxes of objects; may be none
    anchors : (n, 2d), level after level
    level_sizes : anchors of each level
    per_cell : anchors of one cell
    k : cells a level whose anchors are candidates: the k nearest by the distance of centres
    centre_inside : a positive anchor's centre must be inside the object; off for small objects
    max_bytes : memory of a block of the matrix of distances

    Returns
    -------
    (n,) int64
        Index of the object, or :data:`NEGATIVE`.

    Notes
    -----
    Zhang et al., ATSS (CVPR 2020), algorithm 1: the threshold is mean + standard deviation of the IoU of
    all candidates. One candidate alone is positive. An anchor claimed twice goes to the object that it
    overlaps more.
    """
    matches = torch.full((len(anchors),), NEGATIVE, device=anchors.device)
    if not len(targets) or not len(anchors):
        return matches
    claims = []
    rows = max(1, max_bytes // (8 * len(anchors)))
    for first in range(0, len(targets), rows):
        some = targets[first : first + rows]
        places = _candidates(some, anchors, level_sizes, per_cell, k)
        overlap = paired_iou(some[:, None], anchors[places])
        positive = _above_own_threshold(overlap)
        if centre_inside:
            positive &= _inside(box_centres(anchors[places]), some[:, None])
        owners = torch.arange(first, first + len(some), device=anchors.device)[:, None].expand_as(places)
        claims.append((places[positive], owners[positive], overlap[positive]))
    places, owners, overlap = (torch.cat(parts) for parts in zip(*claims, strict=True))
    best = overlap.new_full((len(anchors),), -1.0).scatter_reduce_(0, places, overlap, "amax")
    winning = overlap == best[places]
    none = len(targets)
    owner = torch.full_like(matches, none).scatter_reduce_(0, places[winning], owners[winning], "amin")
    return torch.where(owner == none, matches, owner)


def _candidates(
    targets: Tensor, anchors: Tensor, level_sizes: tuple[int, ...], per_cell: int, k: int
) -> Tensor:
    """Return (g, c) indices of the nearest anchors of every level, ties by lowest index."""
    found, start = [], 0
    centres = box_centres(targets)
    for size in level_sizes:
        if size:
            distance = torch.cdist(centres, box_centres(anchors[start : start + size]), compute_mode=EXACT)
            found.append(_smallest(distance, min(size, k * per_cell)) + start)
        start += size
    return torch.cat(found, 1)


EXACT = "donot_use_mm_for_euclid_dist"


def _smallest(values: Tensor, count: int) -> Tensor:
    """Return the columns (g, count) of the smallest values of each row; of equals the first."""
    limit = values.topk(count, 1, largest=False).values[:, -1:]
    below, equal = values < limit, values == limit
    room = count - below.sum(1, keepdim=True)
    chosen = below | (equal & (equal.cumsum(1) <= room))
    return torch.nonzero(chosen)[:, 1].view(len(values), count)


def _above_own_threshold(overlap: Tensor) -> Tensor:
    if overlap.shape[1] < 2:
        return torch.ones_like(overlap, dtype=torch.bool)
    return overlap >= (overlap.mean(1) + overlap.std(1))[:, None]


def _inside(points: Tensor, boxes: Tensor, margin: float = 0.01) -> Tensor:
    """Return whether points lie inside boxes, more than `margin` voxels from their border (MONAI's)."""
    low, high = boxes.chunk(2, -1)
    return (torch.minimum(points - low, high - points) > margin).all(-1)


def sample_random(
    matches: Tensor, count: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the anchors of an image that a step learns from.

    Parameters
    ----------
    matches : (n,) of a matcher
    count : how many, positive and negative together
    positive_fraction : at most this part is positive; negatives fill the rest
    generator : of the CPU

    Returns
    -------
    positive, negative : index tensors, ascending
    """
    positive, negative = torch.nonzero(matches >= 0)[:, 0], torch.nonzero(matches == NEGATIVE)[:, 0]
    positive = draw(positive, int(count * positive_fraction), generator)
    return positive, draw(negative, count - len(positive), generator)


def sample_hard(
    matches: Tensor,
    scores: Tensor,
    count: int,
    positive_fraction: float,
    generator: torch.Generator,
    pool: float = 20,
    least_negatives: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw positives at random, and negatives among those that look most like objects.

    Parameters
    ----------
    matches, count, positive_fraction, generator : as for :func:`sample_random`
    scores : (n,) how much the network takes each for an object
    pool : negatives are drawn from this many times as many of the highest scores
    least_negatives : drawn even where nothing is positive

    Returns
    -------
    positive, negative : index tensors, ascending

    Notes
    -----
    Baumgartner et al., nnDetection (MICCAI 2021): 32 an image, a third positive, pool 20.
    """
    positive, negative = torch.nonzero(matches >= 0)[:, 0], torch.nonzero(matches == NEGATIVE)[:, 0]
    positive = draw(positive, int(count * positive_fraction), generator)
    wanted = int(max(1, len(positive)) * abs(1 - 1 / positive_fraction))
    wanted = min(len(negative), max(least_negatives, wanted))
    order = torch.argsort(scores[negative], descending=True, stable=True)
    hardest = negative[order[: int(wanted * pool)]]
    return positive, draw(hardest, wanted, generator)


def draw(indices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of the indices, all if they are fewer, ascending."""
    if len(indices) <= count:
        return indices.sort().values
    chosen = torch.randperm(len(indices), generator=generator)[:count]
    return indices[chosen.to(indices.device)].sort().values
