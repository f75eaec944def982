"""``medseg prompt``: what a clinician types, reads and gets, and what each mistake is answered with."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.cli.prompt_words import gather
from medseg.config import Config
from medseg.errors import MedsegError
from medseg.io import read, write
from medseg.prompt import propagators
from medseg.prompt.windows import WINDOWS
from medseg.types import Array
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES, affine, noise, tilted
from tests.prompt.fakes import fake_propagate

SHAPE = (24, 20, 12)
AFFINE = affine("LPS", (1.5, 1.5, 3.0))
POINT = ("--voxel", "--point", "8,7,5")


class FakeConfig(Config):
    size: int = 1


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A propagator of milliseconds is the default, and the folder of the test is home."""

    def propagate(models: Any, target: Any, config: FakeConfig) -> Any:
        return fake_propagate(models.scene, target, "fake" * config.size)

    monkeypatch.setitem(propagators.PROPAGATORS, "fake", (FakeConfig, propagate))
    monkeypatch.setattr(propagators, "DEFAULT", "fake")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def image(name: str = "image.nii.gz", array: Array | None = None, matrix: Array = AFFINE) -> Path:
    """Write a bright block in noise."""
    if array is None:
        array = np.random.default_rng(0).normal(40, 5, SHAPE).astype(np.float32)
        array[5:12, 4:11, 3:9] += 100
    volume = Volume(array, Geometry(array.shape[-3:], matrix))
    write(volume, name)
    return Path(name)


def run(*words: object, code: int = 0) -> Result:
    """Run the command, and check with which code it would end."""
    result = CliRunner().invoke(app, ["prompt", *map(str, words)])
    error = result.exception
    found = error.exit_code if isinstance(error, MedsegError) else result.exit_code
    assert found == code, f"{result.output}\n{error!r}"
    return result


def sentence(*words: object, code: int) -> str:
    """Return what a mistake is answered with: one sentence or two, and nothing is written."""
    result = run(*words, code=code)
    assert isinstance(result.exception, MedsegError)
    text = str(result.exception)
    assert text[-1] in ".?" and "\n" not in text and "Traceback" not in text
    assert not Path("out.nii.gz").exists()
    return text


def labels() -> Array:
    return read("out.nii.gz").array[0]


def test_a_click_becomes_a_label_map_with_names_and_provenance() -> None:
    source = image()
    result = run(source, *POINT, "--object", "liver", "-o", "out.nii.gz", "--sheet", "out.png")
    assert read("out.nii.gz").geometry.matches(read(source).geometry)
    assert labels()[8, 7, 5] == 1 and labels()[20, 18, 1] == 0
    said = json.loads(Path("out.prompt.json").read_text())
    assert said["labels"]["entries"] == {"background": 0, "liver": 1}
    assert said["provenance"]["objects"][0]["prompts"][0]["kind"] == "point"
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.startswith("liver ")


def test_the_result_fits_a_terminal_of_80_columns() -> None:
    result = run(image(), *POINT, "--object", "left adrenal gland", "-o", "out.nii.gz", "--session", "s")
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_json_is_all_that_stdout_holds() -> None:
    result = run(image(), *POINT, "-o", "out.nii.gz", "--json")
    said = json.loads(result.stdout)
    assert said["output"] == "out.nii.gz" and said["objects"][0]["voxels"] > 0


def test_millimetres_and_voxels_say_the_same_in_an_oblique_volume() -> None:
    matrix = tilted(AFFINE)
    source = image(matrix=matrix)
    run(source, *POINT, "-o", "out.nii.gz")
    first = labels()
    x, y, z = matrix[:3, :3] @ np.array([8, 7, 5]) + matrix[:3, 3]
    run(source, "--point", f"{x},{y},{z}", "-o", "out.nii.gz")
    assert first.any() and np.array_equal(first, labels())


