"""Matchers and samplers against plain loops, and against MONAI where it does not raise."""

import numpy as np
import pytest
import torch
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from monai.apps.detection.utils.hard_negative_sampler import HardNegativeSampler
from torch import Tensor

from medseg.nets.boxes import box_iou
from medseg.nets.matching import IGNORED, NEGATIVE, match_atss, match_iou, sample_hard, sample_random
from tests.nets.test_boxes import random_boxes, reference_iou


def grid_anchors(
    shape: tuple[int, ...], stride: float, sizes: list[float], seed: int | None = None
) -> Tensor:
    """Return anchors (cells * sizes, 2d) float64 around each cell."""
    axes = torch.meshgrid(*[(torch.arange(n) + 0.5) * stride for n in shape], indexing="ij")
    centres = torch.stack([axis.reshape(-1) for axis in axes], 1).double()[:, None]
    half = torch.tensor(sizes, dtype=torch.float64).view(1, -1, 1) / 2
    return torch.cat((centres - half, centres + half), -1).reshape(-1, 2 * len(shape))


def reference_match(targets: Tensor, anchors: Tensor, high: float, low: float) -> list[int]:
    overlap = np.array([[reference_iou(a, t) for t in targets.numpy()] for a in anchors.numpy()])
    result = []
    for row in overlap:
        best = int(row.argmax())
        restored = any(row[g] == overlap[:, g].max() > 0 for g in range(len(targets)))
        unsure = NEGATIVE if row[best] < low else IGNORED
        result.append(best if row[best] >= high or restored else unsure)
    return result


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_matches_by_iou_equal_a_loop_with_ties_and_in_blocks(dims: int, seed: int) -> None:
    anchors = grid_anchors((6,) * dims, 4.0, [4.0, 7.0])
    targets = random_boxes(7, dims, seed, 18.0, whole=True)
    expected = reference_match(targets, anchors, 0.4, 0.1)
    assert match_iou(targets, anchors, 0.4, 0.1).tolist() == expected
    assert match_iou(targets, anchors, 0.4, 0.1, max_bytes=8 * 7 * 10).tolist() == expected
    assert {NEGATIVE, IGNORED} < set(expected) and max(expected) > 2


def test_all_anchors_that_overlap_an_object_best_are_restored_to_their_own_best() -> None:
    # four anchors around a small object, each a quarter of it; the last lies on another object as well
    anchors = torch.tensor([[0.0, 0, 2, 2], [0.0, 2, 2, 4], [2.0, 0, 4, 2], [2.0, 2, 4, 4], [8.0, 8, 9, 9]])
    targets = torch.tensor([[1.0, 1, 3, 3], [2.0, 2, 4, 4]])
    assert match_iou(targets, anchors, 0.9, 0.05).tolist() == [0, 0, 0, 1, NEGATIVE]
    assert match_iou(targets, anchors, 0.9, 0.05, low_quality=False)[:4].tolist() == [IGNORED] * 3 + [1]


def test_an_object_that_no_anchor_touches_makes_none_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 2, 2], [4.0, 4, 6, 6]])
    assert match_iou(torch.tensor([[10.0, 10, 11, 11]]), anchors, 0.7, 0.3).tolist() == [NEGATIVE, NEGATIVE]


def test_without_objects_or_anchors_nothing_raises() -> None:
    anchors, none = grid_anchors((3, 3), 4.0, [4.0]), torch.zeros(0, 4)
    assert match_iou(none, anchors, 0.7, 0.3).tolist() == [NEGATIVE] * 9
    assert match_atss(none, anchors, (9,), 1).tolist() == [NEGATIVE] * 9
    assert match_iou(anchors, none, 0.7, 0.3).tolist() == match_atss(anchors, none, (0,), 1).tolist() == []


def reference_atss(targets: Tensor, anchors: Tensor, levels: list[int], wanted: int) -> list[int]:
    n = targets.shape[1] // 2
    owner = [(NEGATIVE, -1.0)] * len(anchors)
    a = anchors.numpy()
    for g, target in enumerate(targets.numpy()):
        centre = (target[:n] + target[n:]) / 2
        distance = np.sqrt((((a[:, :n] + a[:, n:]) / 2 - centre) ** 2).sum(1))
        candidates: list[int] = []
        start = 0
        for size in levels:
            order = np.argsort(distance[start : start + size], kind="stable")
            candidates += (order[:wanted] + start).tolist()
            start += size
        overlap = np.array([reference_iou(target, a[c]) for c in candidates])
        limit = overlap.mean() + overlap.std(ddof=1)
        for c, value in zip(candidates, overlap, strict=True):
            if value >= limit and value > owner[c][1]:
                owner[c] = (g, value)
    return [g for g, _ in owner]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("max_bytes", [1 << 20, 1])
