"""Panoptic maps on disk, and the panoptic quality of folders of them.

A folder holds the results of ``medseg panoptic``: ``CASE_panoptic.nii.gz``, where a voxel holds
``value * divisor + object``, and ``CASE_classes.json`` or one ``classes.json`` for all; or it is a data set
with ``labels/CASE`` (objects), ``semantic/CASE`` (classes) and ``dataset.json``. One may be compared with the
other; the classes of the two sides are matched by name.

By Kirillov et al., Panoptic Segmentation (CVPR 2019, arXiv 1801.00868), section 4: counts of all images are
added by class, and PQ, SQ and RQ are then means over the classes that occur; all stuff of a class in an image
is one segment. Unlike there, a voxel without a class is not void unless that is asked for: in medicine,
nothing at a place is a statement, and an object invented there a mistake.
"""

import csv
import io
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import medseg
from medseg.errors import ConfigError, DatasetError, GeometryError, LabelError
from medseg.files import write_text
from medseg.io.grids import FLAT_NOTE, grid_difference
from medseg.labels import PanopticLabels, read_panoptic_labels
from medseg.metrics.cases import measure_cases, warn_alone
from medseg.metrics.definitions import Failure
from medseg.metrics.overlap_table import overlap_table
from medseg.metrics.pairing import case_name, find_cases, load_label_map
from medseg.metrics.panoptic import (
    PanopticClasses,
    PanopticMean,
    PanopticQuality,
    panoptic_quality_by_class,
)
from medseg.types import Array, PathLike
from medseg.volume import Volume

PACKED = "_panoptic"
CLASSES = "classes.json"
SEMANTIC, OBJECTS = "semantic", ("labels", "labelsTr")
FORMULAS = {
    "pq": "sum IoU / (TP + FP/2 + FN/2), IoU > 0.5",
    "sq": "sum IoU / TP, IoU > 0.5",
    "rq": "TP / (TP + FP/2 + FN/2), IoU > 0.5",
}
EQUALS = "torchmetrics 1.9.0, PanopticQuality"
_VOID = "void"


@dataclass(frozen=True)
class PanopticSource:
    """Where the panoptic map of a case is.

    Attributes
    ----------
    classes : file that says what its values are
    packed : file of both, or None
    semantic, objects : files of each, or None
    """

    classes: Path
    packed: Path | None = None
    semantic: Path | None = None
    objects: Path | None = None


@dataclass(frozen=True)
class PanopticPair:
    """One case: its name, prediction and reference."""

    name: str
    prediction: PanopticSource
    reference: PanopticSource


@dataclass(frozen=True, eq=False)
class PanopticMap:
    """Classes and objects of one image.

    Attributes
    ----------
    semantic, objects : int, of one shape
    classes : PanopticLabels
    grid : Volume, optional
        One of the maps as it was read.
    """

    semantic: Array
    objects: Array
    classes: PanopticLabels
    grid: Volume | None = None


@dataclass(frozen=True, eq=False)
class PanopticEvaluation:
    """The result of :func:`evaluate_panoptic`.

    Attributes
    ----------
    total : counts of all cases together
    cases : of each case, by name
    background_is_void : setting
    failures : cases that could not be measured
    predictions_alone, references_alone : case names without a partner
    """

    total: PanopticClasses
    cases: Mapping[str, PanopticClasses]
    background_is_void: bool
    failures: tuple[Failure, ...]
    predictions_alone: tuple[str, ...]
    references_alone: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that strict JSON can hold."""
        return {
            "medseg": medseg.__version__,
            "settings": {"background_is_void": self.background_is_void},
            "formulas": FORMULAS,
            "means": "over the classes that occur; counts of all images are added first",
            "equals": EQUALS,
            **describe_quality(self.total),
            "cases": {name: describe_quality(case) for name, case in self.cases.items()},
            "failures": [asdict(failure) for failure in self.failures],
            "predictions_without_reference": list(self.predictions_alone),
            "references_without_prediction": list(self.references_alone),
        }

    def dump_json(self) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_csv(self, path: PathLike) -> None:
        """Write a line for each class of all cases together and of each case; undefined is empty."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case", "class", "kind", "tp", "fp", "fn", "pq", "sq", "rq"])
        for name, found in (("", self.total), *self.cases.items()):
            for row in _lines(found):
                writer.writerow([name, *row])
        write_text(path, stream.getvalue())


