"""``medseg panoptic``."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.instances.panoptic_files import PanopticResult
    from medseg.labels import PanopticLabels

FLAG = " "


def panoptic(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT_DIR", help="Folder for the results.")],
    image: Annotated[
        Path | None,
        typer.Argument(metavar="IMAGE", readable=False, help="For --model, and under the overlay."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            help="Of medseg train --task panoptic: finds everything. With --semantic, any model of objects "
            "(nuclei2d, a detector): finds the things.",
        ),
    ] = None,
    semantic: Annotated[
        Path | None, typer.Option(help="Label map with the class of each voxel, such as of medseg predict.")
    ] = None,
    instances: Annotated[
        Path | None,
        typer.Option(help="Label map of objects; without it, the things of --semantic are split."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON with the values of 'labels' and the names of 'things'."),
    ] = None,
    things: Annotated[
        list[str] | None,
        typer.Option(help="In place of --classes, where a file beside --semantic names labels; repeatable."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="How: components, basins or watershed.", show_default="components")
    ] = None,
    h_mm: Annotated[
        float | None, typer.Option(min=0.0, help="For basins: depth of the valley between two objects.")
    ] = None,
    min_stuff_mm3: Annotated[
        float, typer.Option(min=0.0, help="Drop a stuff class of less in the image (mm2 in a picture).")
    ] = 0.0,
    min_thing_mm3: Annotated[
        float, typer.Option(min=0.0, help="Drop smaller objects that were split (mm2 in a picture).")
    ] = 0.0,
    diameter: Annotated[
        float | None, typer.Option(min=0.0, help="With --model: of a usual object, in the image's unit.")
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(min=0, help="With --model: that shows the objects, from 0 on, of several stains."),
    ] = None,
    pixel_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Where a file does not tell it: '0.5 micron'; or 'pixel'."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores, if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON.")] = False,
) -> None:
    """Make one map of things (objects, counted) and stuff (areas): from a model, from existing maps, or both.

    Writes NAME_panoptic (class * divisor + object), NAME_semantic, NAME_instances, NAME_classes.json,
    NAME_objects.csv, NAME_overlay.png, and NAME_qc.json with everything that was dropped.
    """
    from medseg.files import check_distinct, check_writable
    from medseg.instances.panoptic_files import describe_panoptic, files_of, write_panoptic
    from medseg.io.formats import stem_of

    given = {
        "--instances": instances,
        "--classes": classes,
        "--things": things,
        "--split": split,
        "--h-mm": h_mm,
        "--min-thing-mm3": min_thing_mm3 or None,
    }
    looks = {"--diameter": diameter, "--channel": channel}
    _check(image, model, semantic, given, looks)
    check_writable(out, folder=True)
    source = semantic if semantic is not None else image
    assert source is not None  # one of the two was given
    name = stem_of(image or source)
    inputs = [path for path in (image, semantic, instances, classes) if path is not None]
    check_distinct(files_of(out, name, source).values(), inputs)
    if semantic is None:
        result = _find(image, model, diameter, pixel_size, min_stuff_mm3, channel, threads)
    else:
        known = _classes(semantic, classes, things)
        result = (
            _merge(semantic, known, instances, image, pixel_size, split, h_mm, min_stuff_mm3, min_thing_mm3)
            if model is None
            else _add(semantic, known, image, model, diameter, pixel_size, min_stuff_mm3, channel, threads)
        )
    files = write_panoptic(result, out, name, source)
    facts = {"name": name, **describe_panoptic(result, files)}
    typer.echo(json_module.dumps(facts) if json else _readable(facts, out))


def _check(
    image: Path | None,
    model: str | None,
    semantic: Path | None,
    given: dict[str, Any],
    looks: dict[str, Any],
) -> None:
    """Refuse options that have no sense together."""
    from medseg.errors import ConfigError

    named = [name for name, value in given.items() if value is not None]
    if model is None and semantic is None:
        raise ConfigError("what makes the map? Give --model BUNDLE, --semantic LABEL_MAP, or both.")
    if model is not None and image is None:
        raise ConfigError("--model needs an image. Give its path as the first argument.")
    wrong = next((name for name, value in looks.items() if value is not None), None)
    if model is None and wrong:
        raise ConfigError(f"{wrong} is for --model. Leave it out.")
    if semantic is None:
        if named:
            raise ConfigError(f"{named[0]} belongs to --semantic. Add that, or leave it out.")
        return
    if (given["--classes"] is None) == (given["--things"] is None):
        raise ConfigError(
            "which classes are things? Give either --classes FILE (labels and things), or --things NAME."
        )
    split = [name for name in named if name in ("--split", "--h-mm", "--min-thing-mm3")]
    if split and given["--instances"] is not None:
        raise ConfigError(
            f"{split[0]} is for things that are split, and --instances has them. Leave out one."
        )
    if model is not None and (split or given["--instances"] is not None):
        other = split[0] if split else "--instances"
        raise ConfigError(f"{other} and --model: both make objects. Leave out one.")


def _classes(semantic: Path, classes: Path | None, things: list[str] | None) -> "PanopticLabels":
    from medseg.errors import ConfigError
    from medseg.labels import PanopticLabels, read_panoptic_labels
    from medseg.metrics.pairing import find_labels

    if classes is not None:
        return read_panoptic_labels(classes)
    found = find_labels(None, semantic, semantic.parent)
    if found is None or found.has_regions:
        raise ConfigError(
            f"{semantic}: no dataset.json or predictions.json beside it names its values. Give --classes."
        )
    return PanopticLabels.from_dict({"labels": found.entries, "things": things}, "--things")


def _find(
    image: Path | None,
    model: str | None,
    diameter: float | None,
    pixel_size: str | None,
    min_stuff_mm3: float,
    channel: int | None,
    threads: int | None,
) -> "PanopticResult":
    from medseg.instances.count import PIXELS, read_measured
    from medseg.instances.models import load_object_model
    from medseg.instances.panoptic_files import find_panoptic

    assert image is not None and model is not None  # checked
    volume = read_measured(image, pixel_size)
    finder = load_object_model(model, threads=threads)
    return find_panoptic(volume, finder, diameter, pixel_size == PIXELS, min_stuff_mm3, channel)


def _merge(
    semantic: Path,
    classes: "PanopticLabels",
    instances: Path | None,
    image: Path | None,
    pixel_size: str | None,
    split: str | None,
    h_mm: float | None,
    min_stuff_mm3: float,
    min_thing_mm3: float,
) -> "PanopticResult":
    from medseg.instances.panoptic_files import SplitChoice, merge_files

    choice = SplitChoice(split or "components", h_mm)
    return merge_files(semantic, classes, instances, image, pixel_size, choice, min_stuff_mm3, min_thing_mm3)


def _add(
    semantic: Path,
    classes: "PanopticLabels",
    image: Path | None,
    model: str,
    diameter: float | None,
    pixel_size: str | None,
    min_stuff_mm3: float,
    channel: int | None,
    threads: int | None,
) -> "PanopticResult":
    from medseg.bundle import load_bundle
    from medseg.instances.detect import Detector
    from medseg.instances.models import find_model, open_object_model
    from medseg.instances.panoptic_files import add_things

    assert image is not None  # checked
    bundle = load_bundle(find_model(model))
    detects = bundle.settings.detection is not None
    finder = Detector(bundle) if detects else open_object_model(bundle, model, threads=threads)
    return add_things(semantic, classes, image, finder, diameter, pixel_size, min_stuff_mm3, channel)


def _readable(facts: dict[str, Any], out: Path) -> str:
    things = ", ".join(f"{count} {name}" for name, count in facts["things"].items()) or "no things"
    lines = [f"{facts['name']}: {things}"]
    lines += [f"  {name}: {size:,.4g} {facts['stuff_unit']}" for name, size in facts["stuff"].items()]
    for entry in facts["dropped"]:
        objects = f"{entry['count']} objects, " if entry["count"] else ""
        lines.append(f"  dropped: {entry['rule']} ({objects}{entry['voxels']} voxels)")
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join([*lines, f"Results: {out}"])
