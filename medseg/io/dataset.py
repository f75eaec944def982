"""A dataset as training and planning see it, and the reading of its cases."""

import glob
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DatasetError, GeometryError, LabelError, ReadError
from medseg.io.channels import set_channels
from medseg.io.formats import is_image, read, stem_of, suffix_of
from medseg.io.grids import grid_difference
from medseg.io.layouts import Case, Layout, files_per_case, group_channels, read_layout
from medseg.labels import LabelSet
from medseg.log import logger
from medseg.types import Array, PathLike
from medseg.volume import Volume

__all__ = ["Case", "Dataset", "list_cases", "open_dataset", "read_image", "read_label", "with_channels"]

# What header scaling loses: floats that near a whole number are labels.
WHOLE = 1e-4
# Findings that training cannot live with; the others are for `medseg check` to tell.
BLOCKING = {
    "case_name",
    "channel_count",
    "description",
    "duplicate_case",
    "file_ending",
    "labels",
    "missing_channel",
    "missing_image",
    "missing_label",
    "no_cases",
    "two_files",
}
_INTEGERS = (np.uint8, np.uint16, np.int16, np.int32, np.int64)


@dataclass(frozen=True)
class Dataset:
    """What is trained on.

    Attributes
    ----------
    name : str
        Name of the folder (``Dataset004_Hippocampus``).
    root : Path
        The folder.
    channels : tuple of str
        Names in channel order; they decide the normalisation.
    labels : LabelSet
        Meaning of the label values.
    training, test : tuple of Case
        Sorted by name.
    file_ending : str
        Of the images, with the dot.
    reader : str
        Name of the reader class that nnU-Net would choose.
    """

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: LabelSet
    training: tuple[Case, ...]
    test: tuple[Case, ...]
    file_ending: str
    reader: str

    @property
    def num_training(self) -> int:
        """Number of training cases."""
        return len(self.training)

    def to_dataset_json(self) -> dict[str, Any]:
        """Return the content of nnU-Net's ``dataset.json``, keys in its order."""
        entries = self.labels.entries.items()
        result: dict[str, Any] = {
            "channel_names": {str(number): name for number, name in enumerate(self.channels)},
            "labels": {name: list(v) if isinstance(v, tuple) else v for name, v in entries},
        }
        if self.labels.regions_class_order is not None:
            result["regions_class_order"] = list(self.labels.regions_class_order)
        return {**result, "numTraining": self.num_training, "file_ending": self.file_ending}


def open_dataset(path: PathLike, labels: LabelSet | None = None) -> Dataset:
    """Open an nnU-Net raw folder, an MSD task, ``images/`` + ``labels/``, or a CSV manifest.

    Images are not read, except a few where no description names channels and labels.

    Parameters
    ----------
    labels : what label values mean, whatever a description says: label maps of objects hold their numbers

    Raises
    ------
    DatasetError
        The layout is unknown, or cases lack files; ``medseg check`` lists everything that is wrong.
    LabelError
        The label values or names do not fit together.
    """
    layout = read_layout(Path(path), labels)
    _drop_orphan_labels(layout)
    errors = [f for f in layout.findings if f.severity == "error" and f.code in BLOCKING]
    if errors:
        kind = LabelError if errors[0].code == "labels" else DatasetError
        more = f" And {len(errors) - 1} more; `medseg check` lists them." if len(errors) > 1 else ""
        raise kind(f"{path}: {errors[0]}{more}")
    assert layout.labels is not None  # its absence is a blocking finding
    return Dataset(
        name=layout.name,
        root=layout.folder,
        channels=layout.channels,
        labels=layout.labels,
        training=tuple(layout.training),
        test=tuple(layout.test),
        file_ending=layout.file_ending,
        reader=layout.reader,
    )


def with_channels(dataset: Dataset, count: int) -> Dataset:
    """Return a dataset of pictures, grey and in colour, all of which are read with 1 or 3 channels."""
    names = ("grey",) if count == 1 else ("red", "green", "blue")
    training, test = (
        tuple(replace(case, channels=count) for case in part) for part in (dataset.training, dataset.test)
    )
    return replace(dataset, channels=names, training=training, test=test)


