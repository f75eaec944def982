"""From files to a panoptic map, and from it to a folder of results: what ``medseg panoptic`` does."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg import __version__
from medseg.config import Config
from medseg.errors import ConfigError, GeometryError
from medseg.files import scratch_folder
from medseg.instances.channels import choose_channel
from medseg.instances.count import KEPT, PIXELS, in_pixel_units, naming, read_beside, read_measured
from medseg.instances.dropped import Dropped
from medseg.instances.export import write_csv, write_panoptic_overlay, write_qc
from medseg.instances.export.label_map import smallest, write_label_map
from medseg.instances.models import ObjectModel
from medseg.instances.panoptic import (
    Panoptic,
    known_classes,
    merge_dense,
    merge_found,
    merge_masks,
    panoptic_of,
    split_things,
)
from medseg.instances.split import SPLITTERS
from medseg.instances.table import Table, measure_objects
from medseg.io import write
from medseg.io.formats import suffix_of
from medseg.io.grids import FLAT_NOTE, grid_difference
from medseg.labels import PanopticLabels
from medseg.metrics.panoptic_maps import CLASSES, PACKED
from medseg.types import Array, PathLike
from medseg.volume import Unit, Volume

if TYPE_CHECKING:
    from medseg.instances.detect import Detector


@dataclass(frozen=True, eq=False)
class PanopticResult:
    """A panoptic map with the measurements of its objects.

    Attributes
    ----------
    panoptic : Panoptic
    image : Volume or None
    table : Table
        A row for each object of the things.
    in_pixels : bool
        There is no scale: lengths are in pixels.
    """

    panoptic: Panoptic
    image: Volume | None
    table: Table
    in_pixels: bool


@dataclass(frozen=True)
class SplitChoice:
    """How objects are made of the things of a map of classes.

    Attributes
    ----------
    method : a key of :data:`medseg.instances.split.SPLITTERS`
    h_mm : depth of the valley between two objects; None for the method's own, and for components
    """

    method: str = "components"
    h_mm: float | None = None

    def config(self, unit: Unit) -> Config | None:
        """Return the settings in the unit of an image, None for the method's own.

        Raises
        ------
        ConfigError
            There is no such method, or it has no depth.
        """
        if self.method not in SPLITTERS:
            raise ConfigError(f"method {self.method!r} is unknown. Use one of {', '.join(SPLITTERS)}.")
        if self.h_mm is None:
            return None
        if self.method == "components":
            raise ConfigError("components have no depth. Leave out --h-mm, or take another method.")
        return SPLITTERS[self.method][0].from_dict({"h": self.h_mm * _per_mm(unit)})


def merge_files(
    semantic: PathLike,
    classes: PanopticLabels,
    objects: PathLike | None = None,
    image: PathLike | None = None,
    pixel_size: str | None = None,
    choice: SplitChoice | None = None,
    min_stuff_mm3: float = 0.0,
    min_thing_mm3: float = 0.0,
) -> PanopticResult:
    """Merge a map of classes with one of objects, or with the objects that its things are split into.

    Parameters
    ----------
    semantic, objects, image : files on one grid
    classes : what the values of `semantic` are
    pixel_size : where the file does not tell it; ``pixel`` for none
    choice : how things are split, where there is no map of objects
    min_stuff_mm3, min_thing_mm3 : smaller classes of stuff and objects are dropped; mm2 for a picture

    Raises
    ------
    GeometryError
        The files lie on different grids.
    LabelError
        A value has no class, or a map is no label map.
    """
    volume = _read_map(semantic, pixel_size)
    known, scale, chosen = _plane(volume), _scale(volume), choice or SplitChoice()
    config, least = chosen.config(volume.geometry.unit), min_thing_mm3 * scale
    with naming(semantic):
        if objects is None:
            size = volume.spacing[: known.ndim]
            known, numbered, small = split_things(known, classes, size, chosen.method, config, least)
            small = _with_unit(small, volume, pixel_size == PIXELS)
        else:
            given = _on_grid(
                _one_channel(read_beside(objects, pixel_size), objects), volume, objects, semantic
            )
            numbered, small = _plane(given), ()
        merged = merge_dense(known, numbered, classes, min_stuff_mm3 * scale, _voxel(volume), dropped=small)
    shown = None if image is None else _on_grid(read_beside(image, pixel_size), volume, image, semantic)
    provenance = {
        "medseg": __version__,
        "semantic": str(semantic),
        "objects": str(objects) if objects is not None else f"{chosen.method} of the things",
    }
    panoptic = panoptic_of(merged, volume, classes, provenance)
    return _measured(panoptic, shown, pixel_size == PIXELS)


def add_things(
    semantic: PathLike,
    classes: PanopticLabels,
    image: PathLike,
    model: "ObjectModel | Detector",
    diameter: float | None = None,
    pixel_size: str | None = None,
    min_stuff_mm3: float = 0.0,
    channel: int | None = None,
) -> PanopticResult:
    """Put the objects that a model finds in an image over a map of classes.

    The masks of a detector are merged by their scores. The model's classes are matched by name.

    Raises
    ------
    ConfigError
        The model finds something that is no thing of `classes`.
    GeometryError
        Image and map lie on different grids.
    """
    volume = _read_map(semantic, pixel_size)
    shown = _on_grid(read_beside(image, pixel_size), volume, image, semantic)
    with naming(semantic):
        areas = known_classes(volume.array[0], classes)
    least, voxel, in_pixels = min_stuff_mm3 * _scale(volume), _voxel(volume), pixel_size == PIXELS
    if isinstance(model, ObjectModel):
        values = _values_by_name(model.classes.things, model.classes.labels, classes)
        found = model.find(choose_channel(shown, channel), diameter, in_pixels)
        own = np.array([values[int(value)] for value in found.classes], np.int64)
        known = replace(found, classes=own, areas=areas.reshape(found.labels.shape))
        merged = merge_found(known, classes, least, voxel)
    else:
        labels = model.bundle.labels.foreground
        values = _values_by_name(labels, labels, classes)
        from medseg.instances.masks import find_masks

        seen = choose_channel(shown, channel)
        masks = [replace(mask, value=values[mask.value]) for mask in find_masks(model, seen)]
        merged = merge_masks(masks, areas, classes, model.score, min_stuff=least, voxel=voxel)
    name = model.name if isinstance(model, ObjectModel) else str(model.bundle)
    provenance: dict[str, Any] = {"medseg": __version__, "semantic": str(semantic), "model": name}
    if isinstance(model, ObjectModel) and found.notes:
        provenance["notes"] = list(found.notes)
    return _measured(panoptic_of(merged, volume, classes, provenance), shown, in_pixels)


def find_panoptic(
    image: Volume,
    model: ObjectModel,
    diameter: float | None = None,
    in_pixels: bool = False,
    min_stuff_mm3: float = 0.0,
    channel: int | None = None,
) -> PanopticResult:
    """Find things and stuff of an image with a network that knows both; parameters as for `count_objects`.

    Raises
    ------
    ConfigError
        The model finds objects only.
    DataError
        The image does not fit the model.
    """
    classes = model.classes
    if not classes.stuff:
        raise ConfigError(
            f"{model.name}: finds objects, and no stuff around them. Use medseg count, or a bundle of medseg "
            "train --task panoptic."
        )
    found = model.find(choose_channel(image, channel), diameter, in_pixels)
    merged = merge_found(found, classes, min_stuff_mm3 * _scale(image), _voxel(image))
    provenance: dict[str, Any] = {"medseg": __version__, "model": model.name, "diameter": found.diameter}
    if found.notes:
        provenance["notes"] = list(found.notes)
    return _measured(panoptic_of(merged, image, classes, provenance), image, in_pixels)


def _values_by_name(
    names: Iterable[str], labels: Mapping[str, Any], classes: PanopticLabels
) -> dict[int, int]:
    """Return the value in `classes` for each value that a model gives to one of `names`."""
    strange = sorted(set(names) - set(classes.things))
    if strange:
        raise ConfigError(
            f"the model finds {strange[0]!r}, which is no thing ({', '.join(classes.things) or 'none is'}). "
            "Add it to 'labels' and 'things' of the classes."
        )
    return {int(labels[name]): classes.labels[name] for name in names}


def _with_unit(dropped: tuple[Dropped, ...], volume: Volume, in_pixels: bool) -> tuple[Dropped, ...]:
    """Say the unit of the size below which objects were dropped."""
    unit = "px" if in_pixels else {"mm": "mm", "micron": "um"}[volume.geometry.unit]
    ndim = 2 if volume.shape[2] == 1 else 3
    return tuple(replace(entry, rule=f"{entry.rule} {unit}{ndim}") for entry in dropped)


def _read_map(path: PathLike, pixel_size: str | None) -> Volume:
    return _one_channel(read_measured(path, pixel_size), path)


def _plane(volume: Volume) -> Array:
    """Return the voxels of a label map, two axes for a picture."""
    return np.asarray(volume.array[0, ..., 0] if volume.shape[2] == 1 else volume.array[0])


def _scale(volume: Volume) -> float:
    """Return how many units of the image's volumes (of a picture: areas) are one of millimetres."""
    return _per_mm(volume.geometry.unit) ** (2 if volume.shape[2] == 1 else 3)


