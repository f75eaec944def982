"""A bundle as a MONAI bundle: a folder that MONAI's own tools read and run, without medseg.

::

    configs/{inference.json, metadata.json, logging.conf}
    models/model.pt     the weights, as a state dict
    scripts/            the network and what MONAI has no transform for (nnU-Net's grid, tiles, decisions)
    docs/README.md, LICENSE

Layout and names are those of the MONAI Model Zoo (its ``spleen_ct_segmentation``).
"""

import json
from collections.abc import Mapping
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import medseg
from medseg.bundle import Bundle
from medseg.errors import BundleError
from medseg.exchange.graph import check_replaceable, cleaning_steps, output_names
from medseg.files import atomic_folder
from medseg.geometry.orient import reads_as_ras
from medseg.log import check_cancelled
from medseg.plan.schema import Configuration

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
# As in medseg.infer: small tiles (slices) go through the network together.
BATCH_VOXELS = 1 << 16

LOGGING = """[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=plain

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=plain
args=(sys.stdout,)

[formatter_plain]
format=%(asctime)s - %(name)s - %(message)s
"""

LICENSE = """The files in scripts/ are part of medseg and are licensed under the Apache License, Version 2.0
(SPDX-License-Identifier: Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0).

The weights in models/ are not part of medseg. Who trained them decides how they may be used; ask there,
and look at the licence of the training images.
"""


