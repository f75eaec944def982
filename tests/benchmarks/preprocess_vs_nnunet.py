"""Preprocessing a dataset for training side by side with nnU-Net: CPU seconds and peak memory, in turns.

Both start from raw files in nnU-Net's layout and the same plan, and end with preprocessed files on disk;
both pay their own start-up::

    python tests/benchmarks/preprocess_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is a virtual environment with nnunetv2 2.8.1; DATA has ``hippocampus/{images,labels}``.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import hippocampus, synthetic_ct
from measure import Row, alternate, medians, parser, python, rounded, runs, save_result, seconds, took

from medseg.io import Dataset, open_dataset
from medseg.plan import Plan, extract_fingerprint, make_plan, save_plan, to_nnunet

CONFIGURATION = "3d_fullres"
# The bar of the project: at most a third of nnU-Net's CPU seconds.
PART = 1 / 3

NNUNET = """
import sys
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry
if __name__ == "__main__":
    sys.argv = ["preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1"]
    preprocess_entry()
"""
MEDSEG = """
import shutil, sys
from medseg.io import open_dataset
from medseg.plan import load_plan
from medseg.preprocess import build_store
shutil.rmtree(sys.argv[3], ignore_errors=True)
build_store(open_dataset(sys.argv[1]), load_plan(sys.argv[2]), "3d_fullres", sys.argv[3], threads=1)
"""


def main() -> None:
    """Measure every row."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--cases", type=int)
    options = options_of.parse_args()
    count = options.cases or (5 if options.quick else 100)
    rounds = options.rounds or (1 if options.quick else 2)
    rows, evidence = [], {}
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        folder = Path(name)
        root = hippocampus(options.data, folder / "a", count)
        ct = synthetic_ct(folder / "b")
        for what, dataset, spacing in (
            (f"preprocess {count} hippocampus cases for training", root, None),
            ("the same for 2 CTs of 256x256x120, resampled with order 3", ct, (1.5, 1.1, 1.1)),
        ):
            print(what, flush=True)
            row, evidence[what] = compare(what, dataset, options.peers, rounds, spacing)
            rows.append(row)
    save_result(options, rows, evidence)


def compare(
    what: str, root: Path, peers: Path | None, rounds: int, spacing: tuple[float, ...] | None
) -> tuple[Row, dict[str, Any]]:
    """Run both `rounds` times, in turns; return the row and every measurement."""
    folder = root.parents[1]
    dataset = open_dataset(root)
    plan = planned(dataset, spacing)
    save_plan(plan, folder / "plan.yaml")
    environment = nnunet_environment(folder, root, plan, dataset)
    script = folder / "nnunet_preprocess.py"
    script.write_text(NNUNET)
    store = str(folder / "store")
    commands = {"medseg": [sys.executable, "-c", MEDSEG, str(root), str(folder / "plan.yaml"), store]}
    if peers is not None:
        commands = {"nnunet": [python(peers), str(script)], **commands}
    costs = alternate(commands, rounds, environment)
    middle = {name: medians(found) for name, found in costs.items()}
    evidence = {name: rounded(asdict(cost)) for name, cost in middle.items()}
    ours, theirs = middle["medseg"], middle.get("nnunet")
    if theirs is None:
        return Row(what, "-", took(ours)), {**evidence, "runs": runs(costs)}
    limit = PART * theirs.cpu_seconds
    row = Row(what, took(theirs), took(ours), f"≤ 1/3 = {seconds(limit)}", ours.cpu_seconds <= limit)
    return row, {"median": evidence, "runs": runs(costs)}


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
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "1",
    }


if __name__ == "__main__":
    main()