def _one_channel(volume: Volume, path: PathLike) -> Volume:
    if volume.channels != 1:
        raise GeometryError(
            f"{path}: has {volume.channels} channels; expected one label map. Take one channel."
        )
    return volume


def _on_grid(volume: Volume, grid: Volume, path: PathLike, name: PathLike) -> Volume:
    """Return a volume that lies on a grid, with the grid's geometry.

    Pictures have no position, and some of them no scale; they need the same shape.
    """
    picture = any(FLAT_NOTE in note for each in (volume, grid) for note in each.notes)
    if not (picture and volume.shape == grid.shape):
        difference = grid_difference(grid.geometry, volume.geometry, Path(name).name)
        if difference:
            raise GeometryError(f"{path}: {difference}. Resample it onto that grid.")
    return Volume(volume.array, grid.geometry, volume.notes)


def _voxel(volume: Volume) -> float:
    """Return the volume of a voxel, of a picture the area of a pixel."""
    if volume.shape[2] == 1:
        return float(volume.spacing[0] * volume.spacing[1])
    return volume.geometry.voxel_volume


def _per_mm(unit: Unit) -> float:
    """Return how many units of the image are a millimetre."""
    return 1000.0 if unit == "micron" else 1.0


def _measured(panoptic: Panoptic, image: Volume | None, in_pixels: bool) -> PanopticResult:
    table = measure_objects(panoptic.instances, image)
    return PanopticResult(panoptic, image, in_pixel_units(table) if in_pixels else table, in_pixels)


