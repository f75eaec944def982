"""MONAI bundles from outside: what is understood, and that nothing of them is ever run."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import BundleError
from medseg.exchange.monai_config import MonaiConfig, read_painting
from medseg.exchange.monai_in import is_monai_bundle, load_monai_bundle
from tests.exchange import zoo


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that code of a bundle would write."""
    return tmp_path / "canary"


@pytest.fixture
def code(canary: Path) -> str:
    return f"$__import__('pathlib').Path({str(canary)!r}).touch()"


def change(settings, key, value):
    """Set a value deep in plain data: the parts of `key` are names and numbers."""
    *path, last = key.split("::")
    node = settings
    for part in path:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(last) if isinstance(node, list) else last] = value
    return settings


def refusal(root):
    with pytest.raises(BundleError) as caught:
        load_monai_bundle(root).weights()
    text = str(caught.value)
    assert text.endswith(".")
    assert len(text) < 900
    return text


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_bundle_in_the_layout_of_the_model_zoo_is_understood(name, tmp_path):
    weights = "model_lowres.pt" if name == "whole_body" else "model.pt"
    root = zoo.write_bundle(tmp_path / name, name, weights=weights)
    assert is_monai_bundle(root)
    model = load_monai_bundle(root)
    assert len(model.channels) == (4 if name == "brats" else 1)
    assert model.labels.n_outputs == model.outputs
    assert all(type(value) is torch.Tensor for value in model.weights().values())
    assert len(model.digest) == 64
    assert str(model) == str(root)


def test_a_yaml_configuration_means_what_a_json_one_does(tmp_path):
    one = load_monai_bundle(zoo.write_bundle(tmp_path / "a", "pediatric"))
    other = load_monai_bundle(zoo.write_bundle(tmp_path / "b", "pediatric", suffix=".yaml"))
    assert (one.network, one.preprocessing, one.inferer) == (
        other.network,
        other.preprocessing,
        other.inferer,
    )
    assert (one.decision, one.labels) == (other.decision, other.labels)


def test_references_and_choices_are_followed(tmp_path):
    model = load_monai_bundle(zoo.write_bundle(tmp_path / "w", "whole_body", weights="model_lowres.pt"))
    spacing = next(call for call in model.preprocessing if call.name == "Spacingd")
    assert spacing.arguments["pixdim"] == [3.0, 3.0, 3.0]
    assert model.inferer.arguments["overlap"] == 0.25
    assert "device" not in model.inferer.arguments


def test_brats_outputs_become_nested_regions_in_the_order_the_bundle_paints_them(tmp_path):
    model = load_monai_bundle(zoo.write_bundle(tmp_path / "b", "brats"))
    assert model.channels == ("T1c", "T1", "T2", "FLAIR")
    assert model.decision.painting == ((1, 2), (0, 1), (2, 3))  # its 4 becomes 3: labels have no gaps
    assert model.labels.entries["Whole tumor"] == (2, 1, 3)
    assert model.labels.entries["Tumor core"] == (1, 3)
    assert model.labels.regions_class_order == (2, 1, 3)


def test_brats_outputs_without_a_painting_step_are_painted_from_the_outside_in(tmp_path):
    settings = zoo.brats()
    del settings["postprocessing"]["transforms"][3]
    model = load_monai_bundle(zoo.write_bundle(tmp_path / "b", "brats", settings))
    assert model.decision.painting == ((1, 1), (0, 2), (2, 3))
    assert model.labels.entries["Whole tumor"] == (1, 2, 3)


def test_other_sigmoid_outputs_are_plain_labels_without_their_background(tmp_path):
    settings = zoo.whole_body()
    settings["postprocessing"] = zoo.compose(zoo.SIGMOID, zoo.invert(), zoo.HALF, zoo.SAVE)
    root = zoo.write_bundle(tmp_path / "s", "whole_body", settings, weights="model_lowres.pt")
    model = load_monai_bundle(root)
    assert model.labels.entries == {"background": 0, "spleen": 1, "kidney_right": 2, "kidney_left": 3}
    assert not model.labels.has_regions
    assert model.decision.painting == ((1, 1), (2, 2), (3, 3))


def test_outputs_that_the_metadata_does_not_name_are_numbered(tmp_path):
    root = zoo.write_bundle(tmp_path / "s", "prostate")
    (root / "configs" / "metadata.json").unlink()
    model = load_monai_bundle(root)
    assert model.labels.entries == {"background": 0, "label_1": 1, "label_2": 2}
    assert model.channels == ("channel_0",)


