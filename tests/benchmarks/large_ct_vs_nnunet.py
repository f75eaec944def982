"""A large CT side by side with nnU-Net: everything but the convolutions, on one thread.

512 x 512 x 300 voxels of int16 at 0.8 x 0.8 x 1.5 mm, planned at 1.5 mm, patch 128^3, step 0.5, no flips: 64
tiles. Each program runs its own code from the file to the label map; only the network is replaced by logits
that cost next to nothing, and what they cost is taken off (``large_ct_case.py``)::

    python tests/benchmarks/large_ct_vs_nnunet.py --peers PEERS/bin/python

nnU-Net's 100 classes would need about 39 GB, so they are measured at half the size along each axis (8 tiles)
and extrapolated; medseg runs at both sizes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import (
    ONE_THREAD,
    Cost,
    Row,
    alternate,
    medians,
    memory,
    parser,
    percent,
    python,
    rounded,
    save_result,
    seconds,
)

from medseg.bundle import save_bundle
from medseg.io import read, write
from medseg.nets import build_network
from medseg.plan import Plan, from_nnunet
from medseg.volume import Geometry, Volume

CASE = Path(__file__).with_name("large_ct_case.py")
FULL, HALF, SMALL = (512, 512, 300), (256, 256, 150), (128, 128, 80)
SPACING = (0.8, 0.8, 1.5)
FEW, MANY = 5, 100
# Bars of the project: CPU seconds and GB of peak memory, agreement, part of nnU-Net's preprocessing.
BARS = {FEW: (15.0, 1.5), MANY: (60.0, 3.0)}
EQUAL_VOXELS = 0.999
PREPROCESS_PART, PREPROCESS_DIFFERENCE = 1 / 3, 1e-3

# Centre and radii in parts of the image, and Hounsfield units: body, lungs, liver, spleen, kidneys, spine.
ELLIPSOIDS = [
    ((0.5, 0.5, 0.5), (0.42, 0.31, 0.80), 30),
    ((0.34, 0.46, 0.85), (0.13, 0.18, 0.25), -820),
    ((0.66, 0.46, 0.85), (0.13, 0.18, 0.25), -820),
    ((0.33, 0.45, 0.52), (0.16, 0.17, 0.17), 105),
    ((0.71, 0.55, 0.53), (0.07, 0.09, 0.11), 120),
    ((0.37, 0.62, 0.32), (0.06, 0.06, 0.11), 160),
    ((0.63, 0.62, 0.32), (0.06, 0.06, 0.11), 160),
    ((0.5, 0.70, 0.5), (0.05, 0.05, 0.80), 420),
]
AIR, NOISE_AIR, NOISE_BODY = -1000, 6, 14
# Borders are this smooth, in parts of the radius.
EDGE = 0.03


@dataclass(frozen=True)
class Measured:
    """Median cost and stages of one program over one image."""

    cost: Cost
    stages: dict[str, float]

    @property
    def outside(self) -> float:
        """CPU seconds of the whole process, start-up included, without the replaced network."""
        return self.cost.cpu_seconds - self.stages.get("network", 0.0)

    @property
    def gigabytes(self) -> float:
        """Peak of the proportional share."""
        return self.cost.peak_pss_mb / 1024

    def took(self) -> str:
        """Write seconds outside the network, and memory."""
        return f"{seconds(self.outside)} / {memory(self.cost.peak_pss_mb)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "outside_cpu_seconds": round(self.outside, 3),
            **rounded(asdict(self.cost)),
            "stages_cpu_seconds": rounded(self.stages),
        }


def main() -> None:
    """Measure every row."""
    options = parser(__doc__ or "").parse_args()
    rounds = options.rounds or (1 if options.quick else 2)
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        bench = Bench(options, Path(name), rounds)
        rows, evidence = report(bench, options)
    save_result(options, rows, evidence)


def report(bench: "Bench", options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Measure everything; return the rows and the numbers behind them."""
    full, half = (SMALL, SMALL) if options.quick else (FULL, HALF)
    few = bench.predict(full, FEW, ["nnunet", "medseg"])
    many_half = bench.predict(half, MANY, ["nnunet", "medseg"], rounds=1)
    many = many_half if options.quick else bench.predict(full, MANY, ["medseg"], rounds=1)
    evidence = {
        "5_classes": few,
        "5_classes_constant": bench.predict(full, FEW, ["medseg"], "constant", rounds=1),
        "100_classes": many,
        "100_classes_half_size": many_half,
        "100_classes_half_size_constant": bench.predict(half, MANY, ["medseg"], "constant", rounds=1),
    }
    rows = [prediction_row(full, FEW, few)]
    if bench.peers:
        evidence["100_classes_extrapolated"] = extrapolate(few["nnunet"], many_half["nnunet"], full, half)
    rows.append(prediction_row(full, MANY, many, evidence.get("100_classes_extrapolated")))
    if bench.peers:
        rows.append(half_row(half, many_half))
    preprocessed = bench.preprocess(full)
    rows += [preprocess_row(full, preprocessed)] if bench.peers else []
    if bench.peers:
        rows.append(agreement_row(few["equal_voxels"], many_half["equal_voxels"]))
    return rows, plain(evidence | {"preprocess": preprocessed})


