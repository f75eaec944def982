"""Files, folders and arrays to label maps; one bad case does not stop the others."""

import errno
import json
import threading
import time

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from medseg import pipeline
from medseg.bundle import load_bundle, save_bundle
from medseg.cli.info import info
from medseg.cli.predict import predict
from medseg.errors import (
    Cancelled,
    ConfigError,
    DataError,
    OutputError,
    PartialFailure,
    PlanError,
    ReadError,
    ResourceError,
)
from medseg.infer import Options, Predictor
from medseg.io import read, write
from medseg.log import Listener, listening
from medseg.phantom import write_phantom_dataset
from medseg.pipeline import list_work, predict_folder, segment
from medseg.volume import Geometry, Volume
from tests.infer.models import image, tiny_plan, tiny_weights

FAST = {"device": "cpu", "threads": 1, "mirror": False}
CARD = {"precision": "fp32"}

app = typer.Typer()
app.command()(predict)
app.command()(info)


@pytest.fixture
def bundle(tmp_path):
    plan = tiny_plan()
    save_bundle(tmp_path / "bundle", plan, "3d_fullres", {"0": tiny_weights(plan)}, (0, 1, 2), CARD)
    return tmp_path / "bundle"


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(("ann", "ben", "cid")):
        write(image(seed=number), tmp_path / "images" / f"{name}_0000.nii.gz")
    return tmp_path / "images"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def report(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_a_file_a_volume_and_an_array_give_the_same_labels(bundle, images):
    path = images / "ann_0000.nii.gz"
    volume = read(path)
    predictor = Predictor(pipeline.load_models(bundle), **FAST)
    results = [
        segment(each, predictor)
        for each in (path, str(path), [path], volume, (volume.array, volume.geometry.affine))
    ]
    results.append(segment((volume.array[0], volume.geometry.affine), bundle, **FAST))
    for result in results:
        assert (result.volume.array == results[0].volume.array).all()
        assert result.volume.geometry == volume.geometry
    assert len(np.unique(results[0].volume.array)) > 1


def test_a_folder_of_several_cases_is_not_one_image(bundle, images):
    with pytest.raises(ReadError, match="3 cases"):
        segment(images, bundle, **FAST)


def test_options_of_a_ready_predictor_cannot_be_changed(bundle, images):
    predictor = Predictor(pipeline.load_models(bundle), **FAST)
    with pytest.raises(ConfigError, match="already"):
        segment(images / "ann_0000.nii.gz", predictor, mirror=True)


def test_too_few_channels_are_refused(bundle):
    with pytest.raises(PlanError, match="2 channels"):
        segment(image(channels=2), bundle, **FAST)


def test_a_folder_becomes_label_maps_on_the_grids_of_their_images(bundle, images, tmp_path):
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [(r.case, r.status, r.error) for r in results] == [
        (n, "done", None) for n in ("ann", "ben", "cid")
    ]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "ann.nii.gz", "ben.nii.gz", "cid.nii.gz", "predictions.json"
    }  # fmt: skip
    for name in ("ann", "ben", "cid"):
        ours, source = read(tmp_path / "out" / f"{name}.nii.gz"), read(images / f"{name}_0000.nii.gz")
        assert ours.geometry.matches(source.geometry) and ours.array.dtype == np.uint8
        assert (ours.array == segment(source, bundle, **FAST).volume.array).all()


def test_the_report_says_what_was_done_to_which_files_by_which_model(bundle, images, tmp_path):
    predict_folder(images, bundle, tmp_path / "out", **FAST)
    content = report(tmp_path / "out")
    assert content["provenance"]["models"][0]["sha256"] == load_bundle(bundle).digest
    assert content["provenance"]["models"][0]["mirror_axes"] == []
    row = content["cases"][0]
    assert row["case"] == "ann" and row["status"] == "done" and row["seconds"] > 0
    assert len(row["inputs"]["ann_0000.nii.gz"]) == 64
    assert content["labels"]["entries"]["kidney"] == 1


