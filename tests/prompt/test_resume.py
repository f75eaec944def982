"""A batch that was stopped: what is whole and the same is left out, all else is done again."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medseg.config import Config, read_mapping
from medseg.errors import Cancelled, ConfigError
from medseg.io import read, write
from medseg.log import Listener, listening
from medseg.prompt import propagators
from medseg.prompt.batch import prompt_cases
from medseg.prompt.results import Networks, report_path
from medseg.volume import Volume
from tests.phantoms import GEOMETRIES, noise
from tests.prompt.fakes import fake_propagate

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("one", "two", "three")


class FakeConfig(Config):
    size: int = 1


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A propagator of milliseconds is the default; it notes its calls, and the network that it asks."""
    calls: list[int] = []

    def propagate(models: Any, target: Any, config: FakeConfig) -> Any:
        calls.append(1)
        models.used.add("mobile-sam")
        return fake_propagate(models.scene, target, "fake" * config.size)

    monkeypatch.setitem(propagators.PROPAGATORS, "fake", (FakeConfig, propagate))
    monkeypatch.setattr(propagators, "DEFAULT", "fake")
    return calls


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Three images, and a click in each; the second begins with a drawn mask too."""
    geometry = GEOMETRIES["straight"]
    drawn = np.zeros(geometry.shape, np.uint8)
    drawn[3:6, 3:6, 3] = 1
    write(Volume(drawn, geometry), tmp_path / "drawn.nii.gz")
    rows = []
    for seed, name in enumerate(NAMES):
        write(noise(geometry, seed=seed), tmp_path / f"{name}.nii.gz")
        prompts: list[dict[str, Any]] = [{"point": [4, 4, 4]}]
        rows.append({"image": f"{name}.nii.gz", "objects": {"a": prompts}})
        if name == "two":
            prompts.append({"mask": "drawn.nii.gz:1"})
    path = tmp_path / "cases.yaml"
    path.write_text(yaml.safe_dump({"coordinates": "voxel", "sheets": False, "cases": rows}))
    return path


def go_on(cases: Path, networks: Networks | None = None) -> list[str]:
    """Prompt what is left, and return what became of each case."""
    return [row.status for row in prompt_cases(cases, cases.parent / "out", networks, resume=True)]


def test_what_is_done_is_not_asked_again_and_is_still_said(cases: Path, calls: list[int]) -> None:
    first = prompt_cases(cases, cases.parent / "out")
    assert len(calls) == 3
    again = prompt_cases(cases, cases.parent / "out", resume=True)
    assert len(calls) == 3 and [row.status for row in again] == ["skipped"] * 3
    assert [row.objects for row in again] == [row.objects for row in first]
    summary = json.loads((cases.parent / "out" / "prompts.json").read_text())
    assert [row["status"] for row in summary["cases"]] == ["skipped"] * 3


def test_without_the_option_everything_is_done_again(cases: Path, calls: list[int]) -> None:
    prompt_cases(cases, cases.parent / "out")
    rows = prompt_cases(cases, cases.parent / "out")
    assert len(calls) == 6 and [row.status for row in rows] == ["done"] * 3


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the file of prompts."""
    content = read_mapping(path)
    change(content)
    path.write_text(yaml.safe_dump(content))


def other_image(cases: Path) -> None:
    write(noise(GEOMETRIES["straight"], seed=9), cases.parent / "two.nii.gz")


def other_mask(cases: Path) -> None:
    volume = read(cases.parent / "drawn.nii.gz")
    write(volume.with_array(np.roll(volume.array, 1, axis=1)), cases.parent / "drawn.nii.gz")


