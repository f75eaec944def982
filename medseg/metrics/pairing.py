"""Which prediction belongs to which reference: folders by case name, lists by position."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.config import read_mapping
from medseg.errors import ConfigError, DataError, DatasetError, GeometryError, LabelError
from medseg.io import READERS, read
from medseg.labels import LabelSet, LabelValue
from medseg.segmentation import Segmentation
from medseg.types import PathLike
from medseg.volume import Volume

PREDICTIONS = "predictions.json"
"""What ``medseg predict`` leaves beside its label maps; it names their labels."""
Source = Path | Volume
"""Where one label map comes from: a file, or memory."""
Maps = PathLike | Volume | Segmentation | Sequence[PathLike | Volume | Segmentation]
"""Label maps of one side: a folder, a file, a Volume, or a sequence of files and Volumes."""
NamedMaps = Maps | Mapping[str, PathLike | Volume | Segmentation]


# What `medseg count` calls the label map of a case.
LABELS_SUFFIX = "_labels"


@dataclass(frozen=True, eq=False)
class Pair:
    """One case: its name, prediction and reference."""

    name: str
    prediction: Source
    reference: Source


@dataclass(frozen=True, eq=False)
class Pairing:
    """All pairs by name, and the names that found no partner."""

    pairs: tuple[Pair, ...]
    predictions_alone: tuple[str, ...] = ()
    references_alone: tuple[str, ...] = ()


def pair_cases(predictions: NamedMaps, references: NamedMaps) -> Pairing:
    """Match predictions with references.

    Two folders (or mappings) are matched by case name, which is the file name without its suffixes, so
    ``case.mha`` meets ``case.nii.gz``, and so does ``case_labels.nii.gz`` of ``medseg count``. Two files, two
    Volumes or two sequences are matched by position.

    Raises
    ------
    DatasetError
        Nothing matches, a folder holds one case twice, or two sequences differ in length.
    """
    predicted, named = _collect(predictions, "prediction")
    known, also_named = _collect(references, "reference")
    predicted = _without_suffix(predicted, known) if named and also_named else predicted
    if not (named or also_named):
        return _by_position(list(predicted.items()), list(known.items()))
    both = [name for name in predicted if name in known]
    pairing = Pairing(
        tuple(Pair(name, predicted[name], known[name]) for name in sorted(both)),
        tuple(sorted(set(predicted) - set(known))),
        tuple(sorted(set(known) - set(predicted))),
    )
    if not both:
        raise DatasetError(
            f"no prediction matches a reference by name. Predictions: {_listing(predicted)}. References: "
            f"{_listing(known)}. Rename the files so that both sides use the same case names."
        )
    return pairing


def _without_suffix(predicted: dict[str, Source], known: dict[str, Source]) -> dict[str, Source]:
    """Call ``case_labels`` case where a reference is called that, and leave its ``case_overlay`` out."""
    cases = {name.removesuffix(LABELS_SUFFIX) for name in predicted if name.endswith(LABELS_SUFFIX)}
    cases = {name for name in cases if name in known and name not in predicted}
    aside = {f"{name}_overlay" for name in cases}
    renamed = {f"{name}{LABELS_SUFFIX}": name for name in cases}
    return {renamed.get(name, name): source for name, source in predicted.items() if name not in aside}


def load_label_map(source: Source, name: str) -> Volume:
    """Return one channel of integers.

    Raises
    ------
    ReadError
        The file cannot be read.
    LabelError
        There is more than one channel, or a value is not integral.
    """
    volume = read(source) if isinstance(source, Path) else source
    if volume.channels != 1:
        raise LabelError(f"{name}: {volume.channels} channels where a label map has one. Pass label maps.")
    array = volume.array
    if array.dtype.kind in "biu":
        return volume
    if array.dtype.kind != "f":
        raise LabelError(f"{name}: holds {array.dtype}, which is no label. Pass label maps of whole numbers.")
    rounded = np.rint(array) if np.isfinite(array).all() else None
    if rounded is None or not np.array_equal(rounded, array):
        raise LabelError(
            f"{name}: values are not whole numbers, so this is no label map. Pass label maps, not "
            "images or probabilities."
        )
    highest = float(np.abs(rounded).max(initial=0.0))
    if highest >= 2.0**63:
        raise LabelError(f"{name}: holds {highest:g}, which is no label of 64 bits. Renumber the objects.")
    return volume.with_array(rounded.astype(np.int32 if highest < 2.0**31 else np.int64))


def find_cases(folder: PathLike) -> dict[str, Path]:
    """Return the readable files of a folder by case name.

    Raises
    ------
    DatasetError
        There is no such folder, nothing in it is readable, or two files have one case name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such file or folder. Check the path.")
    cases: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = case_name(path)
        if name is None or path.name.startswith(".") or not path.is_file():
            continue
        if name in cases:
            raise DatasetError(
                f"{folder}: {cases[name].name} and {path.name} are both case {name!r}. Remove one of them."
            )
        cases[name] = path
    if not cases:
        raise DatasetError(
            f"{folder}: no image files. Expected label maps such as CASE.nii.gz; known suffixes: "
            f"{', '.join(sorted(READERS))}."
        )
    return cases


