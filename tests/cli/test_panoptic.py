"""``medseg panoptic`` from existing maps: what a person types, reads and gets."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.errors import ConfigError, DataError, GeometryError, LabelError, OutputError
from medseg.io import read, write
from medseg.labels import read_panoptic_labels
from medseg.metrics.panoptic_maps import evaluate_panoptic
from medseg.types import Array
from medseg.volume import Geometry, Unit, Volume
from tests.phantoms import affine

KINDS = {"liver": 1, "spleen": 2, "lesion": 3}
SHAPE = (24, 20, 8)


def maps() -> tuple[Array, Array]:
    """Return classes and objects: two lesions that touch and one apart in a liver, and a tiny spleen."""
    semantic, objects = np.zeros((2, *SHAPE), np.uint8)
    semantic[2:20, 2:16, 1:7] = 1
    semantic[21:23, 1:3, 2] = 2
    objects[4:8, 4:8, 2:5], objects[8:12, 4:8, 2:5], objects[14:17, 10:13, 3:5] = 5, 9, 7
    semantic[objects > 0] = 3
    return semantic, objects


def saved(path: Path, array: Array, spacing: float = 1.0, unit: Unit = "mm") -> Path:
    volume = array[..., None] if array.ndim == 2 else array
    matrix = np.diag([spacing] * 3 + [1.0]) if path.suffix == ".tif" else affine("LPS", (spacing,) * 3)
    write(Volume(volume, Geometry(volume.shape, matrix, unit)), path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    semantic, objects = maps()
    image = (semantic * 40.0 + np.random.default_rng(0).normal(0, 5, SHAPE)).astype(np.float32)
    classes = tmp_path / "classes.yaml"
    classes.write_text(yaml.safe_dump({"labels": KINDS, "things": ["lesion"]}))
    return {
        "semantic": saved(tmp_path / "in" / "case_semantic.nii.gz", semantic, 2.0),
        "objects": saved(tmp_path / "in" / "case_objects.nii.gz", objects, 2.0),
        "image": saved(tmp_path / "in" / "case.nii.gz", image, 2.0),
        "classes": classes,
        "out": tmp_path / "out",
    }


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["panoptic", *map(str, words)])


def facts_of(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def given(inputs: dict[str, Path], *further: object) -> list[object]:
    start = ["--semantic", inputs["semantic"], "--classes", inputs["classes"], "-o", inputs["out"]]
    return [*start, *further]


def test_maps_of_classes_and_objects_become_a_folder_of_results(inputs: dict[str, Path]) -> None:
    facts = facts_of(inputs["image"], *given(inputs, "--instances", inputs["objects"]))
    assert facts["things"] == {"lesion": 3} and facts["stuff_unit"] == "mm3" and not facts["dropped"]
    semantic, objects = maps()
    assert facts["stuff"] == pytest.approx({"liver": 8.0 * (semantic == 1).sum(), "spleen": 8.0 * 4})
    files = {kind: Path(path) for kind, path in facts["files"].items()}
    assert {path.parent for path in files.values()} == {inputs["out"]}
    assert files["panoptic"].name == "case_panoptic.nii.gz" and all(path.is_file() for path in files.values())
    packed, source = read(files["panoptic"]), read(inputs["semantic"])
    assert packed.geometry.matches(source.geometry)
    classes = read_panoptic_labels(files["classes"])
    known, numbers = classes.unpack(packed.array[0])
    assert (known == semantic).all() and (known == read(files["semantic"]).array[0]).all()
    assert ((numbers > 0) == (objects > 0)).all() and (numbers == read(files["instances"]).array[0]).all()
    with files["table"].open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["source_id"] for row in rows] == ["5", "7", "9"]
    assert {row["class_name"] for row in rows} == {"lesion"} and "intensity_mean" in rows[0]
    assert json.loads(files["qc"].read_text())["objects"] == 3
    with Image.open(files["overlay"]) as picture:
        assert picture.size[0] > 1000
    assert evaluate_panoptic(inputs["out"], inputs["out"]).total.overall.pq == 1.0


def test_things_are_split_where_no_objects_are_given(inputs: dict[str, Path]) -> None:
    facts = facts_of(*given(inputs))
    assert facts["things"] == {"lesion": 2}, "two that touch are one component"
    facts = facts_of(*given(inputs, "--min-thing-mm3", 8 * 20, "--min-stuff-mm3", 8 * 5))
    assert facts["things"] == {"lesion": 1} and list(facts["stuff"]) == ["liver"]
    assert facts["dropped"] == [
        {"rule": "smaller than 160 mm3", "count": 1, "voxels": 18},
        {"rule": "stuff spleen of less than 5 voxels", "count": 0, "voxels": 4},
    ]
    shown = run(*given(inputs, "--split", "basins", "--h-mm", "0.5"))
    assert shown.exit_code == 0 and "lesion" in shown.stdout and "liver: " in shown.stdout
    qc = json.loads((inputs["out"] / "case_semantic_qc.json").read_text())
    assert qc["provenance"]["objects"] == "basins of the things"


def test_names_of_labels_beside_the_map_suffice_with_things(inputs: dict[str, Path]) -> None:
    beside = inputs["semantic"].parent / "dataset.json"
    beside.write_text(json.dumps({"labels": {"background": 0, **KINDS}}))
    words = ["--semantic", inputs["semantic"], "-o", inputs["out"]]
    assert facts_of(*words, "--things", "lesion")["things"] == {"lesion": 2}
    error = run(*words, "--things", "cancer").exception
    assert isinstance(error, ConfigError) and "things names 'cancer'" in str(error)
    beside.unlink()
    error = run(*words, "--things", "lesion").exception
    assert isinstance(error, ConfigError) and "names its values. Give --classes" in str(error)


def test_a_picture_has_areas_in_its_own_unit(tmp_path: Path, inputs: dict[str, Path]) -> None:
    semantic = maps()[0][:, :, 3]
    source = saved(tmp_path / "cells.tif", semantic, 0.5, "micron")
    words = ["--semantic", source, "--classes", inputs["classes"], "-o", inputs["out"]]
    facts = facts_of(*words)
    assert facts["stuff_unit"] == "um2" and facts["stuff"]["liver"] == 0.25 * (semantic == 1).sum()
    assert facts["files"]["panoptic"].endswith("cells_panoptic.tif")
    assert read(facts["files"]["panoptic"]).spacing[:2] == (0.5, 0.5)
    plain = tmp_path / "plain.png"
    Image.fromarray(semantic).save(plain)
    words = ["--semantic", plain, "--classes", inputs["classes"], "-o", inputs["out"]]
    assert isinstance(run(*words).exception, GeometryError)
    assert facts_of(*words, "--pixel-size", "pixel")["stuff_unit"] == "px2"


def test_maps_without_anything_are_written_too(tmp_path: Path, inputs: dict[str, Path]) -> None:
    empty = saved(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    words = ["--semantic", empty, "--classes", inputs["classes"], "-o", inputs["out"]]
    facts = facts_of(*words)
    assert facts["objects"] == 0 and facts["stuff"] == {} and facts["things"] == {"lesion": 0}
    assert not read(facts["files"]["panoptic"]).array.any()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"labels": KINDS, "things": ["lesion", "liver"], "stuff": ["liver"]},
            "'liver' is a thing and stuff",
        ),
        ({"labels": KINDS, "things": ["lesion"], "stuff": ["liver"]}, "'spleen' is neither thing nor stuff"),
        ({"labels": KINDS, "things": ["tumour"]}, "things names 'tumour', which is no class"),
        ({"labels": {"liver": 1, "lesion": 1}, "things": ["lesion"]}, "two classes have one value"),
        ({"labels": {"liver": 0, "lesion": 1}, "things": ["lesion"]}, "'liver' is 0; expected 1"),
        ({"labels": KINDS, "things": ["lesion"], "stuf": ["liver"]}, "did you mean 'stuff'"),
        ({"labels": KINDS}, "no 'things'"),
        ({"things": ["lesion"]}, "no 'labels'"),
    ],
)
def test_classes_that_contradict_themselves_are_refused(
    inputs: dict[str, Path], classes: dict[str, Any], message: str
) -> None:
    inputs["classes"].write_text(yaml.safe_dump(classes))
    error = run(*given(inputs)).exception
    assert isinstance(error, ConfigError) and message in str(error), error
    assert not inputs["out"].exists()


def test_maps_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    semantic, objects = maps()
    shifted = saved(tmp_path / "shifted.nii.gz", objects, 1.0)
    floats = saved(tmp_path / "floats.nii.gz", semantic * np.float32(0.5))
    unknown = saved(tmp_path / "unknown.nii.gz", np.where(semantic == 1, 6, semantic).astype(np.uint8))
    colour = tmp_path / "colour.nii.gz"
    write(Volume(np.zeros((3, *SHAPE), np.uint8), Geometry(SHAPE, np.eye(4))), colour)
    for change, error, message in (
        (["--instances", shifted], GeometryError, "spacing 1x1x1 differs from 2x2x2 of case_semantic.nii.gz"),
        (["--instances", colour], DataError, "has 3 channels"),
        (["--semantic", floats], LabelError, "floats.nii.gz: label map holds values that are not whole"),
        (["--semantic", unknown], LabelError, "unknown.nii.gz: semantic map holds 6, which is no class"),
        ([shifted], GeometryError, "shifted.nii.gz: spacing"),
        (["--semantic", tmp_path / "none.nii.gz"], DataError, "none.nii.gz"),
    ):
        found = run(*given(inputs), *change).exception
        assert isinstance(found, error) and message in str(found), found
    assert not inputs["out"].exists()


def test_options_that_have_no_sense_together_are_refused(inputs: dict[str, Path]) -> None:
    semantic, out = ["--semantic", inputs["semantic"]], ["-o", inputs["out"]]
    classes = ["--classes", inputs["classes"]]
    for words, message in (
        ([*out], "Give --model BUNDLE, --semantic LABEL_MAP, or both"),
        (["--model", "x", *out], "--model needs an image"),
        ([*semantic, *classes, "--model", "x", *out], "--model needs an image"),
        (
            [inputs["image"], *semantic, *classes, "--model", "x", "--split", "basins", *out],
            "--split and --model: both make objects",
        ),
        ([inputs["image"], "--model", "x", "--split", "basins", *out], "--split belongs to --semantic"),
        ([*semantic, *out], "which classes are things?"),
        ([*semantic, *classes, "--diameter", "4", *out], "--diameter is for --model"),
        ([*semantic, *classes, "--channel", "0", *out], "--channel is for --model"),
        (
            [*semantic, *classes, "--instances", inputs["objects"], "--h-mm", "1", *out],
            "--h-mm is for things that are split",
        ),
        ([*semantic, *classes, "--split", "magic", *out], "method 'magic' is unknown"),
        ([*semantic, *classes, "--h-mm", "1", *out], "components have no depth"),
    ):
        found = run(*words).exception
        assert isinstance(found, ConfigError) and message in str(found), found
    assert not inputs["out"].exists()


def test_no_result_replaces_what_was_read(inputs: dict[str, Path]) -> None:
    before = inputs["semantic"].read_bytes()
    words = ["--semantic", inputs["semantic"], "--classes", inputs["classes"]]
    error = run(inputs["image"], *words, "-o", inputs["semantic"].parent).exception
    assert isinstance(error, OutputError) and "is read here, and would be replaced" in str(error)
    assert inputs["semantic"].read_bytes() == before


def test_a_model_of_objects_alone_is_no_panoptic_model(inputs: dict[str, Path]) -> None:
    found = run(inputs["image"], "--model", "nuclei3d", "-o", inputs["out"]).exception
    assert isinstance(found, ConfigError) and "no stuff around them. Use medseg count" in str(found)


def test_nuclei_of_the_model_of_the_package_lie_in_tissue(tmp_path: Path) -> None:
    rows, columns = np.indices((110, 120))
    middles = [(20, 20), (20, 60), (50, 34), (58, 90), (84, 16), (86, 60)]
    discs = np.max([np.hypot(rows - i, columns - j) < 8 for i, j in middles], axis=0)
    noise = np.random.default_rng(0).normal(25, 5, discs.shape)
    image = saved(tmp_path / "image.tif", (noise + 150 * discs).clip(0, 255).astype(np.uint8), 0.5, "micron")
    tissue = saved(tmp_path / "tissue.tif", np.where(columns < 50, 1, 2).astype(np.uint8), 0.5, "micron")
    classes = tmp_path / "classes.yaml"
    classes.write_text("labels: {tumour: 1, stroma: 2, nucleus: 3}\nthings: [nucleus]\n")
    words = [image, "--model", "nuclei2d", "--semantic", tissue, "-o", tmp_path / "out", "--diameter", 8]
    facts = facts_of(*words, "--classes", classes)
    assert facts["things"] == {"nucleus": 6} and set(facts["stuff"]) == {"tumour", "stroma"}
    packed = read(facts["files"]["panoptic"]).array
    assert set(np.unique(packed)) == {1000, 2000, *range(3001, 3007)}
    error = run(*words, "--classes", classes, "--channel", 4).exception
    assert isinstance(error, ConfigError) and "the image has channels 0 to 0" in str(error)
    classes.write_text("labels: {tumour: 1, stroma: 2}\nthings: []\n")
    error = run(*words, "--classes", classes).exception
    assert isinstance(error, ConfigError) and "finds 'nucleus', which is no thing (none is)" in str(error)


def test_real_lesions_are_things_in_real_brains(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "ms_lesion" / "patient19"
    image, lesions = read(folder / "FLAIR.nii.gz"), read(folder / "GOLD_STANDARD.nii.gz")
    semantic = np.where(lesions.array > 0, 2, np.where(image.array > 0, 1, 0)).astype(np.uint8)
    write(image.with_array(semantic), tmp_path / "semantic.nii.gz")
    (tmp_path / "classes.yaml").write_text("labels: {brain: 1, lesion: 2}\nthings: [lesion]\n")
    facts = facts_of(
        *(folder / "FLAIR.nii.gz", "--semantic", tmp_path / "semantic.nii.gz"),
        *("--classes", tmp_path / "classes.yaml", "--min-thing-mm3", 3, "-o", tmp_path / "out"),
    )
    assert facts["things"] == {"lesion": 87} and facts["dropped"][0]["count"] == 11
    packed = read(facts["files"]["panoptic"]).array
    assert np.count_nonzero(packed >= 2000) + facts["dropped"][0]["voxels"] == (lesions.array > 0).sum()
