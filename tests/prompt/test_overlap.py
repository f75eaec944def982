"""Masks against each other: laws on arrays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg.prompt.overlap import count_shared, subtract, union
from medseg.prompt.regions import Region

SHAPE = (4, 5, 3)
MASKS = hnp.arrays(bool, SHAPE, elements=st.booleans(), fill=st.just(False))


@settings(deadline=None)
@given(st.lists(MASKS, min_size=1, max_size=4))
def test_union_is_that_of_the_arrays(masks: list[np.ndarray]) -> None:
    assert union(*(Region.of(mask) for mask in masks)) == Region.of(np.any(masks, axis=0))  # also its box


@settings(deadline=None)
@given(MASKS, MASKS)
def test_what_is_left_and_what_is_shared_make_the_whole(a: np.ndarray, b: np.ndarray) -> None:
    first, second = Region.of(a), Region.of(b)
    left = subtract(first, second)
    assert left == Region.of(a & ~b)  # also its box
    assert count_shared(first, second) == (a & b).sum() == first.voxels - left.voxels