def test_several_objects_are_pointed_at_in_one_command() -> None:
    words = (
        "--object",
        "a",
        "--point",
        "8,7,5",
        "--object",
        "b",
        "--box",
        "14,12,3,19,17,3",
        "--point",
        "16,14,8",
    )
    run(image(), "--voxel", *words, "-o", "out.nii.gz")
    said = json.loads(Path("out.prompt.json").read_text())["provenance"]["objects"]
    kinds = [[prompt["kind"] for prompt in each["prompts"]] for each in said]
    assert kinds == [["point"], ["box", "point"]]
    assert labels()[8, 7, 5] == 1 and labels()[16, 14, 8] == 2


def test_one_name_may_come_last_and_none_is_needed() -> None:
    run(image(), *POINT, "--object", "liver", "-o", "out.nii.gz")
    run(image(), *POINT, "-o", "other.nii.gz")
    assert np.array_equal(labels(), read("other.nii.gz").array[0])


@pytest.mark.parametrize(
    "order, expected",
    [
        (["box", "plane"], [("object", ["axial"])]),
        (["object_", "box", "object_", "box", "plane"], [("a", [None]), ("b", ["axial"])]),
        (["axis", "object_", "box", "object_", "box"], [("a", [None]), ("b", [None])]),
        (["object_", "box", "object_", "box", "object_", "box"], [("a", [None, None]), ("b", [None])]),
    ],
)
def test_options_belong_to_the_name_before_them(
    order: list[str], expected: list[tuple[str, list[str | None]]]
) -> None:
    given: dict[str, Sequence[str]] = {
        "object_": ["a", "b", "a"][: order.count("object_")],
        "box": ["1,2,3,4,5,3"] * order.count("box"),
        "plane": ["axial"],
        "axis": ["coronal"],
    }
    said = gather(order, given)
    planes = [
        [each.planes[0] if len(each.planes) == 1 else p["plane"] for p in each.prompts] for each in said
    ]
    assert [(each.name, found) for each, found in zip(said, planes, strict=True)] == expected
    if "axis" in order:
        assert [each.axis for each in said] == ["coronal", "coronal"]


def test_a_prompt_before_the_first_of_several_names_is_refused() -> None:
    words = ("--point", "8,7,5", "--object", "a", "--object", "b", "--point", "4,4,4")
    assert "before the first name" in sentence(image(), *words, "-o", "out.nii.gz", code=5)


def test_a_session_goes_on_tomorrow_and_back() -> None:
    source = image()
    run(source, *POINT, "--object", "a", "--session", "s", "-o", "out.nii.gz")
    first = labels()
    run(source, "--voxel", "--not-point", "8,7,6", "--object", "a", "--session", "s", "-o", "out.nii.gz")
    second = labels()
    assert second.sum() < first.sum()
    run(source, "--session", "s", "--undo", 1, "-o", "out.nii.gz")
    assert np.array_equal(labels(), first)
    run(source, "--session", "s", "--redo", 1, "-o", "out.nii.gz")
    assert np.array_equal(labels(), second)


def test_settings_of_the_propagator_can_be_set_and_stay_with_a_session() -> None:
    source = image()
    run(source, *POINT, "--set", "size=2", "--session", "s")
    run(source, "--voxel", "--point", "9,8,6", "--session", "s", "-o", "out.nii.gz")
    assert json.loads(Path("out.prompt.json").read_text())["provenance"]["settings"]["config"] == {"size": 2}
    run(source, "--set", "size=3", "--session", "s", "-o", "out.nii.gz")
    assert json.loads(Path("out.prompt.json").read_text())["provenance"]["settings"]["config"] == {"size": 3}


def test_a_setting_that_does_not_reach_back_says_so_and_how_it_would(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="medseg")
    source = image()
    run(source, *POINT, "--object", "a", "--session", "s")
    run(source, "--set", "size=2", "--session", "s")
    assert "--set: only for what is found from now on" in caplog.text and "was: a. " in caplog.text
    caplog.clear()
    run(source, "--set", "size=3", "--session", "s", "--again", "-o", "out.nii.gz")
    said = json.loads(Path("out.prompt.json").read_text())["provenance"]
    assert said["objects"][0]["config"] == {"size": 3} and "from now on" not in caplog.text