class Bench:
    """Inputs of both programs in one folder, and how they are run."""

    def __init__(self, options: argparse.Namespace, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.peers: Path | None = options.peers
        self.environment = {
            **ONE_THREAD,
            "nnUNet_def_n_proc": "1",
            **{key: str(folder) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        }

    def predict(
        self,
        shape: tuple[int, int, int],
        classes: int,
        programs: Sequence[str],
        kind: str = "competing",
        rounds: int | None = None,
    ) -> dict[str, Any]:
        """Predict with each program; return what they took, and how many voxels agree."""
        print(f"predict {shape}, {classes} classes, {kind} logits", flush=True)
        inputs = self.inputs(shape, classes)
        found: dict[str, Any] = self.run(
            inputs, "predict", programs, rounds or self.rounds, ["--classes", str(classes), "--kind", kind]
        )
        if "nnunet" in found:
            maps = [read(inputs / "out" / name / "ct.nii.gz").array for name in ("nnunet", "medseg")]
            found["equal_voxels"] = float((maps[0] == maps[1]).mean())
            found["labels_present"] = len(np.unique(maps[0]))
        return found

    def preprocess(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Preprocess with both programs; return what they took and the largest difference."""
        print(f"preprocess {shape}", flush=True)
        inputs = self.inputs(shape, FEW)
        found: dict[str, Any] = self.run(inputs, "preprocess", ["nnunet", "medseg"], self.rounds, [])
        if "nnunet" in found:
            ours, theirs = (np.load(inputs / "out" / name / "data.npy") for name in ("medseg", "nnunet"))
            found["max_difference"] = float(np.abs(ours - theirs).max())
        return found

    def run(
        self, inputs: Path, task: str, programs: Sequence[str], rounds: int, extra: list[str]
    ) -> dict[str, Measured]:
        """Run the programs in turns."""
        interpreters = {"medseg": Path(sys.executable), "nnunet": self.peers}
        commands = {
            name: [python(path), str(CASE), name, task, str(inputs), str(inputs / "out" / name), *extra]
            for name, path in interpreters.items()
            if path is not None and name in programs
        }
        commands = {name: commands[name] for name in programs if name in commands}
        stages: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, cost in alternate(commands, 1, self.environment).items():
                costs[name] += cost
                stages[name].append(json.loads((inputs / "out" / name / "stages.json").read_text()))
        return {name: summarize(costs[name], stages[name]) for name in commands}

    def inputs(self, shape: tuple[int, int, int], classes: int) -> Path:
        """Return the folder with image, plan and bundle; made once."""
        folder = self.folder / "x".join(map(str, shape))
        if not folder.exists():
            write(synthetic_ct(shape), folder / "images" / "ct_0000.nii.gz")
        if not (folder / f"bundle_{classes}").exists():
            plan = make_plan(folder, classes, shape)
            torch.manual_seed(0)
            settings = plan.configuration("3d_fullres")
            weights = build_network(settings.architecture, 1, classes).state_dict()
            save_bundle(folder / f"bundle_{classes}", plan, "3d_fullres", {"0": weights}, (), {})
        return folder


def summarize(costs: Sequence[Cost], stages: Sequence[Mapping[str, float]]) -> Measured:
    """Return the median of every measure; the stage "exit" is what the process took after its last stage."""
    cost = medians(costs)
    middle = {name: float(np.median([row[name] for row in stages])) for name in stages[0]}
    return Measured(cost, {**middle, "exit": cost.cpu_seconds - sum(middle.values())})


def synthetic_ct(shape: tuple[int, int, int]) -> Volume:
    """Return a body of smooth ellipsoids in noisy air, int16, seeded."""
    rng = np.random.default_rng(0)
    image = np.empty((1, *shape), dtype=np.int16)
    x, y = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in shape[:2])
    for k in range(shape[2]):
        z = (k + 0.5) / shape[2]
        slice_, inside = np.full(shape[:2], float(AIR), dtype=np.float32), np.zeros(shape[:2], np.float32)
        for number, (centre, radii, hounsfield) in enumerate(ELLIPSOIDS):
            r = ((x - centre[0]) / radii[0])[:, None] ** 2 + ((y - centre[1]) / radii[1])[None] ** 2
            r = np.sqrt(r + ((z - centre[2]) / radii[2]) ** 2)
            part = np.clip((1 - r) / EDGE + 0.5, 0, 1)
            slice_ += part * (hounsfield - slice_)
            inside = part if number == 0 else inside
        sigma = NOISE_AIR + (NOISE_BODY - NOISE_AIR) * inside
        slice_ += sigma * rng.standard_normal(shape[:2], dtype=np.float32)
        image[0, :, :, k] = np.clip(np.rint(slice_), -1024, 3071)
    return Volume(image, Geometry(shape, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])))


def make_plan(folder: Path, classes: int, shape: tuple[int, int, int]) -> Plan:
    """Write nnU-Net's plan and dataset files, and return the same plan."""
    labels = {"background": 0, **{f"organ_{value}": value for value in range(1, classes)}}
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    plans = nnunet_plans(shape)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / f"dataset_{classes}.json").write_text(json.dumps(dataset))
    return from_nnunet(plans, dataset)


def nnunet_plans(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return a plan of nnU-Net's usual form for CT at 1.5 mm."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    stages = 6
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [128, 128, 128] if shape != SMALL else [64, 64, 64],
        "median_image_size_in_voxels": [float(n) for n in low_shape(shape)],
        "spacing": [1.5, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": {**resampling, "order": 3},
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [4, 8, 16, 32, 32, 32],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * stages,
                "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    intensity = {"max": 1500.0, "mean": 75.0, "median": 80.0, "min": -900.0, "std": 90.0}
    return {
        "dataset_name": "Dataset001_Bench",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(SPACING[::-1]),
        "original_median_shape_after_transp": list(shape[::-1]),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {**intensity, "percentile_00_5": -180.0, "percentile_99_5": 320.0}
        },
    }


def low_shape(shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the shape at 1.5 mm, in reader order."""
    return tuple(round(n * mm / 1.5) for n, mm in zip(shape[::-1], SPACING[::-1], strict=True))


def extrapolate(
    few: Measured, half: Measured, full_shape: tuple[int, int, int], half_shape: tuple[int, int, int]
) -> Measured:
    """Return what nnU-Net would take for 100 classes at full size.

    Seconds: loading, preprocessing, writing and start-up as measured at full size with 5 classes; tiles and
    restoring grow with the number of voxels. Memory: nnU-Net's law per class, 2 + 8 bytes a voxel of the
    planned grid (float16 logits and the float64 copy that is resampled) and 2 a voxel of the image, beside
    what the process holds anyway. Measured memory times the ratio of the volumes would be more.
    """
    ratio = float(np.prod(full_shape) / np.prod(half_shape))
    stages = {name: few.stages[name] for name in ("start-up", "load", "preprocess", "write", "exit")}
    stages |= {name: ratio * half.stages[name] for name in ("tiles", "restore", "network", "rest")}
    law = MANY * (10 * np.prod(low_shape(full_shape)) + 2 * np.prod(full_shape)) / 2**20
    law_half = MANY * (10 * np.prod(low_shape(half_shape)) + 2 * np.prod(half_shape)) / 2**20
    held = max(0.0, half.cost.peak_pss_mb - law_half)
    return Measured(Cost(sum(stages.values()), 0.0, float(law + held), 0.0), stages)


def prediction_row(
    shape: tuple[int, int, int], classes: int, found: Mapping[str, Any], extrapolated: Measured | None = None
) -> Row:
    """Say what a prediction took outside the network."""
    ours = found["medseg"]
    limit, gigabytes = BARS[classes]
    theirs = extrapolated or found.get("nnunet")
    about = "about " if extrapolated else ""
    return Row(
        f"CT of {size(shape)}, {classes} classes: everything but the convolutions",
        "-" if theirs is None else f"{about}{theirs.took()}{' (extrapolated)' if extrapolated else ''}",
        ours.took(),
        f"≤ {limit:.0f} s / {gigabytes:g} GB",
        ours.outside <= limit and ours.gigabytes <= gigabytes,
    )


def half_row(shape: tuple[int, int, int], found: Mapping[str, Any]) -> Row:
    """Say what 100 classes took where both programs can run."""
    return Row(
        f"same, {MANY} classes at half size ({size(shape)})", found["nnunet"].took(), found["medseg"].took()
    )


def preprocess_row(shape: tuple[int, int, int], found: Mapping[str, Any]) -> Row:
    """Say what preprocessing took, start-up left out."""

    def work(one: Measured) -> float:
        return one.stages["load"] + one.stages["preprocess"]

    theirs, ours = found["nnunet"], found["medseg"]
    limit = PREPROCESS_PART * work(theirs)
    met = work(ours) <= limit and found["max_difference"] <= PREPROCESS_DIFFERENCE
    return Row(
        f"that CT read, cropped, normalised, resampled with order 3 (largest difference "
        f"{found['max_difference']:.0e})",
        f"{seconds(work(theirs))} / {memory(theirs.cost.peak_pss_mb)}",
        f"{seconds(work(ours))} / {memory(ours.cost.peak_pss_mb)}",
        f"≤ 1/3 = {seconds(limit)}, difference ≤ {PREPROCESS_DIFFERENCE:g}",
        met,
    )


def agreement_row(few: float, many: float) -> Row:
    """Say how many voxels agree."""
    return Row(
        f"voxels with equal labels in these predictions, {FEW} / {MANY} classes",
        "-",
        f"{percent(few)} / {percent(many)}",
        f"≥ {100 * EQUAL_VOXELS:g} %",
        min(few, many) >= EQUAL_VOXELS,
    )


def size(shape: tuple[int, ...]) -> str:
    """Write a shape."""
    return "x".join(map(str, shape))


def plain(values: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(values, Measured):
        return values.to_dict()
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return values


if __name__ == "__main__":
    main()
