"""Four ways to lay out a dataset on disk, each read into one :class:`Layout`.

nnU-Net v2 raw folders (`documentation/dataset_format.md` of nnU-Net 2.8.1), the Medical Segmentation
Decathlon (a ``training`` list in ``dataset.json``), plain ``images/`` + ``labels/`` folders, and a CSV
manifest. Nothing here raises because of a single case: problems become findings, so that
``medseg check`` sees all of them and :func:`medseg.io.open_dataset` decides.
"""

import csv
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.config import read_mapping, read_text
from medseg.errors import ConfigError, DatasetError, LabelError, MedsegError, ReadError
from medseg.io.findings import Finding
from medseg.io.formats import READERS, is_image, read, stem_of, suffix_of
from medseg.io.itk import readable_by_itk
from medseg.io.microscopy import tiff_is_flat
from medseg.labels import LabelSet
from medseg.log import progress

DESCRIPTIONS = ("dataset.json", "dataset.yaml", "dataset.yml")
FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
NNUNET_READERS = (
    "NaturalImage2DIO",
    "SimpleITKIO",
    "SimpleITKIOWithReorient",
    "Tiff3DIO",
    "NibabelIO",
    "NibabelIOWithReorient",
)
# Hounsfield units: integers, air at -1000 and a scanner's filling below; a body reaches well above 100.
HU_LOWEST = (-4096, -200)
HU_HIGHEST = (100, 32767)
# Images that are opened to tell CT from the rest where no description names the channels.
PROBED_IMAGES = 5
# Characters of a case name: file systems take 255 bytes, and medseg adds prefixes and endings.
LONGEST_NAME = 200

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)_")
_COLUMNS = "case, image (or image_0, image_1, ...), label and, if you like, patient"


@dataclass(frozen=True)
class Case:
    """One examination.

    Attributes
    ----------
    name : str
        Unique in the dataset.
    images : tuple of Path
        One file per channel, or one file that holds all channels.
    label : Path or None
        Label map; None where there is none.
    patient : str
        Cases of one patient never part in a split.
    channels : int, optional
        What images of another number of channels are brought to; None refuses them.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str
    channels: int | None = None


@dataclass
class Layout:
    """What a dataset's folder says, before anything is opened or refused."""

    root: Path
    kind: str
    description: dict[str, Any] = field(default_factory=dict)
    training: list[Case] = field(default_factory=list)
    test: list[Case] = field(default_factory=list)
    file_ending: str = ""
    channels: tuple[str, ...] = ()
    labels: LabelSet | None = None
    reader: str = ""
    findings: list[Finding] = field(default_factory=list)
    places: dict[Path, str] = field(default_factory=dict)  # where a file is named: line and path as written

    @property
    def name(self) -> str:
        """Name of the folder, or of the manifest without its suffix."""
        path = self.root.resolve()
        return path.stem if self.kind == "csv" else path.name

    @property
    def folder(self) -> Path:
        """The folder that holds the description."""
        return self.root.parent if self.kind == "csv" else self.root

    @property
    def lists_cases(self) -> bool:
        """Whether the cases are named in a file, rather than by what a folder holds."""
        return self.kind in ("msd", "csv") or "dataset" in self.description

    @property
    def description_name(self) -> str:
        """Name of the description's file; the one to write where there is none."""
        return next((name for name in DESCRIPTIONS if (self.folder / name).is_file()), DESCRIPTIONS[0])

    @property
    def folders(self) -> tuple[str, str]:
        """Names of the folders of images and labels."""
        plain = self.kind == "plain" and (self.root / FOLDERS[0][0]).is_dir()
        return FOLDERS[0] if plain else FOLDERS[1]

    def add(self, case: str, code: str, message: str, remedy: str, severity: Any = "error") -> None:
        """Note a problem."""
        self.findings.append(Finding(severity, case, code, message, remedy))