def test_the_help_names_all_propagators_and_windows() -> None:
    words = " ".join(re.sub(r"[^\w ]", " ", run("--help").stdout).split())
    for name in (*(each for each in propagators.PROPAGATORS if each != "fake"), *WINDOWS):
        assert name in words
    assert "volume the default" in words


def test_a_sheet_that_is_no_png_replaces_nothing() -> None:
    source = image()
    kept = image("two.nii.gz").read_bytes()
    assert "ends in .png" in sentence(source, *POINT, "-o", "out.nii.gz", "--sheet", "two.nii.gz", code=5)
    assert Path("two.nii.gz").read_bytes() == kept


def test_shared_voxels_wait_for_an_answer() -> None:
    words = (
        image(),
        "--voxel",
        "--overlap",
        "ask",
        "--object",
        "a",
        "--point",
        "8,7,5",
        "--object",
        "b",
        "--point",
        "9,7,5",
        "-o",
        "out.nii.gz",
    )
    assert "--resolve a,b" in sentence(*words, code=4)
    run(*words, "--resolve", "a,b")
    assert labels()[8, 7, 5] == 1


def test_a_range_and_an_axis_hold() -> None:
    run(image(), *POINT, "--z-range", "5,6", "-o", "out.nii.gz")
    assert np.flatnonzero(labels().any(axis=(0, 1))).tolist() == [5, 6]
    run(image(), *POINT, "--axis", "0", "--z-range", "7,8", "-o", "out.nii.gz")
    assert np.flatnonzero(labels().any(axis=(1, 2))).tolist() == [7, 8]
    said = json.loads(Path("out.prompt.json").read_text())["objects"][0]
    assert said["plane"] == "sagittal"


def test_a_dry_run_says_where_the_prompts_are_and_writes_nothing() -> None:
    result = run(image(), "--voxel", "--box", "5,4,5,11,10,5", "-o", "out.nii.gz", "--dry-run")
    assert "box (axial)" in result.stdout and not Path("out.nii.gz").exists()


def test_a_sample_is_named_instead_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    source = image()
    monkeypatch.setattr("medseg.assets.find", lambda name: source if name == "mni-t1" else None)
    run("mni-t1", *POINT, "-o", "out.nii.gz")
    assert json.loads(Path("out.prompt.json").read_text())["input"] == "mni-t1"


def test_a_drawn_mask_is_a_prompt() -> None:
    source = image()
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[5:12, 4:11, 5] = 3
    write(Volume(drawn, Geometry(SHAPE, AFFINE)), "drawn.nii.gz")
    run(source, "--mask", "drawn.nii.gz:3", "-o", "out.nii.gz")
    assert np.array_equal(labels() > 0, drawn > 0)


def test_a_file_of_prompts_does_many_and_its_failures_have_their_own_code() -> None:
    image()
    Path("bad.nii.gz").write_bytes(b"no image")
    Path("cases.yaml").write_text(
        "coordinates: voxel\nsheets: false\ncases:\n"
        "- {image: image.nii.gz, objects: {liver: [{point: [8, 7, 5]}]}}\n"
        "- {image: bad.nii.gz, objects: {liver: [{point: [8, 7, 5]}]}}\n"
    )
    result = run("cases.yaml", "-o", "many", code=3)
    assert "done    many/image.nii.gz  liver" in result.stdout
    assert Path("many/image.nii.gz").exists()
    assert "--box is not for a file" in str(
        run("cases.yaml", "-o", "x", "--box", "1,2,3,4,5,6", code=5).exception
    )
    assert "-o FOLDER" in str(run("cases.yaml", code=5).exception)


