"""Trained nnU-Net models predicted with medseg, against what nnU-Net 2.8.1 itself predicted with them.

Each model folder goes to ``medseg predict`` as nnU-Net left it, mirroring on and off::

    python tests/benchmarks/goldens.py --golden GOLDEN

GOLDEN has ``inference/MODEL/{model,imagesTs,pred_mirror,pred_nomirror}``, for a cascade ``model_lowres`` too.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import ONE_THREAD, Row, measure, parser, percent, rounded, save_result

from medseg.io import read

# The bar of the project, for every model.
EQUAL_VOXELS = DICE = 0.999


@dataclass
class Agreement:
    """How two label maps, or many pairs of them, agree."""

    equal: int = 0
    voxels: int = 0
    worst_case: float = 1.0
    dice: float = 1.0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Take in one case: every label that either map has counts."""
        same = int((ours == theirs).sum())
        self.equal, self.voxels = self.equal + same, self.voxels + theirs.size
        self.worst_case = min(self.worst_case, same / theirs.size)
        for label in np.union1d(np.unique(ours), np.unique(theirs)):
            if label > 0:
                a, b = ours == label, theirs == label
                self.dice = min(self.dice, 2 * int((a & b).sum()) / int(a.sum() + b.sum()))

    def to_dict(self) -> dict[str, float]:
        """Return plain data."""
        return {
            "equal_voxels": self.equal / self.voxels,
            "equal_voxels_worst_case": self.worst_case,
            "dice_smallest": self.dice,
        }


def main() -> None:
    """Compare every model there is."""
    options_of = parser(__doc__ or "", peers=False)
    options_of.add_argument("--golden", type=Path, required=True, help="folder that holds inference/")
    options = options_of.parse_args()
    models = sorted(path.parent for path in (options.golden / "inference").glob("*/model"))
    if not models:
        raise SystemExit(f"{options.golden}: no inference/*/model in it. Pass the folder with the goldens.")
    models = models[:1] if options.quick else models
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        for model in models:
            found[model.name] = {}
            for word in ("mirror", "nomirror"):
                found[model.name][word] = result = predict(model, word, Path(name) / model.name / word)
                print(
                    f"  {model.name:<34}{word:<10}{percent(result['equal_voxels']):>12} equal, "
                    f"smallest Dice {result['dice_smallest']:.6f}",
                    flush=True,
                )
    save_result(options, rows_of(found), {"models": found})


def predict(model: Path, word: str, output: Path) -> dict[str, Any]:
    """Predict all cases of a model as a user does; return the agreement and what it took."""
    command = [sys.executable, "-m", "medseg", "predict", str(model / "imagesTs"), "-o", str(output)]
    command += ["-m", str(model / "model"), "--device", "cpu", "--threads", "1", "--precision", "fp32"]
    if (model / "model_lowres").is_dir():
        command += ["--previous", str(model / "model_lowres")]
    cost = measure([*command, *([] if word == "mirror" else ["--no-mirror"])], ONE_THREAD)
    agreement = Agreement()
    theirs = sorted((model / f"pred_{word}").glob("*.nii.gz"))
    assert theirs, f"{model.name}: nothing to compare with"
    for path in theirs:
        agreement.add(read(output / path.name).array, read(path).array)
    return {"cases": len(theirs), **agreement.to_dict(), **rounded(asdict(cost))}


def rows_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Say what agrees, for the worst of all models."""
    results = [(word, result) for by_word in found.values() for word, result in by_word.items()]
    rows = []
    for word, words in (("mirror", "with mirroring"), ("nomirror", "without")):
        equal = min(result["equal_voxels"] for each, result in results if each == word)
        dice = min(result["dice_smallest"] for each, result in results if each == word)
        rows.append(
            Row(
                f"{len(found)} trained nnU-Net models (3D, 2D, residual, regions), {words}: voxels as in "
                "nnU-Net's own prediction / smallest Dice of a label, worst model",
                "-",
                f"{percent(equal)} / {np.floor(dice * 1e5) / 1e5:.5f}",
                f"≥ {100 * EQUAL_VOXELS:g} % / {DICE:g}",
                equal >= EQUAL_VOXELS and dice >= DICE,
            )
        )
    return rows


if __name__ == "__main__":
    main()
