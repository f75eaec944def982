"""``medseg info``: what a model, a run, a dataset, an image or a plan is."""

import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.bundle import Bundle
    from medseg.exchange.monai_in import Call
    from medseg.plan.schema import Plan


# Longer lists are cut on the screen; JSON holds all of them.
SHOWN = 12
# More different values than these are intensities, not labels.
MOST_VALUES = 256


def info(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False,  # an unreadable file is an error of medseg's table, not of the command line
            help="Bundle, model of nnU-Net or MONAI, run folder, dataset, image, or plan (YAML or JSON).",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say what PATH is: a model, a run, a dataset, an image's grid and values, or a plan."""
    from medseg.errors import MedsegError, ReadError

    try:
        facts = _describe(path)
    except MedsegError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise ReadError(f"{path}: cannot be read ({reason}). Check the path and its permissions.") from error
    typer.echo(json_module.dumps(_finite(facts), allow_nan=False) if json else _readable(facts))


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _folder_facts(path)
    if not path.exists() or path.suffix in (".medseg", ".zip"):
        return _model_facts(path)
    if export := _export(path):
        return _export_facts(path, export)
    if path.suffix in (".csv", ".tsv"):
        return _dataset_facts(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _plan_facts(_load_plan(path))
    return _image_facts(path)


def _model_facts(path: Path) -> dict[str, Any]:
    """Describe a model that is one file, or lies in a zip."""
    from medseg.bundle import MODELS, load_bundle
    from medseg.errors import ReadError
    from medseg.exchange.monai_in import is_monai_bundle
    from medseg.exchange.nnunet import is_nnunet_model

    inside = not path.exists()
    if inside and not is_nnunet_model(path):
        raise ReadError(f"{path}: no such file or folder. Pass {MODELS}, a dataset, an image or a plan.")
    if path.suffix == ".medseg":
        return _bundle_facts(load_bundle(path))
    return _monai_facts(path) if not inside and is_monai_bundle(path) else _nnunet_facts(path)


def _folder_facts(path: Path) -> dict[str, Any]:
    from medseg.bundle import load_bundle
    from medseg.exchange.monai_in import is_monai_bundle
    from medseg.exchange.nnunet import is_nnunet_model

    if (path / "bundle.yaml").exists() or (path / "bundle").is_dir():
        return _bundle_facts(load_bundle(path))
    if is_nnunet_model(path):
        return _nnunet_facts(path)
    if export := _export(path):
        return _export_facts(path, export)
    if is_monai_bundle(path):
        return _monai_facts(path)
    folds = sorted(fold for fold in path.glob("fold_*") if fold.is_dir())
    if folds or (path / "plan.yaml").exists():
        return {
            "kind": "run",
            "path": str(path),
            "state": f"training not finished: medseg train DATASET -o {path} --resume",
            "epochs": {fold.name: _count_lines(fold / "log.jsonl") for fold in folds},
        }
    return _dataset_facts(path)


def _nnunet_facts(path: Path) -> dict[str, Any]:
    from medseg.exchange.nnunet import load_nnunet

    return {**_bundle_facts(load_nnunet(path)), "kind": "nnU-Net model"}


def _export(path: Path) -> str | None:
    """Return which of medseg's exports, that it does not read again, a path is."""
    from medseg.exchange.graph import FORMAT

    if path.suffix == ".onnx":
        with path.open("rb") as stream:  # the producer is among the first fields
            return "ONNX" if b"medseg" in stream.read(64) else None
    folder = path if path.is_dir() else path.parent if path.suffix == ".xml" else None
    if folder is None:
        return None
    for name, mark, kind in (
        ("model.json", f'"{FORMAT}"', "OpenVINO"),
        ("configs/metadata.json", '"medseg"', "MONAI"),
    ):
        file = folder / name
        if file.is_file() and mark in file.read_text(encoding="utf-8", errors="replace"):
            return kind
    return None


def _export_facts(path: Path, kind: str) -> dict[str, Any]:
    use = f"for {kind}; medseg predicts with the bundle that it was made from"
    return {"kind": f"{kind} export of medseg", "path": str(path), "use": use}


def _monai_facts(path: Path) -> dict[str, Any]:
    from medseg.exchange.monai_in import load_monai_bundle

    model = load_monai_bundle(path)
    return {
        "kind": "MONAI bundle",
        "path": str(path),
        "sha256": model.digest,
        "channels": list(model.channels),
        "labels": model.labels.to_dict()["entries"],
        "network": model.network.name,
        "window": _call_words(model.inferer),
        "transforms": [_call_words(call) for call in model.preprocessing],
    }


def _call_words(call: "Call") -> str:
    """Return a class of MONAI and its arguments, but those that only say where data is."""
    told = {name: value for name, value in call.arguments.items() if name not in ("keys", "source_key")}
    words = " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in told.items())
    return f"{call.name} {words}".rstrip()


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def _load_plan(path: Path) -> "Plan":
    from medseg.config import read_mapping
    from medseg.errors import ReadError
    from medseg.plan import load_plan

    if "configurations" not in read_mapping(path):
        raise ReadError(
            f"{path}: is not a plan, bundle or image. Pass one of these, a run folder or a dataset."
        )
    return load_plan(path)


def _dataset_facts(path: Path) -> dict[str, Any]:
    from medseg.io import open_dataset

    dataset = open_dataset(path)
    return {
        "kind": "dataset",
        "path": str(path),
        "dataset": dataset.name,
        "training_cases": len(dataset.training),
        "test_cases": len(dataset.test),
        "channels": list(dataset.channels),
        "labels": dataset.labels.to_dict()["entries"],
        "file_ending": dataset.file_ending,
        "reader": dataset.reader,
    }


def _bundle_facts(bundle: "Bundle") -> dict[str, Any]:
    settings = bundle.settings
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "sha256": bundle.digest,
        "dataset": bundle.plan.dataset_name,
        "channels": list(bundle.plan.channels),
        "labels": bundle.labels.to_dict()["entries"],
        "configuration": bundle.configuration,
        "network": settings.architecture.network,
        "patch": list(settings.patch_size),
        "spacing": list(settings.spacing),
        "folds": list(bundle.folds),
        "mirror_axes": list(bundle.mirror_axes),
        "postprocessing": bundle.postprocessing,
        "first_stage": None if bundle.previous is None else bundle.previous.configuration,
        "card": dict(bundle.card),
    }


def _plan_facts(plan: "Plan") -> dict[str, Any]:
    return {
        "kind": "plan",
        "dataset": plan.dataset_name,
        "preset": plan.preset,
        "channels": list(plan.channels),
        "labels": plan.labels.to_dict()["entries"],
        "transpose_forward": list(plan.transpose_forward),
        "configurations": {
            name: {
                "network": settings.architecture.network,
                "features": list(settings.architecture.features_per_stage),
                "patch": list(settings.patch_size),
                "batch": settings.batch_size,
                "spacing": list(settings.spacing),
                "median_shape": list(settings.median_shape),
            }
            for name, settings in plan.configurations.items()
        },
    }


def _image_facts(path: Path) -> dict[str, Any]:
    import numpy as np

    from medseg.geometry.orient import axis_codes
    from medseg.io import read

    volume = read(path)
    values = volume.array
    whole = values.dtype.kind in "ui"
    finite = values if whole else values[np.isfinite(values)]
    facts: dict[str, Any] = {
        "kind": "image",
        "path": str(path),
        "shape": list(volume.shape),
        "channels": volume.channels,
        "spacing": [round(size, 6) for size in volume.spacing],
        "unit": volume.geometry.unit,
        "axes": axis_codes(volume.geometry.affine),
        "dtype": str(values.dtype),
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "not_finite": int(values.size - finite.size),
        "affine": volume.geometry.affine.tolist(),
        "notes": list(volume.notes),
    }
    found = np.unique(values) if whole else np.empty(0)
    if 0 < found.size <= MOST_VALUES:
        facts["values"] = found.tolist()
    return facts


def _finite(value: Any) -> Any:
    """Return `value` with null for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(facts: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in facts.items():
        if name == "recipe" and isinstance(value, dict):
            lines.append(f"{indent}{name:<20} {_recipe(value)}")
        elif name in ("labels", "epochs") and isinstance(value, dict):
            lines.append(f"{indent}{name:<20} {_short([f'{k} {_short(v)}' for k, v in value.items()])}")
        elif isinstance(value, dict) and value:
            lines += [f"{indent}{name}", _readable(value, indent + "  ")]
        elif name == "affine":
            rows = (" ".join(f"{number:>10.5g}" for number in row) for row in value)
            lines += [f"{indent}{name if k == 0 else '':<20} {row}" for k, row in enumerate(rows)]
        elif value not in (None, [], {}) and not (name == "not_finite" and value == 0):
            lines.append(f"{indent}{name:<20} {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """Return a value in a few words: of a long list the beginning and the length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, list | tuple):
        return str(value)
    more = f", ... ({len(value)} in all)" if len(value) > SHOWN else ""
    return ", ".join(_short(item) for item in value[:SHOWN]) + more


def _recipe(recipe: dict[str, Any]) -> str:
    """Return what tells one training from another; the rest is in the JSON."""
    parts = [f"{name} {recipe[name]}" for name in ("epochs", "steps_per_epoch") if name in recipe]
    for group, names in {"optimizer": ("name", "lr"), "schedule": ("name",)}.items():
        values = recipe.get(group)
        if isinstance(values, dict):
            parts.append(" ".join([group, *(str(values[name]) for name in names if name in values)]))
    return ", ".join(parts) + " (all: --json)"
