"""RECIST 1.1, rule by rule."""

import math

import pytest

from medseg.instances.response import Followed, Lesion, assess_response, choose_targets


def lesion(label: int, longest: float, organ: str = "liver", node: bool = False) -> Lesion:
    """Return a lesion whose short axis is longest / 2; of a node, `longest` is its short axis."""
    return (
        Lesion(label, 2 * longest, longest, organ, True)
        if node
        else Lesion(label, longest, longest / 2, organ)
    )


def now(before: Lesion, *diameters: float) -> Followed:
    parts = [lesion(100 * before.label + n, d, before.organ, before.node) for n, d in enumerate(diameters)]
    return Followed(before, tuple(parts))


def test_targets_are_the_largest_five_two_an_organ_nodes_by_short_axis() -> None:
    found = [
        lesion(n, 50 - n, organ) for n, organ in enumerate(("liver",) * 3 + ("lung",) * 3 + ("bone",) * 2, 1)
    ]
    assert [each.label for each in choose_targets(found)] == [1, 2, 4, 5, 7]
    nodes = [lesion(1, 15, "node", True), lesion(2, 14.9, "node", True), lesion(3, 9.9), lesion(4, 10)]
    assert [each.label for each in choose_targets(nodes)] == [1, 4]


def test_thick_slices_ask_for_twice_their_thickness_and_unknown_organs_have_no_limit() -> None:
    found = [lesion(n, 11 + n, "") for n in range(1, 5)]
    assert [each.label for each in choose_targets(found, thickness=7)] == [4, 3]
    assert [each.label for each in choose_targets(found, thickness=5)] == [4, 3, 2, 1]


A, B, NODE = lesion(1, 60), lesion(2, 40, "lung"), lesion(3, 20, "node", True)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (((60,), (40,)), "SD"),
        (((42,), (28,)), "PR"),  # -30 %
        (((42.2,), (28,)), "SD"),
        (((72,), (48,)), "PD"),  # +20 %
        (((71.8,), (48,)), "SD"),
        (((), ()), "CR"),
        (((), (1,)), "PR"),
        (((30, 30), (40,)), "SD"),  # fallen apart: the parts are added
    ],
)
def test_the_sum_of_diameters_decides(later: tuple[tuple[float, ...], ...], expected: str) -> None:
    response = assess_response([now(A, *later[0]), now(B, *later[1])], [])
    assert (response.target, response.overall) == (expected, expected)
    assert response.baseline_sum == 100


def test_progress_is_from_the_smallest_sum_and_by_five_millimetres() -> None:
    assert assess_response([now(A, 40)], [], smallest_sum=30).overall == "PD"
    assert assess_response([now(A, 24)], [], smallest_sum=20).overall == "PR", "20 %, but 4 mm"
    small = lesion(1, 12)
    assert assess_response([now(small, 16.9)], []).overall == "SD", "41 %, but below 5 mm"
    assert assess_response([now(small, 17)], []).overall == "PD"


def test_nodes_below_ten_millimetres_are_normal_for_a_complete_response() -> None:
    assert assess_response([now(NODE, 9.9), now(A)], []).overall == "CR"
    assert assess_response([now(NODE, 10.0), now(A)], []).target == "PR"


def test_non_targets_hold_back_a_complete_response() -> None:
    small = lesion(4, 8)
    assert assess_response([now(A), now(small, 8)], []).overall == "PR"
    assert assess_response([now(A), now(small)], []).overall == "CR"
    only = assess_response([now(small, 30)], [])
    assert (only.target, only.overall) == ("none", "non-CR/non-PD")
    assert any("unequivocally" in note for note in only.notes)


def test_a_new_lesion_is_progression_unless_it_is_too_small() -> None:
    assert assess_response([now(A)], [lesion(9, 6)]).overall == "PD"
    tiny = assess_response([now(A)], [lesion(9, 4.9)])
    assert (tiny.overall, tiny.new_lesions) == ("CR", ())
    assert any("too small" in note for note in tiny.notes)
    assert assess_response([now(A)], [lesion(9, 9.9, "node", True)]).overall == "CR"


def test_merged_targets_count_the_whole_once() -> None:
    whole = lesion(50, 90)
    response = assess_response([Followed(A, (whole,)), Followed(B, (whole,))], [])
    assert [target.now for target in response.targets] == [90, 0]
    assert response.sum == 90
    assert any("merged" in note for note in response.notes)


def unseen(before: Lesion) -> Followed:
    return Followed(before, seen=False)


def test_a_target_that_is_not_seen_makes_the_response_not_evaluable() -> None:
    response = assess_response([now(A, 10), unseen(B)], [])
    assert (response.target, response.overall) == ("NE", "NE")
    assert math.isnan(response.sum) and math.isnan(response.change)
    assert any("target lesion 2 lies outside of the follow-up" in note for note in response.notes)
    assert assess_response([now(A, 10), unseen(B)], [lesion(9, 12)]).overall == "PD", "a new lesion"


def test_the_targets_that_are_seen_can_be_progression_alone() -> None:
    assert assess_response([now(A, 120), unseen(B)], []).overall == "PD", "120 mm of 100"
    assert assess_response([now(A, 119), unseen(B)], []).overall == "NE"


def test_a_non_target_that_is_not_seen_holds_back_only_a_complete_response() -> None:
    small = lesion(4, 8)
    assert assess_response([now(A), unseen(small)], []).overall == "PR"
    assert assess_response([now(A, 60), unseen(small)], []).overall == "SD"
    assert assess_response([unseen(small)], []).overall == "NE"
    beside = assess_response([now(A, 60), unseen(small), now(lesion(5, 7), 7)], [])
    assert (beside.non_target, beside.overall) == ("non-CR/non-PD", "SD")


def test_a_lesion_where_baseline_shows_nothing_is_named_and_not_counted() -> None:
    response = assess_response([now(A, 60)], [], beyond=[lesion(7, 20)])
    assert (response.overall, response.new_lesions) == ("SD", ())
    assert any("lesion 7" in note and "4.3.5" in note for note in response.notes)


def test_nothing_at_all_has_no_category() -> None:
    nothing = assess_response([], [])
    assert nothing.overall == "none"
    assert math.isnan(nothing.change)
