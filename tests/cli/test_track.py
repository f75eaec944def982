"""``medseg track`` from files to files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medseg.cli import app
from medseg.errors import ConfigError, GeometryError
from medseg.instances.export import write_label_map
from medseg.io import read, write
from medseg.volume import Geometry, Volume
from tests.instances.patients import body, lesions, rigid
from tests.instances.test_follow_up import BASELINE, GRID, LATER
from tests.instances.test_frames import frame


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Path, Path]:
    files = tmp_path / "baseline.nii.gz", tmp_path / "later.nii.gz"
    for path, balls in zip(files, (BASELINE, LATER), strict=True):
        write_label_map(lesions(GRID, balls), path)
    return files


def test_track_says_what_became_of_every_lesion(scans: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["track", *map(str, scans), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["counts"]["merged"] == report["counts"]["split"] == report["counts"]["new"] == 1
    assert report["response"]["overall"] == "PD"
    with open(out / "events.csv", newline="") as stream:
        assert [row["event"] for row in csv.DictReader(stream)] == [
            "persistent",
            "gone",
            "merged",
            "split",
            "new",
        ]
    assert {path.name for path in out.iterdir()} == {Path(file).name for file in report["files"].values()}


def test_track_registers_images_of_masks_and_says_it_in_words(tmp_path: Path) -> None:
    transform = rigid((0, 0, 8), (9, -6, 5))
    for name, moved, balls in (("a", np.eye(4), BASELINE[:2]), ("b", transform, BASELINE[:2])):
        mask = lesions(GRID, balls, moved).volume
        write(mask.with_array((mask.array > 0).astype(np.uint8)), tmp_path / f"{name}.nii.gz")
        write(body(GRID, moved), tmp_path / f"{name}_image.nii.gz")
    words = ["track", str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz"), "-o", str(tmp_path / "out")]
    images = ["--images", str(tmp_path / "a_image.nii.gz"), str(tmp_path / "b_image.nii.gz")]
    done = CliRunner().invoke(app, [*words, *images])
    assert done.exit_code == 0, done.output
    assert "2 objects, then 2: 2 persistent" in done.output
    assert "RECIST 1.1: SD" in done.output


def cropped(path: Path, columns: slice, out: Path) -> Path:
    volume = read(path)
    start = np.eye(4)
    start[0, 3] = columns.start or 0
    part = volume.array[0, columns]
    write(Volume(part, Geometry(part.shape, volume.geometry.affine @ start)), out)
    return out


def test_a_follow_up_that_shows_less_is_not_evaluable_and_says_why(
    scans: tuple[Path, Path], tmp_path: Path
) -> None:
    half = cropped(scans[0], slice(0, 22), tmp_path / "half.nii.gz")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["track", str(scans[0]), str(half), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "5 objects, then 1: 4 outside the follow-up, 1 persistent" in done.output
    assert "RECIST 1.1: NE (targets NE" in done.output and "not evaluable" in done.output
    with open(out / "events.csv", newline="") as stream:
        assert [row["event"] for row in csv.DictReader(stream)] == [
            "persistent",
            *["outside the follow-up"] * 4,
        ]
    response = json.loads((out / "follow_up.json").read_text())["response"]
    assert response["sum"] is None and response["targets"][-1]["now"] is None


def test_grids_that_do_not_overlap_are_refused(scans: tuple[Path, Path], tmp_path: Path) -> None:
    volume = read(scans[1])
    away = volume.geometry.affine.copy()
    away[2, 3] += 5000
    write(Volume(volume.array[0], Geometry(volume.shape, away)), tmp_path / "away.nii.gz")
    words = ["track", str(scans[0]), str(tmp_path / "away.nii.gz"), "-o", str(tmp_path / "out")]
    with pytest.raises(GeometryError, match=r"do not overlap.*--images"):
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--register", "rigid"], "--register rigid needs the images"),
        (["--cells", "--days", "3"], "--days does not go with --cells"),
    ],
)
def test_options_without_a_use_are_refused(
    scans: tuple[Path, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(
            app, ["track", *map(str, scans), "-o", str(tmp_path / "out"), *words], catch_exceptions=False
        )


def test_track_follows_cells_over_frames(tmp_path: Path) -> None:
    film = [[(20, 20, 6)], [(20, 20, 6)], [(16, 20, 4), (24, 20, 4)]]
    files = [tmp_path / f"t{n}.tif" for n in range(3)]
    for path, discs in zip(files, film, strict=True):
        write_label_map(frame([*discs, (45.0, 45.0, 5.0)]), path)
    done = CliRunner().invoke(app, ["track", *map(str, files), "-o", str(tmp_path / "out"), "--cells"])
    assert done.exit_code == 0, done.output
    assert "4 tracks over 3 frames, 1 division" in done.output
    assert len(np.unique(read(tmp_path / "out" / "tracks_0002.tif").array)) == 4


def test_wrong_numbers_of_scans_and_images_for_labels_are_refused(
    scans: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a baseline and a follow-up"):
        CliRunner().invoke(app, ["track", str(scans[0]), "-o", str(tmp_path / "out")], catch_exceptions=False)
    write(Volume(np.random.default_rng(0).normal(size=GRID.shape), GRID), tmp_path / "image.nii.gz")
    with pytest.raises(ValueError, match=r"image\.nii\.gz.*whole numbers"):
        words = ["track", str(tmp_path / "image.nii.gz"), str(scans[1]), "-o", str(tmp_path / "out")]
        CliRunner().invoke(app, words, catch_exceptions=False)
