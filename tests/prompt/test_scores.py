"""Numbers of simulated clicks, against sums done by hand."""

import math

import pytest

from medseg.prompt.scores import ALL, Trace, area, clicks_to, compare, measures, summarize
from medseg.prompt.simulate import BoxPrompt

PROMPT = BoxPrompt(2, 3, (0.5, 0.5, 4.5, 4.5))


def trace(dice, name="a", dataset="ct", entrant="box", seed=0, seconds=(2.0, 0.5, 0.3), **changes) -> Trace:
    values = {
        "clicks": (),
        "nsd": dice,
        "seconds": seconds,
        "cpu": seconds,
        "encoded": (9, *(1 for _ in seconds[1:])),
        "voxels": 100,
        **changes,
    }
    return Trace(dataset, name, entrant, seed, PROMPT, dice=tuple(dice), **values)


CURVE = (0.5, 0.7, 0.82, 0.85, 0.88, 0.91)


def test_the_area_of_five_clicks_leaves_out_the_box_and_has_four_at_most() -> None:
    found = measures(trace(CURVE))
    assert found["dsc_auc"] == pytest.approx((0.7 + 0.91) / 2 + 0.82 + 0.85 + 0.88)
    assert found["dsc_auc_box"] == pytest.approx(found["dsc_auc"] + 0.6)
    assert area((1.0,) * 5, 5) == 4.0
    assert math.isnan(area((1.0,) * 4, 5))


def test_clicks_are_counted_from_the_box_and_a_goal_that_is_not_reached_costs_all() -> None:
    found = measures(trace(CURVE))
    assert (found["noc_80"], found["failed_80"]) == (2, 0)
    assert (found["noc_90"], found["failed_90"]) == (5, 0)
    low = measures(trace((0.85, 0.86, 0.86, 0.87, 0.87, 0.88)))
    assert (low["noc_80"], low["noc_90"], low["failed_90"]) == (0, 5, 1)
    assert clicks_to((0.1, 0.2), 0.8) is None


def test_values_after_clicks_that_were_not_made_are_not_told() -> None:
    assert "dice_10" not in measures(trace(CURVE))
    assert measures(trace((0.5,) * 11))["dice_10"] == 0.5
    short = measures(trace((0.5, 0.6), seconds=(1.0,)))
    assert math.isnan(short["dsc_auc"])
    assert math.isnan(short["seconds_click"])
    assert short["gain"] == pytest.approx(0.1)


def test_costs_of_the_box_and_of_a_click_are_apart() -> None:
    found = measures(trace(CURVE))
    assert (found["seconds_box"], found["encoded_box"]) == (2.0, 9.0)
    assert found["seconds_click"] == pytest.approx(0.4)
    assert found["encoded_click"] == 1.0


def test_objects_count_once_however_many_seeds_they_have() -> None:
    traces = [
        *(trace((0.9,) * 6, "a", seed=seed) for seed in range(4)),
        trace((0.5,) * 6, "b"),
        trace((0.1,) * 6, "c", "mr"),
    ]
    groups = {group.dataset: group for group in summarize(traces)}
    assert groups[ALL].objects == 3
    assert groups[ALL].means["dice_box"] == pytest.approx(0.5)
    assert groups["ct"].means["dice_box"] == pytest.approx(0.7)


def test_the_spread_is_that_of_the_mean_over_seeds() -> None:
    traces = [trace((value,) * 6, name, seed=s) for s, name, value in [(0, "a", 0.4), (0, "b", 0.8)]]
    assert math.isnan(summarize(traces)[0].spread["dice_box"])
    traces += [trace((value,) * 6, name, seed=1) for name, value in [("a", 0.8), ("b", 0.6)]]
    assert summarize(traces)[0].spread["dice_box"] == pytest.approx(0.1 / math.sqrt(2))


def test_seconds_are_medians_so_that_loading_a_network_once_does_not_show() -> None:
    traces = [trace(CURVE, str(n), seconds=(s, 0.1)) for n, s in enumerate((60.0, 1.0, 1.2))]
    assert summarize(traces)[0].means["seconds_box"] == 1.2


def test_two_entrants_are_compared_on_the_objects_that_both_have() -> None:
    traces = [
        trace((0.9, 0.95), "a"),
        trace((0.5, 0.6), "b"),
        trace((0.1, 0.1), "c"),
        trace((0.7, 0.7), "a", entrant="watershed"),
        trace((0.6, 0.6), "b", entrant="watershed"),
    ]
    (found,) = compare(traces)
    assert (found.entrant, found.other, found.objects) == ("box", "watershed", 2)
    assert found.box == pytest.approx(0.05)
    assert found.final == pytest.approx(0.125)
    assert (found.worst, found.worst_object, found.worse) == (pytest.approx(-0.1), ("ct", "b"), 1)
