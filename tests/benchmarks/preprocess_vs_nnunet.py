"""Preprocessing side by side with nnU-Net: CPU seconds and peak memory, in one run, alternating.

Both start from raw files in nnU-Net's layout and the same plan, and end with preprocessed files on disk;
both pay their own start-up::

    python tests/benchmarks/preprocess_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is a virtual environment with nnunetv2 2.8.1; DATA has ``hippocampus/{images,labels}``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.io import Dataset, open_dataset, write
from medseg.plan import Plan, extract_fingerprint, make_plan, save_plan, to_nnunet
from medseg.volume import Geometry, Volume

CONFIGURATION = "3d_fullres"
PSS_INTERVAL_SECONDS = 0.05
# The bar of the project: at most a third of nnU-Net's CPU seconds.
BAR = 1 / 3

NNUNET = """
import sys
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry
if __name__ == "__main__":
    sys.argv = ["preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1"]
    preprocess_entry()
"""
MEDSEG = """
import sys
from medseg.io import open_dataset
from medseg.plan import load_plan
from medseg.preprocess import build_store
build_store(open_dataset(sys.argv[1]), load_plan(sys.argv[2]), "3d_fullres", sys.argv[3], threads=1)
"""


@dataclass(frozen=True)
class Cost:
    """What one process and its children took."""

    cpu_seconds: float
    wall_seconds: float
    peak_pss_mb: float


def main() -> None:
    """Run every row and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the environment with nnunetv2")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds hippocampus/")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        folder = Path(name)
        rows[f"hippocampus, {options.cases} cases"] = compare(
            hippocampus(options.data, folder / "a", options.cases), options.peers, options.rounds
        )
        rows["synthetic CT 256x256x120, 2 cases, resampled with order 3"] = compare(
            synthetic_ct(folder / "b"), options.peers, options.rounds, spacing=(1.5, 1.1, 1.1)
        )
    options.out.write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        verdict = "meets" if row["cpu_ratio"] <= BAR else "misses"
        print(
            f"{name}: nnU-Net {row['nnunet_cpu_seconds']:.2f} CPU-s {row['nnunet_peak_pss_mb']:.0f} MB, "
            f"medseg {row['medseg_cpu_seconds']:.2f} CPU-s {row['medseg_peak_pss_mb']:.0f} MB, "
            f"ratio {row['cpu_ratio']:.3f} ({verdict} the bar of a third)"
        )


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


def compare(root: Path, peers: Path, rounds: int, spacing: tuple[float, ...] | None = None) -> dict[str, Any]:
    """Run both `rounds` times, alternating; return medians and every measurement."""
    folder = root.parents[1]
    dataset = open_dataset(root)
    plan = planned(dataset, spacing)
    save_plan(plan, folder / "plan.yaml")
    environment = nnunet_environment(folder, root, plan, dataset)
    script = folder / "nnunet_preprocess.py"
    script.write_text(NNUNET)
    costs: dict[str, list[Cost]] = {"nnunet": [], "medseg": []}
    for number in range(rounds):
        costs["nnunet"].append(measure([str(peers), str(script)], environment))
        store = folder / f"store_{number}"
        command = [sys.executable, "-c", MEDSEG, str(root), str(folder / "plan.yaml"), str(store)]
        costs["medseg"].append(measure(command, dict(os.environ)))
    row: dict[str, Any] = {"runs": {name: [asdict(c) for c in found] for name, found in costs.items()}}
    for name, found in costs.items():
        for field in ("cpu_seconds", "wall_seconds", "peak_pss_mb"):
            row[f"{name}_{field}"] = float(np.median([getattr(cost, field) for cost in found]))
    row["cpu_ratio"] = float(
        np.median([c.cpu_seconds for c in costs["medseg"]])
        / np.median([c.cpu_seconds for c in costs["nnunet"]])
    )
    return row


def planned(dataset: Dataset, spacing: tuple[float, ...] | None) -> Plan:
    """Plan the dataset; `spacing` overrides the target so that something is resampled."""
    plan = make_plan(dataset, preset="nnunet")
    if spacing is None:
        return plan
    changed = plan.configuration(CONFIGURATION).replace(spacing=spacing)
    return plan.model_copy(update={"configurations": {**plan.configurations, CONFIGURATION: changed}})


def nnunet_environment(folder: Path, root: Path, plan: Plan, dataset: Dataset) -> dict[str, str]:
    """Give nnU-Net the same plan, and its environment variables for the subprocess only."""
    preprocessed = folder / "preprocessed" / root.name
    preprocessed.mkdir(parents=True)
    plans = to_nnunet(plan)
    plans["dataset_name"], plans["plans_name"] = root.name, "nnUNetPlans"
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    (preprocessed / "dataset.json").write_text((root / "dataset.json").read_text())
    fingerprint = extract_fingerprint(dataset).to_dict()
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return {
        **os.environ,
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "1",
    }


def measure(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command to its end; count the CPU time of it and of its children."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    watcher = PeakMemory(process.pid)
    reader.start()
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.stop.set()
    watcher.join()
    reader.join()
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed with {process.returncode}:\n{''.join(output)[-3000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, watcher.peak_mb)


class PeakMemory(threading.Thread):
    """Samples the proportional share of memory (PSS) of a process and its descendants. Linux only."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.stop = threading.Event()
        self.peak_mb = 0.0

    def run(self) -> None:
        while not self.stop.wait(PSS_INTERVAL_SECONDS):
            self.peak_mb = max(self.peak_mb, sum(pss_mb(pid) for pid in descendants(self.pid)))


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    for parent in found:  # grows while it runs
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # the process has just ended
                continue
    return found


def pss_mb(pid: int) -> float:
    """Return the proportional share of a process in MB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
