"""``medseg evaluate``: the table, JSON alone on stdout, files, exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg.errors import DatasetError, OutputError, PartialFailure
from medseg.io import write
from tests.metrics.test_evaluation import label_map


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for k, name in enumerate(("a", "b")):
        write(label_map(2 + k), tmp_path / "p" / f"{name}.nii.gz")
        write(label_map(2), tmp_path / "r" / f"{name}.nii.gz")
    return [str(tmp_path / "p"), str(tmp_path / "r")]


def run(*arguments: str):
    from medseg.cli import app

    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_the_summary_fits_eighty_columns(folders):
    result = run(*folders)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("mean")
    assert "Dice" in result.stdout and "HD95" in result.stdout


def test_json_to_stdout_is_alone_there(folders):
    data = json.loads(run(*folders, "--json", "-").stdout)
    assert set(data) == {"foreground_mean", "mean", "metric_per_case", "medseg"}


def test_all_files_are_written(folders, tmp_path):
    out = [str(tmp_path / name) for name in ("o.json", "o.html", "o.csv")]
    assert run(*folders, "--json", out[0], "--html", out[1], "--csv", out[2]).exit_code == 0
    assert all(Path(name).stat().st_size > 100 for name in out)


def test_the_tolerance_and_labels_reach_the_metrics(folders, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2}}))
    data = json.loads(
        run(*folders, "--json", "-", "--nsd-mm", "9", "--labels", str(tmp_path / "d.json")).stdout
    )
    assert list(data["medseg"]["labels"]) == ["liver", "tumour"]
    assert data["medseg"]["summary"]["mean"]["nsd"]["mean"] == 1.0


def test_a_failed_case_is_exit_code_three_after_the_others_were_printed(folders):
    write(label_map(shape=(12, 11, 7)), Path(folders[0]) / "b.nii.gz")
    result = run(*folders)
    assert isinstance(result.exception, PartialFailure)
    assert result.exception.exit_code == 3
    assert "mean" in result.stdout


def test_one_fold_is_measured_against_all_labels_and_the_rest_is_named_once(folders, caplog):
    (Path(folders[0]) / "b.nii.gz").unlink()
    result = run(*folders)
    assert result.exit_code == 0
    assert "1 references have no prediction" in caplog.text and caplog.text.count("not in the means") == 1


def test_no_match_is_exit_code_four(folders, tmp_path):
    write(label_map(), tmp_path / "other" / "z.nii.gz")
    result = run(folders[0], str(tmp_path / "other"))
    assert isinstance(result.exception, DatasetError)
    assert result.exception.exit_code == 4


@pytest.mark.parametrize("option", ["--json", "--html", "--csv"])
@pytest.mark.parametrize("where", ["file/x", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_measuring(
    folders, tmp_path, option, where, monkeypatch
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("medseg.metrics.evaluate", None)
    error = run(*folders, option, str(tmp_path / where)).exception
    assert isinstance(error, OutputError) and str(tmp_path / where) in str(error)


def test_an_error_of_the_system_is_one_sentence():
    from medseg.cli import _said

    assert str(_said(FileNotFoundError(2, "No such file or directory", "a/b"))) == (
        "a/b: No such file or directory. Check the path and its permissions."
    )
    assert _said(OSError(28, "No space left on device")).exit_code == 7
    assert _said(MemoryError()).exit_code == 7
