"""Boxes against plain float64 loops, and against MONAI where it does not raise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.data import box_utils as monai_boxes
from torch import Tensor

from medseg.geometry.boxes import label_boxes
from medseg.nets.boxes import (
    box_iou,
    clip_boxes,
    cluster_boxes,
    decode_boxes,
    encode_boxes,
    nms,
    nms_per_class,
    paired_iou,
)
from medseg.types import FloatArray


def random_boxes(count: int, dims: int, seed: int = 0, extent: float = 40.0, whole: bool = False) -> Tensor:
    """Return boxes (count, 2 dims) float64; with `whole` on a coarse grid, for many equal overlaps."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, dims, generator=generator, dtype=torch.float64) * extent
    size = torch.rand(count, dims, generator=generator, dtype=torch.float64) * 9 + 1
    boxes = torch.cat((low, low + size), 1)
    return boxes.round() if whole else boxes


def reference_iou(a: FloatArray, b: FloatArray) -> float:
    n = len(a) // 2
    both = first = second = 1.0
    for axis in range(n):
        both *= max(0.0, min(a[n + axis], b[n + axis]) - max(a[axis], b[axis]))
        first *= a[n + axis] - a[axis]
        second *= b[n + axis] - b[axis]
    union = first + second - both
    return both / union if union > 0 else 0.0


def reference_nms(boxes: FloatArray, scores: FloatArray, threshold: float) -> list[int]:
    """Greedy, one kept box after the other, in float64."""
    left = np.argsort(-scores, kind="stable")
    n = boxes.shape[1] // 2
    volume = np.prod(boxes[:, n:] - boxes[:, :n], axis=1)
    kept = []
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(int(best))
        both = np.ones(len(rest))
        for axis in range(n):
            high = np.minimum(boxes[rest, n + axis], boxes[best, n + axis])
            both *= np.clip(high - np.maximum(boxes[rest, axis], boxes[best, axis]), 0, None)
        left = rest[both / (volume[rest] + volume[best] - both) <= threshold]
    return kept


@pytest.mark.parametrize("dims", [2, 3])
def test_iou_equals_a_loop_over_pairs(dims: int) -> None:
    boxes, others = random_boxes(30, dims), random_boxes(20, dims, 1)
    expected = [[reference_iou(a, b) for b in others.numpy()] for a in boxes.numpy()]
    np.testing.assert_allclose(box_iou(boxes, others).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(box_iou(boxes.float(), others.float()).numpy(), expected, atol=1e-6)
    assert (box_iou(boxes, others) > 0).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_iou_equals_monai(dims: int) -> None:
    boxes, others = random_boxes(50, dims).float(), random_boxes(60, dims, 1).float()
    torch.testing.assert_close(box_iou(boxes, others), monai_boxes.box_iou(boxes, others), rtol=0, atol=1e-6)


def test_blocks_and_pairs_of_iou_equal_the_matrix_to_the_bit() -> None:
    boxes, others = random_boxes(40, 3).float(), random_boxes(40, 3, 1).float()
    whole = box_iou(boxes, others)
    assert torch.equal(torch.cat([box_iou(part, others) for part in torch.split(boxes, 7)]), whole)
    assert torch.equal(box_iou(others, boxes).T, whole)
    assert torch.equal(paired_iou(boxes, others), whole.diagonal())


def test_empty_boxes_overlap_nothing() -> None:
    empty = torch.tensor([[1.0, 1, 1, 3], [2.0, 2, 2, 2]])
    assert box_iou(empty, empty).tolist() == [[0, 0], [0, 0]]
    assert box_iou(torch.zeros(0, 6), torch.zeros(3, 6)).shape == (0, 3)


def test_half_precision_is_computed_in_single() -> None:
    boxes = (random_boxes(10, 2) * 8).half()
    assert torch.equal(box_iou(boxes, boxes), box_iou(boxes.float(), boxes.float()))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (10.0, 5.0)])
def test_decoding_undoes_encoding(dims: int, weights: tuple[float, float]) -> None:
    targets, anchors = random_boxes(50, dims), random_boxes(50, dims, 1)
    codes = encode_boxes(targets, anchors, weights)
    torch.testing.assert_close(decode_boxes(codes, anchors, weights), targets, rtol=1e-10, atol=1e-10)


