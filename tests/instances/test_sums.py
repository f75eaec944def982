"""One pass against brute force, and the compiled loop against its numpy twin."""

from dataclasses import astuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from medseg.instances import sums
from medseg.instances.compiled import COMPILED
from medseg.types import IntArray
from tests.instances.shapes import scattered


def arrangements(labels: IntArray) -> list[IntArray]:
    """Return the same objects in every memory order that an array may have."""
    return [labels, np.asfortranarray(labels), labels[::-1], labels[:, ::2]]


@pytest.mark.parametrize("shape", [(9, 11), (7, 9, 8)])
def test_sums_are_those_of_brute_force_in_any_memory_order(shape: tuple[int, ...]) -> None:
    for labels in arrangements(scattered(shape, 9)):
        found = sums.sum_objects(labels, 9)
        for label in range(1, 10):
            where = np.argwhere(labels == label)
            assert found.voxels[label - 1] == len(where)
            if len(where):
                assert found.low[label - 1].tolist() == where.min(axis=0).tolist()
                assert found.high[label - 1].tolist() == (where.max(axis=0) + 1).tolist()
                np.testing.assert_allclose(found.centroid[label - 1], where.mean(axis=0))
                covariance = np.cov(where.T, bias=True) if len(where) > 1 else np.zeros((len(shape),) * 2)
                np.testing.assert_allclose(found.covariance[label - 1], covariance, atol=1e-12)


def test_moments_far_from_the_origin_are_exact() -> None:
    labels = np.zeros((3, 3, 60_000), np.int32)
    labels[1, 1, -2:] = 1
    assert sums.sum_objects(labels, 1).covariance[0, 2, 2] == 0.25


def test_intensities_are_those_of_numpy_and_skip_what_is_not_finite() -> None:
    labels = scattered((7, 9, 8), 6)
    rng = np.random.default_rng(1)
    for image in (
        rng.integers(0, 255, labels.shape).astype(np.uint8),
        rng.normal(1e6, 0.5, labels.shape),
        np.asfortranarray(rng.normal(size=labels.shape).astype(np.float32)),
        rng.integers(-(2**40), 2**40, labels.shape),
    ):
        if image.dtype.kind == "f":
            image[2, 3] = np.nan
        found = sums.sum_intensities(labels, image, 6)
        for label in range(1, 7):
            values = image[labels == label].astype(np.float64)
            kept = values[np.isfinite(values)]
            assert found.missing[label - 1] == len(values) - len(kept)
            ours = [
                getattr(found, name)[label - 1] for name in ("mean", "std", "minimum", "maximum", "total")
            ]
            if len(kept):
                theirs = [kept.mean(), kept.std(), kept.min(), kept.max(), kept.sum()]
                np.testing.assert_allclose(ours, theirs, rtol=1e-9)
            else:
                assert np.isnan(ours).all()


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: only the numpy twin is here")
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(9, 11), (5, 6, 7), (1, 1, 1)]))
def test_the_compiled_loop_and_its_numpy_twin_give_the_same_bits(seed: int, shape: tuple[int, ...]) -> None:
    labels = scattered(shape, 5, seed)
    image = np.random.default_rng(seed).normal(1000, 1, shape)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for compiled in (True, False):
            patch.setattr(sums, "COMPILED", compiled)
            found = (sums.sum_objects(labels, 5), sums.sum_intensities(labels, image, 5))
            results.append([*astuple(found[0]), *astuple(found[1]), sums.count_voxels(labels, 5)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
