"""Folds, ensembles, cascades, and what a predictor refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from medseg.errors import BundleError, ConfigError
from medseg.geometry.orient import from_ras, to_ras
from medseg.infer import Options, Predictor
from medseg.infer.ensemble import Output, combine
from medseg.infer.predictor import Model
from medseg.labels import LabelSet
from medseg.preprocess import preprocess, preprocess_labels
from medseg.preprocess.restore import restore_labels, restore_probabilities
from medseg.volume import Geometry, Volume
from tests.infer.models import LABELS, image, tiny_bundle
from tests.phantoms import affine

CPU = {"device": "cpu", "threads": 1}


def test_a_segmentation_is_on_the_grid_of_its_image_with_provenance():
    volume = image()
    result = Predictor(tiny_bundle(), **CPU).segment(volume)
    assert result.volume.geometry == volume.geometry
    assert result.volume.array.dtype == np.uint8
    assert len(np.unique(result.volume.array)) > 1
    model = result.provenance["models"][0]
    assert model["configuration"] == "3d_fullres" and model["mirror_axes"] == [0, 1, 2]
    assert model["precision"] == "fp32" and model["folds"] == ["0"]


def test_folds_are_a_float16_sum_divided_by_their_number():
    bundle = tiny_bundle(folds=3)
    data = preprocess(image(), bundle.plan, "3d_fullres").data
    singles = [torch.from_numpy(Predictor(bundle, folds=(k,), **CPU).logits(data).copy()) for k in "012"]
    expected = (singles[0] + singles[1] + singles[2]) / 3
    assert (Predictor(bundle, **CPU).logits(data) == expected.numpy()).all()


def test_networks_are_loaded_once_for_all_cases(monkeypatch):
    bundle = tiny_bundle()
    loads = []
    original = type(bundle).network
    monkeypatch.setattr(
        type(bundle), "network", lambda self, fold: loads.append(fold) or original(self, fold)
    )
    predictor = Predictor(bundle, **CPU)
    assert not loads
    predictor.segment(image())
    predictor.segment(image(seed=1))
    assert loads == ["0"]


def test_mirroring_follows_the_card_unless_asked_for():
    card = {"precision": "fp32", "mirroring": False}
    axes = {
        wanted: Predictor(tiny_bundle(card=card), mirror=wanted, **CPU).models[0].mirror_axes
        for wanted in (None, True, False)
    }
    assert axes == {None: (), True: (0, 1, 2), False: ()}


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize(("codes", "left_right"), [("RAS", 2), ("LPS", 2), ("SRA", 1), ("ASR", 0)])
def test_sided_labels_are_not_mirrored_left_right_however_a_case_lies_unless_trained_so(
    monkeypatch, configuration, codes, left_right
):
    patch = (8, 8, 8) if configuration == "3d_fullres" else (8, 8)
    asked = []
    original = Model.window
    monkeypatch.setattr(
        Model, "window", lambda self, record=None: asked.append(original(self, record)) or asked[-1]
    )
    volume = image(affine=affine(codes))
    as_trained = {"mirroring": "all"}  # nnU-Net's models were trained with all flips
    for name, card in (("kidney_left", None), ("kidney", None), ("kidney_left", as_trained)):
        labels = LabelSet.parse({"background": 0, name: 1})
        Predictor(tiny_bundle(configuration, patch=patch, labels=labels, card=card), **CPU).segment(volume)
    everything = tuple(range(len(patch)))
    kept = tuple(axis for axis in everything if axis != left_right - (3 - len(patch)))
    assert [window.mirror_axes for window in asked] == [kept, everything, everything]


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_a_model_whose_reader_turns_images_to_ras_sees_the_same_image_however_it_lies(codes, tmp_path):
    bundle = tiny_bundle("3d_cascade_fullres", previous=tiny_bundle())
    plan = bundle.plan.replace(reader="NibabelIOWithReorient")
    turning = replace(bundle, plan=plan, previous=replace(bundle.previous, plan=plan))
    straight = image(affine=affine("RAS"))
    expected = Predictor(bundle, mirror=False, **CPU).segment(straight).volume
    lying = from_ras(straight, oblique_grid(straight, codes))
    found = Predictor(turning, mirror=False, **CPU).segment(lying, tmp_path / "p.npz").volume
    assert found.geometry == lying.geometry and len(np.unique(expected.array)) > 1
    assert np.array_equal(to_ras(found).array, expected.array)
    with pytest.raises(BundleError, match="turns images to RAS"):
        Predictor([bundle, turning], **CPU)


def oblique_grid(volume, codes):
    """Return the grid of `volume` with its axes swapped and flipped so that they run to `codes`."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    shape = tuple(np.array(volume.shape)[np.argsort(turn[:, 0])])
    return Geometry(shape, volume.geometry.affine @ inv_ornt_aff(turn, volume.shape))


def test_models_with_different_plans_are_averaged_on_the_source_grid(tmp_path):
    volume = image()
    bundles = [
        tiny_bundle(seed=1),
        tiny_bundle(seed=2, transpose=(2, 0, 1), spacing=(1.3, 0.9, 1.1)),
        tiny_bundle("2d", seed=3, patch=(8, 8)),
    ]
    maps = []
    for number, bundle in enumerate(bundles):
        Predictor(bundle, **CPU).segment(volume, tmp_path / f"{number}.npz")
        with np.load(tmp_path / f"{number}.npz") as file:
            maps.append(file["probabilities"])
    mean = (maps[0] + maps[1] + maps[2]) / 3
    result = Predictor(bundles, **CPU).segment(volume, tmp_path / "mean.npz")
    with np.load(tmp_path / "mean.npz") as file:
        np.testing.assert_allclose(file["probabilities"], mean, atol=1e-6)
    assert (result.volume.array[0] == mean.argmax(0).transpose(2, 1, 0)).mean() > 0.999
    assert result.probabilities == tmp_path / "mean.npz"
    without_file = Predictor(bundles, **CPU).segment(volume)
    assert (without_file.volume.array == result.volume.array).all()


