"""The demo, made small: what it leaves, that it takes up what is there, and that a stop loses nothing."""

import importlib
import json
import re
from pathlib import Path

import pytest

from medseg.errors import Cancelled
from medseg.log import Listener, listening

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
