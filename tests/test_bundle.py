"""Bundles keep their content, and refuse what is not theirs."""

import json
import os
import shutil
import threading
import zipfile

import pytest
import torch

import medseg
from medseg.bundle import Bundle, load_bundle, save_bundle
from medseg.config import dump_yaml, read_mapping
from medseg.errors import BundleError
from medseg.files import sha256_file
from tests.exchange import zoo
from tests.exchange.nnunet_models import write_model
from tests.infer.models import tiny_bundle, tiny_plan, tiny_weights

CARD = {"dataset": "Dataset901_Tiny", "cases": 12, "precision": "fp32", "recipe": {"lr": 0.01}}
STEPS = {"steps": [{"kind": "keep_largest", "labels": [1]}]}


def save(path, folds=("0",), mirror_axes=(0, 1, 2), **more):
    plan = tiny_plan()
    weights = {fold: tiny_weights(plan, seed=number) for number, fold in enumerate(folds)}
    save_bundle(path, plan, "3d_fullres", weights, mirror_axes, CARD, **more)
    return weights


def rezip(path, change):
    """Write the zip anew; `change` gets {name: bytes} and may edit it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def same_weights(state, expected):
    return set(state) == set(expected) and all(torch.equal(state[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", ["bundle", "model.medseg"])
def test_what_is_saved_is_loaded(tmp_path, name):
    weights = save(tmp_path / name, folds=("0", "1"), postprocessing=STEPS)
    bundle = load_bundle(tmp_path / name)
    assert bundle.plan == tiny_plan() and bundle.configuration == "3d_fullres"
    assert bundle.folds == ("0", "1") and bundle.mirror_axes == (0, 1, 2)
    assert bundle.card == CARD and bundle.postprocessing == STEPS and bundle.previous is None
    assert all(same_weights(bundle.state_dict(fold), weights[fold]) for fold in bundle.folds)
    assert len(bundle.digest) == 64


def test_a_zip_and_a_folder_predict_with_the_same_network(tmp_path):
    save(tmp_path / "bundle")
    save(tmp_path / "model.medseg")
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.inference_mode():
        outputs = [load_bundle(tmp_path / name).network("0")(x) for name in ("bundle", "model.medseg")]
    assert torch.equal(*outputs)


def test_a_zip_holds_exactly_the_files_of_the_folder(tmp_path):
    save(tmp_path / "bundle")
    save(tmp_path / "model.medseg")
    with zipfile.ZipFile(tmp_path / "model.medseg") as archive:
        names = set(archive.namelist())
    files = {str(p.relative_to(tmp_path / "bundle")) for p in (tmp_path / "bundle").rglob("*") if p.is_file()}
    assert names == files == {"bundle.yaml", "plan.yaml", "README.md", "weights/fold_0.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "model.medseg"}


def test_a_folder_packed_by_any_zip_tool_loads(tmp_path):
    weights = save(tmp_path / "bundle")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "bundle")
    os.replace(archive, tmp_path / "packed.medseg")
    assert same_weights(load_bundle(tmp_path / "packed.medseg").state_dict("0"), weights["0"])


def test_a_run_folder_stands_for_the_bundle_inside(tmp_path):
    save(tmp_path / "run" / "bundle")
    assert load_bundle(tmp_path / "run").digest == load_bundle(tmp_path / "run" / "bundle").digest


@pytest.mark.parametrize("name", ["bundle", "model.medseg"])
def test_folds_are_added_and_replaced_one_by_one(tmp_path, name):
    first = save(tmp_path / name, folds=("0", "1"), postprocessing=STEPS)
    again = tiny_weights(tiny_plan(), seed=9)
    save_bundle(tmp_path / name, tiny_plan(), "3d_fullres", {"1": again, "2": again}, (0, 1, 2), CARD)
    bundle = load_bundle(tmp_path / name)
    assert bundle.folds == ("0", "1", "2") and bundle.postprocessing == STEPS
    assert same_weights(bundle.state_dict("0"), first["0"]) and same_weights(bundle.state_dict("1"), again)


def test_an_axis_that_one_fold_was_not_flipped_along_is_not_flipped(tmp_path):
    save(tmp_path / "bundle")
    save(tmp_path / "bundle", folds=("1",), mirror_axes=(0, 2))
    assert load_bundle(tmp_path / "bundle").mirror_axes == (0, 2)


def test_folds_that_finish_together_are_all_kept(tmp_path):
    names = [str(n) for n in range(6)]
    threads = [threading.Thread(target=save, args=(tmp_path / "bundle", (name,))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(load_bundle(tmp_path / "bundle").folds) == names


def test_post_processing_can_be_added_later(tmp_path):
    weights = save(tmp_path / "bundle")
    save_bundle(tmp_path / "bundle", tiny_plan(), "3d_fullres", {}, (0, 1, 2), CARD, postprocessing=STEPS)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.postprocessing == STEPS and same_weights(bundle.state_dict("0"), weights["0"])


@pytest.mark.parametrize("name", ["bundle", "model.medseg"])
def test_a_cascade_carries_its_first_stage(tmp_path, name):
    first = tiny_bundle(seed=3)
    weights = {"0": tiny_weights(tiny_plan(), "3d_cascade_fullres")}
    save_bundle(tmp_path / name, tiny_plan(), "3d_cascade_fullres", weights, (0,), CARD, previous=first)
    bundle = load_bundle(tmp_path / name)
    assert bundle.in_channels == 3
    assert isinstance(bundle.previous, Bundle) and bundle.previous.configuration == "3d_fullres"
    assert same_weights(bundle.previous.state_dict("0"), first.state_dict("0"))


def test_the_card_says_what_the_model_segments(tmp_path):
    save(tmp_path / "bundle")
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "kidney, cyst" in text and "MR" in text and "cases: 12" in text and "medseg predict" in text


def test_editing_the_card_for_people_is_allowed(tmp_path):
    save(tmp_path / "bundle")
    (tmp_path / "bundle" / "README.md").write_text("Trained on our own scanner.")
    load_bundle(tmp_path / "bundle")


def test_weights_on_another_layout_are_stored_contiguous(tmp_path):
    weights = {k: v.to(memory_format=torch.channels_last_3d) if v.ndim == 5 else v
               for k, v in tiny_weights(tiny_plan()).items()}  # fmt: skip
    save_bundle(tmp_path / "bundle", tiny_plan(), "3d_fullres", {"0": weights}, (), {})
    assert same_weights(load_bundle(tmp_path / "bundle").state_dict("0"), weights)


def test_another_plan_does_not_go_into_an_existing_bundle(tmp_path):
    save(tmp_path / "bundle")
    other = tiny_plan(spacing=(2.0, 2.0, 2.0))
    with pytest.raises(BundleError, match="another plan"):
        save_bundle(tmp_path / "bundle", other, "3d_fullres", {"1": tiny_weights(other)}, (), {})
    assert load_bundle(tmp_path / "bundle").folds == ("0",)


def test_nothing_is_left_of_a_save_that_fails(tmp_path):
    with pytest.raises(AttributeError):
        save_bundle(tmp_path / "bundle", tiny_plan(), "3d_fullres", {"0": {"a": "no tensor"}}, (), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["plan.yaml", "weights/fold_0.safetensors"])
def test_a_changed_file_is_refused_by_its_hash(tmp_path, file):
    save(tmp_path / "bundle")
    path = tmp_path / "bundle" / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{file}.*SHA-256"):
        load_bundle(tmp_path / "bundle")


def test_a_changed_first_stage_is_refused(tmp_path):
    weights = {"0": tiny_weights(tiny_plan(), "3d_cascade_fullres")}
    save_bundle(tmp_path / "b", tiny_plan(), "3d_cascade_fullres", weights, (), {}, previous=tiny_bundle())
    inner = tmp_path / "b" / "previous" / "bundle.yaml"
    inner.write_text(inner.read_text().replace("mirror_axes: [0, 1, 2]", "mirror_axes: [0]"))
    with pytest.raises(BundleError, match=r"previous/bundle\.yaml.*SHA-256"):
        load_bundle(tmp_path / "b")


def test_a_missing_file_is_named(tmp_path):
    save(tmp_path / "bundle")
    (tmp_path / "bundle" / "weights" / "fold_0.safetensors").unlink()
    with pytest.raises(BundleError, match=r"fold_0\.safetensors is missing"):
        load_bundle(tmp_path / "bundle")


def test_a_link_is_refused(tmp_path):
    save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "plan.yaml"
    os.replace(file, tmp_path / "elsewhere.yaml")
    file.symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(BundleError, match="link"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "name", ["../evil.yaml", "/etc/evil", "weights/../../evil", "C:evil", "a\\..\\..\\evil"]
)
def test_a_zip_member_that_points_outside_is_refused(tmp_path, name):
    save(tmp_path / "model.medseg")
    rezip(tmp_path / "model.medseg", lambda members: members.update({name: b"x"}))
    with pytest.raises(BundleError, match="outside"):
        load_bundle(tmp_path / "model.medseg")


def test_a_zip_member_that_is_a_link_is_refused(tmp_path):
    save(tmp_path / "model.medseg")
    with zipfile.ZipFile(tmp_path / "model.medseg", "a") as archive:
        member = zipfile.ZipInfo("weights/fold_1.safetensors")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(BundleError, match="link"):
        load_bundle(tmp_path / "model.medseg")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    save(tmp_path / "model.medseg")
    with zipfile.ZipFile(tmp_path / "model.medseg", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/fold_1.safetensors", bytes(40_000_000))
    with pytest.raises(BundleError, match="40000000 bytes"):
        load_bundle(tmp_path / "model.medseg")


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    save(tmp_path / "model.medseg")
    with (
        zipfile.ZipFile(tmp_path / "model.medseg", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("plan.yaml", "{}")
    with pytest.raises(BundleError, match="twice"):
        load_bundle(tmp_path / "model.medseg")


@pytest.mark.parametrize("name", ["weights/fold_0.pth", "evil.py", "weights/fold_0.pkl"])
def test_files_that_do_not_belong_into_a_bundle_are_refused(tmp_path, name):
    save(tmp_path / "bundle")
    (tmp_path / "bundle" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(BundleError, match="does not belong"):
        load_bundle(tmp_path / "bundle")


def test_weights_that_are_a_pickle_are_an_error_and_not_run(tmp_path):
    save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "weights" / "fold_0.safetensors"
    torch.save({"a": torch.zeros(2)}, file)
    manifest = read_mapping(tmp_path / "bundle" / "bundle.yaml")
    manifest["sha256"]["weights/fold_0.safetensors"] = sha256_file(file)
    (tmp_path / "bundle" / "bundle.yaml").write_text(dump_yaml(manifest))
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(tmp_path / "bundle").state_dict("0")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "newer"),
        ({"colour": "red"}, "colour"),
        ({"configuration": "4d"}, "4d"),
        ({"folds": ["../../x"]}, "missing"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(tmp_path, change, says):
    save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.yaml"
    file.write_text(json.dumps({**read_mapping(file), **change}))
    with pytest.raises(BundleError, match=says):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["nnU-Net", "MONAI"])
def test_a_model_of_another_program_is_sent_to_load_model(tmp_path, name, packed):
    path = tmp_path / "model"
    zoo.write_bundle(path, "spleen") if name == "MONAI" else write_model(path)
    path = shutil.make_archive(str(path), "zip", path) if packed else path
    with pytest.raises(BundleError, match=r"medseg\.load_model"):
        load_bundle(path)
    assert medseg.load_model(path).labels.foreground


def test_what_is_no_bundle_is_said_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.medseg").write_text("hello")
    for name, says in [("empty", "not a bundle"), ("text.medseg", "damaged"), ("nowhere", "no such bundle")]:
        with pytest.raises(BundleError, match=says) as caught:
            load_bundle(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_fold_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save(tmp_path / "bundle", folds=("0", "all"))
    with pytest.raises(BundleError, match="0, all"):
        load_bundle(tmp_path / "bundle").state_dict("3")


def test_a_fold_name_that_is_a_path_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no name"):
        save(tmp_path / "bundle", folds=("../x",))
