"""From an image or a folder of images to label maps: the one composition that every face calls."""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from medseg import log
from medseg.bundle import Bundle, load_bundle
from medseg.errors import Cancelled, ConfigError, DataError, MedsegError, ReadError, ResourceError
from medseg.files import check_writable, is_disk_full, sha256_file, write_text
from medseg.io.dataset import Case, list_cases, read_image
from medseg.io.formats import WRITERS, stem_of, suffix_of, write
from medseg.segmentation import Segmentation
from medseg.types import Array, FloatArray, PathLike
from medseg.volume import Geometry, Volume

if TYPE_CHECKING:
    from medseg.infer import Options, Predictor
    from medseg.preprocess import Preprocessed

Image = PathLike | Volume | tuple[Array, FloatArray] | list[PathLike]
Models = PathLike | Bundle | Sequence[PathLike | Bundle]
Status = Literal["done", "skipped", "failed", "planned"]
T = TypeVar("T")

REPORT = "predictions.json"
DEFAULT_ENDING = ".nii.gz"
# Reading and preprocessing one case takes seconds; a dead network share would take forever.
READ_TIMEOUT_SECONDS = 900.0
# How often the report is brought up to date while cases are predicted.
REPORT_SECONDS = 5.0


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
    """A case read and preprocessed, by the thread that reads ahead."""

    volume: Volume
    prepared: "list[Preprocessed]"
    inputs: dict[str, str]


def segment(
    image: Image,
    bundles: "Models | Predictor",
    probabilities: PathLike | None = None,
    options: "Options | None" = None,
    **changes: Any,
) -> Segmentation:
    """Segment one image.

    Parameters
    ----------
    image : path, list of paths, Volume, or (array, affine) with the array as (i, j, k) or
        (channel, i, j, k) and the affine to RAS+ mm. A list holds the channels of one case, in the order of
        the model's, not several cases: for these, call it with a `Predictor`, or use `predict_folder`
    bundles : path of a bundle, Bundle, several of either (their probabilities are averaged), or a
        `Predictor`, which keeps the loaded networks for the next call
    probabilities : ``.npz`` file to write class probabilities to
    options, changes : `medseg.infer.Options`, or its fields by name (``mirror=False``, ``device="cpu"``)

    Returns
    -------
    Segmentation
        On the grid of `image`.

    Raises
    ------
    MedsegError
        The image or the bundle is unusable; the subclass says which.

    Examples
    --------
    >>> result = segment("case.nii.gz", "run/bundle")          # doctest: +SKIP
    >>> write(result.volume, "labels.nii.gz")                   # doctest: +SKIP
    """
    predictor = _predictor(bundles, options, changes)
    return predictor.segment(_to_volume(image, len(predictor.bundle.plan.channels)), probabilities)


def predict_folder(
    source: PathLike,
    bundles: "Models | Predictor",
    output: PathLike,
    save_probabilities: bool = False,
    resume: bool = False,
    options: "Options | None" = None,
    read_timeout: float = READ_TIMEOUT_SECONDS,
    **changes: Any,
) -> list[CaseResult]:
    """Segment every case of a folder, or one file; a case that fails becomes a row and the others finish.

    Label maps are named CASE with the ending of the input (``.nii.gz`` where that cannot be written).
    ``predictions.json`` beside them says what was done, with which models, to which files.

    Parameters
    ----------
    source : folder of images (``CASE_0000.nii.gz`` a channel, or ``CASE.nii.gz``), or one file
    bundles : as for :func:`segment`
    output : folder; for one file, the name of the label map is possible too
    save_probabilities : write ``CASE.npz`` with float32 (class, k, j, i), as nnU-Net does
    resume : leave out cases that these models have done already, from the same input
    options, changes : as for :func:`segment`
    read_timeout : seconds after which a case that cannot be read is given up

    Raises
    ------
    MedsegError
        Nothing can be predicted at all: no image, no usable bundle, no space on the disk, or the one
        file is bad.
    """
    predictor = _predictor(bundles, options, changes)
    run = _Run(predictor, Path(source), Path(output), save_probabilities, read_timeout)
    return run.all(run.finished() if resume else {})


def list_work(source: PathLike, bundles: Models, output: PathLike) -> list[CaseResult]:
    """Return the cases that :func:`predict_folder` would predict; nothing is run or written."""
    channels = len(load_models(bundles)[0].plan.channels)
    cases = list_cases(source, channels)
    return [CaseResult(case.name, "planned", path) for case, path in _targets(cases, source, output)]


