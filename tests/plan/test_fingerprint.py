"""Fingerprints equal nnU-Net's digit by digit, and the weighted ones what nnU-Net estimates."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import DatasetError
from medseg.io import Dataset, open_dataset, write
from medseg.plan import ChannelStats, Fingerprint, extract_fingerprint
from medseg.plan import fingerprint as module
from medseg.volume import Geometry, Volume


@pytest.mark.parametrize("name", ["hippocampus", "aniso_ct", "two_channel_mr", "sagittal_ct"])
def test_exact_fingerprints_equal_nnunets(golden_dir: Path, name: str) -> None:
    folder = golden_dir / "preprocess" / name
    golden = Fingerprint.load(folder / "dataset_fingerprint.json")
    assert extract_fingerprint(open_dataset(folder)) == golden


@pytest.mark.parametrize("name", ["hippocampus", "aniso_ct", "two_channel_mr", "sagittal_ct"])
def test_weighted_fingerprints_agree_within_the_noise_of_sampling(golden_dir: Path, name: str) -> None:
    folder = golden_dir / "preprocess" / name
    golden = Fingerprint.load(folder / "dataset_fingerprint.json")
    began = time.process_time()
    ours = extract_fingerprint(open_dataset(folder), exact=False)
    assert time.process_time() - began < 3
    assert ours.spacings == golden.spacings
    assert ours.shapes_after_crop == golden.shapes_after_crop
    for channel, theirs in golden.foreground_intensity_properties_per_channel.items():
        stats = ours.foreground_intensity_properties_per_channel[channel]
        assert (stats.min, stats.max) == (theirs.min, theirs.max)
        for field in ("mean", "median", "std", "percentile_00_5", "percentile_99_5"):
            assert abs(getattr(stats, field) - getattr(theirs, field)) < 0.02 * theirs.std, field


def drawn_by_numpy(pools: list[np.ndarray], n: int) -> ChannelStats:
    """What nnU-Net computes, written down plainly (one channel)."""
    samples = np.concatenate(
        [np.random.RandomState(1234).choice(pool, n, replace=True) if len(pool) else [] for pool in pools]
    )
    low, median, high = np.percentile(samples, np.array((0.5, 50.0, 99.5)))
    return ChannelStats(
        max=float(samples.max()),
        mean=float(np.mean(samples)),
        median=float(median),
        min=float(samples.min()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
        std=float(np.std(samples)),
    )


def drawn_by_medseg(pools: list[np.ndarray], n: int) -> ChannelStats:
    channel = module._Drawn()
    for pool in pools:
        channel.add(pool, n, np.random.RandomState(1234), last=True)
    return channel.summary("test")


def pools_of(seed: int, sizes: list[int], scale: float) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(random.normal(size=size) * scale).astype(np.float32) for size in sizes]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.sampled_from([0, 1, 7, 300, 5000]), min_size=1, max_size=4).filter(any),
    n=st.sampled_from([1, 2, 100, 1000, 70_001, 200_003]),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_streamed_statistics_equal_numpys_on_all_samples_at_once(
    seed: int, sizes: list[int], n: int, scale: float
) -> None:
    # A case without foreground (size 0) promotes everything to float64, as in nnU-Net.
    pools = pools_of(seed, sizes, scale)
    assert drawn_by_medseg(pools, n) == drawn_by_numpy(pools, n)


def test_a_case_without_foreground_changes_the_last_digits() -> None:
    pools = pools_of(0, [3000, 3000], 300.0)
    single, double = drawn_by_medseg(pools, 10_000), drawn_by_medseg([*pools, np.empty(0)], 10_000)
    assert single.mean != double.mean
    assert single.mean == pytest.approx(double.mean, rel=1e-5)


def test_channels_share_one_generator() -> None:
    first, second = pools_of(1, [500, 500], 1.0)
    random = np.random.RandomState(1234)
    expected = [random.choice(pool, 1000, replace=True).mean() for pool in (first, second)]
    random = np.random.RandomState(1234)
    ours = []
    for index, pool in enumerate((first, second)):
        channel = module._Drawn()
        channel.add(pool, 1000, random, last=index == 1)
        ours.append(channel.summary("test").mean)
    assert ours == [float(mean) for mean in expected]


def test_weighted_statistics_give_each_case_the_same_weight() -> None:
    channel = module._Weighted()
    for values in ([0.0] * 10, [100.0]):
        channel.add(np.array(values, dtype=np.float32), 0, np.random.RandomState(), last=True)
    stats = channel.summary("test")
    assert (stats.mean, stats.std, stats.min, stats.max) == (50.0, 50.0, 0.0, 100.0)
    assert stats.percentile_99_5 == 100.0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-16384, 16383), min_size=1, max_size=50))
def test_weighted_percentiles_of_whole_numbers_are_whole_numbers_of_the_data(values: list[int]) -> None:
    channel = module._Weighted()
    channel.add(np.array(values, dtype=np.float32), 0, np.random.RandomState(), last=True)
    stats = channel.summary("test")
    assert {stats.median, stats.percentile_00_5, stats.percentile_99_5} <= set(map(float, values))
    assert stats.percentile_00_5 == min(values) and stats.percentile_99_5 == max(values)


def test_a_dataset_without_labelled_cases_is_an_error() -> None:
    empty: Any = SimpleNamespace(name="Nothing", training=(), channels=("CT",))
    with pytest.raises(DatasetError, match="Nothing"):
        extract_fingerprint(empty)


def test_no_foreground_anywhere_is_an_error() -> None:
    with pytest.raises(DatasetError, match="foreground"):
        drawn_by_medseg([np.empty(0, dtype=np.float32)], 10)
    with pytest.raises(DatasetError, match="foreground"):
        module._Weighted().summary("test")


def test_pictures_get_a_coarse_third_axis() -> None:
    assert module._reader_spacing((1.0, 1.0, 1.0), (700, 520, 1), "NaturalImage2DIO") == (999.0, 1.0, 1.0)
    assert module._reader_spacing((1.0, 2.0, 3.0), (70, 52, 9), "SimpleITKIO") == (3.0, 2.0, 1.0)


def small_dataset(folder: Path, arrays: list[np.ndarray]) -> Dataset:
    names = [f"c{number}" for number in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        mask = np.zeros(array.shape, np.uint8)
        mask[1:3, 1:3, 1:3] = 1
        geometry = Geometry(array.shape, np.eye(4))
        write(Volume(array.astype(np.float32), geometry), folder / "images" / f"{name}.nii.gz")
        write(Volume(mask, geometry), folder / "labels" / f"{name}.nii.gz")
    return open_dataset(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_nan_and_infinity_name_the_case_wherever_they_are(tmp_path: Path, value: float, exact: bool) -> None:
    good = np.random.default_rng(0).normal(size=(6, 6, 6))
    bad = good.copy()
    bad[5, 5, 4:] = value  # outside the foreground
    with pytest.raises(DatasetError, match=r"c1: the image holds 2 NaN or infinite voxels\. Repair it"):
        extract_fingerprint(small_dataset(tmp_path, [good, bad]), exact)


def test_blank_images_have_no_fingerprint_unless_one_shows_something(tmp_path: Path) -> None:
    blank = np.zeros((6, 6, 6))
    with pytest.raises(DatasetError, match="every image has one value everywhere"):
        extract_fingerprint(small_dataset(tmp_path / "a", [blank, blank + 3]), exact=False)
    seen = blank.copy()
    seen[1, 2, 3] = 5.0
    assert extract_fingerprint(small_dataset(tmp_path / "b", [blank, seen]), exact=False)
