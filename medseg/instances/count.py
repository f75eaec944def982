"""From an image to its objects, and from objects to a folder of results: what ``medseg count`` does."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medseg import __version__
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.files import write_text
from medseg.instances.channels import choose_channel
from medseg.instances.count_page import build_page, size_column
from medseg.instances.export import (
    write_csv,
    write_geojson,
    write_label_map,
    write_overlay,
    write_parquet,
    write_qc,
    write_rois,
)
from medseg.instances.finders import Finder
from medseg.instances.scale import knows_spacing, parse_spacing, require_spacing, with_spacing
from medseg.instances.schema import Instances, instances_of
from medseg.instances.table import MeasureConfig, Table, check_regions, measure_objects, measure_regions
from medseg.io import read
from medseg.io.formats import suffix_of
from medseg.io.grids import FLAT_NOTE, NO_SCALE_NOTE
from medseg.io.microscopy import UNKNOWN_SPACING_NOTE
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.instances.centre_model import Found
    from medseg.instances.refine import Refiner

Further = Literal["geojson", "roi", "parquet"]
PIXELS = "pixel"
PAGE = "report.html"
# Formats that can hold a label map; of others it is a TIFF.
KEPT = {".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Counted:
    """The objects of one image with their measurements.

    Attributes
    ----------
    image : Volume
    instances : Instances
    table : Table
        A row an object; of an image without a scale, lengths are in pixels (``..._px``).
    regions : Table or None
        A row a region: counts and densities.
    diameter : float or None
        Of objects, as the image was read, in the unit of the image; None: the model does not ask for it.
    in_pixels : bool
        The image has no scale.
    """

    image: Volume
    instances: Instances
    table: Table
    regions: Table | None
    diameter: float | None
    in_pixels: bool


def read_measured(path: PathLike, pixel_size: str | None) -> Volume:
    """Read an image whose pixels have a size: its own, the given one, or ``pixel`` for none.

    Raises
    ------
    GeometryError
        The file does not tell it, and the caller did not.
    ConfigError
        `pixel_size` is no size.
    """
    volume = read(path)
    if pixel_size == PIXELS:
        plain = not knows_spacing(volume) and volume.spacing[:2] == (1.0, 1.0)
        volume = volume if plain else with_spacing(volume, (1.0,), "mm")
        return replace(volume, notes=tuple(dict.fromkeys((*volume.notes, NO_SCALE_NOTE))))
    if pixel_size is not None:
        return with_spacing(volume, *parse_spacing(pixel_size))
    try:
        return require_spacing(volume, Path(path).name)
    except GeometryError as error:
        raise GeometryError(f"{error} To measure in pixels: --pixel-size pixel.") from error


def read_beside(path: PathLike, pixel_size: str | None) -> Volume:
    """Read a file that lies on the grid of one that :func:`read_measured` read.

    A size in a unit is given to it only where it does not know its own, so that a difference shows.

    Raises
    ------
    GeometryError, ConfigError
        As :func:`read_measured`.
    """
    volume = read(path)
    return volume if pixel_size != PIXELS and knows_spacing(volume) else read_measured(path, pixel_size)


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Say in an error about data or settings which file it is about, unless it does."""
    try:
        yield
    except (DataError, ConfigError) as error:
        if Path(path).name in str(error):
            raise
        raise type(error)(f"{Path(path).name}: {str(error).removeprefix('image: ')}") from error


def default_model(volume: Volume) -> str:
    """Return the shipped model for a picture, or for a volume."""
    return "nuclei2d" if volume.shape[2] == 1 else "nuclei3d"


def count_objects(
    image: Volume,
    model: Finder,
    diameter: float | None = None,
    regions: Volume | None = None,
    in_pixels: bool = False,
    config: MeasureConfig | None = None,
    channel: int | None = None,
    refiner: "Refiner | None" = None,
) -> Counted:
    """Find and measure the objects of an image.

    Parameters
    ----------
    image : Volume
        A picture (one voxel along k) for a 2D model, a volume for a 3D one; channels as the model takes them.
    model : Finder
    diameter : float, optional
        Of objects, in the unit of the image; where the model has to know it, it is estimated if not given.
    regions : Volume, optional
        Label map to count in.
    in_pixels : bool
        The image has no scale: lengths are called pixels, and the model is told none.
    config : MeasureConfig, optional
    channel : int, optional
        That shows the objects, counted from 0; intensities are measured in all of them.
    refiner : Refiner, optional
        Draws each object anew before it is measured.

    Raises
    ------
    ConfigError
        There is no such channel, one has to be chosen, or a diameter is given for a detector.
    DataError
        A picture for a 3D model, a volume for a 2D one, or values that are not finite.
    """
    if regions is not None:
        check_regions(regions, image)
    shown = choose_channel(image, channel)
    found = model.find(shown, diameter, in_pixels)
    provenance: dict[str, Any] = {
        "medseg": __version__,
        "model": model.name,
        "diameter": found.diameter,
    }
    if found.notes:
        provenance["notes"] = list(found.notes)
    if refiner is not None:
        found = _refined(shown, found, refiner, provenance)
    labels = image.with_array(found.labels.reshape(1, *image.shape))
    names = model.class_names
    instances = instances_of(labels, found.classes, found.scores, names, found.dropped, provenance)
    if found.source_ids is not None:
        instances = replace(instances, source_ids=found.source_ids)
    table = measure_objects(instances, image, regions, config=config)
    areas = None if regions is None else measure_regions(instances, regions)
    if in_pixels:
        table = in_pixel_units(table)
        areas = None if areas is None else in_pixel_units(areas)
    return Counted(image, instances, table, areas, found.diameter, in_pixels)


