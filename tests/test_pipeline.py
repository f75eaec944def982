"""Files, folders and arrays to label maps; one bad case does not stop the others."""

import errno
import json
import re
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from medseg import pipeline
from medseg.bundle import load_bundle, save_bundle
from medseg.cli.info import info
from medseg.cli.predict import _duration, predict
from medseg.errors import (
    BundleError,
    Cancelled,
    ConfigError,
    DataError,
    OutputError,
    PartialFailure,
    PlanError,
    ReadError,
    ResourceError,
)
from medseg.exchange import EXPORTERS
from medseg.infer import Options, Predictor
from medseg.io import read, write
from medseg.log import Listener, listening
from medseg.phantom import write_phantom_dataset
from medseg.pipeline import list_work, predict_folder, segment
from medseg.volume import Geometry, Volume
from tests.exchange import zoo
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


LACK = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("fault", [RuntimeError("odd"), MemoryError(), RuntimeError(LACK)])
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
    assert ("RuntimeError: odd" if str(fault) == "odd" else "memory ran out. Close") in results[1].error
    assert ("medseg check" in results[1].error) is (str(fault) == "odd")


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError(LACK)])
def test_lack_of_memory_for_the_only_case_is_a_resource_error(bundle, images, tmp_path, monkeypatch, fault):
    def lack(self, volume):
        raise fault

    monkeypatch.setattr(Predictor, "prepare", lack)
    with pytest.raises(ResourceError, match=r"ann: memory ran out.*smaller patch"):
        predict_folder(images / "ann_0000.nii.gz", bundle, tmp_path / "out", **FAST)


def test_no_thread_is_alive_after_a_prediction(bundle, images, tmp_path):
    predict_folder(images, bundle, tmp_path / "out", **FAST | {"threads": 2})
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("medseg ")]


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


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("images", "x.nii.gz", "name of one file"),
        ("images", "x.png", "name of one file"),
        ("images", "out.v2", None),
        ("images", "out.final", None),
        ("images/ann_0000.nii.gz", "x.foo", "does not write this format"),
        ("images/ann_0000.nii.gz", "x.jpg", "does not write this format"),
        ("images/ann_0000.nii.gz", "out.v2", None),
        ("images/ann_0000.nii.gz", "there.foo", None),
    ],
)
def test_a_file_name_is_never_taken_for_a_folder(bundle, images, tmp_path, source, name, says):
    (tmp_path / "there.foo").mkdir()
    if says is None:
        assert list_work(tmp_path / source, bundle, tmp_path / name)[0].output.parent == tmp_path / name
        return
    with pytest.raises(ConfigError, match=says):
        list_work(tmp_path / source, bundle, tmp_path / name)
    with pytest.raises(ConfigError, match=says):
        predict_folder(tmp_path / source, bundle, tmp_path / name, **FAST)
    assert not (tmp_path / name).exists()


def test_one_file_of_several_channels_is_said_to_be_4d(bundle, tmp_path):
    path = tmp_path / "images" / "fay.nii.gz"
    write(image((13, 11, 9), channels=3), path)
    for attempt in (
        lambda: predict_folder(path, bundle, tmp_path / "out", **FAST),
        lambda: segment(path, bundle, **FAST),
        lambda: segment([path], bundle, **FAST),
    ):
        with pytest.raises(PlanError, match=r"fay.nii.gz: is 4D \(13 x 11 x 9 x 3\).*takes 1 \(MR\)"):
            attempt()


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
    assert "1 of 3 cases failed (ben)" in str(result.exception) and "--resume" in str(result.exception)
    assert json.loads(result.stdout)["counts"] == {"done": 2, "skipped": 0, "failed": 1}
    assert [row["status"] for row in json.loads(result.stdout)["cases"]] == ["done", "failed", "done"]


def test_where_all_cases_fail_the_model_is_doubted_and_not_each_case(bundle, tmp_path):
    for name in ("ann", "ben"):
        for channel in range(2):
            write(image(), tmp_path / "images" / f"{name}_{channel:04d}.nii.gz")
    result = run("predict", tmp_path / "images", "-m", bundle, "-o", tmp_path / "out", "--json")
    assert isinstance(result.exception, PartialFailure) and result.exception.exit_code == 3
    assert "2 of 2 cases failed (ann, ben)" in str(result.exception)
    assert "model is for these images" in str(result.exception) and "--resume" not in str(result.exception)
    assert json.loads(result.stdout)["counts"] == {"done": 0, "skipped": 0, "failed": 2}


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


