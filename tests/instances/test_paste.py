"""Masks drawn into one label map."""

import numpy as np
import pytest
import torch

from medseg.instances.dropped import Dropped
from medseg.instances.paste import mask_window, paste_masks


@pytest.mark.parametrize("dims", [2, 3])
def test_a_full_mask_fills_the_voxels_of_its_box(dims: int) -> None:
    box = torch.tensor([2.0, 3, 1][:dims] + [5.0, 7, 6][:dims])
    shape = (8, 9, 7)[:dims]
    pasted = paste_masks(box[None], torch.ones(1, *(28,) * dims), torch.tensor([0.9]), shape)
    expected = np.zeros(shape, np.int32)
    expected[tuple(slice(int(a), int(b)) for a, b in zip(box[:dims], box[dims:], strict=True))] = 1
    assert pasted.labels.dtype == np.int32
    np.testing.assert_array_equal(pasted.labels, expected)


def test_a_mask_is_read_at_the_centres_of_voxels() -> None:
    """Half of the cells are object: so are the voxels whose centres lie in that half."""
    mask = torch.zeros(28, 28)
    mask[:, 14:] = 1
    window, inside = mask_window(torch.tensor([0.0, 0.0, 4.0, 11.0]), mask, (20, 20))
    drawn = np.zeros((20, 20), bool)
    drawn[window] = inside
    assert np.flatnonzero(drawn.any(0)).tolist() == [5, 6, 7, 8, 9, 10]  # 5.5 is on the edge itself
    assert np.flatnonzero(drawn.any(1)).tolist() == [0, 1, 2, 3]


def test_better_objects_hide_worse_ones_and_equals_keep_their_order() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0.0, 2, 4, 6], [0.0, 4, 4, 8]])
    masks = torch.ones(3, 4, 4)
    pasted = paste_masks(boxes, masks, torch.tensor([0.5, 0.9, 0.5]), (4, 8))
    assert pasted.order.tolist() == [1, 0, 2]
    assert pasted.labels[0].tolist() == [2, 2, 1, 1, 1, 1, 3, 3]
    assert pasted.dropped == ()


def test_what_is_hidden_or_empty_is_left_out_and_counted() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [1.0, 1, 3, 3], [5.0, 5, 8, 8], [9.0, 9, 12, 12]])
    masks = torch.ones(4, 4, 4)
    masks[2] = 0.2
    pasted = paste_masks(boxes, masks, torch.tensor([0.9, 0.8, 0.7, 0.6]), (8, 8))
    assert pasted.order.tolist() == [0]
    assert pasted.labels.max() == 1
    assert pasted.dropped == (
        Dropped("hidden by objects of higher score", 1, 4),
        Dropped("mask without a voxel", 2, 0),
    )


def test_boxes_that_reach_outside_are_cut() -> None:
    pasted = paste_masks(torch.tensor([[-3.0, 6, 4, 20]]), torch.ones(1, 7, 7), torch.ones(1), (5, 8))
    assert pasted.labels.sum() == 4 * 2


def test_nothing_is_drawn_without_masks() -> None:
    pasted = paste_masks(torch.zeros(0, 6), torch.zeros(0, 7, 7, 7), torch.zeros(0), (3, 4, 5))
    assert pasted.labels.shape == (3, 4, 5) and not pasted.labels.any()
    assert pasted.order.tolist() == []
