"""Tiles over a whole image: every object once, whatever tiles cut it."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.geometry.boxes import label_boxes
from medseg.geometry.tiles import tile_slices
from medseg.instances.detect import Found, coverage, find_objects, move_masks, place_weight
from medseg.instances.paste import paste_masks
from medseg.nets.boxes import clip_boxes
from medseg.nets.maskrcnn import Detections, MaskRCNN, class_of
from medseg.nets.roi_align import crop_masks
from medseg.plan.detection import FindSettings
from medseg.types import IntArray

CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Finds in a tile just what is in it: its image is the label map, values as of a detector's."""

    def __init__(self, n_classes: int = 1, cells: int = 14) -> None:
        super().__init__()
        self.n_classes, self.cells = n_classes, cells

    def forward(self, images: Tensor) -> list[Detections]:
        return [self.look(image[0].long()) for image in images]

    def look(self, labels: Tensor) -> Detections:
        values, boxes = (torch.from_numpy(part) for part in label_boxes(labels.numpy()))
        sizes = torch.tensor([(labels == value).sum().item() for value in values]).float()
        order = torch.argsort(sizes, descending=True)
        values, boxes = values[order], boxes[order]
        masks = crop_masks(labels, values, boxes, (self.cells,) * labels.ndim)
        scores = 0.5 + sizes[order] / (2 * sizes.max()) if len(sizes) else sizes
        return Detections(boxes, scores, class_of(values, self.n_classes), masks)


def cells(shape: tuple[int, ...], radius: float, n_classes: int, seed: int = 0) -> IntArray:
    """Return discs or balls on a jittered lattice, that do not touch."""
    rng = np.random.default_rng(seed)
    pitch = 2 * radius + 4
    labels = np.zeros(shape, np.int64)
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij"))
    places = np.stack(np.meshgrid(*[np.arange(pitch / 2, n, pitch) for n in shape], indexing="ij"), -1)
    for number, place in enumerate(places.reshape(-1, len(shape))):
        centre = place + rng.uniform(-1, 1, len(shape))
        inside = ((grid - centre.reshape(-1, *[1] * len(shape))) ** 2).sum(0) <= radius**2
        labels[inside] = 1 + number % n_classes + n_classes * number
    return labels


def find(labels: IntArray, patch: tuple[int, ...], n_classes: int) -> Found:
    data = labels[None].astype(np.float32)
    oracle = cast(MaskRCNN, Oracle(n_classes))
    return find_objects(oracle, data, patch, FindSettings(), CPU)


@pytest.mark.parametrize(
    ("shape", "patch", "radius"),
    [((70, 83), (32, 32), 6.0), ((83, 41), (40, 64), 8.0), ((20, 40, 45), (16, 24, 24), 5.0)],
)
def test_each_object_is_found_once_with_its_class_box_and_mask(
    shape: tuple[int, ...], patch: tuple[int, ...], radius: float
) -> None:
    labels = cells(shape, radius, 2)
    values, _ = label_boxes(labels)
    found = find(labels, patch, 2)
    assert found.shape == shape
    assert len(found.scores) == len(values) >= 8
    pasted = paste_masks(found.boxes, found.masks, found.scores, shape)
    classes = class_of(torch.from_numpy(values), 2)
    for value, kind in zip(values.tolist(), classes.tolist(), strict=True):
        mask = labels == value
        best = np.bincount(pasted.labels[mask]).argmax()
        same = pasted.labels == best
        assert best and (mask & same).sum() / (mask | same).sum() > 0.8
        assert found.classes[pasted.order[best - 1]] == kind


def test_an_object_larger_than_the_overlap_of_tiles_is_still_one_in_the_one_tile_that_holds_it() -> None:
    labels = np.zeros((64, 40), np.int64)
    labels[3:30, 8:30] = 1  # whole in the first tile, cut by the second
    found = find(labels, (32, 40), 1)
    assert len(found.scores) == 1
    np.testing.assert_allclose(found.boxes.numpy(), [[3, 8, 30, 30]], atol=0.01)


def test_of_parts_that_no_tile_sees_whole_the_largest_stands_for_the_object() -> None:
    labels = np.zeros((64, 40), np.int64)
    labels[10:50, 8:30] = 1  # tiles of 32 rows see 22, 32 and 18 of its 40 rows
    found = find(labels, (32, 40), 1)
    assert len(found.scores) == 1
    np.testing.assert_allclose(found.boxes.numpy(), [[16, 8, 48, 30]], atol=0.01)


def test_an_image_smaller_than_the_patch_is_padded_and_its_objects_are_where_they_were() -> None:
    labels = np.zeros((20, 50), np.int64)
    labels[4:12, 30:44] = 1
    found = find(labels, (32, 32), 1)
    np.testing.assert_allclose(found.boxes.numpy(), [[4, 30, 12, 44]], atol=0.01)


def test_nothing_is_found_where_there_is_nothing() -> None:
    found = find(np.zeros((50, 50), np.int64), (32, 32), 1)
    assert (found.boxes.shape, found.masks.shape) == ((0, 4), (0, 14, 14))
    assert found.above(0.5).on((100, 100)).boxes.shape == (0, 4)


def test_coverage_is_the_mean_number_of_tiles_inside_the_box() -> None:
    shape = (50, 61)
    tiles = tile_slices(shape, (24, 24))
    counts = np.zeros(shape)
    for tile in tiles:
        counts[tile] += 1
    boxes = torch.tensor([[0.0, 0, 50, 61], [3, 7, 20, 8], [30, 30, 44, 60]])
    expected = [
        counts[int(a) : int(c), int(b) : int(d)].mean() for a, b, c, d in clip_boxes(boxes, shape).tolist()
    ]
    np.testing.assert_allclose(coverage(boxes, tiles, shape).numpy(), expected, rtol=1e-6)


def test_boxes_in_the_middle_of_a_tile_weigh_most() -> None:
    boxes = torch.tensor([[8.0, 8, 24, 24], [0, 8, 8, 24], [0, 0, 4, 4]])
    middle, side, corner = place_weight(boxes, torch.tensor([32.0, 32.0])).tolist()
    assert middle == 1 > side > corner > 0
    assert side == pytest.approx((np.exp(-0.5 * (12 / (0.8 * 16)) ** 2) + 1) / 2)


def test_a_mask_moved_to_another_box_stays_where_it_is_in_the_image() -> None:
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    boxes = torch.tensor([[0.0, 0, 8, 8]] * 2)
    same, moved = move_masks(mask.expand(2, 8, 8), boxes, torch.tensor([[0.0, 0, 8, 8], [0.0, 4, 8, 12]]))
    assert torch.equal(same, mask)
    assert moved[4].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
