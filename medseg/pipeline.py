"""From an image or a folder of images to label maps: the one composition that every face calls."""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from medseg import log
from medseg.bundle import Bundle
from medseg.errors import (
    BundleError,
    Cancelled,
    ConfigError,
    DataError,
    GeometryError,
    LabelError,
    MedsegError,
    OutputError,
    PlanError,
    ReadError,
    ResourceError,
)
from medseg.exchange import load_model
from medseg.files import check_writable, is_disk_full, sha256_file, write_text
from medseg.io.dataset import Case, list_cases, read_image, read_label
from medseg.io.formats import WRITERS, is_image, stem_of, suffix_of, write
from medseg.io.grids import grid_difference
from medseg.segmentation import Segmentation
from medseg.stages import Outcome, Stage, convey
from medseg.types import Array, FloatArray, PathLike
from medseg.volume import Geometry, Volume

if TYPE_CHECKING:
    from medseg.exchange.monai_in import MonaiModel
    from medseg.infer import Options, Segmenter
    from medseg.labels import LabelSet

Image = PathLike | Volume | tuple[Array, FloatArray] | list[PathLike]
Model: TypeAlias = "PathLike | Bundle | MonaiModel"
Models: TypeAlias = "Model | Sequence[Model]"
Status = Literal["done", "skipped", "failed", "planned"]

REPORT = "predictions.json"
DEFAULT_ENDING = ".nii.gz"
# Reading and preprocessing one case takes seconds; a dead network share would take forever.
READ_TIMEOUT_SECONDS = 900.0
WRITE_TIMEOUT_SECONDS = 900.0
# Of no tile and no slab finished; the first may have to wait for a compiler.
NETWORK_TIMEOUT_SECONDS = 1800.0
# How often the report is brought up to date while cases are predicted.
REPORT_SECONDS = 5.0
# Options that change labels. What "auto" becomes is known only once a network runs.
SETTINGS = ("precision", "runtime", "skip_air")
# What a case needs while it is read ahead, for every byte of its unpacked file: mostly int16, held as float32
# by the volume, its copy in the network's order, the normalised one, and the resampled one.
BYTES_PER_FILE_BYTE = 8


@dataclass(frozen=True)
class CaseResult:
    """What became of one case.

    Attributes
    ----------
    case : name
    status : done, skipped (was done before), failed, or planned (nothing was run)
    output : the label map
    seconds : of prediction and writing; reading happens meanwhile
    inputs : SHA-256 by file name
    error : the sentence that says what is wrong
    """

    case: str
    status: Status
    output: Path
    seconds: float = 0.0
    inputs: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "output": self.output.name, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class _Loaded:
    """A case read and preprocessed."""

    volume: Volume
    prepared: Any
    inputs: dict[str, str]
    first_stage: Volume | None


@dataclass(frozen=True)
class _Predicted:
    """A case with its label map, not yet written."""

    labels: Volume
    seconds: float
    inputs: dict[str, str]


def segment(
    image: Image,
    models: "Models | Segmenter",
    probabilities: PathLike | None = None,
    options: "Options | None" = None,
    previous: PathLike | None = None,
    previous_labels: PathLike | Volume | None = None,
    **changes: Any,
) -> Segmentation:
    """Segment one image.

    Parameters
    ----------
    image : path, list of paths, Volume, or (array, affine) with the array as (i, j, k) or
        (channel, i, j, k) and the affine to RAS+ mm. A list holds the channels of one case, in the order of
        the model's, not several cases: for these, call it with a `Predictor`, or use `predict_folder`
    models : path of a model (a bundle of medseg, a trained model of nnU-Net, a bundle of MONAI), a loaded
        one, several of either (their probabilities are averaged), or a `Predictor`, which keeps the loaded
        networks for the next call
    probabilities : ``.npz`` file to write class probabilities to
    options, changes : `medseg.infer.Options`, or its fields by name (``mirror=False``, ``device="cpu"``)
    previous : model of a cascade's first stage, where it does not lie beside the second
    previous_labels : label map of a cascade's first stage, instead of predicting it

    Returns
    -------
    Segmentation
        On the grid of `image`.

    Raises
    ------
    MedsegError
        The image or the model is unusable; the subclass says which.

    Examples
    --------
    >>> result = segment("case.nii.gz", "run/bundle")          # doctest: +SKIP
    >>> write(result.volume, "labels.nii.gz")                   # doctest: +SKIP
    """
    predictor = _predictor(models, options, changes, previous)
    _check_cascade(predictor, previous_labels is not None)
    volume = _to_volume(image, predictor)
    if previous_labels is None:
        return predictor.segment(volume, probabilities)
    first = _first_stage(previous_labels, volume, predictor.labels)
    return predictor.segment(volume, probabilities, first)


