"""``medseg info``: what a bundle, an image or a plan is."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.bundle import Bundle
    from medseg.plan.schema import Plan


def info(
    path: Annotated[Path, typer.Argument(help="Bundle, run folder, image, or plan (YAML or JSON).")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say what PATH is: a model, an image's grid and values, or a plan."""
    facts = _describe(path)
    typer.echo(json_module.dumps(facts) if json else _readable(facts))


def _describe(path: Path) -> dict[str, Any]:
    from medseg.errors import ReadError

    if not path.exists():
        raise ReadError(f"{path}: no such file or folder. Check the path.")
    if path.is_dir() or path.suffix == ".medseg":
        from medseg.bundle import load_bundle

        return _bundle_facts(load_bundle(path))
    if path.suffix in (".yaml", ".yml", ".json"):
        from medseg.plan import load_plan

        return _plan_facts(load_plan(path))
    return _image_facts(path)


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
    facts: dict[str, Any] = {
        "kind": "image",
        "path": str(path),
        "shape": list(volume.shape),
        "channels": volume.channels,
        "spacing": [round(size, 6) for size in volume.spacing],
        "unit": volume.geometry.unit,
        "axes": axis_codes(volume.geometry.affine),
        "dtype": str(values.dtype),
        "min": float(np.nanmin(values)),
        "max": float(np.nanmax(values)),
        "affine": volume.geometry.affine.tolist(),
        "notes": list(volume.notes),
    }
    found = np.unique(values) if whole else np.empty(0)
    if 0 < found.size <= 256:
        facts["values"] = found.tolist()
    return facts


def _readable(facts: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", _readable(value, indent + "  ")]
        elif value not in (None, [], {}):
            lines.append(f"{indent}{name:<20}{value}")
    return "\n".join(lines)