def test_a_swin_unetr_of_older_monai_may_name_its_image_size(tmp_path):
    settings = zoo.swin()
    root = zoo.write_bundle(tmp_path / "s", "swin", settings)
    change(settings, "network_def::img_size", 96)
    (root / "configs" / "inference.json").write_text(json.dumps(settings))
    assert "img_size" not in load_monai_bundle(root).network.arguments


# --- hostile


UNNEEDED = [
    "imports",
    "datalist",
    "dataset",
    "dataloader",
    "evaluator",
    "initialize",
    "run",
    "device",
    "output_dir",
]


@pytest.mark.parametrize("key", UNNEEDED)
def test_code_in_parts_that_prediction_does_not_need_is_not_looked_at(key, tmp_path, code, canary):
    settings = change(
        zoo.spleen(), key, [code, {"_target_": "os.system", "command": code, "_requires_": code}]
    )
    model = load_monai_bundle(zoo.write_bundle(tmp_path / "b", "spleen", settings))
    assert model.labels.entries == {"background": 0, "spleen": 1}
    assert not canary.exists()


NEEDED = [
    "network",
    "network_def::norm",
    "network_def::_target_",
    "preprocessing",
    "preprocessing::transforms",
    "preprocessing::transforms::2",
    "preprocessing::transforms::3::pixdim",
    "inferer::roi_size",
    "inferer::_disabled_",
    "postprocessing::transforms::1::transform",
    "postprocessing::transforms::2::argmax",
    "checkpointloader::load_path",
    "image_key",
]


@pytest.mark.parametrize("key", NEEDED)
def test_code_in_a_part_that_prediction_needs_is_refused_by_name(key, tmp_path, code, canary):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / "configs" / "inference.json").write_text(json.dumps(change(zoo.spleen(), key, code)))
    text = refusal(root)
    assert "does not run code from bundles" in text
    assert "__import__" in text
    assert key.split("::")[0] in text
    assert not canary.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "scripts.networks.unest.UNesT",
        "monai.bundle.run",
        "RandFlipd",
    ],
)
@pytest.mark.parametrize("part", ["network_def", "inferer", "preprocessing::transforms::2", "postprocessing"])
def test_a_class_that_is_not_on_the_list_is_refused_by_name(target, part, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    changed = change(zoo.spleen(), f"{part}::_target_", target)
    (root / "configs" / "inference.json").write_text(json.dumps(changed))
    text = refusal(root)
    assert target in text
    assert "medseg does not know" in text
    assert ("code of the bundle" in text) == target.startswith("scripts")


@pytest.mark.parametrize("hidden", ["_requires_", "_args_", "_mode_"])
def test_a_component_that_makes_monai_do_more_is_refused(hidden, tmp_path, code, canary):
    settings = change(zoo.spleen(), f"inferer::{hidden}", "callable" if hidden == "_mode_" else [code])
    assert hidden in refusal(zoo.write_bundle(tmp_path / "b", "spleen", settings))
    assert not canary.exists()


def test_a_lambda_that_does_more_than_paint_is_refused(tmp_path):
    settings = change(zoo.brats(), "postprocessing::transforms::3::func", "$lambda x: print(x)")
    text = refusal(zoo.write_bundle(tmp_path / "b", "brats", settings))
    assert "postprocessing::transforms::3::func" in text
    assert "lambda x: print(x)" in text


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_the_place_of_weights_is_not_unpickled(tmp_path, canary):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    torch.save({"model": Trap(canary)}, root / "models" / "model.pt")
    text = refusal(root)
    assert "models/model.pt: refused, since it names posix.mkdir, which is not data" in text
    assert not canary.exists()


def test_weights_that_unpack_to_more_than_they_are_are_not_unpacked(tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    with zipfile.ZipFile(root / "models" / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10**6)
    assert "unpacks to more" in refusal(root)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no checkpoint"),
        (b"PK\x03\x04", "is cut off or damaged. Copy it again."),
        (b"\x80\x02}q\x00.", "is a pickle of something else"),
        (b"root:x:0:0", "is no checkpoint"),
    ],
)
def test_a_file_that_holds_no_weights_is_one_sentence(content, says, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / "models" / "model.pt").write_bytes(content)
    assert f"models/model.pt: {says}" in refusal(root)


