"""Which backend runs a network faster on this machine: measured once, then remembered.

The file ``runtimes.json`` in the user's cache folder is only a memory: what is missing, unreadable or not
writable is no error.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import medseg
from medseg import log
from medseg.errors import MedsegError
from medseg.files import write_text
from medseg.infer import openvino
from medseg.infer.openvino import OpenVinoNetwork
from medseg.infer.runtime import Runtime, cpu_has_bf16, cpu_network, is_out_of_memory, torch_threads
from medseg.types import PathLike, Shape

FILE = "runtimes.json"
# Measuring the default 3D plan takes about eight CPU seconds and gains a fifth: not worth it below this.
WORTH_SECONDS = 30.0
# Multiplications (and additions) of one core, to estimate work; OpenVINO and oneDNN: 5e10 with AVX-512.
_PRODUCTS_PER_SECOND = 2.5e10
# Patches are halved for measuring down to this many voxels; ratios stay, as features exceed the caches.
_MEASURED_VOXELS = 1 << 18
# A second run tells what the first one, which also allocates, cannot.
_RUNS = 2
# Logits in float32 of both backends differ less than this part of their range, else OpenVINO is not used.
_TOLERANCE = 1e-3
# Entries kept: networks that a person uses on one machine, a few hundred bytes each.
_KEPT = 200

Measured = Literal["torch", "openvino"]
_known: dict[str, Measured] = {}


def fastest(
    runtime: Runtime,
    network: nn.Module,
    patch_size: Shape,
    in_channels: int,
    threads: int,
    work_voxels: int | None = None,
    cache: PathLike | None = None,
) -> Runtime:
    """Return `runtime` with the backend that is faster for this network on this CPU.

    bf16 turns into fp32 where the processor only emulates it, which is slower and less exact.

    Parameters
    ----------
    runtime : on a CPU; its backend is to be settled
    network : folded, in evaluation mode
    patch_size, in_channels, threads : as of `Runtime.prepare`
    work_voxels : voxels of all tiles to come; None for many. Where the work is short, a choice is looked
        up but not measured, and torch runs it
    cache : folder of the memory, None for the user's
    """
    if not cpu_has_bf16():
        runtime = replace(runtime, autocast=None)
    if not openvino.is_installed():
        log.logger.debug("OpenVINO is not installed: torch runs the network. %s.", openvino.REMEDY)
        return replace(runtime, backend="torch")
    folder = cache_folder() if cache is None else Path(cache)
    key = _key(runtime, network, patch_size, in_channels, threads)
    choice = _known.get(key) or _remembered(folder).get(key, {}).get("backend")
    if choice is None:
        if estimate_seconds(network, patch_size, in_channels, work_voxels) < WORTH_SECONDS:
            return replace(runtime, backend="torch")
        choice = _measure(runtime, network, patch_size, in_channels, threads, folder, key)
    _known[key] = choice
    return replace(runtime, backend=choice)


def estimate_seconds(
    network: nn.Module, patch_size: Shape, in_channels: int, work_voxels: int | None
) -> float:
    """Return about how many CPU seconds work takes; infinity where that is not known."""
    if work_voxels is None:
        return float("inf")
    multiples = getattr(network, "downsampling", None)
    # Without values a tile takes no time, but torch loads its compiler for it, a second of it.
    device = "meta" if multiples is None else "cpu"
    size = patch_size if multiples is None else _least_size(patch_size, multiples)
    weights = {name: value.to(device) for name, value in network.state_dict().items()}
    tile = torch.zeros(1, in_channels, *size, device=device)
    products: list[float] = []
    hooks = [
        module.register_forward_hook(lambda *call: products.append(_count_products(*call)))
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    try:
        with torch.inference_mode():
            torch.func.functional_call(network, weights, (tile,))
    except Exception as error:  # whatever a foreign network does on tensors without values
        log.logger.debug("The work of the network could not be counted (%s).", error)
        return float("inf")
    finally:
        for hook in hooks:
            hook.remove()
    return sum(products) / _PRODUCTS_PER_SECOND * work_voxels / prod(size)


def _least_size(patch_size: Shape, multiples: Shape) -> Shape:
    """Return the smallest tile that a U-Net takes: two voxels of its coarsest stage."""
    return tuple(min(size, 2 * multiple) for size, multiple in zip(patch_size, multiples, strict=True))


def _count_products(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """Return the multiplications of one layer."""
    weight = cast(Tensor, module.weight)
    if isinstance(module, nn.Linear):
        return weight.numel() * output.numel() / output.shape[-1]
    # Every voxel meets every weight: each of the output, or where it is larger than the input of the input.
    spread = bool(getattr(module, "transposed", False))
    return weight.numel() * (inputs[0] if spread else output)[0, 0].numel()


def cache_folder() -> Path | None:
    """Return where this platform keeps a user's caches of medseg; None for a user without home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    places = {"darwin": home / "Library" / "Caches", "win32": home / "AppData" / "Local"}
    return places.get(sys.platform, home / ".cache") / "medseg"


