"""MONAI bundles come in: a segmentation model of the Model Zoo becomes a value that holds no code.

::

    configs/metadata.json              channels and labels by name
    configs/inference.json (or .yaml)  network, preprocessing, inferer, postprocessing
    models/model.pt                    weights

What is understood is listed in this file: networks, transforms and inferers that belong to MONAI, with
arguments that are data. The bundle's own Python, TorchScript, pickled objects and expressions are refused.

Source of the layout: MONAI ``bundle/properties.py`` and the bundles of Project-MONAI/model-zoo.
"""

import contextlib
import hashlib
import inspect
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medseg.archive import Files, Limits, open_files
from medseg.config import parse_mapping
from medseg.errors import BundleError, ConfigError
from medseg.exchange.monai_config import Component, MonaiConfig
from medseg.exchange.monai_decision import Decision, read_decision
from medseg.labels import LabelSet
from medseg.types import PathLike

if TYPE_CHECKING:
    from torch import Tensor, nn

_METADATA = "configs/metadata.json"
_INFERENCE = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
_MEMBER = re.compile(r"([^/]+/)?(configs/(metadata\.json|inference\.(json|ya?ml))|models/[\w.-]+)")
_LIMITS = Limits(
    members=_MEMBER,
    weights=re.compile(r"([^/]+/)?models/[\w.-]+"),
    strangers=True,
    depth=2,
    text_bytes=4 * 2**20,
    kind="a MONAI bundle",
)
NETWORKS = (
    *("AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "FlexibleUNet", "SegResNet"),
    *("SegResNetDS", "SwinUNETR", "UNETR", "UNet", "VNet"),
)
# Arguments of older MONAI that change nothing of a network whose weights are loaded.
_OBSOLETE = {"SwinUNETR": ("img_size",), "UNETR": ("pos_embed",), "FlexibleUNet": ("pretrained",)}
# More features, or a larger image, than any published network has; memory would run out first.
_LARGEST_ARGUMENT = 4096

_READING = ("LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd")
"""What medseg has done when it has read a volume."""
TRANSFORMS = (
    *("CastToTyped", "CenterScaleCropd", "CenterSpatialCropd", "ClipIntensityPercentilesd"),
    *("CropForegroundd", "DivisiblePadd", "EnsureTyped", "NormalizeIntensityd", "Orientationd"),
    *("ResizeWithPadOrCropd", "Resized", "ScaleIntensityRangePercentilesd", "ScaleIntensityRanged"),
    *("ScaleIntensityd", "Spacingd", "SpatialPadd", "ThresholdIntensityd"),
)
_SAME = {"ToTensord": "EnsureTyped"}
# Where data is and what is written down about it: medseg decides that.
_IGNORED = {
    *("allow_missing_keys", "data_type", "device", "end_coord_key", "lazy", "meta_key_postfix", "meta_keys"),
    *("start_coord_key", "track_meta", "wrap_sequence"),
}
_PADDING = ("constant_values", "value")
_INFERERS = {
    "SlidingWindowInferer": "SlidingWindowInferer",
    "SlidingWindowInfererAdapt": "SlidingWindowInferer",
    "SliceInferer": "SliceInferer",
    "SimpleInferer": "SimpleInferer",
}
# Set by medseg, or of no effect on the result.
_INFERER_IGNORED = {"device", "sw_device", "progress", "cache_roi_weight_map", "cpu_thresh"}
_STATE_KEYS = ("model", "state_dict", "net", "network")

StateDict = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Call:
    """A class of MONAI and the arguments to build it with; plain data.

    Attributes
    ----------
    name : of the class
    arguments : by name
    key : where the configuration asks for it
    """

    name: str
    arguments: Mapping[str, Any]
    key: str = ""


@dataclass(frozen=True)
class MonaiModel:
    """A segmentation bundle of MONAI, ready to predict.

    Attributes
    ----------
    channels : names of the image channels, in the network's order
    labels : meaning of the label map
    network, inferer : classes of MONAI with their arguments
    preprocessing : transforms of MONAI, after reading
    decision : from the network's outputs to labels
    outputs : channels of the network's output
    weights : loads the state dict (nothing is read before it is called)
    amp : whether the bundle wants 16-bit numbers on a GPU
    path, digest : where it came from, and the SHA-256 of what was used of it
    """

    channels: tuple[str, ...]
    labels: LabelSet
    network: Call
    preprocessing: tuple[Call, ...]
    inferer: Call
    decision: Decision
    outputs: int
    weights: Callable[[], StateDict]
    amp: bool = False
    path: Path | None = None
    digest: str = ""

    def __str__(self) -> str:
        return str(self.path) if self.path else f"MONAI {self.network.name}"


def is_monai_bundle(path: PathLike) -> bool:
    """Return whether a folder or zip has the layout of a MONAI bundle; nothing of it is trusted or read."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (_METADATA, *_INFERENCE))
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_MEMBER.fullmatch(name) and "configs/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return False


def load_monai_bundle(path: PathLike) -> MonaiModel:
    """Read a segmentation bundle without running anything of it.

    Parameters
    ----------
    path : folder or zip with ``configs`` and ``models``

    Raises
    ------
    BundleError
        A file is missing, damaged or too large; or what prediction needs is code, or a network, transform or
        inferer that medseg does not know.
    """
    path = Path(path)
    files = open_files(path, _LIMITS)
    names = files.names()
    root = _root(names, path)
    inference = next((root + name for name in _INFERENCE if root + name in names), None)
    if inference is None:
        raise BundleError(f"{path}: has no {_INFERENCE[0]}, so MONAI could not predict either. Add it.")
    config = MonaiConfig(
        {**_parse(files, inference), "bundle_root": "."}, f"{path}, {inference.removeprefix(root)}"
    )
    metadata = _parse(files, root + _METADATA) if root + _METADATA in names else {}
    if "medseg" in metadata:
        raise BundleError(
            f"{path}: was exported by medseg and runs its code (scripts). Pass the bundle that it was made "
            "from."
        )
    weights = _find_weights(config, names, root, path)
    network = _network(config)
    preprocessing, image_key = _preprocessing(config)
    outputs, channels = _sizes(config, network)
    decision, labels = read_decision(config, _names(metadata, "outputs", "pred", outputs))
    used = sorted(name for name in (inference, root + _METADATA, weights) if name in names)
    return MonaiModel(
        channels=tuple(_names(metadata, "inputs", image_key, channels)),
        labels=labels,
        network=network,
        preprocessing=preprocessing,
        inferer=_inferer(config, network),
        decision=decision,
        outputs=outputs,
        weights=_loader(files, weights, path),
        amp=_lenient(config, "evaluator", "amp") is True,
        path=path,
        digest=_digest(files, used),
    )


# --- files


def _root(names: Iterable[str], path: Path) -> str:
    """Return the folder inside a zip (or "") that holds ``configs``."""
    roots = {name[: name.index("configs/")] for name in names if "configs/" in name}
    if not roots:
        raise BundleError(
            f"{path}: has no {_METADATA} and no {_INFERENCE[0]}, so it is no MONAI bundle. Check the path."
        )
    return min(roots, key=len)


def _parse(files: Files, name: str) -> dict[str, Any]:
    try:
        with files.open(name) as stream:
            return parse_mapping(stream.read().decode("utf-8-sig"), f"{files.path}, {name}")
    except ConfigError as error:
        raise BundleError(str(error)) from error
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise BundleError(f"{files.path}: {name} cannot be read ({error}). Download it again.") from error


def _digest(files: Files, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        with files.open(name) as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def _find_weights(config: MonaiConfig, names: set[str], root: str, path: Path) -> str:
    """Return the file that the bundle's CheckpointLoader would read, or ``models/model.pt``."""
    wanted = "models/model.pt"
    handlers = config.data.get("handlers")
    loaders = [config.data.get("checkpointloader"), *(handlers if isinstance(handlers, list) else ())]
    for loader in loaders:
        if isinstance(loader, Mapping) and str(loader.get("_target_", "")).endswith("CheckpointLoader"):
            named = config.value(loader.get("load_path"), "checkpointloader::load_path")
            wanted = "models/" + re.sub(r".*[/\\]", "", str(named))
            break
    if root + wanted in names and not wanted.endswith(".ts"):
        return root + wanted
    there = sorted(name.removeprefix(root) for name in names if "models/" in name)
    if any(name.endswith(".ts") for name in there):
        raise BundleError(
            f"{path}: has no weights but TorchScript ({', '.join(there)}), which is a program, and medseg "
            "does not run code from bundles. Get the bundle with its models/model.pt."
        )
    raise BundleError(
        f"{path}: {wanted} is missing (found: {', '.join(there) or 'no models'}). The Model Zoo keeps "
        "weights apart: download the bundle with monai.bundle.download, or add the file."
    )


def _loader(files: Files, name: str, path: Path) -> Callable[[], StateDict]:
    def load() -> StateDict:
        import torch

        from medseg.exchange.checkpoint import HEAD_BYTES, refusal

        head = b""
        try:
            with files.open(name) as stream:
                seekable = stream if files.local(name) else io.BytesIO(stream.read())
                head = seekable.read(HEAD_BYTES)
                _check_checkpoint(seekable, f"{path}: {name}")
                data = torch.load(seekable, map_location="cpu", weights_only=True)
        except (MemoryError, BundleError):
            raise
        except Exception as error:  # whatever a hostile file provokes in the reader
            raise BundleError(refusal(error, head, f"{path}: {name}")) from error
        return _state_dict(data, f"{path}: {name}")

    return load


def _check_checkpoint(stream: IO[bytes], where: str) -> None:
    """Refuse what torch never writes for a state dict: the members of a program, and compressed tensors."""
    size = stream.seek(0, io.SEEK_END)
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("constants.pkl") for member in members):
            raise BundleError(
                f"{where} is TorchScript, which is a program, and medseg does not run code from bundles. "
                "Save the network's state_dict with torch.save instead."
            )
        if sum(member.file_size for member in members) > size:
            raise BundleError(f"{where} unpacks to more than it is. Do not trust this bundle.")
    stream.seek(0)