def predict_folder(
    source: PathLike,
    models: "Models | Segmenter",
    output: PathLike,
    save_probabilities: bool = False,
    resume: bool = False,
    options: "Options | None" = None,
    read_timeout: float = READ_TIMEOUT_SECONDS,
    previous: PathLike | None = None,
    previous_labels: PathLike | None = None,
    checkpoint: str | None = None,
    memory: int | None = None,
    **changes: Any,
) -> list[CaseResult]:
    """Segment every case of a folder, or one file; a case that fails becomes a row and the others finish.

    Label maps are named CASE with the ending of the input (``.nii.gz`` where that cannot be written).
    ``predictions.json`` beside them says what was done, with which models, to which files. While one case is
    predicted, the next is read and the last is written: three cases are held at most.

    Parameters
    ----------
    source : folder of images (``CASE_0000.nii.gz`` a channel, or ``CASE.nii.gz``), or one file
    models : as for :func:`segment`
    output : folder; for one file, the name of the label map is possible too
    save_probabilities : write ``CASE.npz`` with float32 (class, k, j, i), as nnU-Net does
    resume : leave out cases that these models have done already, from the same input
    options, changes : as for :func:`segment`
    read_timeout : seconds after which a case that cannot be read is given up
    previous : as for :func:`segment`
    previous_labels : folder with the label maps of a cascade's first stage, named CASE with any ending
        (nnU-Net's ``-prev_stage_predictions``)
    checkpoint : of a model of nnU-Net, ``final`` or ``best``
    memory : bytes that a case may need to be read while others are under way; by default what is free then

    Returns
    -------
    list of CaseResult
        In the order of the cases.

    Raises
    ------
    MedsegError
        Nothing can be predicted at all: no image, no usable model, no space on the disk, or the one
        file is bad.
    """
    predictor = _predictor(models, options, changes, previous, checkpoint)
    _check_cascade(predictor, previous_labels is not None)
    first_stages = None if previous_labels is None else _list_first_stages(previous_labels)
    run = _Run(predictor, Path(source), Path(output), save_probabilities, first_stages, memory)
    return run.all(run.finished() if resume else {}, read_timeout)


def list_work(
    source: PathLike,
    models: "Models",
    output: PathLike,
    previous: PathLike | None = None,
    checkpoint: str | None = None,
) -> list[CaseResult]:
    """Return the cases that :func:`predict_folder` would predict; nothing is run or written."""
    first = load_models(models, previous, checkpoint)[0]
    channels = first.plan.channels if isinstance(first, Bundle) else first.channels
    cases = list_cases(source, len(channels))
    return [CaseResult(case.name, "planned", path) for case, path in _targets(cases, source, output)]


def load_models(
    models: "Models", previous: PathLike | None = None, checkpoint: str | None = None
) -> "tuple[Bundle | MonaiModel, ...]":
    """Open one model or several.

    Parameters
    ----------
    models : paths or loaded models
    previous : model of a cascade's first stage, where it does not lie beside the second
    checkpoint : of a model of nnU-Net, ``final`` or ``best``
    """
    several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    return tuple(_load_model(each, previous, checkpoint) for each in several)


def _load_model(model: "Model", previous: PathLike | None, checkpoint: str | None) -> "Bundle | MonaiModel":
    if not isinstance(model, str | Path):
        return model
    return load_model(model, previous, checkpoint)


