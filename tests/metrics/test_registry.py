"""Every metric of the table keeps the promises that the table makes for it."""

import math

import numpy as np
import pytest

from medseg.metrics import METRICS, evaluate
from tests.phantoms import GEOMETRIES, ball, empty, touching

GRID = GEOMETRIES["anisotropic"]


def value(name: str, prediction, reference) -> float:
    result = evaluate([prediction], [reference], metrics=(name,), resamples=10)
    return result.rows[0].values[name]


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_prediction_has_the_best_value(name: str) -> None:
    assert value(name, ball(GRID), ball(GRID)) == METRICS[name].best


@pytest.mark.parametrize("name", METRICS)
def test_a_wrong_prediction_has_a_worse_value(name: str) -> None:
    shifted = ball(GRID).with_array(np.roll(ball(GRID).array, 2, axis=1))
    bigger = ball(GRID).with_array(np.maximum(shifted.array, ball(GRID).array))
    found = value(name, bigger, ball(GRID))
    assert math.isfinite(found)
    if name != "asd_reference_to_prediction":  # the reference lies inside
        assert abs(found - METRICS[name].best) > 1e-3


@pytest.mark.parametrize("name", METRICS)
def test_a_missed_object_is_never_flattered(name: str) -> None:
    result = evaluate([empty(GRID)], [touching(GRID)], metrics=(name,), resamples=10)
    missed = result.rows[0].values[name]
    assert not math.isfinite(missed) or abs(missed - METRICS[name].best) > 0.1


@pytest.mark.parametrize("name", METRICS)
def test_its_column_ends_in_its_unit_and_its_source_is_named(name: str) -> None:
    metric = METRICS[name]
    assert metric.column(name).startswith(name)
    assert any(package in metric.source for package in ("nnunetv2", "surface-distance", "MedPy"))
