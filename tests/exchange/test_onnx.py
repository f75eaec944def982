"""An exported ONNX file computes what medseg's network does, and says all that is around it."""

import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from medseg.errors import BundleError, ConfigError, OutputError
from medseg.exchange import onnx as onnx_out
from medseg.exchange.graph import describe
from medseg.exchange.onnx import export
from tests.exchange.graphs import GOLDEN, golden, logits, noise, raw, tiny
from tests.infer.models import tiny_bundle

EQUAL = 1e-3


def run(path, tile):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": tile})[0]


def description(path):
    model = onnx.load(str(path))
    return json.loads({entry.key: entry.value for entry in model.metadata_props}["medseg"])


@pytest.mark.slow
@pytest.mark.parametrize("model", GOLDEN)
def test_logits_of_a_golden_patch_are_those_of_the_network(golden_dir, tmp_path, model):
    bundle, tile, expected = golden(golden_dir, model)
    export(bundle, tmp_path / "model.onnx", None)
    assert np.abs(run(tmp_path / "model.onnx", tile) - expected).max() <= EQUAL


def test_folds_are_averaged_and_fixed_normalisation_is_inside_for_any_batch_and_size(tmp_path, capfd):
    bundle = tiny(("ct", "rgb-0-1"), folds=2, network="resenc-unet")
    path = tmp_path / "model.onnx"
    export(bundle, path, None)
    assert "torchvision" not in "".join(capfd.readouterr())
    onnx.checker.check_model(str(path), full_check=True)
    assert onnx.load(str(path)).opset_import[0].version >= 18
    for batch, shape in ((1, (8, 8, 8)), (3, (10, 8, 12))):
        tile = noise(bundle, batch, shape)
        assert np.abs(run(path, raw(bundle, tile)) - logits(bundle, tile)).max() <= EQUAL
    found = description(path)
    assert [channel["where"] for channel in found["normalization"]] == ["graph", "graph"]
    assert found["folds"] == ["0", "1"]


def test_values_outside_the_clips_count_as_the_clip(tmp_path):
    bundle = tiny(("ct",), patch=(8, 8), configuration="2d")
    export(bundle, tmp_path / "model.onnx", None)
    wild = noise(bundle, 1, (8, 8)) * 1e4
    stats = bundle.plan.intensity["0"]
    clipped = np.clip(wild, stats.percentile_00_5, stats.percentile_99_5)
    expected = logits(bundle, (clipped - stats.mean) / np.float32(stats.std))
    assert np.abs(run(tmp_path / "model.onnx", wild) - expected).max() <= EQUAL


def test_one_fold_of_the_second_network_of_a_cascade_takes_its_first_stage_as_channels(tmp_path):
    bundle = tiny_bundle("3d_cascade_fullres", previous=tiny_bundle(), folds=2)
    export(bundle, tmp_path / "model.onnx", "1")
    tile = noise(bundle, 1, (8, 8, 8))
    assert tile.shape[1] == 3
    assert np.abs(run(tmp_path / "model.onnx", tile) - logits(bundle, tile, ("1",))).max() <= EQUAL
    assert description(tmp_path / "model.onnx") == json.loads(json.dumps(describe(bundle, ("1",))))


@pytest.mark.slow
def test_a_network_of_monai_is_exported_too(tmp_path):
    bundle = tiny(("none",), network="segresnet")
    export(bundle, tmp_path / "model.onnx", None)
    tile = noise(bundle, 2, (8, 12, 8))
    assert np.abs(run(tmp_path / "model.onnx", tile) - logits(bundle, tile)).max() <= EQUAL


def test_a_file_is_replaced_whole_and_a_failure_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    broken = replace(tiny_bundle(), weights={"0": dict})
    for model, fold in ((broken, None), (tiny_bundle(), "7")):
        with pytest.raises(BundleError):
            export(model, path, fold)
    monkeypatch.setattr(onnx_out, "MAX_WEIGHT_BYTES", 100)
    with pytest.raises(BundleError, match="one fold"):
        export(tiny_bundle(folds=2), path, None)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_a_name_without_onnx_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"\.onnx"):
        export(tiny_bundle(), tmp_path / "model", None)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    found = onnx_out.find_spec
    monkeypatch.setattr(onnx_out, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ConfigError, match=r"onnxscript is not installed. Run pip install 'medseg\[onnx\]'"):
        export(tiny_bundle(), tmp_path / "model.onnx", None)


def test_the_module_of_the_same_name_does_not_hide_the_library():
    assert onnx_out is not onnx
    assert sys.modules["onnx"] is onnx