def test_a_file_of_prompts_goes_on_with_what_is_left() -> None:
    source = image()
    Path("bad.nii.gz").write_bytes(b"no image")
    Path("cases.yaml").write_text(
        "coordinates: voxel\nsheets: false\ncases:\n"
        "- {image: image.nii.gz, objects: {liver: [{point: [8, 7, 5]}]}}\n"
        "- {image: bad.nii.gz, objects: {liver: [{point: [8, 7, 5]}]}}\n"
    )
    first = run("cases.yaml", "-o", "many", code=3)
    assert "--resume" in str(first.exception) and "1 done, 1 failed" in first.stderr
    Path("bad.nii.gz").write_bytes(source.read_bytes())
    again = run("cases.yaml", "-o", "many", "--resume")
    assert again.stdout.splitlines() == [
        first.stdout.splitlines()[0].replace("done   ", "skipped"),
        again.stdout.splitlines()[1],
    ]
    assert again.stdout.splitlines()[1].startswith("done    many/bad.nii.gz")
    assert "1 done, 1 done before" in again.stderr
    said = json.loads(run("cases.yaml", "-o", "many", "--resume", "--json").stdout)
    assert said["counts"] == {"done": 0, "skipped": 2, "failed": 0}


# Options that would be silently without effect: a file of prompts says them itself, or they are of one image.
BESIDE_FILE = {
    "--box=1,2,3,4,5,6": "--box is not for a file of prompts, which says it itself",
    "--channel=0": "--channel is not for a file of prompts, which says it itself",
    "--session=s": "--session is about one image",
    "--undo=0": "--undo is about one image",
    "--dry-run": "--dry-run is about one image",
}


@pytest.mark.parametrize("option", BESIDE_FILE)
def test_an_option_that_a_file_of_prompts_would_not_hear_is_refused(option: str) -> None:
    Path("cases.yaml").write_text("cases: [{image: a.nii.gz, objects: {a: [{point: [1, 2, 3]}]}}]")
    assert BESIDE_FILE[option] in sentence("cases.yaml", "-o", "many", option, code=5)


def test_a_sheet_replaces_neither_image_nor_label_map() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (30, 20, 1)).astype(np.uint8)
    source = image("cell.png", pixels, np.eye(4))
    before = source.read_bytes()
    words = (source, "--voxel", "--point", "8,7,0")
    assert "would replace the image" in sentence(*words, "--sheet", "cell.png", code=5)
    assert "would replace the label map" in sentence(*words, "-o", "x.png", "--sheet", "x.png", code=5)
    assert source.read_bytes() == before and not Path("x.png").exists()