def case_name(path: Path) -> str | None:
    """Return the file name without the longest suffix that a reader is registered for, or None."""
    lower = path.name.lower()
    known = [suffix for suffix in READERS if lower.endswith(suffix) and len(lower) > len(suffix)]
    return path.name[: -len(max(known, key=len))] if known else None


def find_labels(labels: LabelSet | PathLike | None, *sides: NamedMaps) -> LabelSet | None:
    """Return the label set that was given, or that lies beside one of the folders; None: not known.

    Parameters
    ----------
    labels : LabelSet or path
        A ``dataset.json`` or plan, or a folder with a ``dataset.json``. None: a ``dataset.json`` in one of
        the folders of `sides` or in its parent is taken, else the report of ``medseg predict`` in one.

    Raises
    ------
    ConfigError
        The file does not exist or holds no labels.
    LabelError
        Its labels do not fit together.
    """
    if isinstance(labels, LabelSet):
        return labels
    if labels is not None:
        path = Path(labels)
        return _read_labels(path / "dataset.json" if path.is_dir() else path)
    for side in sides:
        if isinstance(side, str | Path):
            for folder in (Path(side), Path(side).parent):
                if (folder / "dataset.json").is_file():
                    return _read_labels(folder / "dataset.json")
    for side in sides:
        if isinstance(side, str | Path) and (found := _predicted_labels(Path(side))):
            return found
    return None


def _predicted_labels(side: Path) -> LabelSet | None:
    """Return the labels that ``medseg predict`` wrote beside its label maps."""
    name = case_name(side)
    path = side / PREDICTIONS if side.is_dir() else side.with_name(f"{name}.json")
    if not path.is_file():
        path = side.with_name(PREDICTIONS)
    try:
        return _read_labels(path)
    except (ConfigError, DataError):  # another file of this name, or none: nothing is known then
        return None


def _read_labels(path: Path) -> LabelSet:
    content = read_mapping(path)
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise ConfigError(f"{path}: no 'labels'. Expected a dataset.json of nnU-Net or MSD, or a plan.")
    if isinstance(labels.get("entries"), dict):  # a plan holds a dumped LabelSet
        return LabelSet.parse(labels["entries"], labels.get("regions_class_order"))
    return LabelSet.parse(labels, content.get("regions_class_order"))


def found_labels(values: Iterable[int]) -> dict[str, LabelValue]:
    """Return an entry for each value but 0, named by the value."""
    return {str(value): value for value in sorted(set(values) - {0})}


def _collect(maps: NamedMaps, side: str) -> tuple[dict[str, Source], bool]:
    """Return sources by name, and whether the names mean something."""
    if isinstance(maps, Mapping):
        return {name: _source(item) for name, item in maps.items()}, True
    if isinstance(maps, str | Path):
        path = Path(maps)
        if not path.is_file():
            return dict(find_cases(path)), True
        return {case_name(path) or path.name: path}, False
    if isinstance(maps, Volume | Segmentation):
        return {f"{side}_000": _source(maps)}, False
    items = [_source(item) for item in maps]
    names = [case_name(s) if isinstance(s, Path) else None for s in items]
    unique = len(set(names)) == len(names)
    labelled = {
        (name if unique and name else f"{side}_{k:03d}"): item
        for k, (name, item) in enumerate(zip(names, items, strict=True))
    }
    return labelled, False


def _source(item: object) -> Source:
    if isinstance(item, Segmentation):
        return item.volume
    if isinstance(item, Volume):
        return item
    if isinstance(item, str | Path):
        return Path(item)
    raise GeometryError(
        f"a {type(item).__name__} is neither a file nor a Volume, so its voxel size is unknown. "
        "Wrap an array: Volume(array, Geometry(array.shape, affine))."
    )


def _by_position(predicted: list[tuple[str, Source]], known: list[tuple[str, Source]]) -> Pairing:
    if len(predicted) != len(known):
        raise DatasetError(
            f"{len(predicted)} predictions and {len(known)} references: lists are matched by position, "
            "so expected as many of each. Pass two folders or two mappings to match by name."
        )
    if not known:
        raise DatasetError("no prediction and no reference was given. Pass at least one of each.")
    pairs = []
    for k, ((name, prediction), (other, reference)) in enumerate(zip(predicted, known, strict=True)):
        files = [n for n, s in ((other, reference), (name, prediction)) if isinstance(s, Path)]
        pairs.append(Pair(files[0] if files else f"case_{k:03d}", prediction, reference))
    return Pairing(tuple(pairs))


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
