"""Counting objects of images: the shipped model, files, and what cannot be counted."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from medseg.cli import app
from medseg.errors import BundleError, Cancelled, DataError, GeometryError
from medseg.instances.count import count_objects, default_model, read_measured
from medseg.instances.finders import open_finder
from medseg.instances.models import load_object_model
from medseg.instances.scale import knows_spacing
from medseg.io import read
from medseg.log import Listener, listening
from medseg.volume import Geometry, Volume

MIDDLES = [(20, 20), (20, 60), (50, 34), (58, 90), (84, 16), (86, 60), (30, 100), (90, 98)]


def nuclei(noise: float = 6.0) -> np.ndarray:
    """Return a picture, (110, 120) uint8, of eight bright discs of 16 pixels."""
    rows, columns = np.indices((110, 120))
    discs = np.zeros((110, 120))
    for i, j in MIDDLES:
        discs[np.hypot(rows - i, columns - j) < 8] = 150
    soft = ndimage.gaussian_filter(discs, 1.0) + 25
    return (soft + np.random.default_rng(0).normal(0, noise, soft.shape)).clip(0, 255).astype(np.uint8)


def volume(array: np.ndarray, spacing: float = 0.5) -> Volume:
    shaped = array.T[None, :, :, None] if array.ndim == 2 else array[None]
    return Volume(shaped, Geometry(shaped.shape[1:], np.diag([spacing] * 3 + [1.0]), "micron"))


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["count", *map(str, arguments)], catch_exceptions=code != 0)
    if code == 0:
        assert result.exit_code == 0, result.output
        return result.stdout
    return str(result.exception)


def test_the_model_of_the_package_counts_discs_in_physical_units() -> None:
    found = count_objects(volume(nuclei()), load_object_model("nuclei2d", threads=1))
    assert len(found.instances) == len(MIDDLES)
    areas = found.table.columns["area_um2"]
    assert np.median(areas) == pytest.approx(np.pi * 4**2, rel=0.2)
    assert found.diameter == pytest.approx(8, rel=0.25)


def test_an_image_without_objects_has_none() -> None:
    empty = (np.random.default_rng(0).normal(20, 3, (90, 90))).clip(0, 255).astype(np.uint8)
    found = count_objects(volume(empty), load_object_model("nuclei2d", threads=1), diameter=8)
    assert len(found.instances) <= 1


def test_images_become_a_folder_of_results(tmp_path: Path) -> None:
    Image.fromarray(nuclei()).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", nuclei())
    out = tmp_path / "out"
    told = run(
        tmp_path / "a.png",
        tmp_path / "b.tif",
        "-o",
        out,
        "--pixel-size",
        "pixel",
        "--export",
        "roi",
        "--json",
    )
    rows = json.loads(told)["images"]
    assert [row["objects"] for row in rows] == [8, 8] and rows[0]["unit"] == "px"
    for name in ("a", "b"):
        with (out / f"{name}_objects.csv").open() as lines:
            table = list(csv.DictReader(lines))
        assert len(table) == 8 and "area_px2" in table[0]
        labels = tifffile.imread(out / f"{name}_labels.tif")
        assert not knows_spacing(read(out / f"{name}_labels.tif"))
        assert labels.shape == (110, 120) and len(np.unique(labels)) == 9
        assert (out / f"{name}_overlay.png").stat().st_size > 1000 and (out / f"{name}_rois.zip").exists()
    assert (out / "counts.csv").read_text().splitlines()[1:] == ["a.png,8,", "b.tif,8,"]
    index = (out / "report.html").read_text()
    for name in ("a", "b"):
        assert f'href="./{name}_report.html"' in index
        assert "area (px²)" in (out / f"{name}_report.html").read_text()


def test_a_size_that_no_file_tells_is_asked_for(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "b.tif", nuclei())
    with pytest.raises(GeometryError, match="--pixel-size pixel"):
        read_measured(tmp_path / "b.tif", None)
    assert read_measured(tmp_path / "b.tif", "0.5 micron").spacing[0] == 0.5


def test_one_bad_image_does_not_stop_the_others(tmp_path: Path) -> None:
    Image.fromarray(nuclei()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    told = run(tmp_path, "-o", tmp_path / "out", "--pixel-size", "1 micron", code=3)
    assert "1 of 2 images failed (b.png)" in told
    assert (tmp_path / "out" / "a_objects.csv").exists()
    with (tmp_path / "out" / "counts.csv").open() as lines:
        good, bad = csv.DictReader(lines)
    assert (good["objects"], good["error"]) == ("8", "")
    assert (bad["image"], bad["objects"]) == ("b.png", "") and bad["error"] in told
    assert "Images that were not counted" in (tmp_path / "out" / "report.html").read_text()


def labelled(folder: Path) -> tuple[Path, Path]:
    """Write a picture and its objects, numbered 7, 500 and 60000, without a scale."""
    labels = np.zeros((110, 120), np.uint16)
    labels[3:9, 4:8], labels[50:60, 70:90], labels[90:95, 5:25] = 500, 7, 60000
    tifffile.imwrite(folder / "x.tif", nuclei())
    tifffile.imwrite(folder / "gaps.tif", labels)
    return folder / "x.tif", folder / "gaps.tif"


def test_objects_of_a_file_keep_its_numbers_and_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    image, gaps = labelled(tmp_path)
    for out in (tmp_path / "one", tmp_path / "two"):
        run(image, "-o", out, "--model", f"labels:{gaps}", "--pixel-size", "pixel")
    with (tmp_path / "one" / "x_objects.csv").open() as lines:
        assert [row["source_id"] for row in csv.DictReader(lines)] == ["7", "500", "60000"]
    first, again = (tmp_path / name / "x_labels.tif" for name in ("one", "two"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("size", ["2 micron", "pixel"])
def test_the_given_size_is_also_that_of_the_regions(tmp_path: Path, size: str) -> None:
    image, gaps = labelled(tmp_path)
    words = (image, "-o", tmp_path / "out", "--model", f"labels:{gaps}", "--regions", gaps)
    run(*words, "--pixel-size", size)
    with (tmp_path / "out" / "x_regions.csv").open() as lines:
        assert [row["object_count"] for row in csv.DictReader(lines)] == ["1", "1", "1"]
    labels = read(tmp_path / "out" / "x_labels.tif")
    assert labels.spacing[:2] == ((2.0, 2.0) if size != "pixel" else (1.0, 1.0))
    assert knows_spacing(labels) == (size != "pixel")


def test_regions_that_know_another_size_are_refused(tmp_path: Path) -> None:
    image, gaps = labelled(tmp_path)
    run(image, "-o", tmp_path / "out", "--model", f"labels:{gaps}", "--pixel-size", "1 micron")
    words = (image, "-o", tmp_path / "b", "--regions", tmp_path / "out" / "x_labels.tif")
    told = run(*words, "--model", f"labels:{gaps}", "--pixel-size", "2 micron", code=4)
    assert "x.tif: regions: spacing 1x1" in told


def test_all_that_failed_are_named_up_to_five(tmp_path: Path) -> None:
    Image.fromarray(nuclei()).save(tmp_path / "a.png")
    for number in range(7):
        (tmp_path / f"bad{number}.png").write_bytes(b"no picture")
    told = run(tmp_path, "-o", tmp_path / "out", "--pixel-size", "pixel", code=3)
    assert "7 of 8 images failed (bad0.png, bad1.png, bad2.png, bad3.png, bad4.png and 2 more)" in told


def test_a_single_image_that_fails_is_named_and_is_in_the_json(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "nan.tif", np.full((40, 40), np.nan, np.float32))
    words = [
        "count",
        str(tmp_path / "nan.tif"),
        "-o",
        str(tmp_path / "out"),
        "--pixel-size",
        "pixel",
        "--json",
    ]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith("nan.tif: holds NaN")
    assert json.loads(result.stdout) == {"images": [], "failures": {"nan.tif": str(result.exception)}}


def test_a_stopped_count_does_not_promise_to_continue(tmp_path: Path) -> None:
    class Stop(Listener):
        def cancelled(self) -> bool:
            return True

    image, gaps = labelled(tmp_path)
    words = ["count", str(image), "-o", str(tmp_path / "out"), "--model", f"labels:{gaps}"]
    with listening(Stop()):
        found = CliRunner().invoke(app, [*words, "--pixel-size", "pixel"]).exception
    assert isinstance(found, Cancelled) and "count all anew" in str(found)
    assert "continue" not in str(found)


def test_an_unknown_model_lists_files_too() -> None:
    with pytest.raises(BundleError, match=r"no such model.*labels:FILE, cellpose:FILE, stardist:FOLDER, or"):
        open_finder("nuclei9d")


def test_a_volume_is_refused_by_a_model_for_pictures() -> None:
    with pytest.raises(DataError, match="volume of 9 slices"):
        count_objects(volume(np.zeros((20, 20, 9), np.uint8)), load_object_model("nuclei2d", threads=1))


def test_the_default_model_fits_the_image() -> None:
    assert default_model(volume(nuclei())) == "nuclei2d"
    assert default_model(volume(np.zeros((20, 20, 9), np.uint8))) == "nuclei3d"
