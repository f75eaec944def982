"""Everything that is wrong with a dataset, found in one pass and told one line a finding.

One case is in memory at a time. A broken file is a finding, never an exception.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, LabelError, MedsegError
from medseg.geometry.orient import axis_codes, is_orthonormal, skew
from medseg.io.dataset import read_label
from medseg.io.findings import SEVERITIES, Finding
from medseg.io.formats import read
from medseg.io.grids import grid_difference
from medseg.io.layouts import HU_LOWEST, Case, Layout, read_layout
from medseg.io.semantic import SemanticMaps, find_semantic_maps
from medseg.log import check_cancelled, progress
from medseg.types import Array, PathLike
from medseg.volume import Geometry, Volume

# Intensities of one channel whose bright ends (percentile 99.5) differ by more than this factor do
# not come from one kind of scan: 12-bit data against 8-bit data is 16, CT with metal against CT 30.
INTENSITY_FACTOR = 100.0
BRIGHT_PERCENTILE = 99.5
# Voxels that are looked at for the percentile; the error is far below the factor above.
SAMPLED_VOXELS = 200_000
# A spacing that many times larger or smaller than the median is no longer one protocol.
SPACING_FACTOR = 3.0
# How many cases a finding names before it only counts them.
NAMED_CASES = 3


@dataclass
class Facts:
    """What is remembered of a case after it has left memory."""

    case: Case
    geometry: Geometry | None = None
    digest: dict[str, str] = field(default_factory=dict)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    bright: list[float] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    labels: set[int] | None = None
    is_test: bool = False


@dataclass(frozen=True)
class Examination:
    """Findings, and how many cases were looked at."""

    findings: list[Finding]
    n_training: int = 0
    n_test: int = 0


def check_dataset(dataset_path: PathLike) -> list[Finding]:
    """Find everything that is wrong with a dataset; see :func:`examine_dataset`."""
    return examine_dataset(dataset_path).findings


def examine_dataset(dataset_path: PathLike) -> Examination:
    """Look at every file of a dataset.

    Parameters
    ----------
    dataset_path : path
        What :func:`medseg.io.open_dataset` takes.

    Returns
    -------
    Examination
        Findings: errors first, then warnings, then infos; none if all is well.
    """
    try:
        layout = read_layout(Path(dataset_path))
    except DataError as error:
        return Examination([Finding("error", "", "layout", *_split(str(error)))])
    except OSError as error:
        message = f"{error.filename or dataset_path}: {error.strerror or error}"
        return Examination([Finding("error", "", "layout", message, "Check the path and its permissions.")])
    semantic = _semantic_maps(layout)
    findings = list(layout.findings)
    facts = []
    cases = [(case, False) for case in layout.training] + [(case, True) for case in layout.test]
    for case, is_test in progress(cases, "Checking cases"):
        collector = _Collector(case.name, layout.folder, findings)
        facts.append(_check_case(case, layout, collector, is_test, semantic))
    _check_population(layout, facts, findings)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Examination(findings, len(layout.training), len(layout.test))


def _semantic_maps(layout: Layout) -> SemanticMaps | None:
    """Return the maps of classes beside those of objects; what is wrong with them as a whole is a finding."""
    if "things" not in layout.description:
        return None
    try:
        return find_semantic_maps(layout.folder)
    except DataError as error:
        layout.findings.append(Finding("error", "", "semantic", *_split(str(error))))
        return None


class _Collector:
    """Adds findings about one case."""

    def __init__(self, case: str, folder: Path, findings: list[Finding]) -> None:
        self.case, self.folder, self.findings = case, folder, findings

    def add(self, code: str, message: str, remedy: str, severity: Any = "error") -> None:
        self.findings.append(Finding(severity, self.case, code, message, remedy))

    def add_error(self, code: str, error: MedsegError) -> None:
        self.add(code, *_split(str(error).replace(f"{self.folder}/", "")))


# --- one case ---------------------------------------------------------------------------------------


def _check_case(
    case: Case, layout: Layout, collector: _Collector, is_test: bool, semantic: SemanticMaps | None
) -> Facts:
    facts = Facts(case, is_test=is_test)
    complete = bool(case.images) and all(path.is_file() for path in case.images)
    channels = 0
    for path in case.images:
        volume = _try_read(path, collector) if path.is_file() else None
        if volume is None:
            complete = False
            continue
        _check_image(volume, path, facts, collector)
        _check_same_grid(volume, path, facts, collector)
        channels += volume.channels
    _tell_constant(facts, collector)
    if complete and channels != len(layout.channels):
        collector.add(
            "channel_count",
            f"has {channels} channels, {len(layout.channels)} are named ({', '.join(layout.channels)})",
            "Correct channel_names; a 4D image counts as one channel per volume."
            if layout.description
            else "Give every case the same channels, or leave this one out.",
        )
    if case.label is not None and case.label.is_file():
        _check_label(case, layout, facts, collector, semantic)
    return facts


def _try_read(path: Path, collector: _Collector) -> Volume | None:
    """Read an image, or note why it cannot be read."""
    check_cancelled()
    try:
        return read(path)
    except MedsegError as error:
        collector.add_error("unreadable", error)
    except OSError as error:
        collector.add(
            "unreadable", f"{path.name}: {error.strerror or error}", "Check the disk or network folder."
        )
    return None


def _check_image(volume: Volume, path: Path, facts: Facts, collector: _Collector) -> None:
    array = volume.array
    facts.digest[path.name] = _digest(array)
    finite = _finite(array) if array.dtype.kind == "f" else None
    if finite is not None and not finite.all():
        count = int(array.size - np.count_nonzero(finite))
        collector.add(
            "not_finite",
            f"{path.name} holds {count} NaN or infinite voxels",
            "Replace them by a meaningful number, such as the background's.",
        )
    for number, channel in enumerate(array):
        _note_intensity(channel, f"{path.name} channel {number}", facts)
    _check_grid(volume, path, collector)


def _finite(array: Array) -> Array:
    """Return which voxels are finite once they are float32, the type of all computations."""
    with np.errstate(over="ignore"):
        return np.isfinite(array.astype(np.float32, copy=False))


def _note_intensity(channel: Array, name: str, facts: Facts) -> None:
    """Remember the range of one channel."""
    values = channel.ravel(order="K")
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if low == high:
        facts.constant.append(f"{name} has the value {low:g} everywhere")
    some = np.abs(values[:: max(1, values.size // SAMPLED_VOXELS)].astype(np.float64))
    facts.lows.append(low)
    facts.highs.append(high)
    facts.bright.append(float(np.percentile(some, BRIGHT_PERCENTILE)))


def _tell_constant(facts: Facts, collector: _Collector) -> None:
    """A blank channel is a warning, a case with nothing to see an error."""
    severity = "error" if len(facts.constant) == len(facts.lows) else "warning"
    for message in facts.constant:
        collector.add("constant", message, "Export the image again.", severity)


def _check_grid(volume: Volume, path: Path, collector: _Collector) -> None:
    affine = volume.geometry.affine
    if not is_orthonormal(affine):
        collector.add(
            "not_orthonormal",
            f"{path.name}: voxel axes are not at right angles (cosine {skew(affine):.3g})",
            "Resample it onto a right-angled grid; ITK and nnU-Net's default reader refuse it.",
            "warning",
        )
    for note in volume.notes:
        if "sform" in note:
            collector.add(
                "sform_qform",
                f"{path.name}: {note}",
                "Look at the overlay in a viewer, then save one transform in both.",
                "warning",
            )


def _check_same_grid(volume: Volume, path: Path, facts: Facts, collector: _Collector) -> None:
    """Compare with the first image that could be read."""
    if facts.geometry is None:
        facts.geometry = volume.geometry
        return
    difference = grid_difference(facts.geometry, volume.geometry, facts.case.images[0].name)
    if difference:
        collector.add("channel_grid", f"{path.name}: {difference}", "Resample the channels onto one grid.")


def _check_label(
    case: Case, layout: Layout, facts: Facts, collector: _Collector, semantic: SemanticMaps | None
) -> None:
    try:
        label = read_label(case)
    except LabelError as error:
        collector.add_error("label_values", error)
        return
    except MedsegError as error:
        collector.add_error("unreadable", error)
        return
    except OSError as error:
        message = f"{case.label}: {error.strerror or error}"
        collector.add("unreadable", message, "Check the disk or network folder.")
        return
    known = label.array
    if semantic is not None:  # the label map numbers objects, and their classes are in another one
        try:
            known = semantic.read(case, label.array[0].transpose(2, 1, 0))
        except MedsegError as error:
            collector.add_error("semantic", error)
            return
    values = {int(value) for value in np.unique(known.ravel(order="K"))}
    facts.labels = values
    _check_label_values(values, layout, collector)
    if facts.geometry is not None:
        difference = grid_difference(facts.geometry, label.geometry, "its image")
        if difference:
            collector.add(
                "label_grid",
                f"label: {difference}",
                "Resample the label onto the image (nearest neighbour).",
            )


def _check_label_values(values: set[int], layout: Layout, collector: _Collector) -> None:
    known = layout.labels
    if known is not None:
        unknown = sorted(values - set(known.values))
        if unknown:
            collector.add(
                "unknown_labels",
                f"label holds {_some(unknown)}; {layout.description_name} knows {_some(known.values)}",
                "Add the values to 'labels', or correct the label map.",
            )
    empty = {0} if known is None or known.ignore is None else {0, known.ignore}
    if values <= empty:
        what = "nothing but background" if values <= {0} else "no annotated foreground"
        collector.add(
            "empty_label",
            f"label holds {what}",
            "Fine if the object is absent; otherwise annotate it or remove the case.",
            "warning",
        )


# --- all cases together -----------------------------------------------------------------------------


def _check_population(layout: Layout, facts: Sequence[Facts], findings: list[Finding]) -> None:
    readable = [fact for fact in facts if fact.geometry is not None]
    for check in _POPULATION_CHECKS:
        for severity, code, message, remedy in check(layout, readable):
            findings.append(Finding(severity, "", code, message, remedy))


_Told = Iterator[tuple[Any, str, str, str]]


def _tell_duplicates(layout: Layout, facts: Sequence[Facts]) -> _Told:
    """Find the same voxels under two names; across cases they leak from training into validation."""
    places: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        for name, digest in fact.digest.items():
            places[digest].append(name)
    for names in places.values():
        if len(names) > 1:
            yield (
                "warning",
                "duplicate_image",
                f"the same voxels in {_some(sorted(names), NAMED_CASES)}",
                "Remove the copies, or give their cases one patient so that they share a fold.",
            )


def _tell_patients(layout: Layout, facts: Sequence[Facts]) -> _Told:
    counts = Counter(fact.case.patient for fact in facts if not fact.is_test)
    several = sorted(patient for patient, count in counts.items() if count > 1)
    if several:
        yield (
            "info",
            "duplicate_patient",
            f"{len(several)} patients have several cases: {_some(several, NAMED_CASES)}",
            "Folds keep the cases of a patient together.",
        )
    both = sorted({fact.case.patient for fact in facts if fact.is_test} & set(counts))
    if both:
        yield (
            "warning",
            "patient_in_test",
            f"{len(both)} patients are in training and in test: {_some(both, NAMED_CASES)}",
            "A test on them is no test; move their cases to one side.",
        )


def _tell_spacing(layout: Layout, facts: Sequence[Facts]) -> _Told:
    """Find cases whose voxels are far larger or smaller than the median on some axis."""
    if len(facts) < 2:
        return
    spacing = np.array([fact.geometry.spacing for fact in facts if fact.geometry is not None])
    ratio = spacing / np.median(spacing, axis=0)
    odd = [fact.case.name for fact, row in zip(facts, ratio, strict=True) if _far(row)]
    if odd:
        yield (
            "warning",
            "spacing",
            f"{len(odd)} cases have a spacing over {SPACING_FACTOR:g}x off the median "
            f"({_triple(np.median(spacing, axis=0))}): {_some(odd, NAMED_CASES)}",
            "Check their headers (mm against cm or micron?), or leave them out.",
        )


def _far(ratio: Any) -> bool:
    return bool(ratio.max() > SPACING_FACTOR or ratio.min() < 1.0 / SPACING_FACTOR)


def _tell_units(layout: Layout, facts: Sequence[Facts]) -> _Told:
    units = Counter(fact.geometry.unit for fact in facts if fact.geometry is not None)
    if len(units) > 1:
        rare = min(units, key=lambda unit: units[unit])
        odd = [fact.case.name for fact in facts if fact.geometry is not None and fact.geometry.unit == rare]
        yield (
            "error",
            "units",
            f"some images are in mm and some in micron; {rare}: {_some(odd, NAMED_CASES)}",
            "Save all of them in one unit.",
        )


def _tell_orientation(layout: Layout, facts: Sequence[Facts]) -> _Told:
    """Find voxel axes stored in several directions: the network sees the body turned."""
    codes = {fact.case.name: axis_codes(fact.geometry.affine) for fact in facts if fact.geometry is not None}
    counts = Counter(codes.values()).most_common()
    if len(counts) > 1:
        odd = [name for name, code in codes.items() if code != counts[0][0]]
        yield (
            "warning",
            "orientation",
            f"voxel axes point {', '.join(f'{code} ({count}x)' for code, count in counts)}; "
            f"rare: {_some(odd, NAMED_CASES)}",
            "Reorient all images alike (for example to RAS): a network sees voxels, not headers.",
        )


def _tell_intensity(layout: Layout, facts: Sequence[Facts]) -> _Told:
    """Find a channel whose bright ends differ by decades between cases; one finding a channel."""
    for number, channel in enumerate(layout.channels):
        having = [fact for fact in facts if len(fact.bright) > number]
        bright = np.array([fact.bright[number] for fact in having])
        positive = bright[bright > 0]
        if len(positive) < 2 or positive.max() / positive.min() <= INTENSITY_FACTOR:
            continue
        distance = np.abs(np.log10(np.maximum(bright, positive.min())) - np.log10(np.median(positive)))
        odd = [having[index].case.name for index in np.argsort(-distance)[:NAMED_CASES]]
        highs = [fact.highs[number] for fact in having]
        yield (
            "warning",
            "intensity",
            f"intensity maxima of {channel} run from {min(highs):.3g} to {max(highs):.3g} "
            f"(farthest: {', '.join(odd)})",
            "Z-score normalisation copes; check that no case is in another unit or rescaled.",
        )


def _tell_ct(layout: Layout, facts: Sequence[Facts]) -> _Told:
    """Find a channel called CT whose values cannot be Hounsfield units."""
    for number, channel in enumerate(layout.channels):
        if channel.casefold() != "ct":
            continue
        lows = {fact.case.name: fact.lows[number] for fact in facts if len(fact.lows) > number}
        odd = [name for name, low in lows.items() if not low < 0 or low < 4 * HU_LOWEST[0]]
        if odd:
            yield (
                "warning",
                "not_hounsfield",
                f"channel {number} is CT, but {len(odd)} of {len(lows)} cases are not in Hounsfield units: "
                f"{_some(odd, NAMED_CASES)}",
                "Convert them to HU, or name the channel otherwise to get z-score normalisation.",
            )


def _tell_one_slice(layout: Layout, facts: Sequence[Facts]) -> _Told:
    flat = [fact.case.name for fact in facts if fact.geometry is not None and min(fact.geometry.shape) == 1]
    if flat and len(flat) == len(facts):
        yield "info", "one_slice", "all images have one slice", "Only the 2d configuration is planned."
    elif flat:
        yield (
            "warning",
            "one_slice",
            f"{len(flat)} of {len(facts)} images have one slice: {_some(flat, NAMED_CASES)}",
            "Check that these are whole volumes.",
        )


def _tell_unused(layout: Layout, facts: Sequence[Facts]) -> _Told:
    seen = [fact.labels for fact in facts if fact.labels is not None]
    if layout.labels is None or not seen:
        return
    found = set().union(*seen)
    values = {name: _values(value) for name, value in layout.labels.entries.items() if name != "background"}
    unused = [name for name, wanted in values.items() if not wanted & found]
    if unused:
        yield (
            "warning",
            "unused_label",
            f"never occurs in a label map: {_some(unused)}",
            "Remove it from 'labels', or check that its cases are there.",
        )


def _values(value: int | tuple[int, ...]) -> set[int]:
    return set(value) if isinstance(value, tuple) else {value}


def _tell_sides(layout: Layout, facts: Sequence[Facts]) -> _Told:
    sided = layout.labels.sided if layout.labels is not None else ()
    if sided:
        yield (
            "info",
            "sided_labels",
            f"labels name a side: {_some(sided)}",
            "Mirroring left to right will be off in training and prediction.",
        )


def _tell_reader(layout: Layout, facts: Sequence[Facts]) -> _Told:
    if layout.reader.endswith("WithReorient"):
        yield (
            "info",
            "reorient",
            f"dataset.json asks for nnU-Net's {layout.reader}: images are turned to RAS before all else",
            "Nothing to do: results lie as their images do.",
        )


_POPULATION_CHECKS: tuple[Callable[[Layout, Sequence[Facts]], _Told], ...] = (
    _tell_duplicates,
    _tell_patients,
    _tell_units,
    _tell_spacing,
    _tell_orientation,
    _tell_intensity,
    _tell_ct,
    _tell_one_slice,
    _tell_unused,
    _tell_sides,
    _tell_reader,
)


def _digest(array: Array) -> str:
    """Return a hash of voxels, type and shape; the order in memory does not matter."""
    ordered = array.transpose(0, 3, 2, 1)
    content = np.ascontiguousarray(ordered)
    start = f"{content.shape}{content.dtype.str}".encode()
    return hashlib.blake2b(content.data, digest_size=16, key=start[:64]).hexdigest()


def _split(text: str) -> tuple[str, str]:
    """Cut an error's text into what is wrong and what to do (its last sentence)."""
    head, dot, tail = text.rstrip(".").rpartition(". ")
    return (head, f"{tail}.") if dot else (text.rstrip("."), "Correct the file.")


def _some(items: Sequence[Any], most: int = 8) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text}, ... ({len(items)} in all)"


def _triple(values: Any) -> str:
    return "x".join(f"{value:.3g}" for value in values)
