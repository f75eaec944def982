"""Tuning the depth of splitting: every trial is what splitting with it gives, and the best is chosen."""

import time

import numpy as np
import pytest
from hypothesis import given, settings

from medseg.errors import ConfigError, GeometryError
from medseg.instances.split import BasinsConfig, split
from medseg.instances.tune import tune
from medseg.metrics.matching import match_objects
from medseg.metrics.overlap_table import overlap_table
from medseg.types import FloatArray
from tests.ellipsoids import touching_ellipsoids
from tests.instances.volumes import integer_heights


@settings(deadline=None)
@given(integer_heights(), integer_heights())
def test_every_trial_is_what_splitting_with_it_gives(height: FloatArray, other: FloatArray) -> None:
    reference = np.resize(other, height.shape).astype(np.int32)
    if not reference.any():
        reference.flat[0] = 1
    found = tune(height, reference, (1.0,) * height.ndim, depths=(0.0, 1.0, 3.0), relative=(0.0, 0.3))
    assert len(found.trials) == 6 and found.best == found.trials[0]
    for trial in found.trials:
        labels = split(height, (1.0,) * height.ndim, config=BasinsConfig(h=trial.h, rel=trial.rel)).labels
        table = overlap_table(reference, labels)
        match = match_objects(table, 0.5)
        assert (trial.objects, trial.f1) == (table.n_pred, match.f1)
        assert trial.pq == pytest.approx(2 * match.iou.sum() / (table.n_ref + table.n_pred), abs=1e-12)
        assert trial.f1 <= found.best.f1


def test_joining_rows_is_counting_joined_labels() -> None:
    rng = np.random.default_rng(0)
    reference, parts = rng.integers(0, 5, (9, 9)), rng.integers(0, 7, (9, 9))
    owners = np.array([0, 3, 3, 1, 8, 1, 3])
    table = overlap_table(reference, parts)
    found, expected = table.joined(owners[table.predictions]), overlap_table(reference, owners[parts])
    for name in (
        "references",
        "predictions",
        "reference_voxels",
        "prediction_voxels",
        "pairs",
        "pair_voxels",
    ):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_tuning_beats_a_wrong_depth_and_takes_little_time_for_each() -> None:
    truth = touching_ellipsoids(5, 150)
    found = tune(truth > 0, truth, (1.0, 1.0, 1.0))
    worst = min(trial.f1 for trial in found.trials)
    assert found.best.f1 > 0.97 > worst
    assert split(truth > 0, (1.0, 1.0, 1.0), config=found.config).count == found.best.objects
    start = time.process_time()
    tune(truth > 0, truth, (1.0, 1.0, 1.0), depths=(1.0,), relative=(0.0,))
    once = time.process_time() - start
    start = time.process_time()
    tune(truth > 0, truth, (1.0, 1.0, 1.0), depths=np.linspace(0, 3, 50).tolist(), relative=(0.0,))
    assert time.process_time() - start < 10 * once + 1, "49 more depths take no further sweep"


def test_depths_are_in_the_unit_of_the_spacing_or_of_the_heights() -> None:
    truth = touching_ellipsoids(2, 40)
    small = tune(truth > 0, truth, (0.1, 0.1, 0.1))
    large = tune(truth > 0, truth, (10.0, 10.0, 10.0))
    assert large.best.h == pytest.approx(100 * small.best.h)
    height = np.array([[100.0, 500.0, 400.0, 500.0, 100.0, 600.0]])
    assert {trial.h for trial in tune(height, np.array([[1, 1, 1, 1, 2, 2]]), (1.0, 1.0)).trials} >= {
        0.0,
        10.0,
    }


def test_what_cannot_be_tuned_is_one_sentence() -> None:
    mask = np.ones((3, 4), bool)
    with pytest.raises(ConfigError, match="no object"):
        tune(mask, np.zeros((3, 4), int), (1.0, 1.0))
    with pytest.raises(GeometryError, match="shape of the image"):
        tune(mask, np.ones((4, 3), int), (1.0, 1.0))
    with pytest.raises(ConfigError, match="nothing is to be tried"):
        tune(mask, np.ones((3, 4), int), (1.0, 1.0), depths=())


def test_an_empty_mask_finds_nothing_at_any_depth() -> None:
    found = tune(np.zeros((3, 4), bool), np.ones((3, 4), int), (1.0, 1.0))
    assert found.best.objects == 0 and found.best.f1 == 0