@dataclass
class _Run:
    """One call of :func:`predict_folder`."""

    predictor: "Segmenter"
    source: Path
    output: Path
    probabilities: bool
    first_stages: Mapping[str, Path] | None
    memory: int | None
    rows: dict[str, CaseResult] = field(default_factory=dict)
    reported: float = 0.0
    task: log.Task | None = None

    def __post_init__(self) -> None:
        self.cases = list_cases(self.source, len(self.predictor.channels))
        self.targets = dict(_targets(self.cases, self.source, self.output))
        single = not self.source.is_dir() and suffix_of(self.output) != ""
        name = f"{stem_of(self.output)}.json" if single else REPORT
        self.report = (self.output.parent if single else self.output) / name

    def all(self, finished: Mapping[str, CaseResult], read_timeout: float) -> list[CaseResult]:
        """Predict what is not in `finished`; the report is written however this ends."""
        self.rows = dict(finished)
        todo = [case for case in self.cases if case.name not in finished]
        try:
            self.work_off(todo, self.stages(read_timeout))
        except BaseException as error:
            with suppress(MedsegError):  # what stopped the work is said, not what follows from it
                self.write_report()
            if isinstance(error, Cancelled):
                raise Cancelled(self.stopped()) from error
            raise
        self.write_report()
        return self.results

    def stopped(self) -> str:
        """Return what to say when the work was stopped on request."""
        done = sum(row.status in ("done", "skipped") for row in self.results)
        return (
            f"stopped on request with {done} of {len(self.cases)} cases done. "
            "Run the same command with --resume to go on."
        )

    def work_off(self, todo: Sequence[Case], stages: tuple[Stage, ...]) -> None:
        """Send cases through the stages, and note what becomes of them."""
        with log.task("Predict", len(todo)) as task, closing(convey(todo, stages, self.has_room)) as belt:
            self.task = task
            for outcome in belt:
                self.rows[outcome.item.name] = self.row(outcome)
                self.write_report(at_once=False)
                task.advance(check=False)  # the belt asks whether to stop, once nothing gets lost
                del outcome  # an error holds on to the images of its case

    def stages(self, read_timeout: float) -> tuple[Stage, ...]:
        """Return what happens to a case, and how long each step may be silent."""

        def late(case: Case, verb: str, seconds: float) -> str:
            return f"{case.name}: could not be {verb} within {seconds:g} s. Check the disk or network share."

        return (
            Stage(
                "read",
                self.threaded(self.read),
                read_timeout,
                lambda c: ReadError(late(c, "read", read_timeout)),
            ),
            Stage("predict", self.threaded(self.predict), NETWORK_TIMEOUT_SECONDS, _hangs, vital=True),
            Stage(
                "write",
                self.write,
                WRITE_TIMEOUT_SECONDS,
                lambda c: OutputError(late(c, "written", WRITE_TIMEOUT_SECONDS)),
            ),
        )

    def threaded(self, work: Callable[[Case, Any], Any]) -> Callable[[Case, Any], Any]:
        """Return `work` with as many threads inside torch as the options say: a new thread would take all."""
        from medseg.infer.runtime import count_threads, torch_threads

        count = count_threads(self.predictor.options.threads)

        def run(case: Case, value: Any) -> Any:
            with torch_threads(count):
                return work(case, value)

        return run

    @property
    def results(self) -> list[CaseResult]:
        """What is known by now, in the order of the cases."""
        return [self.rows[case.name] for case in self.cases if case.name in self.rows]

    @cached_property
    def needs_voxels(self) -> bool:
        """Whether voxels are wanted after preprocessing: by a cascade, for its first stage."""
        bundles = _bundles(self.predictor)
        return not bundles or any(bundle.settings.previous_stage for bundle in bundles)

    def has_room(self, case: Case) -> bool:
        """Return whether a case can be read while others are held."""
        free = free_memory() if self.memory is None else self.memory
        return free is None or BYTES_PER_FILE_BYTE * sum(map(_unpacked_size, case.images)) <= free

    def read(self, case: Case, _: None) -> _Loaded:
        """Read and preprocess."""
        volume = _read(case, self.predictor)
        hashes = {name: sha256_file(path) for name, path in self.inputs(case).items() if path.exists()}
        first = None
        if self.first_stages is not None:
            if case.name not in self.first_stages:
                raise ReadError(f"{case.name}: has no label map of the first stage. Predict it first.")
            first = _first_stage(self.first_stages[case.name], volume, self.predictor.labels)
        prepared = self.predictor.prepare(volume)
        return _Loaded(volume if self.needs_voxels else _emptied(volume), prepared, hashes, first)

    def predict(self, case: Case, loaded: _Loaded) -> _Predicted:
        """Run the network, all the way to the label map."""
        began = time.monotonic()
        if self.task is not None:
            self.task.advance(0, case.name, check=False)
        maps = self.maps(self.targets[case])
        result = self.predictor.segment_prepared(loaded.volume, loaded.prepared, maps, loaded.first_stage)
        return _Predicted(result.volume, time.monotonic() - began, loaded.inputs)

    def write(self, case: Case, predicted: _Predicted) -> CaseResult:
        """Write the label map."""
        began, target = time.monotonic(), self.targets[case]
        write(predicted.labels, target)
        seconds = predicted.seconds + time.monotonic() - began
        return CaseResult(case.name, "done", target, seconds, predicted.inputs)

    def row(self, outcome: Outcome[Case]) -> CaseResult:
        """Return what became of a case, or raise what concerns all or the only one."""
        case = outcome.item
        if outcome.error is None:
            done: CaseResult = outcome.value
            return done
        error = _as_own(outcome.error)
        reason = _reason(case, error)
        if isinstance(error, MedsegError) and not self.source.is_dir():
            raise type(error)(reason) from error
        log.logger.debug("%s", "".join(traceback.format_exception(error)))
        log.logger.warning("%s", reason)
        return CaseResult(case.name, "failed", self.targets[case], error=reason)

    def maps(self, target: Path) -> Path | None:
        """Return where the probabilities of a case go, if they are wanted."""
        return target.with_name(f"{stem_of(target)}.npz") if self.probabilities else None

    def inputs(self, case: Case) -> dict[str, Path]:
        """Return the files that a result depends on, by the names in the report."""
        files = {path.name: path for path in case.images}
        if self.first_stages is not None and case.name in self.first_stages:
            files[f"previous/{self.first_stages[case.name].name}"] = self.first_stages[case.name]
        return files

    def finished(self) -> dict[str, CaseResult]:
        """Return the cases that an earlier run has done, in full, with the same models and files."""
        try:
            before = json.loads(self.report.read_text(encoding="utf-8"))
            rows = {row["case"]: row for row in before["cases"] if _is_row(row)}
            same = _settings(before) == _settings(self.content())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        done = {}
        for case in self.cases if same else ():
            row, target = rows.get(case.name), self.targets[case]
            maps = self.maps(target)
            there = target.exists() and (maps is None or maps.exists())
            if row and there and _unchanged(self.inputs(case), row):
                done[case.name] = CaseResult(case.name, "skipped", target, row["seconds"], row["inputs"])
        return done

    def content(self) -> dict[str, Any]:
        """Return what the report holds by now."""
        provenance = self.predictor.provenance()
        if self.first_stages is None:  # else the hashes of the label maps are with their cases
            stages = [bundle.previous for bundle in _bundles(self.predictor) if bundle.previous]
            provenance["first_stages"] = [stage.digest for stage in stages]
        options = self.predictor.options
        report = {
            "input": str(self.source),
            "options": {name: getattr(options, name, None) for name in SETTINGS},
            "provenance": provenance,
            "labels": self.predictor.labels.to_dict(),
            "cases": [result.to_dict() for result in self.results],
        }
        plain: dict[str, Any] = json.loads(json.dumps(report))
        return plain

    def write_report(self, at_once: bool = True) -> None:
        """Bring ``predictions.json`` up to date."""
        if not self.rows or (not at_once and time.monotonic() - self.reported < REPORT_SECONDS):
            return
        write_text(self.report, json.dumps(self.content(), indent=1))
        self.reported = time.monotonic()


