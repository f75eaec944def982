"""An exported OpenVINO model computes what medseg's network does, and nothing is sent to anybody."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from medseg.errors import BundleError, ConfigError, OutputError
from medseg.exchange import openvino as openvino_out
from medseg.exchange.graph import describe
from medseg.exchange.openvino import export, import_openvino
from medseg.labels import LabelSet
from tests.exchange.graphs import GOLDEN, golden, logits, noise, raw, tiny
from tests.infer.models import tiny_bundle

# OpenVINO's instance norm sums in another order; on tiles that are mostly padding it shows.
EQUAL = 5e-3


def run(folder, tile):
    openvino = import_openvino()
    model = openvino.Core().read_model(folder / "model.xml")
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"image": tile})["logits"]


@pytest.mark.parametrize("model", GOLDEN)
def test_logits_of_a_golden_patch_are_those_of_the_network(golden_dir, tmp_path, model):
    bundle, tile, expected = golden(golden_dir, model)
    export(bundle, tmp_path / "ir", None)
    assert np.abs(run(tmp_path / "ir", tile) - expected).max() <= EQUAL


@pytest.mark.parametrize("network", ["unet", "resenc-unet", "segresnet"])
def test_folds_are_averaged_and_fixed_normalisation_is_inside_for_any_batch_and_size(tmp_path, network):
    bundle = tiny(("ct", "rgb-0-1"), folds=2, network=network)
    export(bundle, tmp_path / "ir", None)
    for batch, shape in ((1, (8, 8, 8)), (3, (12, 8, 16))):
        tile = noise(bundle, batch, shape)
        assert np.abs(run(tmp_path / "ir", raw(bundle, tile)) - logits(bundle, tile)).max() <= EQUAL


def test_the_description_is_in_the_model_and_beside_it(tmp_path):
    labels = LabelSet.parse({"background": 0, "größer <&>": 1, "核": 2})
    bundle = tiny(("zscore",), labels=labels)
    export(bundle, tmp_path / "ir", None)
    model = import_openvino().Core().read_model(tmp_path / "ir" / "model.xml")
    expected = json.loads(json.dumps(describe(bundle, ("0",))))
    assert json.loads(model.get_rt_info(["medseg"]).value) == expected
    assert json.loads((tmp_path / "ir" / "model.json").read_text(encoding="utf-8")) == expected
    assert expected["output"]["names"] == ["background", "größer <&>", "核"]
    assert {file.name for file in (tmp_path / "ir").iterdir()} == {"model.xml", "model.bin", "model.json"}


def test_weights_stay_float32(tmp_path):
    bundle = tiny(("zscore",))
    export(bundle, tmp_path / "ir", None)
    model = import_openvino().Core().read_model(tmp_path / "ir" / "model.xml")
    kinds = {
        op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    assert "f16" not in kinds
    assert "f32" in kinds


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="something else"):
        export(tiny_bundle(), tmp_path / "mine", None)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_failure_leaves_nothing(tmp_path):
    broken = replace(tiny_bundle(), weights={"0": dict})
    for model, fold in ((broken, None), (tiny_bundle(), "7")):
        with pytest.raises(BundleError):
            export(model, tmp_path / "ir", fold)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_out, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed. Run pip install 'medseg\[openvino\]'"):
        export(tiny_bundle(), tmp_path / "ir", None)


def test_nothing_of_its_telemetry_is_loaded():
    code = """
from medseg.exchange.openvino import import_openvino
import sys
import_openvino()
assert "openvino" in sys.modules
assert sys.modules["openvino_telemetry"] is None
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