def test_python_in_the_bundle_is_never_imported(tmp_path, canary, monkeypatch):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / "scripts").mkdir()
    (root / "scripts" / "__init__.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.chdir(root)
    load_monai_bundle(root).weights()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model.ts", "model.pt"])
def test_torchscript_is_refused_and_the_sentence_says_why(name, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / "models" / "model.pt").unlink()
    with zipfile.ZipFile(root / "models" / name, "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/code/__torch__.py", "import os")
        archive.writestr("archive/data.pkl", b"\x80\x02).")
        archive.writestr("archive/version", b"3")
    assert "TorchScript" in refusal(root)


def test_a_network_that_is_loaded_as_torchscript_is_refused(tmp_path):
    settings = zoo.spleen()
    root = zoo.write_bundle(tmp_path / "b", "spleen", settings)
    del settings["network_def"]
    settings["network"] = "$torch.jit.load(@bundle_root + '/models/model.ts')"
    (root / "configs" / "inference.json").write_text(json.dumps(settings))
    assert "network is TorchScript" in refusal(root)


def zipped(root, target, prefix="spleen_ct_segmentation/", extra=()):
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(file, prefix + file.relative_to(root).as_posix())
        for name in extra:
            archive.writestr(name, "x")
    return target


@pytest.mark.parametrize("prefix", ["", "spleen_ct_segmentation/"])
def test_a_zip_is_read_like_the_folder_it_was_made_from(prefix, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    packed = zipped(root, tmp_path / "spleen.zip", prefix)
    assert is_monai_bundle(packed)
    one, other = load_monai_bundle(root), load_monai_bundle(packed)
    assert (one.network, one.labels, one.digest) == (other.network, other.labels, other.digest)
    assert all(torch.equal(value, other.weights()[name]) for name, value in one.weights().items())


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "a/../../evil"])
def test_a_zip_that_points_outside_is_refused(name, tmp_path):
    packed = zipped(zoo.write_bundle(tmp_path / "b", "spleen"), tmp_path / "spleen.zip", extra=[name])
    assert "points outside" in refusal(packed)
    assert not (tmp_path / "evil").exists()


def test_a_configuration_of_a_hundred_megabytes_is_not_read(tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    with (root / "configs" / "inference.json").open("wb") as stream:
        stream.truncate(100 * 2**20)
    assert "104857600 bytes" in refusal(root)


@pytest.mark.parametrize(
    "pixdim",
    [
        "@pixdim",
        "@a",
        "$@a",
        "@preprocessing",
        "[" * 60 + "]" * 60,
        "$" + "(" * 900 + "1" + ")" * 900 + ",",
        "$" + "-" * 990 + "1",
    ],
)
def test_references_in_a_circle_and_deep_nesting_are_refused(pixdim, tmp_path):
    settings = zoo.spleen()
    settings.update(pixdim="@pixdim", a="$@b", b=["@a"])
    value = json.loads(pixdim) if pixdim.startswith("[") else pixdim
    change(settings, "preprocessing::transforms::3::pixdim", value)
    refusal(zoo.write_bundle(tmp_path / "b", "spleen", settings))


def test_references_that_multiply_are_refused_quickly(tmp_path):
    settings = zoo.spleen()
    settings.update({f"x{n}": [f"@x{n + 1}"] * 10 for n in range(9)}, x9=1.0)
    change(settings, "preprocessing::transforms::3::pixdim", "@x0")
    assert "too large" in refusal(zoo.write_bundle(tmp_path / "b", "spleen", settings))


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("network_def::channels", [10**6, 10**6, 10**6], "too large"),
        ("network_def::preproces", 1, "'preproces'"),
        ("network_def::out_channels", "two", "out_channels"),
        ("network_def::in_channels", 0, "in_channels"),
        ("network_def::channels", [4], "UNet"),
        ("preprocessing::transforms::3::pixdim", [1.5, 0, 2], "pixdim"),
        ("preprocessing::transforms::3::pixdim", "wide", "pixdim"),
        ("preprocessing::transforms::2::axcodes", None, "Orientationd"),
        ("preprocessing::transforms::5::keys", ["image", "other"], None),
        ("preprocessing::transforms::5::keys", "other", "other"),
        ("preprocessing::lazy", True, "lazy"),
        ("postprocessing::transforms::0::other", "$abs", "other"),
        ("postprocessing::transforms::1::transform", "@postprocessing", "transform"),
        ("postprocessing::transforms::2::argmax", False, "argmax"),
        ("inferer::roi_size", [10**6] * 3, "roi_size"),
        ("inferer::roi_size", [96, 96], "roi_size"),
        ("inferer::roi_size", "96", "roi_size"),
        ("inferer::sw_batch_size", 0, "sw_batch_size"),
        ("inferer::overlap", 1.0, "overlap"),
        ("inferer::overlap", "half", "overlap"),
        ("inferer::with_coord", True, "with_coord"),
        ("inferer::_target_", "SliceInferer", "3D"),
        ("image_key", "@nothing", "nothing"),
        ("image_key", "%other.json#key", "another file"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(key, value, word, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / "configs" / "inference.json").write_text(json.dumps(change(zoo.spleen(), key, value)))
    if word is None:
        load_monai_bundle(root)
    elif word == "UNet":
        from medseg.infer.monai import MonaiPredictor

        with pytest.raises(BundleError, match="UNet"):
            MonaiPredictor(load_monai_bundle(root))._load()
    else:
        assert word in refusal(root)


@pytest.mark.parametrize("name", ["models/model.pt", "configs/inference.json"])
def test_a_missing_part_is_named_with_what_to_do(name, tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    (root / name).unlink()
    assert name in refusal(root)


def test_what_is_no_bundle_is_not_taken_for_one(tmp_path):
    (tmp_path / "text.zip").write_text("x")
    assert not is_monai_bundle(tmp_path)
    assert not is_monai_bundle(tmp_path / "text.zip")
    assert not is_monai_bundle(tmp_path / "missing")
    assert "no MONAI bundle" in refusal(tmp_path)


def test_a_bundle_that_medseg_has_exported_says_where_to_go(tmp_path):
    root = zoo.write_bundle(tmp_path / "b", "spleen")
    metadata = root / "configs" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "medseg": {"version": "0.1.0"}}))
    assert "exported by medseg" in refusal(root)