def test_codes_are_shift_over_size_and_log_growth() -> None:
    codes = encode_boxes(torch.tensor([[2.0, 0, 6, 8]]), torch.tensor([[0.0, 0, 4, 4]]), (10.0, 5.0))
    assert codes[0].tolist() == pytest.approx([10 * 2 / 4, 10 * 2 / 4, 0, 5 * math.log(2)])


@pytest.mark.parametrize("dims", [2, 3])
def test_codes_equal_monai(dims: int) -> None:
    weights = (10.0, 5.0)
    coder = BoxCoder(weights=[weights[0]] * dims + [weights[1]] * dims)
    targets, anchors = random_boxes(50, dims).float(), random_boxes(50, dims, 1).float()
    codes = encode_boxes(targets, anchors, weights)
    torch.testing.assert_close(codes, coder.encode_single(targets, anchors), rtol=1e-5, atol=1e-5)
    moved = codes + 1
    torch.testing.assert_close(
        decode_boxes(moved, anchors, weights), coder.decode_single(moved, anchors), rtol=1e-5, atol=1e-4
    )


def test_decoding_bounds_growth() -> None:
    codes = torch.tensor([[0.0, 0, 100, 1e30]])
    boxes = decode_boxes(codes, torch.tensor([[0.0, 0, 16, 16]]))
    assert boxes[0].tolist() == pytest.approx([-492, -492, 508, 508], rel=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_of_coding_are_right(dims: int) -> None:
    codes = torch.randn(4, 2 * dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    anchors = random_boxes(4, dims)
    assert torch.autograd.gradcheck(lambda c: decode_boxes(c, anchors, (10.0, 5.0)), codes.requires_grad_())
    targets = random_boxes(4, dims, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: encode_boxes(t, anchors), targets)


@pytest.mark.parametrize(("dims", "threshold", "whole"), [(2, 0.3, False), (2, 1e-5, True), (3, 0.2, True)])
def test_suppression_equals_greedy_on_ten_thousand_boxes(dims: int, threshold: float, whole: bool) -> None:
    boxes = random_boxes(10_000, dims, 3, 150.0 if dims == 2 else 30.0, whole)
    scores = torch.rand(10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = (scores * 50).round() / 50 if whole else scores  # many equal ones
    expected = reference_nms(boxes.numpy(), scores.numpy(), threshold)
    assert nms(boxes, scores, threshold).tolist() == expected
    assert 50 < len(expected) < 10_000


@given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 10), st.sampled_from([2, 3]))
@settings(max_examples=40, deadline=None)
def test_the_block_does_not_change_what_is_kept(count: int, block: int, seed: int, dims: int) -> None:
    boxes = random_boxes(count, dims, seed, 12.0, whole=True)
    scores = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed)).double()
    expected = reference_nms(boxes.numpy(), scores.numpy(), 0.2) if count else []
    assert nms(boxes, scores, 0.2, block).tolist() == expected


def test_a_long_chain_of_boxes_that_save_each_other_is_settled_in_order() -> None:
    low = torch.arange(500.0)
    boxes = torch.stack((low, low * 0, low + 3, low * 0 + 1), 1)  # neighbours overlap by 1/2, the next by 1/5
    kept = nms(boxes, torch.linspace(1, 0, 500), 0.3)
    assert kept.tolist() == list(range(0, 500, 2))


@pytest.mark.parametrize("dims", [2, 3])
def test_suppression_equals_monai(dims: int) -> None:
    boxes = random_boxes(400, dims, 5, 30.0).float()
    scores = torch.rand(400, generator=torch.Generator().manual_seed(1))
    expected = monai_boxes.non_max_suppression(boxes, scores, 0.3)
    assert nms(boxes, scores, 0.3).tolist() == expected.tolist()
    classes = torch.arange(400) % 3
    expected = monai_boxes.batched_nms(boxes, scores, classes, 0.3)
    assert nms_per_class(boxes, scores, classes, 0.3).tolist() == expected.tolist()


def test_classes_do_not_suppress_each_other_however_large_their_numbers_and_coordinates() -> None:
    # where shifting coordinates by class loses digits: two boxes that do not touch, far out
    boxes = torch.tensor([[1e6, 0, 1e6 + 1, 1], [1e6 + 1, 0, 1e6 + 2, 1], [1e6, 0, 1e6 + 1, 1]])
    classes = torch.tensor([10_000, 10_000, 9_999])
    kept = nms_per_class(boxes, torch.tensor([0.9, 0.8, 0.7]), classes, 0.1)
    assert kept.tolist() == [0, 1, 2]


