"""A bundle as OpenVINO IR: ``model.xml`` and ``model.bin``, with the description beside as ``model.json``.

Inputs, outputs and description are those of the ONNX export (`medseg.exchange.graph`); the description is
also in the model's ``rt_info`` under ``medseg``, as JSON. Weights stay float32.
"""

import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from medseg.bundle import Bundle
from medseg.errors import ConfigError
from medseg.exchange.graph import (
    FORMAT,
    INPUT,
    OUTPUT,
    build_graph,
    check_replaceable,
    describe,
    example,
    takes_any_size,
)
from medseg.files import atomic_folder

METADATA_KEY = "medseg"


def export(bundle: Bundle, out: Path, fold: str | None = None) -> None:
    """Write a folder with the IR; all or nothing.

    Parameters
    ----------
    bundle : what to export; of a cascade its own network, whose extra channels the description names
    out : folder; an older export is replaced, anything else is left alone
    fold : of the bundle; None takes all, and the graph returns the mean of their logits

    Raises
    ------
    BundleError
        There is no such fold, or its weights do not fit.
    ConfigError
        The package openvino is not installed.
    OutputError
        `out` holds something else.
    """
    check_replaceable(out, "model.json", f'"{FORMAT}"')
    openvino = import_openvino()
    folds = bundle.folds if fold is None else (fold,)
    description = describe(bundle, folds)
    with atomic_folder(out) as folder:
        model = _convert(openvino, bundle, folds)
        model.set_rt_info(json.dumps(description), [METADATA_KEY])
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (folder / "model.json").write_text(text + "\n", encoding="utf-8")


def _convert(openvino: Any, bundle: Bundle, folds: tuple[str, ...]) -> Any:
    """Return the ``openvino.Model`` of some folds."""
    import torch

    graph = build_graph(bundle, folds)
    patch = bundle.settings.patch_size
    sizes = [-1] * len(patch) if takes_any_size(bundle) else list(patch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about sizes that it takes as fixed
        model = openvino.convert_model(
            graph, example_input=example(bundle), input=[-1, bundle.in_channels, *sizes]
        )
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    return model


def import_openvino() -> Any:
    """Return the package openvino, whose telemetry is kept from loading: nothing is sent, no file is left.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    if find_spec("openvino") is None:
        raise ConfigError(
            "OpenVINO: the package openvino is not installed. Run pip install 'medseg[openvino]'."
        )
    if "openvino" not in sys.modules:
        # It sends an event at its import unless this import fails; then it takes an empty stub instead.
        cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    import openvino

    return openvino