def test_adaptive_matches_equal_a_loop(dims: int, max_bytes: int) -> None:
    fine, coarse = grid_anchors((6,) * dims, 4.0, [4.0, 7.0]), grid_anchors((3,) * dims, 8.0, [8.0, 12.0])
    anchors = torch.cat((fine, coarse))
    # off the grid's symmetry, where equal distances differ by roundings of the reference
    targets = random_boxes(9, dims, 2, 16.0)
    expected = reference_atss(targets, anchors, [len(fine), len(coarse)], 8)
    found = match_atss(targets, anchors, (len(fine), len(coarse)), 2, max_bytes=max_bytes)
    assert found.tolist() == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("centre_inside", [False, True])
def test_adaptive_matches_equal_monai(dims: int, centre_inside: bool) -> None:
    fine, coarse = grid_anchors((8,) * dims, 4.0, [4.0, 7.0]), grid_anchors((4,) * dims, 8.0, [8.0, 12.0])
    anchors, targets = torch.cat((fine, coarse)).float(), random_boxes(9, dims, 2, 20.0).float()
    sizes = (len(fine), len(coarse))
    matcher = ATSSMatcher(4, center_in_gt=centre_inside)
    _, expected = matcher.compute_matches(targets, anchors, [size // 2 for size in sizes], 2)
    found = match_atss(targets, anchors, sizes, 2, centre_inside=centre_inside)
    assert found.tolist() == expected.tolist()
    assert (found >= 0).sum() > 5


def test_one_candidate_alone_is_positive_and_the_larger_overlap_wins() -> None:
    anchors = torch.tensor([[0.0, 0, 4, 4]])
    assert match_atss(torch.tensor([[1.0, 1, 3, 3]]), anchors, (1,), 1).tolist() == [0]
    targets = torch.tensor([[1.0, 1, 3, 3], [0.0, 0, 4, 3], [0.0, 0, 3, 4]])  # the last two tie
    assert match_atss(targets, anchors, (1,), 1).tolist() == [1]


def test_random_samples_keep_to_their_share_and_follow_the_seed() -> None:
    matches = torch.full((1000,), NEGATIVE)
    matches[:300] = torch.arange(300)
    matches[300:500] = IGNORED
    positive, negative = sample_random(matches, 256, 0.5, torch.Generator().manual_seed(1))
    assert (len(positive), len(negative)) == (128, 128)
    assert (matches[positive] >= 0).all() and (matches[negative] == NEGATIVE).all()
    again = sample_random(matches, 256, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(positive, again[0]) and torch.equal(negative, again[1])
    other = sample_random(matches, 256, 0.5, torch.Generator().manual_seed(2))
    assert not torch.equal(positive, other[0])
    matches[10:300] = NEGATIVE
    positive, negative = sample_random(matches, 256, 0.5, torch.Generator().manual_seed(1))
    assert (positive.tolist(), len(negative)) == (list(range(10)), 246)


def test_hard_negatives_come_from_the_pool_of_highest_scores() -> None:
    matches = torch.full((500,), NEGATIVE)
    matches[:40] = 0
    scores = torch.linspace(0, 1, 500)
    positive, negative = sample_hard(matches, scores, 32, 1 / 3, torch.Generator().manual_seed(0), pool=3)
    assert (len(positive), len(negative)) == (10, 20)
    assert negative.min() >= 500 - 60
    nothing = torch.full((500,), NEGATIVE)
    positive, negative = sample_hard(nothing, scores, 32, 1 / 3, torch.Generator().manual_seed(0), pool=1)
    assert positive.tolist() == [] and negative.tolist() == [498, 499]


@pytest.mark.parametrize("positives", [0, 3, 40])
def test_hard_samples_are_as_many_as_monai_draws(positives: int) -> None:
    matches = torch.full((300,), NEGATIVE)
    matches[:positives] = 0
    scores = torch.rand(300, generator=torch.Generator().manual_seed(3))
    sampler = HardNegativeSampler(32, 1 / 3, min_neg=1, pool_size=1)  # a pool of 1: nothing is random
    expected, hard = sampler.select_samples_per_img((matches >= 0).long(), scores)
    positive, negative = sample_hard(matches, scores, 32, 1 / 3, torch.Generator(), pool=1)
    assert len(positive) == int(expected.sum())
    assert negative.tolist() == torch.nonzero(hard)[:, 0].tolist()


def test_matching_is_the_same_whatever_the_precision_of_equal_boxes() -> None:
    anchors = grid_anchors((5, 5), 4.0, [4.0, 8.0])
    targets = random_boxes(4, 2, 1, 15.0, whole=True)
    assert (
        match_iou(targets, anchors, 0.5, 0.2).tolist()
        == match_iou(targets.float(), anchors.float(), 0.5, 0.2).tolist()
    )
    assert box_iou(anchors, targets).max() > 0
