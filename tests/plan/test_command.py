"""``medseg plan`` as a person types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import PlanError
from medseg.plan import Fingerprint, load_plan

from .phantom_fingerprints import abdomen

DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": 20,
    "file_ending": ".nii.gz",
}


def medseg(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medseg", "plan", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "80"})
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def described(tmp_path: Path) -> list[object]:
    folder = tmp_path / "Dataset123_Liver"
    folder.mkdir()
    (folder / "f.json").write_text(json.dumps(abdomen().to_dict()))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return ["--fingerprint", folder / "f.json", "--dataset-json", folder / "dataset.json"]


def test_golden_datasets_are_exported_exactly_without_images(golden_dir: Path, tmp_path: Path) -> None:
    content = json.loads((golden_dir / "plans" / "D09_wholebody_petct.json").read_text())
    (tmp_path / "f.json").write_text(json.dumps(content["fingerprint"]))
    (tmp_path / "d.json").write_text(json.dumps(content["dataset_json"]))
    golden = content["plans"]["ResEncL"]
    files = ["--fingerprint", tmp_path / "f.json", "--dataset-json", tmp_path / "d.json"]
    name = ["--dataset-name", golden["dataset_name"]]
    medseg(*files, *name, "--preset", "resenc-l", "--to", "nnunet", "-o", tmp_path / "plans.json")
    assert (tmp_path / "plans.json").read_text() == json.dumps(golden, indent=4)


def test_export_without_a_preset_is_nnunets_default(described: list[object], tmp_path: Path) -> None:
    medseg(*described, "--to", "nnunet", "-o", tmp_path / "plans.json")
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert plans["experiment_planner_used"] == "ExperimentPlanner"
    assert plans["dataset_name"] == "Dataset123_Liver"


def test_a_plan_file_is_written_and_summarised(described: list[object], tmp_path: Path) -> None:
    done = medseg(*described, "--preset", "cpu", "-o", tmp_path / "plan.yaml")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.preset == "cpu"
    assert "x".join(map(str, plan.configurations["3d_fullres"].patch_size)) in done.stdout


def test_explain_fits_eighty_columns_and_names_the_paper(described: list[object]) -> None:
    done = medseg(*described, "--preset", "nnunet", "--explain")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("patch size", "3d_lowres", "Isensee 2021", "Nature Methods", "coverage"):
        assert word in done.stdout


def test_json_is_alone_on_stdout(described: list[object]) -> None:
    plan = json.loads(medseg(*described, "--preset", "resenc-m", "--json").stdout)
    assert plan["preset"] == "resenc-m"
    both = json.loads(medseg(*described, "--json", "--explain").stdout)
    assert both["explanations"][0]["rule"]


def test_dry_run_writes_nothing(described: list[object], tmp_path: Path) -> None:
    medseg(*described, "--dry-run", "-o", tmp_path / "plan.yaml")
    assert not (tmp_path / "plan.yaml").exists()


def test_budgets_and_overrides_reach_the_plan(described: list[object]) -> None:
    extra: list[Any] = ["--ram-gb", 8, "--minutes", 60, "--overwrite-spacing", "2,1,1", "--gpu-memory-gb", 4]
    done = medseg("configurations.2d.batch_size=5", *described, "--preset", "nnunet", *extra, "--json")
    plan = json.loads(done.stdout)
    assert plan["options"]["ram_gb"] == 8 and plan["options"]["gpu_memory_gb"] == 4
    assert plan["configurations"]["3d_fullres"]["spacing"] == [2, 1, 1]
    assert plan["configurations"]["2d"]["batch_size"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "x.yaml"], 5, "DATASET"),
        (["nowhere", "-o", "x.yaml"], 4, "nowhere"),
        (
            ["--fingerprint", "none.json", "--dataset-json", "none.json", "-o", "x.yaml"],
            4,
            "none.json: no such file",
        ),
        (["x", "--to", "monai", "-o", "x.yaml"], 5, "--to monai"),
        (["x"], 5, "--out"),
        (["x", "--overwrite-spacing", "2,1", "-o", "x.yaml"], 5, "three numbers"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = medseg(*arguments, code=code)
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not Path("x.yaml").exists()


def test_a_negative_budget_is_refused(described: list[object]) -> None:
    assert "ram_gb" in medseg(*described, "--ram-gb", -1, "--json", code=5).stderr


def test_a_raw_dataset_is_planned_from_its_images(golden_dir: Path, tmp_path: Path) -> None:
    folder = golden_dir / "preprocess" / "hippocampus"
    seen = tmp_path / "fingerprint.json"
    extra = ["--fast", "--save-fingerprint", seen, "--preset", "nnunet", "--to", "nnunet"]
    medseg(folder, *extra, "-o", tmp_path / "plans.json")
    plans = json.loads((tmp_path / "plans.json").read_text())
    golden = json.loads((folder / "nnUNetPlans.json").read_text())
    for key in ("configurations", "transpose_forward", "image_reader_writer"):
        assert plans[key] == golden[key]
    assert len(Fingerprint.load(seen).spacings) == 12


def test_no_heavy_package_is_imported_without_images(described: list[object]) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from medseg.cli.plan import plan\n"
        f"seen, about = Path({str(described[1])!r}), Path({str(described[3])!r})\n"
        "plan(fingerprint=seen, dataset_json=about, preset='resenc-l', json=True)\n"
        "heavy = {'torch', 'monai', 'scipy', 'nibabel', 'SimpleITK', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("configurations.3d_fulres.batch_size=4", "did you mean '3d_fullres'?"),
        ("configurations.3d_fullres.batchsize=4", "did you mean 'batch_size'?"),
        ("configurations.3d_fullres.patch_size=[30,30,30]", "the product of its strides. Use (32, 32, 32)."),
        ("configurations.3d_fullres.spacing=[1,1]", "the network has 3 axes, but spacing has 2"),
        ("channels=[CT,PET]", "1 normalizations for 2 channels"),
        ("transpose_backward=[0,1,7]", "its inverse"),
    ],
)
def test_an_override_that_cannot_be_is_one_sentence(described: list[object], change: str, says: str) -> None:
    done = medseg(*described, "--dry-run", "--preset", "nnunet", change, code=5)
    assert says in done.stderr
    assert len(done.stderr) < 400


def test_swapped_files_are_named_for_what_they_are_not(described: list[object]) -> None:
    files = ["--fingerprint", described[3], "--dataset-json", described[1]]
    done = medseg(*files, "--dry-run", code=5)
    assert "dataset.json is not a fingerprint: foreground_intensity_properties_per_channel" in done.stderr
    assert len(done.stderr) < 400


def test_an_edited_plan_is_checked_when_it_is_loaded(described: list[object], tmp_path: Path) -> None:
    medseg(*described, "--preset", "nnunet", "-o", tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["configurations"]["3d_fullres"]["patch_size"][0] += 2
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"3d_fullres: patch .* must be divisible by"):
        load_plan(tmp_path / "plan.json")
