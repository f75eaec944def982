"""The detector as a whole: losses, what they train, and that it learns what it is shown."""

import itertools
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.nets.boxes import box_iou
from medseg.nets.maskrcnn import (
    Detections,
    MaskRCNN,
    class_of,
    convolve,
    landmark_loss,
    level_strides,
    list_objects,
    locate_points,
    make_anchors,
    mask_loss,
    place_points,
)
from tests.nets.detection_scenes import blobs, tiny_architecture, tiny_detection

SHAPES = {2: (48, 48), 3: (24, 32, 32)}


def detector(dims: int, seed: int = 0, **changes: object) -> MaskRCNN:
    torch.manual_seed(seed)
    return MaskRCNN(tiny_architecture(dims), tiny_detection(dims, **changes), 1)  # type: ignore[arg-type]


def losses_of(network: MaskRCNN, images: Tensor, labels: Tensor, seed: int = 0) -> dict[str, Tensor]:
    found = network(images, labels, torch.Generator().manual_seed(seed))
    return cast(dict[str, Tensor], found)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_without_objects_has_finite_losses_and_gradients(dims: int) -> None:
    network = detector(dims)
    images = torch.randn(2, 1, *SHAPES[dims], generator=torch.Generator().manual_seed(0))
    losses = losses_of(network, images, torch.zeros(2, *SHAPES[dims], dtype=torch.int64))
    assert set(losses) == {"proposal", "proposal_box", "class", "box", "mask"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["proposal_box"] == losses["box"] == losses["mask"] == 0
    torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_empty_image_among_others_and_an_object_of_one_voxel_are_no_trouble(dims: int) -> None:
    network = detector(dims)
    image, labels = blobs(SHAPES[dims], 2, np.random.default_rng(0))
    speck = torch.zeros_like(labels)
    speck[(3,) * dims] = 1
    batch = torch.stack([labels, labels * 0, speck])
    losses = losses_of(network, torch.stack([image] * 3), batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["mask"] > 0


def test_the_same_generator_draws_the_same_losses_and_another_does_not() -> None:
    network = detector(2)
    image, labels = blobs(SHAPES[2], 3, np.random.default_rng(0))
    first, again, other = (
        losses_of(network, image[None], labels[None], seed)["proposal"].item() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("dims", [2, 3])
def test_the_other_matcher_and_sampler_give_other_losses(dims: int) -> None:
    image, labels = blobs(SHAPES[dims], 3, np.random.default_rng(0))
    plain = losses_of(detector(dims), image[None], labels[None])["proposal"]
    settings = tiny_detection(dims).proposals
    for change in ({"matcher": "atss"}, {"sampler": "hard"}):
        network = detector(dims, proposals=settings.replace(**change))
        losses = losses_of(network, image[None], labels[None])
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert losses["proposal"] != plain


def test_half_precision_of_a_processor_trains_and_finds() -> None:
    network = detector(2)
    image, labels = blobs(SHAPES[2], 3, np.random.default_rng(0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(network, image[None], labels[None])
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            (found,) = network.eval()(image[None])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert found.masks.dtype == found.boxes.dtype == torch.float32


def test_landmarks_are_learnt_beside_masks() -> None:
    heads = tiny_detection(2).heads.replace(landmarks=2)
    network = detector(2, heads=heads)
    image, labels = blobs(SHAPES[2], 3, np.random.default_rng(0))
    points = torch.full((int(labels.max()) + 1, 2, 2), float("nan"))
    for value in range(1, 4):
        points[value, 0] = (labels == value).nonzero().float().mean(0)
    losses = network(image[None], labels[None], torch.Generator().manual_seed(0), points[None])
    assert losses["landmark"] > 0 and torch.isfinite(losses["landmark"])
    assert network(image[None], labels[None])["landmark"] == 0
    (found,) = network.eval()(image[None])
    assert found.points.shape == (len(found.scores), 2, 2)


def test_only_the_true_class_of_the_mask_head_has_a_gradient() -> None:
    logits = torch.zeros(3, 4, 2, 2, requires_grad=True)
    loss = mask_loss(logits, torch.ones(3, 2, 2, dtype=torch.bool), torch.tensor([1, 3, 1]))
    assert loss.item() == pytest.approx(np.log(2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    moved = {(k, c) for k, c in itertools.product(range(3), range(4)) if (logits.grad[k, c] != 0).any()}
    assert moved == {(0, 1), (1, 3), (2, 1)}


def test_anchors_stand_around_the_centres_of_their_cells() -> None:
    anchors = make_anchors((2, 3, 2), (1, 4, 4), [(2, 8, 8), (4, 4, 4)])
    assert anchors.shape == (24, 6)
    assert anchors[0].tolist() == [-0.5, -2, -2, 1.5, 6, 6]
    assert anchors[-1].tolist() == [-0.5, 8, 4, 3.5, 12, 8]


def test_strides_are_the_products_of_the_encoders() -> None:
    assert level_strides(tiny_architecture(3), tiny_detection(3)) == ((2, 2, 2), (4, 4, 4), (8, 8, 8))
    settings = tiny_detection(2, finest_stage=1, extra_level=False)
    assert level_strides(tiny_architecture(2), settings) == ((2, 2), (4, 4))


def test_regions_go_to_the_level_whose_anchors_are_nearest_in_size() -> None:
    architecture = tiny_architecture(2)
    settings = tiny_detection(2, finest_stage=1, anchors=(((8.0, 8.0),), ((16.0, 16.0),), ((32.0, 32.0),)))
    network = MaskRCNN(architecture, settings, 1)
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 11, 11], [0, 0, 12, 12], [0, 0, 99, 99], [0, 0, 4, 16]])
    assert network.assign(boxes).tolist() == [0, 0, 1, 1, 0]


def test_objects_of_a_label_map_have_boxes_classes_and_a_least_size() -> None:
    labels = torch.zeros(6, 8, dtype=torch.int16)
    labels[1:3, 2:5], labels[5, 7] = 4, 1
    found = list_objects(labels, 3, least_voxels=2)
    assert found.values.tolist() == [4]
    assert found.classes.tolist() == class_of(torch.tensor([4]), 3).tolist() == [0]
    assert found.boxes.tolist() == [[1, 2, 3, 5]]
    assert found.dropped == 1
    assert list_objects(labels * 0, 3).boxes.shape == (0, 4)


def test_landmarks_go_to_cells_and_back() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 4], [2, 2, 6, 6]])
    points = torch.tensor([[[1.0, 3.0], [7.9, 0.1]], [[float("nan"), 0], [7.0, 3]]])
    cells = locate_points(points, boxes, (4, 4))
    assert cells.tolist() == [[3, 12], [-1, -1]]
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 0, 0, 3] = logits[0, 1, 3, 0] = 50
    assert landmark_loss(logits, cells).item() == pytest.approx(0, abs=1e-6)
    assert place_points(logits, boxes)[0].tolist() == [[1, 3.5], [7, 0.5]]
    assert landmark_loss(logits, torch.full((2, 2), -1)) == 0


