"""Datasets in nnU-Net's layout that both programs of a benchmark start from."""

import json
from pathlib import Path

import numpy as np

from medseg.io import write
from medseg.volume import Geometry, Volume


def hippocampus(data: Path, folder: Path, count: int) -> Path:
    """Lay the first `count` cases out as an nnU-Net dataset of links."""
    images = sorted((data / "hippocampus" / "images").glob("*.nii.gz"))[:count]
    root = folder / "raw" / "Dataset001_Bench"
    for sub in ("imagesTr", "labelsTr"):
        (root / sub).mkdir(parents=True)
    for image in images:
        case = image.name.removesuffix(".nii.gz").removesuffix("_0000")
        (root / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(image.resolve())
        (root / "labelsTr" / f"{case}.nii.gz").symlink_to(
            (data / "hippocampus" / "labels" / f"{case}.nii.gz").resolve()
        )
    describe(root, "MRI", ["anterior", "posterior"], len(images))
    return root


def synthetic_ct(folder: Path) -> Path:
    """Write two noisy CT-like volumes with three organs."""
    root = folder / "raw" / "Dataset001_Bench"
    shape = (256, 256, 120)
    i, j, k = np.ogrid[:256, :256, :120]
    for number in range(2):
        rng = np.random.default_rng(number)
        label = np.zeros(shape, dtype=np.uint8)
        for value, (x, y, z, r) in enumerate([(90, 120, 50, 40), (160, 130, 60, 30), (120, 170, 80, 20)], 1):
            label[(i - x - number) ** 2 + (j - y) ** 2 + 4 * (k - z) ** 2 < r * r] = value
        image = (rng.normal(0, 30, shape) + 60 * label).astype(np.int16)
        grid = Geometry(shape, np.diag([0.8, 0.8, 2.0, 1.0]))
        write(Volume(image, grid), root / "imagesTr" / f"ct_{number}_0000.nii.gz")
        write(Volume(label, grid), root / "labelsTr" / f"ct_{number}.nii.gz")
    describe(root, "CT", ["liver", "spleen", "kidney"], 2)
    return root


def describe(root: Path, channel: str, names: list[str], count: int) -> None:
    """Write ``dataset.json``."""
    description = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, **{name: value for value, name in enumerate(names, 1)}},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
