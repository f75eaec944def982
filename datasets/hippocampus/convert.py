"""Lay out MSD Task04, or a folder with images/ and labels/, as an nnU-Net v2 raw dataset."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import yaml

from medseg.errors import DatasetError
from medseg.files import atomic_folder, write_text
from medseg.io import Case, open_dataset

RECIPE = Path(__file__).with_name("dataset.yaml")


def convert(source: Path, out: Path, hold_out: int = 0, seed: int = 0) -> Path:
    """Copy the labelled cases of `source` to `out`; `hold_out` of them, drawn with `seed`, are its test set.

    Raises
    ------
    DatasetError
        `source` has no labelled cases, or not more than are to be held out.
    """
    recipe = yaml.safe_load(RECIPE.read_text())
    cases = [case for case in open_dataset(source).training if case.label is not None]
    if len(cases) <= hold_out:
        raise DatasetError(f"{source}: {len(cases)} labelled cases, of which {hold_out} were to be held out.")
    drawn = np.random.default_rng(seed).permutation(len(cases))[:hold_out]
    held = {cases[k].name for k in drawn}
    with atomic_folder(out) as folder:
        for case in cases:
            copy(case, folder, "Ts" if case.name in held else "Tr")
        description = {
            "name": recipe["title"],
            "licence": recipe["licence"],
            "reference": recipe["source"],
            "channel_names": {str(k): name for k, name in enumerate(recipe["channels"])},
            "labels": recipe["labels"],
            "numTraining": len(cases) - hold_out,
            "file_ending": ".nii.gz",
        }
        write_text(folder / "dataset.json", json.dumps(description, indent=2))
    return out


def copy(case: Case, folder: Path, part: str) -> None:
    """Copy the image and the label of one case."""
    assert case.label is not None
    for source, target in (
        (case.images[0], folder / f"images{part}" / f"{case.name}_0000.nii.gz"),
        (case.label, folder / f"labels{part}" / f"{case.name}.nii.gz"),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="Task04_Hippocampus, or a folder with images/ and labels/")
    parser.add_argument("out", type=Path, help="dataset folder to make, e.g. Dataset004_Hippocampus")
    parser.add_argument(
        "--hold-out", type=int, default=0, metavar="N", help="cases for imagesTs and labelsTs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of held-out cases")
    given = parser.parse_args()
    print(convert(given.source, given.out, given.hold_out, given.seed))


if __name__ == "__main__":
    main()