def test_one_bad_case_is_a_row_and_the_others_finish(bundle, images, tmp_path):
    (images / "ben_0000.nii.gz").write_bytes(b"not an image")
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "ben" in results[1].error and "\n" not in results[1].error
    assert not (tmp_path / "out" / "ben.nii.gz").exists()
    assert [row["status"] for row in report(tmp_path / "out")["cases"]] == ["done", "failed", "done"]


@pytest.mark.parametrize("fault", [RuntimeError("odd"), MemoryError()])
def test_a_fault_in_the_middle_of_a_case_is_a_row(bundle, images, tmp_path, monkeypatch, fault):
    original, calls = Predictor.segment_prepared, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise fault
        return original(self, *arguments)

    monkeypatch.setattr(Predictor, "segment_prepared", broken)
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert ("memory ran out" if isinstance(fault, MemoryError) else "RuntimeError: odd") in results[1].error


def test_a_case_that_cannot_be_read_in_time_is_given_up(bundle, images, tmp_path, monkeypatch):
    original, release = pipeline.read_image, threading.Event()

    def slow(case):
        if case.name == "ben":
            release.wait(20)
        return original(case)

    monkeypatch.setattr(pipeline, "read_image", slow)
    began = time.monotonic()
    results = predict_folder(images, bundle, tmp_path / "out", read_timeout=1.0, **FAST)
    release.set()
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "within 1 s" in results[1].error and time.monotonic() - began < 15


def test_continue_leaves_out_what_the_same_model_has_done_to_the_same_files(bundle, images, tmp_path):
    out = tmp_path / "out"
    (images / "ben_0000.nii.gz").write_bytes(b"not an image")
    predict_folder(images, bundle, out, **FAST)
    before = (out / "ann.nii.gz").stat().st_mtime_ns
    write(image(seed=7), images / "ben_0000.nii.gz")
    write(image(seed=8), images / "cid_0000.nii.gz")  # was done, but is another image now
    results = predict_folder(images, bundle, out, resume=True, **FAST)
    assert {r.case: r.status for r in results} == {"ann": "skipped", "ben": "done", "cid": "done"}
    assert (out / "ann.nii.gz").stat().st_mtime_ns == before
    again = predict_folder(images, bundle, out, resume=True, **FAST)
    assert {r.status for r in again} == {"skipped"}


def test_continue_with_other_settings_predicts_again(bundle, images, tmp_path):
    predict_folder(images, bundle, tmp_path / "out", **FAST)
    results = predict_folder(images, bundle, tmp_path / "out", resume=True, **{**FAST, "step": 1.0})
    assert {r.status for r in results} == {"done"}


@pytest.mark.parametrize("content", ["", "[]", '{"cases": [{}]}'])
def test_continue_does_not_trust_a_damaged_report(bundle, images, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text(content)
    assert {r.status for r in predict_folder(images, bundle, out, resume=True, **FAST)} == {"done"}


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": None},
        {"seconds": "1"},
        {"inputs": None},
        {"inputs": {"ann_0000.nii.gz": 3}},
        {"case": ["ann"]},
        {"status": {}},
    ],
)
def test_continue_ignores_a_row_that_is_not_whole(bundle, images, tmp_path, change):
    out = tmp_path / "out"
    predict_folder(images, bundle, out, **FAST)
    content = report(out)
    content["cases"][0] |= change
    content["cases"] += [None, 3, {}]
    del content["cases"][1]["seconds"]
    (out / "predictions.json").write_text(json.dumps(content))
    results = predict_folder(images, bundle, out, resume=True, **FAST)
    assert {r.case: r.status for r in results} == {"ann": "done", "ben": "done", "cid": "skipped"}


@pytest.mark.parametrize("provenance", [None, {}, {"models": ["x"], "step": 0.5, "compatible": True}])
def test_continue_does_not_trust_an_odd_provenance(bundle, images, tmp_path, provenance):
    out = tmp_path / "out"
    predict_folder(images, bundle, out, **FAST)
    (out / "predictions.json").write_text(json.dumps(report(out) | {"provenance": provenance}))
    assert {r.status for r in predict_folder(images, bundle, out, resume=True, **FAST)} == {"done"}


