"""Whole runs on small phantoms, as a user starts them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from medseg.bundle import load_bundle
from medseg.errors import ConfigError, DataError, PlanError, TrainingError
from medseg.io import open_dataset, read, write
from medseg.plan import Architecture, Plan, make_plan
from medseg.train import describe, fit
from medseg.train.processes import claimed
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES, affine, ball, noise

GRID = Geometry((24, 22, 20), affine("LPS", (1.0, 1.0, 1.2)))
QUICK = ["epochs=3", "steps_per_epoch=4", "val_samples=2", "batch_size=2", "precision=fp32", "threads=1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six balls in noise, as a plain images/ + labels/ dataset."""
    root = tmp_path_factory.mktemp("balls")
    for seed in range(6):
        label = ball(GRID)
        image = noise(GRID, seed)
        write(Volume(image.array + 80 * label.array, GRID), root / "images" / f"case_{seed}.nii.gz")
        write(label, root / "labels" / f"case_{seed}.nii.gz")
    return root


@pytest.fixture(scope="module")
def plan(dataset: Path) -> Plan:
    """A plan with a net so small that a step takes milliseconds."""
    made = make_plan(open_dataset(dataset), "cpu")
    settings = made.configuration("3d_fullres")
    small = settings.replace(
        patch_size=(16, 16, 16),
        architecture={
            "network": "unet",
            "features_per_stage": (4, 8),
            "strides": ((1, 1, 1), (2, 2, 2)),
            "kernel_sizes": ((3, 3, 3), (3, 3, 3)),
            "blocks_per_stage": (1, 1),
            "decoder_convs_per_stage": (1,),
        },
    )
    return made.replace(configurations={"3d_fullres": small.to_dict()})


def weights(run: Path, fold: str = "0") -> dict[str, np.ndarray]:
    return load_file(run / "bundle" / "weights" / f"fold_{fold}.safetensors")


def command(dataset: Path, run: Path, plan_file: Path, *extra: str) -> list[str]:
    start = [sys.executable, "-m", "medseg", "train", str(dataset), *QUICK]
    return [*start, "-o", str(run), "--plan", str(plan_file), *extra]


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float = 0.0) -> bool:
    return first.keys() == second.keys() and all(
        np.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first
    )


def test_a_run_leaves_a_bundle_a_validation_and_a_report(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    bundle = fit(dataset, tmp_path, plan, overrides=QUICK)
    assert load_bundle(bundle).folds == ("0",)
    result = json.loads((tmp_path / "fold_0" / "result.json").read_text())
    assert result["steps"] == 12 and result["validation_cases"] == 2
    names = sorted(path.name for path in (tmp_path / "fold_0" / "validation").glob("*.nii.gz"))
    assert len(names) == 2
    assert read(tmp_path / "fold_0" / "validation" / names[0]).geometry.matches(GRID)
    assert "Dice while training" in (tmp_path / "fold_0" / "report.html").read_text()


def test_killed_at_a_random_step_and_resumed_it_ends_with_the_same_weights(
    dataset: Path, plan: Plan, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.yaml")
    longer = ["epochs=100", "checkpoint_seconds=0.2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(dataset, whole, tmp_path / "plan.yaml", *longer), check=True, capture_output=True)
    process = subprocess.Popen(
        command(dataset, parts, tmp_path / "plan.yaml", *longer), stderr=subprocess.DEVNULL
    )
    state = parts / "fold_0" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.8))
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_midway = not (parts / "bundle").exists()
    assert killed_midway, "the run was over before it was killed: make it longer"
    refused = subprocess.run(
        command(dataset, parts, tmp_path / "plan.yaml", *longer), capture_output=True, text=True
    )
    assert refused.returncode == TrainingError.exit_code and "--resume" in refused.stderr
    subprocess.run(
        command(dataset, parts, tmp_path / "plan.yaml", *longer, "--resume"), check=True, capture_output=True
    )
    assert same(weights(whole), weights(parts))


def test_two_processes_train_what_one_does(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    pooled = {**plan.configuration("3d_fullres").to_dict(), "batch_dice": True}
    plan.replace(configurations={"3d_fullres": pooled}).save(tmp_path / "plan.yaml")
    recipe = ["optimizer.name=sgd", "optimizer.lr=0.01", "ema_decay=0"]
    subprocess.run(
        command(dataset, tmp_path / "one", tmp_path / "plan.yaml", *recipe), check=True, capture_output=True
    )
    two = command(dataset, tmp_path / "two", tmp_path / "plan.yaml", *recipe)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *two[1:]], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-4)


