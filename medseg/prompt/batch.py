"""Files that list many images with prompts, and the batch that answers them.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medseg import log
from medseg.config import read_mapping
from medseg.errors import Cancelled, ConfigError, DataError, MedsegError, ResourceError
from medseg.files import check_writable, is_disk_full, write_text
from medseg.io.formats import stem_of, suffix_of
from medseg.prompt.entries import ObjectEntry, parse_objects, prepare, split_value
from medseg.prompt.results import (
    Networks,
    Options,
    check_output,
    open_image,
    point,
    report_path,
    write_result,
)
from medseg.prompt.resume import find_finished, find_origin, seal
from medseg.prompt.session import PromptSession
from medseg.prompt.sheet import write_sheet
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.prompt.workbench import Propagate

DEFAULT_ENDING = ".nii.gz"
SUMMARY = "prompts.json"
Status = Literal["done", "skipped", "failed"]  # skipped: was done before


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
    status: Status
    output: Path
    objects: tuple[dict[str, Any], ...] = ()
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "output": str(self.output), "objects": list(self.objects)}


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


def prompt_cases(
    prompts: PathLike,
    out: PathLike,
    networks: Networks | None = None,
    propagate: "Propagate | None" = None,
    resume: bool = False,
) -> list[CaseRow]:
    """Prompt every case of a file; one that fails becomes a row, and the others finish.

    Parameters
    ----------
    prompts : YAML or JSON; see :class:`PromptsFile`
    out : folder for ``NAME.nii.gz``, ``NAME.prompt.json`` and ``NAME.png``, and ``prompts.json`` about all
    networks : to use
    propagate : stands in for :func:`medseg.prompt.propagate`
    resume : leave out cases that are done already: whole, and from the same files, prompts, settings, weights

    Raises
    ------
    ConfigError
        The file of prompts is wrong, or a result would replace what a case is made from.
    OutputError, ResourceError
        The folder cannot be written.
    Cancelled
        The listener asked to stop; what is done stays.
    """
    source, folder = Path(prompts), Path(out)
    file = load_prompts(source)
    work = _Work(file, source, folder, networks or Networks(), propagate, resume)
    work.check()
    rows: list[CaseRow] = []
    try:
        for case in log.progress(file.cases, "Cases"):
            rows.append(work.row(case))
            summary = {"input": str(source), "cases": [row.to_dict() for row in rows]}
            write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    except Cancelled as error:
        done = sum(row.status != "failed" for row in rows)
        raise Cancelled(
            f"stopped on request with {done} of {len(file.cases)} cases done. "
            "Run the same command with --resume to go on."
        ) from error
    return rows


@dataclass(frozen=True)
class _Work:
    """One call of :func:`prompt_cases`."""

    file: PromptsFile
    source: Path
    out: Path
    networks: Networks
    propagate: "Propagate | None"
    resume: bool

    def check(self) -> None:
        """Refuse a folder that cannot be written, or in which a result would replace what is read."""
        if suffix_of(self.out) and not self.out.is_dir():
            raise ConfigError(f"{self.out}: is the name of one file, and there are many. Give a folder.")
        check_writable(self.out, folder=True)
        read = {self.source.resolve()}
        for case in self.file.cases:
            masks = (each.mask for known in case.objects for each in known.prompts if each.mask is not None)
            read |= {path.resolve() for path in (self.image(case), *(self.mask(text) for text in masks))}
        for path in (
            self.out / SUMMARY,
            *(path for case in self.file.cases for path in self.all_files(case)),
        ):
            if path.resolve() in read:
                raise ConfigError(f"{path}: a result would replace what is read. Choose another folder.")

    def row(self, case: PromptCase) -> CaseRow:
        """Return what became of a case, or raise what concerns all cases."""
        name, target = name_of(case), self.target(case)
        try:
            known = self.finished(case) if self.resume else None
            if known is not None:
                return CaseRow(name, "skipped", target, known)
            return CaseRow(name, "done", target, tuple(self.prompt(case)))
        except Exception as error:
            row = CaseRow(name, "failed", target, error=_reason(case, error))
            log.logger.warning("%s", row.error)
            return row

    def finished(self, case: PromptCase) -> tuple[dict[str, Any], ...] | None:
        """Return the rows of a case that is done; None if it has to be done."""
        return find_finished(self.target(case), self.origin(case), self.networks.hashes, self.files(case))

    def prompt(self, case: PromptCase) -> list[dict[str, Any]]:
        """Point at the objects of a case, and write them."""
        options, image, target = self.file.options_of(case), self.image(case), self.target(case)
        origin = self.origin(case)
        check_output(image, target)
        with open_image(image, options, networks=self.networks, propagate=self.propagate) as session:
            point(session, prepare(session, case.objects, options.coordinates, self.source.parent))
            _refuse_shared(session)
            rows = write_result(session, case.image, target)
            if self.file.sheets:
                write_sheet(session, self.sheet(case), name_of(case))
        seal(target, origin, self.files(case))
        return rows

    def origin(self, case: PromptCase) -> dict[str, Any]:
        """Return what the result of a case is made from."""
        own = self.propagate is not None
        options = self.file.options_of(case)
        return find_origin(self.image(case), case.objects, options, self.source.parent, own)

    def image(self, case: PromptCase) -> Path:
        return self.source.parent / case.image

    def mask(self, text: str) -> Path:
        return split_value(text, self.source.parent)[0]

    def target(self, case: PromptCase) -> Path:
        return self.out / f"{name_of(case)}{DEFAULT_ENDING}"

    def sheet(self, case: PromptCase) -> Path:
        return self.out / f"{name_of(case)}.png"

    def files(self, case: PromptCase) -> tuple[Path, ...]:
        """Return what is written of a case before its report."""
        return (self.target(case), self.sheet(case)) if self.file.sheets else (self.target(case),)

    def all_files(self, case: PromptCase) -> tuple[Path, ...]:
        return (*self.files(case), report_path(self.target(case)))


def _refuse_shared(session: PromptSession) -> None:
    """Refuse voxels that two objects share: in a batch there is nobody to ask."""
    for shared in session.conflicts():
        raise DataError(
            f"objects {shared.first!r} and {shared.second!r} share {shared.voxels} voxels, and overlap: ask "
            "has nobody to ask in a batch. Use overwrite (the later object has them) or keep (the earlier)."
        )


def _reason(case: PromptCase, error: Exception) -> str:
    """Return the sentence for a failed case, or raise what concerns all cases."""
    full = isinstance(error, ResourceError) and error.__cause__ is not None and is_disk_full(error.__cause__)
    if isinstance(error, Cancelled) or full:
        raise error
    text = str(error)
    if not isinstance(error, MedsegError):
        text = f"{type(error).__name__}: {' '.join(text.split())[:200]}. Look at the image with medseg info."
    return text if Path(case.image).name in text else f"{name_of(case)}: {text}"
