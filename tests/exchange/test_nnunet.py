"""nnU-Net's folders and zips come in as they are, and go out so that nothing of them changes."""

import json
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.bundle import Bundle, load_bundle, write_bundle
from medseg.errors import BundleError, ConfigError, MedsegError, PlanError
from medseg.exchange import EXPORTERS, load_model
from medseg.exchange.checkpoint import ALLOWED
from medseg.exchange.nnunet import is_nnunet_model, load_nnunet, with_aliases
from tests.infer.models import tiny_bundle, tiny_plan

from . import zoo
from .nnunet_models import (
    CASCADE,
    DATASET,
    FULLRES,
    LOWRES,
    REGIONS,
    as_old_format,
    checkpoint,
    plans,
    random_weights,
    write_model,
)

TRAINER = "nnUNetTrainer__nnUNetPlans__"


def zipped(folder, target, root=None):
    """Pack a folder as nnU-Net's exporter does: deflated, names relative to the results folder."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(root or folder).as_posix())
    return target


def same(state, expected):
    return set(state) == set(expected) and all(torch.equal(state[k], expected[k]) for k in expected)


def own(weights):
    return {k: v for k, v in weights.items() if ".all_modules." not in k and not k.startswith("decoder.enc")}


def read_raw(path):
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, weights_only=True)


def dataset_folder(tmp_path, names=(FULLRES,), **settings):
    for name in names:
        write_model(tmp_path / "Dataset900_Phantom" / f"{TRAINER}{name}", name=name, **settings)
    return tmp_path / "Dataset900_Phantom"


# --- in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model", "dataset", "results", "zip", "zip of the model", "in the zip"])
def test_a_model_is_found_wherever_nnunet_leaves_it(tmp_path, place):
    results = tmp_path / "results"
    dataset = dataset_folder(results, folds=(0, 1))
    model = dataset / f"{TRAINER}{FULLRES}"
    path = {
        "model": lambda: model,
        "dataset": lambda: dataset,
        "results": lambda: results,
        "zip": lambda: zipped(dataset, tmp_path / "export.zip", results),
        "zip of the model": lambda: zipped(model, tmp_path / "model.zip"),
        "in the zip": lambda: zipped(dataset, tmp_path / "export.zip", results) / FULLRES,
    }[place]()
    assert is_nnunet_model(path)
    bundle = load_model(path)
    assert isinstance(bundle, Bundle)
    assert bundle.configuration == FULLRES and bundle.folds == ("0", "1")
    assert bundle.mirror_axes == (0, 1, 2) and bundle.card["trainer"] == "nnUNetTrainer"
    for seed, fold in enumerate(bundle.folds):
        expected = own(random_weights(plans(), DATASET, FULLRES, seed))
        assert same(bundle.state_dict(fold), expected)
        bundle.network(fold)
    assert bundle.digest == load_nnunet(model).digest


def test_the_digest_changes_with_every_file_that_decides(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1))
    digests = {load_nnunet(model).digest}
    description = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**description, "numTraining": 3}))
    digests.add(load_nnunet(model).digest)
    torch.save(
        checkpoint(random_weights(plans(), DATASET, FULLRES, 9)), model / "fold_1/checkpoint_final.pth"
    )
    digests.add(load_nnunet(model).digest)
    shutil.rmtree(model / "fold_0")
    digests.add(load_nnunet(model).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("axes", "expected"), [((0, 1, 2), (0, 1, 2)), ([0, 2], (0, 2)), (None, ()), ((), ())]
)
def test_mirroring_is_what_the_checkpoint_allows(tmp_path, axes, expected):
    assert load_nnunet(write_model(tmp_path / "m", mirror_axes=axes)).mirror_axes == expected


def test_a_checkpoint_from_before_mirroring_was_saved_is_not_mirrored(tmp_path):
    model = write_model(tmp_path / "model")
    content = checkpoint(random_weights(plans(), DATASET, FULLRES))
    del content["inference_allowed_mirroring_axes"]
    torch.save(content, model / "fold_0/checkpoint_final.pth")
    assert load_nnunet(model).mirror_axes == ()


@pytest.mark.parametrize("network", ["plain", "resenc"])
def test_plans_of_every_age_load_the_same_weights(tmp_path, network):
    new = plans(network=network)
    moved = json.loads(json.dumps(new).replace("architectures.unet.Res", "architectures.residual_unet.Res"))
    weights = [
        load_nnunet(write_model(tmp_path / name, content)).state_dict("0")
        for name, content in {"new": new, "moved": moved, "old": as_old_format(new)}.items()
    ]
    assert same(weights[1], weights[0]) and same(weights[2], weights[0])


def test_what_nnunet_2_0_called_modality_is_understood(tmp_path):
    content = plans()
    content["foreground_intensity_properties_by_modality"] = content.pop(
        "foreground_intensity_properties_per_channel"
    )
    dataset = {**DATASET, "modality": DATASET["channel_names"], "reference": "x", "licence": "y"}
    del dataset["channel_names"]
    bundle = load_nnunet(write_model(tmp_path / "m", as_old_format(content), dataset))
    assert bundle.plan.channels == ("T1",) and bundle.plan.intensity["0"].mean == 1


def test_a_model_like_totalsegmentators_loads(tmp_path):
    dataset = {
        **DATASET,
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{f"organ_{n}": n for n in range(1, 118)}},
        "description": "",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    folder = tmp_path / "Dataset291" / "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
    trainer = "nnUNetTrainer_4000epochs_NoMirroring"
    bundle = load_model(write_model(folder, dataset=dataset, trainer=trainer, mirror_axes=None).parent)
    assert bundle.labels.n_outputs == 118 and bundle.mirror_axes == ()
    assert bundle.card["trainer"] == trainer and bundle.card["epochs"] == 1000


def test_regions_and_ignore_label_are_kept(tmp_path):
    bundle = load_nnunet(write_model(tmp_path / "m", dataset=REGIONS))
    assert bundle.labels.has_regions and bundle.labels.ignore == 3 and bundle.labels.n_outputs == 2


def test_a_variant_that_medseg_cannot_do_does_not_stop_the_others(tmp_path):
    content = plans()
    content["configurations"]["3d_torchres"] = {
        "inherits_from": FULLRES,
        "resampling_fn_data": "resample_torch_fornnunet",
    }
    content["configurations"]["3d_small_batch"] = {"inherits_from": FULLRES, "batch_size": 1}
    bundle = load_nnunet(write_model(tmp_path / "m", content))
    assert set(bundle.plan.configurations) == {LOWRES, FULLRES, CASCADE, "3d_small_batch"}
    assert load_nnunet(write_model(tmp_path / "n", content, name="3d_small_batch")).settings.batch_size == 1
    file = tmp_path / "n" / "fold_0" / "checkpoint_final.pth"
    torch.save(checkpoint(random_weights(content, DATASET, FULLRES), "3d_torchres"), file)
    with pytest.raises(BundleError, match="resample_torch_fornnunet"):
        load_nnunet(tmp_path / "n")


def test_a_trainer_that_nobody_knows_is_named_in_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_nnunet(write_model(tmp_path / "known", trainer="nnUNetTrainer_250epochs", folds=(0, 1)))
        assert not caplog.records
        load_nnunet(write_model(tmp_path / "own", trainer="My\nTrainer", folds=(0, 1)))
    (record,) = caplog.records
    assert "was trained by My Trainer" in record.message and "only its weights" in record.message


def test_a_checkpoint_of_what_has_none_is_refused_with_what_to_do(tmp_path):
    write_bundle(tmp_path / "a.medseg", tiny_bundle())
    zoo.write_bundle(tmp_path / "spleen", "spleen")
    for name in ("a.medseg", "spleen"):
        with pytest.raises(ConfigError, match=r"no model of nnU-Net.*Leave out --checkpoint\.$"):
            load_model(tmp_path / name, checkpoint="best")
    assert load_model(write_model(tmp_path / "m", file="best"), checkpoint="best").folds == ("0",)


def test_fold_all_counts_only_where_there_is_no_other(tmp_path):
    assert load_nnunet(write_model(tmp_path / "a", folds=("all",))).folds == ("all",)
    assert load_nnunet(write_model(tmp_path / "b", folds=("all", 2, 0))).folds == ("0", "2")


def test_the_final_checkpoint_is_preferred_and_the_best_named(tmp_path, caplog):
    model = write_model(tmp_path / "m", file="best")
    with caplog.at_level(logging.WARNING):
        assert load_nnunet(model).card["checkpoint"] == "checkpoint_best.pth"
    assert "no checkpoint_final.pth, so checkpoint_best.pth is used" in caplog.text
    shutil.copy(model / "fold_0/checkpoint_best.pth", model / "fold_0/checkpoint_final.pth")
    assert load_nnunet(model).card["checkpoint"] == "checkpoint_final.pth"
    assert load_nnunet(model, checkpoint="best").card["checkpoint"] == "checkpoint_best.pth"
    assert load_nnunet(model, checkpoint="checkpoint_best.pth").card["checkpoint"] == "checkpoint_best.pth"
    with pytest.raises(BundleError, match="no checkpoint_latest"):
        load_nnunet(model, checkpoint="latest")
    with pytest.raises(BundleError, match="final, best, latest"):
        load_nnunet(model, checkpoint="../evil")


def test_a_fold_without_the_checkpoint_is_left_out_and_named(tmp_path, caplog):
    model = write_model(tmp_path / "m", folds=(0, 1))
    (model / "fold_1/checkpoint_final.pth").rename(model / "fold_1/checkpoint_best.pth")
    with caplog.at_level(logging.WARNING):
        assert load_nnunet(model).folds == ("0",)
    assert "no checkpoint_final.pth in fold 1" in caplog.text


def test_the_prefix_of_a_wrapped_network_is_dropped(tmp_path):
    model = write_model(tmp_path / "m")
    weights = random_weights(plans(), DATASET, FULLRES)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        content = checkpoint({prefix + name: value for name, value in weights.items()})
        torch.save(content, model / "fold_0/checkpoint_final.pth")
        assert same(load_nnunet(model).state_dict("0"), own(weights))


def test_a_checkpoint_in_torchs_old_format_loads(tmp_path):
    model = write_model(tmp_path / "m")
    weights = random_weights(plans(), DATASET, FULLRES)
    file = model / "fold_0/checkpoint_final.pth"
    torch.save(checkpoint(weights), file, _use_new_zipfile_serialization=False)
    assert same(load_nnunet(model).state_dict("0"), own(weights))
    assert same(load_nnunet(zipped(model, tmp_path / "m.zip")).state_dict("0"), own(weights))


def test_a_checkpoint_that_another_tool_packed_again_loads(tmp_path):
    model = write_model(tmp_path / "m")
    file = model / "fold_0/checkpoint_final.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert same(load_nnunet(model).state_dict("0"), own(random_weights(plans(), DATASET, FULLRES)))


def test_numbers_of_numpys_old_module_are_read(tmp_path):
    model = write_model(tmp_path / "m")
    file = model / "fold_0/checkpoint_final.pth"
    rewrite_pickle(file, lambda content: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_nnunet(model).card["epochs"] == 1000


def rewrite_pickle(file, change):
    """Change the pickle inside a checkpoint."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    changed = change(members[name])
    assert changed != members[name]
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in {**members, name: changed}.items():
            archive.writestr(member, content)


