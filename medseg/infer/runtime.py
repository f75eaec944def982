"""Where and how a network runs: device, number format, program, threads, memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from medseg import log
from medseg.errors import ConfigError
from medseg.infer.openvino import REMEDY, OpenVinoNetwork, is_installed
from medseg.nets.fused import channels_last, fold
from medseg.types import PathLike

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "torch", "openvino"]

_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Features of a tile: about four maps of 32 float32 channels at once.
BYTES_PER_VOXEL = 512
# Tiles run side by side on a CPU up to this estimate of their memory.
TILE_MEMORY_BYTES = 3 << 29
# The part of free GPU memory that a batch of tiles may take; the allocator needs room between blocks.
_CUDA_PART = 0.6
# Compiling takes about a minute on a GPU that needs tens of milliseconds a tile: from this many voxels on.
_COMPILE_VOXELS = 1 << 31
# What libraries say when memory runs out, in lower case: CUDA, cuBLAS, cuDNN, MPS, torch on a CPU, C++.
_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "bad_alloc", "failed to allocate")


@dataclass(frozen=True)
class Runtime:
    """A device, the type to compute in, and the program that does it.

    Attributes
    ----------
    autocast : bfloat16 or float16; None is float32 throughout
    backend : torch, openvino, or auto: what :meth:`prepare` measures or remembers to be faster
    """

    device: torch.device
    autocast: torch.dtype | None
    backend: Backend = "torch"

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.autocast)

    def context(self) -> Any:
        """Return the context manager under which a network of torch is called."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def prepare(
        self,
        network: nn.Module,
        patch_size: Sequence[int],
        in_channels: int,
        threads: int,
        *,
        n_outputs: int = 1,
        work_voxels: int | None = None,
        cache: PathLike | None = None,
    ) -> "Ready":
        """Return the function that a sliding window calls; several threads may call it at once.

        Parameters
        ----------
        network : on `device`; is not changed and, on a CPU, not needed afterwards
        patch_size : of every image in a batch
        in_channels : of every image
        threads : CPU threads of all calls together
        n_outputs : that the network returns
        work_voxels : voxels of all tiles and flips to come, None for many; for few nothing is measured
        cache : folder that remembers which backend is faster; None is the user's cache folder

        Raises
        ------
        ConfigError
            OpenVINO was asked for and is not installed, or cannot run this network.
        """
        network = network.eval()
        if self.device.type != "cpu":
            compiled = self.device.type == "cuda" and (work_voxels or 0) >= _COMPILE_VOXELS
            return Ready(replace(self, backend="torch"), _compiled(network) if compiled else network)
        network, settled = fold(network).eval(), self
        if self.backend == "auto":
            from medseg.infer.choice import fastest

            settled = fastest(self, network, tuple(patch_size), in_channels, threads, work_voxels, cache)
        if settled.backend == "openvino":
            at_once = tiles_at_once(prod(patch_size), n_outputs, threads)
            arguments = (tuple(patch_size), in_channels, settled.precision, threads, at_once)
            return Ready(settled, _openvino_network(network, *arguments))
        return Ready(settled, cpu_network(network, settled.autocast))


@dataclass(frozen=True)
class Ready:
    """A network in its runtime, from a batch (n, c, ...) to logits.

    Attributes
    ----------
    runtime : that was settled on; its backend is torch or openvino
    """

    runtime: Runtime
    network: Callable[[Tensor], Any]

    def __call__(self, batch: Tensor) -> Any:
        """Return logits (n, n_outputs, ...), or a list with these first."""
        if self.runtime.backend == "openvino":
            return self.network(batch)
        with self.runtime.context():
            return self.network(batch)