def evaluate_panoptic(
    predictions: PathLike, references: PathLike, background_is_void: bool = False
) -> PanopticEvaluation:
    """Measure panoptic maps against references.

    Parameters
    ----------
    predictions, references : folders, or two files
    background_is_void : bool
        Voxels of the reference without a class are not judged, as where a data set leaves them open.

    Raises
    ------
    DatasetError
        Nothing matches, or not one case could be measured.
    """
    predicted, known = find_panoptic_maps(predictions), find_panoptic_maps(references)
    if Path(predictions).is_file() and Path(references).is_file():
        predicted = dict(zip(known, predicted.values(), strict=True))
    both = sorted(set(predicted) & set(known))
    if not both:
        raise DatasetError(
            f"no prediction matches a reference by name: {_some(predicted)} against {_some(known)}. Rename "
            "the files so that both sides use the same case names."
        )
    alone = tuple(sorted(set(predicted) - set(known))), tuple(sorted(set(known) - set(predicted)))
    warn_alone(alone[0], "predictions have no reference")
    warn_alone(alone[1], "references have no prediction")
    pairs = [PanopticPair(name, predicted[name], known[name]) for name in both]
    measured, failures = measure_cases(
        pairs, "evaluate panoptic maps", lambda pair: (pair.name, _measure(pair, background_is_void))
    )
    cases = dict(measured)
    total = PanopticClasses.merged(cases.values())
    return PanopticEvaluation(total, cases, background_is_void, failures, *alone)


def find_panoptic_maps(path: PathLike) -> dict[str, PanopticSource]:
    """Return the panoptic maps of a folder by case name; of one file its only one.

    Raises
    ------
    DatasetError
        There are none, or nothing says what their values are.
    """
    path = Path(path)
    if path.is_file():
        name = _case(path)
        return {name: PanopticSource(_classes_of(path.parent, name), path)}
    if (path / SEMANTIC).is_dir():
        return _find_in_dataset(path)
    files = {case_name(file): file for file in sorted(path.glob("*")) if file.is_file()}
    packed = [file for stem, file in files.items() if stem and stem.endswith(PACKED)]
    if not packed:
        raise DatasetError(
            f"{path}: no panoptic maps. Expected CASE{PACKED}.nii.gz of `medseg panoptic`, or a data set "
            f"with {SEMANTIC}/, labels/ and dataset.json."
        )
    return {_case(file): PanopticSource(_classes_of(path, _case(file)), file) for file in packed}


def read_panoptic_map(source: PanopticSource, name: str) -> PanopticMap:
    """Read the panoptic map of a case.

    Raises
    ------
    ConfigError, DatasetError, LabelError, ReadError, GeometryError
        Its classes or its maps cannot be read, or do not fit each other.
    """
    classes = read_panoptic_labels(source.classes)
    if source.packed is not None:
        volume = load_label_map(source.packed, name)
        return PanopticMap(*classes.unpack(volume.array[0]), classes, volume)
    assert source.semantic is not None  # one of the two kinds
    if source.objects is None:
        raise DatasetError(f"{name}: has a map of classes and none of objects in labels/. Add it.")
    semantic = load_label_map(source.semantic, name)
    objects = load_label_map(source.objects, name)
    _check_same_grid(name, semantic, objects, "the semantic map")
    unknown = np.setdiff1d(np.unique(semantic.array), [0, *classes.labels.values()])
    if unknown.size:
        raise LabelError(
            f"{name}: the semantic map holds {int(unknown[0])}, which is no class. Name it in 'labels' of "
            f"{source.classes.name}."
        )
    things = np.isin(semantic.array[0], classes.thing_values)
    stray = int(np.count_nonzero(things != (objects.array[0] > 0)))
    if stray:
        raise LabelError(
            f"{name}: {stray} voxels are of an object or of a thing, but not of both. Make the two maps "
            "agree, for example with `medseg panoptic --semantic ... --instances ...`."
        )
    return PanopticMap(semantic.array[0], objects.array[0], classes, semantic)


