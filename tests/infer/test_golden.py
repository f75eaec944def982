"""Predictions equal nnU-Net 2.8.1's, on its own trained models."""

import numpy as np
import pytest

from medseg.exchange import load_model
from medseg.infer import Predictor
from medseg.io import list_cases, read, read_image
from medseg.preprocess.restore import restore_labels, restore_probabilities

MODELS = [
    "a_hippocampus",
    "b_aniso_ct",
    "g_region_ignore_two_channel_mr",
    "h_2d_aniso_ct",
    "i_resenc_hippocampus",
]
EQUAL_VOXELS = 0.999
DICE = 0.999
PROBABILITY = 5e-3


def assert_same_labels(ours, golden):
    assert ours.array.dtype == golden.array.dtype
    assert ours.geometry.matches(golden.geometry)
    assert (ours.array == golden.array).mean() >= EQUAL_VOXELS
    for label in np.unique(golden.array)[1:]:
        a, b = ours.array == label, golden.array == label
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= DICE, f"label {label}"


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_labels_and_probabilities_equal_nnunets(golden_dir, tmp_path, model, mirror):
    folder = golden_dir / "inference" / model
    bundle = load_model(folder / "model")
    settings, labels = bundle.settings, bundle.labels
    predictor = Predictor(bundle, mirror=mirror, threads=1, device="cpu")
    cases = list_cases(folder / "imagesTs", len(bundle.plan.channels))
    assert len(cases) == 3
    for case in cases[:1] if mirror else cases:  # eight flips take eight times as long
        prepared = predictor.prepare(read_image(case))[0]
        logits = predictor.logits(prepared.data)
        expected = folder / ("pred_mirror" if mirror else "pred_nomirror")
        golden = read(expected / f"{case.name}.nii.gz")
        assert_same_labels(restore_labels(logits, prepared.record, labels, settings), golden)
        saved = expected / f"{case.name}.npz"
        if saved.exists():
            ours = tmp_path / saved.name
            painted = restore_probabilities(logits, prepared.record, labels, settings, ours)
            assert_same_labels(painted, golden)
            with np.load(saved) as theirs, np.load(ours) as mine:
                difference = np.abs(theirs["probabilities"].astype(np.float32) - mine["probabilities"])
            assert difference.max() <= PROBABILITY


@pytest.mark.parametrize("model", ["a_hippocampus", "g_region_ignore_two_channel_mr"])
def test_merged_logits_equal_nnunets_before_they_are_resampled(golden_dir, model):
    folder = golden_dir / "inference" / model
    file = next((folder / "logits").glob("*_mirror.npz"))
    predictor = Predictor(load_model(folder / "model"), mirror=True, threads=1, device="cpu")
    with np.load(file) as golden:
        ours, theirs = predictor.logits(golden["network_input"]), golden["logits"]
    assert ours.dtype == np.float16
    # One unit in the last place of float16 where logits are largest.
    assert np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max() <= np.spacing(
        np.abs(theirs).max()
    )


def test_bf16_finds_the_same_objects(golden_dir):
    folder = golden_dir / "inference" / "a_hippocampus"
    case = list_cases(folder / "imagesTs", 1)[0]
    golden = read(folder / "pred_nomirror" / f"{case.name}.nii.gz").array
    bundle = load_model(folder / "model")
    predictor = Predictor(bundle, mirror=False, precision="bf16", threads=1, device="cpu")
    assert (predictor.segment(read_image(case)).volume.array == golden).mean() > 0.99