def list_cases(folder_or_file: PathLike, channels: int) -> tuple[Case, ...]:
    """List images to predict.

    A folder holds ``CASE_0000.nii.gz`` per channel, or one file a case. A single file is one case;
    with several channels ``CASE_0000`` brings its neighbours ``CASE_0001`` ... along.

    Parameters
    ----------
    channels : int
        How many channels the model takes. A missing file of a case is listed all the same, and so is one
        too many (``CASE_0001`` for a model of one channel), so that this case fails and the others go on.

    Raises
    ------
    DatasetError
        There is no image.
    ReadError
        A single file is of an unknown format.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        return _list_folder(path, channels)
    return (_list_file(path, channels),)


def read_image(case: Case) -> Volume:
    """Read all channels of a case.

    Returns
    -------
    Volume
        float32 (channel, i, j, k) on the grid of the first file; i is contiguous in memory.

    Raises
    ------
    ReadError
        A file is missing or damaged.
    GeometryError
        The channels are not on one grid.
    ConfigError
        The case cannot have the channels that are wanted of it.
    """
    if not case.images:
        raise ReadError(f"{case.name}: has no image file. Add one, or leave the case out.")
    volumes = [read(path) for path in case.images]
    first = volumes[0]
    for path, volume in zip(case.images[1:], volumes[1:], strict=True):
        difference = grid_difference(first.geometry, volume.geometry, case.images[0].name)
        if difference:
            raise GeometryError(f"{path}: {difference}. Resample the channels of a case onto one grid.")
    channels = sum(volume.channels for volume in volumes)
    array = np.empty((channels, *first.shape[::-1]), np.float32).transpose(0, 3, 2, 1)
    filled = 0
    while volumes:
        volume = volumes.pop(0)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            array[filled : filled + volume.channels] = volume.array
        filled += volume.channels
    return first.with_array(array if case.channels is None else set_channels(array, case.channels))


def read_label(case: Case) -> Volume:
    """Read the label map of a case: one channel of integers.

    Raises
    ------
    ReadError
        The file is missing or damaged.
    LabelError
        There is none, it has several channels, or values are not whole numbers.
    """
    if case.label is None:
        raise LabelError(f"{case.name}: has no label map. Add one, or leave the case out of training.")
    volume = read(case.label)
    if volume.channels != 1:
        raise LabelError(
            f"{case.label}: has {volume.channels} channels; expected one label map. Save label values as "
            "integers in one channel (a colour picture is not a label map)."
        )
    return volume if volume.array.dtype.kind in "ui" else volume.with_array(_to_integers(volume, case.label))


def _drop_orphan_labels(layout: Layout) -> None:
    """Leave out labels of a folder that have no image, as nnU-Net does, but say so."""
    if layout.lists_cases:
        return
    orphans = {finding.case for finding in layout.findings if finding.code == "missing_image"}
    if orphans:
        logger.warning("%s: %d labels have no image and are left out.", layout.root, len(orphans))
        layout.training = [case for case in layout.training if case.name not in orphans]
        layout.findings = [finding for finding in layout.findings if finding.case not in orphans]


def _list_folder(folder: Path, channels: int) -> tuple[Case, ...]:
    files = sorted(file for file in folder.iterdir() if is_image(file))
    if not files:
        raise DatasetError(
            f"{folder}: holds no image. Expected files such as CASE_0000.nii.gz (or NRRD, MHA, TIFF, PNG)."
        )
    groups = group_channels(files)
    if channels > 1:
        present = files_per_case(groups, channels)
        cases = [_case(name, groups[name], present) for name in sorted(groups)]
    else:
        cases = [case for name in sorted(groups) for case in _single_channels(name, groups[name])]
    double = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if double:
        raise DatasetError(f"{folder}: two images are of case {double[0]}. Keep one file a case.")
    return tuple(cases)


def _single_channels(name: str, files: list[Path]) -> list[Case]:
    """Return one case a file; but all files of one case where they are the channels of it."""
    stems = {stem_of(file) for file in files}
    if {f"{name}_0000", f"{name}_0001"} <= stems:  # more than the model takes: refused when it is read
        return [_case(name, files, 1)]
    return [_case(stem_of(file).removesuffix("_0000"), [file], 1) for file in files]


def _list_file(path: Path, channels: int) -> Case:
    if not path.is_file():
        raise ReadError(f"{path}: no such file or folder. Check the path.")
    if not suffix_of(path):
        raise ReadError(f"{path}: unknown image format. Give a NIfTI, NRRD, MHA, TIFF or PNG file.")
    name = stem_of(path).removesuffix("_0000")
    siblings = [path, *path.parent.glob(f"{glob.escape(name)}_0001.*")]
    return _case(name, [path], channels if len(siblings) > 1 else 1)


def _case(name: str, files: list[Path], channels: int) -> Case:
    """Complete a case's files by those that should be there."""
    first = files[0]
    if channels > 1 and stem_of(first) != name:
        ending = first.name[len(stem_of(first)) :]
        wanted = [first.with_name(f"{name}_{channel:04d}{ending}") for channel in range(channels)]
        files = [*wanted, *(file for file in files if file not in wanted)]
    return Case(name, tuple(files), None, name)


def _to_integers(volume: Volume, path: Path) -> Array:
    array = volume.array
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs(array - np.rint(array)) <= WHOLE)  # True for NaN and infinity as well
    if odd.any():
        raise LabelError(
            f"{path}: holds {array[odd][0]:g}; a label map holds whole numbers only. Round it, or resample "
            "labels with nearest neighbour."
        )
    array = np.rint(array)
    low, high = float(array.min()), float(array.max())
    for dtype in _INTEGERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise LabelError(f"{path}: values {low:g} to {high:g} are no label values. Export the label map again.")