def _state_dict(data: Any, where: str) -> StateDict:
    """Return the tensors of a checkpoint, which may be the state dict or hold it under a usual name."""
    import torch

    for key in _STATE_KEYS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    plain = isinstance(data, Mapping) and all(
        isinstance(key, str) and type(value) in (torch.Tensor, torch.nn.Parameter)
        for key, value in data.items()
    )
    if not plain or not data:
        raise BundleError(f"{where} holds no state dict (tensors by name). Save the network's state_dict.")
    return dict(data)


# --- what the network takes and returns


def _sizes(config: MonaiConfig, network: Call) -> tuple[int, int]:
    """Return the numbers of output and input channels."""
    sizes = []
    parameters = inspect.signature(_class("monai.networks.nets", network.name)).parameters
    for argument in ("out_channels", "in_channels"):
        size = network.arguments.get(argument, parameters[argument].default)
        if type(size) is not int or size < 1:
            raise config.fault(f"{network.key}::{argument} is {size!r}; expected a number. Mend it.")
        sizes.append(size)
    return sizes[0], sizes[1]


def _names(metadata: Mapping[str, Any], kind: str, key: str, count: int) -> list[str]:
    """Return the names of channels from the metadata, all different; what it does not name is numbered."""
    node: Any = metadata.get("network_data_format")
    for part in (kind, key, "channel_def"):
        node = node.get(part) if isinstance(node, Mapping) else None
    given = {str(number): str(name) for number, name in node.items()} if isinstance(node, Mapping) else {}
    names: list[str] = []
    for number in range(count):
        word = "label" if kind == "outputs" else "channel"
        name = " ".join(given.get(str(number), f"{word}_{number}").split())[:100]
        reserved = kind == "outputs" and (name == "ignore" or (number > 0 and name == "background"))
        names.append(f"{name}_{number}" if name in names or reserved or not name else name)
    return names