def test_post_processing_is_named_and_not_applied(tmp_path):
    model = write_model(tmp_path / "m")
    place = model / "crossval_results_folds_0_1_2_3_4"
    place.mkdir()
    (place / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (place / "postprocessing.json").write_text("{}")
    bundle = load_nnunet(model)
    assert bundle.postprocessing is None
    assert "postprocessing.json" in bundle.card["note"] and "--postprocessing" in bundle.card["note"]


# --- choice, cascade --------------------------------------------------------------------------------------


def test_several_models_are_listed_with_the_paths_to_choose_by(tmp_path):
    dataset = dataset_folder(tmp_path, (LOWRES, FULLRES))
    with pytest.raises(BundleError, match="2 models") as caught:
        load_model(dataset)
    for name in (LOWRES, FULLRES):
        assert str(dataset / f"{TRAINER}{name}") in str(caught.value)
    archive = zipped(dataset, tmp_path / "export.zip", tmp_path)
    with pytest.raises(BundleError, match="2 models") as caught:
        load_model(archive)
    for name in (LOWRES, FULLRES):
        assert str(archive / name) in str(caught.value)
        assert load_model(archive / name).configuration == name


@pytest.mark.parametrize("packed", [False, True])
def test_a_cascade_is_one_model_with_its_first_stage(tmp_path, packed):
    dataset = dataset_folder(tmp_path, (LOWRES, CASCADE))
    path = zipped(dataset, tmp_path / "export.zip", tmp_path) if packed else dataset
    bundle = load_model(path)
    assert bundle.configuration == CASCADE and bundle.in_channels == 3
    assert bundle.previous.configuration == LOWRES and bundle.previous.in_channels == 1
    bundle.network("0")


def test_a_first_stage_beside_is_known_by_what_it_is_not_by_its_name(tmp_path):
    write_model(tmp_path / "model", name=CASCADE)
    write_model(tmp_path / "model_lowres", name=LOWRES)
    write_model(tmp_path / "another", name=FULLRES)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plans.json").write_text("{")
    write_model(tmp_path / "of other labels", name=LOWRES, dataset=REGIONS)
    assert load_model(tmp_path / "model").previous.configuration == LOWRES


def test_two_possible_first_stages_must_be_chosen_from(tmp_path):
    model = write_model(tmp_path / "model", name=CASCADE)
    for name in ("a", "b"):
        write_model(tmp_path / name, name=LOWRES)
    with pytest.raises(BundleError, match="--previous MODEL"):
        load_model(model)
    assert load_model(model, previous=tmp_path / "b").previous.path == tmp_path / "b"


def test_a_cascade_without_first_stage_loads_and_takes_one_that_is_given(tmp_path):
    alone = write_model(tmp_path / "here" / "model", name=CASCADE)
    first = write_model(tmp_path / "there" / "model", name=LOWRES)
    assert load_model(alone).previous is None
    assert load_model(alone, previous=first).previous.configuration == LOWRES
    write_bundle(tmp_path / "alone.medseg", load_model(alone))
    write_bundle(tmp_path / "first.medseg", load_model(first))
    both = load_model(tmp_path / "alone.medseg", previous=tmp_path / "first.medseg")
    assert both.previous.configuration == LOWRES


def test_a_first_stage_that_is_of_no_use_is_refused(tmp_path):
    cascade = write_model(tmp_path / "a" / "model", name=CASCADE)
    full = write_model(tmp_path / "b" / "model")
    other = write_model(tmp_path / "c" / "model", name=LOWRES, dataset=REGIONS)
    with pytest.raises(BundleError, match="no cascade"):
        load_model(full, previous=cascade)
    with pytest.raises(BundleError, match="other labels"):
        load_model(cascade, previous=other)


# --- out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["plain", "resenc"])
def test_what_goes_out_is_what_came_in(tmp_path, network):
    content = plans(network=network)
    model = write_model(tmp_path / "model", content, REGIONS, folds=(0, 3), mirror_axes=(0, 2))
    bundle = load_model(model)
    EXPORTERS["nnunet"](bundle, tmp_path / "out", None)
    again = load_model(tmp_path / "out")
    assert again.plan == bundle.plan and again.mirror_axes == (0, 2) and again.folds == ("0", "3")
    for fold in again.folds:
        theirs, ours = (read_raw(m / f"fold_{fold}/checkpoint_final.pth") for m in (model, tmp_path / "out"))
        assert list(ours["network_weights"]) == list(theirs["network_weights"])
        assert same(ours["network_weights"], theirs["network_weights"])
        assert ours["inference_allowed_mirroring_axes"] == (0, 2)
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["labels"] == REGIONS["labels"] and written["channel_names"] == REGIONS["channel_names"]
    assert written["regions_class_order"] == [1, 2] and written["file_ending"] == ".nii.gz"


def test_aliases_are_those_of_nnunets_network_in_its_order(golden_dir):
    for name in ("a_hippocampus", "h_2d_aniso_ct", "i_resenc_hippocampus"):
        model = golden_dir / "inference" / name / "model"
        theirs = read_raw(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
        ours = with_aliases(load_nnunet(model).state_dict("0"))
        assert list(ours) == list(theirs) and same(ours, theirs)


def test_nothing_may_be_mirrored_is_none_for_nnunet(tmp_path):
    EXPORTERS["nnunet"](load_model(write_model(tmp_path / "m", mirror_axes=None)), tmp_path / "out", None)
    content = read_raw(tmp_path / "out" / "fold_0" / "checkpoint_final.pth")
    assert content["inference_allowed_mirroring_axes"] is None  # nnU-Net fails on an empty tuple


def test_one_fold_goes_out_alone(tmp_path):
    bundle = load_model(write_model(tmp_path / "m", folds=(0, 1)))
    EXPORTERS["nnunet"](bundle, tmp_path / "out", "1")
    assert load_model(tmp_path / "out").folds == ("1",)


def test_folds_that_nnunet_would_not_find_are_numbered(tmp_path):
    bundle = tiny_bundle(folds=2)
    named = Bundle(bundle.plan, bundle.configuration, {"a": bundle.weights["0"], "all": bundle.weights["1"]})
    EXPORTERS["nnunet"](named, tmp_path / "out", None)
    assert sorted(p.name for p in (tmp_path / "out").glob("fold_*")) == ["fold_0", "fold_1"]


@pytest.mark.parametrize(
    ("name", "first"), [("out", f"out_{LOWRES}"), (f"{TRAINER}{CASCADE}", f"{TRAINER}{LOWRES}")]
)
def test_a_cascade_goes_out_with_its_first_stage_beside(tmp_path, name, first):
    bundle = load_model(dataset_folder(tmp_path / "in", (LOWRES, CASCADE)))
    EXPORTERS["nnunet"](bundle, tmp_path / "there" / name, None)
    assert {p.name for p in (tmp_path / "there").iterdir()} == {name, first}
    again = load_model(tmp_path / "there" / name)
    assert again.previous.configuration == LOWRES


def test_a_network_that_nnunet_does_not_have_stays_here(tmp_path):
    plan = tiny_plan()
    settings = plan.configurations[FULLRES]
    changed = settings.replace(architecture=settings.architecture.replace(network="segresnet"))
    bundle = Bundle(plan.replace(configurations={FULLRES: changed}), FULLRES, {})
    with pytest.raises(PlanError, match="does not exist in nnU-Net"):
        EXPORTERS["nnunet"](bundle, tmp_path / "out", None)
    assert not list(tmp_path.iterdir())


def test_an_imported_model_is_a_bundle_like_any_other(tmp_path):
    model = load_model(write_model(tmp_path / "m", folds=(0, 1)))
    write_bundle(tmp_path / "bundle", model)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.plan == model.plan and bundle.folds == model.folds
    assert all(same(bundle.state_dict(fold), model.state_dict(fold)) for fold in bundle.folds)


# --- what is refused --------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class System(Evil):
    def __reduce__(self):
        import os

        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", [Evil, System])
@pytest.mark.parametrize("place", ["optimizer_state", "network_weights", "init_args", "stranger"])
@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_poisoned_checkpoint_is_refused_by_name_and_runs_nothing(tmp_path, kind, place, old_format, packed):
    model = write_model(tmp_path / "model")
    poison, file = kind(tmp_path / "executed"), model / "fold_0/checkpoint_final.pth"
    content = {**checkpoint(random_weights(plans(), DATASET, FULLRES)), place: poison}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    path = zipped(model, tmp_path / "model.zip") if packed else model
    before = sorted(tmp_path.rglob("*"))
    named = "pathlib.Path.touch|builtins.getattr|getattr" if kind is Evil else "posix.system|nt.system"
    with pytest.raises(BundleError, match=named) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and "Nothing was run" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def damaged(tmp_path, change):
    model = write_model(tmp_path / "model")
    change(model, model / "fold_0/checkpoint_final.pth")
    return model


def save(file, **changes):
    weights = changes.pop("weights", None) or random_weights(plans(), DATASET, FULLRES)
    torch.save({**checkpoint(weights), **changes}, file)


def changed_weights(**changes):
    weights = random_weights(plans(), DATASET, FULLRES)
    for name, value in changes.items():
        weights[name.replace("__", ".")] = value
    return weights


HEAD = "decoder.seg_layers.0.weight"
FIRST = "encoder.stages.0.0.convs.0.conv.weight"


def cut_old_format(file):
    weights = random_weights(plans(), DATASET, FULLRES)
    torch.save(checkpoint(weights), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-5000])


def edit(model, name, **changes):
    file = model / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, f: f.write_bytes(b""), "is empty"),
        (lambda m, f: f.write_bytes(f.read_bytes()[:5000]), r"is cut off or damaged\. Copy it again\.$"),
        (lambda m, f: f.write_bytes(f.read_bytes()[:-9]), r"is cut off or damaged\. Copy it again\.$"),
        (lambda m, f: f.write_bytes(b"PK\x03\x04" + bytes(500)), r"is cut off or damaged\. Copy it again\.$"),
        (lambda m, f: cut_old_format(f), r"is cut off or damaged\. Copy it again\.$"),
        (lambda m, f: f.write_text("hello"), "is no checkpoint, or damaged from its beginning. Pass"),
        (lambda m, f: f.write_text("root:x:0:0:root:/root:/bin/bash\n" * 9), "is no checkpoint, or damaged"),
        (lambda m, f: f.write_bytes(pickle.dumps({"a": [1, 2]}, 4)), "is a pickle of something else"),
        (lambda m, f: f.write_bytes(pickle.dumps({"a": [1, 2]}, 2)), "is a pickle of something else"),
        (lambda m, f: torch.save([1, 2], f), "no network_weights"),
        (lambda m, f: torch.save({"state_dict": {}}, f), "version 1"),
        (lambda m, f: torch.save({"network_weights": {}}, f), "trainer_name"),
        (lambda m, f: save(f, init_args={"configuration": 3}), "trainer_name and init_args"),
        (lambda m, f: save(f, weights={FIRST: [1.0]}), "is no tensor"),
        (lambda m, f: save(f, weights={FIRST: torch.ones(2).to_sparse()}), "is no tensor"),
        (lambda m, f: save(f, weights={3: torch.ones(2)}), "weight 3 is no tensor"),
        (lambda m, f: save(f, weights={"a": torch.ones(2)}), "is missing"),
        (lambda m, f: save(f, weights=changed_weights(extra=torch.ones(1))), "not part of that network"),
        (
            lambda m, f: save(f, weights=changed_weights(**{FIRST: torch.full((8, 1, 3, 3, 3), np.nan)})),
            f"{FIRST} holds NaN or infinity, so the training diverged .*Take another checkpoint",
        ),
        (
            lambda m, f: save(f, weights=changed_weights(**{HEAD: torch.ones(5, 8, 1, 1, 1)})),
            "5 outputs, dataset.json has labels for 3",
        ),
        (
            lambda m, f: save(f, weights=changed_weights(**{FIRST: torch.ones(8, 2, 3, 3, 3)})),
            "takes 2 channels, plan and dataset.json say 1",
        ),
        (
            lambda m, f: save(
                f,
                weights=changed_weights(**{"encoder.stages.0.0.convs.0.norm.running_mean": torch.ones(8)}),
                trainer_name="nnUNetTrainerBN",
            ),
            "nnUNetTrainerBN.*batch norm",
        ),
        (lambda m, f: save(f, inference_allowed_mirroring_axes=(0, 7)), "mirroring_axes"),
        (lambda m, f: save(f, inference_allowed_mirroring_axes="xyz"), "mirroring_axes"),
        (lambda m, f: save(f, init_args={"configuration": "4d"}), "'4d'"),
        (lambda m, f: shutil.rmtree(m / "fold_0"), "no trained fold"),
        (lambda m, f: f.rename(f.with_name("weights.pth")), "no trained fold"),
        (lambda m, f: (m / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda m, f: (m / "plans.json").write_text("{"), "plans.json is not readable"),
        (lambda m, f: (m / "plans.json").write_text("[" * 100_000), "plans.json is not readable"),
        (lambda m, f: (m / "plans.json").write_text("[]"), "expected a mapping"),
        (lambda m, f: (m / "plans.json").write_text("{}"), "missing"),
        (lambda m, f: (m / "plans.json").write_bytes(b" " * 40_000_000), "40000000 bytes"),
        (
            lambda m, f: edit(m, "dataset.json", labels={"background": 0, "organ": 1}),
            "3 outputs, dataset.json has labels for 2",
        ),
        (
            lambda m, f: edit(m, "dataset.json", channel_names={"0": "T1", "1": "T2"}),
            "1 normalizations for 2 channels",
        ),
        (lambda m, f: edit(m, "plans.json", **plans(strides=(1, 2, 2))), "does not fit"),
        (lambda m, f: edit(m, "plans.json", **plans(network="resenc")), "does not fit the resenc-unet"),
        (lambda m, f: edit(m, "plans.json", label_manager="MyLabelManager"), "MyLabelManager"),
    ],
)
def test_what_is_damaged_or_does_not_fit_is_one_sentence_at_once(tmp_path, change, says):
    model = damaged(tmp_path, change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=says) as caught:
        load_nnunet(model)
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "holds NaN" not in str(caught.value) or "plans.json" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_fold_is_checked_before_anything_is_predicted(tmp_path):
    model = write_model(tmp_path / "m", folds=(0, 1))
    save(model / "fold_1/checkpoint_final.pth", weights={"a": torch.ones(1)})
    with pytest.raises(BundleError, match="fold 1"):
        load_nnunet(model)


