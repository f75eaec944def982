"""Files of prompts for many images, and what is written about each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medseg.errors import Cancelled, ConfigError
from medseg.io import read, write
from medseg.log import Listener, listening
from medseg.prompt.automatic import Everything, FoundObject
from medseg.prompt.batch import load_prompts, name_of, prompt_cases
from medseg.prompt.found import Found
from medseg.prompt.results import report_path
from medseg.prompt.scene import Scene
from tests.phantoms import GEOMETRIES, noise
from tests.prompt.fakes import fake_propagate

ROOT = Path(__file__).resolve().parents[2]


def propagate(models: Any, target: Any, propagator: str, config: Any) -> Any:
    return fake_propagate(models.scene, target, propagator, config)


def write_cases(folder: Path, **values: Any) -> Path:
    """Write three images, of which one is broken, and prompts for them."""
    for name in ("straight", "oblique"):
        write(noise(GEOMETRIES[name]), folder / f"{name}.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b no gzip")
    cases = [
        {"image": "straight.nii.gz", "objects": {"a": [{"point": [4, 4, 4]}], "b": [{"point": [8, 6, 4]}]}},
        {"image": "broken.nii.gz", "objects": {"a": [{"point": [4, 4, 4]}]}},
        {
            "image": "oblique.nii.gz",
            "name": "tilted",
            "objects": {"a": {"prompts": [{"point": [4, 4, 4]}], "axis": 0}},
        },
    ]
    path = folder / "prompts.yaml"
    path.write_text(yaml.safe_dump({"coordinates": "voxel", "cases": cases, **values}))
    return path


def test_the_documented_example_says_what_it_means() -> None:
    file = load_prompts(ROOT / "configs" / "prompt" / "batch.yaml")
    first, second, third = file.cases
    assert [name_of(case) for case in file.cases] == ["patient_01", "patient_02_abdomen", "brain_mr"]
    assert [each.shape for each in first.objects[0].prompts] == ["box", "not_point"]
    assert (second.objects[0].axis, second.objects[0].range) == ("axial", (92.0, 171.0))
    assert file.options_of(first).window == "auto" and file.options_of(second).window == "liver"
    assert file.options_of(first).coordinates == "mm" and file.options_of(third).coordinates == "voxel"
    assert third.objects[1].prompts[0].mask == "brain_mr_drawn.nii.gz:3"


def test_one_bad_case_never_stops_the_others(tmp_path: Path) -> None:
    path = write_cases(tmp_path)
    rows = prompt_cases(path, tmp_path / "out", propagate=propagate)
    assert [row.status for row in rows] == ["done", "failed", "done"]
    assert "broken.nii.gz" in rows[1].error
    labels = read(tmp_path / "out" / "straight.nii.gz")
    assert labels.geometry.matches(GEOMETRIES["straight"]) and set(np.unique(labels.array)) == {0, 1, 2}
    assert labels.array[0, 4, 4, 4] == 1 and labels.array[0, 8, 6, 4] == 2
    assert read(tmp_path / "out" / "tilted.nii.gz").array[0, 4, 4, 4] == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"{name}{end}" for name in ("straight", "tilted") for end in (".nii.gz", ".prompt.json", ".png")),
        "prompts.json",
    }
    summary = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [row["status"] for row in summary["cases"]] == ["done", "failed", "done"]


def test_names_settings_and_prompts_are_written_beside_the_label_map(tmp_path: Path) -> None:
    prompt_cases(write_cases(tmp_path, window=[0, 150], sheets=False), tmp_path / "out", propagate=propagate)
    assert not list((tmp_path / "out").glob("*.png"))
    said = json.loads(report_path(tmp_path / "out" / "straight.nii.gz").read_text())
    assert said["labels"]["entries"] == {"background": 0, "a": 1, "b": 2}
    assert [row["name"] for row in said["objects"]] == ["a", "b"]
    first = said["provenance"]["objects"][0]
    assert first["window"]["low"] == 0 and first["window"]["high"] == 150
    assert first["prompts"][0]["kind"] == "point"
    assert str(tmp_path) not in json.dumps(said)


def test_an_error_that_nobody_expected_is_a_row_too(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails_once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("division by zero")
        return propagate(*args)

    rows = prompt_cases(write_cases(tmp_path, sheets=False), tmp_path / "out", propagate=fails_once)
    assert [row.status for row in rows] == ["failed", "failed", "done"]
    assert "ZeroDivisionError" in rows[0].error and rows[0].error.startswith("straight")


def test_a_stop_ends_the_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    class Stop(Listener):
        def cancelled(self) -> bool:
            return (tmp_path / "out" / "straight.nii.gz").exists()

    with pytest.raises(Cancelled), listening(Stop()):
        prompt_cases(write_cases(tmp_path, sheets=False), tmp_path / "out", propagate=propagate)
    assert not (tmp_path / "out" / "tilted.nii.gz").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("cases: []", "cases"),
        ("cases: [{image: a.nii.gz}]", "objects"),
        ("cases: [{image: a.nii.gz, objects: {a: []}}]", "prompts"),
        ("cases: [{image: a.nii.gz, objects: {a: [{pont: [1, 2, 3]}]}}]", "pont"),
        ("cases: [{image: a.nii.gz, objects: {a: [{point: [1, 2]}]}}]", "point"),
        ("cases: [{image: a.nii.gz, objects: {background: [{point: [1, 2, 3]}]}}]", "background"),
        ("cases: [{image: a.nii.gz, objects: 3}]", "objects"),
        ("cases: [{image: a.nii.gz, objects: [3]}]", "objects"),
        ("coordinates: lps\ncases: [{image: a.nii.gz, objects: {a: [{point: [1, 2, 3]}]}}]", "coordinates"),
        (
            "cases: [{image: x/a.nii.gz, objects: {a: [{point: [1, 2, 3]}]}}, "
            "{image: y/a.nii.gz, objects: {a: [{point: [1, 2, 3]}]}}]",
            "two cases are named 'a'",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cases: {image: a.nii.gz}", "cases: expected a list"),
        ("cases: [{image: a.nii.gz, objects: {a: [[1, 2, 3]]}}]", "prompts.0: expected a mapping"),
        ("cases: [{image: a.nii.gz, objects: {a: [{point: 1}]}}]", "point: expected a list"),
        (
            "cases: [{image: a.nii.gz, objects: {a: [{point: [1, 2, 3]}], a: [{point: [4, 5, 6]}]}}]",
            "line 1: the key 'a' is there twice",
        ),
        (
            '{"cases": [{"image": "a.png", "objects": {"a": [{"like": "b"}], "a": [{"like": "c"}]}}]}',
            "the key 'a' is there twice",
        ),
    ],
)
def test_a_wrong_file_is_said_in_the_words_of_yaml_and_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_prompts(path)
    assert message in str(caught.value) and "at least 1 item" not in str(caught.value)


def test_shared_voxels_have_nobody_to_ask(tmp_path: Path) -> None:
    rows = prompt_cases(
        write_shared(tmp_path, overlap="ask"), tmp_path / "out", propagate=propagate, resume=True
    )
    assert [row.status for row in rows] == ["failed"]
    assert "Use overwrite" in rows[0].error and not (tmp_path / "out" / "straight.nii.gz").exists()


def write_shared(folder: Path, **values: Any) -> Path:
    """Write prompts for two objects that share voxels."""
    write(noise(GEOMETRIES["straight"]), folder / "straight.nii.gz")
    objects = {"a": [{"point": [4, 4, 4]}], "b": [{"point": [5, 4, 4]}]}
    path = folder / "prompts.yaml"
    content = {"coordinates": "voxel", "cases": [{"image": "straight.nii.gz", "objects": objects}]}
    path.write_text(yaml.safe_dump({**content, **values}))
    return path


def test_the_name_of_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give a folder"):
        prompt_cases(write_shared(tmp_path), tmp_path / "out.nii.gz", propagate=propagate)
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = write_cases(tmp_path)
    path.write_text(path.read_text().replace("name: tilted", "name: ../tilted"))
    with pytest.raises(ConfigError, match="name"):
        load_prompts(path)


def test_everything_is_written_with_a_name_for_each_object(tmp_path: Path) -> None:
    geometry = GEOMETRIES["permuted"]
    scene = Scene.of(noise(geometry), (0, 200))
    labels = np.zeros(scene.shape, np.uint8)
    labels[2:6, 2:6, 2:4], labels[7:9, 2:4, 2:4] = 1, 2
    rows = tuple(
        FoundObject(n, 0.9, 0.95, int((labels == n).sum()), 10.0, 2, 3, (0.0, 0.0, 0.0)) for n in (1, 2)
    )
    found = Found(scene, Everything(labels, rows), 2, ())
    found.write("image.nii.gz", tmp_path / "all.nii.gz")
    assert np.array_equal(np.bincount(read(tmp_path / "all.nii.gz").array.ravel())[1:], [32, 8])
    said = json.loads((tmp_path / "all.prompt.json").read_text())
    assert list(said["labels"]["entries"]) == ["background", "object 1", "object 2"]
    assert [each.region.voxels for each in found.sheet()] == [32, 8]


def test_a_volume_of_several_channels_says_how_to_take_one(tmp_path: Path) -> None:
    path = write_cases(tmp_path, sheets=False)
    write(noise(GEOMETRIES["straight"], channels=2), tmp_path / "straight.nii.gz")
    rows = prompt_cases(path, tmp_path / "out", propagate=propagate)
    assert "2 channels" in rows[0].error and "--channel" in rows[0].error
