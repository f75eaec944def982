"""Prediction side by side with nnU-Net and with MONAI's sliding window: small cases from end to end.

All get the same images, plan and (random) weights; all are measured as whole processes, start-up included, as
a user runs them; with and without mirroring; and their label maps are compared at the end::

    python tests/benchmarks/predict_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is a virtual environment with nnunetv2 2.8.1; DATA has ``hippocampus/{images,labels}``. MONAI runs in
medseg's own environment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import hippocampus
from measure import (
    Cost,
    Row,
    alternate,
    medians,
    parser,
    percent,
    python,
    rounded,
    runs,
    save_result,
    seconds,
    took,
)

from medseg.bundle import save_bundle
from medseg.io import open_dataset, read
from medseg.nets import build_network
from medseg.plan import make_plan, to_nnunet

CONFIGURATION = "3d_fullres"
# Cases from which the plan is made; the patch is then 40x56x40.
PLANNED_CASES = 100
# The bar of the project: at most this part of nnU-Net's CPU seconds, without mirroring.
PART = 1 / 4
EQUAL_VOXELS = 0.999

# Runs in the peers' environment: our weights under nnU-Net's names (with its aliases) as a checkpoint.
CHECKPOINT = """
import json, sys
import numpy as np, torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
folder, weights = sys.argv[1:]
plans = json.load(open(folder + "/plans.json"))
net = plans["configurations"]["3d_fullres"]["architecture"]
network = get_network_from_plans(
    net["network_class_name"], net["arch_kwargs"], net["_kw_requires_import"], 1, 3, deep_supervision=False)
found = network.load_state_dict({k: torch.from_numpy(v) for k, v in np.load(weights).items()}, strict=False)
assert not found.unexpected_keys, found.unexpected_keys
torch.save({
    "network_weights": network.state_dict(),
    "init_args": {"configuration": "3d_fullres"},
    "trainer_name": "nnUNetTrainer",
    "inference_allowed_mirroring_axes": (0, 1, 2),
}, folder + "/fold_0/checkpoint_final.pth")
"""
NNUNET = """
import sys
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder
if __name__ == "__main__":
    predict_entry_point_modelfolder()
"""
MONAI = Path(__file__).with_name("predict_monai_case.py")
NAMES = {"nnunet": "nnU-Net", "monai": "MONAI", "medseg": "medseg"}


def main() -> None:
    """Run all in turns, without and with mirroring."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--cases", type=int)
    options_of.add_argument("--threads", type=int, help="for medseg; by default every core")
    options = options_of.parse_args()
    options.cases = options.cases or (2 if options.quick else 10)
    rows: list[Row] = []
    evidence: dict[str, Any] = {"cases": options.cases}
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        folder = Path(name)
        images = make_models(options, folder)
        for mirror in (False, True):
            word = "mirroring" if mirror else "no mirroring"
            print(f"predict {options.cases} cases, {word}", flush=True)
            rounds = options.rounds or (1 if mirror or options.quick else 2)
            result = compare(options, folder, images, mirror, rounds)
            evidence[word] = result
            rows += rows_of(result, options.cases, word, None if mirror else PART)
    save_result(options, rows, evidence)


