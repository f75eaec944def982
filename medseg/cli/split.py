"""``medseg split``."""

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.config import Config
    from medseg.instances.split import Split
    from medseg.instances.tune import Tuned
    from medseg.types import Array
    from medseg.volume import Volume

FLAG = " "
# Of each label, so many counts are shown; the JSON has all.
SHOWN = 8


def split(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", readable=False, help="Mask, label map, or height map (floats).")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PATH", help="Label map of the objects.")],
    h_mm: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Depth that a valley between two summits must have; of a height map, in its own unit.",
            show_default="0.75 of the finest voxel size",
        ),
    ] = None,
    rel: Annotated[
        float, typer.Option(min=0.0, max=0.999, help="The same as a part of the lower summit; adds to it.")
    ] = 0.0,
    method: Annotated[str, typer.Option(help="basins, watershed or components.")] = "basins",
    min_volume_mm3: Annotated[
        float, typer.Option(min=0.0, help="Remove smaller objects (mm2 for a single slice), and say so.")
    ] = 0.0,
    floor: Annotated[float, typer.Option(help="Foreground of a height map is above it.")] = 0.0,
    connectivity: Annotated[
        int, typer.Option(help="26, 18 (components) or 6 neighbours; 8 or 4 in 2D.")
    ] = 26,
    pixel_size: Annotated[
        str | None, typer.Option(help="Where INPUT does not tell it: '0.5 micron', '0.4 x 0.4 x 2 micron'.")
    ] = None,
    height_map: Annotated[
        bool | None,
        typer.Option(
            "--height-map/--label-map",
            help="What INPUT is, if not what its values say: a label map where all are whole numbers.",
        ),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            metavar="REFERENCE",
            help="Label map of the same image: choose --h-mm and --rel that come nearest to it.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores, if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON.")] = False,
) -> None:
    """Give touching objects of INPUT a number each, and write them to OUT on the grid of INPUT.

    A mask is split where its objects narrow, each label of a label map by itself, a height map (probability,
    distance, intensity) where it has valleys.
    """
    import numpy as np

    from medseg.errors import ConfigError
    from medseg.files import check_distinct, check_writable
    from medseg.instances.split import split as split_objects
    from medseg.io import write
    from medseg.io.formats import check_format

    check_writable(out)
    check_format(out)
    check_distinct([out], [source, *([tune] if tune else [])])
    volume = _read(source, pixel_size)
    array, kind = _values(volume, height_map, source)
    scale = 1000.0 if volume.geometry.unit == "micron" else 1.0
    depth_unit = scale if kind == "label map" else 1.0
    settings = _settings(method, h_mm, depth_unit, rel, floor, connectivity)
    used = threads or os.cpu_count() or 1
    tuned = None if tune is None else _tune(volume, array, kind, tune, pixel_size, method, settings, used)
    if tuned is not None:
        settings = settings.replace(h=tuned.best.h, rel=tuned.best.rel)
    least = min_volume_mm3 * scale**array.ndim
    unit = f"{_unit(volume)}{array.ndim}"
    limit = f"--min-volume-mm3 {min_volume_mm3:g} is {least:g} {unit} here"
    whole = array.size * float(np.prod(volume.spacing[: array.ndim]))
    if least > whole:
        raise ConfigError(f"{limit}, and the whole image has only {whole:g} {unit}. Give a smaller limit.")
    found = split_objects(array, volume.spacing[: array.ndim], method, settings, least, used)
    write(volume.with_array(_stored(found.labels).reshape(volume.shape)), out)
    facts = _facts(source, out, volume, kind, method, settings, found)
    if tuned is not None:
        facts["tuned"] = {"reference": str(tune), **_tuned_facts(tuned, depth_unit)}
    if found.dropped and not found.count:
        facts["notes"].append(f"every object was removed: {limit}. Give a smaller limit.")
    typer.echo(json_module.dumps(facts) if json else _readable(facts))


def _read(source: Path, pixel_size: str | None) -> "Volume":
    """Read one channel whose voxels have a size."""
    from medseg.errors import ConfigError, DataError
    from medseg.instances.scale import knows_spacing, parse_spacing, require_spacing, with_spacing
    from medseg.io import read

    volume = read(source)
    if volume.channels != 1:
        raise DataError(f"{source}: has {volume.channels} channels; expected one. Take the one to split.")
    if pixel_size is None:
        return require_spacing(volume, str(source))
    if knows_spacing(volume):
        raise ConfigError(
            f"{source}: tells the size of its voxels, {volume.spacing}. Leave out --pixel-size."
        )
    return with_spacing(volume, *parse_spacing(pixel_size))


def _values(volume: "Volume", height_map: bool | None, source: Path) -> "tuple[Array, str]":
    """Return the voxels, two axes for a single slice, and what they are."""
    import numpy as np

    from medseg.errors import DataError
    from medseg.instances.schema import whole_labels

    array = volume.array[0, ..., 0] if volume.shape[2] == 1 else volume.array[0]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{source}: holds NaN or infinite values. Replace them, for example by 0.")
    if height_map is None:
        height_map = array.dtype.kind == "f" and not bool((np.trunc(array) == array).all())
    if height_map:
        return array.astype(np.float32, copy=False), "height map"
    return array if array.dtype == bool else whole_labels(array), "label map"