def overlap_of_masks(found: Detections, labels: Tensor) -> list[float]:
    """Return the best IoU of every object with a mask that is drawn as it will be in label maps."""
    from medseg.instances.paste import paste_masks

    pasted = paste_masks(found.boxes, found.masks, found.scores, tuple(labels.shape)).labels
    result = []
    for value in np.unique(labels[labels > 0]):
        mask = labels.numpy() == value
        inside, counts = np.unique(pasted[mask], return_counts=True)
        best = max(
            (n / (mask.sum() + (pasted == k).sum() - n) for k, n in zip(inside, counts, strict=True) if k),
            default=0.0,
        )
        result.append(float(best))
    return result


@pytest.mark.parametrize(
    ("dims", "steps", "n_classes", "count", "radii"),
    [(2, 150, 2, 3, (0.11, 0.17)), (3, 100, 1, 2, (0.17, 0.22))],
)
def test_it_learns_four_images_by_heart(
    dims: int, steps: int, n_classes: int, count: int, radii: tuple[float, float]
) -> None:
    rng = np.random.default_rng(3)
    scenes = [blobs(SHAPES[dims], count, rng, n_classes, radii) for _ in range(4)]
    images, labels = (torch.stack(part) for part in zip(*scenes, strict=True))
    network = detector(dims, n_classes=n_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        loss = torch.stack([*losses_of(network, images, labels, step).values()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        found = cast(list[Detections], network(images))
    for each, wanted in zip(found, labels, strict=True):
        sure = each.scores > 0.5
        kept = Detections(each.boxes[sure], each.scores[sure], each.classes[sure], each.masks[sure])
        assert len(kept.scores) == count
        assert min(overlap_of_masks(kept, wanted)) > 0.9
        objects = list_objects(wanted, n_classes)
        best = box_iou(objects.boxes, kept.boxes).max(1)
        assert best.values.min() > 0.8
        assert torch.equal(kept.classes[best.indices], objects.classes)


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 3, 3), (1, 4, 4)])
def test_half_precision_learns_the_same_from_levels_of_any_depth(shape: tuple[int, ...]) -> None:
    conv = torch.nn.Conv3d(16, 16, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    image, goal = (torch.randn((2, 16, *shape), generator=generator) for _ in range(2))
    gradients = []
    for half in (False, True):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = convolve(conv, image)
        (out.float() * goal).sum().backward()
        assert conv.weight.grad is not None
        gradients.append(conv.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() < 0.05 * gradients[0].abs().max()