def export(bundle: Bundle, out: Path, fold: str | None = None) -> None:
    """Write a MONAI bundle; all or nothing.

    Parameters
    ----------
    bundle : what to export
    out : folder; an older export is replaced, anything else is left alone
    fold : of the bundle; None takes all, and the exported network returns the mean of their logits

    Raises
    ------
    BundleError
        It is a cascade, there is no such fold, or its weights do not fit.
    OutputError
        `out` holds something else.
    """
    check(bundle)
    check_replaceable(out, "configs/metadata.json", '"medseg"')
    folds = bundle.folds if fold is None else (fold,)
    with atomic_folder(out) as folder:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir()
        _write_json(folder / "configs" / "inference.json", inference(bundle, len(folds)))
        _write_json(folder / "configs" / "metadata.json", metadata(bundle, folds))
        (folder / "configs" / "logging.conf").write_text(LOGGING, encoding="utf-8")
        (folder / "docs" / "README.md").write_text(_readme(bundle, folds), encoding="utf-8")
        (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
        _write_scripts(folder / "scripts")
        _write_weights(folder / "models" / "model.pt", bundle, folds)


def check(bundle: Bundle) -> None:
    """Refuse what a MONAI bundle cannot express.

    Raises
    ------
    BundleError
        It is a cascade.
    """
    if bundle.previous is not None or bundle.settings.previous_stage:
        raise BundleError(
            f"{bundle}: is a cascade, and a MONAI bundle has one network. "
            "Export it as nnunet, or train and export 3d_fullres."
        )


def inference(bundle: Bundle, folds: int = 1) -> dict[str, Any]:
    """Return the content of ``inference.json``."""
    settings = bundle.settings
    path_first = {"_requires_": "@scripts"}
    return {
        "imports": ["$import os", "$import sys"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_ext": ".nii.gz",
        "output_postfix": "seg",
        "scripts": "$sys.path.insert(0, os.path.abspath(@bundle_root))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {**_network(bundle, folds), **path_first},
        "network": {
            "_target_": "scripts.network.load_weights",
            **path_first,
            "network": "@network_def",
            "path": "$@bundle_root + '/models/model.pt'",
            "device": "@device",
        },
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(bundle)},
        "datalist": {
            "_target_": "scripts.workflow.find_cases",
            **path_first,
            "folder": "@dataset_dir",
            "channels": len(bundle.plan.channels),
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": {
            "_target_": "scripts.inferer.TiledInferer",
            **path_first,
            "roi_size": list(settings.patch_size),
            "sw_batch_size": max(1, BATCH_VOXELS // prod(settings.patch_size)),
            "overlap": 0.5,
            "mirror_axes": list(bundle.mirror_axes) if bundle.card.get("mirroring", True) else [],
            "sided": bundle.keeps_sides,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(bundle)},
        "evaluator": {
            "_target_": "scripts.workflow.Evaluator",
            **path_first,
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "device": "@device",
            "amp": "$@device.type == 'cuda'",
        },
        "initialize": ["$@scripts"],
        "run": ["$@evaluator.run()"],
    }


def _preprocessing(bundle: Bundle) -> list[dict[str, Any]]:
    settings = bundle.settings
    return [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {
            "_target_": "scripts.transforms.ToNetworkGridd",
            "_requires_": "@scripts",
            "keys": "image",
            "transpose": list(bundle.plan.transpose_forward),
            "spacing": list(settings.spacing),
            "channels": [channel_scheme(bundle, number) for number in range(len(bundle.plan.channels))],
            "order": settings.order_data,
            "order_z": settings.order_z,
            "ras": reads_as_ras(bundle.plan.reader),
        },
    ]


def _postprocessing(bundle: Bundle) -> list[dict[str, Any]]:
    labels, settings = bundle.labels, bundle.settings
    dtype = labels.dtype.__name__
    regions = labels.regions_class_order if labels.has_regions else None
    transforms: list[dict[str, Any]] = [
        {
            "_target_": "scripts.transforms.ToLabelMapd",
            "_requires_": "@scripts",
            "keys": "pred",
            "ref_key": "image",
            "order": settings.order_probabilities,
            "order_z": settings.order_z,
            "regions": None if regions is None else list(regions),
            "dtype": dtype,
        }
    ]
    if steps := cleaning_steps(bundle):
        transforms.append(
            {
                "_target_": "scripts.transforms.CleanComponentsd",
                "_requires_": "@scripts",
                "keys": "pred",
                "steps": steps,
            }
        )
    return [
        *transforms,
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_ext": "@output_ext",
            "output_dtype": f"$numpy.{dtype}",
            "output_postfix": "@output_postfix",
            "separate_folder": False,
            "resample": False,
            "print_log": False,
        },
    ]


def channel_scheme(bundle: Bundle, number: int) -> dict[str, Any]:
    """Return how one channel is normalised, as plain data.

    Raises
    ------
    BundleError
        CT statistics are missing in the plan.
    """
    settings = bundle.settings
    scheme = settings.normalization[number]
    if scheme == "zscore":
        return {"scheme": scheme, "masked": settings.use_mask_for_norm[number]}
    if scheme != "ct":
        return {"scheme": scheme}
    stats = bundle.plan.intensity.get(str(number))
    if stats is None:
        raise BundleError(f"{bundle}: its plan has no intensities of CT channel {number}. Plan again.")
    low, high = stats.percentile_00_5, stats.percentile_99_5
    return {"scheme": scheme, "low": low, "high": high, "mean": stats.mean, "std": stats.std}


def _network(bundle: Bundle, folds: int) -> dict[str, Any]:
    """Return the network as a component of a MONAI config."""
    one = _single_network(bundle)
    if folds == 1:
        return one
    mean = {"_target_": "scripts.network.FoldMean", "_requires_": "@scripts"}
    return {**mean, "network": one, "folds": folds}


def _single_network(bundle: Bundle) -> dict[str, Any]:
    architecture = bundle.settings.architecture
    inputs, outputs = bundle.in_channels, bundle.labels.n_outputs
    if architecture.network in ("segresnet", "swin-unetr"):
        from medseg.nets.monai_nets import segresnet_arguments, swin_arguments

        if architecture.network == "segresnet":
            return {"_target_": "SegResNetDS", **segresnet_arguments(architecture, inputs, outputs)}
        return {"_target_": "SwinUNETR", **swin_arguments(architecture, inputs, outputs)}
    values = architecture.to_dict()
    residual = values.pop("network") == "resenc-unet"
    return {
        "_target_": "scripts.network.build_unet",
        "_requires_": "@scripts",
        "in_channels": inputs,
        "out_channels": outputs,
        **values,
        "residual": residual,
    }


def metadata(bundle: Bundle, folds: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of ``metadata.json``."""
    plan, labels = bundle.plan, bundle.labels
    targets = ", ".join(labels.foreground)
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medseg {medseg.__version__}"},
        **_versions(),
        "name": _plain(f"{plan.dataset_name} {bundle.configuration}"),
        "task": _plain(f"Segmentation of {targets}"),
        "description": _plain(
            f"Segments {targets} in images with channels {', '.join(plan.channels)}; "
            f"a {bundle.settings.architecture.network} planned for {plan.dataset_name}, "
            f"configuration {bundle.configuration}, folds {', '.join(folds)}"
        ),
        "authors": "exported by medseg",
        "copyright": "scripts: Apache-2.0; weights: see LICENSE",
        "data_source": _plain(plan.dataset_name),
        "data_type": "nibabel",
        "image_classes": _plain(f"channels {', '.join(plan.channels)}"),
        "label_classes": _plain(f"label map of {targets}"),
        "pred_classes": _plain(", ".join(output_names(bundle))),
        "eval_metrics": {},
        "intended_use": "Research. Not a medical device; not for diagnosis or treatment.",
        "references": [
            "Isensee et al. nnU-Net: a self-configuring method for deep learning-based biomedical image "
            "segmentation. Nature Methods 18, 203-211 (2021). https://doi.org/10.1038/s41592-020-01008-z"
        ],
        "network_data_format": _data_format(bundle),
        "medseg": {"version": medseg.__version__, "bundle_sha256": bundle.digest},
    }


def _versions() -> dict[str, Any]:
    import monai
    import nibabel
    import numpy
    import scipy
    import torch

    return {
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": numpy.__version__,
        "required_packages_version": {
            "nibabel": nibabel.__version__,
            "scipy": scipy.__version__,
            "fire": "0.7.0",  # of ``python -m monai.bundle`` itself
        },
    }


def _data_format(bundle: Bundle) -> dict[str, Any]:
    settings = bundle.settings
    is_ct = set(settings.normalization) == {"ct"}
    common = {
        "type": "image",
        "spatial_shape": list(settings.patch_size),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
    }
    image = {
        "format": "hounsfield" if is_ct else "magnitude",
        "modality": "CT" if is_ct else _plain(", ".join(bundle.plan.channels)),
        "num_channels": bundle.in_channels,
        "channel_def": {str(n): _plain(name) for n, name in enumerate(bundle.plan.channels)},
    }
    pred = {
        "format": "segmentation",
        "num_channels": bundle.labels.n_outputs,
        "channel_def": {str(n): _plain(name) for n, name in enumerate(output_names(bundle))},
    }
    return {"inputs": {"image": {**common, **image}}, "outputs": {"pred": {**common, **pred}}}


def _plain(text: str) -> str:
    """Return a name as text for MONAI's parser: it runs or looks up what begins with $, @ or %."""
    return f" {text}" if text.startswith(("$", "@", "%")) else text


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_scripts(folder: Path) -> None:
    """Copy the code that the bundle needs, with medseg's module names replaced by the bundle's."""
    folder.mkdir()
    renamed = {"medseg.nets.unet": "scripts.unet", "medseg.plan.schema": "scripts.network"}
    package = resources.files("medseg.exchange.monai_scripts")
    sources = {file.name: file for file in package.iterdir() if file.name.endswith(".py")}
    sources["unet.py"] = resources.files("medseg.nets") / "unet.py"
    for name, file in sources.items():
        text = file.read_text(encoding="utf-8")
        for ours, theirs in renamed.items():
            text = text.replace(f"from {ours} import", f"from {theirs} import")
        (folder / name).write_text(text, encoding="utf-8")


def _write_weights(path: Path, bundle: Bundle, folds: tuple[str, ...]) -> None:
    import torch

    weights: dict[str, Any] = {}
    for number, fold in enumerate(folds):
        check_cancelled()
        prefix = f"networks.{number}." if len(folds) > 1 else ""
        weights |= {prefix + name: value for name, value in _state_dict(bundle, fold).items()}
    torch.save(weights, path)


def _state_dict(bundle: Bundle, fold: str) -> dict[str, Any]:
    """Return the weights of one fold under the names of the exported network, after trying them."""
    state = bundle.network(fold).state_dict()
    wrapped = bundle.settings.architecture.network in ("segresnet", "swin-unetr")
    return {name.removeprefix("network.") if wrapped else name: value for name, value in state.items()}


def _readme(bundle: Bundle, folds: tuple[str, ...]) -> str:
    plan, settings = bundle.plan, bundle.settings
    outputs = "\n".join(f"- {number}: {name}" for number, name in enumerate(output_names(bundle)))
    channels = "\n".join(f"- {number}: {name}" for number, name in enumerate(plan.channels))
    kind = "overlapping regions, sigmoid" if plan.labels.has_regions else "classes, softmax"
    mean = " (their logits are averaged)" if len(folds) > 1 else ""
    return f"""# {plan.dataset_name}: {bundle.configuration}

Segments {", ".join(plan.labels.foreground)}. Exported by medseg {medseg.__version__}; needs torch, monai,
nibabel, scipy and fire, and nothing of medseg. Research use; not a medical device.

## Run

```
python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
    --dataset_dir IMAGES --output_dir OUT
```

`IMAGES` holds `CASE.nii.gz`, or a file a channel: `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ...
The label map of each case is `OUT/CASE_seg.nii.gz`, on the grid of its image.
Faster without mirroring: `--inferer#mirror_axes "[]"`.

## Input channels

{channels}

## Outputs of the network ({kind})

{outputs}

## How it works

{_how(settings)} Folds: {", ".join(folds)}{mean}.
The steps and their numbers are in `configs/inference.json`; `scripts/transforms.py` holds the code.
"""


def _how(settings: Configuration) -> str:
    spacing = " x ".join(f"{size:g}" for size in settings.spacing)
    patch = " x ".join(str(size) for size in settings.patch_size)
    return (
        "The image is cropped to what is not zero, normalised and resampled to "
        f"{spacing} mm; a {settings.architecture.network} sees tiles of {patch} voxels that overlap by half."
    )