def _measure(
    runtime: Runtime,
    network: nn.Module,
    patch_size: Shape,
    in_channels: int,
    threads: int,
    folder: Path | None,
    key: str,
) -> Measured:
    """Run a tile in both, remember and return the faster one."""
    size = _measured_size(network, patch_size)
    tile = torch.randn(1, in_channels, *size, generator=torch.Generator().manual_seed(0))
    try:
        log.check_cancelled()
        compiled = OpenVinoNetwork(network, size, in_channels, runtime.precision, threads)
        plain = cpu_network(network, runtime.autocast)
        with torch.inference_mode(), torch_threads(threads), runtime.context():
            seconds, logits = _alternate({"torch": plain, "openvino": compiled}, tile)
    except Exception as error:  # a network that it cannot convert, in any of its libraries' words
        if is_out_of_memory(error):
            raise
        log.logger.debug("OpenVINO does not run this network (%s): torch does.", error)
        return "torch"
    trusted = _agree(logits["torch"], logits["openvino"]) or runtime.autocast is not None
    choice: Measured = "openvino" if trusted and seconds["openvino"] < seconds["torch"] else "torch"
    log.logger.debug("Seconds a tile of %s: %s; %s runs the network.", size, seconds, choice)
    _remember(folder, key, {"backend": choice, "seconds": seconds, "tile": list(size)})
    return choice


def _measured_size(network: nn.Module, patch_size: Shape) -> Shape:
    """Return the size to measure: smaller than the patch where the network takes any multiple."""
    size = list(patch_size)
    for axis, multiple in enumerate(getattr(network, "downsampling", ())):
        if prod(size) > _MEASURED_VOXELS and size[axis] % (2 * multiple) == 0 and size[axis] > 2 * multiple:
            size[axis] //= 2
    return tuple(size)


def _alternate(
    calls: dict[str, Callable[[Tensor], Any]], tile: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the least seconds that each call took, in turns, and its logits."""
    seconds = dict.fromkeys(calls, float("inf"))
    logits = {}
    for _ in range(_RUNS):
        for name, call in calls.items():
            log.check_cancelled()
            start = perf_counter()
            outputs = call(tile)
            seconds[name] = min(seconds[name], perf_counter() - start)
            logits[name] = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return seconds, logits


def _agree(one: Tensor, other: Tensor) -> bool:
    span = float(one.abs().max())
    return bool(torch.isfinite(other).all()) and float((one - other).abs().max()) <= _TOLERANCE * span


def _key(runtime: Runtime, network: nn.Module, patch_size: Shape, in_channels: int, threads: int) -> str:
    """Return what names one network, tile, machine and set of versions."""
    shapes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    machine = (platform.node(), platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability())
    versions = (medseg.__version__, torch.__version__, openvino.version())
    wanted = (type(network).__name__, shapes, patch_size, in_channels, threads, runtime.precision)
    return hashlib.sha256(repr((machine, versions, wanted)).encode()).hexdigest()[:32]


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def _remembered(folder: Path | None) -> dict[str, Any]:
    """Return the valid entries of the memory."""
    if folder is None:
        return {}
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: entry
        for key, entry in entries.items()
        if isinstance(entry, dict) and entry.get("backend") in ("torch", "openvino")
    }


def _remember(folder: Path | None, key: str, entry: dict[str, Any]) -> None:
    if folder is None:
        return
    entries = _remembered(folder)
    entries.pop(key, None)
    newest = dict([*entries.items(), (key, entry)][-_KEPT:])
    with suppress(OSError, MedsegError):
        write_text(folder / FILE, json.dumps(newest, indent=1))
