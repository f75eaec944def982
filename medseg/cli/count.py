"""``medseg count``."""

import json as json_module
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.instances.finders import FILES, FINDERS, REFINERS

if TYPE_CHECKING:
    from medseg.errors import MedsegError, PartialFailure
    from medseg.instances.finders import Finder
    from medseg.instances.refine import Refiner

FLAG = " "
# Of failed images, so many are named; counts.csv has all.
NAMED = 5


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
            metavar="NAME|BUNDLE",
            help=f"What finds the objects: {', '.join((*FINDERS, *FILES))}, or a trained bundle.",
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
            show_default="nuclei2d and nuclei3d estimate it",
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
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Draw each object anew, prompted by its box: {', '.join(REFINERS)}."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: weights to use instead of a download; repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores, if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON.")] = False,
) -> None:
    """Find, count and measure the objects of images: label map, table, picture, and what was dropped.

    Writes NAME_labels, NAME_objects.csv, NAME_overlay.png and NAME_qc.json for each image, counts.csv, and
    report.html: a page to look at, which leads to NAME_report.html where there are several images.
    """
    from medseg.cli.prompt_words import read_weights
    from medseg.errors import ConfigError
    from medseg.files import check_writable
    from medseg.instances.count import PAGE, write_summary
    from medseg.instances.count_page import build_index
    from medseg.instances.finders import open_refiner

    check_writable(out, folder=True)
    paths = _listed(images, out)
    if regions is not None and len(paths) > 1:
        raise ConfigError(f"--regions is for one image, not for {len(paths)}.")
    files = read_weights(weights or ())
    alone = len(paths) == 1
    asked = _Asked(model, pixel_size, diameter, channel, regions, tuple(export or ()), threads, files, alone)
    refiner = None if refine is None else open_refiner(refine, threads, files)
    rows, failures, first = _count_all(paths, out, asked, refiner)
    if rows:
        write_summary(rows, out / "counts.csv", failures)
    if rows and len(paths) > 1:
        build_index(rows, failures).write(out / PAGE)
    if json:
        typer.echo(json_module.dumps({"images": rows, "failures": failures}))
    else:
        for row in rows:
            typer.echo(_line(row))
        if rows:
            typer.echo(f"Results: {out / PAGE}")
    if first is not None:
        raise first if asked.alone else _failed(failures, len(paths))


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


@dataclass(frozen=True)
class _Asked:
    """The options that are about each image, by the names of the command's parameters.

    `alone`: there is no other image.
    """

    model: str | None
    pixel_size: str | None
    diameter: float | None
    channel: int | None
    regions: Path | None
    export: tuple[Export, ...]
    threads: int | None
    weights: dict[str, Path]
    alone: bool


def _count_all(
    paths: list[Path], out: Path, asked: _Asked, refiner: "Refiner | None"
) -> "tuple[list[dict[str, Any]], dict[str, str], MedsegError | None]":
    """Count image after image; return results, why others failed, by name, and the first error.

    One that fails does not stop the others.
    """
    from medseg.errors import Cancelled, MedsegError
    from medseg.log import progress

    loaded: dict[str, Finder] = {}
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    first: MedsegError | None = None
    try:
        for path in progress(paths, "Counting"):
            try:
                rows.append(_count_one(path, out, asked, refiner, loaded))
            except Cancelled:
                raise
            except MedsegError as error:
                failures[path.name] = str(error)
                first = first or error
    except Cancelled as error:
        kept = f"Images already counted are in {out}; run" if rows else "Run"
        raise Cancelled(f"Stopped on request. {kept} the same command again to count all anew.") from error
    return rows, failures, first


def _count_one(
    path: Path, out: Path, asked: _Asked, refiner: "Refiner | None", loaded: "dict[str, Finder]"
) -> dict[str, Any]:
    """Count one image, with finders that are loaded once."""
    from medseg.instances.count import (
        PAGE,
        PIXELS,
        count_objects,
        default_model,
        describe_counted,
        naming,
        read_beside,
        read_measured,
        write_counted,
    )
    from medseg.instances.finders import open_finder
    from medseg.io.formats import stem_of

    volume = read_measured(path, asked.pixel_size)
    name = asked.model or default_model(volume)
    if name not in loaded:
        loaded[name] = open_finder(name, asked.threads, asked.weights)
    regions = None if asked.regions is None else read_beside(asked.regions, asked.pixel_size)
    in_pixels = asked.pixel_size == PIXELS
    with naming(path):
        found = count_objects(
            volume, loaded[name], asked.diameter, regions, in_pixels, channel=asked.channel, refiner=refiner
        )
    page = PAGE if asked.alone else f"{stem_of(path)}_{PAGE}"
    files = write_counted(found, out, stem_of(path), path, [each.value for each in asked.export], page)
    return {"image": path.name} | describe_counted(found, files)


def _line(row: dict[str, Any]) -> str:
    dropped = sum(each["count"] for each in row["dropped"])
    size = row["size"]
    median = ""
    if size is not None:
        kind, unit = size["column"].split("_", 1)
        median = f", median {kind} {size['median']:.4g} {unit}"
    left = f", {dropped} dropped (the page says why)" if dropped else ""
    drawn = ""
    if row["refined"] is not None:
        before = sum(each["sections"] for each in row["refined"]["sections_as_before"])
        drawn = f", {row['refined']['sections_accepted']} sections drawn anew and {before} left as they were"
    count = f"{row['objects']} object{'' if row['objects'] == 1 else 's'}"
    return "\n  note: ".join([f"{row['image']}: {count}{median}{drawn}{left}", *row["notes"]])


def _failed(failures: dict[str, str], count: int) -> "PartialFailure":
    """Return the error that names the images that failed, and says why the first did."""
    from medseg.errors import PartialFailure

    name, why = next(iter(failures.items()))
    more = f" and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
    named = ", ".join(list(failures)[:NAMED]) + more
    said = why if name in why else f"{name}: {why}"
    return PartialFailure(f"{len(failures)} of {count} images failed ({named}). {said}")
