"""Means and intervals: reproducible, of the right width, and open about what they leave out."""

import math

import numpy as np
import pytest

from medseg.metrics.summary import bootstrap_weights, summarize


def test_each_resample_draws_as_many_cases_as_there_are():
    weights = bootstrap_weights(7, 500, np.random.default_rng(0))
    assert weights.shape == (500, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == pytest.approx(1.0)
    assert weights.std() == pytest.approx(math.sqrt(6 / 7), rel=0.05)


def test_the_interval_has_the_width_that_theory_gives():
    rng = np.random.default_rng(1)
    values = rng.normal(10.0, 2.0, (400, 1))
    statistic = summarize(values, bootstrap_weights(400, 4000, rng))[0]
    half = 1.96 * values.std() / math.sqrt(400)
    assert statistic.mean == pytest.approx(values.mean())
    assert statistic.low == pytest.approx(values.mean() - half, abs=0.03)
    assert statistic.high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).random((12, 3))
    draws = [summarize(values, bootstrap_weights(12, 1000, np.random.default_rng(5))) for _ in range(2)]
    other = summarize(values, bootstrap_weights(12, 1000, np.random.default_rng(6)))
    assert draws[0] == draws[1]
    assert draws[0] != other


def test_undefined_and_infinite_values_are_left_out_and_counted():
    values = np.array([[1.0, math.nan], [3.0, math.inf], [math.inf, math.nan], [5.0, math.nan]])
    first, second, mean = summarize(values, bootstrap_weights(4, 1000, np.random.default_rng(0)))
    assert (first.mean, first.median, first.n, first.n_infinite, first.n_undefined) == (3.0, 3.0, 3, 1, 0)
    assert math.isnan(second.mean) and math.isnan(second.low)
    assert (second.n, second.n_infinite, second.n_undefined) == (0, 1, 3)
    assert (mean.mean, mean.n_infinite, mean.n_undefined) == (3.0, 2, 3)


def test_one_case_has_a_mean_but_no_interval():
    statistic = summarize(np.array([[0.8]]), bootstrap_weights(1, 1000, np.random.default_rng(0)))[0]
    assert statistic.mean == 0.8
    assert math.isnan(statistic.low) and math.isnan(statistic.high)


def test_classes_of_a_case_are_resampled_together():
    x = np.random.default_rng(3).normal(size=50)
    opposite = np.stack([x, -x], axis=1)  # the mean of both classes is 0 in every case, so in every resample
    mean = summarize(opposite, bootstrap_weights(50, 1000, np.random.default_rng(0)))[-1]
    assert abs(mean.low) < 1e-12 and abs(mean.high) < 1e-12