# --- the parts of the configuration


def _class(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(module), name, None)


def _call(config: MonaiConfig, component: Component, module: str, name: str, arguments: Any) -> Call:
    """Check arguments against the signature of MONAI's class, and that they are plain data."""
    kind = _class(module, name)
    if kind is None:
        raise config.fault(f"{component.key} needs MONAI's {name}. Install a newer MONAI.")
    call = Call(name, arguments, component.key)
    parameters = inspect.signature(kind).parameters
    for argument, value in arguments.items():
        if argument not in parameters and not (argument in _PADDING and "Pad" in name):
            raise config.fault(
                f"{component.key} gives {argument!r}, which {name} of this MONAI does not take. "
                "Remove it, or use the MONAI that the bundle names."
            )
        if not _is_plain(value):
            raise config.fault(f"{component.key}::{argument} is no plain value. Mend it.")
    return call


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return (
        value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    )


def _network(config: MonaiConfig) -> Call:
    key = "network_def" if "network_def" in config else "network"
    if key not in config:
        raise config.fault("has no network_def, so there is nothing to predict with. Add it.")
    _check_use(config)
    component = config.component(config.outline(key), key)
    if component is None:
        raise config.fault(f"{key} is disabled. Remove its _disabled_.")
    name = config.known(component, NETWORKS, "network")
    obsolete = (*_OBSOLETE.get(name, ()), "device")
    wanted = {word: value for word, value in component.arguments.items() if word not in obsolete}
    arguments = {word: config.value(value, f"{key}::{word}") for word, value in wanted.items()}
    for word, value in arguments.items():
        if any(abs(number) > _LARGEST_ARGUMENT for number in _numbers(value)):
            raise config.fault(f"{key}::{word} is too large. Do not trust this bundle.")
    return _call(config, component, "monai.networks.nets", name, arguments)


