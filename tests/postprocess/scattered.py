"""Predictions with stray components, made by code: what post-processing is chosen on.

Run as a script inside an environment with nnunetv2 2.8.1 it prints what nnU-Net chooses; the numbers in
``test_select.py`` come from there::

    python -m venv peers; peers/bin/pip install nnunetv2==2.8.1
    peers/bin/python tests/postprocess/scattered.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np

SHAPE = (16, 18, 20)
N_CASES = 4
CLASSES = {"background": 0, "one": 1, "two": 2, "three": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3]}
REGION_ORDER = [1, 2, 3]


def scattered_case(seed: int, two_parts: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return prediction and reference (i, j, k), uint8.

    One cube holds 1, 2 and 3 in a row. The prediction has false islands of 1 and 3 far away.
    With `two_parts` label 2 has a second true part, small and apart, so that keeping the largest component of
    the foreground costs Dice.
    """
    rng = np.random.default_rng(seed)
    reference = np.zeros(SHAPE, np.uint8)
    reference[3:9, 3:9, 3:7] = 1
    reference[3:9, 3:9, 7:11] = 2
    reference[3:9, 3:9, 11:13] = 3
    if two_parts:
        reference[12:14, 12:15, 5:8] = 2
    prediction = reference.copy()
    flips = rng.random(SHAPE) < 0.1
    prediction[flips & (reference > 0)] = 0
    prediction[13, 2 : 4 + seed % 2, 16] = 1
    prediction[1, 14, 14 : 16 + seed % 3] = 3
    prediction[5, 5, 17] = 3
    return prediction, reference


def main() -> None:
    """Let nnU-Net choose, for classes and for regions."""
    import SimpleITK as sitk  # noqa: N813 - the name its users know
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

    for labels, order in ((CLASSES, None), (REGIONS, REGION_ORDER)):
        for two_parts in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                result = _choose(determine_postprocessing, sitk, Path(folder), labels, order, two_parts)
            dice = [result[key]["foreground_mean"]["Dice"] for key in ("input_folder", "postprocessed")]
            steps = [values["labels_or_regions"] for values in result["postprocessing_kwargs"]]
            print("regions" if order else "classes", f"two_parts={two_parts}", steps, dice)


def _choose(determine, sitk, folder, labels, order, two_parts):
    for side in ("prediction", "reference"):
        (folder / side).mkdir()
    for seed in range(N_CASES):
        for side, array in zip(("prediction", "reference"), scattered_case(seed, two_parts), strict=True):
            image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
            sitk.WriteImage(image, str(folder / side / f"case_{seed}.nii.gz"))
    dataset = {
        "labels": labels,
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
        "numTraining": N_CASES,
    }
    if order:
        dataset["regions_class_order"] = order
    determine(str(folder / "prediction"), str(folder / "reference"), _plans(), dataset, 1, False)
    return json.loads((folder / "prediction" / "postprocessing.json").read_text())


def _plans() -> dict[str, object]:
    return {
        "dataset_name": "Dataset001_Scattered",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {},
    }


if __name__ == "__main__":
    main()
