"""A folder of thirty cases, three of them bad: the others finish, and nothing but results is left."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg.bundle import save_bundle
from medseg.io import read, write
from medseg.volume import Geometry, Volume
from tests.infer.models import image, tiny_plan, tiny_weights

CASES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    plan = tiny_plan()
    save_bundle(root / "bundle", plan, "3d_fullres", {"0": tiny_weights(plan)}, (), {"precision": "fp32"})
    for number in range(CASES):
        write(image(seed=number), root / "images" / f"case{number:02d}_0000.nii.gz")
    truncated = root / "images" / "case04_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    series = Volume(np.ones((5, 6, 7, 8), np.float32), Geometry((6, 7, 8), np.eye(4)))
    write(series, root / "images" / "case11_0000.nii.gz")
    (root / "images" / "case29_0000.nii.gz").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def answer(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "medseg", "predict", str(folder / "images"), "--device", "cpu"]
    command += ["-m", str(folder / "bundle"), "-o", str(folder / "out"), "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    out, err = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):  # no process of its session is left
        os.killpg(process.pid, 0)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


BAD = ("case04", "case11", "case29")


def test_the_exit_code_says_that_a_part_failed(answer: "subprocess.CompletedProcess[str]") -> None:
    assert answer.returncode == 3, answer.stderr


def test_all_good_cases_have_their_label_map_and_nothing_else_is_there(
    answer: "subprocess.CompletedProcess[str]", folder: Path
) -> None:
    good = {f"case{number:02d}.nii.gz" for number in range(CASES)} - {f"{name}.nii.gz" for name in BAD}
    assert {path.name for path in (folder / "out").iterdir()} == good | {"predictions.json"}
    assert len(good) == 27
    for name in good:
        source = read(folder / "images" / name.replace(".nii.gz", "_0000.nii.gz"))
        assert read(folder / "out" / name).geometry.matches(source.geometry)


def test_the_report_has_a_row_for_every_case_in_their_order(
    answer: "subprocess.CompletedProcess[str]", folder: Path
) -> None:
    rows = json.loads((folder / "out" / "predictions.json").read_text())["cases"]
    assert [row["case"] for row in rows] == [f"case{number:02d}" for number in range(CASES)]
    assert {row["case"] for row in rows if row["status"] == "failed"} == set(BAD)
    assert all((row["error"] is None) == (row["status"] == "done") for row in rows)


def test_each_bad_case_is_one_sentence_and_the_last_lines_count(
    answer: "subprocess.CompletedProcess[str]",
) -> None:
    lines = answer.stderr.splitlines()
    reasons = {"case04": "truncated", "case11": "5 channels", "case29": "empty"}
    for name, reason in reasons.items():
        assert sum(name in line and reason in line for line in lines) == 1, answer.stderr
    assert len(lines) == 5 and lines[3].startswith("27 done, 3 failed in ")
    assert lines[4].startswith("Error: ") and "3 of 30 cases failed (case04, case11, case29)" in lines[4]
    assert answer.stdout.count("done") == 27


def test_the_truncated_file_is_what_it_says(folder: Path) -> None:
    with pytest.raises(EOFError), gzip.open(folder / "images" / "case04_0000.nii.gz") as stream:
        stream.read()
