"""evaluate(): what meets what, what fails alone, and what is written."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import Cancelled, ConfigError, DatasetError, GeometryError, LabelError
from medseg.io import write
from medseg.labels import LabelSet
from medseg.log import Listener, listening
from medseg.metrics import METRICS, evaluate
from medseg.segmentation import Segmentation
from medseg.volume import Geometry, Volume

SPACING = (1.5, 1.0, 3.0)
LABELS = LabelSet.parse({"background": 0, "liver": 1, "tumour": 2})


def label_map(start: int = 2, tumour: bool = True, shape=(12, 11, 6), unit="mm", spacing=SPACING) -> Volume:
    array = np.zeros(shape, np.uint8)
    array[start : start + 6, 2:8, 1:5] = 1
    if tumour:
        array[start + 2 : start + 4, 4:6, 2:4] = 2
    return Volume(array, Geometry(shape, np.diag([*spacing, 1.0]), unit))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for k, name in enumerate(("a", "b", "c")):
        write(label_map(2 + k % 2), tmp_path / "predictions" / f"{name}.nii.gz")
        write(label_map(2), tmp_path / "references" / f"{name}.mha")
    return tmp_path / "predictions", tmp_path / "references"


def test_folders_are_matched_by_case_name_whatever_the_format(folders):
    result = evaluate(*folders)
    assert result.cases == ("a", "b", "c")
    assert list(result.labels) == ["1", "2"]
    assert [row.case for row in result.rows] == ["a", "a", "b", "b", "c", "c"]
    assert result.rows[0].values["dice"] == 1.0
    assert result.rows[2].values["dice"] < 1.0
    assert result.summary["mean"].metrics["dice"].n == 3


def test_a_name_on_one_side_is_a_warning_and_in_the_result(folders, caplog):
    write(label_map(), folders[0] / "extra.nii.gz")
    write(label_map(), folders[1] / "missing.mha")
    result = evaluate(*folders, metrics=("dice",))
    assert result.predictions_alone == ("extra",)
    assert result.references_alone == ("missing",)
    assert result.failures == () and len(result.cases) == 3
    assert "1 references have no prediction and are not in the means: missing" in caplog.text


def test_when_nothing_matches_both_sides_are_listed(folders, tmp_path):
    write(label_map(), tmp_path / "other" / "z.nii.gz")
    with pytest.raises(DatasetError, match=r"Predictions: a, b, c\. References: z\.") as caught:
        evaluate(folders[0], tmp_path / "other")
    assert caught.value.exit_code == 4


def test_one_bad_case_becomes_a_failure_and_the_others_are_measured(folders):
    write(label_map(shape=(12, 11, 7)), folders[0] / "b.nii.gz")
    (folders[0] / "c.nii.gz").write_bytes(b"\x1f\x8b nothing")
    result = evaluate(*folders, metrics=("dice",))
    assert result.cases == ("a",)
    assert [failure.case for failure in result.failures] == ["b", "c"]
    assert "(12, 11, 7)" in result.failures[0].error and "Resample" in result.failures[0].error


def test_when_every_case_fails_the_first_reason_is_raised():
    with pytest.raises(DatasetError, match=r"none of the 1 cases.*Resample"):
        evaluate(label_map(), label_map(shape=(9, 11, 6)))


def test_a_shifted_affine_of_equal_shape_is_refused():
    moved = Geometry((12, 11, 6), np.diag([*SPACING, 1.0]) + np.array([[0, 0, 0, 5.0]] + [[0.0] * 4] * 3))
    with pytest.raises(DatasetError, match="affines differ by up to 5 mm"):
        evaluate(Volume(label_map().array, moved), label_map())


def test_two_folders_holding_one_case_twice_are_refused(folders):
    write(label_map(), folders[0] / "a.mha")
    with pytest.raises(DatasetError, match=r"a\.mha and a\.nii\.gz are both case 'a'"):
        evaluate(*folders)


def test_memory_files_sequences_and_mappings_give_the_same_numbers(folders):
    volumes = [label_map(2), label_map(3), label_map(2)]
    from_files = evaluate(*folders)
    names = ("a", "b", "c")
    references = dict.fromkeys(names, label_map(2))
    for given in (dict(zip(names, volumes, strict=True)), [*volumes]):
        known = references if isinstance(given, dict) else [*references.values()]
        result = evaluate(given, known)
        assert [row.values for row in result.rows] == [row.values for row in from_files.rows]
    single = evaluate(folders[0] / "b.nii.gz", folders[1] / "a.mha")
    assert single.rows[0].values == from_files.rows[2].values
    segmentation = Segmentation(label_map(3), LABELS)
    assert evaluate(segmentation, label_map(2)).rows[0].values == from_files.rows[2].values


def test_sequences_of_different_length_are_refused():
    with pytest.raises(DatasetError, match="2 predictions and 1 references"):
        evaluate([label_map(), label_map()], [label_map()])


def test_a_bare_array_is_refused_because_its_voxels_have_no_size():
    with pytest.raises(GeometryError, match="Wrap an array"):
        evaluate([label_map().array[0]], [label_map()])


def test_probabilities_are_not_mistaken_for_labels():
    soft = label_map().with_array(np.full((1, 12, 11, 6), 0.5))
    with pytest.raises(DatasetError, match="not whole numbers"):
        evaluate(soft, label_map())


def test_empty_masks_are_marked_and_never_dropped_in_silence():
    with_tumour, without = label_map(), label_map(tumour=False)
    result = evaluate(
        {"both": with_tumour, "missed": without, "invented": with_tumour, "none": without},
        {"both": with_tumour, "missed": with_tumour, "invented": without, "none": without},
        labels=LABELS,
    )
    tumour = {row.case: row for row in result.rows if row.label == "tumour"}
    assert {case: row.empty for case, row in tumour.items()} == {
        "both": "",
        "missed": "prediction",
        "invented": "reference",
        "none": "both",
    }
    assert tumour["missed"].values["dice"] == 0.0 and tumour["missed"].values["hd95"] == math.inf
    assert math.isnan(tumour["none"].values["dice"]) and math.isnan(tumour["none"].values["hd95"])
    summary = result.summary["tumour"]
    assert (summary.empty_both, summary.empty_prediction, summary.empty_reference) == (1, 1, 1)
    assert summary.metrics["dice"].mean == pytest.approx(1 / 3)
    assert (summary.metrics["hd95"].n, summary.metrics["hd95"].n_infinite) == (1, 2)
    assert summary.metrics["hd95"].mean == 0.0


def test_a_class_that_only_some_cases_have_is_a_row_of_every_case():
    result = evaluate([label_map(), label_map(tumour=False)], [label_map(), label_map(tumour=False)])
    assert [(row.label, row.empty) for row in result.rows] == [("1", ""), ("2", ""), ("1", ""), ("2", "both")]


def test_volumes_are_in_millilitres_and_microns_are_converted():
    bigger = label_map()
    bigger.array[0, 8, 2:8, 1:5] = 1
    error = evaluate(bigger, label_map()).rows[0].values["volume_error"]
    assert error == pytest.approx(24 * 1.5 * 1.0 * 3.0 / 1000)
    spacing = tuple(1000 * s for s in SPACING)
    micron = evaluate(
        Volume(bigger.array, label_map(unit="micron", spacing=spacing).geometry),
        label_map(unit="micron", spacing=spacing),
    )
    assert micron.rows[0].values["volume_error"] == pytest.approx(error)
    assert micron.rows[0].values["hd"] == pytest.approx(1.5)


def test_one_slice_is_measured_as_a_contour():
    flat = label_map(2, shape=(12, 11, 6)).array[:, :, :, 2:3]
    moved = label_map(4, shape=(12, 11, 6)).array[:, :, :, 2:3]
    grid = Geometry((12, 11, 1), np.diag([*SPACING, 1.0]))
    values = evaluate(Volume(moved, grid), Volume(flat, grid), labels=LABELS).rows[0].values
    assert values["hd"] == pytest.approx(3.0)
    assert 0.0 < values["nsd"] < 1.0


def test_ignored_voxels_count_for_no_metric():
    labels = LabelSet.parse({"background": 0, "liver": 1, "ignore": 2})
    reference, prediction = label_map(tumour=False), label_map(tumour=False)
    reference.array[0, 10:12] = 2
    prediction.array[0, 10:12] = 1
    values = evaluate(prediction, reference, labels=labels).rows[0].values
    assert values["dice"] == 1.0 and values["hd"] == 0.0 and values["volume_error"] == 0.0


def test_a_dataset_json_beside_the_folder_names_the_labels(folders):
    description = {"labels": {"background": 0, "all": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    (folders[1].parent / "dataset.json").write_text(json.dumps(description))
    result = evaluate(*folders, metrics=("dice",))
    assert list(result.labels) == ["all", "core"]
    assert result.to_dict()["mean"].keys() == {"(1, 2)", "(2,)"}


@pytest.mark.parametrize("single", [False, True])
def test_the_report_of_predict_names_the_labels(folders, single):
    predictions, references = folders
    name = "a.json" if single else "predictions.json"
    (predictions / name).write_text(json.dumps({"labels": LABELS.to_dict()}))
    result = evaluate(predictions / "a.nii.gz", references / "a.mha") if single else evaluate(*folders)
    assert list(result.labels) == list(LABELS.foreground)


@pytest.mark.parametrize("content", ["", "[]", '{"labels": 3}'])
def test_another_file_beside_the_predictions_is_left_alone(folders, content):
    (folders[0] / "predictions.json").write_text(content)
    assert list(evaluate(*folders).labels) == ["1", "2"]


def test_intensities_are_not_mistaken_for_labels():
    image = label_map()
    image = image.with_array(np.arange(image.array.size, dtype=np.uint8).reshape(image.array.shape))
    with pytest.raises(DatasetError, match=r"holds 255 different values\. Are these intensity images"):
        evaluate(label_map(), image)


def test_a_mean_of_what_was_not_measured_is_refused():
    result = evaluate(label_map(), label_map())
    with pytest.raises(ConfigError, match=r"'foo': was not measured. Choose from dice, iou"):
        result.mean("foo")
    with pytest.raises(ConfigError, match="'liver': is not among 1, 2, mean"):
        result.mean("dice", "liver")


def test_a_labels_file_without_labels_is_refused(folders, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="no 'labels'"):
        evaluate(*folders, labels=tmp_path / "x.json")


@pytest.mark.parametrize("change", [{"metrics": ("dise",)}, {"nsd_mm": -1.0}, {"resamples": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        evaluate(label_map(), label_map(), **change)


def test_more_than_one_channel_is_no_label_map():
    two = Volume(np.zeros((2, 12, 11, 6), np.uint8), label_map().geometry)
    with pytest.raises(DatasetError, match="2 channels"):
        evaluate(two, label_map())
    assert issubclass(LabelError, ValueError)


def test_the_json_is_strict_and_complete(folders, tmp_path):
    write(label_map(tumour=False), folders[0] / "a.nii.gz")
    result = evaluate(*folders, labels=LABELS)
    result.to_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    tumour = data["metric_per_case"][0]["metrics"]["2"]
    assert tumour["Dice"] == 0.0 and tumour["hd95_mm"] is None and tumour["empty"] == "prediction"
    assert data["metric_per_case"][0]["prediction_file"].endswith("a.nii.gz")
    interval = data["medseg"]["summary"]["liver"]["dice"]
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert set(data["medseg"]["definitions"]) == {metric.column(name) for name, metric in METRICS.items()}


def test_the_csv_has_a_line_per_case_and_class_and_per_failure(folders, tmp_path):
    write(label_map(shape=(12, 11, 7)), folders[0] / "b.nii.gz")
    evaluate(*folders, labels=LABELS).to_csv(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["label"]) for row in rows] == [
        ("a", "liver"),
        ("a", "tumour"),
        ("c", "liver"),
        ("c", "tumour"),
        ("b", ""),
    ]
    assert float(rows[0]["dice"]) == 1.0 and rows[0]["error"] == ""
    assert "Resample" in rows[-1]["error"]


def test_the_same_seed_gives_the_same_file(folders):
    texts = [json.dumps(evaluate(*folders, seed=4).to_dict()) for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_request_to_stop_is_obeyed_and_is_no_failure_of_a_case(folders):
    class Impatient(Listener):
        steps = 0

        def advanced(self, key: int, steps: int, note: str) -> None:
            self.steps += steps

        def cancelled(self) -> bool:
            return self.steps >= 1

    listener = Impatient()
    with listening(listener), pytest.raises(Cancelled):
        evaluate(*folders, metrics=("dice",))
    assert listener.steps == 1