# --- expressions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("$@root + '/models/' + @name", "./models/m.pt"),
        ("$os.path.join(@root, 'models', @name)", "models/m.pt"),
        ("$[1.5, 1.5, 1.5] if @high else [3.0] + [3.0, 3.0]", [1.5, 1.5, 1.5]),
        ("$len(@sizes) - 1", 1),
        ("$@sizes[0] * 2 // 3", 64),
        ("$@nested#deep#1", "y"),
        ("@nested::deep::0", "m.pt"),
        ("$not @high or @sizes[1] == 96", True),
        ("$torch.float32", "float32"),
        ("$None", None),
        ("$(1, 2.5)", [1, 2.5]),
        ("$-1", -1),
        ("plain @name", "plain @name"),
    ],
)
def test_an_expression_that_only_describes_a_value_has_that_value(expression, value):
    data = {"root": ".", "name": "m.pt", "high": True, "sizes": [96, 96], "nested": {"deep": ["@name", "y"]}}
    assert MonaiConfig(data, "test").value(expression, "key") == value


@pytest.mark.parametrize(
    "expression",
    [
        "$open('/etc/passwd')",
        "$().__class__.__bases__",
        "$[x for x in @sizes]",
        "$lambda: 0",
        "$(x := 1)",
        "$'a' * 10**9",
        "$'%999999999d' % 1",
        "$[0] * 99999999",
        "$2 ** 99999",
        "$f'{@sizes}'",
        "$@sizes.__len__()",
        "$int('1' * 9)",
        "$len(*@sizes)",
        "$torch.load('x')",
        "$getattr(torch, 'load')",
        "$b'x'",
        "$1j",
        "$_ref_0_",
        "$'@sizes'",
        "$9007199254740993",
        "$1 / 0",
        "$@sizes[9]",
        "$",
        "$import os",
    ],
)
def test_any_other_expression_is_refused(expression):
    config = MonaiConfig({"sizes": [96, 96]}, "test")
    with pytest.raises(BundleError, match="does not run code from bundles"):
        config.value(expression, "key")


@given(st.text(alphabet=st.sampled_from("@$abx019_.:#[](){}+-*/%'\", ifelsnot=<>"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_an_expression_is_data_or_a_bundle_error_and_nothing_else(text):
    try:
        value = MonaiConfig({"a": [1, 2], "b": "$@a", "x": {"a": "@b"}}, "test").value("$" + text, "key")
    except BundleError:
        return
    json.dumps(value)


def test_only_nested_choices_of_outputs_are_a_painting():
    assert read_painting(zoo.PAINT) == ((2, 4), (0, 1), (1, 2))
    for text in (
        "$lambda x: x",
        "$lambda x, y: 0",
        "$print(1)",
        zoo.PAINT.replace("torch", "os"),
        "$lambda x: (",
    ):
        assert read_painting(text) is None
    assert read_painting(zoo.PAINT.replace(", 0)))", ", y)))")) is None
