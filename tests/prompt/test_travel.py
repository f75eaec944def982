"""The walk through slices: where it ends, what is between anchors, and what a correction changes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.prompt.prompts import Mask
from medseg.prompt.regions import Region
from medseg.prompt.slicewise import MaskConfig, propagate_mask
from medseg.prompt.target import Propagation, Target
from medseg.prompt.travel import Seen, Stack, Stops, failure, interpolate, touching
from medseg.types import BoolArray
from tests.prompt.bright import Bright, box_of, click, models_of, scene_of, tube

SHAPE = (48, 44, 20)
# The stand-in's answers are exact: one empty slice ends the object, and nothing else does.
PLAIN = MaskConfig(stops=Stops())


def follow(
    mask: BoolArray, target: Target, config: MaskConfig = PLAIN
) -> tuple[BoolArray, Propagation, Bright]:
    models, fake = models_of(scene_of(mask))
    found = propagate_mask(models, target, config)
    return found.region.full(), found, fake


def seed(mask: BoolArray, k: int = 9) -> Target:
    scene = scene_of(mask)
    rows, columns = (np.flatnonzero(mask[:, :, k].any(axis=a)) for a in (1, 0))
    start, stop = (rows[0] - 1, columns[0] - 1, k), (rows[-1] + 2, columns[-1] + 2, k + 1)
    return Target((box_of(scene, start, stop, "axial"),), 2)


def test_a_gap_of_one_slice_ends_the_object_or_is_passed_as_the_stops_say() -> None:
    mask = tube(SHAPE, 4, 15)
    mask[:, :, 12] = False
    found, result, _ = follow(mask, seed(mask))
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == list(range(4, 12))
    assert any("slice 12" in note for note in result.notes)
    found, _, _ = follow(mask, seed(mask), PLAIN.replace(stops={"empty": 2}))
    assert (found == mask).all()


def test_both_arms_of_a_forked_object_are_followed_and_asked_one_by_one() -> None:
    i, j, k = np.indices(SHAPE)
    apart = np.maximum(0, k - 8) * 1.2
    arms = [(i - 24 - sign * apart) ** 2 + (j - 22) ** 2 <= 16 for sign in (-1, 1)]
    mask = (arms[0] | arms[1]) & (k >= 5) & (k <= 16)
    found, _, fake = follow(mask, seed(mask, 7))
    assert (found == mask).all()
    assert sum(index == 15 for _, index, _, _ in fake.asked) == 2


def test_two_boxes_on_a_slice_are_two_questions_about_one_object() -> None:
    i, j, k = np.indices(SHAPE)
    mask = (
        (((i - 12) ** 2 + (j - 22) ** 2 <= 25) | ((i - 36) ** 2 + (j - 22) ** 2 <= 25)) & (k > 5) & (k < 13)
    )
    scene = scene_of(mask)
    target = Target(
        (
            box_of(scene, (6, 16, 9), (19, 29, 10), "axial"),
            box_of(scene, (30, 16, 9), (43, 29, 10), "axial"),
        ),
        2,
    )
    found, _, fake = follow(mask, target)
    assert (found == mask).all()
    assert [index for _, index, _, _ in fake.asked][:2] == [9, 9]


def test_slices_between_two_anchors_are_asked_once_and_expected_between_both() -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    both = Target((*seed(mask, 5).prompts, *seed(mask, 14).prompts), 2)
    found, result, fake = follow(mask, both)
    assert (found == mask).all()
    asked = [index for _, index, _, _ in fake.asked]
    assert sorted(asked) == list(range(3, 17))  # one beyond each end
    assert set(result.confidence) == set(range(3, 17))
    assert scene.shape == SHAPE


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1), st.integers(4, 9), st.integers(4, 9), st.integers(-3, 3))
def test_an_interpolated_shape_lies_between_the_two(share: float, a: int, b: int, shift: int) -> None:
    rows, columns = np.ogrid[:40, :40]
    near = (rows - 20) ** 2 + (columns - 20) ** 2 <= a**2
    far = (rows - 20 - shift) ** 2 + (columns - 20) ** 2 <= b**2
    mixed = interpolate(near, far, share)
    assert not (mixed & ~(near | far)).any()
    assert not (near & far & ~mixed).any()
    assert (interpolate(near, far, 0.0) == near).all()
    assert (interpolate(near, far, 1.0) == far).all()


def test_shapes_that_do_not_overlap_are_not_mixed() -> None:
    near, far = np.zeros((9, 9), dtype=bool), np.zeros((9, 9), dtype=bool)
    near[:3], far[6:] = True, True
    assert (interpolate(near, far, 0.5) == near).all()


def flat(side: int, **grey: float) -> Seen:
    mask = np.zeros((20, 20), dtype=bool)
    mask[:side, :side] = True
    return Seen(mask, **grey)


ANCHOR = flat(10, score=0.9, inside=100.0, around=50.0, spread=10.0)
FAILURES = {
    "iou": (Stops(iou=0.7), replace(ANCHOR, mask=flat(7).mask), "overlaps"),
    "growth": (Stops(growth=1.5), replace(ANCHOR, mask=flat(13).mask), "area changes"),
    "swell": (Stops(swell=1.5), replace(ANCHOR, mask=flat(13).mask), "as large as"),
    "score": (Stops(score=0.5), replace(ANCHOR, score=0.4), "expects"),
    "contrast": (Stops(contrast=0.5), replace(ANCHOR, around=90.0), "stand out"),
    "drift": (Stops(drift=2), replace(ANCHOR, inside=125.0, around=50.0), "brighter"),
    "nothing": (Stops(), flat(0), "nothing"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_stop_rule_says_why_and_lets_the_anchor_itself_pass(name: str) -> None:
    stops, now, reason = FAILURES[name]
    assert reason in str(failure(now, ANCHOR, ANCHOR, stops))
    assert failure(ANCHOR, ANCHOR, ANCHOR, stops) is None
    assert name == "nothing" or failure(now, ANCHOR, ANCHOR, Stops()) is None


def test_a_slice_that_fails_is_not_written() -> None:
    i, j, k = np.indices(SHAPE)
    mask = tube(SHAPE, 4, 15) | ((k == 13) & (abs(i - 24) < 16) & (abs(j - 22) < 16))
    config = PLAIN.replace(stops={"growth": 2}, zoom={"grow": 1.0})
    found, result, _ = follow(mask, seed(mask), config)
    assert not found[:, :, 13:].any()
    assert (found[:, :, :13] == mask[:, :, :13]).all()
    assert any("growth" in note for note in result.notes)


def test_as_far_as_the_user_has_clicked_the_object_has_not_ended() -> None:
    mask = tube(SHAPE, 4, 15)
    mask[:, :, 11:13] = False
    scene = scene_of(mask)
    target = Target((*seed(mask).prompts, click(scene, 25, 22, 14)), 2)
    found, _, _ = follow(mask, target)
    assert (found == mask).all()


def corrected(mask: BoolArray, previous: BoolArray, *clicks: object) -> tuple[BoolArray, Bright]:
    target = replace(
        seed(mask),
        prompts=(*seed(mask).prompts, *clicks),
        previous=Region.of(previous),
        fresh=len(clicks),
    )  # type: ignore[arg-type]
    found, _, fake = follow(mask, target)
    return found, fake


def test_a_click_into_what_was_missed_adds_it_on_the_slices_around_and_leaves_the_rest() -> None:
    mask = tube(SHAPE, 4, 15)
    previous = mask.copy()
    previous[24:, :, 11:14] = False
    found, fake = corrected(mask, previous, click(scene_of(mask), 27, 22, 12))
    assert (found[:, :, 12] == mask[:, :, 12]).all()
    for index in (11, 13):  # less and less of it
        assert previous[:, :, index].sum() < found[:, :, index].sum() <= mask[:, :, index].sum()
    others = [k for k in range(SHAPE[2]) if k not in (11, 12, 13)]
    assert (found[:, :, others] == mask[:, :, others]).all()
    assert {index for _, index, _, _ in fake.asked} <= set(range(10, 16))


def test_a_correction_is_as_deep_as_it_is_wide_and_changes_what_holds_the_click() -> None:
    mask = tube(SHAPE, 2, 17)
    previous = mask.copy()
    previous[27:] = False
    previous[:20, :, 16] = False
    found, fake = corrected(mask, previous, click(scene_of(mask), 29, 22, 16))
    assert found[29, 22, 16]
    assert (found[:20] == previous[:20]).all()
    assert {index for _, index, _, _ in fake.asked} <= set(range(12, 19))


def test_a_click_into_what_is_not_the_object_removes_it_on_the_slices_around() -> None:
    i, j, k = np.indices(SHAPE)
    tumour = tube(SHAPE, 4, 15)
    vessel = ((i - 40) ** 2 + (j - 22) ** 2 <= 9) & (k >= 10) & (k <= 13)
    found, fake = corrected(
        tumour | vessel, tumour | vessel, click(scene_of(tumour), 40, 22, 12, positive=False)
    )
    assert (found == tumour).all()
    assert {index for _, index, _, _ in fake.asked} <= set(range(9, 15))


def test_a_correction_stops_at_the_next_anchor() -> None:
    mask = tube(SHAPE, 4, 15)
    previous = mask.copy()
    previous[24:, :, :] = False
    target = Target(
        (*seed(mask, 9).prompts, click(scene_of(mask), 27, 22, 13)), 2, previous=Region.of(previous), fresh=1
    )
    found, _, fake = follow(mask, target)
    assert (found[:, :, :10] == previous[:, :, :10]).all()
    assert (found[:, :, 13] == mask[:, :, 13]).all()
    assert (found[:, :, 10:16] & ~previous[:, :, 10:16]).any(axis=(0, 1)).all()
    assert not (found & ~mask).any()
    assert min(index for _, index, _, _ in fake.asked) == 10


def test_a_slice_drawn_voxel_by_voxel_stays_as_it_was_drawn() -> None:
    mask = tube(SHAPE, 4, 15)
    drawn = np.zeros(SHAPE, dtype=bool)
    drawn[20:26, 19:24, 9] = True
    scene = scene_of(mask)
    target = Target((Mask.of(Region.of(drawn), "axial"),), 2)
    found, _, fake = follow(mask, target)
    assert (found[:, :, 9] == drawn[:, :, 9]).all()
    assert found[:, :, 10].any()
    assert 9 not in {index for _, index, _, _ in fake.asked}
    assert scene.shape == SHAPE


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_a_region_taken_apart_and_put_together_is_the_same(axis: int, number: int) -> None:
    generator = np.random.default_rng(number)
    mask = generator.random((7, 6, 5)) > 0.9
    region = Region.of(mask)
    stack = Stack.of(region, axis)
    assert stack.region() == region
    assert all((stack.get(i) == mask.take(i, axis)).all() for i in range(mask.shape[axis]))


def test_a_stack_holds_the_object_and_not_the_volume() -> None:
    stack = Stack((4000, 4000, 4000), 1)
    mask = np.zeros((4000, 4000), dtype=bool)
    mask[100:120, 200:230] = True
    for index in range(50, 60):
        stack.put(index, mask)
    assert sum(part.nbytes for _, _, part in stack.held.values()) == 10 * 20 * 30
    assert stack.region().array.shape == (20, 10, 30)


def test_touching_keeps_the_components_beside_a_mask() -> None:
    mask, other = np.zeros((9, 9), dtype=bool), np.zeros((9, 9), dtype=bool)
    mask[0:2, 0:2] = mask[6:8, 6:8] = True
    other[2, 2] = True
    assert touching(mask, other).sum() == 4
    assert not touching(mask, np.zeros_like(mask)).any()
