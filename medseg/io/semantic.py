"""Data sets with things and stuff: a map of classes beside the map of objects of each case.

::

    images/CASE.nii.gz     as for every task
    labels/CASE.nii.gz     the number of each object, 0 where there is none
    semantic/CASE.nii.gz   the class of each voxel, things and stuff
    dataset.json           {"labels": {"liver": 1, "lesion": 2}, "things": ["lesion"]}
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.errors import ConfigError, DatasetError
from medseg.io.dataset import read_label
from medseg.io.formats import is_image, stem_of
from medseg.io.layouts import DESCRIPTIONS, Case
from medseg.labels import PanopticLabels, read_panoptic_labels
from medseg.types import IntArray, PathLike

FOLDER = "semantic"
MOST_CLASSES = 255


@dataclass(frozen=True)
class SemanticMaps:
    """The maps of classes of a data set.

    Attributes
    ----------
    classes : PanopticLabels
        Values 1, 2, ... without gaps.
    files : mapping of case name to file
    """

    classes: PanopticLabels
    files: dict[str, Path]

    def read(self, case: Case, objects: IntArray) -> IntArray:
        """Return the classes of a case, (z, y, x) or (y, x) uint8, as its objects lie.

        Raises
        ------
        DatasetError
            There is no map, it has another shape, or it contradicts the objects.
        LabelError
            It holds values that are no labels.
        """
        path = self.files.get(case.name)
        if path is None:
            raise DatasetError(f"{case.name}: has no map in {FOLDER}/. Add it, or leave the case out.")
        volume = read_label(Case(case.name, (), path, case.patient))
        found = volume.array[0].transpose(2, 1, 0)
        found = found[0] if objects.ndim == 2 and len(found) == 1 else found
        if found.shape != objects.shape:
            raise DatasetError(
                f"{path}: shape {found.shape[::-1]} differs from {objects.shape[::-1]} of the objects. "
                "Export them again."
            )
        self._check(path, found, objects)
        return np.asarray(found, np.uint8)

    def _check(self, path: Path, found: IntArray, objects: IntArray) -> None:
        known = [0, *self.classes.labels.values()]
        unknown = np.setdiff1d(np.unique(found), known)
        if unknown.size:
            raise DatasetError(
                f"{path}: holds {int(unknown[0])}, which is no class. Name it in 'labels' of the data set."
            )
        things = np.isin(found, self.classes.thing_values)
        for wrong, what in (
            (things & (objects == 0), "of things have no object"),
            (~things & (objects > 0), "of objects have no class of a thing"),
        ):
            if wrong.any():
                raise DatasetError(
                    f"{path}: {np.count_nonzero(wrong)} voxels {what}. Make the two maps agree, for example "
                    "with `medseg panoptic --semantic ... --instances ...`."
                )


def find_semantic_maps(root: PathLike) -> SemanticMaps | None:
    """Return the maps of classes of a data set, None where it has no folder of them.

    Raises
    ------
    DatasetError
        No description says which classes are things.
    LabelError
        Values have gaps.
    """
    root = Path(root)
    folder = root / FOLDER
    if not folder.is_dir():
        return None
    description = next((p for name in DESCRIPTIONS if (p := root / name).is_file()), None)
    if description is None:
        raise DatasetError(
            f"{folder}: no dataset.json says what its values are. Write labels and things into one beside it."
        )
    try:
        classes = read_panoptic_labels(description)
    except ConfigError as error:
        raise DatasetError(str(error)) from error
    if classes.label_set().n_outputs > MOST_CLASSES:
        raise DatasetError(f"{description}: more than {MOST_CLASSES - 1} classes. Leave some out.")
    if not classes.things:
        raise DatasetError(f"{description}: names no thing. Train such data without {FOLDER}/ instead.")
    return SemanticMaps(classes, {stem_of(path): path for path in sorted(folder.iterdir()) if is_image(path)})


def require_semantic_maps(root: PathLike) -> None:
    """Raise DatasetError unless a data set has a folder of maps of classes."""
    if not (Path(root) / FOLDER).is_dir():
        raise DatasetError(
            f"{root}: no {FOLDER}/ with the class of each voxel. Add it, with labels and things in "
            "dataset.json; for objects alone, --task centre-offset."
        )
