"""From the maps of a network to objects on the voxels of the image; perfect maps stand for a network."""

from typing import Any

import numpy as np
import pytest
import torch

from medseg.errors import ConfigError, DataError
from medseg.instances import centre_model as module
from medseg.instances.centre_model import (
    CentreNetwork,
    CentreSettings,
    Maps,
    channels_first,
    group_maps,
    largest_parts,
    prepare_image,
)
from medseg.instances.centre_targets import make_targets
from medseg.instances.diameter import SMALLEST, estimate_diameter
from medseg.instances.rescale import Grid, labels_to_grid, normalise, read_slab, to_grid
from medseg.io.channels import set_channels
from tests.instances.test_centres import cells, same_partition

SETTINGS = CentreSettings(object_voxels=10.0)


def maps_of(labels: np.ndarray, spacing: tuple[float, ...], voxel: float) -> Maps:
    """What a perfect network says on its own grid."""
    grid = Grid.of(labels.shape, spacing, voxel)
    small = labels_to_grid(labels, grid.shape)
    targets = make_targets(small, grid.spacing)
    values = np.concatenate([(small > 0)[None], targets.distance[None], targets.offset])
    return Maps(grid, values.astype(np.float16))


def spread_cells(shape: tuple[int, ...], spacing: tuple[float, ...], diameter: float) -> np.ndarray:
    """Touching cells of about one diameter."""
    content = np.prod(np.array(shape) * spacing) / (0.8 * diameter) ** len(shape)
    return cells(shape, max(3, int(content)), spacing, seed=1)


CASES = [((90, 100), (1.0, 1.0), 14.0), ((90, 100), (0.5, 0.8), 9.0), ((24, 50, 48), (2.0, 1.0, 1.0), 16.0)]


@pytest.mark.parametrize(("shape", "spacing", "diameter"), CASES)
def test_perfect_maps_of_a_coarser_grid_give_back_the_objects(
    shape: tuple[int, ...], spacing: tuple[float, ...], diameter: float
) -> None:
    labels = spread_cells(shape, spacing, diameter)
    found = group_maps(maps_of(labels, spacing, diameter / 10), diameter, SETTINGS)
    assert found.labels.shape == shape and found.labels.max() == len(found.scores)
    same = (found.labels > 0) == (labels > 0)
    assert same.mean() > 0.9
    pairs = np.unique(np.stack([labels[labels > 0], found.labels[labels > 0]]), axis=1, return_counts=True)
    best = sum(pairs[1][pairs[0][0] == number].max() for number in np.unique(labels)[1:])
    assert best / np.count_nonzero(labels) > 0.85


@pytest.mark.parametrize(("shape", "spacing", "diameter"), CASES)
def test_slabs_give_what_the_whole_gives(
    shape: tuple[int, ...], spacing: tuple[float, ...], diameter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = maps_of(spread_cells(shape, spacing, diameter), spacing, diameter / 10)
    whole = group_maps(maps, diameter, SETTINGS)
    for rows in (1, 5, 17):
        monkeypatch.setattr(module, "SLAB", rows * int(np.prod(shape[1:])))
        parts = group_maps(maps, diameter, SETTINGS)
        assert (parts.labels == whole.labels).all()
        assert parts.scores == pytest.approx(whole.scores, abs=1e-6) and parts.dropped == whole.dropped


def test_what_is_dropped_is_counted_by_its_rule() -> None:
    labels = np.zeros((60, 60), np.int32)
    labels[5:20, 5:20], labels[30:45, 30:45], labels[50:52, 50:52] = 1, 2, 3
    maps = maps_of(labels, (1.0, 1.0), 1.0)
    maps.values[0][labels == 2] = 0.55
    settings = SETTINGS.replace(least_content=0.05, least_score=0.7, least_votes=0.0)
    found = group_maps(maps, 15.0, settings)
    assert {d.rule: (d.count, d.voxels) for d in found.dropped} == {
        "smaller than 8.8 voxels": (1, 4),
        "low score": (1, 225),
    }
    assert same_partition(found.labels, np.where(labels == 1, 1, 0)) and found.scores.tolist() == [1.0]


def test_an_object_is_connected_and_the_rest_of_it_is_counted() -> None:
    labels = np.zeros((6, 12), np.int32)
    labels[0:3, 0:4], labels[5, 0:2], labels[0, 10:12], labels[2, 4] = 4, 4, 4, 2
    kept, lost = largest_parts(labels)
    assert (
        kept
        == np.where(np.indices(labels.shape)[0] < 4, np.where(np.indices(labels.shape)[1] < 5, labels, 0), 0)
    ).all()
    assert (lost.count, lost.voxels) == (2, 4)
    nothing, none = largest_parts(np.zeros((3, 3, 3), np.int32))
    assert not nothing.any() and none.count == 0


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 7)])
def test_an_image_without_objects_has_none(shape: tuple[int, ...]) -> None:
    empty = np.zeros(shape, np.int32)
    found = group_maps(maps_of(empty, (1.0,) * len(shape), 1.0), 10.0, SETTINGS)
    assert not found.labels.any() and len(found.scores) == 0 and not found.dropped
    one = np.ones(shape, np.int32)
    assert (group_maps(maps_of(one, (1.0,) * len(shape), 1.0), 8.0, SETTINGS).labels == one).all()


