"""nnU-Net's ``.pth`` checkpoints: tensors and plain values are taken out, nothing in them is ever run.

A ``.pth`` is a pickle, which can name any function and call it. torch's ``weights_only`` reader knows only
what rebuilds tensors and plain containers; to that :data:`ALLOWED` adds what nnU-Net 2.0 to 2.8 writes, the
scalars of NumPy in its training log. A file that names anything else is refused by that name.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from medseg.errors import BundleError
from medseg.nets import build_network
from medseg.plan.schema import Architecture

# Kinds of NumPy scalars; none is of objects.
_KINDS = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# What a pickled NumPy scalar calls to become one again: `scalar` of NumPy's private `multiarray`.
_SCALAR: Any = np.float32(0).__reduce__()[0]
# NumPy 2 moved `numpy.core` to `numpy._core`; files of both ages name the same function.
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in _KINDS),
]
# torch stores tensors as they are; what unpacks to more than its file was made by somebody else. The rest
# is for the pickle, which tools other than torch may have deflated.
MAX_GROWTH_BYTES = 64 * 2**20

# Wrappers of DistributedDataParallel and torch.compile.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_ALIAS = re.compile(r"decoder\.encoder\.|.*\.all_modules\.")

# How a file begins: a zip, which torch writes today, and the number that it wrote before.
_ZIP = b"PK"
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"
HEAD_BYTES = len(_OLD_FORMAT)


@dataclass(frozen=True)
class Checkpoint:
    """What nnU-Net's prediction reads of a checkpoint.

    Attributes
    ----------
    weights : by name, without wrappers and aliases; on the CPU, perhaps mapped from the file
    trainer : name of the trainer class
    configuration : of the plan
    mirror_axes : patch axes that may be flipped; none if the checkpoint says so
    epochs : that were trained, where known
    """

    weights: Mapping[str, Tensor]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]
    epochs: int | None


def read_checkpoint(source: Path | bytes, where: str) -> Checkpoint:
    """Read a checkpoint of nnU-Net v2 without running anything in it.

    Parameters
    ----------
    source : its path (weights are then mapped, so the optimizer's state is not read), or its content
    where : what to call it in errors

    Raises
    ------
    BundleError
        It is empty, damaged, not of nnU-Net v2, names something that is not data, or holds a weight that is
        no finite number.
    """
    content = _load(source, where)
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), Mapping):
        raise BundleError(_not_nnunet(content, where))
    arguments = content.get("init_args")
    configuration = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    trainer = content.get("trainer_name")
    if not isinstance(configuration, str) or not isinstance(trainer, str):
        raise BundleError(
            f"{where}: does not say its trainer and configuration (keys trainer_name and init_args). "
            "Pass a checkpoint that nnU-Net v2 wrote."
        )
    epochs = content.get("current_epoch")
    return Checkpoint(
        _plain(content["network_weights"], where),
        trainer,
        configuration,
        _mirror_axes(content.get("inference_allowed_mirroring_axes"), where),
        epochs if isinstance(epochs, int) else None,
    )


def _load(source: Path | bytes, where: str) -> Any:
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if not size:
        raise BundleError(f"{where}: is empty. Copy it again.")
    stream: Path | IO[bytes] = source if isinstance(source, Path) else BytesIO(source)
    head = _head(source, where)
    # Mapping takes bytes as they lie in the file: not those that another tool deflated.
    mapped = zipfile.is_zipfile(stream) and _is_stored(stream, size, where) and isinstance(source, Path)
    file = str(source) if isinstance(source, Path) else BytesIO(source)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # torch on its own old formats
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise BundleError(refusal(error, head, where)) from error


def _head(source: Path | bytes, where: str) -> bytes:
    if isinstance(source, bytes):
        return source[:HEAD_BYTES]
    try:
        with source.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{where}: cannot be read ({reason}). Check its permissions.") from error


def _is_stored(stream: Path | IO[bytes], size: int, where: str) -> bool:
    """Return whether nothing in a packed checkpoint is compressed; refuse one that grows too much."""
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BundleError(f"{where}: is cut off or damaged. Copy it again.") from error
    unpacked = sum(member.file_size for member in members)
    if unpacked > size + MAX_GROWTH_BYTES:
        raise BundleError(f"{where}: unpacks from {size} to {unpacked} bytes. Do not trust this file.")
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def refusal(error: Exception, head: bytes, where: str) -> str:
    """Return why torch's reader stopped: at something that is not data, at damage, or at another file.

    Parameters
    ----------
    error : of ``torch.load`` with ``weights_only``
    head : how the file begins, :data:`HEAD_BYTES` of it
    where : what to call it
    """
    pattern = r"GLOBAL (\S+)|(?:<(?:class|function|built-in function) '?([\w.]+))"
    named = re.search(pattern, str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if named is None:
        return f"{where}: {_fault(head)}"
    return (
        f"{where}: refused, since it names {named.group(1) or named.group(2)}, which is not data: loading it "
        "could run code. Nothing was run; do not trust this file, or save only its weights again."
    )


def _fault(head: bytes) -> str:
    """Return what is wrong with a file that names nothing forbidden, and still cannot be read."""
    if head.startswith((_ZIP, _OLD_FORMAT)):
        return "is cut off or damaged. Copy it again."
    if head.startswith(_PICKLE):
        return "is a pickle of something else, no checkpoint of torch. Pass a file that torch.save wrote."
    return "is no checkpoint, or damaged from its beginning. Pass a file that torch.save wrote."


def _not_nnunet(content: Any, where: str) -> str:
    hint = "Pass a checkpoint that nnU-Net v2 wrote."
    if isinstance(content, dict) and "state_dict" in content:
        return f"{where}: is no checkpoint of nnU-Net v2 (it looks like one of version 1). {hint}"
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
    return f"{where}: has no network_weights (found {found or 'nothing'}). {hint}"


def _plain(weights: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in weights.items():
        plain = _WRAPPERS.sub("", name) if isinstance(name, str) else ""
        if _ALIAS.match(plain):
            continue
        if not plain or not _is_dense(value):
            raise BundleError(f"{where}: weight {name!r} is no tensor of numbers. Copy or export it again.")
        result[plain] = value.detach()
    return result


def _is_dense(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and (value.is_floating_point() or value.dtype == torch.int64)
        and not value.is_quantized
    )


def _mirror_axes(axes: Any, where: str) -> tuple[int, ...]:
    if axes is None:
        return ()
    if not isinstance(axes, tuple | list) or any(type(axis) is not int or not 0 <= axis < 3 for axis in axes):
        raise BundleError(
            f"{where}: inference_allowed_mirroring_axes is {_short(repr(axes))}; expected axes among 0, 1, 2."
        )
    return tuple(axes)


def first_misfit(
    weights: Mapping[str, Tensor], architecture: Architecture, in_channels: int, n_outputs: int
) -> str | None:
    """Return in words the first weight that the planned network does not take, or None.

    Shapes are compared with a network that has no memory.
    """
    with torch.device("meta"):
        expected = build_network(architecture, in_channels, n_outputs).state_dict()
    statistics = next((name for name in weights if name.endswith("running_mean")), None)
    if statistics is not None:
        return f"{statistics} belongs to batch norm, the plan has instance norm"
    for name, value in expected.items():
        if name not in weights:
            return f"{name} is missing"
        if weights[name].shape != value.shape:
            return _wrong_shape(name, tuple(weights[name].shape), tuple(value.shape))
    extra = next((name for name in weights if name not in expected), None)
    return None if extra is None else f"{extra} is not part of that network"


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first weight that holds NaN or infinity, or None."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def _wrong_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if name.startswith("decoder.seg_layers.") and len(found) and found[1:] == expected[1:]:
        return f"{name} has {found[0]} outputs, dataset.json has labels for {expected[0]}"
    if len(found) == len(expected) and found[:1] + found[2:] == expected[:1] + expected[2:]:
        return f"{name} takes {found[1]} channels, plan and dataset.json say {expected[1]}"
    return f"{name} is {_sizes(found)}, expected {_sizes(expected)}"


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:120]}..."
