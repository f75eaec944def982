"""Training side by side with nnU-Net: iterations a second, CPU seconds an iteration, memory, the loss.

Both get the same cases, fold, plan (patch 40x56x40, features 32 to 256), batch, recipe (deep supervision,
nnU-Net's augmentation, a third of the batch forced to foreground) and initial weights; nnU-Net is its own
trainer, unchanged. A stamp is taken after every iteration, so start-up counts for neither; CPU seconds count
augmentation, wherever it runs; iterations before the queues are settled are left out::

    python tests/benchmarks/train_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is a virtual environment with nnunetv2 2.8.1; DATA has ``hippocampus/{images,labels}``. Patches are
drawn at random by both, so the losses agree where means over windows differ by less than their own noise.
"""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import hippocampus
from measure import Cost, Row, measure, memory, parser, python, rounded, save_result
from preprocess_vs_nnunet import NNUNET, nnunet_environment

from medseg.io import open_dataset
from medseg.nets import build_network
from medseg.plan import make_plan, save_plan
from medseg.preprocess import build_store
from medseg.train.recipes import NNUNET as RECIPE

CONFIGURATION = "3d_fullres"
CASES = 100
# The bar of the project, in iterations a second.
BAR = 1.5
# The first iterations are slower (allocation), and nnU-Net's workers fill their queue of six batches.
SETTLING = 3
WINDOWS = 5
# Means of two windows agree within this many standard errors of their difference.
ERRORS = 3.0
LIMIT_SECONDS = 5400.0
HERE = Path(__file__).parent


def main() -> None:
    """Run both in turns, with one thread, and with two for longer, so that the losses tell something."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--steps", type=int, default=12, help="iterations with one thread")
    options_of.add_argument("--curve", type=int, default=60, help="iterations with two threads")
    options = options_of.parse_args()
    if options.quick:
        options.steps, options.curve = 2, 2
    rows, evidence = [], {}
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        folder = Path(name)
        prepare(options, folder)
        for threads, steps in ((1, options.steps), (2, options.curve)):
            found = compare(options, folder, threads, steps, options.rounds or 1)
            evidence[f"threads_{threads}"] = found
            rows.append(row_of(found, threads))
        rows.append(curve_row(found))
    save_result(options, rows, evidence)


def prepare(options: Namespace, folder: Path) -> None:
    """Make the dataset, one plan, both programs' preprocessed cases, and the initial weights."""
    root = hippocampus(options.data, folder, CASES)
    dataset = open_dataset(root)
    plan = make_plan(dataset, preset="nnunet")
    save_plan(plan, folder / "plan.yaml")
    build_store(dataset, plan, CONFIGURATION, folder / "store")
    torch.manual_seed(RECIPE.seed)  # as `medseg train` does
    network = build_network(plan.configuration(CONFIGURATION).architecture, 1, plan.labels.n_outputs, True)
    np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in network.state_dict().items()})
    if options.peers:
        environment = nnunet_environment(folder, root, plan, dataset)
        script = folder / "nnunet_preprocess.py"
        script.write_text(NNUNET)
        subprocess.run([python(options.peers), str(script)], env=environment, check=True, capture_output=True)


def compare(options: Namespace, folder: Path, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Run each program `rounds` times, in turns."""
    # sleeping instead of spinning threads, as medseg's command line has it: nnU-Net gains from it too
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    found: dict[str, Any] = {}
    for number in range(rounds):
        for name, command in commands(options, folder).items():
            out = folder / f"{name}_{threads}_{number}.json"
            cost = measure(
                [*command, str(folder), str(out), str(steps + SETTLING), str(threads), "auto"],
                environment,
                LIMIT_SECONDS,
            )
            one = iterations(json.loads(out.read_text()), cost)
            found.setdefault(name, []).append(one)
            print(f"  {name}, {threads} threads: {one}", flush=True)
    return found


def commands(options: Namespace, folder: Path) -> dict[str, list[str]]:
    """Return the programs that train."""
    ours = {"medseg": [sys.executable, str(HERE / "train_medseg_case.py")]}
    if not options.peers:
        return ours
    return {"nnunet": [python(options.peers), str(HERE / "train_nnunet_case.py")], **ours}


def iterations(stamps: list[list[float]], cost: Cost) -> dict[str, Any]:
    """Return what an iteration took: medians of wall time, the mean of CPU time (its clock ticks slowly)."""
    wall, cpu, losses = np.array(stamps).T
    first = SETTLING - 1
    return {
        "wall_seconds": round(float(np.median(np.diff(wall[first:]))), 3),
        "cpu_seconds": round(float((cpu[-1] - cpu[first]) / (len(cpu) - SETTLING)), 3),
        "losses": [round(float(loss), 4) for loss in losses],
        "process": rounded(asdict(cost)),
    }


def row_of(found: dict[str, Any], threads: int) -> Row:
    """Compare iterations a second, by wall time and by CPU time: the bar holds for both."""
    what = f"training iterations a second (and CPU seconds an iteration), hippocampus plan, {threads} threads"
    what = what.replace("1 threads", "1 thread")
    ours, theirs = found["medseg"], found.get("nnunet")
    if theirs is None:
        return Row(what, "-", said(ours))
    wall, cpu = (ratio(theirs, ours, key) for key in ("wall_seconds", "cpu_seconds"))
    found["ratio"] = {"wall": round(wall, 3), "cpu": round(cpu, 3)}
    words = f"{said(ours)}: {wall:.2f} x, {cpu:.2f} x by CPU"
    return Row(what, said(theirs), words, f"≥ {BAR} x", min(wall, cpu) >= BAR)


def ratio(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], key: str) -> float:
    """Return how many iterations we do for one of theirs."""
    return median(theirs, key) / median(ours, key)


def said(found: list[dict[str, Any]]) -> str:
    """Write speed, CPU time and memory."""
    peak = float(np.median([one["process"]["peak_pss_mb"] for one in found]))
    wall, cpu = median(found, "wall_seconds"), median(found, "cpu_seconds")
    return f"{1 / wall:.3f} it/s ({cpu:.2f} s) / {memory(peak)}"


def median(found: list[dict[str, Any]], key: str) -> float:
    """Return the median over rounds."""
    return float(np.median([one[key] for one in found]))


def curve_row(found: dict[str, Any]) -> Row:
    """Compare the mean losses of successive windows."""
    ours = windows(found["medseg"][0]["losses"])
    what = f"training loss, means of {WINDOWS} windows, same initial weights"
    words = " ".join(f"{mean:.3f}" for mean, _ in ours)
    if "nnunet" not in found:
        return Row(what, "-", words)
    theirs = windows(found["nnunet"][0]["losses"])
    apart = [abs(a - b) / np.hypot(s, t) for (a, s), (b, t) in zip(ours, theirs, strict=True)]
    found["apart_in_standard_errors"] = [round(float(a), 2) for a in apart]
    said = " ".join(f"{mean:.3f}" for mean, _ in theirs)
    return Row(what, said, words, f"within {ERRORS:g} standard errors", bool(max(apart) <= ERRORS))


def windows(losses: list[float]) -> list[tuple[float, float]]:
    """Return mean and standard error of each window; the trend inside it is not noise."""
    result = []
    for part in np.array_split(np.array(losses), min(WINDOWS, len(losses) // 3 or 1)):
        places = np.arange(len(part))
        slope, intercept = np.polyfit(places, part, 1)
        spread = (part - slope * places - intercept).std()
        result.append((float(part.mean()), float(spread / np.sqrt(len(part)))))
    return result


if __name__ == "__main__":
    main()
