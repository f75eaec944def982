"""Each normalisation scheme."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from medseg.errors import DataError, PlanError
from medseg.plan import ChannelStats
from medseg.plan.schema import Normalization
from medseg.preprocess.normalize import NORMALIZERS

STATS = ChannelStats(max=900, mean=50, median=40, min=-200, percentile_00_5=-100, percentile_99_5=300, std=25)


def image() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 60, (4, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_every_scheme_works_in_place_and_stays_finite_on_a_constant_image(name: Normalization) -> None:
    constant = np.full((3, 3, 3), 7.0, dtype=np.float32)
    NORMALIZERS[name](constant, None, STATS)
    assert np.isfinite(constant).all()


def test_ct_clips_to_the_percentiles_of_the_training_set() -> None:
    values = image()
    expected = (np.clip(values, -100, 300) - 50) / 25
    NORMALIZERS["ct"](values, None, STATS)
    assert_allclose(values, expected, rtol=1e-6)


def test_ct_without_statistics_is_refused() -> None:
    with pytest.raises(PlanError, match="statistics"):
        NORMALIZERS["ct"](image(), None, None)


def test_zscore_has_mean_zero_and_deviation_one() -> None:
    values = image()
    NORMALIZERS["zscore"](values, None, None)
    assert abs(values.mean()) < 1e-6
    assert values.std() == pytest.approx(1, abs=1e-6)


def test_zscore_with_a_mask_touches_only_the_mask() -> None:
    values, mask = image(), np.zeros((4, 5, 6), dtype=bool)
    mask[1:3] = True
    before = values.copy()
    NORMALIZERS["zscore"](values, mask, None)
    assert_array_equal(values[~mask], before[~mask])
    assert abs(values[mask].mean()) < 1e-6
    NORMALIZERS["zscore"](values, np.zeros_like(mask), None)  # an empty mask: nothing to do, no warning


def test_rescale_maps_the_range_to_zero_and_one() -> None:
    values = image()
    NORMALIZERS["rescale-0-1"](values, None, None)
    assert (values.min(), values.max()) == (0, 1)


def test_rgb_refuses_what_is_not_eight_bit() -> None:
    with pytest.raises(DataError, match=r"0\.\.255"):
        NORMALIZERS["rgb-0-1"](image() * 10, None, None)