def load_models(bundles: Models) -> tuple[Bundle, ...]:
    """Open one bundle or several."""
    if isinstance(bundles, str | Path | Bundle):
        bundles = [bundles]
    return tuple(each if isinstance(each, Bundle) else load_bundle(each) for each in bundles)


class _Run:
    """One call of :func:`predict_folder`."""

    def __init__(
        self, predictor: "Predictor", source: Path, output: Path, probabilities: bool, read_timeout: float
    ) -> None:
        self.predictor, self.source, self.probabilities = predictor, source, probabilities
        self.read_timeout = read_timeout
        self.cases = list_cases(source, len(predictor.bundle.plan.channels))
        self.targets = dict(_targets(self.cases, source, output))
        single = not source.is_dir() and suffix_of(output) != ""
        name = f"{stem_of(output)}.json" if single else REPORT
        self.report = (output.parent if single else output) / name
        self.results: list[CaseResult] = []
        self.written = 0.0

    def all(self, finished: Mapping[str, CaseResult]) -> list[CaseResult]:
        """Predict what is not in `finished`; the report is written however this ends."""
        self.results = [finished[case.name] for case in self.cases if case.name in finished]
        todo = [case for case in self.cases if case.name not in finished]
        try:
            with log.task("Predict", len(todo)) as task:
                for case, loaded in _read_ahead(todo, self.load, self.read_timeout):
                    self.results.append(self.one(case, loaded))
                    self.write_report(at_once=False)
                    task.advance(note=case.name)
        finally:
            self.write_report()
        return self.results

    def load(self, case: Case) -> _Loaded:
        """Read and preprocess; runs in the thread that reads ahead."""
        volume = read_image(case)
        hashes = {path.name: sha256_file(path) for path in case.images}
        return _Loaded(volume, self.predictor.prepare(volume), hashes)

    def one(self, case: Case, loaded: Callable[[], _Loaded]) -> CaseResult:
        """Predict and write one case; return what became of it."""
        target = self.targets[case]
        began = time.monotonic()
        try:
            ready = loaded()
            began = time.monotonic()
            maps = self.maps(target)
            result = self.predictor.segment_prepared(ready.volume, ready.prepared, maps)
            write(result.volume, target)
        except Exception as error:  # one bad case, whatever its fault, must not stop the others
            if isinstance(error, MedsegError) and not self.source.is_dir():
                raise type(error)(_reason(case, error)) from error  # there are no others
            reason = _reason(case, error)
            log.logger.debug("%s", "".join(traceback.format_exception(error)))
            log.logger.warning("%s", reason)
            return CaseResult(case.name, "failed", target, time.monotonic() - began, error=reason)
        return CaseResult(case.name, "done", target, time.monotonic() - began, ready.inputs)

    def maps(self, target: Path) -> Path | None:
        """Return where the probabilities of a case go, if they are wanted."""
        return target.with_name(f"{stem_of(target)}.npz") if self.probabilities else None

    def finished(self) -> dict[str, CaseResult]:
        """Return the cases that an earlier run has done, in full, with the same models and files."""
        try:
            before = json.loads(self.report.read_text(encoding="utf-8"))
            rows = {row["case"]: row for row in before["cases"] if _is_row(row)}
            same = _settings(before["provenance"]) == _settings(self.predictor.provenance())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        done = {}
        for case in self.cases if same else ():
            row, target = rows.get(case.name), self.targets[case]
            maps = self.maps(target)
            there = target.exists() and (maps is None or maps.exists())
            if row and there and _unchanged(case, row):
                done[case.name] = CaseResult(case.name, "skipped", target, row["seconds"], row["inputs"])
        return done

    def write_report(self, at_once: bool = True) -> None:
        """Bring ``predictions.json`` up to date."""
        if not self.results or (not at_once and time.monotonic() - self.written < REPORT_SECONDS):
            return
        report = {
            "input": str(self.source),
            "provenance": self.predictor.provenance(),
            "labels": self.predictor.bundle.labels.to_dict(),
            "cases": [result.to_dict() for result in self.results],
        }
        write_text(self.report, json.dumps(report, indent=1))
        self.written = time.monotonic()


