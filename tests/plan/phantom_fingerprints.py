"""Fingerprints made by code: an abdomen CT, a small crop, an anisotropic heart, a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg.plan import ChannelStats, DatasetInfo, Fingerprint

STATS = ChannelStats(
    max=400.0, mean=100.0, median=99.0, min=-200.0, percentile_00_5=-50.0, percentile_99_5=300.0, std=60.0
)


def fingerprint_of(
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    channels: int = 1,
    cropped: float = 1.0,
) -> Fingerprint:
    return Fingerprint(
        foreground_intensity_properties_per_channel={str(c): STATS for c in range(channels)},
        median_relative_size_after_cropping=cropped,
        shapes_after_crop=tuple(map(tuple, shapes)),
        spacings=tuple(map(tuple, spacings)),
    )


def abdomen() -> Fingerprint:
    random = np.random.default_rng(0)
    spacings = [(float(random.uniform(0.8, 1.5)), 0.8, 0.8) for _ in range(20)]
    return fingerprint_of(spacings, [(int(random.integers(250, 400)), 512, 512) for _ in range(20)])


def hippocampus() -> Fingerprint:
    return fingerprint_of([(1.0, 1.0, 1.0)] * 100, [(35, 50, 35)] * 100)


def heart() -> Fingerprint:
    return fingerprint_of([(10.0, 1.4, 1.4)] * 9 + [(5.0, 1.4, 1.4)] * 3, [(10, 240, 220)] * 12)


def picture() -> Fingerprint:
    return fingerprint_of([(999.0, 1.0, 1.0)] * 30, [(1, 520, 700)] * 30)


def info_of(dataset_json: Mapping[str, Any] | None = None, n_training: int | None = None) -> DatasetInfo:
    description: Mapping[str, Any] = dataset_json or {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": n_training or 20,
        "file_ending": ".nii.gz",
    }
    return DatasetInfo.from_json(description, "Dataset999_Phantom")
