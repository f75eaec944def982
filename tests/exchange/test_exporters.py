"""What every exporter owes, whatever its format."""

import importlib

import pytest

from medseg.errors import MedsegError
from medseg.exchange import EXPORTERS
from tests.infer.models import tiny_bundle

NEEDS = {"monai": "monai", "onnx": "onnxscript", "openvino": "openvino"}


@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_an_export_is_written_whole_or_not_at_all(tmp_path, name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    out = tmp_path / ("model.onnx" if name == "onnx" else "model")
    EXPORTERS[name](tiny_bundle(), out, None)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert out.is_file() or any(out.iterdir())
    with pytest.raises(MedsegError, match="'7'"):
        EXPORTERS[name](tiny_bundle(), tmp_path / f"other_{out.name}", "7")
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