def test_an_ensemble_of_one_model_with_itself_is_that_model(tmp_path):
    bundle = tiny_bundle(labels=LabelSet.parse({"background": 0, "whole": [1, 2], "core": 2}, [1, 2]))
    volume = image()
    alone = Predictor(bundle, **CPU).segment(volume, tmp_path / "p.npz").volume.array
    twice = Predictor([bundle, bundle], **CPU).segment(volume).volume.array
    assert (alone == twice).all()


def test_combining_leaves_the_outside_of_the_crop_background():
    bundle = tiny_bundle()
    case = preprocess(image(), bundle.plan, "3d_fullres")
    logits = np.zeros((3, *case.record.shape), np.float16)
    logits[2] = 5
    outputs = [Output(logits, case.record, bundle.settings)] * 2
    result = combine(outputs, bundle.labels).array[0]
    assert not result[:2].any() and not result[:, -1].any() and (result[2:, :-1] == 2).all()


def test_a_cascade_sees_the_first_stage_as_one_channel_a_label():
    first = tiny_bundle(seed=5, spacing=(2.0, 2.0, 2.0))
    second = tiny_bundle("3d_cascade_fullres", seed=6, previous=first)
    volume = image()
    coarse = Predictor(first, **CPU).segment(volume).volume
    case = preprocess(volume, second.plan, "3d_cascade_fullres")
    labels = preprocess_labels(coarse, case.record, second.settings)[0]
    seen = np.stack([case.data[0], labels == 1, labels == 2]).astype(np.float32)
    predictor = Predictor(second, **CPU)
    expected = restore_labels(predictor.logits(seen), case.record, second.labels, second.settings)
    assert (predictor.segment(volume).volume.array == expected.array).all()
    assert len(np.unique(coarse.array)) > 1


def test_probabilities_and_labels_come_from_the_same_logits(tmp_path):
    bundle, volume = tiny_bundle(), image()
    predictor = Predictor(bundle, **CPU)
    result = predictor.segment(volume, tmp_path / "ours.npz")
    case = predictor.prepare(volume)[0]
    restore_probabilities(
        predictor.logits(case.data), case.record, bundle.labels, bundle.settings, tmp_path / "b.npz"
    )
    with np.load(tmp_path / "ours.npz") as ours, np.load(tmp_path / "b.npz") as theirs:
        assert (ours["probabilities"] == theirs["probabilities"]).all()
        assert (ours["probabilities"].argmax(0).transpose(2, 1, 0) == result.volume.array[0]).all()


def test_post_processing_of_the_bundle_is_applied():
    volume = image((24, 20, 18))
    plain = tiny_bundle()
    steps = {"steps": [{"kind": "keep_largest", "labels": [2]}]}
    chosen = type(plain)(**{**vars(plain), "postprocessing": steps})
    from medseg.postprocess import Postprocessing, apply

    before = Predictor(plain, **CPU).segment(volume).volume
    after = Predictor(chosen, **CPU).segment(volume).volume
    assert (after.array == apply(before, Postprocessing.from_dict(steps)).array).all()
    assert (before.array != after.array).any()


def test_a_cascade_without_its_first_stage_says_how_to_give_it_when_no_label_map_is_given():
    predictor = Predictor(tiny_bundle("3d_cascade_fullres"), **CPU)
    volume = image()
    with pytest.raises(BundleError, match="--previous MODEL"):
        predictor.segment(volume)
    labels = Volume(np.zeros((1, *volume.shape), np.uint8), volume.geometry)
    assert predictor.segment(volume, previous=labels).volume.shape == volume.shape


@pytest.mark.parametrize(
    ("bundles", "says"),
    [
        ([], "no bundle"),
        ([tiny_bundle(), tiny_bundle(labels=LabelSet.parse({"background": 0, "bone": 1}))], "labels"),
        ([tiny_bundle(), tiny_bundle(channels=("T1", "T2"))], "channels"),
        ([tiny_bundle(folds=0)], "no weights"),
        ("a/path", r"a/path: expected a bundle.*medseg\.load_model"),
        ([object()], r"make_predictor\(\[model\]\)"),
    ],
)
def test_models_that_cannot_be_used_together_are_refused(bundles, says):
    with pytest.raises(BundleError, match=says):
        Predictor(bundles, **CPU)


def test_an_unknown_fold_is_refused_with_those_there_are():
    with pytest.raises(BundleError, match="has 0, 1"):
        Predictor(tiny_bundle(folds=2), folds=("7",), **CPU)


def test_a_step_of_zero_is_refused():
    with pytest.raises(ConfigError, match="step"):
        Options(step=0)


def test_weights_of_another_network_are_refused_by_name():
    bundle = tiny_bundle()
    weights = {name: value for name, value in bundle.state_dict("0").items() if "seg_layers" not in name}
    broken = type(bundle)(**{**vars(bundle), "weights": {"0": lambda: weights}})
    with pytest.raises(BundleError, match="seg_layers"):
        broken.network("0")


def test_labels_are_the_ones_that_the_plan_names():
    assert Predictor(tiny_bundle(), **CPU).segment(image()).labels == LabelSet.parse(LABELS)
