"""Prediction side by side with nnU-Net: CPU seconds and peak memory, in one run, alternating.

Both get the same images, plan and (random) weights; both are measured as whole processes, start-up included,
and their label maps are compared at the end::

    python tests/benchmarks/predict_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is a virtual environment with nnunetv2 2.8.1; DATA has ``hippocampus/{images,labels}``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from preprocess_vs_nnunet import Cost, hippocampus, measure

from medseg.bundle import save_bundle
from medseg.io import open_dataset, read
from medseg.nets import build_network
from medseg.plan import make_plan, to_nnunet

CONFIGURATION = "3d_fullres"
# Cases from which the plan is made; the patch is then 40x56x40.
PLANNED_CASES = 100
# The bars of the project, for ten cases without mirroring.
BAR_CPU_SECONDS = 15.0
BAR_PEAK_MB = 1000.0

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


def main() -> None:
    """Run both alternately and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="Python with nnunetv2; without it only medseg is measured")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds hippocampus/")
    parser.add_argument("--out", type=Path, default=Path("predict_vs_nnunet.json"))
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="for medseg; by default every core")
    parser.add_argument("--mirror", action="store_true", help="average over eight flips")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        result = compare(options, Path(name))
    options.out.write_text(json.dumps(result, indent=1))
    for program in result["median"]:
        row = result["median"][program]
        print(f"{program:<8}{row['cpu_seconds']:8.2f} CPU-s {row['peak_pss_mb']:8.0f} MB")
    row = result["median"]["medseg"]
    meets = row["cpu_seconds"] <= BAR_CPU_SECONDS and row["peak_pss_mb"] <= BAR_PEAK_MB
    if not options.mirror:
        print(f"medseg {'meets' if meets else 'misses'} {BAR_CPU_SECONDS:g} CPU-s and {BAR_PEAK_MB:g} MB")
    if "equal_voxels" in result:
        print(f"equal voxels: {100 * result['equal_voxels']:.4f} %")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both, `rounds` times each."""
    images = make_models(options, folder)
    commands = {"medseg": medseg_command(options, folder, images)}
    environment = dict(os.environ)
    if options.peers:
        commands = {"nnunet": nnunet_command(options, folder, images), **commands}
        environment |= {key: str(folder) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    runs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command, environment))
    result: dict[str, Any] = {
        "cases": options.cases,
        "mirror": options.mirror,
        "runs": {name: [asdict(cost) for cost in costs] for name, costs in runs.items()},
        "median": {name: medians(costs) for name, costs in runs.items()},
    }
    if options.peers:
        result["equal_voxels"] = equal_voxels(folder / "nnunet", folder / "medseg")
    return result


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
        command = [str(options.peers), "-c", CHECKPOINT, str(model), str(folder / "weights.npz")]
        subprocess.run(command, check=True)
        (folder / "nnunet_predict.py").write_text(NNUNET)
    return images


def medseg_command(options: argparse.Namespace, folder: Path, images: Path) -> list[str]:
    """Return the command of a user."""
    command = [sys.executable, "-m", "medseg", "predict", str(images), "-m", str(folder / "bundle")]
    command += ["-o", str(folder / "medseg"), "--device", "cpu"]
    command += [] if options.mirror else ["--no-mirror"]
    return command + (["--threads", str(options.threads)] if options.threads else [])


def nnunet_command(options: argparse.Namespace, folder: Path, images: Path) -> list[str]:
    """Return nnU-Net's ``nnUNetv2_predict_from_modelfolder``."""
    command = [str(options.peers), str(folder / "nnunet_predict.py"), "-i", str(images)]
    command += ["-o", str(folder / "nnunet"), "-m", str(folder / "model"), "-f", "0", "-device", "cpu"]
    return command + (
        ["--disable_progress_bar"] if options.mirror else ["--disable_tta", "--disable_progress_bar"]
    )


def medians(costs: list[Cost]) -> dict[str, float]:
    """Return the median of every measure."""
    return {name: float(np.median([asdict(cost)[name] for cost in costs])) for name in asdict(costs[0])}


def equal_voxels(theirs: Path, ours: Path) -> float:
    """Return the part of all voxels whose labels are equal."""
    equal = total = 0
    for path in sorted(theirs.glob("*.nii.gz")):
        same = read(path).array == read(ours / path.name).array
        equal, total = equal + int(same.sum()), total + same.size
    return equal / total


if __name__ == "__main__":
    main()
