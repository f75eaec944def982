"""Axis-parallel boxes in two or three dimensions: coding, overlap, suppression, clustering.

A box is ``(lo_0 .. lo_{n-1}, hi_0 .. hi_{n-1})`` in edge coordinates: voxel i covers the half-open interval
[i, i + 1) of its axis, so a box of one voxel at index 3 is (3, 4). This is MONAI's ``StandardMode``. Every
choice between equals falls to the lowest index, so that results do not depend on the size of blocks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.types import Shape

# Sizes grow at most by this factor in decoding, against overflow (Detectron: 1000 / 16).
LARGEST_GROWTH = 1000 / 16
# Boxes that are suppressed at a time, and kept ones that they are compared with at a time.
BLOCK, KEPT_BLOCK = 1000, 4096

# A part of an object belongs to a whole one that holds more than this of it.
INSIDE = 0.8


def box_centres(boxes: Tensor) -> Tensor:
    """Return the centres (n, d) of boxes (n, 2d)."""
    low, high = boxes.chunk(2, -1)
    return (low + high) / 2


def box_sizes(boxes: Tensor) -> Tensor:
    """Return the sides (n, d) of boxes (n, 2d)."""
    low, high = boxes.chunk(2, -1)
    return high - low


def clip_boxes(boxes: Tensor, shape: Shape) -> Tensor:
    """Return boxes (n, 2d) cut at the border of an image of `shape`."""
    limit = boxes.new_tensor([*shape, *shape])
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_boxes(targets: Tensor, anchors: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return what to do to `anchors` to get `targets`: shift over size, and log growth, an axis each.

    Parameters
    ----------
    targets, anchors : (n, 2d) with sides above 0
    weights : factors of shifts and of growths

    Returns
    -------
    (n, 2d)

    Notes
    -----
    R-CNN's coding (Girshick et al., CVPR 2014, appendix C), an axis as a coordinate more.
    """
    sizes = box_sizes(anchors)
    shift = (box_centres(targets) - box_centres(anchors)) / sizes
    growth = torch.log(box_sizes(targets) / sizes)
    return torch.cat((weights[0] * shift, weights[1] * growth), -1)


