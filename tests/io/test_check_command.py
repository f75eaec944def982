"""`medseg check` in a terminal and for machines."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from medseg.cli.check import check
from medseg.io import write

from .conftest import label

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    result = typer.Typer()
    result.command()(check)
    return result


def test_a_healthy_dataset_exits_with_0(raw, app: typer.Typer) -> None:
    result = runner.invoke(app, [str(raw())])
    assert result.exit_code == 0
    assert result.stdout.strip().endswith("3 training cases looked at, nothing wrong.")


def test_errors_exit_with_4_and_warnings_with_0(raw, app: typer.Typer) -> None:
    folder = raw()
    write(label(values=()), folder / "labelsTr" / "a.nii.gz")
    assert runner.invoke(app, [str(folder)]).exit_code == 0
    (folder / "labelsTr" / "a.nii.gz").unlink()
    result = runner.invoke(app, [str(folder)])
    assert result.exit_code == 4
    assert "1 error\n" in result.stdout
    assert "a: the image has no label (labelsTr/a.nii.gz). Add the label map" in result.stdout
    assert "mend the errors before training" in result.stdout


def test_a_terminal_gets_lines_of_80_columns_and_a_pipe_one_line_a_finding(raw, app: typer.Typer) -> None:
    folder = raw()
    write(label(values=(1, 9)), folder / "labelsTr" / "a.nii.gz")
    (folder / "imagesTr" / "b_0000.nii.gz").write_bytes(b"x" * 400)
    terminal = runner.invoke(app, [str(folder)], env={"COLUMNS": "80", "FORCE_COLOR": "1"}).stdout
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.splitlines()]
    assert max(len(line) for line in plain if str(folder) not in line) <= 80
    assert any(line.startswith("    ") for line in plain)
    piped = runner.invoke(app, [str(folder)]).stdout.splitlines()
    assert len(piped) == 1 + 2 + 1  # the heading, two findings, the summary


def test_many_findings_of_a_kind_are_counted(raw, app: typer.Typer) -> None:
    folder = raw()
    for number in range(14):
        write(label(), folder / "labelsTr" / f"x{number}.nii.gz")
    output = runner.invoke(app, [str(folder)]).stdout
    assert "... and 4 more of the kind missing_image (--json lists all)" in output


def test_json_is_alone_on_stdout(raw, app: typer.Typer) -> None:
    folder = raw()
    (folder / "labelsTr" / "a.nii.gz").unlink()
    result = runner.invoke(app, [str(folder), "--json"])
    assert result.exit_code == 4
    content = json.loads(result.stdout)
    assert (content["training_cases"], content["test_cases"]) == (3, 0)
    assert (content["error"], content["warning"], content["info"]) == (1, 0, 0)
    assert content["findings"][0] == {
        "severity": "error",
        "case": "a",
        "code": "missing_label",
        "message": "the image has no label (labelsTr/a.nii.gz)",
        "remedy": "Add the label map, or move the image to imagesTs.",
    }


def test_a_path_that_does_not_exist_is_an_error_line(tmp_path: Path, app: typer.Typer) -> None:
    result = runner.invoke(app, [str(tmp_path / "absent"), "--json"])
    assert result.exit_code == 4
    assert json.loads(result.stdout)["findings"][0]["code"] == "layout"
