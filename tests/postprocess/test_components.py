"""Components: what is kept, what is removed, by which connectivity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from medseg.errors import GeometryError
from medseg.postprocess import fill_holes, keep_largest, remove_small

MAPS = hnp.arrays(np.uint8, (5, 4, 6), elements=st.sampled_from([0, 0, 0, 1, 2]))


def plain_largest(label_map: np.ndarray, labels: tuple[int, ...]) -> np.ndarray:
    mask = np.isin(label_map, labels)
    numbers, n = ndimage.label(mask, np.ones((3,) * label_map.ndim))
    sizes = [int((numbers == k).sum()) for k in range(1, n + 1)]
    keep = [k for k, size in enumerate(sizes, 1) if size == max(sizes)]
    return np.where(mask & ~np.isin(numbers, keep), 0, label_map)


@given(MAPS, st.sampled_from([(1,), (2,), (1, 2)]))
@settings(max_examples=50, deadline=None)
def test_the_largest_component_equals_a_plain_search(label_map, labels):
    np.testing.assert_array_equal(keep_largest(label_map, labels), plain_largest(label_map, labels))


@given(MAPS)
@settings(max_examples=20, deadline=None)
def test_keeping_the_largest_twice_changes_nothing_more(label_map):
    once = keep_largest(label_map, (1, 2))
    np.testing.assert_array_equal(keep_largest(once, (1, 2)), once)


def test_corners_connect_in_a_volume_and_in_a_slice():
    diagonal = np.zeros((4, 4, 4), np.uint8)
    diagonal[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = 1
    diagonal[3, 0, 3] = 1
    assert keep_largest(diagonal, 1).sum() == 3
    flat = np.eye(4, dtype=np.uint8)
    flat[0, 3] = 1
    assert keep_largest(flat, 1).sum() == 4
    assert keep_largest(flat[:, :, None], 1).sum() == 4


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 1, 7), (6, 7, 1), (3, 3, 3), (1, 7), (9, 9, 9)])
def test_grids_full_of_single_voxels_are_labelled_on_any_shape(shape):
    label_map = np.zeros(shape, np.uint8)
    label_map[(slice(None, None, 2),) * len(shape)] = 1
    assert (keep_largest(label_map, 1) == label_map).all()
    assert not remove_small(label_map, 1, 2.0, 1.0).any()


def test_equally_large_components_all_stay():
    label_map = np.zeros((9, 3, 3), np.int16)
    label_map[[0, 4, 8]] = 1
    label_map[6, 1, 1] = 2
    np.testing.assert_array_equal(keep_largest(label_map, 1), label_map)
    assert keep_largest(label_map, 1).dtype == np.int16


def test_the_input_is_never_changed_and_an_absent_label_is_no_error():
    label_map = np.array([[[1, 0, 1]]], np.uint8)
    before = label_map.copy()
    for result in (
        keep_largest(label_map, 7),
        remove_small(label_map, 7, 9.0, 1.0),
        fill_holes(label_map, 7),
    ):
        np.testing.assert_array_equal(result, before)
        assert result is not label_map
    remove_small(label_map, 1, 9.0, 1.0)
    np.testing.assert_array_equal(label_map, before)


def test_small_objects_are_measured_in_cubic_millimetres():
    label_map = np.zeros((8, 5, 5), np.uint8)
    label_map[0:2, 0, 0] = 1
    label_map[4:7, 0, 0] = 1
    label_map[0, 4, 4] = 2
    assert (remove_small(label_map, 1, 5.0, 2.0) == 1).sum() == 3
    assert (remove_small(label_map, 1, 4.0, 2.0) == 1).sum() == 5  # exactly 4 mm3 is not smaller
    assert (remove_small(label_map, 1, 99.0, 2.0) == 2).sum() == 1


def test_holes_are_filled_with_background_only():
    label_map = np.ones((5, 5, 5), np.uint8)
    label_map[2, 2, 2] = 0
    label_map[2, 2, 3] = 2
    label_map[0, 0, 0] = 0
    filled = fill_holes(label_map, 1)
    assert filled[2, 2, 2] == 1 or filled[2, 2, 3] == 2
    assert filled[2, 2, 3] == 2 and filled[0, 0, 0] == 0


def test_a_channel_axis_is_refused():
    with pytest.raises(GeometryError, match="Take one channel"):
        keep_largest(np.ones((1, 2, 2, 2), np.uint8), 1)