def cpu_network(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return `network` in the form that torch runs fastest on a CPU; the same one where there is no better.

    Parameters
    ----------
    network : in evaluation mode
    dtype : bfloat16, or None for float32
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return network
    faster = channels_last(fold(network), dtype or torch.float32)
    return faster.eval()


def _openvino_network(network: nn.Module, *arguments: Any) -> OpenVinoNetwork:
    try:
        return OpenVinoNetwork(network, *arguments)
    except Exception as error:  # in the words of any of its libraries
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0]
        name = type(network).__name__
        raise ConfigError(f"runtime openvino: cannot run {name} ({first}). Use runtime torch.") from error


def _compiled(network: nn.Module) -> Callable[[Tensor], Any]:
    """Return a compiled network that turns back into itself where compiling fails."""
    compiled: list[Callable[[Tensor], Any]] = [torch.compile(network)]

    def call(batch: Tensor) -> Any:
        try:
            return compiled[0](batch)
        except Exception as error:
            if compiled[0] is network or is_out_of_memory(error):
                raise
            log.logger.debug("torch.compile failed (%s): going on without.", error)
            compiled[0] = network
            return network(batch)

    return call


def choose_runtime(device: str = "auto", precision: str = "auto", runtime: str = "torch") -> Runtime:
    """Settle device, precision and backend.

    Parameters
    ----------
    device : auto (CUDA where there is one), cpu, cuda, cuda:1, mps
    precision : fp32, bf16, fp16, or auto: fp16 on CUDA as nnU-Net, on a CPU bf16 where the processor
        multiplies it natively, else fp32
    runtime : torch, openvino (CPU only), or auto: on a CPU the faster of both for the network

    Raises
    ------
    ConfigError
        The device is not there; precision or runtime is unknown, not possible on it or not installed.
    """
    chosen = choose_device(device)
    if precision == "auto":
        precision = {"cuda": "fp16", "cpu": "bf16" if cpu_has_bf16() else "fp32"}.get(chosen.type, "fp32")
    if precision not in _DTYPES:
        raise ConfigError(f"precision {precision!r}: expected auto, {', '.join(_DTYPES)}.")
    if precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("precision fp16: a CPU does not compute in it. Use bf16 or fp32.")
    return Runtime(chosen, _DTYPES[precision], _choose_backend(runtime, chosen))


def _choose_backend(runtime: str, device: torch.device) -> Backend:
    if runtime not in get_args(Backend):
        raise ConfigError(f"runtime {runtime!r}: expected {', '.join(get_args(Backend))}.")
    if runtime == "openvino" and device.type != "cpu":
        raise ConfigError(f"runtime openvino: runs on a CPU, not on {device}. Use device cpu.")
    if runtime == "openvino" and not is_installed():
        raise ConfigError(f"runtime openvino: the package is not installed. {REMEDY}.")
    return cast(Backend, runtime) if device.type == "cpu" else "torch"


def tiles_at_once(voxels: int, n_outputs: int, threads: int) -> int:
    """Return how many tiles of a CPU's threads run side by side; large tiles take all threads one by one."""
    room = TILE_MEMORY_BYTES // (voxels * (BYTES_PER_VOXEL + 4 * n_outputs))
    return max(1, min(threads, room))


def tile_batch(device: torch.device, bytes_per_tile: int, most: int = 16) -> int:
    """Return how many tiles go through the network at once: what fits into free CUDA memory, else 1."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator holds and does not use is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(most, int(_CUDA_PART * free) // max(1, bytes_per_tile)))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def choose_device(name: str = "auto") -> torch.device:
    """Return the torch device; "auto" is CUDA where there is one, else the CPU.

    Raises
    ------
    ConfigError
        The device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ConfigError(f"device {name!r}: this machine or this build of torch has none. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()}, counted from 0.")
    return device


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return bool(flags or tiles)


def count_threads(wanted: int | None) -> int:
    """Return `wanted`, or the number of cores that this process may use.

    Raises
    ------
    ConfigError
        `wanted` is less than 1.
    """
    if wanted is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted < 1:
        raise ConfigError(f"threads {wanted}: expected at least 1.")
    return wanted


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch split one operation among `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
