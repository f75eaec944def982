"""The nonzero box and its mask."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import ndimage

from medseg.geometry.crop import bounding_box, box_slices, crop_to_nonzero, fill_holes, nonzero_mask


def test_bounding_box_is_half_open_and_tight() -> None:
    mask = np.zeros((5, 6, 7), dtype=bool)
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == ((1, 4), (2, 3), (3, 7))


def test_an_empty_mask_keeps_the_whole_array() -> None:
    assert bounding_box(np.zeros((2, 3, 4), dtype=bool)) == ((0, 2), (0, 3), (0, 4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.0, 1.0))
def test_fill_holes_equals_scipy(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(tuple(rng.integers(1, 9, 3))) < density
    assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.0, 0.6))
def test_nonzero_mask_is_the_filled_union_of_the_channels(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    image = np.zeros((2, 8, 9, 7), dtype=np.float32)
    image[:, 2:6, 1:8, 2:5] = rng.random((2, 4, 7, 3)) < density
    expected = ndimage.binary_fill_holes(image.any(axis=0))
    assert_array_equal(nonzero_mask(image), expected)
    box, inside = crop_to_nonzero(image)
    assert box == bounding_box(expected)
    assert_array_equal(inside, expected[box_slices(box)])
