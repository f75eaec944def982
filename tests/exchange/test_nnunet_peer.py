"""Against nnU-Net itself: cascades, several folds, old plans, fold_all, and models that go back to it.

The models are made and predicted with by nnU-Net 2.8.1 in its own environment (fixture `peer_python`).
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from medseg.bundle import write_bundle
from medseg.exchange import EXPORTERS, load_model
from medseg.infer import Predictor
from medseg.io import list_cases, open_dataset, read, read_image
from medseg.plan import make_plan
from medseg.train import fit

from .nnunet_models import (
    CASCADE,
    DATASET,
    LOWRES,
    REGIONS,
    as_old_format,
    disturb,
    plans,
    write_cases,
    write_descriptions,
)

EQUAL_VOXELS = 0.999
DICE = 0.999
PROBABILITY = 5e-3

PREFIX = "nnUNetTrainer__nnUNetPlans__"
# name: plans, dataset.json, folds, geometry of the images, codes of the axes of the unseen image
VARIANTS = {
    "masked normalisation, two folds, turned to RAS": (
        plans(masked=True) | {"image_reader_writer": "NibabelIOWithReorient"},
        DATASET,
        (0, 1),
        {},
        "PIL",
    ),
    "regions, coarse slices, old plans, fold_all": (
        as_old_format(
            plans(
                (4.0, 1.8, 1.8),
                (4.0, 1.2, 1.2),
                (1, 2, 2),
                (1, 0, 2),
                normalization="CTNormalization",
            )
        ),
        REGIONS,
        ("all",),
        {"shape": (44, 18, 48), "spacing": (1.1, 4.0, 0.9)},
        None,
    ),
}


def run_peer(python, folder, jobs):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("nnunet_peer.py")
    done = subprocess.run([python, script, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=VARIANTS)
def cascade(request, peer_python, tmp_path_factory):
    """Return a folder with both trained stages, images, and nnU-Net's predictions of both."""
    content, dataset, folds, geometry, codes = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("cascade")
    images, labels = write_cases(root / "train", (1, 2), **geometry)
    tests, truth = write_cases(root / "test", (3,), codes, **geometry)
    first = disturb(labels, root / "first_train")
    dirty = disturb(truth, root / "first_dirty", seed=1)
    low = write_descriptions(root / "models" / f"{PREFIX}{LOWRES}", content, dataset)
    high = write_descriptions(root / "models" / f"{PREFIX}{CASCADE}", content, dataset)
    common = {"do": "train", "images": str(images), "labels": str(labels)}
    jobs = [{**common, "folder": str(low), "configuration": LOWRES, "fold": folds[0]}]
    for seed, fold in enumerate(folds):
        jobs.append(
            {**common, "folder": str(high), "configuration": CASCADE, "fold": fold, "seed": seed}
            | {"previous": str(first)}
        )
    use = None if folds != ("all",) else "all"
    for mirror in (False, True):
        common = {"do": "predict", "images": str(tests), "mirror": mirror, "folds": use}
        lowres = str(root / f"lowres_{mirror}")
        jobs.append({**common, "folder": str(low), "out": lowres})
        high_job = {**common, "folder": str(high)}
        jobs.append({**high_job, "out": str(root / f"own_{mirror}"), "previous": lowres})
        jobs.append({**high_job, "out": str(root / f"dirty_{mirror}"), "previous": str(dirty)})
    run_peer(peer_python, root, jobs)
    return root


