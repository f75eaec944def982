"""One image prompted and written, and files that list many: names, prompts, settings.

::

    # prompts.yaml
    coordinates: mm                # or voxel: indices of the file's own array, from 0
    cases:
      - image: patient_01.nii.gz   # relative to this file
        objects:
          liver:
            - {box: [-12.0, -40.0, 88.0, 95.0, 61.0, 88.0]}
            - {not_point: [-20.0, 30.0, 88.0]}

Everything that a case may say is in ``configs/prompt/batch.yaml``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from medseg import log
from medseg.config import Config, read_mapping
from medseg.errors import Cancelled, ConfigError, DataError, MedsegError, ResourceError
from medseg.files import check_writable, is_disk_full, write_text
from medseg.io import read
from medseg.io.formats import WRITERS, stem_of, suffix_of, write
from medseg.labels import LabelSet
from medseg.prompt.entries import Axis, Grid, ObjectEntry, Request, Unit, parse_objects, prepare
from medseg.prompt.prompts import PLANES
from medseg.prompt.provenance import models_at_work
from medseg.prompt.regions import Region
from medseg.prompt.session import PromptSession, choose_axis
from medseg.prompt.sheet import Shown, write_sheet
from medseg.prompt.state import Overlap
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.automatic import Everything
    from medseg.prompt.scene import Scene
    from medseg.prompt.slicewise import Models
    from medseg.prompt.workbench import Propagate

DEFAULT_ENDING = ".nii.gz"


class Options(Config):
    """How an image is looked at and objects are found; what is not given is as the session has it.

    Attributes
    ----------
    coordinates : ``mm`` or ``voxel``
    window, modality, overlap, propagator, config : see :class:`medseg.prompt.state.Settings`
    channel : of an image with several, from 0
    """

    coordinates: Unit = "mm"
    window: str | tuple[float, float] | None = None
    modality: str | None = None
    overlap: Overlap | None = None
    propagator: str | None = None
    config: dict[str, Any] | None = None
    channel: int | None = Field(None, ge=0)


class PromptCase(Options):
    """One image of a file, with what is said about its objects; options of its own outdo the file's.

    Attributes
    ----------
    image : path
    name : str
        Of the results; by default that of the image.
    objects : list of ObjectEntry, or mapping
        ``NAME: [prompts]``, or ``NAME: {prompts: [...], axis: ..., range: [...]}``.
    """

    image: str
    name: str = ""
    objects: Annotated[tuple[ObjectEntry, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("objects"), Mapping | list):
            return {**values, "objects": parse_objects(values["objects"])}
        return values


class PromptsFile(Options):
    """All cases of a file.

    Attributes
    ----------
    sheets : bool
        Draw a contact sheet of every result.
    cases : list of PromptCase
    """

    sheets: bool = True
    cases: Annotated[tuple[PromptCase, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [name_of(case) for case in self.cases]
        for name in names:
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(f"case name {name!r}: expected a plain name, without folders")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two cases are named {twice[0]!r}. Give one of them another `name`")
        return self

    def options_of(self, case: PromptCase) -> Options:
        """Return the options of a case: the file's, and over them its own."""
        known = set(Options.model_fields)
        given = {k: v for each in (self, case) for k, v in each.model_dump(exclude_unset=True).items()}
        return Options.from_dict({name: value for name, value in given.items() if name in known})


@dataclass(frozen=True)
class CaseRow:
    """What became of one case of a file."""

    case: str
    status: str  # "done" or "failed"
    output: Path
    objects: tuple[dict[str, Any], ...] = ()
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "output": str(self.output), "objects": list(self.objects)}


class Networks:
    """Makes the networks for one image after another; weights are loaded once.

    Parameters
    ----------
    given : files to use instead of downloads, by asset
    cache : for embeddings; None: in memory
    """

    def __init__(self, given: Mapping[str, PathLike] | None = None, cache: PathLike | None = None) -> None:
        self.given, self.cache = dict(given or {}), cache
        self._last: Models | None = None

    def __call__(self, scene: "Scene") -> "Models":
        """Return the networks for a scene."""
        from medseg.prompt.embeddings import EmbeddingCache
        from medseg.prompt.slicewise import Models

        if self._last is None:
            self._last = Models.open(scene, EmbeddingCache(self.cache), given=self.given)
        else:
            self._last = self._last.of(scene)
        return self._last


def name_of(case: PromptCase) -> str:
    """Return the name of a case's results."""
    return case.name or stem_of(case.image)


def load_prompts(path: PathLike) -> PromptsFile:
    """Read a file of prompts, YAML or JSON.

    Raises
    ------
    ReadError
        The file cannot be read.
    ConfigError
        It does not parse, or a key is unknown; the message names the place.
    """
    return PromptsFile.from_dict(read_mapping(path), str(path))


