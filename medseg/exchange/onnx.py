"""A bundle as one ``.onnx`` file: normalisation and the mean of the folds inside, the rest as metadata.

Tiles may come in any batch and, but for Swin UNETR, in any size that the strides divide. The description of
`medseg.exchange.graph` is in the model's metadata under ``medseg``, as JSON.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import medseg
from medseg.bundle import Bundle
from medseg.errors import BundleError, ConfigError, OutputError
from medseg.exchange.graph import (
    INPUT,
    OUTPUT,
    Graph,
    build_graph,
    describe,
    example,
    size_bytes,
    takes_any_size,
)
from medseg.files import atomic_path

OPSET = 18
# What a protobuf message can hold, less room for the graph itself.
MAX_WEIGHT_BYTES = 2**31 - 2**22
# Voxels of the longest axis that a dynamic size is declared for.
MAX_AXIS = 1 << 16
METADATA_KEY = "medseg"


def export(bundle: Bundle, out: Path, fold: str | None = None) -> None:
    """Write an ONNX file; all or nothing.

    Parameters
    ----------
    bundle : what to export; of a cascade its own network, whose extra channels the metadata names
    out : file ending in ``.onnx``, replaced if it exists
    fold : of the bundle; None takes all, and the graph returns the mean of their logits

    Raises
    ------
    BundleError
        There is no such fold, its weights do not fit, or all together are too large for one file.
    ConfigError
        The packages onnx and onnxscript are not installed.
    OutputError
        `out` does not end in ``.onnx``.
    """
    if out.suffix.lower() != ".onnx":
        raise OutputError(f"{out}: expected the name of a file that ends in .onnx. Give it another name.")
    _require("onnx", "onnxscript")
    folds = bundle.folds if fold is None else (fold,)
    graph = build_graph(bundle, folds)
    if size_bytes(graph) > MAX_WEIGHT_BYTES:
        raise BundleError(
            f"{bundle}: {len(folds)} folds have {size_bytes(graph) / 2**30:.1f} GB of weights, "
            "and an ONNX file holds 2. Export one fold with --fold."
        )
    description = describe(bundle, folds)
    with atomic_path(out) as temporary, _quiet():
        program = _convert(graph, bundle)
        program.model.producer_name, program.model.producer_version = "medseg", medseg.__version__
        program.model.metadata_props[METADATA_KEY] = json.dumps(description)
        program.save(temporary, external_data=False)
        _check(temporary)


def _convert(graph: Graph, bundle: Bundle) -> Any:
    """Return torch's ONNXProgram of a graph."""
    import torch

    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if takes_any_size(bundle):
        for axis, divisor in enumerate(bundle.settings.architecture.divisor):
            count = torch.export.Dim(f"size{axis}", min=1, max=MAX_AXIS // divisor)
            sizes[axis + 2] = divisor * count if divisor > 1 else count
    with torch.no_grad():
        return torch.onnx.export(
            graph,
            (example(bundle, batch=2),),  # a batch of 1 would be taken as fixed
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )


def _check(path: Path) -> None:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX: the package {' and '.join(missing)} is not installed. Run pip install 'medseg[onnx]'."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
