"""Cleaning keeps what a prompt has touched, fills what is enclosed, and leaves others' voxels alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.prompt.cleanup import CleanConfig, clean, keep_touching
from medseg.prompt.regions import Region
from medseg.prompt.target import Target

SHAPE = (12, 11, 10)
TARGET = Target((), 2)


def blocks() -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:4, 1:4, 1:4] = True
    mask[6:11, 6:11, 6:10] = True
    return mask


def test_only_components_that_an_anchor_touches_stay() -> None:
    mask = blocks()
    anchor = np.zeros(SHAPE, dtype=bool)
    anchor[2, 2, 2] = True
    found = clean(Region.of(mask), TARGET, Region.of(anchor)).full()
    assert found.sum() == 27
    assert found[2, 2, 2]


def test_without_a_touched_component_the_largest_stays() -> None:
    for anchor in (None, Region.empty(SHAPE)):
        assert clean(Region.of(blocks()), TARGET, anchor).voxels == 100


def test_islands_stay_where_the_settings_say_so() -> None:
    assert clean(Region.of(blocks()), TARGET, None, CleanConfig(islands=False)).voxels == 127


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("gap", "parts"), [(0, 1), (1, 1), (2, 2)])
def test_parts_across_a_gap_are_one_component_if_it_is_small_and_along_the_axis(
    axis: int, gap: int, parts: int
) -> None:
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[3:6, 3:6, 1:3] = mask[3:6, 3:6, 5:7] = True
    mask, held = np.moveaxis(mask, 2, axis), np.zeros((9, 9, 9), dtype=bool)
    held[tuple(1 if a == axis else 4 for a in range(3))] = True
    assert keep_touching(mask, held, axis, gap).sum() == parts * 18
    assert keep_touching(mask, held, (axis + 1) % 3, gap).sum() == 18


def test_a_hole_is_filled_but_not_with_voxels_of_others() -> None:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:9, 2:9, 2:9] = True
    hole = np.zeros(SHAPE, dtype=bool)
    hole[4:6, 4:6, 4:6] = True
    target = Target((), 2, forbidden=Region.of(hole))
    hollow = Region.of(mask & ~hole)
    assert (clean(hollow, TARGET, None).full() == mask).all()
    assert (clean(hollow, target, None).full() == (mask & ~hole)).all()
    assert clean(hollow, TARGET, None, CleanConfig(holes=False)) == hollow


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.integers(-2, 12), st.integers(-2, 12), st.integers(0, 2**32 - 1))
def test_nothing_is_left_beyond_the_limits_nor_on_forbidden_voxels(
    axis: int, first: int, last: int, number: int
) -> None:
    generator = np.random.default_rng(number)
    mask, others = generator.random(SHAPE) > 0.5, generator.random(SHAPE) > 0.5
    target = Target((), axis, limits=(first, last), forbidden=Region.of(others))
    found = clean(Region.of(mask), target, None, CleanConfig(islands=False, holes=False)).full()
    low, high = sorted((first, last))
    index = np.arange(SHAPE[axis])
    within = np.moveaxis(np.zeros(SHAPE, dtype=bool), axis, 0)
    within[(index >= low) & (index <= high)] = True
    assert (found == (mask & ~others & np.moveaxis(within, 0, axis))).all()


def test_an_empty_region_stays_empty() -> None:
    assert clean(Region.empty(SHAPE), TARGET, None).voxels == 0
