"""``medseg bundle``: what it writes, says, and leaves alone."""

import json
import re
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from medseg.bundle import MODELS, load_bundle, save_bundle, write_bundle
from medseg.cli import app
from medseg.cli.bundle import Checkpoint, Target
from medseg.cli.info import info
from medseg.errors import BundleError, ConfigError, MedsegError, OutputError
from medseg.exchange import EXPORTERS, load_model, monai_out
from medseg.exchange.graph import describe
from medseg.exchange.nnunet import CHECKPOINTS, load_nnunet
from tests.exchange import zoo
from tests.exchange.nnunet_models import CASCADE, LOWRES, write_model
from tests.infer.models import tiny_bundle, tiny_plan, tiny_weights


def run(*words):
    result = CliRunner().invoke(app, ["bundle", *map(str, words)])
    if isinstance(result.exception, MedsegError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_words_of_the_command_line_are_those_of_the_library():
    assert {target.value for target in Target} == set(EXPORTERS)
    assert tuple(f"checkpoint_{each.value}.pth" for each in Checkpoint) == CHECKPOINTS


@pytest.mark.parametrize("name", ["bundle", "model.medseg"])
def test_an_import_is_one_line_and_a_bundle(tmp_path, name):
    model = write_model(tmp_path / "model", folds=(0, 1))
    said = run("import", model, "-o", tmp_path / name)
    assert said.count("\n") == 1 and "3d_fullres" in said and "2 folds" in said and "2 labels" in said
    assert load_bundle(tmp_path / name).plan == load_nnunet(model).plan
    assert "replaced" not in said
    assert "(replaced; " in run("import", model, "-o", tmp_path / name)  # as an older import may be


def test_a_fold_that_is_gone_does_not_stay_in_a_repeated_import(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1))
    run("import", model, "-o", tmp_path / "bundle")
    shutil.rmtree(model / "fold_0")
    run("import", model, "-o", tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").folds == ("1",)


def test_the_best_checkpoint_is_taken_where_it_is_asked_for(tmp_path):
    model = write_model(tmp_path / "model", file="best")
    shutil.copy(model / "fold_0/checkpoint_best.pth", model / "fold_0/checkpoint_final.pth")
    run("import", model, "-o", tmp_path / "bundle", "--checkpoint", "best")
    assert load_bundle(tmp_path / "bundle").card["checkpoint"] == "checkpoint_best.pth"


def test_a_cascade_is_imported_with_the_first_stage_that_is_given(tmp_path):
    cascade = write_model(tmp_path / "a" / "model", name=CASCADE)
    first = write_model(tmp_path / "b" / "model", name=LOWRES)
    said = run("import", cascade, "-o", tmp_path / "bundle", "--previous", first)
    assert "with 3d_lowres as its first stage" in said
    assert load_bundle(tmp_path / "bundle").previous.configuration == LOWRES


def test_post_processing_is_applied_where_it_is_asked_for(tmp_path):
    model, file = write_model(tmp_path / "model"), tmp_path / "postprocessing.json"
    name = "remove_all_but_largest_component_from_segmentation"
    arguments = [{"labels_or_regions": [1, 2]}, {"labels_or_regions": 1}]
    file.write_text(json.dumps({"postprocessing_fns": [name] * 2, "postprocessing_kwargs": arguments}))
    run("import", model, "-o", tmp_path / "bundle", "--postprocessing", file)
    steps = load_bundle(tmp_path / "bundle").postprocessing["steps"]
    assert [step["labels"] for step in steps] == [[1, 2], [1]]
    for content in ({"postprocessing_fns": ["os.system"], "postprocessing_kwargs": [{}]}, {"a": 1}, {}):
        content.setdefault("postprocessing_fns", [name])
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="postprocessing"):
            run("import", model, "-o", tmp_path / "other", "--postprocessing", file)
    assert not (tmp_path / "other").exists()


