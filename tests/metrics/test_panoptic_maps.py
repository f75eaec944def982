"""PQ, SQ and RQ of panoptic maps: as torchmetrics has them, and from folders of files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.errors import ConfigError, DataError, DatasetError, PartialFailure
from medseg.io import write
from medseg.labels import PanopticLabels
from medseg.metrics.panoptic import PanopticClasses
from medseg.metrics.panoptic_maps import (
    PanopticMap,
    compare_panoptic,
    evaluate_panoptic,
    find_panoptic_maps,
    read_panoptic_map,
)
from medseg.volume import Geometry, Volume
from tests.metrics.object_maps import digest, panoptic_images
from tests.metrics.test_instance_goldens import golden, near_all
from tests.phantoms import affine

LABELS = {"liver": 1, "spleen": 2, "lesion": 3, "cyst": 4, "ignore": 9}
CLASSES = PanopticLabels(labels=LABELS, things=("lesion", "cyst"))


def measured(name: str, void: bool) -> PanopticClasses:
    parts = []
    for reference, prediction in panoptic_images()[name]:
        sides = [PanopticMap(*side, CLASSES) for side in (reference, prediction)]
        parts.append(compare_panoptic(*sides, background_is_void=void))
    return PanopticClasses.merged(parts)


@pytest.mark.parametrize("name", ["2d", "3d"])
@pytest.mark.parametrize("ground", ["class", "void"])
def test_every_number_is_that_of_torchmetrics(name: str, ground: str) -> None:
    expected = golden("torchmetrics-panoptic")["sets"][name]
    images = panoptic_images()[name]
    assert [digest((*reference, *prediction)) for reference, prediction in images] == expected["digests"]
    found = measured(name, ground == "void")
    # The peer has no background that is no class: it is one there, and left out here.
    classes = [row for k, row in enumerate(expected[ground]["classes"]) if ground == "void" or k != 2]
    names = ("lesion", "cyst", "liver", "spleen")
    for key, row in zip(names, classes, strict=True):
        quality = found.counts[key]
        assert [quality.pq, quality.sq, quality.rq] == near_all(row), key
    for mean, rows in (
        (found.overall, classes),
        (found.overall_things, classes[:2]),
        (found.overall_stuff, classes[2:]),
    ):
        assert [mean.pq, mean.sq, mean.rq] == near_all(np.mean(rows, axis=0).tolist())
    if ground == "void":
        assert [found.overall.pq, found.overall.sq, found.overall.rq] == near_all(expected["void"]["overall"])


@given(
    pair=st.tuples(
        *[arrays(np.int32, (4, 5), elements=st.sampled_from([0, 1, 2, 3, 4, 9])) for _ in range(2)]
    ),
    objects=arrays(np.int32, (4, 5), elements=st.integers(1, 3)),
)
@settings(max_examples=60, deadline=None)
def test_a_map_is_perfect_against_itself_and_the_sides_may_be_swapped(
    pair: tuple[np.ndarray, np.ndarray], objects: np.ndarray
) -> None:
    sides = [PanopticMap(m, np.where(np.isin(m, (3, 4)), objects, 0), CLASSES) for m in pair]
    same = compare_panoptic(sides[0], sides[0])
    assert all(q.fp == q.fn == 0 and q.iou_sum == q.tp for q in same.counts.values())
    there, back = compare_panoptic(*sides), compare_panoptic(*sides[::-1])
    for name, quality in there.counts.items():
        other = back.counts[name]
        assert (quality.tp, quality.fp, quality.fn) == (other.tp, other.fn, other.fp)
        assert quality.iou_sum == pytest.approx(other.iou_sum)


def test_an_object_invented_in_the_background_counts_unless_that_is_void() -> None:
    reference = PanopticMap(np.array([1, 1, 0, 0]), np.zeros(4, int), CLASSES)
    prediction = PanopticMap(np.array([1, 1, 3, 0]), np.array([0, 0, 1, 0]), CLASSES)
    assert compare_panoptic(reference, prediction).counts["lesion"].fp == 1
    assert compare_panoptic(reference, prediction, background_is_void=True).counts["lesion"].fp == 0
    ignored = PanopticMap(np.array([1, 1, 9, 9]), np.zeros(4, int), CLASSES)
    assert compare_panoptic(ignored, prediction).counts["lesion"].fp == 0


def test_classes_are_matched_by_name_whatever_their_values() -> None:
    other = PanopticLabels(labels={"lesion": 1, "liver": 30}, things=("lesion",))
    reference = PanopticMap(np.array([1, 1, 3, 3]), np.array([0, 0, 8, 8]), CLASSES)
    prediction = PanopticMap(np.array([30, 30, 1, 1]), np.array([0, 0, 1, 1]), other)
    found = compare_panoptic(reference, prediction)
    assert found.overall.pq == 1.0 and found.overall.classes == 2
    strange = PanopticLabels(labels={"kidney": 1}, things=())
    with pytest.raises(ConfigError, match="'kidney', which the reference does not know"):
        compare_panoptic(reference, PanopticMap(np.array([1, 1, 1, 1]), np.zeros(4, int), strange))
    turned = PanopticLabels(labels={"lesion": 1}, things=())
    with pytest.raises(ConfigError, match="'lesion' is stuff in the prediction only"):
        compare_panoptic(reference, PanopticMap(np.array([1, 1, 1, 1]), np.zeros(4, int), turned))


def write_map(path: Path, array: np.ndarray, spacing: float = 1.0) -> None:
    volume = array.astype(np.int32)
    write(Volume(volume, Geometry(volume.shape, affine("RAS", (spacing,) * 3))), path)


def folders(root: Path) -> tuple[Path, Path]:
    """Write a folder of packed maps, and a data set as its reference; return both."""
    predicted, known = root / "predicted", root / "known"
    for n, (reference, prediction) in enumerate(panoptic_images()["3d"]):
        write_map(known / "semantic" / f"case_{n}.nii.gz", reference[0])
        write_map(known / "labels" / f"case_{n}.nii.gz", reference[1])
        packed = CLASSES.pack(*prediction)
        write_map(predicted / f"case_{n}_panoptic.nii.gz", packed)
        (predicted / f"case_{n}_classes.json").write_text(json.dumps(CLASSES.to_dict()))
    (known / "dataset.json").write_text(
        json.dumps({"labels": LABELS, "things": ["lesion", "cyst"], "channel_names": {"0": "CT"}})
    )
    return predicted, known


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_a_folder_of_results_is_measured_against_a_data_set(tmp_path: Path) -> None:
    predicted, known = folders(tmp_path)
    result = run("--panoptic", predicted, known, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    assert result.exit_code == 0, result.output
    assert "mean, things" in result.stdout and "lesion" in result.stdout
    facts = json.loads((tmp_path / "o.json").read_text())
    expected = measured("3d", void=False)
    assert facts["overall"]["pq"] == pytest.approx(expected.overall.pq)
    assert facts["things"]["pq"] == pytest.approx(expected.overall_things.pq)
    assert facts["classes"]["liver"]["kind"] == "stuff" and facts["classes"]["liver"]["fn"] >= 0
    assert set(facts["cases"]) == {"case_0", "case_1"} and "torchmetrics" in facts["equals"]
    with (tmp_path / "o.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3 * (4 + 3) and rows[0]["class"] == "lesion"
    shown = json.loads(run("--panoptic", predicted, known, "--json", "-").stdout)
    assert shown == facts
    void = json.loads(run("--panoptic", predicted, known, "--json", "-", "--background-is-void").stdout)
    assert void["overall"]["pq"] == pytest.approx(measured("3d", void=True).overall.pq)


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    predicted, _ = folders(tmp_path)
    first = predicted / "case_0_panoptic.nii.gz"
    again = tmp_path / "other" / "name_panoptic.nii.gz"
    again.parent.mkdir()
    again.write_bytes(first.read_bytes())
    (again.parent / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    assert evaluate_panoptic(first, again).total.overall.pq == 1.0


def test_a_case_on_another_grid_fails_alone(tmp_path: Path) -> None:
    predicted, known = folders(tmp_path)
    array = CLASSES.pack(*panoptic_images()["3d"][0][1])
    write_map(predicted / "case_0_panoptic.nii.gz", array, spacing=2.0)
    result = run("--panoptic", predicted, known)
    assert isinstance(result.exception, PartialFailure) and "spacing 2x2x2 differs" in str(result.exception)
    write_map(predicted / "case_1_panoptic.nii.gz", array)
    assert isinstance(run("--panoptic", predicted, known).exception, DatasetError)


def test_what_is_no_panoptic_map_is_refused(tmp_path: Path) -> None:
    predicted, known = folders(tmp_path)
    source = find_panoptic_maps(predicted)["case_0"]
    write_map(predicted / "case_0_panoptic.nii.gz", np.full((3, 3, 3), 1001))
    with pytest.raises(DataError, match="holds 1001, which with divisor 1000"):
        read_panoptic_map(source, "case_0")
    write_map(known / "semantic" / "case_0.nii.gz", np.full((3, 3, 3), 3))
    write_map(known / "labels" / "case_0.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(DataError, match="27 voxels are of an object or of a thing, but not of both"):
        read_panoptic_map(find_panoptic_maps(known)["case_0"], "case_0")
    write_map(known / "semantic" / "case_0.nii.gz", np.full((3, 3, 3), 6))
    with pytest.raises(DataError, match="semantic map holds 6, which is no class"):
        read_panoptic_map(find_panoptic_maps(known)["case_0"], "case_0")
    (known / "labels" / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match="none of objects in labels/"):
        read_panoptic_map(find_panoptic_maps(known)["case_1"], "case_1")
    (predicted / "case_1_classes.json").unlink()
    with pytest.raises(DatasetError, match=r"neither case_1_classes\.json nor classes\.json"):
        find_panoptic_maps(predicted)
    with pytest.raises(DatasetError, match="no panoptic maps"):
        find_panoptic_maps(known / "labels")
    (known / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        find_panoptic_maps(known)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    predicted, known = folders(tmp_path)
    for words, message in (
        (["--panoptic", "--instances"], "--instances does not go with --panoptic"),
        (["--panoptic", "--html", "x.html"], "--html does not go"),
        (["--background-is-void"], "belongs to --panoptic"),
    ):
        error = run(predicted, known, *words).exception
        assert isinstance(error, ConfigError) and message in str(error)
    (predicted / "case_1_panoptic.nii.gz").rename(predicted / "case_7_panoptic.nii.gz")
    (predicted / "case_1_classes.json").rename(predicted / "case_7_classes.json")
    found = evaluate_panoptic(predicted, known)
    assert found.predictions_alone == ("case_7",) and found.references_alone == ("case_1",)
    (predicted / "case_0_panoptic.nii.gz").unlink()
    with pytest.raises(DatasetError, match="no prediction matches"):
        evaluate_panoptic(predicted, known)