def decode_boxes(codes: Tensor, anchors: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return the boxes (n, 2d) that `codes` make of `anchors`; the inverse of :func:`encode_boxes`."""
    shift, growth = codes.chunk(2, -1)
    sizes = box_sizes(anchors)
    centres = box_centres(anchors) + shift / weights[0] * sizes
    half = sizes * torch.exp((growth / weights[1]).clamp(max=math.log(LARGEST_GROWTH))) / 2
    return torch.cat((centres - half, centres + half), -1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of every pair, (n, m); 0 where both are empty.

    Each value depends on its two boxes alone, to the last bit, so blocks of it equal the whole. No
    temporary is larger than the result. Half precision and integers are computed in float32.
    """
    return _iou(boxes[:, None], others[None])


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of boxes (..., 2d) one by one, to the bit as :func:`box_iou`."""
    return _iou(boxes, others)


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    boxes, others = _single(boxes), _single(others)
    n = boxes.shape[-1] // 2
    both, first, second = (torch.ones((), dtype=boxes.dtype, device=boxes.device) for _ in range(3))
    for axis in range(n):
        low = torch.maximum(boxes[..., axis], others[..., axis])
        high = torch.minimum(boxes[..., n + axis], others[..., n + axis])
        both = both * (high - low).clamp(min=0)
        first = first * (boxes[..., n + axis] - boxes[..., axis]).clamp(min=0)
        second = second * (others[..., n + axis] - others[..., axis]).clamp(min=0)
    union = first + second - both
    return both / union.clamp(min=torch.finfo(union.dtype).tiny)


def _single(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


def nms(boxes: Tensor, scores: Tensor, threshold: float, block: int = BLOCK) -> Tensor:
    """Keep the best box, drop those that overlap it, and so on: greedy non-maximum suppression.

    Parameters
    ----------
    boxes : (n, 2d)
    scores : (n,)
    threshold : a box with an IoU above this with a better kept one is dropped
    block : boxes decided at a time; any number gives the same result

    Returns
    -------
    (k,) int64
        Indices of kept boxes, best first; equal scores in the order given.

    Notes
    -----
    Exactly the greedy result, without a step of Python a box: a block loses what overlaps boxes kept
    before, and is then settled by itself.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    ranked = boxes[order]
    kept = order[:0]
    for start in range(0, len(order), block):
        places = torch.arange(start, min(len(order), start + block), device=boxes.device)
        places = places[~_overlaps_any(ranked[places], ranked[kept], threshold)]
        suppresses = (box_iou(ranked[places], ranked[places]) > threshold).triu(1)
        kept = torch.cat((kept, places[_settle(suppresses)]))
    return order[kept]


def _overlaps_any(boxes: Tensor, others: Tensor, threshold: float) -> Tensor:
    found = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for part in torch.split(others, KEPT_BLOCK):
        found |= (box_iou(boxes, part) > threshold).any(1)
    return found


def _settle(suppresses: Tensor) -> Tensor:
    """Return which stay, where row i drops column j > i if i itself stays.

    The first row is right after one round, the second after two...: what does not change any more is the
    one solution. Rounds are as many as the longest chain of boxes that save each other, not as boxes.
    """
    stays = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    while True:
        after = ~(suppresses & stays[:, None]).any(0)
        if torch.equal(after, stays):
            return stays
        stays = after


def nms_per_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Suppress within each class only; indices (k,) of kept boxes over all classes, best first.

    A loop over classes instead of a shift of coordinates by class, which costs float32 its digits.
    """
    kept = [torch.zeros(0, dtype=torch.int64, device=boxes.device)]
    for value in torch.unique(classes):
        members = torch.nonzero(classes == value)[:, 0]
        kept.append(members[nms(boxes[members], scores[members], threshold)])
    every = torch.cat(kept).sort().values
    return every[torch.argsort(scores[every], descending=True, stable=True)]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Boxes that several tiles, mirrors or models agreed on, best first.

    Attributes
    ----------
    boxes : (k, 2d)
    scores : (k,)
    classes : (k,) int64
    members : k index tensors into the boxes that were clustered; the first is the best of its cluster
    shares : k tensors, how much each member counted for the box; they sum to 1
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    members: tuple[Tensor, ...]
    shares: tuple[Tensor, ...]


def cluster_boxes(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    weights: Tensor | None = None,
    sources: Tensor | None = None,
    expected: Tensor | None = None,
    windows: Tensor | None = None,
    cut: Tensor | None = None,
    threshold: float = 0.5,
    missing_weight: float = 1.0,
) -> Clusters:
    """Average boxes of the same object instead of keeping one: weighted box clustering.

    Parameters
    ----------
    boxes, scores, classes : (n, 2d), (n,), (n,)
    weights : (n,) how far a box is to be trusted, by its place in its tile say; 1 by default
    sources : (n,) which tile (and mirror, and model) found it; a cluster counts each once. By default all
        differ
    expected : (n,) how many sources could have found it, 1 by default; sources that saw the place and found
        nothing lower the score
    windows : (n, 2d) which part of the image each box's source saw
    cut : (n,) bool, boxes that end where their window does, inside the image: parts of objects. They lead a
        cluster only where no whole box does, the largest first. They join where they lie inside of it, or
        agree with it in what both windows show; then they count as found, and do not move the box
    threshold : a cluster is the best box left and all boxes of its class whose IoU with it is above this
    missing_weight : how much a source counts that found nothing, against one that did

    Returns
    -------
    Clusters

    Notes
    -----
    Jaeger et al., Retina U-Net (ML4H 2019, PMLR 116), section 2, without the weight by size: with w the IoU
    with the best box times `weights`, score = sum(w s) / (sum w + missing mean(w)) and
    box = sum(s w b) / sum(s w).
    """
    ones = torch.ones_like(scores)
    weights, expected = (ones if given is None else given.to(scores) for given in (weights, expected))
    sources = torch.arange(len(scores), device=scores.device) if sources is None else sources
    cut = torch.zeros_like(scores, dtype=torch.bool) if cut is None else cut
    left = torch.argsort(scores, descending=True, stable=True)
    parts = left[cut[left]]
    largest = torch.argsort(box_sizes(boxes[parts]).prod(1), descending=True, stable=True)
    left = torch.cat((left[~cut[left]], parts[largest]))
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(left):
        best = left[0]
        overlap = box_iou(boxes[best][None], boxes[left])[0]
        overlap[0] = 1  # a box without volume overlaps nothing, not even itself
        seen = overlap
        if windows is not None and bool(cut[left].any()):
            partly = cut[left] | cut[best]
            seen = torch.where(partly, _seen_by_both(boxes, windows, best, left), overlap)
            seen = seen.masked_fill(cut[left] & _lies_inside(boxes[left], boxes[best]), 1)
        joined = (seen > threshold) & (classes[left] == classes[best])
        joined[0] = True
        members, near = left[joined], overlap[joined]
        trust = weights[members] * near
        missing = (expected[members].mean() - len(torch.unique(sources[members]))).clamp(min=0)
        score = (trust * scores[members]).sum() / (trust.sum() + missing * trust.mean() * missing_weight)
        moves = (near > threshold) & ~cut[members]
        moves[0] = True
        share = torch.where(moves, trust * scores[members], 0)
        if not share.sum() > 0:  # scores of 0: the best stands for all
            share = torch.zeros_like(share).index_fill_(0, share.new_zeros(1).long(), 1)
        rows.append((members, score, share / share.sum()))
        left = left[~joined]
    return _collect(boxes, classes, scores, rows)


def _seen_by_both(boxes: Tensor, windows: Tensor, best: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of one box with others, each pair cut to what the windows of both show."""
    common = _intersect(windows[best], windows[others])
    return paired_iou(_intersect(boxes[best], common), _intersect(boxes[others], common))


def _lies_inside(parts: Tensor, box: Tensor) -> Tensor:
    return paired_iou(_intersect(parts, box), parts) > INSIDE


def _intersect(boxes: Tensor, others: Tensor) -> Tensor:
    """Return what boxes (..., 2d) share, one by one; sides below 0 where that is nothing."""
    n = boxes.shape[-1] // 2
    low = torch.maximum(boxes[..., :n], others[..., :n])
    return torch.cat((low, torch.minimum(boxes[..., n:], others[..., n:])), -1)


def _collect(
    boxes: Tensor, classes: Tensor, scores: Tensor, rows: list[tuple[Tensor, Tensor, Tensor]]
) -> Clusters:
    """Make boxes of members and shares, and sort them by their new scores."""
    found = torch.stack([score for _, score, _ in rows]) if rows else scores[:0]
    order = torch.argsort(found, descending=True, stable=True).tolist()
    fused = [(share[:, None] * boxes[members]).sum(0) for members, _, share in rows]
    kinds = [classes[members[0]] for members, _, _ in rows]
    return Clusters(
        boxes=torch.stack([fused[k] for k in order]) if rows else boxes[:0],
        scores=found[order],
        classes=torch.stack([kinds[k] for k in order]) if rows else classes[:0],
        members=tuple(rows[k][0] for k in order),
        shares=tuple(rows[k][2] for k in order),
    )