def test_folds_of_two_configurations_are_refused(tmp_path):
    model = write_model(tmp_path / "m", folds=(0, 1))
    weights = random_weights(plans(), DATASET, LOWRES)
    torch.save(checkpoint(weights, LOWRES), model / "fold_1/checkpoint_final.pth")
    with pytest.raises(BundleError, match="fold 1 is a 3d_lowres model"):
        load_nnunet(model)


def test_a_tensor_that_stands_for_more_memory_than_there_is_does_not_get_it(tmp_path):
    model = write_model(tmp_path / "m")
    giant = torch.ones(1).expand(8, 10**6, 10**6, 3, 3)  # saved as one number with strides of 0
    save(model / "fold_0/checkpoint_final.pth", weights=changed_weights(**{FIRST: giant}))
    with pytest.raises(BundleError, match=r"expected 8 x 1 x 3"):
        load_nnunet(model)


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", "a/../../evil", "C:\\evil", "fold_0\\..\\evil"])
def test_a_zip_with_a_member_that_points_outside_is_refused(tmp_path, name):
    archive = zipped(write_model(tmp_path / "model"), tmp_path / "model.zip")
    with zipfile.ZipFile(archive, "a") as content:
        content.writestr(zipfile.ZipInfo(name), "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="outside"):
        load_model(archive)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_with_a_link_is_refused(tmp_path):
    archive = zipped(write_model(tmp_path / "model"), tmp_path / "model.zip")
    with zipfile.ZipFile(archive, "a") as content:
        member = zipfile.ZipInfo("fold_1/checkpoint_final.pth")
        member.external_attr = 0o120777 << 16
        content.writestr(member, "/etc/passwd")
    with pytest.raises(BundleError, match="is a link"):
        load_model(archive)


@pytest.mark.parametrize("name", ["plans.json", "fold_0/checkpoint_final.pth"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, name):
    model = write_model(tmp_path / "model")
    (model / name).write_bytes(bytes(60_000_000))
    with pytest.raises(BundleError, match="60000000 bytes"):
        load_model(zipped(model, tmp_path / "model.zip"))


def test_a_checkpoint_that_is_a_bomb_itself_is_refused(tmp_path):
    model = write_model(tmp_path / "model")
    file = model / "fold_0/checkpoint_final.pth"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint_final/data/999", bytes(200_000_000))
    with pytest.raises(BundleError, match="unpacks from"):
        load_model(model)


def test_an_encrypted_zip_is_refused(tmp_path):
    archive = zipped(write_model(tmp_path / "model"), tmp_path / "model.zip")
    content = bytearray(archive.read_bytes())
    at = content.index(b"PK\x01\x02")
    while at >= 0:  # the flag in every entry of the directory
        content[at + 8] |= 1
        at = content.find(b"PK\x01\x02", at + 4)
    archive.write_bytes(content)
    with pytest.raises(BundleError, match="encrypted"):
        load_model(archive)


def test_strangers_in_a_results_folder_are_never_opened(tmp_path):
    model = write_model(tmp_path / "model")
    (model / "fold_0" / "validation").mkdir()
    for name in ("progress.png", "evil.pkl", "validation/summary.json", "debug.json"):
        (model / "fold_0" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert load_model(zipped(model, tmp_path / "model.zip")).folds == ("0",)
    assert load_model(model).folds == ("0",)


def test_linked_folds_of_ones_own_results_are_followed(tmp_path):
    model = write_model(tmp_path / "model")
    (model / "fold_0").rename(tmp_path / "elsewhere")
    (model / "fold_0").symlink_to(tmp_path / "elsewhere")
    assert load_model(model).folds == ("0",)


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.zip", "fold_0", "checkpoint_final.pth"])
def test_what_is_no_model_is_said_in_one_sentence(tmp_path, name):
    model = write_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("hello")
    path = next((p for p in model.rglob(name)), tmp_path / name)
    with pytest.raises(MedsegError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    if path.is_relative_to(model):
        assert f"Pass {model}" in str(caught.value)