def test_a_case_is_read_ahead_and_the_last_one_written_behind(bundle, images, tmp_path, monkeypatch):
    """While ben is in the network, cid is being read and ann is being written, and nothing else is held."""
    met = threading.Barrier(3, timeout=20)

    def meet(original, name, wanted):
        def stage(self, case, value):
            if case.name == wanted:
                met.wait()
            return original(self, case, value)

        monkeypatch.setattr(pipeline._Run, name, stage)

    for name, wanted in (("read", "cid"), ("predict", "ben"), ("write", "ann")):
        meet(getattr(pipeline._Run, name), name, wanted)
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [(r.case, r.status) for r in results] == [(n, "done") for n in ("ann", "ben", "cid")]


def test_a_case_that_does_not_fit_beside_another_waits_for_it(bundle, images, tmp_path, monkeypatch):
    held, most = set(), []
    read_stage, write_stage = pipeline._Run.read, pipeline._Run.write

    def read_case(self, case, value):
        held.add(case.name)
        most.append(len(held))
        return read_stage(self, case, value)

    def write_case(self, case, value):
        held.remove(case.name)
        return write_stage(self, case, value)

    monkeypatch.setattr(pipeline._Run, "read", read_case)
    monkeypatch.setattr(pipeline._Run, "write", write_case)
    size = 8 * 4 * 13 * 11 * 9
    predict_folder(images, bundle, tmp_path / "a", memory=size, **FAST)
    assert max(most) == 1
    predict_folder(images, bundle, tmp_path / "b", memory=2 * size, **FAST)
    assert max(most) > 1


@pytest.mark.parametrize("content", [b"", b"abc", b"\x1f\x8b" + bytes(9)])
def test_the_size_of_an_odd_file_is_no_error(tmp_path, content):
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert pipeline._unpacked_size(tmp_path / "a.nii.gz") >= 0
    assert pipeline._unpacked_size(tmp_path / "missing.nii.gz") == 0


def test_free_memory_is_known_or_not_asked_for():
    free = pipeline.free_memory()
    assert free is None or free > 0


def test_rows_keep_the_order_of_the_cases_though_a_bad_one_is_known_first(bundle, images, tmp_path):
    (images / "cid_0000.nii.gz").write_bytes(b"not an image")
    write(image(seed=9), images / "dan_0000.nii.gz")
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [(r.case, r.status) for r in results] == [
        ("ann", "done"), ("ben", "done"), ("cid", "failed"), ("dan", "done")
    ]  # fmt: skip
    assert [row["case"] for row in report(tmp_path / "out")["cases"]] == ["ann", "ben", "cid", "dan"]


def test_a_label_map_that_cannot_be_written_in_time_is_given_up(bundle, images, tmp_path, monkeypatch):
    original, release = pipeline.write, threading.Event()

    def slow(volume, path):
        if path.name.startswith("ben"):
            release.wait(20)
        original(volume, path)

    monkeypatch.setattr(pipeline, "write", slow)
    monkeypatch.setattr(pipeline, "WRITE_TIMEOUT_SECONDS", 0.5)
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    release.set()
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "ben: could not be written within 0.5 s" in results[1].error