def write_panoptic(result: PanopticResult, folder: PathLike, name: str, source: PathLike) -> dict[str, Path]:
    """Write maps, classes, table, picture and QC list as ``NAME_...``; return what was written."""
    place, panoptic, semantic = Path(folder), result.panoptic, result.panoptic.semantic
    highest = max(panoptic.classes.labels.values(), default=0)
    written = files_of(place, name, source)
    place.mkdir(parents=True, exist_ok=True)
    with scratch_folder(place / name) as scratch:  # either all of them appear, or none
        files = files_of(scratch, name, source)
        write(panoptic.packed(), files["panoptic"])
        write(semantic.with_array(smallest(semantic.array, highest)), files["semantic"])
        write_label_map(panoptic.instances, files["instances"])
        panoptic.classes.save(files["classes"])
        write_csv(result.table, files["table"])
        write_panoptic_overlay(panoptic, result.image, files["overlay"], title=name)
        write_qc(panoptic.instances, files["qc"], in_pixels=result.in_pixels)
        for kind, file in files.items():
            os.replace(file, written[kind])
    return written


def files_of(folder: PathLike, name: str, source: PathLike) -> dict[str, Path]:
    """Return where the results of an image always go, by kind; `source` decides the format of maps."""
    suffix, place = suffix_of(Path(source)), Path(folder)
    ending = suffix if suffix in KEPT else ".tif"
    return {
        "panoptic": place / f"{name}{PACKED}{ending}",
        "semantic": place / f"{name}_semantic{ending}",
        "instances": place / f"{name}_instances{ending}",
        "classes": place / f"{name}_{CLASSES}",
        "table": place / f"{name}_objects.csv",
        "overlay": place / f"{name}_overlay.png",
        "qc": place / f"{name}_qc.json",
    }


def describe_panoptic(result: PanopticResult, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the numbers of a panoptic map as plain data."""
    panoptic = result.panoptic
    instances, classes = panoptic.instances, panoptic.classes
    ndim = instances.ndim
    unit = "px" if result.in_pixels else {"mm": "mm", "micron": "um"}[instances.unit]
    voxel = 1.0 if result.in_pixels else _voxel(panoptic.semantic)
    values = instances.classes
    return {
        "things": {name: int((values == classes.labels[name]).sum()) for name in classes.things},
        "stuff": {name: voxels * voxel for name, voxels in panoptic.stuff_voxels().items()},
        "stuff_unit": f"{unit}{ndim}",
        "objects": len(instances),
        "divisor": classes.divisor,
        "dropped": [{"rule": d.rule, "count": d.count, "voxels": d.voxels} for d in instances.dropped],
        "notes": list(instances.provenance.get("notes", ())),
        "files": {kind: str(path) for kind, path in files.items()},
    }