def test_continue_predicts_again_where_probabilities_are_missing(bundle, images, tmp_path):
    out = tmp_path / "out"
    predict_folder(images, bundle, out, **FAST)
    for statuses in ({"done"}, {"skipped"}):
        results = predict_folder(images, bundle, out, save_probabilities=True, resume=True, **FAST)
        assert {r.status for r in results} == statuses
    assert len(list(out.glob("*.npz"))) == 3


def test_a_full_disk_stops_all_and_leaves_nothing_half_written(bundle, images, tmp_path, monkeypatch):
    def full(volume, path):
        raise ResourceError(f"{path}: the disk is full.") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(pipeline, "write", full)
    with pytest.raises(ResourceError, match="disk is full"):
        predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert not list((tmp_path / "out").glob("*"))


def test_one_file_that_is_bad_is_its_own_error_and_leaves_nothing(bundle, images, tmp_path):
    (images / "ben_0000.nii.gz").write_bytes(b"not an image")
    result = run("predict", images / "ben_0000.nii.gz", "-m", bundle, "-o", tmp_path / "out", "--no-mirror")
    assert isinstance(result.exception, ReadError) and result.exception.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_stopping_keeps_a_report_of_what_is_done(bundle, images, tmp_path):
    class Stop(Listener):
        def cancelled(self):
            return (tmp_path / "out" / "ann.nii.gz").exists()

    with listening(Stop()), pytest.raises(Cancelled):
        predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [row["status"] for row in report(tmp_path / "out")["cases"]] == ["done"]
    results = predict_folder(images, bundle, tmp_path / "out", resume=True, **FAST)
    assert [r.status for r in results] == ["skipped", "done", "done"]


def test_one_file_goes_to_a_folder_or_to_a_name(bundle, images, tmp_path):
    source = images / "ann_0000.nii.gz"
    first = predict_folder(source, bundle, tmp_path / "out", **FAST)
    second = predict_folder(source, bundle, tmp_path / "masks" / "liver.nrrd", **FAST)
    assert first[0].output == tmp_path / "out" / "ann.nii.gz"
    assert second[0].output == tmp_path / "masks" / "liver.nrrd"
    ours, named = read(first[0].output), read(second[0].output)
    assert (ours.array == named.array).all() and named.geometry.matches(ours.geometry)
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {"liver.nrrd", "liver.json"}


def test_label_maps_keep_the_format_of_their_images(bundle, tmp_path):
    write(image(), tmp_path / "images" / "dot.mha")
    results = predict_folder(tmp_path / "images", bundle, tmp_path / "out", **FAST)
    assert results[0].output.name == "dot.mha" and results[0].output.exists()


def test_an_image_is_never_replaced_by_its_label_map(bundle, tmp_path):
    write(image(), tmp_path / "images" / "eve.nii.gz")
    with pytest.raises(ConfigError, match="replace its image"):
        predict_folder(tmp_path / "images" / "eve.nii.gz", bundle, tmp_path / "images", **FAST)


def test_label_maps_never_lie_among_the_images(bundle, images):
    before = set(images.iterdir())
    with pytest.raises(ConfigError, match="is the folder of the images"):
        predict_folder(images, bundle, images / ".." / "images", **FAST)
    assert set(images.iterdir()) == before


def test_a_case_with_more_channels_than_the_model_takes_is_a_row(bundle, images, tmp_path):
    write(image(seed=5), images / "ben_0001.nii.gz")
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [(r.case, r.status) for r in results] == [("ann", "done"), ("ben", "failed"), ("cid", "done")]
    assert "ben: image has 2 channels" in results[1].error and "expects 1 (MR)" in results[1].error
    assert not list((tmp_path / "out").glob("ben*"))


