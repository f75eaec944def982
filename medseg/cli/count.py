"""``medseg count``."""

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.instances.detect import Detector
    from medseg.instances.models import ObjectModel

FLAG = " "


class Export(StrEnum):
    """Further files."""

    GEOJSON = "geojson"
    ROI = "roi"
    PARQUET = "parquet"


def count(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", readable=False, help="Images, or folders of images.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT_DIR", help="Folder for the results.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="nuclei2d|nuclei3d|BUNDLE",
            help="What finds the objects.",
            show_default="nuclei2d for a picture, nuclei3d for a volume",
        ),
    ] = None,
    pixel_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Where a file does not tell it: '0.5 micron', '0.1 x 0.1 x 0.3 micron'; or 'pixel', to "
            "measure in pixels.",
        ),
    ] = None,
    diameter: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of a usual object, in the unit of the image.",
            show_default="estimated from the image",
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(min=0, help="That shows the objects, from 0 on, where an image has several stains."),
    ] = None,
    regions: Annotated[
        Path | None, typer.Option(help="Label map to count in (one image): counts and densities.")
    ] = None,
    export: Annotated[
        list[Export] | None, typer.Option(help="Outlines of a picture, or the table for data frames.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores, if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON.")] = False,
) -> None:
    """Find, count and measure the objects of images: label map, table, picture, and what was dropped.

    Writes NAME_labels, NAME_objects.csv, NAME_overlay.png and NAME_qc.json for each image, counts.csv, and
    report.html: a page to look at, which leads to NAME_report.html where there are several images.
    """
    from medseg.errors import ConfigError
    from medseg.files import check_writable
    from medseg.instances.count import PAGE, write_summary
    from medseg.instances.count_page import build_index

    check_writable(out, folder=True)
    paths = _listed(images, out)
    if regions is not None and len(paths) > 1:
        raise ConfigError(f"--regions is for one image, not for {len(paths)}.")
    rows, failures = _count_all(
        paths, out, model, pixel_size, diameter, channel, regions, [e.value for e in export or []], threads
    )
    if rows:
        write_summary(rows, out / "counts.csv")
    if rows and len(paths) > 1:
        build_index(rows, failures).write(out / PAGE)
    if json:
        typer.echo(json_module.dumps({"images": rows, "failures": failures}))
    else:
        for row in rows:
            typer.echo(_line(row))
        if rows:
            typer.echo(f"Results: {out / PAGE}")
    _settle(failures, len(paths))


def _listed(images: list[Path], out: Path) -> list[Path]:
    """Return the files, those of folders included; no result may replace an image or another result."""
    from medseg.errors import ConfigError, ReadError
    from medseg.files import check_distinct
    from medseg.instances.count import files_of
    from medseg.io.formats import is_image, stem_of

    paths: list[Path] = []
    for given in images:
        if given.is_dir():
            if out.exists() and out.samefile(given):
                raise ConfigError(
                    f"{out}: is the folder of the images, where results would be taken for images. Choose "
                    "another folder."
                )
            found = sorted(p for p in given.iterdir() if is_image(p))
            if not found:
                raise ReadError(f"{given}: holds no image that medseg reads.")
            paths += found
        else:
            paths.append(given)
    names = [stem_of(path) for path in paths]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"two images are called {double}: their results would overwrite each other.")
    check_distinct((file for p in paths for file in files_of(out, stem_of(p), p).values()), paths)
    return paths


def _count_all(
    paths: list[Path],
    out: Path,
    model: str | None,
    pixel_size: str | None,
    diameter: float | None,
    channel: int | None,
    regions: Path | None,
    export: list[Any],
    threads: int | None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Count image after image; one that fails does not stop the others."""
    from medseg.errors import MedsegError
    from medseg.instances.count import (
        PAGE,
        PIXELS,
        count_objects,
        default_model,
        describe_counted,
        read_measured,
        write_counted,
    )
    from medseg.io import read
    from medseg.io.formats import stem_of
    from medseg.log import progress

    loaded: dict[str, ObjectModel | Detector] = {}
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for path in progress(paths, "Counting"):
        try:
            volume = read_measured(path, pixel_size)
            finder = _open(model or default_model(volume), loaded, threads)
            inside = None if regions is None else read(regions)
            found = count_objects(volume, finder, diameter, inside, pixel_size == PIXELS, channel=channel)
            page = PAGE if len(paths) == 1 else f"{stem_of(path)}_{PAGE}"
            files = write_counted(found, out, stem_of(path), path, export, page)
            rows.append({"image": path.name} | describe_counted(found, files))
        except MedsegError as error:
            if len(paths) == 1:
                raise
            failures[path.name] = str(error)
    return rows, failures


def _open(
    name: str, loaded: "dict[str, ObjectModel | Detector]", threads: int | None
) -> "ObjectModel | Detector":
    from medseg.bundle import load_bundle
    from medseg.infer.runtime import count_threads
    from medseg.instances.detect import Detector
    from medseg.instances.models import find_model, open_object_model

    if name not in loaded:
        bundle = load_bundle(find_model(name))
        if bundle.settings.detection is None:
            loaded[name] = open_object_model(bundle, name, threads=threads)
        else:
            import torch

            torch.set_num_threads(count_threads(threads))
            loaded[name] = Detector(bundle)
    return loaded[name]


def _line(row: dict[str, Any]) -> str:
    dropped = sum(each["count"] for each in row["dropped"])
    size = row["size"]
    median = ""
    if size is not None:
        kind, unit = size["column"].split("_", 1)
        median = f", median {kind} {size['median']:.4g} {unit}"
    left = f", {dropped} dropped (the page says why)" if dropped else ""
    count = f"{row['objects']} object{'' if row['objects'] == 1 else 's'}"
    return "\n  note: ".join([f"{row['image']}: {count}{median}{left}", *row["notes"]])


def _settle(failures: dict[str, str], count: int) -> None:
    from medseg.errors import PartialFailure

    if failures:
        name, first = next(iter(failures.items()))
        raise PartialFailure(f"{len(failures)} of {count} images failed. {name}: {first}")
