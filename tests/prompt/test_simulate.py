"""The simulated user: where it draws and clicks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.errors import DataError
from medseg.prompt.regions import Region
from medseg.prompt.simulate import (
    Click,
    acquisition_axis,
    cut_pair,
    draw_box,
    draw_prompt,
    largest_slice,
    next_click,
)


def block(shape: tuple[int, ...], *bounds: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_without_jitter_the_box_is_the_outer_edge_of_the_outermost_voxels() -> None:
    assert draw_box(block((20, 30), (4, 9), (7, 20)), 0.0, rng()) == (3.5, 6.5, 8.5, 19.5)


def test_sides_of_a_large_box_move_both_ways_by_up_to_five_percent() -> None:
    mask = block((400, 400), (100, 300), (150, 250))
    boxes = np.array([draw_box(mask, 0.05, rng(seed)) for seed in range(300)])
    moved = boxes - (99.5, 149.5, 299.5, 249.5)
    assert (np.abs(moved[:, [0, 2]]) <= 10).all()
    assert (np.abs(moved[:, [1, 3]]) <= 5).all()
    assert (moved.min(axis=0) < -3).all()
    assert (moved.max(axis=0) > 3).all()


def test_the_box_around_a_small_object_moves_too_and_does_not_cut_it() -> None:
    mask = block((40, 40), (10, 13), (10, 13))
    boxes = {draw_box(mask, 0.05, rng(seed)) for seed in range(60)}
    assert len(boxes) > 8
    assert all(b[0] <= 9.5 and b[1] <= 9.5 and b[2] >= 12.5 and b[3] >= 12.5 for b in boxes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_every_drawn_box_lies_on_edges_within_the_slice_and_has_area(
    start: int, size: int, seed: int, jitter: float
) -> None:
    mask = block((12, 24), (start, min(12, start + size)), (0, size))
    top, left, bottom, right = draw_box(mask, jitter, rng(seed))
    assert -0.5 <= top < bottom <= 11.5
    assert -0.5 <= left < right <= 23.5
    assert all((edge + 0.5) % 1 == 0 for edge in (top, left, bottom, right))


def test_a_box_around_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no voxel on this slice"):
        draw_box(np.zeros((5, 5), dtype=bool), 0.05, rng())
    with pytest.raises(DataError, match="label value"):
        largest_slice(np.zeros((5, 5, 5), dtype=bool), 2)


def test_the_prompt_is_drawn_where_the_object_is_largest() -> None:
    mask = block((20, 20, 9), (5, 8), (5, 8), (2, 7))
    mask[4:10, 4:12, 5] = True
    prompt = draw_prompt(mask, 2, rng(), jitter=0.0)
    assert (prompt.axis, prompt.index, prompt.box) == (2, 5, (3.5, 3.5, 9.5, 11.5))


@pytest.mark.parametrize(
    ("spacing", "axis"), [((1, 1, 1), 2), ((3, 1, 1), 0), ((0.8, 4, 0.8), 1), ((1.2, 1, 1), 2)]
)
def test_slices_are_taken_across_clearly_thick_ones_else_axially(spacing, axis) -> None:
    assert acquisition_axis(spacing) == axis


def test_the_click_lands_in_the_middle_of_the_largest_error_and_has_its_sign() -> None:
    truth = block((30, 30, 30), (5, 14), (5, 14), (5, 14))
    missing = truth.copy()
    missing[5:14, 5:14, 9:14] = False
    assert next_click(truth, missing) == Click((9, 9, 11), True)
    spurious = truth | block((30, 30, 30), (18, 25), (18, 25), (18, 25))
    assert next_click(truth, spurious) == Click((21, 21, 21), False)


def test_the_larger_of_a_miss_and_an_invention_is_clicked() -> None:
    truth = block((30, 30, 30), (2, 6), (2, 6), (2, 6))
    guess = block((30, 30, 30), (10, 16), (10, 16), (10, 16))
    click = next_click(truth, guess)
    assert click is not None
    assert not click.positive
    assert guess[click.voxel]


def test_depth_is_measured_in_millimetres() -> None:
    # A small cube and a wide plate of one slice that hang together: thick slices make the plate the deeper.
    truth = block((30, 20, 12), (2, 7), (6, 11), (3, 8)) | block((30, 20, 12), (7, 20), (2, 15), (5, 6))
    thin, thick = (next_click(truth, np.zeros_like(truth), spacing=(1, 1, step)) for step in (1.0, 8.0))
    assert thin == Click((4, 8, 5), True)
    assert thick == Click((13, 8, 5), True)


def test_nothing_wrong_means_no_click() -> None:
    truth = block((9, 9, 9), (2, 5), (2, 5), (2, 5))
    assert next_click(truth, truth) is None
    assert next_click(np.zeros_like(truth), np.zeros_like(truth)) is None


def test_masks_of_different_grids_are_refused() -> None:
    with pytest.raises(DataError, match="different grids"):
        next_click(np.zeros((3, 3, 3), dtype=bool), np.zeros((3, 3, 4), dtype=bool))


def test_a_region_and_its_full_mask_are_clicked_alike() -> None:
    generator = rng(3)
    truth, guess = (ndimage.binary_opening(generator.random((24, 25, 26)) < 0.6) for _ in range(2))
    for seed in range(5):
        wanted = next_click(truth, guess, 1, rng(seed), 2.0)
        assert next_click(Region.of(truth), Region.of(guess), 1, rng(seed), 2.0) == wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 6), st.sampled_from(["centre", "random"]), st.integers(0, 2))
def test_a_click_always_lies_in_an_error_of_its_sign(seed: int, jitter: float, aim, axis: int) -> None:
    generator = rng(seed)
    truth, guess = (generator.random((7, 8, 9)) < 0.3 for _ in range(2))
    click = next_click(truth, guess, axis, generator, jitter, (1.0, 0.7, 3.0), aim)
    assert click is not None
    assert truth[click.voxel] == click.positive
    assert guess[click.voxel] != click.positive


def test_jitter_moves_a_click_on_its_slice_by_no_more_than_its_radius() -> None:
    truth = block((60, 60, 9), (10, 51), (10, 51), (2, 7))
    nothing = np.zeros_like(truth)
    centre = next_click(truth, nothing, spacing=(0.5, 0.5, 3.0))
    assert centre is not None
    clicks = [next_click(truth, nothing, 2, rng(seed), 4.0, (0.5, 0.5, 3.0)) for seed in range(40)]
    voxels = np.array([click.voxel for click in clicks if click])
    away = np.linalg.norm((voxels - centre.voxel) * (0.5, 0.5, 3.0), axis=1)
    assert (voxels[:, 2] == centre.voxel[2]).all()
    assert 2.0 < away.max() <= 4.0 + 0.36  # half a voxel's diagonal


def test_the_same_generator_gives_the_same_gestures_whatever_is_drawn_for() -> None:
    one, other = rng(1), rng(1)
    draw_box(block((20, 20), (2, 9), (2, 9)), 0.05, one)
    draw_box(block((20, 20), (2, 3), (2, 3)), 0.0, other)
    truth = block((9, 9, 9), (2, 5), (2, 5), (2, 5))
    next_click(truth, truth, 2, one)
    next_click(truth, np.zeros_like(truth), 2, other, 3.0)
    assert one.random() == other.random()


def test_a_pair_is_cut_to_the_box_of_both() -> None:
    pair = cut_pair(block((9, 9, 9), (2, 5), (2, 5), (2, 5)), block((9, 9, 9), (4, 8), (3, 4), (1, 2)))
    assert pair is not None
    assert (pair.start, pair.reference.shape) == ((2, 2, 1), (6, 3, 4))
    assert (pair.reference.sum(), pair.prediction.sum()) == (27, 4)
