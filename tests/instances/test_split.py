"""Splitting masks, label maps and height maps: every method, every shape of input."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medseg.config import Config
from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.instances.basins import find_basins
from medseg.instances.components import label_components
from medseg.instances.distance import distance_map, label_distances
from medseg.instances.flood import flood
from medseg.instances.sizes import remove_small
from medseg.instances.split import SPLITTERS, BasinsConfig, ComponentsConfig, WatershedConfig, split
from medseg.types import FloatArray
from tests.instances.volumes import discs, integer_heights, same_partition, structure

PAIR = discs((24, 40), [(12.0, 12.0), (12.0, 27.0)], 8.4, (1.0, 1.0))


@pytest.mark.parametrize("method", SPLITTERS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_splitter_finds_separate_objects_and_keeps_the_foreground(method: str, ndim: int) -> None:
    centres: list[tuple[float, ...]] = [(7.0, 7.0, 7.0)[:ndim], (18.0, 18.0, 18.0)[:ndim]]
    mask = discs((25, 25, 25)[:ndim], centres, 4.3, (1.0, 1.0, 1.0)[:ndim])
    found = split(mask, (1.0, 1.0, 1.0)[:ndim], method)
    assert found.count == found.labels.max() == 2
    assert found.labels.dtype == np.int32
    assert np.array_equal(found.labels > 0, mask)
    assert not found.dropped


@pytest.mark.parametrize("method", ["basins", "watershed"])
def test_touching_objects_are_cut_at_their_neck(method: str) -> None:
    found = split(PAIR, (1.0, 1.0), method)
    assert split(PAIR, (1.0, 1.0), "components").count == 1
    assert found.count == 2
    assert len(np.unique(found.labels[:, :19][PAIR[:, :19]])) == 1
    assert len(np.unique(found.labels[:, 20:][PAIR[:, 20:]])) == 1


def test_spacing_decides_what_a_neck_is() -> None:
    # The same pixels: round bodies with a neck, or long ones whose ends hardly narrow.
    assert split(PAIR, (1.0, 1.0), config=BasinsConfig(h=2.0)).count == 2
    assert split(PAIR, (0.3, 3.0), config=BasinsConfig(h=2.0)).count == 1
    assert split(PAIR, (10.0, 10.0), config=BasinsConfig(h=20.0)).count == 2


def test_anisotropic_balls_are_counted_in_mm() -> None:
    spacing = (3.0, 1.0, 1.0)
    mask = discs((12, 40, 60), [(18.0, 20.0, 20.0), (18.0, 20.0, 39.0)], 11.0, spacing)
    assert split(mask, spacing, config=BasinsConfig(h=0.75)).count == 2


def test_labels_are_split_each_by_itself_and_gaps_are_no_objects() -> None:
    labels = np.zeros((24, 84), dtype=np.uint16)
    labels[:, :40][PAIR] = 3
    labels[:, 40:80][PAIR] = 65535
    labels[3, 82] = 9
    labels[:, 36:44][labels[:, 36:44] > 0] = 3
    found = split(labels, (1.0, 1.0))
    assert sorted(found.sources.tolist()) == [3, 3, 9, 65535, 65535]
    for number, source in enumerate(found.sources, start=1):
        assert set(np.unique(labels[found.labels == number])) == {source}
    assert np.array_equal(found.labels > 0, labels > 0)


def test_two_labels_that_touch_stay_two_whatever_the_method() -> None:
    labels = np.ones((6, 8), dtype=np.int64)
    labels[:, 4:] = 5_000_000_000
    for method in SPLITTERS:
        found = split(labels, (1.0, 1.0), method)
        assert found.sources.tolist() == [1, 5_000_000_000], method
        assert same_partition(found.labels, labels)


@pytest.mark.parametrize("method", SPLITTERS)
def test_one_object_that_touches_every_border_is_one(method: str) -> None:
    for shape in ((5, 6), (4, 5, 6), (1, 7), (3, 1, 4)):
        found = split(np.ones(shape, dtype=bool), (1.0,) * len(shape), method)
        assert found.count == 1 and (found.labels == 1).all()


@pytest.mark.parametrize("method", SPLITTERS)
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32])
def test_an_empty_image_has_no_objects(method: str, dtype: type) -> None:
    config = SPLITTERS[method][0].from_dict({} if method == "components" else {"h": 0.5})
    found = split(np.zeros((4, 5, 6), dtype=dtype), (1.0, 1.0, 1.0), method, config)
    assert found.count == 0 and not found.labels.any() and found.sources.size == 0


@pytest.mark.parametrize("method", ["basins", "components"])
def test_a_hundred_thousand_objects_have_a_number_each(method: str) -> None:
    mask = np.zeros((640, 640), dtype=bool)
    mask[::2, ::2] = True
    found = split(mask, (1.0, 1.0), method)
    assert found.count == 320 * 320 > 100_000
    assert np.array_equal(found.labels[mask], np.arange(1, found.count + 1))


def test_a_height_map_is_split_by_its_own_values() -> None:
    probability = np.array([[0.1, 0.9, 0.6, 0.8, 0.4, 0.9]])
    found = split(probability, (1.0, 1.0), config=BasinsConfig(h=0.15, floor=0.5))
    assert found.labels.tolist() == [[0, 1, 1, 2, 0, 3]]
    assert split(probability, (1.0, 1.0), config=BasinsConfig(h=0.25, floor=0.5)).count == 2
    assert split(probability, (1.0, 1.0), config=BasinsConfig(rel=0.3, floor=0.5)).count == 2
    assert split(probability, (1.0, 1.0), "components", ComponentsConfig(floor=0.7)).count == 3


@pytest.mark.parametrize("method", ["basins", "watershed"])
def test_a_height_map_without_a_depth_is_a_question(method: str) -> None:
    with pytest.raises(ConfigError, match="how deep must the valley"):
        split(np.ones((3, 3)), (1.0, 1.0), method)


def test_another_depth_needs_no_second_climb() -> None:
    basins = find_basins(distance_map(PAIR, (1.0, 1.0)))
    for h in (0.0, 0.5, 2.0, 5.0, 20.0):
        assert np.array_equal(basins.labels(h), split(PAIR, (1.0, 1.0), config=BasinsConfig(h=h)).labels)


def test_small_objects_are_removed_by_volume_and_reported() -> None:
    mask = np.zeros((10, 10, 10), dtype=bool)
    mask[1:4, 1:4, 1:4] = True
    mask[6, 6, 6] = mask[8, 8, 8] = mask[8, 8, 9] = True
    found = split(mask, (1.0, 0.5, 2.0), "components", min_volume=2.5)
    assert found.count == 1
    assert [(d.rule, d.count, d.voxels) for d in found.dropped] == [("smaller than 2.5", 2, 3)]
    assert split(mask, (1.0, 0.5, 2.0), "components", min_volume=2.0).count == 2


@settings(max_examples=30, deadline=None)
@given(integer_heights(), st.floats(0, 6))
def test_what_is_removed_and_what_stays_are_all(height: FloatArray, least: float) -> None:
    labels = height.astype(np.int32)
    result, kept, dropped = remove_small(labels, least, 1.0)
    assert (result > 0).sum() + sum(d.voxels for d in dropped) == (labels > 0).sum()
    assert len(kept) + sum(d.count for d in dropped) == len(np.unique(labels[labels > 0]))
    assert np.array_equal(np.append(0, kept)[result], np.where(result > 0, labels, 0))
    assert np.array_equal(np.bincount(labels.ravel())[kept], np.bincount(result.ravel())[1:])


@settings(max_examples=40, deadline=None)
@given(integer_heights(), st.booleans())
def test_components_are_those_of_scipy_numbered_by_their_first_voxel(height: FloatArray, faces: bool) -> None:
    from scipy.ndimage import label

    connectivity = {2: (8, 4), 3: (26, 6)}[height.ndim][faces]
    mask = height > 3
    ours = label_components(mask, connectivity)
    assert ours.dtype == np.int32
    assert same_partition(ours, label(mask, structure(height.ndim, connectivity))[0])
    values, first = np.unique(ours, return_index=True)
    assert (np.diff(first[values > 0]) > 0).all()


@settings(max_examples=20, deadline=None)
@given(integer_heights())
def test_components_never_join_two_labels(height: FloatArray) -> None:
    labels = height.astype(np.uint8)
    ours = label_components(labels)
    for value in np.unique(labels[labels > 0]):
        part = np.where(labels == value, ours, 0)
        assert same_partition(part, label_components(labels == value))


@settings(max_examples=40, deadline=None)
@given(integer_heights(), st.booleans())
def test_a_flood_takes_everything_that_its_markers_reach(height: FloatArray, faces: bool) -> None:
    connectivity = {2: (8, 4), 3: (26, 6)}[height.ndim][faces]
    markers = np.where(height >= height.max(), np.arange(height.size).reshape(height.shape) + 7, 0)
    flooded = flood(height, markers, connectivity=connectivity)
    reached = label_components(height > 0, connectivity)
    marked = np.unique(reached[(markers > 0) & (height > 0)])
    assert np.array_equal(flooded > 0, (reached > 0) & np.isin(reached, marked))
    assert np.array_equal(flooded[(markers > 0) & (height > 0)], markers[(markers > 0) & (height > 0)])


@pytest.mark.parametrize("connectivity", [8, 4])
def test_a_flood_is_the_watershed_of_scikit_image_where_no_heights_are_equal(connectivity: int) -> None:
    from skimage.segmentation import watershed

    rng = np.random.default_rng(5)
    height = (rng.permutation(60 * 70).reshape(60, 70) + 1).astype(np.float32)
    markers = np.where(rng.random(height.shape) < 0.01, rng.integers(1, 99, height.shape), 0)
    mask = height > 300
    theirs = watershed(-height, markers, structure(2, connectivity), mask=mask)
    assert np.array_equal(flood(height, markers, 300.0, connectivity), theirs)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.5, 0.7)])
def test_distances_are_those_of_scipy(spacing: tuple[float, ...]) -> None:
    from scipy.ndimage import distance_transform_edt

    mask = np.random.default_rng(1).random((9, 17, 13)) < 0.9
    expected = distance_transform_edt(mask, spacing)
    assert np.allclose(distance_map(mask, spacing), expected, rtol=1e-6)
    assert np.allclose(distance_map(mask, spacing, cap=1.2), np.minimum(expected, 1.2), rtol=1e-6)
    assert np.array_equal(distance_map(np.asfortranarray(mask), spacing), distance_map(mask, spacing))


@given(integer_heights(), st.sampled_from([np.uint8, np.int32, np.uint64]), st.floats(0.1, 9.0))
def test_distances_of_labels_are_those_of_each_alone(height: FloatArray, dtype: type, size: float) -> None:
    labels, spacing = height.astype(dtype), (size, *[1.0] * (height.ndim - 1))
    assume(labels.min() != labels.max())
    found = label_distances(labels, spacing)
    for value in np.unique(labels[labels > 0]):
        alone = distance_map(labels == value, spacing)
        assert np.array_equal(np.where(labels == value, found, 0), alone)


@given(integer_heights())
def test_labels_are_split_alike_one_by_one_and_in_one_sweep(height: FloatArray) -> None:
    labels, spacing = (
        np.kron(height.astype(np.int32), np.ones([3] * height.ndim, np.int32)),
        [1.0] * height.ndim,
    )
    found = []
    for start in (-(10**9), 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("medseg.instances.split._START", start)
            found.append(split(labels, spacing))
    assert np.array_equal(found[0].labels, found[1].labels)
    assert np.array_equal(found[0].sources, found[1].sources)


def test_without_background_every_distance_is_the_diagonal() -> None:
    assert np.unique(distance_map(np.ones((3, 4)), (1.0, 1.0))).tolist() == [5.0]
    assert np.unique(distance_map(np.ones((3, 4)), (1.0, 1.0), cap=2.0)).tolist() == [2.0]


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("basin", None, "is unknown. Use one of basins, watershed, components"),
        ("basins", ComponentsConfig(), "takes a BasinsConfig"),
        ("basins", WatershedConfig(), "takes a BasinsConfig"),
        ("components", ComponentsConfig(connectivity=7), "connectivity 7 in 2 dimensions"),
        ("basins", BasinsConfig(connectivity=18), "connectivity 18 in 2 dimensions"),
    ],
)
def test_a_wrong_setting_is_one_sentence(method: str, config: Config | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(PAIR, (1.0, 1.0), method, config)


def test_bad_images_are_one_sentence() -> None:
    with pytest.raises(LabelError, match="label -3 is negative"):
        split(np.array([[0, -3]]), (1.0, 1.0))
    with pytest.raises(LabelError, match="expected integers"):
        split(np.array([[0, 1j]]), (1.0, 1.0))
    with pytest.raises(GeometryError, match="expected 2 positive sizes"):
        split(PAIR, (1.0, 0.0))
    with pytest.raises(GeometryError, match="expected 2 or 3"):
        split(np.ones((2, 2, 2, 2)), (1.0,) * 4, config=BasinsConfig(h=1.0))
    with pytest.raises(GeometryError, match="bring both on one grid"):
        flood(np.ones((2, 2)), np.ones((2, 3), dtype=int))