def open_image(
    image: PathLike | Volume,
    options: Options,
    folder: PathLike | None = None,
    networks: "Networks | None" = None,
    propagate: "Propagate | None" = None,
) -> PromptSession:
    """Begin a session about an image, or go on with the one in `folder`, with some options."""
    volume = image if isinstance(image, Volume) else read(image)
    for note in (*volume.notes, *_not_finite(volume, options.channel)):
        log.logger.info("%s%s.", "" if isinstance(image, Volume) else f"{image}: ", note.rstrip("."))
    return PromptSession.open(
        volume,
        folder,
        window=options.window,
        modality=options.modality,
        overlap=options.overlap,
        propagator=options.propagator,
        config=options.config,
        channel=options.channel,
        models=networks,
        propagate=propagate,
    )


def point(session: PromptSession, requests: Sequence[Request]) -> None:
    """Point at objects, one after the other: each is one step of the session."""
    for request in log.progress(requests, "Objects"):
        session.add(request.name, *request.prompts, axis=request.axis, limits=request.limits)


def describe(session: PromptSession) -> list[dict[str, Any]]:
    """Return what is known of every object, as plain data: size, reach, confidence, where to look next."""
    rows = []
    for label, known in enumerate(session.state.objects, 1):
        region = session.mask(known.name)
        axis = 2 if known.axis is None else known.axis
        scores = [score for _, score in known.confidence]
        row: dict[str, Any] = {
            "name": known.name,
            "label": label,
            "voxels": region.voxels,
            "volume_ml": _millilitres(session, region.voxels),
            "plane": PLANES[axis],
            "slices": region.stop[axis] - region.start[axis],
            "confidence": round(float(np.mean(scores)), 4) if scores else None,
            "notes": list(known.notes),
        }
        looked = session.suggest(known.name)
        if looked is not None:
            place = [round(x, 2) for x in looked.position_mm]
            row["look_next"] = {"reason": looked.reason, "doubt": round(looked.doubt, 4), "position": place}
        rows.append(row)
    return rows


def find_everything(
    image: PathLike | Volume,
    options: Options,
    overrides: Sequence[str] = (),
    axis: Axis | None = None,
    reach: tuple[float, float] | None = None,
    networks: "Networks | None" = None,
) -> "Found":
    """Segment everything in an image, without a prompt (:mod:`medseg.prompt.automatic`).

    Parameters
    ----------
    image : a volume or its file
    options : of which coordinates, window, modality and channel matter
    overrides : of :class:`~medseg.prompt.automatic.AutomaticConfig`
    axis : across which slices are taken
    reach : first and last slice to look at, in mm along the axis or in voxels
    networks : to use

    Raises
    ------
    DataError
        The image has several channels, or the reach lies outside of it.
    """
    from medseg.prompt.automatic import AutomaticConfig, segment_everything

    with open_image(image, options) as session:
        grid = Grid(session.scene, options.coordinates)
    across = choose_axis(grid.scene, ()) if axis is None else grid.axis(axis)
    first, last = (0, grid.scene.shape[across] - 1) if reach is None else grid.limits(reach, across)
    config = AutomaticConfig().with_overrides(overrides, "--set")
    models = (networks or Networks())(grid.scene)
    found = segment_everything(models, config, across, range(first, last + 1))
    return Found(grid.scene, found, across, tuple(models_at_work(models)))