def read_layout(path: Path, labels: LabelSet | None = None) -> Layout:
    """Find out which of the four layouts `path` has and read it.

    Parameters
    ----------
    labels : taken in place of what a description or the label maps say

    Raises
    ------
    DatasetError
        `path` is none of them, or its description cannot be parsed.
    ReadError
        A folder or description may not be read.
    """
    try:
        layout = _dispatch(path)
    except PermissionError as error:
        raise ReadError(f"{error.filename or path}: may not be read. Change its permissions.") from error
    layout.training.sort(key=lambda case: case.name)
    layout.test.sort(key=lambda case: case.name)
    _name_patients(layout)
    _complete(layout, labels)
    _check_names(layout)
    _check_partners(layout)
    return layout


def read_description(folder: Path) -> dict[str, Any]:
    """Read ``dataset.json`` or ``dataset.yaml`` of a folder; empty where there is none.

    Raises
    ------
    DatasetError
        It does not parse, or is not a mapping.
    """
    for name in DESCRIPTIONS:
        file = folder / name
        if file.is_file():
            return _read_json(file) if file.suffix == ".json" else _read_yaml(file)
    return {}


def group_channels(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Group image files by case: ``CASE_0000`` and ``CASE_0001`` are channels of CASE.

    Returns
    -------
    dict
        Case name to its files in channel order; a name without four digits stays whole.
    """
    cases: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        stem = stem_of(file)
        match = _CHANNEL.fullmatch(stem)
        cases[match.group(1) if match else stem].append(file)
    return dict(cases)


def files_per_case(cases: Mapping[str, Sequence[Path]], channels: int) -> int:
    """Return 1 where every case has a single file (RGB or 4D: it holds all channels), else `channels`."""
    return 1 if all(len(files) == 1 for files in cases.values()) else channels


def looks_like_ct(array: Any) -> bool:
    """Return whether voxel values could be Hounsfield units: integers from about -1000 up."""
    low, high = float(array.min()), float(array.max())
    if not (HU_LOWEST[0] <= low <= HU_LOWEST[1] and HU_HIGHEST[0] <= high <= HU_HIGHEST[1]):
        return False
    some = array.ravel(order="K")[::97]
    return bool(np.all(some == np.rint(some)))


def _dispatch(path: Path) -> Layout:
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return _read_manifest(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: no such dataset. Give a folder, or a CSV manifest.")
    description = read_description(path)
    if isinstance(description.get("training"), list):
        return _read_msd(path, description)
    if "dataset" in description:
        return _read_explicit(path, description)
    if description and (path / "imagesTr").is_dir():
        return _read_nnunet(path, description)
    for images, labels in FOLDERS:
        if (path / images).is_dir():
            return _read_plain(path, images, labels, description)
    raise DatasetError(
        f"{path}: not a dataset. Expected dataset.json with imagesTr and labelsTr (nnU-Net, MSD), or "
        "folders images and labels, or a CSV file with the columns case, image and label."
    )


# --- nnU-Net v2 raw ---------------------------------------------------------------------------------


def _read_nnunet(root: Path, description: dict[str, Any]) -> Layout:
    """Read ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``, ``imagesTs``."""
    layout = Layout(root, "nnunet", description, file_ending=_ending(description))
    ending = layout.file_ending or _common_suffix(_images_in(root / "imagesTr"))
    layout.file_ending = ending
    layout.channels = _channel_names(layout)
    names = _files_of_cases(layout, root / "imagesTr")
    labels = {stem_of(file): file for file in _images_in(root / "labelsTr") if file.name.endswith(ending)}
    channels = files_per_case(names, len(layout.channels))
    for name in sorted({*names, *labels}):
        images = _channel_paths(root / "imagesTr", name, names.get(name), channels, ending)
        label = labels.get(name, root / "labelsTr" / f"{name}{ending}")
        layout.training.append(Case(name, images, label, name))
    _read_test(layout, root / "imagesTs", root / "labelsTs")
    return layout


def _files_of_cases(layout: Layout, folder: Path) -> dict[str, list[Path]]:
    """Group the files of an nnU-Net folder; a name without ``_0000`` is a finding."""
    cases: dict[str, list[Path]] = {}
    for name, files in group_channels(_images_in(folder)).items():
        wrong = [f for f in files if not f.name.endswith(layout.file_ending) or stem_of(f) == name]
        for file in wrong:
            layout.add(
                name,
                "file_name",
                f"{folder.name}/{file.name} is not named CASE_0000{layout.file_ending}",
                "Rename it: four digits for the channel, then the file_ending of dataset.json.",
            )
        if len(wrong) < len(files):
            cases[name] = [file for file in files if file not in wrong]
    return cases


def _channel_paths(
    folder: Path, name: str, files: Sequence[Path] | None, channels: int, ending: str
) -> tuple[Path, ...]:
    """Return the files of all channels in order; those that should be there but are not, too."""
    expected = [folder / f"{name}_{channel:04d}{ending}" for channel in range(channels)]
    return tuple(dict.fromkeys([*expected, *(files or ())]))


def _read_test(layout: Layout, images: Path, labels: Path) -> None:
    if not images.is_dir():
        return
    known = {stem_of(file): file for file in _images_in(labels)}
    names = _files_of_cases(layout, images)
    channels = files_per_case(names, len(layout.channels))
    for name, files in names.items():
        paths = _channel_paths(images, name, files, channels, layout.file_ending)
        layout.test.append(Case(name, paths, known.get(name), name))


def _read_explicit(root: Path, description: dict[str, Any]) -> Layout:
    """Read nnU-Net's ``dataset`` key: {case: {images: [...], label: ...}}, variables expanded."""
    layout = Layout(root, "nnunet", description, file_ending=_ending(description))
    entries = description["dataset"]
    if not isinstance(entries, Mapping):
        raise DatasetError(
            f"{root}: 'dataset' in dataset.json must map case names to images and label. Correct it."
        )
    layout.channels = _channel_names(layout)
    for name, entry in entries.items():
        try:
            images = tuple(_resolve_expanded(root, text) for text in entry["images"])
            label = _resolve_expanded(root, entry["label"])
        except (KeyError, TypeError):
            layout.add(
                str(name),
                "description",
                "its entry in dataset.json has no images or no label",
                'Write {"images": [...], "label": ...}.',
            )
            continue
        layout.training.append(Case(str(name), images, label, str(name)))
    _read_test(layout, root / "imagesTs", root / "labelsTs")
    return layout


# --- Medical Segmentation Decathlon -----------------------------------------------------------------


def _read_msd(root: Path, description: dict[str, Any]) -> Layout:
    """Read the ``training`` and ``test`` lists; a 4D image holds all channels."""
    layout = Layout(root, "msd", description)
    for entry in description["training"]:
        image, label = (
            (entry.get("image"), entry.get("label")) if isinstance(entry, Mapping) else (entry, None)
        )
        if image and not Path(str(image)).name.startswith("."):
            path = _resolve(root, image)
            layout.training.append(
                Case(stem_of(path), (path,), _resolve(root, label) if label else None, stem_of(path))
            )
    for entry in description.get("test") or []:
        path = _resolve(root, entry.get("image", "") if isinstance(entry, Mapping) else entry)
        if not path.name.startswith("."):
            layout.test.append(Case(stem_of(path), (path,), None, stem_of(path)))
    layout.channels = _channel_names(layout)
    listed = {path for case in layout.training for path in (*case.images, case.label)}
    for folder in ("imagesTr", "labelsTr"):
        for file in _images_in(root / folder):
            if file not in listed:
                layout.add(
                    stem_of(file),
                    "not_listed",
                    f"{folder}/{file.name} is not in the training list of dataset.json",
                    "Add it there, or delete the file.",
                    "warning",
                )
    return layout


# --- plain folders ----------------------------------------------------------------------------------


def _read_plain(root: Path, images: str, labels: str, description: dict[str, Any]) -> Layout:
    """Pair files of two folders by name; one description beside them is optional."""
    layout = Layout(root, "plain", description, file_ending=_ending(description))
    label_files = {stem_of(file): file for file in _images_in(root / labels)}
    group = _grouping(_images_in(root / images), set(label_files))
    groups = group(_images_in(root / images))
    for name in sorted({*groups, *label_files}):
        files = _one_format(layout, name, groups.get(name, []))
        layout.training.append(Case(name, tuple(files), label_files.get(name), name))
    most = max((len(case.images) for case in layout.training), default=0)
    for case in layout.training:
        if 0 < len(case.images) < most:
            layout.add(
                case.name,
                "missing_channel",
                f"has {len(case.images)} of {most} channels",
                "Add the missing file, or remove the case.",
            )
    for folder in ("imagesTs", "images_test"):
        for name, files in group(_images_in(root / folder)).items():
            layout.test.append(Case(name, tuple(files), None, name))
    return layout


def _grouping(files: Sequence[Path], labels: set[str]) -> Callable[[Iterable[Path]], dict[str, list[Path]]]:
    """Decide whether ``NAME_0001`` is channel 1 of NAME or a case of its own: as the labels are named."""
    stems = [stem_of(file) for file in files]
    whole = sum(stem in labels for stem in stems)
    parts = sum(match.group(1) in labels for match in map(_CHANNEL.fullmatch, stems) if match)
    return group_channels if parts > whole else _group_by_stem


def _group_by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    cases: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        cases[stem_of(file)].append(file)
    return dict(cases)


def _one_format(layout: Layout, name: str, files: list[Path]) -> list[Path]:
    stems = [stem_of(file) for file in files]
    double = [stem for stem, count in Counter(stems).items() if count > 1]
    if double:
        layout.add(
            name,
            "two_files",
            f"{double[0]} exists in more than one format",
            "Keep one of the files.",
        )
    return [file for file, stem in zip(files, stems, strict=True) if stem not in double] or files[:1]


# --- CSV --------------------------------------------------------------------------------------------


def _read_manifest(path: Path) -> Layout:
    """Read the columns case, image or image_0.., label, patient; paths are relative to the file.

    A row without a label is a test case. ``dataset.json`` or ``dataset.yaml`` beside the CSV may name
    channels and labels.
    """
    layout = Layout(path, "csv", read_description(path.parent))
    layout.file_ending = _ending(layout.description)
    rows, columns = _read_rows(path)
    image_columns = sorted((c for c in columns if re.fullmatch(r"image_\d+", c)), key=_column_number)
    image_columns = image_columns or (["image"] if "image" in columns else [])
    if not image_columns:
        raise DatasetError(
            f"{path}: {_found(columns)}; expected {_COLUMNS}. Name the columns in the first line, then write "
            "one line a case."
        )
    for number, row in rows:
        images = tuple(path.parent / row[column] for column in image_columns if row.get(column))
        name = row.get("case") or (stem_of(images[0]) if images else f"line {number}")
        if len(images) < len(image_columns):
            layout.add(
                name,
                "missing_channel",
                f"line {number} of {path.name} names {len(images)} of {len(image_columns)} images",
                "Fill in the line.",
            )
        label = path.parent / row["label"] if row.get("label") else None
        for column in (*image_columns, "label"):
            if row.get(column):
                place = f"{path.name} line {number}: {row[column]}"
                layout.places.setdefault(path.parent / row[column], place)
        case = Case(name, images, label, row.get("patient") or "")
        (layout.training if label else layout.test).append(case)
    return layout


def _read_rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Return the rows with their line numbers, and the columns."""
    text = read_text(path)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    rows = [
        (reader.line_num, {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)})
        for row in reader
    ]
    return [(number, row) for number, row in rows if any(row.values())], columns


def _found(columns: Sequence[str]) -> str:
    return f"has the columns {_some(columns)}" if any(columns) else "the file is empty"


def _column_number(column: str) -> int:
    return int(column.rpartition("_")[2])


# --- what all four share ----------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_text(file))
    except ReadError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: not valid JSON ({error}). Mend the file.") from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{file}: expected {{...}} at the top level, found {type(data).__name__}. Mend it."
        )
    return data


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return read_mapping(file)
    except ConfigError as error:
        raise DatasetError(str(error)) from error


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if is_image(file))


def _ending(description: Mapping[str, Any]) -> str:
    ending = str(description.get("file_ending") or "")
    return ending if not ending or ending.startswith(".") else f".{ending}"


def _common_suffix(files: Iterable[Path]) -> str:
    counts = Counter(suffix_of(file) for file in files)
    return counts.most_common(1)[0][0] if counts else ""


def _resolve(root: Path, text: object) -> Path:
    """Return a path that a description names; a relative one starts at the folder."""
    return Path(os.path.normpath(root / str(text)))


def _resolve_expanded(root: Path, text: object) -> Path:
    """Expand variables as well, as nnU-Net does in the paths of the ``dataset`` key and nowhere else."""
    return _resolve(root, os.path.expandvars(str(text)))


def _channel_names(layout: Layout) -> tuple[str, ...]:
    """Return the values of ``channel_names`` (legacy ``modality``) in file order, as nnU-Net does."""
    names = layout.description.get("channel_names", layout.description.get("modality"))
    if isinstance(names, Mapping) and names:
        return tuple(str(name) for name in names.values())
    if isinstance(names, list | tuple) and names:
        return tuple(str(name) for name in names)
    if isinstance(names, str):
        return (names,)
    if layout.kind in ("nnunet", "msd"):
        layout.add(
            "",
            "channel_names",
            "dataset.json does not name the channels; MRI is assumed",
            'Add "channel_names": {"0": "CT"} or the like.',
            "warning",
        )
    return ("MRI",) if layout.kind == "nnunet" else ()


def _name_patients(layout: Layout) -> None:
    """Fill in patients: CSV column, ``patients`` mapping, BIDS ``sub-XX_`` prefix, else the case."""
    mapping = _patient_mapping(layout.description.get("patients"))
    for cases in (layout.training, layout.test):
        cases[:] = [_with_patient(case, layout.kind, mapping) for case in cases]
    unknown = sorted(set(mapping) - {case.name for case in (*layout.training, *layout.test)})
    if unknown:
        layout.add(
            "",
            "patients",
            f"'patients' names cases that do not exist: {_some(unknown)}",
            "Correct the names.",
            "warning",
        )


def _with_patient(case: Case, kind: str, mapping: Mapping[str, str]) -> Case:
    given = case.patient if kind == "csv" else ""
    subject = _BIDS_SUBJECT.match(case.name)
    patient = given or mapping.get(case.name) or (subject.group(1) if subject else case.name)
    return Case(case.name, case.images, case.label, patient)


def _patient_mapping(given: object) -> dict[str, str]:
    """Accept {case: patient} and {patient: [cases]}."""
    mapping: dict[str, str] = {}
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if isinstance(value, list | tuple):
            mapping |= {str(case): str(key) for case in value}
        else:
            mapping[str(key)] = str(value)
    return mapping


def _complete(layout: Layout, labels: LabelSet | None = None) -> None:
    """Fill in file ending, channels, labels and reader where the description does not say."""
    images = [path for case in layout.training for path in case.images]
    layout.file_ending = layout.file_ending or _common_suffix(images)
    if layout.file_ending and suffix_of(f"x{layout.file_ending}") != layout.file_ending.lower():
        layout.add(
            "",
            "file_ending",
            f"file_ending {layout.file_ending!r} is not a format that medseg reads",
            f"Known: {' '.join(READERS)}.",
        )
    layout.channels = layout.channels or _channel_names(layout) or _guess_channels(layout)
    layout.labels = labels or (_read_labels(layout) if layout.training else None)
    layout.reader = _choose_reader(layout, images)


def _read_labels(layout: Layout) -> LabelSet | None:
    given = layout.description.get("labels")
    try:
        if isinstance(given, list | tuple):
            given = {str(name): value for value, name in enumerate(given)}
        if isinstance(given, Mapping) and given:
            if "things" in layout.description:  # classes of voxels, of which nothing need not be named
                given = {"background": 0, **given}
            return LabelSet.parse(given, layout.description.get("regions_class_order"))
        if layout.kind in ("nnunet", "msd"):
            raise LabelError("labels: dataset.json does not name them")
    except (LabelError, ValueError, TypeError) as error:
        layout.add("", "labels", str(error).rstrip("."), f"Correct 'labels' in {layout.description_name}.")
        return None
    return _scan_labels(layout)


def _scan_labels(layout: Layout) -> LabelSet | None:
    """Name the values that occur label_1, label_2, ...; needed only without a description."""
    holders: dict[int, str] = {}  # value to the first case that holds it
    labelled = [case for case in layout.training if case.label and case.label.is_file()]
    for case in progress(labelled, "Reading labels"):
        try:
            found = np.unique(read(str(case.label)).array.ravel(order="K"))
        except MedsegError:
            continue  # checked and reported case by case
        if np.all(found == np.rint(found)):
            for value in found:
                holders.setdefault(int(value), case.name)
    foreground = sorted(set(holders) - {0})
    odd = [value for value in foreground if not 1 <= value <= len(foreground)]
    if odd:
        layout.add(
            "",
            "labels",
            f"the label maps hold the values {_some(foreground)}; expected whole numbers from 0 up without a "
            f"gap, but {odd[0]} is in {holders[odd[0]]}",
            "Renumber the values in the label maps.",
        )
    elif holders and not foreground:
        layout.add(
            "",
            "labels",
            "no label map holds anything but 0",
            "Mark the objects in the label maps by the values 1, 2, ...",
        )
    elif not foreground:  # each label map has its own finding
        layout.add("", "labels", "no label map could be read", "Add the label maps, or mend them.")
    else:
        return LabelSet.parse({"background": 0, **{f"label_{value}": value for value in foreground}})
    return None


def _guess_channels(layout: Layout) -> tuple[str, ...]:
    """Name each channel CT if most of a few images look like Hounsfield units, else MRI."""
    cases = [case for case in layout.training if case.images]
    if not cases:
        return ("MRI",)
    step = max(1, len(cases) // PROBED_IMAGES)
    votes: list[list[bool]] = []
    for case in cases[::step][:PROBED_IMAGES]:
        try:
            votes.append([looks_like_ct(array) for path in case.images for array in read(path).array])
        except MedsegError:
            continue  # checked and reported case by case
    usual = Counter(len(vote) for vote in votes).most_common(1)
    columns = list(zip(*[vote for vote in votes if len(vote) == usual[0][0]], strict=True)) if usual else []
    names = tuple("CT" if sum(column) * 2 > len(column) else "MRI" for column in columns)
    layout.add(
        "",
        "channel_names",
        f"no description names the channels: {', '.join(names) or 'MRI'} is taken from the values",
        'Put a dataset.json with "channel_names" and "labels" beside them to say it yourself.',
        "info",
    )
    return names or ("MRI",)


def _choose_reader(layout: Layout, images: Sequence[Path]) -> str:
    """Name the reader class that nnU-Net 2.8.1 would choose (``reader_writer_registry.py``)."""
    wanted = layout.description.get("overwrite_image_reader_writer")
    if wanted in NNUNET_READERS:
        return str(wanted)
    example = next((path for path in images if path.is_file()), None)
    ending = layout.file_ending.lower()
    if ending in (".tif", ".tiff"):
        return _tiff_reader(ending, example)
    if ending in (".png", ".bmp", ".jpg", ".jpeg"):
        return "NaturalImage2DIO"
    if ending == ".nii" or (ending == ".nii.gz" and example and not readable_by_itk(example)):
        return "NibabelIO"
    return "SimpleITKIO"


def _tiff_reader(ending: str, example: Path | None) -> str:
    # nnU-Net's 2D reader takes .tif (not .tiff) if the first image opens as a picture.
    try:
        flat = ending == ".tif" and (example is None or tiff_is_flat(example))
    except Exception:  # a damaged example; nnU-Net then tries its next reader as well
        flat = False
    return "NaturalImage2DIO" if flat else "Tiff3DIO"


def _check_names(layout: Layout) -> None:
    """Refuse names that would lead results out of their folder: a name becomes part of a path."""
    for name in sorted({case.name for case in (*layout.training, *layout.test)}):
        if not _is_plain(name):
            layout.add(
                repr(name[:LONGEST_NAME]),
                "case_name",
                "is no name for a case: results are written to files of this name",
                f"Use at most {LONGEST_NAME} characters, no / or \\, no control characters, no dot in front.",
            )


def _is_plain(name: str) -> bool:
    odd = any(letter in "/\\" or unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    return 0 < len(name) <= LONGEST_NAME and not odd and not name.startswith(".")


def _check_partners(layout: Layout) -> None:
    """Note files that should be there and are not, doubled names, and a wrong ``numTraining``."""
    for case in layout.training:
        _check_files(layout, case, needs_label=True)
    for case in layout.test:
        _check_files(layout, case, needs_label=False)
    counts = Counter(case.name for case in layout.training)
    for name in (name for name, count in counts.items() if count > 1):
        layout.add(name, "duplicate_case", f"is listed {counts[name]} times", "Give each case its own name.")
    if not layout.training:
        layout.add("", "no_cases", "there is no training case", _how_to_add(layout))
    promised = layout.description.get("numTraining")
    if isinstance(promised, int) and promised != len(layout.training) and layout.kind != "csv":
        layout.add(
            "",
            "num_training",
            f"dataset.json says numTraining {promised}, found {len(layout.training)} cases",
            "Correct the number, or copy the missing files.",
            "warning",
        )


def _how_to_add(layout: Layout) -> str:
    images, labels = layout.folders
    if layout.kind == "csv":
        return "Add a line with case, image and label."
    if layout.lists_cases:
        return "List the cases in dataset.json."
    name = f"CASE_0000{layout.file_ending}" if layout.kind == "nnunet" else "CASE.nii.gz"
    label = f"CASE{layout.file_ending}" if layout.kind == "nnunet" else "CASE.nii.gz"
    return f"Put images such as {name} into {images} and label maps such as {label} into {labels}."


def _check_files(layout: Layout, case: Case, needs_label: bool) -> None:
    if layout.lists_cases:
        _check_listed_files(layout, case, needs_label)
        return
    missing = [path for path in case.images if not path.is_file()]
    if not case.images or len(missing) == len(case.images):
        layout.add(
            case.name,
            "missing_image",
            f"{_named(case.label)} has no image" if case.label else "its image does not exist",
            "Add the image, or delete the label.",
        )
    elif missing:
        layout.add(
            case.name,
            "missing_channel",
            f"{_named(missing[0])} is missing ({len(case.images)} channels expected)",
            "Add the file, or remove the case.",
        )
    if needs_label and (case.label is None or not case.label.is_file()):
        expected = f" ({_named(case.label)})" if case.label else ""
        elsewhere = "images_test" if layout.folders[0] == "images" else "imagesTs"
        layout.add(
            case.name,
            "missing_label",
            f"the image has no label{expected}",
            f"Add the label map, or move the image to {elsewhere}.",
        )


def _check_listed_files(layout: Layout, case: Case, needs_label: bool) -> None:
    """Note each file that is named in a list but does not exist."""
    wanted = [("missing_image", path) for path in case.images]
    if needs_label and case.label is None:
        layout.add(case.name, "missing_label", "is listed without a label", "Add the label map to the list.")
    elif needs_label and case.label is not None:
        wanted.append(("missing_label", case.label))
    for code, path in wanted:
        if not path.is_file():
            place = layout.places.get(path, f"{layout.description_name}: {_relative(path, layout.folder)}")
            layout.add(case.name, code, f"{place} does not exist", "Correct the path.")


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _named(path: Path | None) -> str:
    return "" if path is None else f"{path.parent.name}/{path.name}"


def _some(items: Sequence[Any], most: int = 5) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text}, ... ({len(items)} in all)"
