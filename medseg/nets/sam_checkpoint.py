"""Published files of SAM: read as data only, recognised, brought to one set of names."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg.errors import BundleError
from medseg.types import PathLike

# torch stores tensors as they are; what unpacks to much more than its file was made by somebody else.
MAX_GROWTH_BYTES = 64 * 2**20
# Where training scripts put the weights of MedSAM and others.
_NESTED = ("model", "state_dict", "model_state_dict")
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|sam|model)\.)+")
_WIDTHS = {768: "sam-vit-b", 1024: "sam-vit-l", 1280: "sam-vit-h"}

# Names of Hugging Face's transformers to those of the authors, to be applied in this order.
_RENAMES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.layers.1."),
        (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_in\.", r"\1.layers.0."),
        (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_out\.", r"\1.layers.2."),
        (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^vision_encoder\.layers\.(\d+)\.layer_norm", r"image_encoder.blocks.\1.norm"),
        (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"^vision_encoder\.", "image_encoder."),
        (
            r"^(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (
            r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm",
            r"mask_decoder.transformer.layers.\1.norm",
        ),
        (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
        (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    )
]


def read_weights(path: PathLike) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of the authors of SAM, float32.

    Raises
    ------
    BundleError
        The file is missing, damaged, names code, holds no tensors, or a weight that is not finite.
    """
    path = Path(path)
    content = _read(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise BundleError(f"{path}: holds no table of weights. Pass the checkpoint of a SAM.")
    weights = _rename({name: value for name, value in content.items() if isinstance(value, Tensor)})
    if not weights:
        raise BundleError(f"{path}: holds no weights. Pass the checkpoint of a SAM.")
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = value = value.float()
            if not bool(torch.isfinite(value).all()):
                raise BundleError(f"{path}: weight {name} is not finite. Download the file again.")
    return weights


def recognise(weights: Mapping[str, Tensor], path: PathLike) -> str:
    """Return the kind of SAM that has these weights.

    Raises
    ------
    BundleError
        None of those that medseg knows: what it is, where that is known, is said.
    """
    stranger = _stranger(weights)
    if stranger is not None:
        raise BundleError(f"{path}: holds {stranger}. {_REMEDY}")
    stem = weights.get("image_encoder.patch_embed.seq.0.c.weight")
    if stem is not None:
        return "lite-medsam" if stem.shape[-1] == 1 else "mobile-sam"
    positions = weights.get("image_encoder.pos_embed")
    kind = None if positions is None else _WIDTHS.get(positions.shape[-1])
    if kind is None:
        raise BundleError(f"{path}: holds a SAM with an image encoder that medseg does not know. {_REMEDY}")
    medical = "medsam" in Path(path).name.lower().replace("-", "").replace("_", "")
    return "medsam-vit-b" if kind == "sam-vit-b" and medical else kind


_REMEDY = "Pass a checkpoint of LiteMedSAM, MobileSAM, SAM (ViT-B, L or H) or MedSAM."


def _stranger(weights: Mapping[str, Tensor]) -> str | None:
    """Name a network that is no SAM by what only it has; None for a SAM."""
    if any(
        name.startswith(("sam_mask_decoder.", "memory_encoder.", "memory_attention.")) for name in weights
    ):
        return "a SAM 2 or MedSAM2, which has a reader of its own"
    if any(name.startswith("mask_decoder.hf_") for name in weights):
        return "a SAM-HQ"
    if any(name.startswith("mask_decoder.transformer.") for name in weights):
        return None
    return f"another network ({len(weights)} weights, the first is {min(weights)})"


def _read(path: Path) -> Any:
    _check(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on its own old formats
            return torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise BundleError(f"{path}: {_fault(error)}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{path}: is cut off or damaged. Download it again.") from error


def _check(path: Path) -> None:
    """Refuse what is not there, empty, or unpacks to more than it holds."""
    if not path.is_file():
        raise BundleError(f"{path}: no such file. Pass the checkpoint of a SAM.")
    size = path.stat().st_size
    if not size:
        raise BundleError(f"{path}: is empty. Download it again.")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BundleError(f"{path}: is cut off or damaged. Download it again.") from error
    if unpacked > size + MAX_GROWTH_BYTES:
        raise BundleError(f"{path}: unpacks from {size} to {unpacked} bytes. Do not trust this file.")


def _fault(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return (
            "refused, since it names something that is not data: loading it could run code. Nothing was run; "
            "do not trust this file, or save only its weights again."
        )
    return "is no checkpoint of torch, or damaged. Download it again."


def _rename(tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    weights = {_WRAPPERS.sub("", str(name)): value for name, value in tensors.items()}
    if not any(name.startswith("vision_encoder.") for name in weights):
        return weights
    if any(name.startswith("memory_encoder.") for name in weights):
        return weights  # SAM 2 of transformers has names of its own
    renamed = {}
    for name, value in weights.items():
        for pattern, new in _RENAMES:
            name = pattern.sub(new, name)
        renamed[name] = value
    return renamed