@dataclass(frozen=True, eq=False)
class Found:
    """Everything in an image."""

    scene: "Scene"
    everything: "Everything"
    axis: int
    models: tuple[dict[str, str], ...]

    def names(self) -> tuple[str, ...]:
        """Return a name for each label."""
        width = len(str(len(self.everything.objects)))
        return tuple(f"object {each.label:0{width}d}" for each in self.everything.objects)

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of every object, as :func:`describe` does."""
        scale = 1e-12 if self.scene.geometry.unit == "micron" else 1e-3
        return [
            {
                "name": name,
                "label": each.label,
                "voxels": each.voxels,
                "volume_ml": float(f"{each.volume_mm3 * scale:.6g}"),
                "plane": PLANES[self.axis],
                "slices": each.last - each.first + 1,
                "confidence": round(each.iou, 4),
                "notes": [],
                "centre": [round(x, 2) for x in each.centre_mm],
            }
            for name, each in zip(self.names(), self.everything.objects, strict=True)
        ]

    def write(self, image: str, out: Path) -> None:
        """Write the label map, and beside it what its integers mean and how it came to be."""
        from medseg.prompt.automatic import restore_labels

        labels = LabelSet(entries={"background": 0, **{name: n for n, name in enumerate(self.names(), 1)}})
        content = {
            "input": image,
            "output": out.name,
            "labels": labels.to_dict(),
            "objects": self.rows(),
            "provenance": {
                "medseg": metadata.version("medseg"),
                "image": self.scene.digest,
                "window": list(self.scene.window),
                "models": list(self.models),
            },
        }
        write(restore_labels(self.scene, self.everything.labels), out)
        write_text(report_path(out), json.dumps(content, indent=1))

    def sheet(self) -> list[Shown]:
        """Return what a contact sheet shows."""
        from scipy.ndimage import find_objects

        labels = self.everything.labels
        boxes = find_objects(labels.astype(np.int32))
        return [
            Shown(
                name,
                Region.at(labels[box] == n, (box[0].start, box[1].start, box[2].start), self.scene.shape),
                self.axis,
                note=f"{row['volume_ml']:,.4g} ml  ·  confidence {row['confidence']:.2f}",
            )
            for n, (name, row, box) in enumerate(zip(self.names(), self.rows(), boxes, strict=True), 1)
        ]


def check_output(image: Path, out: Path) -> None:
    """Refuse an output that cannot be written, or that would replace the image, before any work.

    Raises
    ------
    ConfigError
        medseg does not write this format, or it is the image itself.
    OutputError
        The place cannot be written.
    """
    if suffix_of(out) not in WRITERS:
        raise ConfigError(f"{out}: medseg does not write this format. Use one of {' '.join(WRITERS)}.")
    if out.resolve() == image.resolve():
        raise ConfigError(f"{out}: the label map would replace its image. Choose another output.")
    check_writable(out)


def report_path(out: Path) -> Path:
    """Return where names, provenance and figures of a label map are: beside it.

    >>> report_path(Path("liver.nii.gz")).name
    'liver.prompt.json'
    """
    return out.with_name(f"{stem_of(out)}.prompt.json")


def write_result(session: PromptSession, image: str, out: Path) -> list[dict[str, Any]]:
    """Write the label map, and beside it what its integers mean and how it came to be; return the rows.

    Raises
    ------
    DataError
        Objects share voxels, and nobody has said whose they are; or there is no object.
    """
    if not session.objects:
        raise DataError("there is no object to write. Point at one: --box, --point or --scribble.")
    segmentation = session.segmentation()
    rows = describe(session)
    content = {
        "input": image,
        "output": out.name,
        "labels": segmentation.labels.to_dict(),
        "objects": rows,
        "provenance": segmentation.provenance,
    }
    write(segmentation.volume, out)
    write_text(report_path(out), json.dumps(content, indent=1))
    return rows


def prompt_cases(
    prompts: PathLike,
    out: PathLike,
    networks: "Networks | None" = None,
    propagate: "Propagate | None" = None,
) -> list[CaseRow]:
    """Prompt every case of a file; one that fails becomes a row, and the others finish.

    Parameters
    ----------
    prompts : YAML or JSON; see :class:`PromptsFile`
    out : folder for ``NAME.nii.gz``, ``NAME.prompt.json`` and ``NAME.png``, and ``prompts.json`` about all
    networks : to use
    propagate : stands in for :func:`medseg.prompt.propagate`

    Raises
    ------
    ConfigError
        The file of prompts is wrong.
    OutputError, ResourceError
        The folder cannot be written.
    Cancelled
        The listener asked to stop; what is done stays.
    """
    source, folder = Path(prompts), Path(out)
    file = load_prompts(source)
    check_writable(folder, folder=True)
    networks = networks or Networks()
    rows: list[CaseRow] = []
    for case in log.progress(file.cases, "Cases"):
        target = folder / f"{name_of(case)}{DEFAULT_ENDING}"
        try:
            found = _prompt_case(file, case, source.parent, target, networks, propagate)
            rows.append(CaseRow(name_of(case), "done", target, tuple(found)))
        except Exception as error:
            rows.append(CaseRow(name_of(case), "failed", target, error=_reason(case, error)))
            log.logger.warning("%s", rows[-1].error)
        summary = {"input": str(source), "cases": [row.to_dict() for row in rows]}
        write_text(folder / "prompts.json", json.dumps(summary, indent=1))
    return rows


def _prompt_case(
    file: PromptsFile,
    case: PromptCase,
    folder: Path,
    target: Path,
    networks: "Networks",
    propagate: "Propagate | None",
) -> list[dict[str, Any]]:
    options = file.options_of(case)
    image = folder / case.image
    check_output(image, target)
    with open_image(image, options, networks=networks, propagate=propagate) as session:
        point(session, prepare(session, case.objects, options.coordinates, folder))
        rows = write_result(session, case.image, target)
        if file.sheets:
            write_sheet(session, target.with_name(f"{name_of(case)}.png"), name_of(case))
        return rows


def _reason(case: PromptCase, error: Exception) -> str:
    """Return the sentence for a failed case, or raise what concerns all cases."""
    full = isinstance(error, ResourceError) and error.__cause__ is not None and is_disk_full(error.__cause__)
    if isinstance(error, Cancelled) or full:
        raise error
    text = str(error)
    if not isinstance(error, MedsegError):
        text = f"{type(error).__name__}: {' '.join(text.split())[:200]}. Look at the image with medseg info."
    return text if Path(case.image).name in text else f"{name_of(case)}: {text}"


def _millilitres(session: PromptSession, voxels: int) -> float:
    geometry = session.scene.source
    scale = 1e-12 if geometry.unit == "micron" else 1e-3
    return float(f"{voxels * geometry.voxel_volume * scale:.6g}")


def _not_finite(volume: Volume, channel: int | None) -> tuple[str, ...]:
    """Say that some voxels are not numbers; they are taken for the darkest."""
    array = volume.array if channel is None or channel >= volume.channels else volume.array[channel]
    if array.dtype.kind not in "fc":
        return ()
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    said = f"{bad:,} of {array.size:,} voxels are not numbers; they are taken for the darkest"
    return (said,) if 0 < bad < array.size else ()