def _check_use(config: MonaiConfig) -> None:
    """Refuse a network that is changed after it has been built; ``$@network_def.to(@device)`` is not."""
    use = config.data.get("network")
    if "network_def" not in config or not isinstance(use, str):
        if isinstance(use, str) and "jit" in use:
            raise config.fault(
                f"network is TorchScript ({use[:80]!r}), which is a program, and medseg does not "
                "run code from bundles. Describe it by a network_def, with its state dict in models/model.pt."
            )
        return
    harmless = r"\$?@network_def(\.to\(@?[\w'\":]+\)|\.eval\(\))*"
    if not re.fullmatch(harmless, use.replace(" ", "")):
        raise config.refused("network", use)


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return (number for item in value for number in _numbers(item))
    return (value,) if isinstance(value, int | float) else ()


def _preprocessing(config: MonaiConfig) -> tuple[tuple[Call, ...], str]:
    """Return the transforms after reading, and under which key the configuration has the image."""
    if "preprocessing" not in config:
        raise config.fault("has no preprocessing. Name the transforms there.")
    steps = config.chain("preprocessing")
    reading = [step for step in steps if step.name in _READING]
    image = config.keys((reading or steps)[0])[0] if steps else "image"
    calls = []
    for step in steps:
        name = config.known(step, (*TRANSFORMS, *_READING, *_SAME), "transform")
        keys = config.keys(step)
        if image in keys and name not in _READING:
            calls.append(_transform(config, step, _SAME.get(name, name), keys, image))
        elif image not in keys and "label" not in keys:
            raise config.fault(
                f"{step.key} works on {', '.join(keys)}, not on {image!r}. medseg takes bundles "
                "with one image, whose channels are files of their own."
            )
    return tuple(calls), image


def _transform(config: MonaiConfig, step: Component, name: str, keys: list[str], image: str) -> Call:
    arguments = {}
    for word, node in step.arguments.items():
        if word == "keys" or word in _IGNORED:
            continue
        value = config.value(node, f"{step.key}::{word}")
        if word == "source_key" and value != image:
            raise config.fault(f"{step.key}::source_key is {value!r}; expected {image!r}.")
        if isinstance(value, list) and word in ("mode", "padding_mode", "align_corners", "dtype"):
            value = value[keys.index(image)] if len(value) == len(keys) else value  # one for each key
        arguments[word] = "image" if word == "source_key" else value
    call = _call(config, step, "monai.transforms", name, arguments)
    _check_pixdim(config, call)
    _built(config, call, build_transform)
    return call


def _check_pixdim(config: MonaiConfig, call: Call) -> None:
    numbers = list(_numbers(call.arguments.get("pixdim", 1.0)))
    if call.name == "Spacingd" and (not 1 <= len(numbers) <= 3 or min(numbers) <= 0):
        raise config.fault(f"{call.key}::pixdim is {numbers}; expected three sizes in mm.")


def _built(config: MonaiConfig, call: Call, build: Callable[[Call], Any]) -> Any:
    """Build an object now, so that arguments MONAI does not like are found when the bundle is opened."""
    try:
        return build(call)
    except Exception as error:
        first = str(error).strip().split("\n")[0][:120]
        raise config.fault(
            f"MONAI's {call.name} does not take the arguments of {call.key} ({first}). Mend them."
        ) from error