def compare_panoptic(
    reference: PanopticMap, prediction: PanopticMap, background_is_void: bool = False
) -> PanopticClasses:
    """Return the counts of one image by class.

    Raises
    ------
    ConfigError
        The prediction has a class that the reference does not know, or calls stuff what is a thing there.
    """
    classes = reference.classes
    _check_classes(classes, prediction.classes)
    room = 1 + max(int(side.objects.max(initial=0)) for side in (reference, prediction))
    segments = [side.semantic.astype(np.int64) * room + side.objects for side in (reference, prediction)]
    table = overlap_table(*segments)
    names = [
        {int(value): side.classes.names.get(int(value) // room, _VOID) for value in values}
        for side, values in ((reference, table.references), (prediction, table.predictions))
    ]
    return panoptic_quality_by_class(
        table, *names, things=classes.things, stuff=classes.stuff, background_is_void=background_is_void
    )


def describe_quality(found: PanopticClasses) -> dict[str, Any]:
    """Return the means and every class as plain data."""
    return {
        "overall": _mean(found.overall),
        "things": _mean(found.overall_things),
        "stuff": _mean(found.overall_stuff),
        "classes": {
            name: {"kind": _kind(found, name), **_quality(quality)} for name, quality in found.counts.items()
        },
    }


def _measure(pair: PanopticPair, background_is_void: bool) -> PanopticClasses:
    name = pair.name
    known, found = read_panoptic_map(pair.reference, name), read_panoptic_map(pair.prediction, name)
    assert found.grid is not None and known.grid is not None  # both were read
    _check_same_grid(name, known.grid, found.grid, "the reference")
    return compare_panoptic(known, found, background_is_void)


def _check_same_grid(name: str, first: Volume, second: Volume, title: str) -> None:
    """Refuse two grids; of flat images, which have no position, only two shapes."""
    if first.shape == second.shape and any(FLAT_NOTE in note for v in (first, second) for note in v.notes):
        return
    difference = grid_difference(first.geometry, second.geometry, title)
    if difference:
        raise GeometryError(f"{name}: {difference}. Resample one onto the grid of the other.")


def _check_classes(known: PanopticLabels, found: PanopticLabels) -> None:
    for kind, names, others in (
        ("a thing", found.things, known.stuff),
        ("stuff", found.stuff, known.things),
    ):
        both = sorted(set(names) & set(others))
        if both:
            raise ConfigError(
                f"{both[0]!r} is {kind} in the prediction only. Declare it alike on both sides."
            )
    strange = sorted(set(found.names.values()) - set(known.names.values()))
    if strange:
        raise ConfigError(
            f"the prediction has the class {strange[0]!r}, which the reference does not know ("
            f"{', '.join(known.names.values())}). Name the classes alike on both sides."
        )


def _find_in_dataset(path: Path) -> dict[str, PanopticSource]:
    folder = next((path / name for name in OBJECTS if (path / name).is_dir()), None)
    if folder is None:
        raise DatasetError(f"{path}: has {SEMANTIC}/ but no labels/ with the objects. Add them.")
    description = next((p for n in ("dataset.json", CLASSES) if (p := path / n).is_file()), None)
    if description is None:
        raise DatasetError(f"{path}: no dataset.json with labels and things. Add it.")
    semantic, objects = find_cases(path / SEMANTIC), find_cases(folder)
    return {
        name: PanopticSource(description, None, file, objects.get(name)) for name, file in semantic.items()
    }


def _case(path: Path) -> str:
    return (case_name(path) or path.name).removesuffix(PACKED)


def _classes_of(folder: Path, name: str) -> Path:
    own, shared = folder / f"{name}_{CLASSES}", folder / CLASSES
    if own.is_file() or shared.is_file():
        return own if own.is_file() else shared
    raise DatasetError(
        f"{folder}: neither {own.name} nor {CLASSES} says what the values of {name} are. `medseg panoptic` "
        "writes it beside its maps."
    )


def _some(names: Collection[str], most: int = 6) -> str:
    return ", ".join(sorted(names)[:most]) + (" ..." if len(names) > most else "")


def _kind(found: PanopticClasses, name: str) -> str:
    return "thing" if name in found.things else "stuff"


def _mean(mean: PanopticMean) -> dict[str, Any]:
    return {name: _plain(getattr(mean, name)) for name in FORMULAS} | {"classes": mean.classes}


def _quality(quality: PanopticQuality) -> dict[str, Any]:
    counts = {"tp": quality.tp, "fp": quality.fp, "fn": quality.fn}
    return counts | {name: _plain(getattr(quality, name)) for name in FORMULAS}


def _lines(found: PanopticClasses) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, quality in found.counts.items():
        values = ["" if (v := _plain(getattr(quality, key))) is None else repr(v) for key in FORMULAS]
        rows.append([name, _kind(found, name), quality.tp, quality.fp, quality.fn, *values])
    for title, mean in (
        ("mean", found.overall),
        ("mean of things", found.overall_things),
        ("mean of stuff", found.overall_stuff),
    ):
        values = ["" if (v := _plain(getattr(mean, key))) is None else repr(v) for key in FORMULAS]
        rows.append([title, "", "", "", "", *values])
    return rows


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
