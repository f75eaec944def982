"""A small nnU-Net dataset that each test breaks in its own way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.io import write
from medseg.volume import Geometry, Volume

GRID = Geometry((6, 5, 4), np.diag([1.0, 1.0, 2.0, 1.0]))


def image(seed: int, geometry: Geometry = GRID, scale: float = 100.0) -> Volume:
    rng = np.random.default_rng(seed)
    return Volume(rng.normal(0.0, scale, geometry.shape).astype(np.float32), geometry)


def label(geometry: Geometry = GRID, values: tuple[int, ...] = (1, 2)) -> Volume:
    array = np.zeros(geometry.shape, np.uint8)
    for place, value in enumerate(values):
        array[place % geometry.shape[0], 0, 0] = value
    return Volume(array, geometry)


def write_description(folder: Path, **changes: Any) -> None:
    """Write dataset.json; a key that is changed to None is left out."""
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Make a healthy nnU-Net raw dataset of three cases a, b, c."""

    def make(channels: int = 1, **changes: Any) -> Path:
        folder = tmp_path / "Dataset900_Small"
        for number, name in enumerate("abc"):
            for channel in range(channels):
                path = folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
                write(image(10 * number + channel), path)
            write(label(), folder / "labelsTr" / f"{name}.nii.gz")
        names = {"channel_names": {str(c): f"T{c}" for c in range(channels)}} if channels > 1 else {}
        write_description(folder, **{**names, **changes})
        return folder

    return make
