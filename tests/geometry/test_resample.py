"""Resampling against scipy, which is what nnU-Net runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from medseg.geometry.resample import (
    axis_weights,
    nearest_voxels,
    resample,
    resample_labels,
    separate_axis,
    target_shape,
)
from medseg.types import Array

sizes = st.integers(1, 22)
shapes = st.tuples(sizes, sizes, sizes)
law = settings(max_examples=40, deadline=None)


def zoom(array: Array, shape: tuple[int, ...], order: int) -> Array:
    """Resize as skimage.transform.resize(mode="edge", anti_aliasing=False) does, with its clip."""
    factors = [1 / (n / m) for n, m in zip(array.shape, shape, strict=True)]
    resized = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(resized, array.min(), array.max())


def vote(labels: Array, shape: tuple[int, ...]) -> Array:
    """Resize as batchgenerators 0.25.5 resize_segmentation(order=1) does."""
    values = np.unique(labels)
    scores = np.stack([zoom((labels == v).astype(float), shape, 1) for v in values])
    nearest = zoom(labels.astype(float), shape, 0).astype(int)
    of_nearest = np.take_along_axis(scores, np.searchsorted(values, nearest)[None], 0)[0]
    return np.where(of_nearest == scores.max(0), nearest, values[scores.argmax(0)])


@law
@given(n_in=st.integers(1, 60), n_out=st.integers(1, 60), order=st.integers(0, 5))
def test_axis_weights_sum_to_one_for_every_output_voxel(n_in: int, n_out: int, order: int) -> None:
    weights = axis_weights(n_in, n_out, order)
    assert weights.shape == (n_out, n_in)
    assert_allclose(weights.sum(axis=1), 1.0, atol=1e-9)


@law
@given(source=shapes, target=shapes, order=st.integers(0, 5), seed=st.integers(0, 1000))
def test_resample_equals_scipy_zoom_and_clip(
    source: tuple[int, int, int], target: tuple[int, int, int], order: int, seed: int
) -> None:
    array = np.random.default_rng(seed).normal(size=(2, *source))
    got = resample(array, target, order)
    for channel, expected in zip(got, array, strict=True):
        assert_allclose(channel, zoom(expected, target, order), atol=1e-8)


def test_long_axes_use_the_band_only_and_still_equal_scipy() -> None:
    array = np.random.default_rng(0).normal(size=(1, 150, 3, 90)).astype(np.float32)
    got = resample(array, (211, 3, 61), 3)
    assert got.dtype == np.float32
    assert_allclose(got[0], zoom(array[0].astype(float), (211, 3, 61), 3), atol=2e-5)


@law
@given(source=shapes, target=shapes, n_labels=st.integers(1, 9), seed=st.integers(0, 1000))
def test_resample_labels_equals_the_peers_vote_with_its_tie_rule(
    source: tuple[int, int, int], target: tuple[int, int, int], n_labels: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(-1, n_labels, source).astype(np.int16)
    got = resample_labels(labels[None], target, 1)
    assert got.dtype == np.int16
    assert_array_equal(got[0], vote(labels, target))


def test_an_exact_tie_goes_to_the_nearest_label() -> None:
    labels = np.array([0, 2], dtype=np.int16).reshape(1, 1, 1, 2)
    assert resample_labels(labels, (1, 1, 3), 1).ravel().tolist() == [0, 2, 2]  # the middle is a tie


def test_an_exact_tie_without_the_nearest_label_goes_to_the_smallest() -> None:
    block = np.array([3, 1, 1, 1, 2, 2, 2, 3], dtype=np.int16).reshape(1, 2, 2, 2)
    assert resample_labels(block, (1, 1, 1), 1).item() == 1


@pytest.mark.parametrize("order", [0, 2, 3])
def test_other_orders_of_label_resampling_only_give_labels_that_were_there(order: int) -> None:
    labels = np.random.default_rng(3).choice([0, 4, 9], (1, 7, 8, 9)).astype(np.int16)
    assert set(np.unique(resample_labels(labels, (11, 5, 9), order))) <= {0, 4, 9}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thick", [4, 17])
def test_separate_axis_resizes_slices_and_copies_the_nearest(axis: int, thick: int) -> None:
    array = np.random.default_rng(1).normal(size=(1, 9, 9, 9))
    target = tuple(thick if a == axis else 13 for a in range(3))
    got = resample(array, target, 3, separate=axis)[0]
    nearest = nearest_voxels(9, thick)
    for k in range(thick):
        expected = zoom(np.take(array[0], nearest[k], axis), (13, 13), 3)
        assert_allclose(np.take(got, k, axis), expected, atol=1e-8)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_separate_axis_votes_within_slices(axis: int) -> None:
    labels = np.random.default_rng(1).integers(0, 4, (9, 9, 9)).astype(np.int16)
    target = tuple(4 if a == axis else 14 for a in range(3))
    got = resample_labels(labels[None], target, 1, separate=axis)[0]
    nearest = nearest_voxels(9, 4)
    for k in range(4):
        expected = vote(np.take(labels, [nearest[k]], axis), np.take(got, [k], axis).shape)
        assert_array_equal(np.take(got, [k], axis), expected)


def test_an_order_across_slices_interpolates_between_them() -> None:
    array = np.arange(4, dtype=np.float64)[None, :, None, None] * np.ones((1, 4, 2, 2))
    got = resample(array, (8, 3, 3), 1, separate=0, order_z=1)
    assert_allclose(got[0, :, 0, 0], zoom(np.arange(4.0), (8,), 1))


def test_the_input_is_returned_untouched_where_the_shape_stays() -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    labels = image.astype(np.int16)
    assert resample(image, (3, 4, 5), 3) is image
    assert resample_labels(labels, (3, 4, 5), 1) is labels


def test_separate_axis_follows_the_current_spacing_then_the_new_one() -> None:
    assert separate_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == 0
    assert separate_axis((1.0, 1.0, 1.0), (1.0, 1.0, 4.0)) == 2
    assert separate_axis((3.0, 1.0, 1.0), (1.0, 1.0, 1.0)) is None  # a ratio of 3 is not more than 3
    assert separate_axis((0.24, 1.25, 1.25), (1.0, 1.0, 1.0)) is None  # two axes share the largest


def test_target_shape_rounds_half_to_even_as_python_does() -> None:
    assert target_shape((5, 3, 10), (1.0, 1.0, 3.0), (2.0, 2.0, 1.5)) == (2, 2, 20)
