"""Tiles, their weights, padding."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from medseg.errors import ConfigError
from medseg.geometry.tiles import gaussian_weights, pad_to, tile_slices, tile_starts

law = settings(max_examples=50, deadline=None)


@pytest.mark.parametrize(
    ("size", "patch", "step", "starts"),
    [(110, 64, 0.5, [0, 23, 46]), (64, 64, 0.5, [0]), (65, 64, 0.5, [0, 1]), (300, 128, 1.0, [0, 86, 172])],
)
def test_tile_starts_are_those_of_the_peer(size: int, patch: int, step: float, starts: list[int]) -> None:
    assert tile_starts(size, patch, step) == starts


@law
@given(patch=st.integers(1, 40), extra=st.integers(0, 90), step=st.floats(0.1, 1.0))
def test_tiles_cover_every_voxel_within_the_axis(patch: int, extra: int, step: float) -> None:
    size = patch + extra
    starts = tile_starts(size, patch, step)
    assert starts[0] == 0
    assert starts[-1] + patch == size
    assert all(0 <= b - a <= patch for a, b in pairwise(starts))


@law
@given(seed=st.integers(0, 1000))
def test_weights_are_positive_and_normalised_tiles_sum_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patch = tuple(int(n) for n in rng.integers(1, 9, 3))
    shape = tuple(p + int(e) for p, e in zip(patch, rng.integers(0, 12, 3), strict=True))
    weights = gaussian_weights(patch, np.float32)
    assert weights.min() > 0
    tiles = tile_slices(shape, patch)
    total = np.zeros(shape)
    for tile in tiles:
        total[tile] += weights
    assert total.min() > 0
    share = np.zeros(shape)
    for tile in tiles:
        share[tile] += weights / total[tile]
    assert_allclose(share, 1.0, rtol=1e-6)


@pytest.mark.parametrize("patch", [(40, 56, 40), (7, 16, 9), (64, 48)])
def test_gaussian_weights_equal_the_filtered_impulse_of_the_peer(patch: tuple[int, ...]) -> None:
    impulse = np.zeros(patch)
    impulse[tuple(p // 2 for p in patch)] = 1
    expected = ndimage.gaussian_filter(impulse, [p / 8 for p in patch], mode="constant")
    expected = (expected / (expected.max() / 10)).astype(np.float16)
    expected[expected == 0] = expected[expected > 0].min()
    assert_array_equal(gaussian_weights(patch), expected)


def test_a_flat_patch_visits_every_slice() -> None:
    tiles = tile_slices((3, 10, 8), (8, 8))
    assert len(tiles) == 3 * 2
    assert tiles[0] == (slice(0, 1), slice(0, 8), slice(0, 8))


def test_padding_is_centred_with_the_odd_voxel_behind() -> None:
    array = np.ones((2, 3, 4, 5), dtype=np.float32)
    padded, inner = pad_to(array, (6, 4, 8))
    assert padded.shape == (2, 6, 4, 8)
    assert inner == (slice(0, 2), slice(1, 4), slice(0, 4), slice(1, 6))
    assert_array_equal(padded[inner], array)
    assert padded.sum() == array.sum()


def test_an_array_that_is_large_enough_is_not_copied() -> None:
    array = np.ones((1, 9, 9, 9))
    assert pad_to(array, (9, 4, 9))[0] is array


def test_an_axis_shorter_than_the_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="Pad it with pad_to"):
        tile_starts(10, 20)
    with pytest.raises(ConfigError, match="step"):
        tile_starts(30, 20, 0.0)
