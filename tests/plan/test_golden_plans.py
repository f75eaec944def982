"""Plans equal nnU-Net 2.8.1's, field by field and as whole files."""

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.plan import DatasetInfo, Fingerprint, PlanOptions, from_nnunet, plan_dataset, to_nnunet
from medseg.plan.presets import PRESETS

PRESET_OF = {rules.planner: name for name, rules in PRESETS.items()}
FILES = [f"D{number:02d}" for number in range(18)]


def options_of(args: dict[str, Any]) -> PlanOptions:
    return PlanOptions(
        gpu_memory_gb=args.get("gpu_memory_target_in_gb"), target_spacing=args.get("overwrite_target_spacing")
    )


def made(
    fingerprint: Any, dataset_json: Any, golden: Any, planner: str, args: dict[str, Any]
) -> dict[str, Any]:
    seen = Fingerprint.from_dict(fingerprint)
    info = DatasetInfo.from_json(dataset_json, golden["dataset_name"], seen)
    plan = plan_dataset(seen, info, PRESET_OF[planner], options_of(args), args.get("overwrite_plans_name"))
    assert from_nnunet(golden, dataset_json) == plan.replace(options=PlanOptions())
    return to_nnunet(plan)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Dotted names of the fields that differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [d for key in keys for d in differences(ours.get(key), theirs.get(key), f"{path}.{key}")]
    return [] if ours == theirs else [f"{path}: {ours} != {theirs}"]


def golden_cases(content: dict[str, Any]) -> list[tuple[Any, str, dict[str, Any]]]:
    cases = [(plans, plans["experiment_planner_used"], {}) for plans in content["plans"].values()]
    variants = content.get("plans_variants", [])
    return cases + [(variant["plans"], variant["planner"], variant["args"]) for variant in variants]


@pytest.mark.parametrize("prefix", FILES)
def test_plans_and_their_variants_equal_nnunets_files(golden_dir: Path, prefix: str) -> None:
    (path,) = (golden_dir / "plans").glob(f"{prefix}_*.json")
    content = json.loads(path.read_text())
    for golden, planner, args in golden_cases(content):
        ours = made(content["fingerprint"], content["dataset_json"], golden, planner, args)
        assert differences(ours, golden) == [], f"{planner} {args}"
        assert json.dumps(ours) == json.dumps(golden), "key order or number type"


@pytest.mark.parametrize("index", range(44))
def test_plan_vectors_equal_nnunets(golden_dir: Path, index: int) -> None:
    vector = json.loads((golden_dir / "plans_vectors.json").read_text())[index]
    ours = made(vector["fingerprint"], vector["dataset_json"], vector["plans"], vector["planner"], {})
    assert differences(ours, vector["plans"]) == []


@pytest.mark.parametrize("name", ["hippocampus", "aniso_ct", "two_channel_mr", "sagittal_ct"])
def test_plans_of_real_datasets_equal_nnunets(golden_dir: Path, name: str) -> None:
    folder = golden_dir / "preprocess" / name
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    dataset_json = json.loads((folder / "dataset.json").read_text())
    paths = sorted(folder.glob("nnUNet*Plans.json"))
    assert paths
    for path in paths:
        golden = json.loads(path.read_text())
        ours = made(fingerprint, dataset_json, golden, golden["experiment_planner_used"], {})
        assert json.dumps(ours) == json.dumps(golden)


def test_all_golden_files_are_tested(golden_dir: Path) -> None:
    assert sorted(path.name[:3] for path in (golden_dir / "plans").glob("*.json")) == FILES
    assert len(json.loads((golden_dir / "plans_vectors.json").read_text())) == 44


def test_a_changed_constant_is_noticed(golden_dir: Path) -> None:
    content = json.loads((golden_dir / "plans" / "D00_msd_hippocampus_real.json").read_text())
    seen = Fingerprint.from_dict(content["fingerprint"])
    info = DatasetInfo.from_json(content["dataset_json"], "Dataset004_Hippocampus")
    plan = plan_dataset(seen, info, "nnunet", PlanOptions(rules={"coverage": 0.06}))
    assert differences(to_nnunet(plan), content["plans"]["default"])