# What goes wrong, what is said, and the exit code: data 4, settings 5, weights 6 or 10, output 9.
MISTAKES: dict[str, tuple[tuple[object, ...], str, int]] = {
    "outside": (("--point", "500,0,0"), r"outside of the volume.* run from", 4),
    "box outside": (("--voxel", "--box", "90,90,5,95,95,5"), "outside of the volume", 4),
    "voxel outside": (
        ("--voxel", "--point", "8,300,5"),
        r"point \(8, 300, 5\) lies outside of the volume of 24 x 20 x 12 voxels",
        4,
    ),
    "no area": (("--box", "-40,8,95,-40,8,95"), "has no volume|has no area", 4),
    "no area in voxels": (("--voxel", "--box", "5,5,5,5,5,5"), "has no area", 4),
    "a line": (("--voxel", "--lasso", "5,5,5 6,6,5 7,7,5"), "encloses nothing", 4),
    "only outside": (("--voxel", "--not-point", "8,7,5"), "only where it is not", 4),
    "wrong object": ((*POINT, "--like", "livr"), "which is not there", 4),
    "wrong winner": ((*POINT, "--resolve", "livr,spleen"), "none of that name", 4),
    "undo too far": (("--session", "s", "--undo", "3"), "steps to undo", 4),
    "range outside": ((*POINT, "--z-range", "40,50"), "outside of the 12 axial slices", 4),
    "range beside the prompt": (
        (*POINT, "--z-range", "7,9"),
        r"point lies on axial slice 5 \(voxel\), outside of the range 7,9\. .*--z-range",
        4,
    ),
    "reversed range beside the prompt": ((*POINT, "--z-range", "9,7"), "outside of the range 7,9", 4),
    "no numbers": (("--point", "a,b,c"), "expected numbers", 5),
    "two numbers": (("--point", "1,2"), "expected 3 numbers, found 2", 5),
    "nothing": ((), "nothing points at an object", 5),
    "a name alone": (("--object", "liver"), "'liver' has no prompt", 5),
    "a name of its own": ((*POINT, "--object", "background"), "has a meaning in label maps", 5),
    "wrong plane": ((*POINT, "--plane", "transversal"), "use axial, coronal or sagittal", 5),
    "wrong axis": ((*POINT, "--axis", "3"), "use axial.* or 2", 5),
    "wrong window": ((*POINT, "--window", "livver"), "did you mean 'liver'", 5),
    "wrong modality": ((*POINT, "--modality", "XX"), "'XX': unknown; known: CT, MR, PET", 5),
    "nearly a modality": ((*POINT, "--modality", "pett"), "did you mean 'PET'", 5),
    "again of nothing": ((*POINT, "--again"), "--session", 5),
    "wrong overlap": ((*POINT, "--overlap", "both"), "overwrite, keep or ask", 5),
    "wrong propagator": ((*POINT, "--propagator", "teleport"), "teleport", 5),
    "wrong setting": ((*POINT, "--set", "sise=2"), "did you mean 'size'", 5),
    "wrong weights": ((*POINT, "--weights", "mobile-sam"), "NAME=FILE", 5),
    "unknown weights": ((*POINT, "--weights", "mobil-sam=x"), "Did you mean mobile-sam", 10),
    "everything and a click": ((*POINT, "--everything"), "by itself", 5),
    "everything and a plan": (("--everything", "--dry-run"), "does not go with --everything", 5),
    "everything and a name": (("--everything", "--object", "liver"), "--object does not go with", 5),
    "resume of one image": ((*POINT, "--resume"), "goes on with --session", 5),
    "undo of nothing": ((*POINT, "--undo", "1"), "--session", 5),
    "no such channel": ((*POINT, "--channel", "3"), "channel 3", 4),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence_and_its_own_exit_code(what: str) -> None:
    words, message, code = MISTAKES[what]
    source = image()
    text = sentence(source, *words, "-o", "out.nii.gz", code=code)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "out, code", [("out.txt", 5), ("image.nii.gz", 5), ("folder", 5), ("image.nii.gz/x.nii.gz", 9)]
)
def test_an_output_that_cannot_be_is_refused_before_any_work(out: str, code: int) -> None:
    source = image()
    Path("folder").mkdir()
    before = source.read_bytes()
    sentence(source, *POINT, "-o", out, code=code)
    assert source.read_bytes() == before


def test_nothing_to_keep_is_refused() -> None:
    assert "nothing would be kept" in sentence(image(), *POINT, code=5)


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x1f\x8b\x08 broken"])
def test_an_image_that_cannot_be_read_is_said(content: bytes | None) -> None:
    path = Path("bad.nii.gz")
    if content is not None:
        path.write_bytes(content)
    assert "bad.nii.gz" in sentence(path, *POINT, "-o", "out.nii.gz", code=4)


def test_a_4d_volume_names_the_option_and_takes_it() -> None:
    two = noise(Geometry(SHAPE, AFFINE), channels=2)
    write(two, "image.nii.gz")
    assert "--channel N" in sentence("image.nii.gz", *POINT, "-o", "out.nii.gz", code=4)
    run("image.nii.gz", *POINT, "--channel", "1", "-o", "out.nii.gz")
    assert labels().shape == SHAPE