def _predictor(
    models: "Models | Segmenter",
    options: "Options | None",
    changes: Mapping[str, Any],
    previous: PathLike | None,
    checkpoint: str | None = None,
) -> "Segmenter":
    from medseg.infer import Segmenter, make_predictor

    if isinstance(models, Segmenter):
        if options is not None or changes or previous is not None or checkpoint is not None:
            raise ConfigError("a Predictor has its options already. Make it with those you want.")
        return models
    return make_predictor(load_models(models, previous, checkpoint), options, **changes)


def _bundles(predictor: "Segmenter") -> tuple[Bundle, ...]:
    """Return the models that have plans: those of MONAI have none."""
    return getattr(predictor, "bundles", ())


def _check_cascade(predictor: "Segmenter", given: bool) -> None:
    """Refuse a first stage that is missing, or one that nobody asks for, before anything is read."""
    cascades = [bundle for bundle in _bundles(predictor) if bundle.settings.previous_stage]
    if given and not cascades:
        raise ConfigError(
            "the model is no cascade, so it takes no label maps of a first stage. Leave them out."
        )
    for bundle in cascades:
        if bundle.previous is None and not given:
            raise BundleError(
                f"{bundle}: {bundle.configuration} needs its first stage {bundle.settings.previous_stage}, "
                "which is not with it. Give the model with --previous, or its label maps with "
                "--previous-labels."
            )