def _settings(
    method: str, h_mm: float | None, scale: float, rel: float, floor: float, connectivity: int
) -> "Config":
    """Return the settings of the method; a depth without a use is an error, not ignored."""
    from medseg.errors import ConfigError
    from medseg.instances.split import SPLITTERS

    if method not in SPLITTERS:
        raise ConfigError(f"method {method!r} is unknown. Use one of {', '.join(SPLITTERS)}.")
    values: dict[str, Any] = {"floor": floor, "connectivity": connectivity}
    if method != "components":
        values |= {"h": None if h_mm is None else h_mm * scale, "rel": rel}
    elif h_mm is not None or rel:
        raise ConfigError("components have no depth. Leave out --h-mm and --rel, or take another method.")
    return SPLITTERS[method][0].from_dict(values)


def _tune(
    volume: "Volume",
    array: "Array",
    kind: str,
    path: Path,
    pixel_size: str | None,
    method: str,
    settings: "Config",
    threads: int,
) -> "Tuned":
    """Choose the depth by a reference on the same grid."""
    import numpy as np

    from medseg.errors import ConfigError, GeometryError
    from medseg.instances.count import read_beside
    from medseg.instances.split import BasinsConfig
    from medseg.instances.tune import tune
    from medseg.io.grids import grid_difference
    from medseg.metrics.pairing import load_label_map

    if not isinstance(settings, BasinsConfig):
        raise ConfigError(f"{method} have no depth to tune. Leave out --tune, or take another method.")
    if settings.h is not None or settings.rel:
        raise ConfigError("--tune chooses --h-mm and --rel. Leave them out.")
    if kind == "label map" and len(np.unique(array[array != 0])) > 1:
        raise ConfigError("--tune is for a mask or a height map, and INPUT has several labels. Give a mask.")
    reference = load_label_map(read_beside(path, pixel_size), str(path))
    if reference.shape != volume.shape or not reference.geometry.matches(volume.geometry):
        what = grid_difference(volume.geometry, reference.geometry, "INPUT") or "its place differs"
        raise GeometryError(f"{path}: {what}. Give a label map of the same image.")
    labels = reference.array[0].reshape(array.shape)
    plain = BasinsConfig(floor=settings.floor, connectivity=settings.connectivity)
    return tune(array, labels, volume.spacing[: array.ndim], plain, threads=threads)


def _tuned_facts(tuned: "Tuned", depth_unit: float) -> dict[str, Any]:
    from dataclasses import asdict

    best = asdict(tuned.best)
    chosen = {"h_mm": best.pop("h") / depth_unit, **best}
    return {**chosen, "trials": [asdict(trial) for trial in tuned.trials]}


def _unit(volume: "Volume") -> str:
    return {"mm": "mm", "micron": "um"}[volume.geometry.unit]


def _stored(labels: "Array") -> "Array":
    """Return labels in 16 bits where they fit, which every format of images holds."""
    import numpy as np

    return labels.astype(np.uint16 if labels.max(initial=0) < np.iinfo(np.uint16).max else np.int32)


def _facts(
    source: Path, out: Path, volume: "Volume", kind: str, method: str, settings: "Config", found: "Split"
) -> dict[str, Any]:
    from dataclasses import asdict

    import numpy as np

    from medseg.instances.split import BasinsConfig, depth_of

    ndim = 2 if volume.shape[2] == 1 else 3
    unit = _unit(volume)
    values, counts = np.unique(found.sources, return_counts=True)
    resolved = settings.to_dict()
    if isinstance(settings, BasinsConfig) and kind == "label map":
        resolved["h"] = depth_of(settings, volume.spacing[:ndim])
    dropped = [asdict(entry) | {"rule": f"{entry.rule} {unit}{ndim}"} for entry in found.dropped]
    return {
        "input": str(source),
        "output": str(out),
        "kind": kind,
        "method": method,
        "settings": resolved,
        "unit": unit,
        "spacing": list(volume.spacing[:ndim]),
        "objects": found.count,
        "objects_of_label": dict(zip(map(str, values.tolist()), counts.tolist(), strict=True)),
        "dropped": dropped,
        "notes": list(volume.notes),
    }


def _count(objects: int) -> str:
    return f"{objects} object{'' if objects == 1 else 's'}"


def _readable(facts: dict[str, Any]) -> str:
    counts = facts["objects_of_label"]
    kind = "mask" if facts["kind"] == "label map" and list(counts) == ["1"] else facts["kind"]
    lines = [f"{facts['output']}: {_count(facts['objects'])} of a {kind}, by {facts['method']}."]
    if len(counts) > 1:
        shown = ", ".join(f"{label}: {count}" for label, count in list(counts.items())[:SHOWN])
        lines.append(f"  objects of label {shown}{', ... (all: --json)' if len(counts) > SHOWN else ''}")
    if "tuned" in facts:
        best = facts["tuned"]
        chosen = f"--h-mm {best['h_mm']:g} --rel {best['rel']:g}"
        lines.append(f"  tuned: {chosen} (F1 {best['f1']:.3f}, PQ {best['pq']:.3f})")
    for entry in facts["dropped"]:
        lines.append(f"  removed: {_count(entry['count'])} {entry['rule']} ({entry['voxels']} voxels)")
    return "\n".join([*lines, *(f"  note: {note}" for note in facts["notes"])])
