"""The whole way through the command line, as a person or a script walks it, on a few tiny phantoms."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.io import read
from medseg.phantom import write_phantom_dataset

SHORT = ("epochs=1", "steps_per_epoch=2", "val_samples=2", "batch_size=1", "threads=1")


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def medseg(*words: object, cwd: Path | None = None) -> Answer:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "medseg", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    return Answer(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> set[str]:
    """Return every path below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@dataclass
class Walk:
    """A finished walk: folder, and what each command answered."""

    root: Path
    answers: dict[str, Answer]

    @property
    def dataset(self) -> Path:
        return self.root / "Dataset900_Phantom"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    root = tmp_path_factory.mktemp("walk")
    data = write_phantom_dataset(root / "Dataset900_Phantom", n_train=5, n_test=2, seed=3, size=24)
    answers = {}
    for name, words in {
        "check": ("check", data, "--json"),
        "plan": ("plan", data, "-o", root / "plan.yaml", "--preset", "cpu", "--json"),
        "train": ("train", data, "-o", root / "run", "--plan", root / "plan.yaml", "--json", *SHORT),
        "predict": ("predict", data / "imagesTs", "-m", root / "run", "-o", root / "predicted", "--json"),
        "evaluate": (
            *("evaluate", root / "predicted", data / "labelsTs", "--labels", data / "dataset.json"),
            *("--json", root / "metrics.json", "--html", root / "metrics.html"),
        ),
    }.items():
        answers[name] = medseg(*words)
        assert answers[name].code == 0, f"{name}: {answers[name].err}"
    return Walk(root, answers)


def test_json_is_all_that_stdout_holds(walk: Walk) -> None:
    for name in ("check", "plan", "train", "predict"):
        assert isinstance(walk.answers[name].json, dict), name


def test_training_leaves_a_bundle_a_validation_and_a_report(walk: Walk) -> None:
    result = walk.answers["train"].json
    assert result["steps"] == 2
    assert (walk.root / "run" / "bundle").is_dir()
    assert (walk.root / "run" / "fold_0" / "report.html").stat().st_size > 1000
    assert (walk.root / "run" / "fold_0" / "train.yaml").exists()


def test_label_maps_lie_on_the_grids_of_their_images(walk: Walk) -> None:
    images = sorted((walk.dataset / "imagesTs").iterdir())
    assert len(images) == 2
    for path in images:
        image = read(path)
        label = read(walk.root / "predicted" / path.name.replace("_0000", ""))
        assert label.geometry.matches(image.geometry)
        assert set(np.unique(label.array)) <= set(range(5))


def test_the_evaluation_names_every_class_and_case(walk: Walk) -> None:
    text = (walk.root / "metrics.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert all(
        name in text for name in ("liver", "spleen", "kidneys", "lesion", "phantom_005", "phantom_006")
    )
    assert "<svg" in (walk.root / "metrics.html").read_text()


@pytest.mark.parametrize(
    "what", ["run/bundle", "plan.yaml", "Dataset900_Phantom/imagesTs/phantom_005_0000.nii.gz"]
)
def test_info_tells_what_a_path_is(walk: Walk, what: str) -> None:
    answer = medseg("info", walk.root / what, "--json")
    assert answer.code == 0, answer.err
    assert "kind" in answer.json


def test_one_bad_case_becomes_a_row_and_the_others_finish(walk: Walk, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(walk.dataset / "imagesTs", images)
    (images / "broken_0000.nii.gz").write_bytes(b"\x1f\x8b not really gzip")
    answer = medseg("predict", images, "-m", walk.root / "run", "-o", tmp_path / "out", "--json")
    assert answer.code == 3
    assert "broken" in answer.err
    status = {row["case"]: row["status"] for row in answer.json["cases"]}
    assert status["broken"] == "failed"
    assert sum(value != "failed" for value in status.values()) == 2
    made = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert made == {"phantom_005.nii.gz", "phantom_006.nii.gz"}


def test_a_damaged_bundle_is_refused_before_anything_is_written(walk: Walk, tmp_path: Path) -> None:
    shutil.copytree(walk.root / "run" / "bundle", tmp_path / "bundle")
    weights = next((tmp_path / "bundle").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    answer = medseg("predict", walk.dataset / "imagesTs", "-m", tmp_path / "bundle", "-o", tmp_path / "out")
    assert answer.code == 6
    assert not list(tmp_path.glob("out/*.nii.gz"))


def test_a_finished_run_is_not_trained_over(walk: Walk) -> None:
    before = files(walk.root / "run")
    answer = medseg("train", walk.dataset, "-o", walk.root / "run", "--plan", walk.root / "plan.yaml", *SHORT)
    assert answer.code == 8
    assert "already trained" in answer.err
    assert files(walk.root / "run") == before


def test_an_unknown_setting_names_its_nearest_and_leaves_nothing(walk: Walk, tmp_path: Path) -> None:
    answer = medseg("train", walk.dataset, "-o", tmp_path / "run", "--preset", "cpu", "epoch=3")
    assert answer.code == 5
    assert "epochs" in answer.err
    assert not files(tmp_path)


def test_a_broken_dataset_is_refused_with_nothing_written(walk: Walk, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(walk.dataset, data)
    image = data / "imagesTr" / "phantom_001_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:2000])
    before = files(tmp_path)
    check = medseg("check", data, "--json")
    assert check.code == 4
    assert any(finding["case"] == "phantom_001" for finding in check.json["findings"])
    plan = medseg("plan", data, "-o", tmp_path / "plan.yaml", "--preset", "cpu")
    assert plan.code == 4
    assert "phantom_001" in plan.err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("check", "nowhere"), 4),
        (("plan", "nowhere", "-o", "plan.yaml"), 4),
        (("info", "nowhere"), 4),
        (("evaluate", "nowhere", "neither"), 4),
        (("plan", "nowhere", "-o", "/proc/x/plan.yaml"), 9),
        (("predict", "nowhere", "-m", "no-bundle", "-o", "out"), 6),
        (("train",), 2),
        (("no-such-verb",), 2),
    ],
)
def test_exit_codes_follow_the_table(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    answer = medseg(*words, cwd=tmp_path)
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert (answer.err + answer.out).strip()
    assert not files(tmp_path)