def test_suppression_of_nothing_is_nothing() -> None:
    none, empty = torch.zeros(0), torch.zeros(0, 6)
    assert nms(empty, none, 0.5).tolist() == []
    assert nms_per_class(empty, none, none.long(), 0.5).tolist() == []
    found = cluster_boxes(empty, none, none.long())
    assert (found.boxes.shape, found.scores.shape, found.members) == ((0, 6), (0,), ())


def reference_clusters(
    boxes: FloatArray, scores: FloatArray, weights: FloatArray, expected: float, threshold: float
) -> list[tuple[float, FloatArray]]:
    """One class, every box of another source; as the paper has it."""
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    found = []
    while left:
        best = left[0]
        overlap = {i: 1.0 if i == best else reference_iou(boxes[best], boxes[i]) for i in left}
        members = [i for i in left if i == best or overlap[i] > threshold]
        w = np.array([overlap[i] * weights[i] for i in members])
        s = scores[members]
        missing = max(0.0, expected - len(members))
        score = (w * s).sum() / (w.sum() + missing * w.mean())
        found.append((score, (s * w) @ boxes[members] / (s * w).sum()))
        left = [i for i in left if i not in members]
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("expected", [1.0, 4.0])
def test_clusters_equal_a_loop(dims: int, expected: float) -> None:
    boxes = random_boxes(80, dims, 7, 12.0)
    generator = torch.Generator().manual_seed(2)
    scores, weights = (torch.rand(80, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    wanted = reference_clusters(boxes.numpy(), scores.numpy(), weights.numpy(), expected, 0.3)
    found = cluster_boxes(
        boxes, scores, torch.zeros(80).long(), weights, expected=torch.full((80,), expected), threshold=0.3
    )
    assert 5 < len(found.scores) < 80
    np.testing.assert_allclose(found.scores.numpy(), [score for score, _ in wanted], rtol=1e-12)
    np.testing.assert_allclose(found.boxes.numpy(), [box for _, box in wanted], rtol=1e-12)
    assert sorted(torch.cat(found.members).tolist()) == list(range(80))
    assert all(share.sum().item() == pytest.approx(1) for share in found.shares)


@pytest.mark.parametrize("dims", [2, 3])
def test_clusters_of_one_tile_without_overlaps_are_its_boxes(dims: int) -> None:
    boxes = random_boxes(300, dims, 4)
    scores = torch.rand(300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = nms(boxes, scores, 0.3)
    found = cluster_boxes(boxes[kept], scores[kept], torch.zeros(len(kept)).long(), threshold=0.3)
    torch.testing.assert_close(found.boxes, boxes[kept])
    torch.testing.assert_close(found.scores, scores[kept])


def test_clusters_keep_classes_apart_and_count_a_source_once() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(3, 1)
    scores, classes = torch.tensor([0.9, 0.8, 0.6]), torch.tensor([1, 2, 1])
    apart = cluster_boxes(boxes, scores, classes)
    assert apart.classes.tolist() == [2, 1]
    assert apart.scores.tolist() == pytest.approx([0.8, 0.75])
    one = cluster_boxes(boxes, scores, classes * 0, sources=torch.zeros(3), expected=torch.full((3,), 2.0))
    assert one.scores.tolist() == pytest.approx([2.3 / 4])  # one of two sources is missing


def test_boxes_of_a_label_map_are_half_open_and_gaps_are_allowed() -> None:
    labels = np.zeros((5, 6, 7), np.int32)
    labels[1:3, 2:6, 0:7] = 4
    labels[4, 5, 6] = 2_000_000_000
    values, boxes = label_boxes(labels)
    assert values.tolist() == [4, 2_000_000_000]
    assert boxes.tolist() == [[1, 2, 0, 3, 6, 7], [4, 5, 6, 5, 6, 7]]
    values, boxes = label_boxes(np.zeros((4, 4), np.uint8))
    assert (values.shape, boxes.shape) == ((0,), (0, 4))


def test_boxes_are_clipped_to_the_image() -> None:
    boxes = torch.tensor([[-3.0, 2, 4, 99], [50.0, 50, 60, 60]])
    assert clip_boxes(boxes, (10, 20)).tolist() == [[0, 2, 4, 20], [10, 20, 10, 20]]
