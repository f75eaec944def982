"""RoIAlign against a plain float64 loop over points, in two and three dimensions."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.nets.roi_align import crop_masks, roi_align, roi_align_levels
from medseg.types import FloatArray


def reference(
    features: FloatArray, box: FloatArray, strides: tuple[float, ...], output: tuple[int, ...], samples: int
) -> FloatArray:
    """Mean of linear interpolations at `samples` points a cell and axis; 0 beyond one voxel outside."""
    n = len(output)
    result = np.zeros((features.shape[0], *output))
    for cell in np.ndindex(*output):
        total = np.zeros(features.shape[0])
        for point in itertools.product(range(samples), repeat=n):
            places = []
            for axis in range(n):
                low, high = (box[axis + end * n] / strides[axis] - 0.5 for end in (0, 1))
                part = (cell[axis] * samples + point[axis] + 0.5) / (output[axis] * samples)
                places.append(low + part * (high - low))
            total += at(features, places)
        result[(slice(None), *cell)] = total / samples**n
    return result


def at(features: FloatArray, places: list[float]) -> FloatArray:
    shape = features.shape[1:]
    if any(p < -1 or p > s for p, s in zip(places, shape, strict=True)):
        return np.zeros(features.shape[0])
    clamped = [min(max(p, 0), s - 1) for p, s in zip(places, shape, strict=True)]
    floors = [math.floor(p) for p in clamped]
    value = np.zeros(features.shape[0])
    for corner in itertools.product((0, 1), repeat=len(shape)):
        index = tuple(min(f + c, s - 1) for f, c, s in zip(floors, corner, shape, strict=True))
        weight = math.prod(
            p - f if c else 1 - (p - f) for p, f, c in zip(clamped, floors, corner, strict=True)
        )
        value += weight * features[(slice(None), *index)]
    return value


CASES = {
    "plane": ((9, 7), (4.0, 4.0), (3, 2)),
    "plane, other strides": ((5, 8), (2.0, 1.0), (2, 3)),
    "volume": ((6, 5, 7), (1.0, 4.0, 4.0), (2, 3, 2)),
    "one voxel thick": ((1, 6, 5), (1.0, 2.0, 2.0), (2, 2, 3)),
    "one voxel": ((1, 1, 1), (4.0, 4.0, 4.0), (2, 2, 2)),
    "one column": ((1, 9), (3.0, 3.0), (1, 4)),
}


def features_and_boxes(
    shape: tuple[int, ...], strides: tuple[float, ...], count: int = 6
) -> tuple[Tensor, Tensor]:
    """Return noise, and boxes of which some reach outside."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    features = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    extent = torch.tensor([n * s for n, s in zip(shape, strides, strict=True)], dtype=torch.float64)
    low = (torch.rand(count, len(shape), generator=generator, dtype=torch.float64) * 1.4 - 0.4) * extent
    size = torch.rand(count, len(shape), generator=generator, dtype=torch.float64) * extent
    return features, torch.cat((low, low + size + 0.1), 1)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_a_loop_over_points(case: str, samples: int) -> None:
    shape, strides, output = CASES[case]
    features, boxes = features_and_boxes(shape, strides)
    expected = [reference(features.numpy(), box, strides, output, samples) for box in boxes.numpy()]
    found = roi_align(features, boxes, strides, output, samples)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    single = roi_align(features.float(), boxes.float(), strides, output, samples)
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_ramp_is_read_at_the_centres_of_cells(dims: int) -> None:
    """The features hold the image coordinate of their own centre, so each cell reads its own centre."""
    stride, shape, output = 4.0, (11, 13, 12)[:dims], (5, 4, 7)[:dims]
    axes = torch.meshgrid(*[(torch.arange(n) + 0.5) * stride for n in shape], indexing="ij")
    box = torch.tensor([[7.3, 9.1, 5.0][:dims] + [33.8, 40.0, 41.7][:dims]])
    found = roi_align(torch.stack(axes), box, (stride,) * dims, output)[0]
    for axis, cells in enumerate(output):
        low, high = box[0, axis].item(), box[0, dims + axis].item()
        centres = low + (torch.arange(cells) + 0.5) / cells * (high - low)
        along = found[axis].movedim(axis, 0).reshape(cells, -1)
        assert (along - centres[:, None]).abs().max() < 2e-6 * 44  # float32: relative to the coordinate


@pytest.mark.parametrize("case", ["plane", "volume", "one voxel thick", "one voxel"])
def test_gradients_are_right(case: str) -> None:
    shape, strides, output = CASES[case]
    features, boxes = features_and_boxes(tuple(min(n, 4) for n in shape), strides, 2)
    features = features[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, strides, output), features)


def test_groups_of_boxes_do_not_change_a_bit() -> None:
    features, boxes = features_and_boxes((6, 5, 7), (1.0, 1.0, 1.0), 12)
    whole = roi_align(features, boxes, (1.0, 1.0, 1.0), (3, 3, 3))
    assert torch.equal(roi_align(features, boxes, (1.0, 1.0, 1.0), (3, 3, 3), max_bytes=1), whole)
    assert whole.abs().max() > 0


def test_no_boxes_give_no_cells() -> None:
    found = roi_align(torch.zeros(4, 5, 5), torch.zeros(0, 4), (1.0, 1.0), (7, 7))
    assert found.shape == (0, 4, 7, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_single(dtype: torch.dtype) -> None:
    features, boxes = features_and_boxes((9, 7), (4.0, 4.0))
    low = features.to(dtype)
    found = roi_align(low, boxes, (4.0, 4.0), (3, 3))
    assert found.dtype == torch.float32
    assert torch.equal(found, roi_align(low.float(), boxes, (4.0, 4.0), (3, 3)))


def test_boxes_are_read_from_their_own_level_in_their_own_order() -> None:
    fine, boxes = features_and_boxes((12, 12), (2.0, 2.0))
    coarse, _ = features_and_boxes((6, 6), (4.0, 4.0))
    levels = torch.tensor([1, 0, 0, 1, 0, 1])
    found = roi_align_levels([fine, coarse], boxes, levels, [(2.0, 2.0), (4.0, 4.0)], (2, 2))
    for number, level in enumerate(levels.tolist()):
        source, stride = ((fine, 2.0), (coarse, 4.0))[level]
        expected = roi_align(source, boxes[number][None], (stride, stride), (2, 2))[0]
        assert torch.equal(found[number], expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_cropped_mask_equals_the_whole_mask_read_at_once(dims: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (14, 11, 12)[:dims]))
    _, boxes = features_and_boxes(tuple(labels.shape), (1.0,) * dims, 8)
    values = torch.tensor([1, 2, 0, 1, 2, 1, 2, 1])
    found = crop_masks(labels, values, boxes, (4,) * dims)
    for number, value in enumerate(values.tolist()):
        mask = (labels == value)[None].double()
        expected = roi_align(mask, boxes[number][None], (1.0,) * dims, (4,) * dims)[0, 0]
        torch.testing.assert_close(found[number], expected.float(), atol=2e-6, rtol=0)
    assert found.max() > 0.5
