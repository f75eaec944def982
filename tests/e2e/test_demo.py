"""The demo, made small: what it leaves, that it takes up what is there, and that a stop loses nothing."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from medseg.config import Config
from medseg.errors import AssetError, Cancelled
from medseg.io import open_dataset, read
from medseg.log import Listener, listening
from medseg.phantom import write_phantom_dataset
from medseg.prompt import propagators
from medseg.prompt.regions import Region
from medseg.prompt.target import Propagation

module = importlib.import_module("medseg.cli.demo")  # `medseg.cli.demo` is the command


class StopInTraining(Listener):
    """Asks to stop at the fifth step of the training."""

    def __init__(self) -> None:
        self.training: set[int] = set()
        self.steps = 0

    def started(self, key: int, label: str, total: int | None) -> None:
        if label.startswith("Training"):
            self.training.add(key)

    def advanced(self, key: int, steps: int, note: str) -> None:
        self.steps += key in self.training

    def cancelled(self) -> bool:
        return self.steps >= 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES", 5)
    monkeypatch.setattr(module, "TEST_CASES", 1)
    monkeypatch.setattr(module, "VOXELS", 24)
    monkeypatch.setattr(module, "OVERRIDES", ("epochs=2", "steps_per_epoch=6", "val_samples=2"))
    point_with(monkeypatch, grey)


def point_with(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let a stand-in for the networks be the default propagator."""
    monkeypatch.setitem(propagators.PROPAGATORS, "stand-in", (Config, function))
    monkeypatch.setattr(propagators, "DEFAULT", "stand-in")


def grey(models: Any, target: Any, _config: Config) -> Propagation:
    """Take all that is as bright as the middle of the box."""
    (box,) = target.prompts
    scene = models.scene
    i, j, k = scene.to_voxel(
        [(a + b) / 2 for a, b in zip(box.corner_mm, box.opposite_mm, strict=True)]
    ).round()
    value = float(scene.array[int(i), int(j), int(k)])
    return Propagation(Region.of(abs(scene.array - value) < 25))


def test_a_stopped_demo_goes_on_and_shows_its_result(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(Cancelled), listening(StopInTraining()):
        module.demo(folder)
    assert not (folder / "report.html").exists()
    capsys.readouterr()
    module.demo(folder, json=True)
    result = json.loads(capsys.readouterr().out)
    assert "phantoms" not in result["steps"]
    assert set(result["dice"]) == {"liver", "spleen", "kidneys", "lesion"}
    assert json.loads((folder / "result.json").read_text()) == result
    steps = [json.loads(line)["step"] for line in (folder / "run/fold_0/log.jsonl").read_text().splitlines()]
    assert steps == [6, 12]


def test_one_box_on_an_unseen_patient_is_shown_with_its_dice(folder: Path) -> None:
    prompted = json.loads((folder / "result.json").read_text())["prompted"]
    assert prompted["organ"] == module.PROMPTED and 0 < prompted["dice"] < 1
    labels = read(folder / "prompted.nii.gz")
    case = open_dataset(folder / "Dataset900_Phantom").test[0]
    assert labels.geometry.matches(read(case.images[0]).geometry) and labels.array.any()
    assert f"Pointed at: {module.PROMPTED}" in (folder / "report.html").read_text()


def test_a_demo_that_cannot_have_the_weights_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Propagation:
        raise AssetError("mobile-sam: cannot be had. Fetch it elsewhere.")

    point_with(monkeypatch, fail)
    data = write_phantom_dataset(tmp_path / "Dataset900_Phantom", n_train=1, n_test=1, seed=3, size=24)
    run = module.Run(tmp_path, None)
    run.prompt(open_dataset(data))
    assert "left out: mobile-sam" in caplog.text
    assert not run.prompted and "prompt" not in run.seconds and not list(tmp_path.glob("prompted*"))


def test_the_report_holds_pictures_of_every_unseen_patient(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for view in ("axial", "coronal"):
        assert f"phantom_005, {view}" in page
    assert page.count("data:image/png;base64") >= 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # one file, nothing to load


def test_a_second_demo_trains_nothing_and_finds_the_same(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = json.loads((folder / "result.json").read_text())
    module.demo(folder)
    after = json.loads((folder / "result.json").read_text())
    assert "train" not in after["steps"]
    assert after["dice"] == before["dice"]
    assert "report.html" in capsys.readouterr().out