def _predictor(
    bundles: "Models | Predictor", options: "Options | None", changes: Mapping[str, Any]
) -> "Predictor":
    from medseg.infer import Predictor

    if isinstance(bundles, Predictor):
        if options is not None or changes:
            raise ConfigError("a Predictor has its options already. Make it with those you want.")
        return bundles
    return Predictor(load_models(bundles), options, **changes)


def _to_volume(image: Image, channels: int) -> Volume:
    if isinstance(image, Volume):
        return image
    if isinstance(image, tuple):
        array, affine = np.asarray(image[0]), image[1]
        return Volume(array, Geometry(cast(tuple[int, int, int], array.shape[-3:]), affine))
    if isinstance(image, list):
        if not image:
            raise DataError("the list of images is empty. Pass one file for each channel of the case.")
        paths = tuple(Path(path) for path in image)
        return read_image(Case(stem_of(paths[0]), paths, None, stem_of(paths[0])))
    cases = list_cases(image, channels)
    if len(cases) > 1:
        raise ReadError(f"{image}: holds {len(cases)} cases. Pass one of them, or use predict_folder.")
    return read_image(cases[0])


def _targets(cases: Sequence[Case], source: PathLike, output: PathLike) -> Iterator[tuple[Case, Path]]:
    """Yield where the label map of each case goes.

    Raises
    ------
    ConfigError
        A result would replace an image or lie among them, or medseg does not write its format.
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
    if named and suffix_of(output) not in WRITERS:
        raise ConfigError(f"{output}: medseg does not write this format. Use one of {' '.join(WRITERS)}.")
    check_writable(output, folder=not named)
    for case in cases:
        ending = suffix_of(case.images[0]) if case.images else ""
        ending = ending if ending in WRITERS else DEFAULT_ENDING
        target = output if named else output / f"{case.name}{ending}"
        if any(target.resolve() == path.resolve() for path in case.images):
            raise ConfigError(f"{target}: the label map would replace its image. Choose another output.")
        yield case, target


def _read_ahead(
    cases: Sequence[Case], load: Callable[[Case], T], timeout: float
) -> Iterator[tuple[Case, Callable[[], T]]]:
    """Yield each case with a function that returns what was loaded, or raises why not.

    The next case loads while the caller works on this one. A thread that hangs is left behind.
    """
    pending = _start(load, cases[0]) if cases else None
    for number, case in enumerate(cases):
        assert pending is not None
        outcome = _wait(pending, case, timeout)
        pending = _start(load, cases[number + 1]) if number + 1 < len(cases) else None
        yield case, outcome.result


def _start(load: Callable[[Case], T], case: Case) -> "Future[T]":
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(load(case))
        except BaseException as error:  # handed to the thread that waits
            future.set_exception(error)

    Thread(target=work, name=f"read {case.name}", daemon=True).start()
    return future


def _wait(future: "Future[T]", case: Case, timeout: float) -> "Future[T]":
    """Wait for the result, cancellable at every half second."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        log.check_cancelled()
        try:
            future.exception(timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            return future
        except FutureTimeout:
            continue
    late: Future[T] = Future()
    late.set_exception(
        ReadError(f"{case.name}: could not be read within {timeout:g} s. Check the disk or network share.")
    )
    return late


def _reason(case: Case, error: Exception) -> str:
    """Return the sentence for a failed case, or raise what concerns all cases."""
    full = error.__cause__ is not None and is_disk_full(error.__cause__)
    if isinstance(error, Cancelled) or (isinstance(error, ResourceError) and full):
        raise error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{case.name}: memory ran out. Close other programs, or predict on another device."
    if isinstance(error, MedsegError):
        text = str(error)
        named = text.startswith(f"{case.name}:") or any(path.name in text for path in case.images)
        return text if named else f"{case.name}: {text}"
    if isinstance(error, OSError):
        return f"{case.name}: {error.filename or 'a file'}: {error.strerror or error}. Check its permissions."
    return f"{case.name}: {type(error).__name__}: {error}. Run `medseg check` on the folder."


def _settings(provenance: Mapping[str, Any]) -> Any:
    """Return what must agree for two runs to give the same label maps."""
    models = [{k: v for k, v in model.items() if k != "bundle"} for model in provenance["models"]]
    return models, provenance["step"], provenance["compatible"]


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


def _unchanged(case: Case, row: Mapping[str, Any]) -> bool:
    hashes: Mapping[str, str] = row["inputs"]
    return all(path.exists() and hashes.get(path.name) == sha256_file(path) for path in case.images)
