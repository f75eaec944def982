"""The baseline without a network."""

import numpy as np
import pytest

from medseg.prompt.simulate import BoxPrompt, Click, draw_prompt
from medseg.prompt.watershed import WatershedConfig, guess_reach, watershed

SHAPE = (48, 52, 40)


def ellipsoid(radii=(12, 9, 8), middle=(24, 26, 20)) -> np.ndarray:
    index = np.indices(SHAPE) - np.reshape(middle, (3, 1, 1, 1))
    return (index**2 / np.reshape(radii, (3, 1, 1, 1)) ** 2.0).sum(axis=0) <= 1


def picture(mask: np.ndarray, noise: float = 8.0) -> np.ndarray:
    return np.where(mask, 160.0, 80.0) + np.random.default_rng(0).normal(0, noise, SHAPE)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("known", [False, True])
def test_a_bright_ellipsoid_is_found_from_a_jittered_box(axis: int, known: bool) -> None:
    mask = ellipsoid()
    prompt = draw_prompt(mask, axis, np.random.default_rng(1))
    hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    limits = (int(hit[0]), int(hit[-1])) if known else None
    assert dice(watershed(picture(mask), (1, 1, 1), prompt, limits).full(), mask) > 0.85


def test_nothing_is_set_beyond_the_range_of_slices_and_the_box() -> None:
    mask = ellipsoid()
    found = watershed(picture(mask), (1, 1, 1), BoxPrompt(2, 20, (11.5, 16.5, 36.5, 35.5)), (16, 22))
    assert (found.start[2], found.stop[2]) >= (16, 17)
    assert found.stop[2] <= 23
    assert found.start[0] >= 10
    assert found.stop[0] <= 39


def test_the_depth_is_guessed_from_the_width_in_millimetres() -> None:
    prompt = BoxPrompt(2, 20, (9.5, 9.5, 29.5, 29.5))
    assert guess_reach((40, 40, 40), (1, 1, 1), prompt, None, WatershedConfig()) == (10, 30)
    assert guess_reach((40, 40, 40), (1, 1, 5), prompt, None, WatershedConfig()) == (18, 22)
    assert guess_reach((40, 40, 24), (1, 1, 1), prompt, None, WatershedConfig()) == (10, 23)
    assert guess_reach((40, 40, 40), (1, 1, 1), prompt, (-3, 99), WatershedConfig()) == (0, 39)


def test_clicks_add_and_remove_what_they_are_on() -> None:
    left, right = ellipsoid((6, 6, 6), (16, 26, 20)), ellipsoid((6, 6, 6), (36, 26, 20))
    image = picture(left | right)
    prompt = draw_prompt(left, 2, np.random.default_rng(0))
    alone = watershed(image, (1, 1, 1), prompt).full()
    assert alone[16, 26, 20]
    assert not alone[36, 26, 20]
    both = watershed(image, (1, 1, 1), prompt, clicks=[Click((36, 26, 20), True)]).full()
    assert dice(both, left | right) > 0.7
    without = watershed(image, (1, 1, 1), prompt, clicks=[Click((16, 26, 20), False)]).full()
    assert not without[16, 26, 20]


def test_a_box_of_one_voxel_at_the_corner_and_a_constant_image_give_an_answer() -> None:
    found = watershed(np.zeros((5, 6, 7)), (1, 1, 1), BoxPrompt(0, 0, (-0.5, -0.5, 0.5, 0.5)))
    assert found.array.any()
    assert found.shape == (5, 6, 7)


def test_one_slice_is_enough() -> None:
    mask = ellipsoid()[:, :, 20:21]
    image = picture(ellipsoid())[:, :, 20:21]
    prompt = draw_prompt(mask, 2, np.random.default_rng(0))
    assert dice(watershed(image, (1, 1, 4), prompt).full(), mask) > 0.85