def test_a_network_that_hangs_ends_the_run_with_a_sentence(bundle, images, tmp_path, monkeypatch):
    original, release, calls = Predictor.segment_prepared, threading.Event(), []

    def hang(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            release.wait(20)
        return original(self, *arguments)

    monkeypatch.setattr(Predictor, "segment_prepared", hang)
    monkeypatch.setattr(pipeline, "NETWORK_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ResourceError, match=r"ben: the network has finished nothing for 0\.5 s"):
        predict_folder(images, bundle, tmp_path / "out", **FAST)
    release.set()
    assert [row["case"] for row in report(tmp_path / "out")["cases"]] == ["ann"]


def test_odd_images_are_segmented_or_a_row_and_never_the_end(bundle, images, tmp_path):
    blank = image(seed=1)
    write(blank.with_array(np.zeros_like(blank.array)), images / "blank_0000.nii.gz")
    write(image((13, 11, 1), seed=2), images / "slice_0000.nii.gz")
    (images / "folder_0000.nii.gz").mkdir()
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert {r.case: r.status for r in results} == dict.fromkeys(
        ("ann", "ben", "blank", "cid", "slice"), "done"
    )
    for name in ("blank", "slice"):
        ours = read(tmp_path / "out" / f"{name}.nii.gz")
        assert ours.geometry.matches(read(images / f"{name}_0000.nii.gz").geometry)


def test_a_file_that_may_not_be_read_is_a_row(bundle, images, tmp_path, monkeypatch):
    original = type(images).open

    def refuse(self, *arguments, **options):
        if self.name.startswith("ben"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(images), "open", refuse)
    results = predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "may not be read. Change its permissions" in results[1].error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_is_whole(bundle, images, small_disk):
    noise = np.random.default_rng(0).normal(5, 2, (1, 64, 64, 64)).astype(np.float32)
    write(Volume(noise, Geometry((64, 64, 64), np.eye(4))), images / "ben_0000.nii.gz")
    out = small_disk / "out"
    with pytest.raises(ResourceError, match="disk is full"):
        predict_folder(images, bundle, out, **FAST)
    assert {path.name for path in out.iterdir()} <= {"ann.nii.gz", "predictions.json"}
    assert read(out / "ann.nii.gz").shape == (13, 11, 9)


@pytest.fixture
def cascade(tmp_path):
    """Paths of a second stage without its first, and of the first."""
    plan = tiny_plan()
    weights = tiny_weights(plan, "3d_cascade_fullres", seed=3)
    save_bundle(tmp_path / "second", plan, "3d_cascade_fullres", {"0": weights}, (), CARD)
    save_bundle(tmp_path / "first", plan, "3d_fullres", {"0": tiny_weights(plan)}, (), CARD)
    return tmp_path / "second", tmp_path / "first"


def test_a_cascade_without_its_first_stage_is_refused_before_anything_is_read(cascade, images, tmp_path):
    with pytest.raises(BundleError, match="--previous"):
        predict_folder(images, cascade[0], tmp_path / "out", **FAST)
    with pytest.raises(BundleError, match="--previous"):
        segment(image(), cascade[0], **FAST)
    assert not (tmp_path / "out").exists()


def test_a_first_stage_can_be_given_as_a_model_or_as_its_label_maps(cascade, images, tmp_path):
    second, first = cascade
    predict_folder(images, first, tmp_path / "stage", **FAST)
    for name, options in {"a": {"previous": first}, "b": {"previous_labels": tmp_path / "stage"}}.items():
        results = predict_folder(images, second, tmp_path / name, **options, **FAST)
        assert {r.status for r in results} == {"done"}
    first_map = tmp_path / "stage" / "ann.nii.gz"
    whole = segment(images / "ann_0000.nii.gz", second, previous=first, **FAST)
    given = segment(images / "ann_0000.nii.gz", second, previous_labels=first_map, **FAST)
    empty = read(first_map).with_array(np.zeros_like(read(first_map).array))
    other = segment(images / "ann_0000.nii.gz", second, previous_labels=empty, **FAST)
    for labels in (read(tmp_path / "a" / "ann.nii.gz"), read(tmp_path / "b" / "ann.nii.gz"), given.volume):
        assert (labels.array == whole.volume.array).all()
    assert (other.volume.array != whole.volume.array).any()


def test_a_label_map_of_the_first_stage_that_is_missing_or_does_not_fit_is_a_row(cascade, images, tmp_path):
    stage = tmp_path / "stage"
    predict_folder(images, cascade[1], stage, **FAST)
    (stage / "ann.nii.gz").unlink()
    write(Volume(np.zeros((4, 4, 4), np.uint8), Geometry((4, 4, 4), np.eye(4))), stage / "ben.nii.gz")
    cid = read(stage / "cid.nii.gz")
    write(cid.with_array(cid.array + 7), stage / "cid.nii.gz")
    results = predict_folder(images, cascade[0], tmp_path / "out", previous_labels=stage, **FAST)
    assert [r.status for r in results] == ["failed"] * 3
    for row, reason in zip(
        results, ("has no label map of the first", "differs from", "holds values"), strict=True
    ):
        assert row.case in row.error and reason in row.error
    with pytest.raises(ReadError, match="no such folder"):
        predict_folder(images, cascade[0], tmp_path / "out", previous_labels=tmp_path / "none", **FAST)


def test_label_maps_of_a_first_stage_are_refused_by_a_model_that_has_none(bundle, images, tmp_path):
    with pytest.raises(ConfigError, match="no cascade"):
        predict_folder(images, bundle, tmp_path / "out", previous_labels=images, **FAST)


def test_continue_notices_another_first_stage(cascade, images, tmp_path):
    second, first = cascade
    stage, out = tmp_path / "stage", tmp_path / "out"
    predict_folder(images, first, stage, **FAST)

    def again(**options):
        results = predict_folder(images, second, out, resume=True, **options, **FAST)
        return {r.case: r.status for r in results}

    everything = dict.fromkeys(("ann", "ben", "cid"), "done")
    assert again(previous_labels=stage) == everything
    assert again(previous_labels=stage) == dict.fromkeys(everything, "skipped")
    changed = read(stage / "ben.nii.gz")
    write(changed.with_array(np.zeros_like(changed.array)), stage / "ben.nii.gz")
    assert again(previous_labels=stage) == {"ann": "skipped", "ben": "done", "cid": "skipped"}
    assert again(previous=first) == everything
    assert again(previous=first) == dict.fromkeys(everything, "skipped")
    plan = tiny_plan()
    save_bundle(tmp_path / "other", plan, "3d_fullres", {"0": tiny_weights(plan, seed=9)}, (), CARD)
    assert again(previous=tmp_path / "other") == everything


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"mirror": True}, {"compatible": False}])
def test_continue_notices_another_setting(bundle, images, tmp_path, change):
    predict_folder(images, bundle, tmp_path / "out", **FAST)
    results = predict_folder(images, bundle, tmp_path / "out", resume=True, **{**FAST, **change})
    assert {r.status for r in results} == {"done"}