def _refined(image: Volume, found: "Found", refiner: "Refiner", provenance: dict[str, Any]) -> "Found":
    """Return the objects drawn anew; scores stay those of the model that found them."""
    result = refiner.refine(image, found.labels)
    provenance["refined"] = {"network": refiner.name, **result.to_dict()}
    left = np.unique(result.labels)
    kept = left[left > 0] - 1
    return replace(
        found,
        labels=result.labels,
        scores=found.scores[kept],
        classes=found.classes[kept],
        source_ids=None if found.source_ids is None else found.source_ids[kept],
        dropped=(*found.dropped, *result.dropped),
    )


def in_pixel_units(table: Table) -> Table:
    """Call lengths pixels, and leave out millilitres."""
    named = {_pixel_name(name): column for name, column in table.columns.items() if not name.endswith("_ml")}
    return replace(table, columns=named)


def _pixel_name(name: str) -> str:
    stem, _, unit = name.rpartition("_")
    return f"{stem}_px{unit[2:]}" if unit[:2] in ("mm", "um") and unit[2:] in ("", "2", "3") else name


def write_counted(
    counted: Counted,
    folder: PathLike,
    name: str,
    source: PathLike,
    further: Sequence[Further] = (),
    page: str = PAGE,
) -> dict[str, Path]:
    """Write label map, table, picture and QC list as ``NAME_...``, and a page; return what was written.

    Parameters
    ----------
    counted : Counted
    folder : made if it is not there
    name : what names of files begin with
    source : the image, which the label map shares the format of where that can hold one
    further : outlines or tables besides
    page : name of the HTML page

    Raises
    ------
    ConfigError
        Outlines of a volume were asked for: they are for pictures.
    """
    instances, place = counted.instances, Path(folder)
    if instances.ndim == 3 and {"geojson", "roi"} & set(further):
        raise ConfigError(
            "outlines (geojson, roi) are of pictures, and the image is a volume. Leave them out."
        )
    place.mkdir(parents=True, exist_ok=True)
    files = files_of(place, name, source)
    write_label_map(instances, files["labels"])
    write_csv(counted.table, files["table"])
    write_overlay(instances, counted.image, files["overlay"], title=name)
    write_qc(instances, files["qc"], in_pixels=counted.in_pixels)
    if counted.regions is not None:
        files["regions"] = place / f"{name}_regions.csv"
        write_csv(counted.regions, files["regions"])
    files |= _write_further(counted, place, name, further)
    build_page(counted, Path(source).name, files).write(place / page)
    return files | {"page": place / page}


def files_of(folder: PathLike, name: str, source: PathLike) -> dict[str, Path]:
    """Return where the results of an image always go, by kind."""
    suffix, place = suffix_of(Path(source)), Path(folder)
    return {
        "labels": place / f"{name}_labels{suffix if suffix in KEPT else '.tif'}",
        "table": place / f"{name}_objects.csv",
        "overlay": place / f"{name}_overlay.png",
        "qc": place / f"{name}_qc.json",
    }


def _write_further(counted: Counted, place: Path, name: str, further: Sequence[Further]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for kind in further:
        if kind == "parquet":
            files[kind] = place / f"{name}_objects.parquet"
            write_parquet(counted.table, files[kind])
        elif kind == "geojson":
            files[kind] = place / f"{name}_objects.geojson"
            write_geojson(counted.instances, files[kind], counted.table)
        else:
            files[kind] = place / f"{name}_rois.zip"
            write_rois(counted.instances, files[kind])
    return files


def describe_counted(counted: Counted, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the numbers of an image as plain data."""
    instances = counted.instances
    unit = "px" if counted.in_pixels else {"mm": "mm", "micron": "um"}[instances.unit]
    size = size_column(counted)
    return {
        "objects": len(instances),
        "model": instances.provenance["model"],
        "unit": unit,
        "diameter": None if counted.diameter is None else round(counted.diameter, 3),
        "size": None if size is None else {"column": size, "median": float(np.median(counted.table[size]))},
        "touching_border": int(np.sum(counted.table.columns["touches_border"])) if len(instances) else 0,
        "dropped": [{"rule": d.rule, "count": d.count, "voxels": d.voxels} for d in instances.dropped],
        "refined": instances.provenance.get("refined"),
        "notes": [*notes_of(counted.image), *instances.provenance.get("notes", ())],
        "files": {kind: str(path) for kind, path in files.items()},
    }


def notes_of(image: Volume) -> list[str]:
    """Return what its reader had to assume; that a picture has no third axis is nothing new."""
    return [note for note in image.notes if note not in (FLAT_NOTE, NO_SCALE_NOTE, UNKNOWN_SPACING_NOTE)]


def write_summary(
    rows: Sequence[Mapping[str, Any]], path: PathLike, failures: Mapping[str, str] | None = None
) -> None:
    """Write the counts of several images, a line each; at the end those that failed, and why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "objects", "error"))
    writer.writerows((row["image"], row["objects"], "") for row in rows)
    writer.writerows((name, "", error) for name, error in (failures or {}).items())
    write_text(path, text.getvalue())
