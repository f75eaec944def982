"""Strange and hostile files on every command of objects: an answer or one sentence, and nothing half-done."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.errors import ConfigError, DataError, LabelError, MedsegError, OutputError, ReadError
from medseg.instances.count import read_measured
from medseg.io import read
from medseg.types import Array, IntArray

HALF_MICRON = {
    "PhysicalSizeX": 0.5,
    "PhysicalSizeY": 0.5,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeYUnit": "µm",
}
COMMANDS = ("split", "track", "evaluate")


def boxes() -> IntArray:
    labels = np.zeros((12, 14, 6), np.uint8)
    labels[2:6, 3:8, 1:5], labels[8:11, 6:12, 2:6] = 1, 2
    return labels


def nuclei() -> Array:
    rows, columns = np.indices((64, 64))
    image = np.random.default_rng(0).normal(20, 3, (64, 64))
    for y, x in ((15, 15), (40, 45)):
        image += 120 * (np.hypot(rows - y, columns - x) < 8)
    return image.clip(0, 255)


def nifti(path: Path, array: Array) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=array.dtype), path)
    return path


def tiff(path: Path, array: Array, **options: Any) -> Path:
    """Write a TIFF of half a micrometre a pixel; OME has no such types as 64-bit integers."""
    if array.dtype in (np.float16, np.uint64, np.int64):
        path.with_suffix(".json").write_text('{"spacing": [1, 0.5, 0.5]}')
        tifffile.imwrite(path, array, **options)
    else:
        tifffile.imwrite(path, array, ome=True, metadata=HALF_MICRON, **options)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def command(verb: str, path: Path, out: Path) -> Result:
    """Run a command on a label map, twice the same where it takes two."""
    if verb == "split":
        return run("split", path, "-o", out / "labels.nii.gz")
    if verb == "track":
        return run("track", path, path, "-o", out, "--register", "none")
    return run("evaluate", "--instances", path, path, "--json", out / "metrics.json")


def refused(result: Result, kind: type[Exception] = DataError) -> str:
    """Return the sentence of an error that was raised on purpose."""
    assert isinstance(result.exception, kind), result.output or result.exception
    assert isinstance(result.exception, MedsegError)
    return str(result.exception)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize(
    ("labels", "objects"),
    [
        (np.zeros((9, 8, 5), np.uint8), 0),
        (np.ones((9, 8, 5), np.uint8), 1),
        (np.ones((1, 1, 1), np.uint8), 1),
        (np.where(boxes() == 1, 1_000_000, boxes() * 7).astype(np.int32), 2),
        (boxes().astype(np.int64) * 2**39, 2),
        (boxes().astype(np.uint64), 2),
        (boxes().astype(np.float64), 2),
        (boxes()[3:4], 1),
        (boxes()[:, 7:8], 2),
        (boxes()[3:4, 4:5], 1),
    ],
    ids=[
        "empty",
        "everything",
        "one voxel",
        "gaps",
        "huge",
        "uint64",
        "float64",
        "thin i",
        "thin j",
        "a line",
    ],
)
def test_label_maps_of_any_shape_and_type_are_taken(
    tmp_path: Path, verb: str, labels: Array, objects: int
) -> None:
    result = command(verb, nifti(tmp_path / "a.nii.gz", labels), tmp_path / "out")
    assert result.exit_code == 0, result.exception
    counted = f"{objects} object{'' if objects == 1 else 's'}"
    assert counted in result.output, result.output


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("dtype", [bool, np.float16, np.uint64, np.int64])
def test_types_that_nobody_expects_are_labels_too(tmp_path: Path, verb: str, dtype: type) -> None:
    labels = (boxes()[..., 3] > 0).astype(dtype)
    result = command(verb, tiff(tmp_path / "a.tif", labels), tmp_path / "out")
    assert result.exit_code == 0, result.exception


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.where(boxes() > 0, -3, 0).astype(np.int16), "-3"),
        (np.where(boxes() > 0, np.nan, 0).astype(np.float32), "NaN|not whole"),
        (np.where(boxes() > 0, np.inf, 0).astype(np.float32), "infinite|not whole"),
        (boxes().astype(np.complex64), "complex"),
        (np.stack([boxes()] * 3, axis=-1), "3 channels"),
    ],
    ids=["negative", "NaN", "infinite", "complex", "4D"],
)
def test_what_is_no_label_map_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, verb: str, labels: Array, words: str
) -> None:
    import re

    result = command(verb, nifti(tmp_path / "a.nii.gz", labels), tmp_path / "out")
    assert re.search(words, refused(result)) and not written(tmp_path / "out")


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_complex_tiff_is_no_label_map(tmp_path: Path, verb: str) -> None:
    path = tiff(tmp_path / "a.tif", boxes()[..., 3].astype(np.complex64))
    assert "complex64" in refused(command(verb, path, tmp_path / "out"))


@pytest.mark.parametrize("verb", [*COMMANDS, "count"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_files_are_named(tmp_path: Path, verb: str, damage: str) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9, (20, 20, 9)).astype(np.uint8))
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    result = (
        run("count", path, "-o", tmp_path / "out")
        if verb == "count"
        else command(verb, path, tmp_path / "out")
    )
    assert "a.nii.gz" in refused(result) and not written(tmp_path / "out")


@pytest.mark.parametrize("verb", ["split", "track"])
def test_many_objects_are_followed_and_split_in_one_sweep(tmp_path: Path, verb: str) -> None:
    labels = np.zeros((120, 120), np.uint32)
    labels[::2, ::2] = np.arange(1, 3601).reshape(60, 60)
    result = command(verb, tiff(tmp_path / "a.tif", labels), tmp_path / "out")
    assert result.exit_code == 0 and "3600 objects" in result.output


def test_results_never_replace_what_they_come_from(tmp_path: Path) -> None:
    mask = nifti(tmp_path / "follow_up_labels.nii.gz", boxes())
    before = mask.read_bytes()
    words: list[tuple[object, ...]] = [
        ("split", mask, "-o", mask),
        ("split", mask, "-o", tmp_path / "x" / ".." / mask.name),
        ("track", mask, mask, "-o", tmp_path, "--register", "none"),
        ("evaluate", "--instances", mask, mask, "--json", mask),
    ]
    for each in words:
        assert "would be replaced" in refused(run(*each), OutputError)
    assert mask.read_bytes() == before


def test_images_are_not_replaced_by_label_maps_of_others(tmp_path: Path) -> None:
    cell, labels = (tiff(tmp_path / name, nuclei().astype(np.uint8)) for name in ("a.tif", "a_labels.tif"))
    before = labels.read_bytes()
    assert "would be replaced" in refused(run("count", cell, labels, "-o", tmp_path), OutputError)
    assert "folder of the images" in refused(run("count", tmp_path, "-o", tmp_path), ConfigError)
    assert labels.read_bytes() == before and written(tmp_path) == ["a.tif", "a_labels.tif"]


@pytest.mark.parametrize("verb", ["count", "track", "split", "evaluate"])
def test_an_output_of_the_other_kind_is_refused_before_any_work(tmp_path: Path, verb: str) -> None:
    mask = nifti(tmp_path / "a.nii.gz", boxes())
    (tmp_path / "file").write_text("mine")
    place = {"split": ("-o", tmp_path), "evaluate": ("--html", tmp_path)}.get(verb, ("-o", tmp_path / "file"))
    scans = {"track": (mask, mask), "evaluate": ("--instances", mask, mask)}.get(verb, (mask,))
    assert "is a fil" in refused(run(verb, *scans, *place), OutputError).replace("is a folder", "is a file")
    below = tmp_path / "file" / "below.nii.gz"
    option = "--html" if verb == "evaluate" else "-o"
    assert "cannot be written" in refused(run(verb, *scans, option, below), OutputError)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.xyz"])
def test_a_format_that_is_not_written_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    mask = nifti(tmp_path / "a.nii.gz", boxes())
    assert "does not write this format" in refused(run("split", mask, "-o", tmp_path / name), ReadError)


def test_grids_that_differ_are_refused_with_what_differs(tmp_path: Path) -> None:
    one, other = nifti(tmp_path / "a.nii.gz", boxes()), nifti(tmp_path / "b.nii.gz", boxes()[1:])
    film = run("track", "--cells", one, other, "-o", tmp_path / "film")
    assert "grid differs" in refused(film)
    assert "(11, 14, 6)" in refused(run("evaluate", "--instances", one, other))
    image = tiff(tmp_path / "c.tif", nuclei().astype(np.uint8))
    assert "regions: shape" in refused(run("count", image, "-o", tmp_path / "out", "--regions", one))
    assert not written(tmp_path / "out") and not written(tmp_path / "film")


@pytest.mark.parametrize(
    ("image", "objects"),
    [
        (nuclei() > 80, 2),
        ((nuclei() * 1e9).astype(np.uint64), 2),
        ((nuclei() * 1e9 - 5e10).astype(np.int64), 2),
        (nuclei().astype(np.float16), 2),
        (nuclei() * 1e-12, 2),
        (nuclei() * 1e300, 2),
        (np.full((64, 64), 7, np.uint8), 0),
        (np.full((1, 1), 7, np.uint8), 0),
        (np.array([[1, 200]], np.uint8), 0),
    ],
    ids=["bool", "uint64", "int64", "float16", "tiny", "vast", "constant", "one pixel", "two pixels"],
)
def test_images_of_any_type_and_range_are_counted(tmp_path: Path, image: Array, objects: int) -> None:
    result = run("count", tiff(tmp_path / "a.tif", image), "-o", tmp_path / "out", "--diameter", "8")
    assert result.exit_code == 0, result.exception
    assert f"a.tif: {objects} objects" in result.output
    assert read(tmp_path / "out" / "a_labels.tif").array.max() == objects


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.where(nuclei() > 80, np.nan, nuclei()).astype(np.float32), "NaN"),
        (np.where(nuclei() > 80, np.inf, nuclei()).astype(np.float32), "infinite"),
        (nuclei().astype(np.complex64), "complex64"),
    ],
    ids=["NaN", "infinite", "complex"],
)
def test_images_without_an_order_of_values_are_one_sentence(tmp_path: Path, image: Array, words: str) -> None:
    result = run("count", tiff(tmp_path / "a.tif", image), "-o", tmp_path / "out")
    assert words in refused(result) and not written(tmp_path / "out")


def test_stains_and_time_points_are_not_taken_for_colours(tmp_path: Path) -> None:
    stack = np.stack([np.random.default_rng(0).normal(9, 1, (20, 20, 5)).astype(np.float32)] * 3, axis=-1)
    stack[..., 1] += 1
    path, out = nifti(tmp_path / "a.nii.gz", stack), tmp_path / "out"
    asked = refused(run("count", path, "-o", out), ConfigError)
    assert "colours, stains or time points?" in asked and "--channel 0" in asked and not written(out)
    assert run("count", path, "-o", out, "--channel", "2", "--diameter", "6").exit_code == 0
    table = (out / "a_objects.csv").read_text()
    assert "intensity_2_mean" in table, "all channels are measured"
    assert "channels 0 to 2" in refused(run("count", path, "-o", out, "--channel", "3"), ConfigError)


@pytest.mark.parametrize("diameter", ["0", "0.01", "1e9"])
def test_a_diameter_in_another_unit_is_a_question_not_a_crash(tmp_path: Path, diameter: str) -> None:
    image = tiff(tmp_path / "a.tif", nuclei().astype(np.uint8))
    result = run("count", image, "-o", tmp_path / "out", "--diameter", diameter)
    assert "in the unit of the image" in refused(result, ConfigError) and not written(tmp_path / "out")


def test_what_a_reader_assumed_is_told(tmp_path: Path) -> None:
    frames = np.stack([nuclei().astype(np.uint8)] * 3)
    tifffile.imwrite(
        tmp_path / "a.tif", frames, imagej=True, metadata={"axes": "TYX", "unit": "um", "spacing": 2.0}
    )
    result = run("count", tmp_path / "a.tif", "-o", tmp_path / "out", "--diameter", "8")
    assert "note: the pages of the TIFF (T) are taken for slices" in result.output
    assert "taken for slices" in (tmp_path / "out" / "report.html").read_text()


def test_a_size_without_a_unit_is_asked_for(tmp_path: Path) -> None:
    image = nuclei().astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", image, ome=True, metadata=HALF_MICRON | {"PhysicalSizeXUnit": "pixel"}
    )
    assert "How large is one?" in refused(run("count", tmp_path / "a.tif", "-o", tmp_path / "out"))
    result = run(
        "count", tmp_path / "a.tif", "-o", tmp_path / "out", "--pixel-size", "pixel", "--diameter", "16"
    )
    assert "2 objects" in result.output
    assert read_measured(tmp_path / "a.tif", "pixel").spacing[:2] == (1.0, 1.0)


def test_names_of_files_may_hold_anything(tmp_path: Path) -> None:
    path = tiff(tmp_path / 'odd <b>&"name .tif', nuclei().astype(np.uint8))
    result = run("count", path, "-o", tmp_path / "out", "--diameter", "8")
    assert result.exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "odd <b>" not in page and "odd &lt;b&gt;&amp;" in page


def test_labels_are_refused_by_what_they_hold() -> None:
    from medseg.instances.schema import whole_labels

    with pytest.raises(LabelError, match="NaN or infinite"):
        whole_labels(np.array([1.0, np.nan]))
