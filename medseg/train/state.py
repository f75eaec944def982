"""The state of a run on disk: one file that appears whole, no pickle, and exact to the bit."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from medseg.errors import TrainingError
from medseg.files import atomic_path


@dataclass
class Progress:
    """Where a run is. The only mutable state of training besides tensors.

    Attributes
    ----------
    step : steps done
    elapsed_seconds : time spent in steps, over all resumed sessions
    best_score, best_epoch : the best moving average of the validation Dice, and when
    score : current moving average
    history : one row an epoch, as written to ``log.jsonl``
    ended : why the run is over; empty while it is not
    scaler : state of the gradient scaler (fp16 only)
    """

    step: int = 0
    elapsed_seconds: float = 0.0
    best_score: float = -1.0
    best_epoch: int = -1
    score: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""
    scaler: dict[str, Any] | None = None


def save_state(
    path: Path,
    network: nn.Module,
    average: nn.Module | None,
    optimizer: Optimizer,
    progress: Progress,
    key: str,
) -> None:
    """Write weights, averaged weights, optimiser and progress as one safetensors file, atomically.

    `key` names what the run was started with; :func:`load_state` refuses another.
    """
    tensors = {f"model/{name}": value for name, value in network.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    metadata = {"progress": json.dumps(asdict(progress)), "key": key}
    with atomic_path(path) as temporary:
        save_file(_detached(tensors), temporary, metadata)


def load_state(
    path: Path, network: nn.Module, average: nn.Module | None, optimizer: Optimizer, key: str
) -> Progress:
    """Restore what :func:`save_state` wrote.

    Raises
    ------
    TrainingError
        The file is damaged, or belongs to a run with another plan, recipe or network.
    """
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: checkpoint is damaged ({error}). Delete it and start again.") from error
    if metadata.get("key") != key:
        raise TrainingError(
            f"{path}: belongs to a run with another plan, recipe or split. "
            "Resume with the settings it was started with, or choose a new folder."
        )
    network.load_state_dict(_part(tensors, "model/"))
    if average is not None:
        average.load_state_dict(_part(tensors, "average/"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "optimizer/").items():
        index, slot = name.split("/")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**json.loads(metadata["progress"]))


def save_weights(path: Path, network: nn.Module) -> None:
    """Write only the weights, atomically."""
    with atomic_path(path) as temporary:
        save_file(_detached(network.state_dict()), temporary)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards `network`; the decay is smaller in the first steps so that it does not lag."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for mean, value in zip(average.buffers(), network.buffers(), strict=True):
        mean.copy_(value)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def frozen(parameters: Iterable[nn.Parameter]) -> None:
    """Switch off gradients."""
    for parameter in parameters:
        parameter.requires_grad_(False)
