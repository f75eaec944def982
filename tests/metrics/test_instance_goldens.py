"""Metrics of objects against the numbers that other packages gave (``make_instance_goldens`` wrote them)."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.metrics.average_precision import cell_average_precision
from medseg.metrics.matching import match_objects
from medseg.metrics.overlap_table import OverlapTable, overlap_table
from medseg.metrics.panoptic import panoptic_quality, panoptic_quality_by_class
from tests.metrics.object_maps import Maps, cases, digest

GOLDEN = Path(__file__).parent / "golden"
NAMES = list(cases())
CLASSES = {0: "void", 1: "first", 2: "second"}


@cache
def golden(peer: str) -> Any:
    return json.loads((GOLDEN / f"{peer}.json").read_text("utf-8"))


@cache
def maps() -> dict[str, Maps]:
    return cases()


@cache
def table(name: str) -> OverlapTable:
    return overlap_table(*maps()[name])


def near(expected: Any) -> Any:
    return pytest.approx(math.nan if expected is None else expected, rel=0, abs=1e-6, nan_ok=True)


def images_of(peer: str) -> list[str]:
    return list(golden(peer)["images"])


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_are_those_that_the_peers_saw(name: str) -> None:
    assert golden("stardist")["digests"][name] == digest(maps()[name])


@pytest.mark.parametrize("name", NAMES)
def test_matching_at_every_threshold_equals_stardist(name: str) -> None:
    for expected in golden("stardist")["images"][name]:
        match = match_objects(table(name), expected["thresh"])
        assert (match.tp, match.fp, match.fn) == (expected["tp"], expected["fp"], expected["fn"])
        for ours, theirs in (
            (match.accuracy, "accuracy"),
            (match.f1, "f1"),
            (match.precision, "precision"),
            (match.recall, "recall"),
            (match.mean_true_iou, "mean_true_score"),
            (match.mean_matched_iou, "mean_matched_score"),
            (match.panoptic_quality, "panoptic_quality"),
        ):
            # StarDist gives 0 where there is nothing to divide by.
            assert np.nan_to_num(ours) == near(expected[theirs]), theirs


def test_pooled_average_precision_equals_stardist() -> None:
    expected = golden("stardist")["pooled"]
    measured = cell_average_precision([table(name) for name in NAMES], [m["thresh"] for m in expected])
    assert measured.pooled.tolist() == near_all([m["accuracy"] for m in expected])


def near_all(values: list[float]) -> Any:
    return pytest.approx(values, rel=0, abs=1e-6)


@pytest.mark.parametrize("name", images_of("cellpose"))
def test_average_precision_of_each_image_equals_cellpose(name: str) -> None:
    expected = golden("cellpose")
    measured = cell_average_precision([table(name)], expected["taus"])
    for ours, theirs in (
        (measured.per_image, "ap"),
        (measured.tp, "tp"),
        (measured.fp, "fp"),
        (measured.fn, "fn"),
    ):
        assert ours[0].tolist() == near_all(expected["images"][name][theirs])


def test_mean_over_images_equals_the_mean_of_cellpose() -> None:
    expected = golden("cellpose")
    measured = cell_average_precision([table(name) for name in expected["images"]], expected["taus"])
    mean = np.mean([entry["ap"] for entry in expected["images"].values()], axis=0)
    assert measured.mean_over_images.tolist() == near_all(mean.tolist())


@pytest.mark.parametrize("name", images_of("panoptica"))
def test_panoptic_quality_equals_panoptica_with_a_strict_threshold(name: str) -> None:
    expected = golden("panoptica")["images"][name]["strict"]
    quality = panoptic_quality(table(name))
    for key in ("tp", "fp", "fn", "pq", "rq"):
        assert getattr(quality, key) == near(expected[key]), key
    if quality.tp:
        assert quality.sq == near(expected["sq"])


@pytest.mark.parametrize("ground", ["stuff", "void"])
@pytest.mark.parametrize("name", NAMES)
def test_panoptic_quality_by_class_with_void_equals_torchmetrics(name: str, ground: str) -> None:
    # The peer keeps the background of a panoptic map as a segment (stuff) or as void.
    reference, prediction = (np.where(m == 0, 9999, m) if ground == "stuff" else m for m in maps()[name])
    both = overlap_table(reference, prediction)
    classes = [
        {int(v): "ground" if v == 9999 else CLASSES[int(v) % 3] for v in labels}
        for labels in (both.references, both.predictions)
    ]
    measured = panoptic_quality_by_class(both, *classes, things=("first", "second"), stuff=("ground",))
    expected = golden("torchmetrics")["images"][name][ground]
    for (_, quality), values in zip(measured.counts.items(), expected["classes"], strict=True):
        assert np.nan_to_num([quality.pq, quality.sq, quality.rq]).tolist() == near_all(values)
    overall = measured.overall
    if overall.classes:
        assert [overall.pq, overall.sq, overall.rq] == near_all(expected["overall"])


def test_the_published_example_of_stardist() -> None:
    """StarDist's sample against itself turned by two degrees: its README has PQ .19490, mean IoU .65847."""
    a, b, n = (
        np.repeat(column, [row[2] for row in golden("stardist-sample")["pairs"]]) for column in columns()
    )
    match = match_objects(overlap_table(a, b))
    assert n.size == 512 * 512
    assert (match.tp, match.fp, match.fn) == (37, 88, 88)
    assert match.panoptic_quality == pytest.approx(0.19490, abs=1e-5)
    assert match.mean_matched_iou == pytest.approx(0.65847, abs=1e-5)
    assert match.panoptic_quality == near(golden("stardist-sample")["panoptic_quality"])
    assert panoptic_quality(overlap_table(a, b)).tp == 36, "one of the 37 has an IoU of exactly .5"


def columns() -> list[np.ndarray]:
    return list(np.array(golden("stardist-sample")["pairs"]).T)