def build_transform(call: Call) -> Any:
    """Return MONAI's transform for the key ``image``."""
    arguments = dict(call.arguments)
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = _dtype(arguments["dtype"])
    if call.name == "Orientationd":
        arguments.setdefault("labels", None)  # the default, but MONAI warns of it where it is left out
    return _class("monai.transforms", call.name)(keys="image", **arguments)


def _dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise BundleError(f"dtype {name!r}: expected a type of numbers such as float32. Mend it.")
    return dtype


def build_network(call: Call) -> "nn.Module":
    """Return MONAI's network with fresh weights."""
    network: nn.Module = _class("monai.networks.nets", call.name)(**call.arguments)
    return network


def build_inferer(call: Call, **changes: Any) -> Any:
    """Return MONAI's inferer; `changes` are arguments that medseg sets, for those that have them."""
    if call.name == "SimpleInferer":
        changes = {}
    return _class("monai.inferers", call.name)(**{**call.arguments, **changes})


def _inferer(config: MonaiConfig, network: Call) -> Call:
    if "inferer" not in config:
        raise config.fault("has no inferer. Name one, for example SlidingWindowInferer.")
    component = config.component(config.outline("inferer"), "inferer")
    if component is None:
        raise config.fault("inferer is disabled. Remove its _disabled_.")
    name = _INFERERS[config.known(component, _INFERERS, "inferer")]
    wanted = {word: node for word, node in component.arguments.items() if word not in _INFERER_IGNORED}
    arguments = {word: config.value(node, f"inferer::{word}") for word, node in wanted.items()}
    call = Call(name, arguments, component.key)
    parent = (
        "SlidingWindowInferer" if name == "SliceInferer" else name
    )  # which takes its arguments as **kwargs
    own = ("spatial_dim",) if name == "SliceInferer" else ()
    rest = {word: value for word, value in arguments.items() if word not in own}
    _call(config, component, "monai.inferers", parent, rest)
    flat = network.arguments.get("spatial_dims", 2 if network.name == "FlexibleUNet" else 3) == 2
    if flat != (name == "SliceInferer"):
        raise config.fault(
            f"the network is {'2D' if flat else '3D'} and the inferer is {name}. medseg predicts volumes: a "
            "2D network needs a SliceInferer, a 3D one must not have it."
        )
    if name != "SimpleInferer":
        _check_window(config, arguments, 2 if flat else 3)
    _built(config, call, build_inferer)
    return call


def _check_window(config: MonaiConfig, arguments: Mapping[str, Any], dimensions: int) -> None:
    """Refuse windows that MONAI would stumble over only when it predicts, or that no memory holds."""
    roi = arguments.get("roi_size")
    sizes = roi if isinstance(roi, list) else [roi] * dimensions
    if len(sizes) != dimensions or not all(type(n) is int and n <= _LARGEST_ARGUMENT for n in sizes):
        raise config.fault(f"inferer::roi_size is {roi!r}; expected {dimensions} sizes in voxels. Mend it.")
    batch = arguments.get("sw_batch_size", 1)
    if type(batch) is not int or not 1 <= batch <= _LARGEST_ARGUMENT:
        raise config.fault(f"inferer::sw_batch_size is {batch!r}; expected a number. Mend it.")
    overlaps = arguments.get("overlap", 0.25)
    overlaps = overlaps if isinstance(overlaps, list) else [overlaps] * dimensions
    if len(list(_numbers(overlaps))) != dimensions or not all(0 <= part < 1 for part in _numbers(overlaps)):
        raise config.fault(f"inferer::overlap is {overlaps!r}; expected parts from 0 to below 1. Mend it.")
    if arguments.get("with_coord") or arguments.get("spatial_dim", 0) not in (0, 1, 2):
        raise config.fault("inferer has with_coord or another spatial_dim than 0, 1 or 2. Mend it.")


def _lenient(config: MonaiConfig, *path: str) -> Any:
    """Return a literal that is nice to know; whatever is not one is None."""
    node: Any = config.data
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return config.data.get(node[1:]) if isinstance(node, str) and node.startswith("@") else node
