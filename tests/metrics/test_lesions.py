"""Lesion-wise scores against loops over whole volumes, as the challenges' scripts have them."""

import math

import numpy as np
import pytest
from scipy import ndimage

from medseg.errors import GeometryError
from medseg.metrics.lesions import LESION_RULES, LesionRules, false_volumes, lesion_scores
from medseg.metrics.surface import surface_distances
from tests.metrics.object_maps import random_objects

ALL = np.ones((3, 3, 3))
EDGES = ndimage.generate_binary_structure(3, 2)
SPACING = (1.0, 1.0, 1.5)


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = random_objects(rng, (32, 36, 30), 9, 3.0) > 0
    guess = (np.roll(truth, 1, 0) & (random_objects(rng, (32, 36, 30), 14, 6.0) > 0)) | (
        random_objects(rng, (32, 36, 30), 3, 2.0) > 0
    )
    return truth, guess


def by_loops(truth: np.ndarray, guess: np.ndarray, rules: LesionRules) -> tuple[float, float, int]:
    """Return Dice, HD95 and false positives, with every step on the whole volume."""
    grown = ndimage.binary_dilation(truth, EDGES, iterations=rules.dilation) if rules.dilation else truth
    groups, n = ndimage.label(grown, ALL)
    parts, m = ndimage.label(guess, ALL)
    dice, distance, used = [], [], set()
    for k in range(1, n + 1):
        lesion = truth & (groups == k)
        near = ndimage.binary_dilation(lesion, EDGES, iterations=rules.dilation) if rules.dilation else lesion
        touching = set(np.unique(parts[near])) - {0}
        used |= touching
        found = np.isin(parts, list(touching))
        if lesion.sum() * math.prod(SPACING) <= rules.ignore_mm3:
            continue
        dice.append(2 * (lesion & found).sum() / (lesion.sum() + found.sum()))
        worst = surface_distances(lesion, found, SPACING).hausdorff(95)
        distance.append(worst if math.isfinite(worst) else 374.0)
    false = m - len(used)
    total = len(dice) + false
    if not total:
        return 1.0, 0.0, 0
    return sum(dice) / total, (sum(distance) + 374.0 * false) / total, false


@pytest.mark.parametrize("task", ["GLI", "MET"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lesion_wise_scores_equal_loops_over_the_volume(seed: int, task: str) -> None:
    truth, guess = masks(seed)
    scores = lesion_scores(truth, guess, SPACING, LESION_RULES[task])
    dice, distance, false = by_loops(truth, guess, LESION_RULES[task])
    assert scores.false_positives == false
    assert scores.dice == pytest.approx(dice, abs=1e-6)
    assert scores.hd95 == pytest.approx(distance, abs=1e-6)


def test_lesions_are_joined_missed_invented_and_ignored() -> None:
    truth, guess = np.zeros((2, 40, 40, 12), bool)
    truth[2:8, 2:8, 2:8], truth[2:8, 11:17, 2:8] = True, True  # three voxels apart: one lesion after growing
    truth[25:31, 25:31, 2:8] = True  # missed
    truth[35:37, 2:4, 2:4] = guess[35:37, 2:4, 2:4] = True  # too small to count, and no false positive
    guess[2:8, 2:8, 2:8] = True
    guess[2:5, 32:35, 2:5] = True  # invented
    scores = lesion_scores(truth, guess, (1.0, 1.0, 1.0))
    assert [lesion.ignored for lesion in scores.lesions] == [False, False, True]
    assert (scores.lesions[0].volume, scores.lesions[1].predictions, scores.false_positives) == (432.0, 0, 1)
    assert scores.dice == pytest.approx((2 * 216 / 648) / 3)
    assert scores.hd95 == pytest.approx((scores.lesions[0].hd95 + 2 * 374) / 3)
    assert len(lesion_scores(truth, guess, (1.0, 1.0, 1.0), LESION_RULES["MEN"]).lesions) == 4


@pytest.mark.parametrize(("left", "right", "dice", "distance"), [
    (False, False, 1.0, 0.0), (True, False, 0.0, 374.0), (False, True, 0.0, 374.0), (True, True, 1.0, 0.0),
])  # fmt: skip
def test_empty_masks_are_scored_as_in_the_challenge(
    left: bool, right: bool, dice: float, distance: float
) -> None:
    ball = np.pad(np.ones((5, 5, 5), bool), 4)
    scores = lesion_scores(ball & left, ball & right, (1.0, 1.0, 1.0))
    assert (scores.dice, scores.hd95) == (dice, distance)


def test_lesions_of_flat_images_are_scored_too() -> None:
    truth, guess = np.zeros((2, 30, 30), bool)
    truth[2:14, 2:14], guess[2:14, 3:15] = True, True
    assert lesion_scores(truth, guess, (1.0, 1.0)).dice == pytest.approx(2 * 132 / 288)


@pytest.mark.parametrize("seed", [0, 1])
def test_false_volumes_equal_a_loop_over_components(seed: int) -> None:
    truth, guess = masks(seed)
    got = false_volumes(truth, guess, SPACING)
    expected = []
    for mask, other in ((guess, truth), (truth, guess)):
        parts, n = ndimage.label(mask, EDGES)
        sizes = [int((parts == k).sum()) for k in range(1, n + 1) if not (other & (parts == k)).any()]
        expected += [sum(sizes) * math.prod(SPACING) / 1000, len(sizes)]
    assert [got.false_positive_ml, got.false_positives] == pytest.approx(expected[:2])
    assert [got.false_negative_ml, got.false_negatives] == pytest.approx(expected[2:])


def test_neighbours_decide_what_a_component_is() -> None:
    truth, guess = np.zeros((2, 4, 4, 4), bool)
    truth[0, 0, 0] = guess[0, 0, 0] = guess[1, 1, 1] = True
    assert false_volumes(truth, guess, (10.0, 10.0, 10.0)).false_positive_ml == 1.0
    assert false_volumes(truth, guess, (10.0, 10.0, 10.0), neighbours=3).false_positive_ml == 0.0


def test_masks_of_other_shape_or_spacing_are_refused() -> None:
    a = np.zeros((3, 3, 3))
    for wrong in ((a, a[:2], (1, 1, 1)), (a, a, (1, 1)), (a[0, 0], a[0, 0], (1,))):
        with pytest.raises(GeometryError, match="one shape"):
            lesion_scores(*wrong)
        with pytest.raises(GeometryError, match="one shape"):
            false_volumes(*wrong)
