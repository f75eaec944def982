"""Detectors trained as a user starts them, on scenes of a few blobs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medseg.bundle import load_bundle
from medseg.cli import app
from medseg.errors import BundleError, ConfigError, PlanError
from medseg.infer import Predictor
from medseg.instances.detect import Detector
from medseg.instances.scale import with_spacing
from medseg.io import open_dataset, read, write
from medseg.plan import Plan
from medseg.plan.detection import DetectorChoices
from medseg.plan.detector import plan_detection
from medseg.preprocess import build_store
from medseg.train import describe, fit
from medseg.train.detection_report import Counts, count_matches
from medseg.train.recipes import DETECTION_CPU
from medseg.volume import Geometry, Volume
from tests.nets.detection_scenes import blobs, tiny_architecture, tiny_detection
from tests.phantoms import affine

QUICK = ["epochs=2", "steps_per_epoch=3", "batch_size=2", "precision=fp32", "threads=1"]
SIZES = {2: (40, 48, 1), 3: (24, 28, 20)}


def make_dataset(root: Path, dims: int) -> Path:
    """Five cases whose label maps number their objects: values beyond the label set."""
    grid = Geometry(SIZES[dims], affine("LPS", (1.0, 1.0, 1.5)))
    rng = np.random.default_rng(dims)
    for number in range(5):
        image, labels = blobs(grid.shape[:dims], 3, rng)
        images, values = (
            part.numpy().reshape(1, *grid.shape) for part in (100 + 20 * image, labels.unsqueeze(0))
        )
        write(Volume(images, grid), root / "imagesTr" / f"case_{number}_0000.nii.gz")
        write(Volume(values.astype(np.uint8), grid), root / "labelsTr" / f"case_{number}.nii.gz")
    description = {
        "channel_names": {"0": "microscope"},
        "labels": {"background": 0, "blob": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def small_plan(dataset: Path, dims: int) -> Plan:
    made = plan_detection(open_dataset(dataset), "cpu")
    (name,) = made.configurations
    settings = made.configuration(name)
    assert settings.dimensions == dims
    assert settings.detection is not None and settings.detection.objects == "values"
    tiny = tiny_detection(dims, objects="values")
    small = settings.replace(
        patch_size=(32, 32) if dims == 2 else (16, 24, 24),
        architecture=tiny_architecture(dims).to_dict(),
        detection=tiny.to_dict(),
    )
    return made.replace(configurations={name: small.to_dict()})


@pytest.mark.parametrize("dims", [2, 3])
def test_a_run_leaves_a_bundle_that_finds_objects_on_the_grid_of_the_image(dims: int, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", dims)
    run = tmp_path / "run"
    bundle = load_bundle(fit(dataset, run, small_plan(dataset, dims), overrides=QUICK, task="detection"))
    result = json.loads((run / "fold_0" / "result.json").read_text())
    assert (result["steps"], result["validation_cases"]) == (6, 1)
    row = result["objects"]["blob"]
    assert row["tp"] + row["fn"] == 3
    page = (run / "fold_0" / "report.html").read_text()
    assert "Detector of" in page
    (path,) = (run / "fold_0" / "validation").glob("*.nii.gz")
    image = read(dataset / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"))
    assert read(path).geometry.matches(image.geometry)
    detector = Detector(bundle)
    assert detector.score == result["score"]
    found = detector.find(image, score=0.0)
    count = len(found.scores)
    assert found.volume.array.dtype == np.int32 and found.volume.geometry.matches(image.geometry)
    assert set(np.unique(found.volume.array).tolist()) - {0} == set(range(1, count + 1))
    assert set(found.classes.tolist()) <= {1} and len(found.classes) == count
    again = detector.find(image, score=0.0)
    np.testing.assert_array_equal(found.volume.array, again.volume.array)
    with pytest.raises(BundleError, match="finds objects"):
        Predictor(bundle)
    ranking = result["ranking"]
    assert ranking["froc"]["objects"] == 3 and "Average precision of scored objects" in page
    assert result["trials"] and {"cluster", "least_side"} <= set(result)
    check_faces(dataset, run, path, tmp_path)


def check_faces(dataset: Path, run: Path, predicted: Path, out: Path) -> None:
    """Count by the bundle, and evaluate what it wrote and what the training wrote."""
    image = dataset / "imagesTr" / predicted.name.replace(".nii.gz", "_0000.nii.gz")
    told = CliRunner().invoke(app, ["count", str(image), "-o", str(out / "c"), "--model", str(run), "--json"])
    assert told.exit_code == 0, told.output
    (row,) = json.loads(told.stdout)["images"]
    with (out / "c" / f"{predicted.name.replace('.nii.gz', '_0000')}_objects.csv").open() as lines:
        scores = [float(each["score"]) for each in csv.DictReader(lines)]
    assert len(scores) == row["objects"] and row["diameter"] is None
    shown = CliRunner().invoke(
        app, ["evaluate", str(predicted.parent), str(dataset / "labelsTr"), "--instances"]
    )
    assert shown.exit_code == 0 and "FROC" in shown.stdout
    refused = CliRunner().invoke(
        app, ["count", str(image), "-o", str(out / "d"), "--model", str(run), "--diameter", "9"]
    )
    assert isinstance(refused.exception, ConfigError) and "all sizes" in str(refused.exception)


def test_pictures_in_grey_and_colour_are_read_alike_and_cases_held_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(7):
        image, labels = blobs((48, 40), 4, rng)
        grey = (40 * image[0].numpy() + 80).clip(0, 255).astype(np.uint8)
        shown = np.stack([grey] * 3, -1) if number % 2 else grey
        for folder, pixels in (("images", shown), ("labels", labels.numpy().astype(np.uint8))):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"n{number}.png")
    chosen = {
        **{"preset": "cpu", "channels": 3, "hold_out": 2, "patch_size": [32, 32]},
        **{"features": [8, 16, 16], "finest_stage": 1, "heads": {"mask_channels": 8, "width": 16}},
        **{"proposals": {"candidates_test": 40, "proposals_test": 20}, "find": {"nms": 0.6}},
    }
    recipe = DETECTION_CPU.replace(detector=chosen, epochs=1, steps_per_epoch=2, precision="fp32")
    recipe.save(tmp_path / "r.yaml")
    words = ["train", str(tmp_path / "data"), "--task", "detection", "--recipe", str(tmp_path / "r.yaml")]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    seen = json.loads((tmp_path / "run" / "fold_0" / "run.json").read_text())
    assert len(seen["train"]) + len(seen["val"]) == 5
    bundle = load_bundle(tmp_path / "run")
    assert bundle.plan.channels == ("red", "green", "blue") and bundle.card["pixels"]
    settings = bundle.settings
    assert settings.detection is not None and settings.patch_size == (32, 32)
    assert (settings.detection.find.nms, settings.detection.heads.width) == (0.6, 16)
    detector = Detector(bundle)
    for name in ("n0", "n1"):
        picture = read(tmp_path / "data" / "images" / f"{name}.png")
        scaled = with_spacing(picture, (0.25,), "micron")
        found = detector.find(scaled, 0.0).volume
        assert found.geometry.matches(scaled.geometry)
        np.testing.assert_array_equal(found.array, detector.find(picture, 0.0).volume.array)


def test_a_recipe_that_does_not_fit_the_network_is_refused(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "data", 2))
    with pytest.raises(PlanError, match="multiples of"):
        plan_detection(dataset, choices=DetectorChoices(preset="cpu", patch_size=(33, 32)))
    with pytest.raises(PlanError, match="stages"):
        plan_detection(dataset, choices=DetectorChoices(preset="cpu", features=(8,) * 9))


def test_stopped_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", 2)
    plan = small_plan(dataset, 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(dataset, whole, plan, overrides=QUICK, task="detection")
    cancelled_after(4, lambda: fit(dataset, parts, plan, overrides=QUICK, task="detection"))
    assert not (parts / "bundle").exists()
    fit(dataset, parts, plan, overrides=QUICK, task="detection", resume=True)
    first, second = (load_bundle(run / "bundle").state_dict("0") for run in (whole, parts))
    assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first)


def cancelled_after(steps: int, start: object) -> None:
    """Run, and ask to stop when the loop has asked this often whether it should."""
    from medseg import log
    from medseg.errors import Cancelled

    class Impatient(log.Listener):
        asked, training = 0, False

        def started(self, key: int, label: str, total: int | None) -> None:
            self.training = label.startswith("Training")

        def cancelled(self) -> bool:
            self.asked += self.training
            return self.asked > steps

    with log.listening(Impatient()), pytest.raises(Cancelled):
        start()  # type: ignore[operator]


def test_what_would_be_trained_is_told_and_plans_of_the_other_task_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", 2)
    facts = describe(dataset, tmp_path / "run", preset="cpu", task="detection")
    assert facts["task"] == "detection" and facts["recipe"] == "detection-cpu"
    assert facts["objects"] == "values" and facts["configuration"] == "2d"
    assert len(facts["anchors"]) == 4  # two sides an axis on a CPU
    plan = small_plan(dataset, 2)
    with pytest.raises(PlanError, match="Pass --task detection"):
        describe(dataset, tmp_path / "run", plan=plan)
    with pytest.raises(PlanError, match="has no detector"):
        other = plan.replace(
            configurations={"2d": plan.configuration("2d").replace(detection=None).to_dict()}
        )
        describe(dataset, tmp_path / "run", plan=other, task="detection")


def test_objects_that_the_planned_spacing_misses_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "data", 2)
    path = dataset / "labelsTr" / "case_0.nii.gz"
    label = read(path)
    array = label.array.copy()
    array[0, 0, 0, 0] = 9
    write(label.with_array(array), path)
    plan = small_plan(dataset, 2)
    settings = plan.configuration("2d")
    coarse = settings.replace(spacing=[4 * size for size in settings.spacing])
    plan = plan.replace(configurations={"2d": coarse.to_dict()})
    build_store(open_dataset(dataset), plan, "2d", tmp_path / "store")
    assert [r.getMessage() for r in caplog.records if "not learnt" in r.getMessage()] == [
        "case_0: 1 objects are smaller than a voxel of the planned spacing, and are not learnt."
    ]


def test_the_command_line_says_what_it_would_train_and_refuses_what_detectors_lack(tmp_path: Path) -> None:
    words = ["train", str(make_dataset(tmp_path / "data", 2)), "--task", "detection", "--preset", "cpu"]
    shown = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert json.loads(shown.output)["task"] == "detection"
    refused = CliRunner().invoke(app, [*words, "--previous", str(tmp_path)])
    assert isinstance(refused.exception, ConfigError) and "no first stage" in str(refused.exception)


def test_counts_of_found_objects() -> None:
    reference = np.zeros((4, 9), int)
    reference[:, 0:3], reference[:, 4:6], reference[:, 7] = 5, 3, 900
    assert count_matches(reference, reference) == Counts(3, 0, 0)
    found = np.zeros_like(reference)
    found[:, 0:2], found[:, 4:9] = 1, 2  # two thirds of the first; the second covers two, half of neither
    assert count_matches(found, reference) == Counts(1, 1, 2)
    assert count_matches(found * 0, reference) == Counts(0, 0, 3)
    assert count_matches(found, reference * 0) == Counts(0, 2, 0)
    assert Counts().f1 == 1 and Counts(1, 1, 2).f1 == pytest.approx(0.4)