def _to_volume(image: Image, predictor: "Segmenter") -> Volume:
    if isinstance(image, Volume):
        return image
    if isinstance(image, tuple):
        array, affine = np.asarray(image[0]), image[1]
        return Volume(array, Geometry(cast(tuple[int, int, int], array.shape[-3:]), affine))
    if isinstance(image, list):
        if not image:
            raise DataError("the list of images is empty. Pass one file for each channel of the case.")
        paths = tuple(Path(path) for path in image)
        return _read(Case(stem_of(paths[0]), paths, None, stem_of(paths[0])), predictor)
    cases = list_cases(image, len(predictor.channels))
    if len(cases) > 1:
        raise ReadError(f"{image}: holds {len(cases)} cases. Pass one of them, or use predict_folder.")
    return _read(cases[0], predictor)


def _read(case: Case, predictor: "Segmenter") -> Volume:
    """Read an image; say so where one file holds several channels and the model takes others."""
    volume, wanted = read_image(case), predictor.channels
    if len(case.images) == 1 and 1 < volume.channels != len(wanted):
        kind = PlanError if _bundles(predictor) else DataError
        shape = " x ".join(map(str, (*volume.shape, volume.channels)))
        what = "is 4D" if volume.shape[2] > 1 else "has several colours"
        raise kind(
            f"{case.images[0]}: {what} ({shape}), so {volume.channels} channels are in one file; the model "
            f"takes {len(wanted)} ({', '.join(wanted)}). Give one 3D volume a channel."
        )
    return volume


def _list_first_stages(folder: PathLike) -> dict[str, Path]:
    """Return the label maps of a folder by case."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReadError(f"{folder}: no such folder. Give the one with the label maps of the first stage.")
    return {stem_of(path): path for path in sorted(folder.iterdir()) if is_image(path)}


def _first_stage(labels: PathLike | Volume, image: Volume, meaning: "LabelSet") -> Volume:
    """Read a label map of a first stage, and refuse one that is not of this image or not of these labels."""
    name = "the label map of the first stage"
    if not isinstance(labels, Volume):
        name, path = f"{Path(labels)}", Path(labels)
        labels = read_label(Case(stem_of(path), (), path, stem_of(path)))
    difference = grid_difference(image.geometry, labels.geometry, "the image")
    if difference:
        raise GeometryError(f"{name}: {difference}. Predict the first stage from the same image.")
    low, high = int(labels.array.min()), int(labels.array.max())
    if low < 0 or high > max(meaning.values):
        raise LabelError(
            f"{name}: holds values from {low} to {high}, the model knows 0 to {max(meaning.values)}. "
            "Give the label maps that its first stage has predicted."
        )
    return labels


def _targets(cases: Sequence[Case], source: PathLike, output: PathLike) -> Iterator[tuple[Case, Path]]:
    """Yield where the label map of each case goes.

    Raises
    ------
    ConfigError
        A result would replace an image or lie among them, medseg does not write its format, or a folder has
        the name of a file.
    OutputError
        The output cannot be written.
    """
    source, output = Path(source), Path(output)
    named = not source.is_dir() and suffix_of(output) != ""
    if source.is_dir() and output.exists() and output.samefile(source):
        raise ConfigError(
            f"{output}: is the folder of the images, so label maps would lie among them and could replace "
            "them. Choose another output folder."
        )
    _check_name(source, output)
    check_writable(output, folder=not named)
    for case in cases:
        ending = suffix_of(case.images[0]) if case.images else ""
        ending = ending if ending in WRITERS else DEFAULT_ENDING
        target = output if named else output / f"{case.name}{ending}"
        if any(target.resolve() == path.resolve() for path in case.images):
            raise ConfigError(f"{target}: the label map would replace its image. Choose another output.")
        yield case, target


def _check_name(source: Path, output: Path) -> None:
    """Refuse a file's name for a folder, and a file that medseg does not write."""
    ending = suffix_of(output)
    if output.is_dir() and (source.is_dir() or not ending):
        return
    if ending and source.is_dir():
        raise ConfigError(f"{output}: is the name of one file, and {source} is a folder. Give a folder.")
    # A folder may be named out.v2; letters alone, as in labels.foo, mean a format.
    if (ending or (output.suffix[1:].isalpha() and not source.is_dir())) and ending not in WRITERS:
        raise ConfigError(f"{output}: medseg does not write this format. Use one of {' '.join(WRITERS)}.")