def compare(
    options: argparse.Namespace, folder: Path, images: Path, mirror: bool, rounds: int
) -> dict[str, Any]:
    """Measure each program, `rounds` times."""
    output = folder / ("mirror" if mirror else "plain")
    commands = {
        "monai": monai_command(folder, images, output / "monai", mirror),
        "medseg": medseg_command(options, folder, images, output / "medseg", mirror),
    }
    if options.peers:
        commands = {
            "nnunet": nnunet_command(options, folder, images, output / "nnunet", mirror),
            **commands,
        }
    environment = {key: str(folder) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    costs = alternate(commands, rounds, environment)
    return {
        "median": {name: rounded(asdict(medians(found))) for name, found in costs.items()},
        "equal_voxels_with_medseg": {
            name: equal_voxels(output / name, output / "medseg") for name in commands if name != "medseg"
        },
        "runs": runs(costs),
    }


def rows_of(result: Mapping[str, Any], cases: int, word: str, part: float | None) -> list[Row]:
    """Say what each program took, and whether its labels are ours."""
    costs = {name: Cost(**values) for name, values in result["median"].items()}
    equal, ours = result["equal_voxels_with_medseg"], costs["medseg"]
    rows = []
    for name in ("nnunet", "monai"):
        if name not in costs:
            continue
        bar, met = "", None
        if name == "nnunet" and part is not None:
            limit = part * costs[name].cpu_seconds
            bar, met = f"≤ 1/{1 / part:.0f} = {seconds(limit)}", ours.cpu_seconds <= limit
        who = "" if name == "nnunet" else f"{NAMES[name]}: "
        what = f"predict {cases} hippocampus cases from end to end, same weights, {word}"
        rows.append(Row(what, who + took(costs[name]), took(ours), bar, met))
    if "nnunet" in equal:
        part_equal = equal["nnunet"]
        rows.append(
            Row(
                f"voxels with equal labels in that prediction, {word} (MONAI's: {percent(equal['monai'])})",
                "-",
                percent(part_equal),
                f"≥ {100 * EQUAL_VOXELS:g} %",
                part_equal >= EQUAL_VOXELS,
            )
        )
    return rows


def make_models(options: argparse.Namespace, folder: Path) -> Path:
    """Write the images, a bundle, and nnU-Net's model folder with the same weights; return the images."""
    root = hippocampus(options.data, folder, PLANNED_CASES)
    images = folder / "images"
    images.mkdir()
    for image in sorted((root / "imagesTr").iterdir())[: options.cases]:
        (images / image.name).symlink_to(image.resolve())
    plan = make_plan(open_dataset(root), preset="nnunet")
    torch.manual_seed(0)
    network = build_network(plan.configuration(CONFIGURATION).architecture, 1, plan.labels.n_outputs)
    weights = network.state_dict()
    head = weights["decoder.seg_layers.2.weight"]
    head -= head.mean(dim=1, keepdim=True)  # so that no class wins everywhere
    card = {"precision": "fp32"}
    save_bundle(folder / "bundle", plan, CONFIGURATION, {"0": weights}, (0, 1, 2), card)
    if options.peers:
        model = folder / "model"
        (model / "fold_0").mkdir(parents=True)
        (model / "plans.json").write_text(json.dumps(to_nnunet(plan)))
        (model / "dataset.json").write_text((root / "dataset.json").read_text())
        np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in weights.items()})
        command = [python(options.peers), "-c", CHECKPOINT, str(model), str(folder / "weights.npz")]
        subprocess.run(command, check=True)
        (folder / "nnunet_predict.py").write_text(NNUNET)
    return images


def medseg_command(
    options: argparse.Namespace, folder: Path, images: Path, output: Path, mirror: bool
) -> list[str]:
    """Return the command of a user."""
    command = [sys.executable, "-m", "medseg", "predict", str(images), "-m", str(folder / "bundle")]
    command += ["-o", str(output), "--device", "cpu"]
    command += [] if mirror else ["--no-mirror"]
    return command + (["--threads", str(options.threads)] if options.threads else [])


def monai_command(folder: Path, images: Path, output: Path, mirror: bool) -> list[str]:
    """Return a program of MONAI's parts."""
    command = [sys.executable, str(MONAI), str(images), str(folder / "bundle"), str(output)]
    return command + (["--mirror"] if mirror else [])


def nnunet_command(
    options: argparse.Namespace, folder: Path, images: Path, output: Path, mirror: bool
) -> list[str]:
    """Return nnU-Net's ``nnUNetv2_predict_from_modelfolder``."""
    command = [python(options.peers), str(folder / "nnunet_predict.py"), "-i", str(images), "-o", str(output)]
    command += ["-m", str(folder / "model"), "-f", "0", "-device", "cpu", "--disable_progress_bar"]
    return command + ([] if mirror else ["--disable_tta"])


def equal_voxels(theirs: Path, ours: Path) -> float:
    """Return the part of all voxels whose labels are equal."""
    equal = total = 0
    for path in sorted(theirs.glob("*.nii.gz")):
        name = path.name.replace("_0000.", ".")
        same = read(path).array == read(ours / name).array
        equal, total = equal + int(same.sum()), total + same.size
    return equal / total


if __name__ == "__main__":
    main()