def ideal_network(voxels: float, known_factor: float = 2.0) -> CentreNetwork:
    """Stands for a network: it says what is true of an image of 0 and 1, but knows one size of objects."""

    def call(batch: torch.Tensor) -> torch.Tensor:
        outputs = []
        for image in batch[:, 0].numpy():
            import cc3d

            labels = np.asarray(cc3d.connected_components(image > 0.5, connectivity=8), np.int32)
            sizes = np.bincount(labels.ravel())
            known = 2 * np.sqrt(sizes / np.pi)
            labels[~((known > voxels / known_factor) & (known < voxels * known_factor))[labels]] = 0
            targets = make_targets(labels, (1.0, 1.0))
            logit = np.where(labels > 0, 10.0, -10.0)
            outputs.append(
                np.concatenate(
                    [-logit[None], logit[None], targets.distance[None], targets.offset * 2 / voxels]
                )
            )
        return torch.from_numpy(np.stack(outputs).astype(np.float32))

    settings = CentreSettings(object_voxels=voxels)
    return CentreNetwork(call, 1, (64, 64), settings, torch.device("cpu"), 1)


@pytest.mark.parametrize("radius", [5, 9, 26])
def test_the_size_of_objects_is_that_at_which_the_network_agrees_with_itself(radius: int) -> None:
    y, x = np.indices((240, 250))
    image = np.zeros((1, 240, 250), np.float32)
    for middle in ((60, 60), (150, 70), (170, 180), (70, 190)):
        image[0, (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < radius**2] = 1
    network = ideal_network(12.0)
    diameter = estimate_diameter(network, image, (1.0, 1.0))
    assert diameter == pytest.approx(2 * radius, rel=0.15)
    assert estimate_diameter(network, image * 0, (1.0, 1.0)) is None
    found = network.find(image, (1.0, 1.0), 2.0 * radius)
    assert len(found.scores) == 4


def test_specks_are_not_taken_for_objects_that_need_a_huge_image() -> None:
    specks = np.zeros((1, 96, 96), np.float32)
    for row, column in ((3, 3), (3, 4), (4, 3), (4, 4)):
        specks[0, row::12, column::12] = 1
    weak = ideal_network(12.0, known_factor=1000.0)  # takes specks, 2.3 pixels wide, for objects
    assert estimate_diameter(weak, specks, (0.5, 0.5)) == SMALLEST * 0.5


def test_shrinking_averages_and_growing_is_linear() -> None:
    ramp = np.arange(24, dtype=np.float32).reshape(1, 4, 6) ** 1
    assert to_grid(ramp, (2, 3))[0, 0] == pytest.approx([3.5, 5.5, 7.5])
    rng = np.random.default_rng(0)
    image = rng.random((2, 17, 11, 5)).astype(np.float32)
    small = to_grid(image, (6, 11, 4))
    assert small.shape == (2, 6, 11, 4)
    assert small.mean(axis=(1, 2, 3)) == pytest.approx(image.mean(axis=(1, 2, 3)), abs=1e-5)
    flat = np.broadcast_to(np.arange(8, dtype=np.float32), (1, 3, 8))
    assert to_grid(flat, (3, 16))[0, 1, 2:14] == pytest.approx(np.arange(2, 14) / 2 - 0.25)


def test_maps_are_read_back_where_they_were_made() -> None:
    grid = Grid.of((40, 33), (0.5, 1.0), 1.7)
    y, x = (((np.arange(n) + 0.5) * s) for n, s in zip(grid.shape, grid.spacing, strict=True))
    maps = np.stack([np.add.outer(y, 0 * x), np.add.outer(0 * y, x)]).astype(np.float32)
    slab = read_slab(maps, grid, 10, 30)
    assert slab.shape == (2, 20, 33)
    assert slab[0, :, 5] == pytest.approx((np.arange(10, 30) + 0.5) * 0.5, abs=1e-4)
    assert slab[1, 3, 2:-2] == pytest.approx(np.arange(33)[2:-2] + 0.5, abs=1e-4)


@pytest.mark.parametrize(
    "dtype", [bool, np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64]
)
def test_every_dtype_is_brought_to_the_same_range(dtype: Any) -> None:
    image = (np.arange(200).reshape(1, 10, 20) % 2).astype(dtype)
    shown = normalise(image)
    assert shown.dtype == np.float32 and shown.min() == 0 and shown.max() == 1
    assert not normalise(np.full((1, 4, 4), 7, np.uint8)).any()
    spot = np.zeros((1, 100, 100), np.uint16)
    spot[0, 5, 5] = 60_000
    assert normalise(spot).max() == 1


def test_odd_images_are_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match="NaN"):
        normalise(np.array([[[0.0, np.nan]]]))
    with pytest.raises(DataError, match="real numbers"):
        normalise(np.zeros((1, 2, 2), complex))
    with pytest.raises(ConfigError, match="5 channels"):
        set_channels(np.zeros((5, 4, 4)), 1)
    with pytest.raises(ConfigError, match="axes"):
        channels_first(np.zeros((2, 2, 2, 2)), 2)
    with pytest.raises(ConfigError, match="channel_axis"):
        channels_first(np.zeros((30, 40, 50)), 2)


def test_channels_are_found_and_made_to_fit() -> None:
    network = ideal_network(10.0)
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (20, 30), dtype=np.uint8)
    first = prepare_image(grey, network)
    assert first.shape == (1, 20, 30)
    for image, axis in (
        (np.stack([grey] * 3, -1), None),
        (np.stack([grey] * 3), None),
        (np.stack([grey] * 3, 1), 1),
    ):
        assert (prepare_image(image, network, axis) == first).all()
    alpha = np.stack([grey, grey, grey, np.full_like(grey, 255)], -1)
    assert prepare_image(alpha, network).shape == (1, 20, 30)
    assert set_channels(first, 3).shape == (3, 20, 30)