def test_a_checkpoint_is_chosen_only_for_a_model_of_nnunet(bundle, images, tmp_path):
    with pytest.raises(ConfigError, match="no model of nnU-Net"):
        predict_folder(images, bundle, tmp_path / "out", checkpoint="best", **FAST)


def test_the_summary_counts_what_became_of_the_cases(bundle, images, tmp_path):
    words = ("predict", images, "-m", bundle, "-o", tmp_path / "out", "--no-mirror", "--threads", 1)
    assert re.search(r"^3 done in \d+\.\d s, \d+\.\d s a case$", run(*words).stderr, re.M)
    (images / "ben_0000.nii.gz").write_bytes(b"not an image")
    again = run(*words, "--resume")
    assert "0 done, 2 done before, 1 failed" in again.stderr
    assert again.stdout.count("skipped") == 2


def test_durations_are_short_words():
    assert [_duration(seconds) for seconds in (0.04, 99.2, 100, 3600, 5025)] == [
        "0.0 s", "99.2 s", "1:40 min", "1:00:00", "1:23:45"
    ]  # fmt: skip


def test_a_model_of_nnunet_gives_the_labels_of_the_bundle_it_came_from(bundle, images, tmp_path):
    EXPORTERS["nnunet"](load_bundle(bundle), tmp_path / "nnunet", None)
    mine = ("--no-mirror", "--precision", "fp32", "--threads", 1)
    for name, model, options in (("a", bundle, ()), ("b", tmp_path / "nnunet", ("--checkpoint", "final"))):
        answer = run("predict", images, "-m", model, "-o", tmp_path / name, *options, *mine)
        assert answer.exit_code == 0, answer.output
    for case in ("ann", "ben", "cid"):
        ours, theirs = (read(tmp_path / name / f"{case}.nii.gz").array for name in "ab")
        assert (ours == theirs).all()
    listed = run("predict", images, "-m", tmp_path / "nnunet", "-o", tmp_path / "c", "--dry-run")
    assert listed.stdout.count("planned") == 3
    best = run("predict", images, "-m", tmp_path / "nnunet", "-o", tmp_path / "c", "--checkpoint", "best")
    assert isinstance(best.exception, BundleError) and not (tmp_path / "c").exists()