def _emptied(volume: Volume) -> Volume:
    """Return the grid of a volume with zeros that take no memory."""
    return volume.with_array(np.broadcast_to(np.zeros((), volume.array.dtype), volume.array.shape))


def _hangs(case: Case) -> MedsegError:
    return ResourceError(
        f"{case.name}: the network has finished nothing for {NETWORK_TIMEOUT_SECONDS:g} s. Check the device, "
        "then run the same command with --resume."
    )


def _unpacked_size(path: Path) -> int:
    """Return about how many bytes a file holds; none where it cannot be read, which reading will tell."""
    try:
        size = path.stat().st_size
        if path.suffix.lower() != ".gz" or size < 4:
            return size
        with path.open("rb") as stream:
            stream.seek(-4, 2)  # RFC 1952, 2.3.1: the length of the content, modulo 2^32
            unpacked = int.from_bytes(stream.read(4), "little")
    except OSError:
        return 0
    return unpacked + (1 << 32 if unpacked < size > 1 << 30 else 0)


def free_memory() -> int | None:
    """Return how many bytes this process may still use, by the system and its container; None if unknown."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # "max", or no control group of version 2
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    return min(found, default=None)


def _as_own(error: BaseException) -> BaseException:
    """Return lack of memory, whichever library says it, as one of medseg's errors; others as they are."""
    from medseg.infer.runtime import is_out_of_memory

    if isinstance(error, MedsegError) or not is_out_of_memory(error):
        return error
    memory = ResourceError(
        "memory ran out. Close other programs, predict on a machine with more memory, or use a model with a "
        "smaller patch."
    )
    memory.__cause__ = error
    return memory


def _reason(case: Case, error: BaseException) -> str:
    """Return the sentence for a failed case, or raise what concerns all cases."""
    full = error.__cause__ is not None and is_disk_full(error.__cause__)
    if isinstance(error, Cancelled) or (isinstance(error, ResourceError) and full):
        raise error
    if isinstance(error, MedsegError):
        text = str(error)
        named = text.startswith(f"{case.name}:") or any(path.name in text for path in case.images)
        return text if named else f"{case.name}: {text}"
    if isinstance(error, OSError):
        return f"{case.name}: {error.filename or 'a file'}: {error.strerror or error}. Check its permissions."
    return f"{case.name}: {type(error).__name__}: {error}. Run `medseg check` on the folder."


# What may differ between two runs that give the same label maps, or follows from the options.
_FREE = {"medseg", "torch", "monai", "device"}
_FREE_OF_MODEL = {"bundle", "path", "precision", "runtime"}


def _settings(report: Mapping[str, Any]) -> Any:
    """Return what must agree for two runs to give the same label maps."""
    provenance = report["provenance"]
    models = [{k: v for k, v in model.items() if k not in _FREE_OF_MODEL} for model in provenance["models"]]
    rest = {k: v for k, v in provenance.items() if k not in _FREE}
    return {**rest, "models": models}, report["options"]


def _is_row(row: Any) -> bool:
    """Return whether a row of an earlier report says that a case was done, and how."""
    if not isinstance(row, dict) or row.get("status") not in ("done", "skipped"):
        return False
    case, seconds, inputs = row.get("case"), row.get("seconds"), row.get("inputs")
    return (
        isinstance(case, str)
        and isinstance(seconds, int | float)
        and isinstance(inputs, dict)
        and all(isinstance(value, str) for value in inputs.values())
    )


def _unchanged(inputs: Mapping[str, Path], row: Mapping[str, Any]) -> bool:
    """Return whether a case depends on the same files as when it was done."""
    if set(inputs) != set(row["inputs"]):
        return False
    return all(path.exists() and sha256_file(path) == row["inputs"][name] for name, path in inputs.items())