def test_labels_with_sides_switch_off_mirroring_on_that_axis(
    dataset: Path, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sided = plan.replace(labels={"entries": {"background": 0, "kidney_left": 1}})
    bundle = fit(dataset, tmp_path, sided, overrides=[*QUICK, "epochs=1", "augment.mirror=auto"])
    assert load_bundle(bundle).mirror_axes == (0, 1)  # network axes are k, j, i, and i runs left-right
    assert "kidney_left" in caplog.text and "not mirrored" in caplog.text


def test_fine_tuning_starts_from_the_other_bundle(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    first = fit(dataset, tmp_path / "first", plan, overrides=QUICK)
    still = [
        *QUICK,
        "epochs=1",
        "steps_per_epoch=1",
        "optimizer.lr=1e-12",
        "ema_decay=0",
        "optimizer.weight_decay=0",
    ]
    fit(dataset, tmp_path / "second", plan, overrides=still, pretrained=first, fold=1)
    tuned = weights(tmp_path / "second", "1")
    assert same(weights(tmp_path / "first"), tuned, tolerance=1e-6)


def test_folds_share_a_bundle_and_select_judges_them(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    from medseg.train.select import select

    for run in ("a", "b"):
        for fold in (0, 1):
            fit(dataset, tmp_path / run, plan, overrides=[*QUICK, f"seed={len(run) + fold}"], fold=fold)
    assert load_bundle(tmp_path / "a").folds == ("0", "1")
    looked = select([tmp_path / "a", tmp_path / "b"], dataset, store=False)
    assert load_bundle(tmp_path / "a").postprocessing is None
    chosen = select([tmp_path / "a", tmp_path / "b"], dataset)
    assert looked == chosen
    assert len(chosen.scores) == 3 and chosen.best in chosen.scores
    assert chosen.scores[chosen.best] == max(chosen.scores.values())
    assert load_bundle(chosen.runs[0]).postprocessing == chosen.postprocessing
    again = select([tmp_path / "a", tmp_path / "b"], dataset)  # what was stored does not change the scores
    assert again.scores == chosen.scores


def test_a_cascade_trains_on_what_the_first_stage_predicted(
    dataset: Path, plan: Plan, tmp_path: Path
) -> None:
    settings = plan.configuration("3d_fullres").to_dict()
    cascade = plan.replace(
        configurations={
            "3d_lowres": {**settings, "next_stage": "3d_cascade_fullres"},
            "3d_fullres": settings,
            "3d_cascade_fullres": {**settings, "previous_stage": "3d_lowres"},
        }
    )
    quick = [*QUICK, "epochs=1"]
    with pytest.raises(ConfigError, match="--previous"):
        fit(dataset, tmp_path / "none", cascade, configuration="3d_cascade_fullres", overrides=quick)
    fit(dataset, tmp_path / "low", cascade, configuration="3d_lowres", fold="all", overrides=quick)
    bundle = fit(
        dataset,
        tmp_path / "full",
        cascade,
        configuration="3d_cascade_fullres",
        overrides=quick,
        previous=tmp_path / "low",
    )
    assert load_bundle(bundle).previous is not None
    assert len(list((tmp_path / "full" / "fold_0" / "validation").glob("*.nii.gz"))) == 2


def test_a_time_limit_holds(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    started = time.monotonic()
    fit(dataset, tmp_path, plan, overrides=[*QUICK, "epochs=100000"], max_minutes=0.1)
    assert time.monotonic() - started < 40  # 6 s of training; the rest is start-up and a busy machine


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"configuration": "4d"}, PlanError, "no configuration '4d'"),
        ({"fold": 17, "overrides": ["epoch=3"]}, ConfigError, "did you mean 'epochs'"),
        ({"recipe": "fast"}, ConfigError, "expected nnunet, cpu"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    dataset: Path, plan: Plan, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(dataset, tmp_path / "run", plan, **changes)
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_labels_is_one_clear_error(tmp_path: Path, plan: Plan) -> None:
    write(noise(GEOMETRIES["straight"]), tmp_path / "images" / "a.nii.gz")
    with pytest.raises(DataError):
        fit(tmp_path, tmp_path / "run", plan)
    assert not (tmp_path / "run").exists()


def test_another_plan_in_the_same_folder_is_refused(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    fit(dataset, tmp_path, plan, overrides=[*QUICK, "epochs=1"])
    with pytest.raises(TrainingError, match="another plan"):
        fit(dataset, tmp_path, plan.replace(plans_name="other"), fold=1, overrides=QUICK)
    with pytest.raises(TrainingError, match="already trained"):
        fit(dataset, tmp_path, plan, overrides=QUICK)
    before = (tmp_path / "bundle" / "bundle.yaml").read_bytes()
    fit(dataset, tmp_path, plan, overrides=QUICK, resume=True)  # nothing is left to do
    assert (tmp_path / "bundle" / "bundle.yaml").read_bytes() == before


def test_a_plan_for_other_data_is_refused_before_anything_is_written(
    dataset: Path, plan: Plan, tmp_path: Path
) -> None:
    two = plan.replace(
        channels=("CT", "PET"),
        configurations={
            "3d_fullres": {
                **plan.configuration("3d_fullres").to_dict(),
                "normalization": ("ct", "zscore"),
                "use_mask_for_norm": (False, False),
            }
        },
        intensity={key: next(iter(plan.intensity.values())).to_dict() for key in ("0", "1")},
    )
    with pytest.raises(PlanError, match="2 channels"):
        fit(dataset, tmp_path / "run", two)
    with pytest.raises(ConfigError, match="Leave one out"):
        fit(dataset, tmp_path / "run", plan, preset="cpu")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_not_trained_in_twice_and_stop_finds_it(
    dataset: Path, plan: Plan, tmp_path: Path
) -> None:
    from medseg.cli.train import stop

    with pytest.raises(TrainingError, match="no training is at work"):
        stop(tmp_path)
    with claimed(tmp_path / "fold_0"):
        stop(tmp_path)
        assert (tmp_path / "fold_0" / "STOP").exists()
        with pytest.raises(TrainingError, match="another training"):
            fit(dataset, tmp_path, plan, overrides=QUICK)


def test_two_dimensional_training_on_volumes(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    settings = plan.configuration("3d_fullres").to_dict()
    flat = {
        "network": "unet",
        "features_per_stage": (4, 8),
        "strides": ((1, 1), (2, 2)),
        "kernel_sizes": ((3, 3), (3, 3)),
        "blocks_per_stage": (1, 1),
        "decoder_convs_per_stage": (1,),
    }
    two = {key: settings[key][1:] for key in ("spacing", "median_shape")}
    sliced = {**settings, **two, "patch_size": (16, 16), "architecture": flat}
    planned = plan.replace(configurations={"2d": sliced})
    bundle = fit(dataset, tmp_path, planned, overrides=[*QUICK, "augment.mirror=auto"])
    assert load_bundle(bundle).mirror_axes == (0, 1)
    assert len(list((tmp_path / "fold_0" / "validation").glob("*.nii.gz"))) == 2


def test_a_dry_run_writes_nothing(dataset: Path, plan: Plan, tmp_path: Path) -> None:
    facts = describe(dataset, tmp_path / "run", plan=plan, overrides=QUICK)
    assert facts["steps"] == 12 and facts["train"] == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("network", ["resenc-unet", "segresnet", "swin-unetr"])
def test_every_network_trains(dataset: Path, plan: Plan, tmp_path: Path, network: str) -> None:
    wide = {"features_per_stage": (12, 24), "strides": ((1, 1, 1), (2, 2, 2))}
    if network == "swin-unetr":
        wide = {
            "features_per_stage": (12, 24, 48, 96, 192, 192),
            "strides": ((1, 1, 1), *[(2, 2, 2)] * 5),
            "kernel_sizes": ((3, 3, 3),) * 6,
            "blocks_per_stage": (1,) * 6,
            "decoder_convs_per_stage": (1,) * 5,
        }
    settings = plan.configuration("3d_fullres")
    base = settings.architecture.to_dict()
    architecture = Architecture.from_dict({**base, **wide, "network": network})
    patch = (64, 32, 32) if network == "swin-unetr" else settings.patch_size
    changed = settings.replace(architecture=architecture.to_dict(), patch_size=patch)
    own = plan.replace(configurations={"3d_fullres": changed.to_dict()})
    overrides = [*QUICK, "epochs=1", "steps_per_epoch=1", "loss.deep_supervision=true"]
    fit(dataset, tmp_path, own, overrides=overrides)
    assert (tmp_path / "bundle" / "weights" / "fold_0.safetensors").exists()
