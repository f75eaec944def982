"""What one object of a label map is: read from labels as they come, numbered as detectors want them.

A detector's label map holds ``1 + c + n_classes * k`` for object k (from 0) of class c (from 0): the class
is in the number, so that any crop or turn of the map keeps both.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medseg.errors import LabelError, PlanError, ReadError
from medseg.labels import LabelSet
from medseg.types import Array, IntArray
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.io import Case, Dataset

logger = logging.getLogger("medseg")

ObjectKind = Literal["values", "components"]

# Preprocessed label maps are int16.
MOST_OBJECTS = 32_000


def check_labels(labels: LabelSet) -> None:
    """Refuse label sets that objects cannot be made of.

    Raises
    ------
    PlanError
        Labels overlap, or some voxels are not annotated.
    """
    if labels.has_regions:
        raise PlanError(
            "--task detection needs labels that do not overlap, and these are regions. List one value each."
        )
    if labels.ignore is not None:
        raise PlanError(
            "--task detection cannot leave out voxels that nobody annotated, and this dataset has an ignore "
            "label. Train on cases that are annotated as a whole."
        )


def name_objects(dataset: "Dataset") -> "Dataset":
    """Return a dataset with one class, ``object``, where nothing but numbers names its many labels.

    Without a description `medseg.io` calls the values that occur label_1, label_2, ...; in maps of objects
    they are the objects' numbers.
    """
    names = list(dataset.labels.foreground)
    if len(names) < 2 or any(not re.fullmatch(r"label_\d+", name) for name in names):
        return dataset
    logger.warning(
        "%s: nothing names its %d label values, so they are taken for the numbers of objects of one class. "
        "If they are classes, name them in a dataset.json.",
        *(dataset.root, len(names)),
    )
    return replace(dataset, labels=LabelSet(entries={"background": 0, "object": 1}))


def find_kind(dataset: "Dataset") -> ObjectKind:
    """Return what an object is: every value, where label maps hold values beyond the label set, or say so.

    A file ``CASE.json`` beside ``CASE.nii.gz`` with ``{"instances": {"1": 0, "2": 1}}`` says so, and gives
    the class of each value (as nnDetection's datasets have it).
    """
    known = set(dataset.labels.values)
    for case, volume in _label_maps(dataset):
        if class_table(case) is not None or not set(np.unique(volume.array).tolist()) <= known:
            return "values"
    return "components"


def _label_maps(dataset: "Dataset") -> Iterator[tuple["Case", Volume]]:
    from medseg.io import read_label

    for case in dataset.training:
        if case.label is not None:
            yield case, read_label(case)


def class_table(case: "Case") -> dict[int, int] | None:
    """Return the class, from 0, of every value of a case's label map, where a file beside it tells.

    Raises
    ------
    ReadError
        The file is there, and says something else.
    """
    if case.label is None:
        return None
    name = Path(case.label).name
    path = Path(case.label).with_name(name[: name.index(".")] + ".json")
    if not path.is_file():
        return None
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))["instances"]
        return {int(value): int(kind) for value, kind in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReadError(
            f'{path}: expected {{"instances": {{"1": 0}}}}, a class for every value. Mend or remove it.'
        ) from error


def read_objects(case: "Case", labels: LabelSet, kind: ObjectKind) -> Volume:
    """Return the label map of a case, its objects numbered as the module says.

    Returns
    -------
    Volume
        int32, on the grid of the label map.

    Raises
    ------
    LabelError
        A value has no class, or there are too many objects for one case.
    """
    from medseg.io import read_label

    volume = read_label(case)
    numbered = number_objects(volume.array[0], labels, kind, class_table(case), case.name)
    return volume.with_array(numbered[None])


def number_objects(
    array: Array, labels: LabelSet, kind: ObjectKind, table: dict[int, int] | None = None, where: str = ""
) -> IntArray:
    """Number the objects of a label map (a0, a1, a2); parameters as for :func:`read_objects`.

    Components touch by faces, edges or corners. Objects of a class are numbered by their first voxel in
    components, and by their value in maps of values.
    """
    foreground = [value for value in labels.foreground.values() if isinstance(value, int)]
    if kind == "values":
        return _number_values(array, len(foreground), table, where)
    import cc3d

    n_classes = len(foreground)
    result = np.zeros(array.shape, np.int32)
    for number, value in enumerate(foreground):
        mask = np.ascontiguousarray(array == value)
        if mask.any():
            parts = cc3d.connected_components(mask, connectivity=26).astype(np.int32)
            result[mask] = 1 + number + n_classes * (parts[mask] - 1)
    _check_count(int(result.max(initial=0)), n_classes, where)
    return result


def _number_values(array: Array, n_classes: int, table: dict[int, int] | None, where: str) -> IntArray:
    values = np.unique(array)
    values = values[values != 0]
    if table is None and n_classes > 1:
        raise LabelError(
            f"{where}: there are {n_classes} classes, and nothing says which object is of which. Put a file "
            f'{where}.json with {{"instances": {{"1": 0}}}} beside the label map.'
        )
    kinds = [0 if table is None else table.get(int(value), -1) for value in values]
    odd = [v for v, c in zip(values.tolist(), kinds, strict=True) if not 0 <= c < n_classes]
    if odd:
        raise LabelError(
            f"{where}: object {odd[0]} has no class of 0 to {n_classes - 1}. Complete the file of instances."
        )
    numbers = np.zeros(len(values) + 1, np.int64)
    seen = [0] * n_classes
    for place, kind in enumerate(kinds):
        numbers[place + 1] = 1 + kind + n_classes * seen[kind]
        seen[kind] += 1
    _check_count(int(numbers.max()), n_classes, where)
    dense = np.searchsorted(values, array) + 1
    dense[array == 0] = 0
    numbered: IntArray = numbers[dense].astype(np.int32)
    return numbered


def _check_count(largest: int, n_classes: int, where: str) -> None:
    if largest > MOST_OBJECTS:
        raise LabelError(
            f"{where}: holds some {largest // n_classes:,} objects, more than a case may for detection "
            f"({MOST_OBJECTS // n_classes:,}). Cut the image, or train --task centre-offset."
        )