def test_a_row_names_its_case_however_short_the_name(bundle, tmp_path):
    for channel in (0, 1):
        write(image(), tmp_path / "images" / f"x_000{channel}.nii.gz")
    results = predict_folder(tmp_path / "images", bundle, tmp_path / "out", **FAST)
    assert results[0].error.startswith("x: image has 2 channels")


def test_numbered_cases_are_not_taken_for_channels(bundle, tmp_path):
    for number in (1, 2):
        write(image(seed=number), tmp_path / "images" / f"case_{number:04d}.nii.gz")
    results = predict_folder(tmp_path / "images", bundle, tmp_path / "out", **FAST)
    assert [(r.case, r.status) for r in results] == [("case_0001", "done"), ("case_0002", "done")]


def test_voxels_that_are_not_finite_are_said_and_counted(bundle, images, tmp_path):
    bad = image(seed=1)
    array = bad.array.copy()
    array[0, 0, 0, :2] = np.nan, np.inf
    write(bad.with_array(array), images / "ben_0000.nii.gz")
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "ben: image holds 2 NaN or infinite voxels. Repair" in results[1].error
    with pytest.raises(DataError, match="ben: image holds 2 NaN"):
        predict_folder(images / "ben_0000.nii.gz", bundle, tmp_path / "one", **FAST)


def test_no_image_at_all_is_said(bundle):
    with pytest.raises(DataError, match="list of images is empty"):
        segment([], bundle, **FAST)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(bundle, images, tmp_path):
    (tmp_path / "taken").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken" / "out"):
        with pytest.raises(OutputError, match="is a file"):
            predict_folder(images, bundle, place, **FAST)
    with pytest.raises(ConfigError, match="does not write"):
        predict_folder(images / "ann_0000.nii.gz", bundle, tmp_path / "a.jpg", **FAST)


def test_probabilities_are_saved_on_request(bundle, images, tmp_path):
    predict_folder(images, bundle, tmp_path / "out", save_probabilities=True, **FAST)
    with np.load(tmp_path / "out" / "ann.npz") as file:
        probabilities = file["probabilities"]
    assert probabilities.shape == (3, 9, 11, 13)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