def test_options_of_the_command_reach_the_predictor(bundle, images, tmp_path, monkeypatch):
    seen = {}

    def record(*arguments, **named):
        seen.update(named, options=arguments[5])
        return []

    monkeypatch.setattr(pipeline, "predict_folder", record)
    words = ("--skip-air", "--step", 0.7, "--fold", 1, "--fold", 3, "--threads", 2, "--previous", "p")
    result = run("predict", images, "-m", bundle, "-o", tmp_path / "out", *words, "--previous-labels", "l")
    assert result.exit_code == 0, result.output
    assert seen["options"] == Options(step=0.7, skip_air=True, folds=("1", "3"), threads=2)
    assert (str(seen["previous"]), str(seen["previous_labels"]), seen["checkpoint"]) == ("p", "l", None)


def test_a_bundle_of_monai_is_a_model_like_any_other(tmp_path):
    model = zoo.write_bundle(tmp_path / "model", "spleen")
    (path,) = zoo.write_image(tmp_path / "images")
    words = ("predict", path.parent, "-m", model, "--device", "cpu", "--threads", 1, "-o", tmp_path / "out")
    answer = run(*words)
    assert answer.exit_code == 0, answer.output
    labels, source = read(tmp_path / "out" / "case.nii.gz"), read(path)
    assert labels.geometry.matches(source.geometry)
    assert (segment(path, model, device="cpu", threads=1).volume.array == labels.array).all()
    assert [row.status for row in list_work(path, model, tmp_path / "other")] == ["planned"]
    assert "skipped" in run(*words, "--resume").stdout
    with pytest.raises(ConfigError, match="no cascade"):
        predict_folder(path, model, tmp_path / "other", previous_labels=path.parent, device="cpu")
    with pytest.raises(BundleError, match="not averaged"):
        predict_folder(path, [model, model], tmp_path / "other", device="cpu")


def test_the_voxels_of_a_case_are_let_go_of_once_it_is_preprocessed(cascade, bundle, images, tmp_path):
    """But for a cascade, which needs them for its first stage."""
    held = []

    def record(original):
        def stage(self, case, loaded):
            held.append(int(np.count_nonzero(loaded.volume.array)))
            return original(self, case, loaded)

        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Run, "predict", record(pipeline._Run.predict))
        predict_folder(images, bundle, tmp_path / "a", **FAST)
        assert held == [0, 0, 0]
        predict_folder(images, cascade[0], tmp_path / "b", previous=cascade[1], **FAST)
        assert min(held[3:]) > 0


def test_continue_does_not_care_when_auto_was_settled(bundle, images, tmp_path, monkeypatch):
    """A runtime that is chosen with the first case is not another setting than one to be chosen."""
    original, settled = Predictor.provenance, []

    def provenance(self):
        content = original(self)
        content["models"][0] |= {"runtime": settled[0] if settled else "auto"}
        return content

    def segment_prepared(self, *arguments):
        settled.append("openvino")
        return network(self, *arguments)

    network = Predictor.segment_prepared
    monkeypatch.setattr(Predictor, "provenance", provenance)
    monkeypatch.setattr(Predictor, "segment_prepared", segment_prepared)
    predict_folder(images, bundle, tmp_path / "out", **FAST)
    assert report(tmp_path / "out")["provenance"]["models"][0]["runtime"] == "openvino"
    settled.clear()
    results = predict_folder(images, bundle, tmp_path / "out", resume=True, **FAST)
    assert {r.status for r in results} == {"skipped"}


def test_every_stage_computes_on_the_threads_that_were_asked_for(bundle, images, tmp_path, monkeypatch):
    seen = set()

    def record(original):
        def stage(self, case, value):
            seen.add(torch.get_num_threads())
            return original(self, case, value)

        return stage

    for name in ("read", "predict"):
        monkeypatch.setattr(pipeline._Run, name, record(getattr(pipeline._Run, name)))
    predict_folder(images, bundle, tmp_path / "out", **(FAST | {"threads": 3}))
    assert seen == {3}
