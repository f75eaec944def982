"""Where and how a network runs: device, number format, threads."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from medseg.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

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
        raise ConfigError(f"device {name!r}: this machine or this build of torch has none. Use --device cpu.")
    return device


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return bool(flags or tiles)


def set_threads(count: int | None) -> int:
    """Let torch compute on `count` threads (None: every core this process may use); return the count."""
    if count is not None and count < 1:
        raise ConfigError(f"threads {count}: expected at least 1.")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = count or available
    torch.set_num_threads(chosen)
    return chosen
