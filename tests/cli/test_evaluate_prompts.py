"""``medseg evaluate-prompts``."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.errors import ConfigError, OutputError, PartialFailure
from medseg.io import write
from medseg.volume import Geometry, Volume

SHAPE = (24, 26, 14)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:16, 7:18, 4:10] = 1
    image = np.random.default_rng(0).normal(90, 5, SHAPE) + 70.0 * labels
    geometry = Geometry(SHAPE, np.diag([1.0, 1.0, 2.0, 1.0]))
    (tmp_path / "data").mkdir()
    write(Volume(image.astype(np.float32), geometry), tmp_path / "data" / "image.nii.gz")
    write(Volume(labels, geometry), tmp_path / "data" / "labels.nii.gz")
    path = tmp_path / "cases.yaml"
    path.write_text("- {image: image.nii.gz, labels: labels.nii.gz, name: block, dataset: blocks}\n")
    return path


def run(cases: Path, *words: str | Path) -> Result:
    words = ("evaluate-prompts", cases, "--data", cases.parent / "data", *words)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_table_fits_eighty_columns_and_names_what_was_measured(cases: Path) -> None:
    done = run(cases, "--propagator", "watershed", "--compare", "watershed@z", "--compare", "extruded@z")
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.output.splitlines()) <= 80
    assert all(word in done.output for word in ("blocks (1)", "watershed@z", "extruded@z", "after the box"))


def test_all_files_are_written(cases: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "png")}
    words = ("--json", files["json"], "--html", files["html"], "--plot", files["png"])
    done = run(cases, "--propagator", "watershed", "--repeats", "2", "--seed", "5", "--clicks", "1", *words)
    assert done.exit_code == 0, done.output
    data = json.loads(files["json"].read_text())
    assert data["settings"]["seeds"] == [5, 6]
    assert [trace["seed"] for trace in data["traces"]] == [5, 6]
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["png"].stat().st_size > 5000


def test_a_dash_prints_json_and_nothing_else(cases: Path) -> None:
    done = run(cases, "--propagator", "watershed", "--clicks", "0", "--json", "-")
    assert json.loads(done.stdout)["entrants"] == ["watershed"]


def test_what_could_not_be_measured_ends_with_exit_code_three_and_the_rest_is_told(cases: Path) -> None:
    cases.write_text(cases.read_text() + "- {image: other.nii.gz, labels: labels.nii.gz}\n")
    done = run(cases, "--propagator", "watershed", "--clicks", "0")
    assert isinstance(done.exception, PartialFailure)
    assert done.exception.exit_code == 3
    assert "1 measurements failed; 1 are done" in str(done.exception)
    assert "blocks (1)" in done.output


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(
    cases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = "- {image: other.nii.gz, labels: labels.nii.gz, name: n, hint: Run convert.py first.}\n"
    cases.write_text(missing + missing.replace(", hint: Run convert.py first.", ""))
    assert isinstance(run(cases, "--propagator", "watershed", "--clicks", "0").exception, PartialFailure)
    where = f"other.nii.gz: no such file in {cases.parent / 'data'}. "
    assert where + "Run convert.py first." in caplog.text and where + "Check the path" in caplog.text


def test_wrong_words_are_refused_before_anything_is_measured(cases: Path) -> None:
    assert isinstance(run(cases, "--propagator", "watersched").exception, ConfigError)
    assert isinstance(run(cases, "--weights", "mobile-sam").exception, ConfigError)
    gone = run(cases, "--propagator", "watershed", "--json", cases / "out.json")
    assert isinstance(gone.exception, OutputError)
