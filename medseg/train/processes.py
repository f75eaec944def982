"""Device, precision and processes of a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from medseg.errors import ConfigError, TrainingError
from medseg.infer import choose_device, cpu_has_bf16
from medseg.train.config import TrainConfig

LOCK_FILE = "running.lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, so that no second training writes to it and `medseg stop` finds it.

    Raises
    ------
    TrainingError
        Another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as lock:
        if not _lock(lock):
            raise TrainingError(f"{folder}: another training is at work here. Wait for it or choose another.")
        yield
    (folder / LOCK_FILE).unlink(missing_ok=True)


def is_claimed(folder: Path) -> bool:
    """Return whether a living process trains in a folder."""
    if not (folder / LOCK_FILE).exists():
        return False
    with open(folder / LOCK_FILE, "a") as lock:
        return not _lock(lock)


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # on Windows nothing is locked
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def launch(config: TrainConfig, batch_size: int, device: str) -> Any:
    """Start Fabric on a device, in every process of a `torchrun`.

    Raises
    ------
    ConfigError
        The device is not there, or the batch cannot be shared evenly.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

    if config.threads:
        torch.set_num_threads(config.threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun, and by nothing else here
    if batch_size % world:
        raise ConfigError(
            f"batch_size {batch_size} cannot be shared by {world} processes. "
            f"Set batch_size={-(-batch_size // world) * world}."
        )
    accelerator = choose_device(device).type
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(1, world // local),
        strategy="ddp" if world > 1 else "auto",
        precision=_precision(config.precision, accelerator),
    )
    fabric.launch()
    return fabric


def _precision(wanted: str, accelerator: str) -> Any:
    if wanted == "auto":
        if accelerator == "cuda":
            wanted = "fp16"
        else:
            wanted = "bf16" if accelerator == "cpu" and cpu_has_bf16() else "fp32"
    return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[wanted]
