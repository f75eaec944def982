"""``evaluate_instances`` and ``medseg evaluate --instances``: folders, files, 2D and 3D, what is refused."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from medseg.errors import ConfigError, DatasetError, PartialFailure
from medseg.io import write
from medseg.metrics.instances import INSTANCE_METRICS, evaluate_instances
from medseg.metrics.instances_page import build_page, draw_mistake
from medseg.metrics.matching import EmptyPolicy
from medseg.metrics.mistakes import KINDS, Mistake
from medseg.volume import Geometry, Volume
from tests.metrics.object_maps import Maps, cases


def volume(labels: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 3.0)) -> Volume:
    array = labels if labels.ndim == 3 else labels.T[:, :, None]
    return Volume(array, Geometry(array.shape, np.diag([*spacing, 1.0])))


def mistaken() -> Maps:
    """Return maps with one mistake of each kind."""
    reference, prediction = np.zeros((2, 40, 48), np.int32)
    reference[2:10, 2:10], reference[2:10, 10:18], prediction[2:10, 2:18] = 1, 2, 1
    reference[14:24, 2:22], prediction[14:24, 2:12], prediction[14:24, 12:22] = 3, 2, 3
    reference[28:36, 2:10] = 4
    prediction[28:36, 30:38] = 4
    reference[14:24, 30:40], prediction[14:19, 30:40] = 5, 5
    reference[2:10, 30:40], prediction[2:10, 30:40] = 6, 6
    return reference, prediction


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    flat, deep = mistaken(), cases()["sparse_3d"]
    for side, k in (("r", 0), ("p", 1)):
        write(volume(flat[k].astype(np.uint16)), tmp_path / side / "flat.tif")
        write(volume(deep[k]), tmp_path / side / "deep.nii.gz")
        write(volume(np.zeros((8, 9), np.int32)), tmp_path / side / "empty.nii.gz")
    write(volume((flat[0] > 0) * 100.0 + np.arange(48)), tmp_path / "i" / "flat.nii.gz")
    return [str(tmp_path / side) for side in ("p", "r")]


def run(*arguments: str) -> Result:
    from medseg.cli import app

    return CliRunner().invoke(app, ["evaluate", "--instances", *arguments])


def test_each_mistake_is_counted_and_pooled_numbers_come_from_sums(folders: list[str]) -> None:
    result = evaluate_instances(*folders, tau=0.6)
    row = next(r for r in result.rows if r.case == "flat")
    assert {kind: row.events(kind) for kind in KINDS} == dict.fromkeys(KINDS, 1)
    tp, fp, fn = (sum(getattr(r, key) for r in result.rows) for key in ("tp", "fp", "fn"))
    assert result.pooled["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert result.pooled["ap"] == pytest.approx(tp / (tp + fp + fn))
    assert result.means["f1"].n == 2 and result.means["f1"].n_undefined == 1
    assert result.means["f1"].mean == pytest.approx(np.mean([r.values["f1"] for r in result.rows if r.n_ref]))
    assert (result.counts.images, result.counts.n_ref) == (3, sum(r.n_ref for r in result.rows))


def test_the_policy_of_empty_images_is_applied_and_stored(folders: list[str]) -> None:
    result = evaluate_instances(*folders, empty=EmptyPolicy(both=1.0))
    assert next(r for r in result.rows if r.case == "empty").values == dict.fromkeys(INSTANCE_METRICS, 1.0)
    settings = result.to_dict()["settings"]
    assert isinstance(settings, dict) and settings["empty"] == {
        "both": 1.0,
        "reference": 0.0,
        "prediction": 0.0,
    }


def test_the_summary_names_formulas_and_fits_eighty_columns(folders: list[str]) -> None:
    result = run(*folders)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "2 TP / (2 TP + FP + FN), IoU >= 0.5" in result.stdout
    assert re.search(r"\d+ missed, \d+ invented, \d+ merged, \d+ split", result.stdout.replace("\n", " "))


def test_all_files_are_written_and_json_is_strict(folders: list[str], tmp_path: Path) -> None:
    out = [str(tmp_path / name) for name in ("o.json", "o.html", "o.csv")]
    arguments = ["--json", out[0], "--html", out[1], "--csv", out[2], "--images", str(tmp_path / "i")]
    result = run(*folders, *arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(Path(out[0]).read_text("utf-8"), parse_constant=lambda text: pytest.fail(text))
    assert set(data["metrics"]) == set(INSTANCE_METRICS)
    assert all(entry["formula"] and entry["equals"] for entry in data["metrics"].values())
    assert [image["case"] for image in data["images"]] == ["deep", "empty", "flat"]
    assert data["images"][1]["f1"] is None
    with open(out[2], encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["case"] for line in lines] == ["deep", "empty", "flat"] and lines[1]["pq"] == ""
    page = Path(out[1]).read_text("utf-8")
    for kind in KINDS:
        assert re.search(rf"{kind.capitalize()}: \d", page)
    assert page.count("data:image/png;base64") >= 5
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is loaded from elsewhere"


def test_json_to_stdout_is_alone_there(folders: list[str]) -> None:
    assert set(json.loads(run(*folders, "--json", "-").stdout)["mistakes"]) == set(KINDS)


def test_two_files_are_one_image_and_the_threshold_counts(folders: list[str]) -> None:
    files = [f"{folder}/flat.tif" for folder in folders]
    strict, lenient = (
        json.loads(run(*files, "--json", "-", "--iou", iou).stdout)["images"][0] for iou in ("0.9", "0.5")
    )
    assert (strict["tp"], lenient["tp"]) == (1, 4)


def test_a_failed_image_is_exit_code_three_and_names_of_classes_are_refused(folders: list[str]) -> None:
    write(volume(np.zeros((9, 9), np.int32)), Path(folders[0]) / "empty.nii.gz")
    assert isinstance(run(*folders).exception, PartialFailure)
    assert isinstance(run(*folders, "--labels", "x.json").exception, ConfigError)
    assert isinstance(run(*folders, "--iou", "2").exception, ConfigError)


def test_float_labels_and_gaps_are_fine_and_others_fail_with_a_sentence(tmp_path: Path) -> None:
    good, _ = mistaken()
    for name, prediction in (
        ("float", np.where(good > 0, good * 1000.0, 0.0)),
        ("half", good * 0.5),
        ("huge", good * 1e30),
        ("wide", good * 1e10),
        ("negative", -good),
    ):
        write(volume(good), tmp_path / "r" / f"{name}.nii.gz")
        write(volume(prediction), tmp_path / "p" / f"{name}.nii.gz")
    result = evaluate_instances(tmp_path / "p", tmp_path / "r")
    assert [row.case for row in result.rows] == ["float", "wide"] and result.pooled["pq"] == 1.0
    assert {f.case: f.error.split(",")[0] for f in result.failures} == {
        "half": "values are not whole numbers",
        "huge": "holds 6e+30",
        "negative": "the prediction holds negative labels",
    }


def test_masks_of_a_class_are_told_apart_from_objects(caplog: pytest.LogCaptureFixture) -> None:
    mask = volume((mistaken()[0] > 0).astype(np.uint8))
    evaluate_instances(mask, mask)
    assert "number their parts first" in caplog.text


def test_a_flat_image_without_a_pixel_size_meets_one_with_it(tmp_path: Path) -> None:
    reference, prediction = mistaken()
    write(volume(reference.astype(np.uint16), (0.5, 0.5, 499.5)), tmp_path / "r.tif")
    write(volume(prediction.astype(np.uint8)), tmp_path / "p.png")
    assert evaluate_instances(tmp_path / "p.png", tmp_path / "r.tif").rows[0].tp == 4


def test_a_whole_page_can_be_empty_of_mistakes() -> None:
    same = volume(mistaken()[0])
    page = build_page(evaluate_instances(same, same)).render()
    assert page.count("There is none.") == len(KINDS)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(DatasetError, match="none of the 1"):
        evaluate_instances(volume(np.zeros((4, 4), int)), volume(np.zeros((4, 5), int)))


@pytest.mark.parametrize("letters", [True, False])
def test_a_picture_is_drawn_in_any_orientation(letters: bool) -> None:
    labels = np.zeros((12, 14, 16), np.int32)
    labels[3:6, 4:8, 5:9] = 7
    for spacing in ((1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (-1.0, 1.0, 2.0)):
        both = volume(labels, spacing)
        png = draw_mistake(Mistake("missed", (7,), (), 48), both, both, labels * 2.0, letters)
        assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", list(INSTANCE_METRICS))
def test_a_perfect_prediction_is_one_in_every_number_and_a_missed_one_zero(name: str) -> None:
    reference = cases()["sparse_3d"][0]
    perfect, missed = (evaluate_instances(volume(p), volume(reference)) for p in (reference, reference * 0))
    assert perfect.rows[0].values[name] == perfect.means[name].mean == 1.0
    assert missed.rows[0].values[name] == 0.0
    assert perfect.pooled.get(name, 1.0) == 1.0 and "{" not in perfect.formula(name)


def test_numbers_do_not_depend_on_which_image_comes_first() -> None:
    pairs = [(volume(a), volume(b)) for a, b in (mistaken(), cases()["one_object_2d"])]
    one, other = (
        evaluate_instances([b for _, b in order], [a for a, _ in order]).pooled
        for order in (pairs, pairs[::-1])
    )
    assert one == pytest.approx(other, nan_ok=True)
    assert not any(math.isnan(v) for v in one.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--iou", "0.5"], "--iou is for objects"),
        (["--panoptic", "--iou", "0.5"], "--iou does not go with --panoptic"),
    ],
)
def test_the_iou_of_objects_is_refused_where_none_are_matched(
    tmp_path: Path, words: list[str], message: str
) -> None:
    from medseg.cli import app

    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), str(tmp_path), *words])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