def assert_same(ours, folder, case, probabilities=None):
    golden = read(folder / f"{case.name}.nii.gz")
    assert ours.geometry.matches(golden.geometry)
    assert ours.array.dtype == golden.array.dtype
    assert len(np.unique(golden.array)) == 3, "the model found nothing, so the comparison is worth nothing"
    assert (ours.array == golden.array).mean() >= EQUAL_VOXELS
    for label in (1, 2):
        a, b = ours.array == label, golden.array == label
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= DICE, f"label {label}"
    if probabilities is not None:
        with np.load(folder / f"{case.name}.npz") as theirs, np.load(probabilities) as mine:
            difference = np.abs(theirs["probabilities"] - mine["probabilities"].astype(np.float32))
        assert difference.max() <= PROBABILITY


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [False, True])
def test_a_cascade_predicts_what_nnunet_predicts(cascade, tmp_path, mirror):
    bundle = load_model(cascade / "models")  # of the two the last stage, with the first beside it
    assert bundle.configuration == CASCADE and bundle.previous.configuration == LOWRES
    case = list_cases(cascade / "test" / "images", 1)[0]
    predictor = Predictor(bundle, mirror=mirror, threads=1, device="cpu")
    volume = read_image(case)
    file = tmp_path / "ours.npz"
    assert_same(predictor.segment(volume, file).volume, cascade / f"own_{mirror}", case, file)
    lowres = Predictor(bundle.previous, mirror=mirror, threads=1, device="cpu")
    assert_same(lowres.segment(volume, file).volume, cascade / f"lowres_{mirror}", case, file)


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [False, True])
def test_a_cascade_takes_any_label_map_as_nnunet_takes_it(cascade, tmp_path, mirror):
    bundle = load_model(cascade / "models" / f"{PREFIX}{CASCADE}")
    case = list_cases(cascade / "test" / "images", 1)[0]
    first = read(cascade / "first_dirty" / f"{case.name}.nii.gz")
    file = tmp_path / "ours.npz"
    predictor = Predictor(bundle, mirror=mirror, threads=1, device="cpu")
    ours = predictor.segment(read_image(case), file, previous=first).volume
    assert_same(ours, cascade / f"dirty_{mirror}", case, file)


GOLDENS = ["b_aniso_ct", "g_region_ignore_two_channel_mr", "h_2d_aniso_ct", "i_resenc_hippocampus"]


@pytest.mark.slow
def test_a_model_that_went_through_medseg_predicts_the_same_in_nnunet(peer_python, golden_dir, tmp_path):
    jobs = []
    for name in GOLDENS:
        folder = golden_dir / "inference" / name
        write_bundle(tmp_path / f"{name}.medseg", load_model(folder / "model"))
        out = tmp_path / name
        EXPORTERS["nnunet"](load_model(tmp_path / f"{name}.medseg"), out, None)
        jobs.append(predict_job(out, folder / "imagesTs", tmp_path / "predicted" / name))
    run_peer(peer_python, tmp_path, jobs)
    for name in GOLDENS:
        for golden in sorted((golden_dir / "inference" / name / "pred_nomirror").glob("*.nii.gz")):
            ours = read(tmp_path / "predicted" / name / golden.name)
            assert np.array_equal(ours.array, read(golden).array), golden


def predict_job(folder, images, out):
    return {"do": "predict", "folder": str(folder), "images": str(images), "out": str(out), "mirror": False}


@pytest.mark.slow
def test_nnunet_predicts_what_medseg_predicts_with_models_that_medseg_trained(peer_python, tmp_path):
    write_cases(tmp_path / "data", range(5))
    images, _ = write_cases(tmp_path / "test", (9,))
    plan = make_plan(open_dataset(tmp_path / "data"), "cpu")
    quick = ["epochs=2", "steps_per_epoch=30", "val_samples=2", "precision=fp32", "threads=1"]
    run = fit(tmp_path / "data", tmp_path / "run", plan, overrides=quick)
    bundle = load_model(run)
    EXPORTERS["nnunet"](bundle, tmp_path / "out", None)
    run_peer(peer_python, tmp_path, [predict_job(tmp_path / "out", images, tmp_path / "predicted")])
    case = list_cases(images, 1)[0]
    predictor = Predictor(bundle, mirror=False, precision="fp32", threads=1, device="cpu")
    assert_same(predictor.segment(read_image(case)).volume, tmp_path / "predicted", case)
