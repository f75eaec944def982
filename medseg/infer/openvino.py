"""Networks compiled by OpenVINO for the CPU (extra ``openvino``), which is imported only when asked for.

Only the core library is used: no model converter, no telemetry, no file.
"""

import copy
import importlib.util
import warnings
from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError
from medseg.nets.fused import FoldedUNet, fold
from medseg.types import Shape

REMEDY = "pip install 'medseg[openvino]', or use runtime torch"
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def is_installed() -> bool:
    """Return whether OpenVINO can be imported; does not import it."""
    return importlib.util.find_spec("openvino") is not None


def version() -> str:
    """Return the version of OpenVINO, or "" without it; does not import it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("openvino")
    except PackageNotFoundError:
        return ""


def convert(network: nn.Module, patch_size: Shape, in_channels: int, exact: bool = True) -> Any:
    """Return the folded network as an ``openvino.Model`` for one image of `patch_size`.

    Parameters
    ----------
    network : in evaluation mode
    in_channels : of the image that it takes
    exact : norms of a U-Net as exact as torch's, for 5 % more time; of no use where features are bfloat16

    Raises
    ------
    ConfigError
        OpenVINO is not installed.
    """
    if not is_installed():
        raise ConfigError(f"runtime openvino: the package is not installed. {REMEDY}.")
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    folded = _exact(fold(network).eval()) if exact else fold(network).eval()
    example = torch.zeros(1, in_channels, *_example_size(folded, patch_size))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about tracing
        # The second run that compares two traces would take as long again.
        traced = torch.jit.trace(folded, example, check_trace=False)  # type: ignore[no-untyped-call]
        frontend = FrontEndManager().load_by_framework("pytorch")
        # It must outlive the conversion; without shared memory the model does not need it afterwards.
        decoder = TorchScriptPythonDecoder(traced, shared_memory=False)
        model = frontend.convert(frontend.load(decoder))
    model.reshape([1, in_channels, *patch_size])
    return model


def _example_size(network: nn.Module, patch_size: Shape) -> Shape:
    """Return the smallest size that a U-Net can be traced with, whose graph is one for all sizes."""
    if not isinstance(network, FoldedUNet):
        return patch_size
    smallest = network.downsampling
    # An instance norm refuses a single voxel at the bottom.
    return (min(2 * smallest[0], patch_size[0]), *smallest[1:])


def _exact(network: nn.Module) -> nn.Module:
    """Return a copy with other norms, if the network is one whose norms are known."""
    if not isinstance(network, FoldedUNet):
        return network
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d):
                setattr(module, name, _ExactNorm(child))
    return network


class _ExactNorm(nn.Module):
    """Instance norm whose sums are taken in two steps.

    OpenVINO sums a channel of convolution's layout in one float32 number: over 128 x 128 x 128 voxels that
    is wrong by 1e-3. It also makes one step of two equal ones, so the two here differ.
    """

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> None:
        super().__init__()
        shape = (1, -1, *(1 for _ in range(2 if isinstance(norm, nn.InstanceNorm2d) else 3)))
        self.weight, self.bias = (value.detach().reshape(shape) for value in (norm.weight, norm.bias))
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels, ...) normalised."""
        inner = tuple(range(3, x.ndim))
        count = prod(x.shape[3:])
        mean = x.sum(inner, keepdim=True).mean(2, keepdim=True) / count
        norms = torch.linalg.vector_norm(x, dim=inner, keepdim=True)
        variance = torch.relu((norms * norms).mean(2, keepdim=True) / count - mean * mean)
        scale = self.weight / torch.sqrt(variance + self.eps)
        return x * scale + (self.bias - mean * scale)


class OpenVinoNetwork:
    """A function from a batch to logits; several threads may call it at once.

    Parameters
    ----------
    network : in evaluation mode, on the CPU, returning one tensor
    patch_size : of every image
    in_channels : of every image
    precision : fp32 or bf16
    threads : CPU threads of all calls together
    at_once : how many calls may run side by side, with their share of the threads each
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: Sequence[int],
        in_channels: int,
        precision: str = "fp32",
        threads: int = 1,
        at_once: int = 1,
    ) -> None:
        model = convert(network, tuple(patch_size), in_channels, exact=precision == "fp32")
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": at_once,
            # Other programs may have the cores, and torch's threads are not pinned either.
            "ENABLE_CPU_PINNING": False,
        }
        self.model = openvino.Core().compile_model(model, "CPU", settings)
        self.output_shape = tuple(self.model.output(0).shape)
        self.idle: deque[Any] = deque()

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, in_channels, *patch) to float32 logits (n, n_outputs, *patch)."""
        from openvino import Tensor as View

        source = batch.detach().to("cpu", torch.float32).contiguous()
        logits = torch.empty(source.shape[0], *self.output_shape[1:])
        request = self._request()
        try:
            for image, target in zip(torch.split(source, 1), torch.split(logits, 1), strict=True):
                request.set_input_tensor(View(image.numpy(), shared_memory=True))
                request.set_output_tensor(View(target.numpy(), shared_memory=True))
                request.infer()
        finally:
            self.idle.append(request)
        return logits

    def _request(self) -> Any:
        try:
            return self.idle.popleft()
        except IndexError:
            return cast(Any, self.model.create_infer_request())