def prompts_of_two(content: dict[str, Any]) -> Any:
    return content["cases"][1]["objects"]["a"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


OUT = Path("out")
# What happens to the second case, or to all, and how many are done again.
CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda cases: None, 0),
    "another image": (other_image, 1),
    "another mask": (other_mask, 1),
    "another click": (
        lambda cases: edit(cases, lambda c: prompts_of_two(c)[0].update(point=[5, 4, 4])),
        1,
    ),
    "one click more": (
        lambda cases: edit(cases, lambda c: prompts_of_two(c).append({"not_point": [2, 2, 2]})),
        1,
    ),
    "another name": (lambda cases: edit(cases, lambda c: c["cases"][1].update(name="second")), 1),
    "a setting of one": (lambda cases: edit(cases, lambda c: c["cases"][1].update(config={"size": 2})), 1),
    "a setting of all": (lambda cases: edit(cases, lambda c: c.update(window=[0, 150])), 3),
    "a default said": (lambda cases: edit(cases, lambda c: c.update(overlap="overwrite")), 0),
    "a comment": (lambda cases: cases.write_text("# mine\n" + cases.read_text()), 0),
    "no label map": (lambda cases: (cases.parent / OUT / "two.nii.gz").unlink(), 1),
    "half a label map": (lambda cases: cut(cases.parent / OUT / "two.nii.gz"), 1),
    "half a report": (lambda cases: cut(cases.parent / OUT / "two.prompt.json"), 1),
    "no summary": (lambda cases: (cases.parent / OUT / "prompts.json").unlink(), 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_case_is_done_again_where_it_would_come_out_otherwise(what: str, cases: Path) -> None:
    prompt_cases(cases, cases.parent / "out")
    act, again = CHANGES[what]
    act(cases)
    found = go_on(cases)
    assert found.count("done") == again and found.count("skipped") == 3 - again
    assert again != 1 or found[1] == "done"


def test_a_sheet_counts_where_it_is_wanted(cases: Path) -> None:
    prompt_cases(cases, cases.parent / "out")
    edit(cases, lambda c: c.update(sheets=True))
    assert go_on(cases) == ["done"] * 3 and go_on(cases) == ["skipped"] * 3
    (cases.parent / OUT / "two.png").unlink()
    assert go_on(cases) == ["skipped", "done", "skipped"]
    (cases.parent / OUT / "two.png").unlink()
    edit(cases, lambda c: c.update(sheets=False))
    assert go_on(cases) == ["skipped"] * 3


def test_other_weights_count_where_they_are_used(cases: Path, tmp_path: Path) -> None:
    ours, same, other = tmp_path / "ours.pt", tmp_path / "same.pt", tmp_path / "other.pt"
    ours.write_bytes(b"weights")
    same.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    prompt_cases(cases, cases.parent / "out", Networks({"mobile-sam": ours}))
    assert go_on(cases, Networks({"mobile-sam": same, "lite-medsam": other})) == ["skipped"] * 3
    assert go_on(cases, Networks({"mobile-sam": other})) == ["done"] * 3
    assert go_on(cases) == ["done"] * 3  # with the published ones


def test_a_bad_case_is_tried_again_and_stops_nobody(cases: Path, tmp_path: Path) -> None:
    good = (tmp_path / "two.nii.gz").read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(b"no image")
    assert go_on(cases) == ["done", "failed", "done"]
    assert go_on(cases) == ["skipped", "failed", "skipped"]
    (tmp_path / "two.nii.gz").write_bytes(good)
    assert go_on(cases) == ["skipped", "done", "skipped"]


def test_who_stops_a_batch_is_told_how_to_go_on(cases: Path, tmp_path: Path) -> None:
    class Stop(Listener):
        def cancelled(self) -> bool:
            return (tmp_path / "out" / "one.nii.gz").exists()

    with pytest.raises(Cancelled, match=r"of 3 cases done\. .* --resume"), listening(Stop()):
        go_on(cases)
    assert "done" in go_on(cases)


@pytest.mark.parametrize(
    "change, out",
    [
        ({"name": "one"}, "."),  # the second case would replace the image of the first
        ({"name": "drawn"}, "."),
        ({"image": "cell.png", "name": "cell"}, "."),  # its sheet would replace it
    ],
)
def test_no_result_replaces_what_is_read(
    change: dict[str, str], out: str, cases: Path, tmp_path: Path
) -> None:
    edit(cases, lambda c: c["cases"][1].update(change))
    edit(cases, lambda c: c.update(sheets=True))
    edit(cases, lambda c: [each.setdefault("name", f"r_{each['image'][:3]}") for each in c["cases"]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="would replace what is read"):
        prompt_cases(cases, tmp_path / out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_summary_does_not_replace_the_file_of_prompts(cases: Path, tmp_path: Path) -> None:
    edit(cases, lambda c: [each.update(name=f"result_{each['image'][:3]}") for each in c["cases"]])
    source = tmp_path / "prompts.json"
    source.write_text(json.dumps(read_mapping(cases)))
    with pytest.raises(ConfigError, match=r"prompts\.json: a result would replace"):
        prompt_cases(source, tmp_path)


KILLS = """
import os, signal, sys, time
from pathlib import Path
from medseg.prompt import batch
from tests.prompt.fakes import fake_propagate

CASES, SAFE = Path(sys.argv[1]), Path(sys.argv[1]).parent / "safe"
WRITTEN = ("two.nii.gz", "two.png", "one.nii.gz", "three.nii.gz")

def propagate(models, target, propagator, config):
    return fake_propagate(models.scene, target, propagator, config)

def draw(session, path, title):  # takes a second, and is not in question
    path.write_bytes(b"a sheet")

batch.write_sheet = draw

def hang_in(step, pipe):
    real = getattr(batch, step)
    def hangs(*args, **named):
        if step == "write_result":  # after the label map and its report
            found = real(*args, **named)
        if any("two" in str(each) for each in args):
            os.write(pipe, b"x")
            time.sleep(600)
        return found if step == "write_result" else real(*args, **named)
    setattr(batch, step, hangs)

batch.prompt_cases(CASES, SAFE, propagate=propagate)
whole = {name: (SAFE / name).read_bytes() for name in WRITTEN}
for step in ("open_image", "write_result", "write_sheet", "seal", "write_text"):
    out = CASES.parent / step
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        hang_in(step, writing)
        batch.prompt_cases(CASES, out, propagate=propagate)
        os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x", step
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rows = batch.prompt_cases(CASES, out, propagate=propagate, resume=True)
    second = "skipped" if step == "write_text" else "done"
    assert [row.status for row in rows] == ["skipped", second, "done"], (step, rows)
    assert {name: (out / name).read_bytes() for name in WRITTEN} == whole, step
print("all came out the same")
"""


def test_killed_at_any_step_and_resumed_it_ends_with_the_same_bytes(cases: Path) -> None:
    edit(cases, lambda c: c.update(sheets=True))
    command = [sys.executable, "-c", KILLS, str(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all came out the same\n", done.stderr


def test_a_report_tells_no_folder(cases: Path, tmp_path: Path) -> None:
    prompt_cases(cases, tmp_path / "out")
    report = report_path(tmp_path / "out" / "two.nii.gz").read_text()
    assert "made_from" in json.loads(report) and str(tmp_path) not in report