def test_an_import_replaces_nothing_that_is_not_an_import(tmp_path):
    model = write_model(tmp_path / "model")
    trained = tmp_path / "trained"
    save_bundle(trained, tiny_plan(), "3d_fullres", {"0": tiny_weights(tiny_plan())}, (), {})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "text.medseg").write_text("mine")
    for name in ("trained", "notes", "text.medseg", "model"):
        before = sorted((p, p.is_file() and p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
        with pytest.raises(OutputError):
            run("import", model, "-o", tmp_path / name)
        assert sorted((p, p.is_file() and p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_refused_model_leaves_nothing(tmp_path):
    model = write_model(tmp_path / "model")
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    with pytest.raises(BundleError, match="empty"):
        run("import", model, "-o", tmp_path / "out" / "bundle")
    assert not (tmp_path / "out").exists()


def test_an_export_to_nnunet_never_replaces_a_model_that_was_trained(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1))
    said = run("export", model, "--to", "nnunet", "-o", tmp_path / "out", "--fold", "1")
    assert said.count("\n") == 1 and "1 fold," in said
    assert "(replaced; " in run("export", model, "--to", "nnunet", "-o", tmp_path / "out")
    assert load_nnunet(tmp_path / "out").folds == ("0", "1")
    with pytest.raises(OutputError, match="something else"):
        run("export", tmp_path / "out", "--to", "nnunet", "-o", model)
    assert load_nnunet(model).folds == ("0", "1")


def test_a_fold_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(BundleError, match="no fold '7'"):
        run("export", model, "--to", "nnunet", "-o", tmp_path / "out", "--fold", "7")
    assert not (tmp_path / "out").exists()


def test_an_exported_dataset_json_says_where_it_comes_from(tmp_path):
    run("export", write_model(tmp_path / "model"), "--to", "nnunet", "-o", tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out" / "dataset.json").read_text())
    assert written["description"].startswith("Exported by medseg")


def test_a_monai_bundle_is_neither_imported_nor_converted(tmp_path):
    root = zoo.write_bundle(tmp_path / "spleen", "spleen")
    for words in (("import",), ("export", "--to", "onnx")):
        with pytest.raises(
            BundleError, match=r"MONAI bundle, which is not .* medseg predicts with it as it is"
        ):
            run(words[0], root, *words[1:], "-o", tmp_path / ("out" if words[0] == "import" else "out.onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {"spleen"}


def test_a_bundle_is_not_imported_again(tmp_path):
    write_bundle(tmp_path / "a.medseg", tiny_bundle())
    with pytest.raises(BundleError, match="a bundle of medseg already"):
        run("import", tmp_path / "a.medseg", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("import", "-o", "foo.zip"), r"foo\.zip: a bundle is a folder, or one file that ends in \.medseg"),
        (("export", "--to", "openvino", "-o", "b.xml"), r"b\.xml: openvino is a folder"),
        (("export", "--to", "monai", "-o", "b.zip"), r"b\.zip: monai is a folder"),
        (("export", "--to", "nnunet", "-o", "b.medseg"), r"b\.medseg: nnunet is a folder"),
        (("export", "--to", "onnx", "-o", "b"), r"onnx is one file.*\.onnx"),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused_by_its_name(tmp_path, words, says):
    model = write_model(tmp_path / "model")
    with pytest.raises(OutputError, match=says):
        run(words[0], model, *words[1:-1], tmp_path / words[-1])
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_mistyped_model_gets_the_same_words_everywhere(tmp_path):
    nowhere = tmp_path / "nowhere"
    for call in (
        lambda: load_model(nowhere),
        lambda: run("import", nowhere, "-o", tmp_path / "out"),
        lambda: run("export", nowhere, "--to", "monai", "-o", tmp_path / "out"),
        lambda: info(nowhere),
    ):
        with pytest.raises(MedsegError, match=re.escape(f"Pass {MODELS}")):
            call()


def told(path):
    """Return what ``medseg info`` says on the screen and as JSON."""
    results = [CliRunner().invoke(app, ["info", str(path), *more]) for more in ((), ("--json",))]
    assert all(result.exit_code == 0 for result in results), results
    return results[0].output, json.loads(results[1].output)


@pytest.mark.parametrize("packed", [False, True])
def test_info_says_what_a_monai_bundle_is(tmp_path, packed):
    path = zoo.write_bundle(tmp_path / "spleen", "spleen")
    text, facts = told(shutil.make_archive(str(path), "zip", path) if packed else path)
    assert facts["kind"] == "MONAI bundle" and facts["network"] == "UNet" and len(facts["channels"]) == 1
    assert len(facts["labels"]) == 2 and "roi_size=[24,24,16]" in facts["window"]
    (transforms,) = (line for line in text.splitlines() if line.startswith("transforms"))
    assert "Orientationd axcodes=RAS, Spacingd pixdim=[1.5,1.5,2.0]" in transforms


def test_info_says_what_medsegs_exports_are_for(tmp_path):
    metadata = tmp_path / "monai" / "configs" / "metadata.json"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(json.dumps(monai_out.metadata(tiny_bundle(), ("0",))))
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "model.json").write_text(json.dumps(describe(tiny_bundle(), ("0",)), indent=2))
    (tmp_path / "openvino" / "model.xml").write_text("<net/>")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x06medseg")
    for name, kind in {
        "monai": "MONAI",
        "openvino": "OpenVINO",
        "openvino/model.xml": "OpenVINO",
        "a.onnx": "ONNX",
    }.items():
        text, facts = told(tmp_path / name)
        assert facts["kind"] == f"{kind} export of medseg"
        assert f"for {kind}; medseg predicts with the bundle that it was made from" in text


def test_info_says_what_a_model_of_nnunet_is(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1))
    shutil.make_archive(str(tmp_path / "model"), "zip", model)
    for path in (model, tmp_path / "model.zip"):
        result = CliRunner().invoke(app, ["info", str(path), "--json"])
        facts = json.loads(result.output)
        assert facts["kind"] == "nnU-Net model" and facts["folds"] == ["0", "1"]
        assert facts["card"]["trainer"] == "nnUNetTrainer"