def test_a_dry_run_lists_the_cases_and_writes_nothing(bundle, images, tmp_path):
    rows = list_work(images, bundle, tmp_path / "out")
    assert [(r.case, r.status) for r in rows] == [("ann", "planned"), ("ben", "planned"), ("cid", "planned")]
    result = run("predict", images, "-m", bundle, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0 and result.stdout.count("planned") == 3
    assert not (tmp_path / "out").exists()


def test_the_command_predicts_a_folder_with_one_model_or_several(bundle, images, tmp_path):
    one = run("predict", images, "-m", bundle, "-o", tmp_path / "a", "--no-mirror", "--threads", 1, "--json")
    assert one.exit_code == 0, one.output
    assert [row["status"] for row in json.loads(one.stdout)["cases"]] == ["done"] * 3
    two = run("predict", images, "-m", bundle, "-m", bundle, "-o", tmp_path / "b", "--no-mirror")
    assert two.exit_code == 0, two.output
    assert (read(tmp_path / "a" / "ann.nii.gz").array == read(tmp_path / "b" / "ann.nii.gz").array).all()
    assert len(report(tmp_path / "b")["provenance"]["models"]) == 2


def test_the_command_ends_with_partial_failure_when_a_case_failed(bundle, images, tmp_path):
    (images / "ben_0000.nii.gz").write_bytes(b"not an image")
    result = run("predict", images, "-m", bundle, "-o", tmp_path / "out", "--no-mirror", "--json")
    assert isinstance(result.exception, PartialFailure) and result.exception.exit_code == 3
    assert "1 of 3 cases failed (ben)" in str(result.exception)
    assert [row["status"] for row in json.loads(result.stdout)["cases"]] == ["done", "failed", "done"]


@pytest.mark.parametrize("kind", ["bundle", "image", "plan"])
def test_info_says_what_a_path_is(bundle, images, kind):
    path = {"bundle": bundle, "image": images / "ann_0000.nii.gz", "plan": bundle / "plan.yaml"}[kind]
    facts = json.loads(run("info", path, "--json").stdout)
    assert facts["kind"] == kind
    expected = {"bundle": "3d_fullres", "image": "ALS", "plan": "Dataset901_Tiny"}[kind]
    assert expected in (facts.get("configuration"), facts.get("axes"), facts.get("dataset"))
    assert expected in run("info", path).stdout


def test_info_on_nothing_is_a_read_error(tmp_path):
    assert isinstance(run("info", tmp_path / "none").exception, ReadError)


def test_info_counts_what_is_not_finite_and_prints_strict_json(tmp_path):
    def never(constant):
        raise AssertionError(constant)

    for name, values, low in (("some", [np.nan, np.inf, 2.0], 2.0), ("all", [np.nan] * 3, None)):
        array = np.broadcast_to(np.array(values, np.float32)[:, None, None], (3, 2, 2))
        write(Volume(array, Geometry((3, 2, 2), np.eye(4))), tmp_path / f"{name}.nii.gz")
        facts = json.loads(run("info", tmp_path / f"{name}.nii.gz", "--json").stdout, parse_constant=never)
        assert facts["not_finite"] == 4 * sum(not np.isfinite(v) for v in values)
        assert facts["min"] == facts["max"] == low


def test_info_is_short(bundle, tmp_path):
    array = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    write(Volume(array, Geometry((4, 8, 8), np.eye(4))), tmp_path / "a.nii.gz")
    lines = run("info", tmp_path / "a.nii.gz").stdout.splitlines()
    assert max(map(len, lines)) < 100 and len(lines) < 20
    assert any("10, 11, ... (256 in all)" in line for line in lines)
    recipe = {"oversample_foreground": 0.33, "epochs": 5, "optimizer": {"name": "sgd", "lr": 0.01}}
    plan = tiny_plan()
    card = CARD | {"recipe": recipe}
    save_bundle(tmp_path / "b", plan, "3d_fullres", {"0": tiny_weights(plan)}, (0, 1, 2), card)
    out = run("info", tmp_path / "b").stdout
    assert "epochs 5, optimizer sgd 0.01" in out and "oversample" not in out
    assert json.loads(run("info", tmp_path / "b", "--json").stdout)["card"]["recipe"] == recipe


def test_info_says_how_an_unfinished_run_goes_on(tmp_path):
    (tmp_path / "run" / "fold_0").mkdir(parents=True)
    (tmp_path / "run" / "fold_0" / "log.jsonl").write_text("{}\n{}\n")
    out = run("info", tmp_path / "run").stdout
    assert "not finished: medseg train" in out and "--resume" in out and "fold_0 2" in out


def test_info_says_what_a_dataset_is(tmp_path):
    write_phantom_dataset(tmp_path / "Dataset900_Phantom", n_train=2, n_test=1, seed=3, size=16)
    facts = json.loads(run("info", tmp_path / "Dataset900_Phantom", "--json").stdout)
    assert (facts["kind"], facts["training_cases"], facts["test_cases"]) == ("dataset", 2, 1)
    assert facts["channels"] and facts["labels"]["background"] == 0


@pytest.mark.parametrize("name", ["result.json", "train.yaml"])
def test_info_on_another_description_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_text('{"a": 1, "b": {"c": 2}}')
    error = run("info", tmp_path / name).exception
    assert isinstance(error, ReadError) and "is not a plan, bundle or image" in str(error)
    assert len(str(error)) < 200 + len(str(tmp_path))


def test_info_on_what_may_not_be_read_is_a_read_error(bundle, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr("medseg.bundle.load_bundle", refuse)
    assert isinstance(run("info", bundle).exception, ReadError)


def test_options_are_checked_before_anything_is_read(bundle, images, tmp_path):
    with pytest.raises(ConfigError, match="precision"):
        predict_folder(images, bundle, tmp_path / "out", options=Options(precision="fp64", device="cpu"))
    assert not (tmp_path / "out").exists()
