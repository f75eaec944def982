"""The way back: laws on odd grids, and the rules of deciding labels."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from medseg.errors import DataError, GeometryError, LabelError, PlanError
from medseg.labels import LabelSet
from medseg.preprocess import Record, bricks, preprocess, preprocess_labels
from medseg.preprocess.bricks import round_to_half
from medseg.preprocess.restore import (
    labels_at_shape,
    probability_parts,
    restore_array,
    restore_labels,
    restore_probabilities,
)
from medseg.volume import Volume
from tests.preprocess.cases import CLASSES, TRANSPOSES, make_case, make_plan

REGIONS = LabelSet.parse({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3]}, [1, 2, 3])


def one_hot(seg: np.ndarray) -> np.ndarray:
    return np.where(np.maximum(seg, 0) == np.arange(4)[:, None, None, None], 4.0, -4.0).astype(np.float16)


sides = st.integers(1, 12)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(sides, sides, sides),
    transpose=st.sampled_from(list(TRANSPOSES)),
    anisotropic=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_restore_after_preprocess_is_exact_where_the_spacing_stays(
    shape: tuple[int, int, int], transpose: tuple[int, int, int], anisotropic: bool, seed: int
) -> None:
    image, label = make_case(seed, shape, (0.7, 1.3, 5.0) if anisotropic else (1.0, 1.0, 1.0))
    target = tuple(image.spacing[2 - axis] for axis in transpose)
    plan = make_plan(target, transpose, normalization="none")
    ready = preprocess(image, plan, "test", label)
    assert ready.seg is not None
    back = restore_labels(one_hot(ready.seg), ready.record, CLASSES, plan.configuration("test"))
    assert back.geometry == image.geometry
    assert_array_equal(back.array, label.array)
    assert_array_equal(restore_array(ready.data, ready.record), image.array)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(sides, sides, sides),
    transpose=st.sampled_from(list(TRANSPOSES)),
    target=st.tuples(*[st.floats(0.4, 6.0)] * 3),
    seed=st.integers(0, 1000),
)
def test_restore_after_preprocess_is_always_on_the_source_grid(
    shape: tuple[int, int, int], transpose: tuple[int, int, int], target: tuple[float, ...], seed: int
) -> None:
    image, label = make_case(seed, shape, (0.9, 1.0, 4.0))
    plan = make_plan(target, transpose)
    ready = preprocess(image, plan, "test", label)
    record = Record.from_dict(json.loads(json.dumps(ready.record.to_dict())))
    assert record == ready.record
    assert ready.seg is not None
    back = restore_labels(one_hot(ready.seg), record, CLASSES, plan.configuration("test"))
    assert back.geometry == image.geometry
    assert set(np.unique(back.array)) <= {0, 1, 2, 3}
    assert restore_array(ready.data, record, order=3).shape == image.array.shape


def test_a_flat_configuration_keeps_the_distance_of_the_slices() -> None:
    image, label = make_case(1, (12, 10, 6), (1.0, 1.0, 4.0))
    ready = preprocess(image, make_plan((0.5, 0.5)), "test", label)
    assert ready.record.new_spacing == pytest.approx((4.0, 0.5, 0.5))
    assert ready.data.shape[1] == ready.record.cropped_shape[0]
    assert ready.data.shape[2] == 2 * ready.record.cropped_shape[1]


def reference_labels(logits: np.ndarray, record: Record, labels: LabelSet) -> np.ndarray:
    """nnU-Net's way for a record without a separate axis: all classes at once."""
    factors = [1 / (n / m) for n, m in zip(logits.shape[1:], record.cropped_shape, strict=True)]
    resized = np.stack(
        [ndimage.zoom(c.astype(float), factors, order=1, mode="nearest", grid_mode=True) for c in logits]
    ).astype(np.float16)
    if not labels.has_regions:
        return resized.argmax(0)
    result = np.zeros(record.cropped_shape, dtype=int)
    for value, region in zip(labels.regions_class_order or (), resized, strict=True):
        result[1 / (1 + np.exp(-region.astype(np.float32))) > 0.5] = value
    return result


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("voxels", [7, 300, 48 << 20], ids=["crumbs", "bricks", "at once"])
def test_bricks_decide_as_the_whole_volume_would(
    labels: LabelSet, voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bricks, "BRICK_VOXELS", voxels)
    monkeypatch.setattr(bricks, "BRICK_SIDES", (max(1, voxels // 50), max(1, voxels // 20)))
    image, _ = make_case(2, (30, 24, 20), (1.0, 1.0, 1.0))
    plan = make_plan((1.7, 1.3, 1.4), labels=labels)
    ready = preprocess(image, plan, "test")
    logits = np.random.default_rng(0).normal(size=(labels.n_outputs, *ready.record.shape)).astype(np.float16)
    back = restore_labels(logits, ready.record, labels, plan.configuration("test"))
    inner = ready.record.to_network(back.array)[ready.record.inner][0]
    assert np.mean(inner != reference_labels(logits, ready.record, labels)) < 1e-3
    parts = list(probability_parts(logits, ready.record, labels, plan.configuration("test")))
    assert sum(values[0].size for _, values in parts) == np.prod(ready.record.cropped_shape)
    if not labels.has_regions:
        assert_allclose(parts[0][1].sum(axis=0), 1.0, atol=1e-5)


def test_many_classes_that_rarely_win_change_nothing() -> None:
    many = LabelSet.parse({"background": 0, **{f"organ {n}": n for n in range(1, 40)}})
    image, _ = make_case(3, (26, 24, 22), (1.0, 1.0, 1.0))
    plan = make_plan((1.6, 1.5, 1.7), labels=many)
    ready = preprocess(image, plan, "test")
    rng = np.random.default_rng(0)
    logits = np.full((40, *ready.record.shape), -6.0, dtype=np.float16)
    logits[0] = 2
    for number in range(1, 40):
        place = (number, *(slice(int(c), int(c) + 5) for c in rng.integers(0, 8, 3)))
        logits[place] = rng.normal(2, 2, logits[place].shape)
    back = restore_labels(logits, ready.record, many, plan.configuration("test"))
    inner = ready.record.to_network(back.array)[ready.record.inner][0]
    assert len(np.unique(inner)) > 10
    assert np.mean(inner != reference_labels(logits, ready.record, many)) < 1e-3


def test_rounding_equals_a_cast_to_float16() -> None:
    values = (np.random.default_rng(0).normal(size=100_000) * 20).astype(np.float32)
    values = values[np.abs(values) > 6.2e-5]
    values[:4] = [1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, np.inf]  # halves go to even
    expected = values.astype(np.float16).astype(np.float32)
    assert_array_equal(round_to_half(values.copy()), expected)


def test_equal_logits_go_to_the_lowest_label() -> None:
    image, _ = make_case(0, (6, 6, 6), (1.0, 1.0, 1.0))
    plan = make_plan((1.0, 1.0, 1.0))
    record = preprocess(image, plan, "test").record
    logits = np.zeros((4, *record.shape), dtype=np.float32)
    logits[1:] = 1.0
    logits[3] += 1e-5  # less than float16 resolves
    back = restore_labels(logits, record, CLASSES, plan.configuration("test"))
    assert set(np.unique(record.to_network(back.array)[record.inner])) == {1}


def test_slices_are_copied_not_mixed_across_a_separate_axis() -> None:
    image, _ = make_case(0, (10, 10, 8), (1.0, 1.0, 5.0))
    plan = make_plan((10.0, 1.0, 1.0))
    record = preprocess(image, plan, "test").record
    assert record.shape[0] < record.cropped_shape[0]
    ramp = np.broadcast_to(np.arange(record.shape[0], dtype=np.float32)[:, None, None], record.shape)
    back = restore_array(ramp[None], record)
    assert set(np.unique(back)) <= set(range(record.shape[0]))


def test_probabilities_outside_the_crop_are_background(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image, label = make_case(4, (9, 8, 10), (1.0, 1.0, 1.0))
    plan = make_plan((1.0, 1.0, 1.0))
    ready = preprocess(image, plan, "test", label)
    assert ready.seg is not None
    back = restore_probabilities(
        one_hot(ready.seg), ready.record, CLASSES, plan.configuration("test"), tmp_path / "case.npz"
    )
    assert_array_equal(back.array, label.array)
    probabilities = np.load(tmp_path / "case.npz")["probabilities"]
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (4, 10, 8, 9)
    assert_allclose(probabilities.sum(axis=0), 1.0, atol=1e-5)
    assert probabilities[0, 0, 0, 0] == 1.0  # a corner of the zero border


def test_the_result_of_a_first_stage_moves_to_the_grid_of_the_second() -> None:
    image, label = make_case(5, (16, 16, 16), (1.0, 1.0, 1.0))
    coarse = preprocess(image, make_plan((2.0, 2.0, 2.0)), "test", label)
    fine_plan = make_plan((1.0, 1.0, 1.0))
    fine = preprocess(image, fine_plan, "test", label)
    assert coarse.seg is not None
    moved = labels_at_shape(
        one_hot(coarse.seg), fine.record.shape, CLASSES, make_plan((2.0, 2.0, 2.0)).configuration("test")
    )
    assert moved.shape == (1, *fine.record.shape)
    same = preprocess_labels(label, fine.record, fine_plan.configuration("test"))
    assert_array_equal(same, np.maximum(fine.seg, 0))


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    image, label = make_case(0, (6, 7, 8), (1.0, 1.0, 1.0))
    plan = make_plan((1.0, 1.0, 1.0))
    record = preprocess(image, plan, "test").record
    other, _ = make_case(0, (6, 7, 9), (1.0, 1.0, 1.0))
    with pytest.raises(LabelError, match="one map for each output"):
        restore_labels(np.zeros((2, *record.shape)), record, CLASSES, plan.configuration("test"))
    with pytest.raises(GeometryError, match="differ in size"):
        preprocess(image, plan, "test", other)
    with pytest.raises(GeometryError, match="grid"):
        preprocess_labels(other, record, plan.configuration("test"))
    with pytest.raises(PlanError, match="2 channels"):
        preprocess(Volume(np.concatenate([image.array] * 2), image.geometry), plan, "test", label)
    with pytest.raises(PlanError, match="no configuration"):
        preprocess(image, plan, "3d_lowres")
    with pytest.raises(DataError, match="'crop' is missing"):
        Record.from_dict({k: v for k, v in record.to_dict().items() if k != "crop"})
