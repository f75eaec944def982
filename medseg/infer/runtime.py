"""Where and how a network runs: device, number format, threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from medseg.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
T = TypeVar("T")
R = TypeVar("R")

_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the type that autocast computes in; None is float32 throughout."""

    device: torch.device
    autocast: torch.dtype | None

    def context(self) -> Any:
        """Return the context manager under which a network is called."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def choose_runtime(device: str = "auto", precision: str = "auto") -> Runtime:
    """Settle device and precision.

    Parameters
    ----------
    device : auto (CUDA where there is one), cpu, cuda, cuda:1, mps
    precision : fp32, bf16, fp16, or auto: fp16 on CUDA as nnU-Net, on a CPU bf16 where the processor
        multiplies it natively, else fp32

    Raises
    ------
    ConfigError
        The device is not there, or the precision is unknown or not possible on it.
    """
    chosen = choose_device(device)
    if precision == "auto":
        precision = {"cuda": "fp16", "cpu": "bf16" if cpu_has_bf16() else "fp32"}.get(chosen.type, "fp32")
    if precision not in _DTYPES:
        raise ConfigError(f"precision {precision!r}: expected auto, {', '.join(_DTYPES)}.")
    if precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("precision fp16: a CPU does not compute in it. Use bf16 or fp32.")
    return Runtime(chosen, _DTYPES[precision])


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


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` in the order of `items`; `workers` threads run a little ahead.

    One operation then takes one core, so no thread waits for another inside it: on small tensors torch's
    own threads spend half their time spinning at barriers.
    """
    if workers == 1:
        yield from map(function, items)
        return
    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