def test_a_click_on_air_is_done_and_said() -> None:
    array = np.zeros(SHAPE, np.float32)
    array[5:12, 4:11, 3:9] = 100
    result = run(
        image(array=array), "--voxel", "--point", "20,18,1", "-o", "out.nii.gz", "--propagator", "fake"
    )
    assert labels().any()
    assert "lies on black" in result.stderr


def test_voxels_that_are_not_numbers_are_counted_and_taken_for_the_darkest() -> None:
    array = np.random.default_rng(0).normal(40, 5, SHAPE).astype(np.float32)
    array[0, 0, :5] = np.nan
    image(array=array)
    from medseg.prompt.results import Options, open_image

    with open_image("image.nii.gz", Options()) as session:
        assert np.isfinite(session.scene.array).all()
    run("image.nii.gz", *POINT, "-o", "out.nii.gz")
    assert labels()[8, 7, 5] == 1


@pytest.mark.parametrize("name", ["one slice", "one voxel", "oblique", "micron"])
def test_odd_volumes_have_a_result_on_their_own_grid(name: str) -> None:
    geometry = GEOMETRIES[name]
    write(noise(geometry), "image.nii.gz")
    middle = ",".join(str(n // 2) for n in geometry.shape)
    run("image.nii.gz", "--voxel", "--point", middle, "-o", "out.nii.gz", "--sheet", "out.png")
    found = read("out.nii.gz")
    assert found.geometry.matches(geometry) and found.array[0][tuple(n // 2 for n in geometry.shape)] == 1


def test_a_session_about_another_image_is_refused() -> None:
    run(image(), *POINT, "--session", "s")
    other = image("other.nii.gz", np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
    assert "another image" in sentence(other, *POINT, "--session", "s", "-o", "out.nii.gz", code=4)


def test_a_damaged_session_is_mended_or_named() -> None:
    source = image()
    run(source, *POINT, "--session", "s", "-o", "out.nii.gz")
    first = labels()
    for path in Path("s/snapshots").iterdir():
        path.write_bytes(b"\x00" * 20)
    run(source, "--session", "s", "-o", "out.nii.gz")
    assert np.array_equal(labels(), first)
    Path("out.nii.gz").unlink()
    lines = Path("s/journal.jsonl").read_bytes().replace(b"point", b"paint", 1)
    Path("s/journal.jsonl").write_bytes(lines)
    assert "damaged" in sentence(source, "--session", "s", "-o", "out.nii.gz", code=4)


def test_weights_of_another_model_are_refused_by_name(lite_medsam_path: Path) -> None:
    words = (*POINT, "--propagator", "mask", "--weights", f"mobile-sam={lite_medsam_path}")
    text = sentence(image(), *words, "-o", "out.nii.gz", code=6)
    assert "lite-medsam" in text and "mobile-sam" in text


def test_weights_that_are_no_weights_are_refused() -> None:
    Path("x.pt").write_bytes(b"no weights")
    text = sentence(
        image(), *POINT, "--propagator", "mask", "--weights", "mobile-sam=x.pt", "-o", "out.nii.gz", code=6
    )
    assert "x.pt" in text


def test_a_corrupted_cache_of_embeddings_is_computed_again(mobile_sam_path: Path) -> None:
    source = image()
    words = (
        "--voxel",
        "--box",
        "5,4,5,11,10,5",
        "--z-range",
        "5,6",
        "--propagator",
        "mask",
        "--weights",
        f"mobile-sam={mobile_sam_path}",
        "-o",
        "out.nii.gz",
    )
    run(source, *words, "--session", "one")
    first = labels()
    kept = [path for path in Path(".cache/medseg/embeddings").rglob("*") if path.is_file()]
    assert kept and first.any()
    for path in kept:
        path.write_bytes(path.read_bytes()[:100] + b"\x00" * 50)
    run(source, *words, "--session", "two")
    assert np.array_equal(labels(), first)
