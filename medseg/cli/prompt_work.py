"""The runs of ``medseg prompt``: one image, everything in one image, a file of many.

Importing this loads torch, so the command does it once its options are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg import log
from medseg.cli.prompt_print import Places, print_cases, print_found, print_plan, print_result
from medseg.cli.prompt_words import (
    Said,
    check_beside_file,
    check_known,
    check_together,
    flag_of,
    gather,
    read_axis,
    read_entries,
    read_pairs,
    read_range,
    read_weights,
)
from medseg.errors import ConfigError, DataError, PartialFailure
from medseg.files import check_writable
from medseg.prompt import PROPAGATORS
from medseg.prompt.batch import prompt_cases
from medseg.prompt.embeddings import default_folder
from medseg.prompt.entries import prepare
from medseg.prompt.found import find_everything
from medseg.prompt.results import (
    Networks,
    Options,
    check_output,
    describe,
    find_image,
    open_image,
    point,
    write_result,
)
from medseg.prompt.session import PromptSession
from medseg.prompt.sheet import write_sheet

# Of the session, which hold until they are changed.
_SETTINGS = ("propagator", "set_", "window", "modality")
_FILES = (".yaml", ".yml", ".json")


def run_prompt(given: Mapping[str, Any], order: Sequence[str], typed: Sequence[str]) -> None:
    """Do what a command line says.

    Parameters
    ----------
    given : value of each option, by the name of the command's parameter
    order : options whose order counts, as they came
    typed : options that the user has typed
    """
    said = gather(order, given)
    session: Path | None = given["session"]
    networks = Networks(read_weights(given["weights"] or ()), None if session is None else default_folder())
    if given["volume"].suffix.lower() in _FILES:
        check_beside_file(typed)
        run_file(given["volume"], given["out"], networks, given["resume"], given["json"])
        return
    work = Work.of(given, networks)
    check_together(typed, said, given["everything"], session is not None)
    check_places(work.places, work.image)
    if given["everything"]:
        run_everything(work, said)
    else:
        run_image(work, said, given["dry_run"])


@dataclass(frozen=True)
class Work:
    """What is asked of one image.

    Attributes
    ----------
    name : of the image, as its user has typed it
    image : its file
    overrides : settings of the propagator, or of everything, as ``key=value``
    undo, redo : steps of the session, before anything else
    again : find all objects of the session anew
    changed : settings that the user has given, by the name of the command's parameter
    resolve : winner and loser of voxels that two objects share
    json : print for a program
    """

    name: str
    image: Path
    options: Options
    networks: Networks
    places: Places
    overrides: tuple[str, ...]
    undo: int
    redo: int
    again: bool
    changed: tuple[str, ...]
    resolve: tuple[tuple[str, str], ...]
    json: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], networks: Networks) -> "Work":
        """Read the options that are not about an object."""
        return cls(
            given["volume"].name,
            find_image(given["volume"]),
            _read_options(given),
            networks,
            Places(given["out"], given["sheet"], given["session"]),
            tuple(given["set_"] or ()),
            given["undo"],
            given["redo"],
            given["again"],
            tuple(name for name in _SETTINGS if given[name]),
            read_pairs(given["resolve"] or ()),
            given["json"],
        )


def _read_options(given: Mapping[str, Any]) -> Options:
    if given["overlap"] is not None:
        check_known("--overlap", given["overlap"], ("overwrite", "keep", "ask"))
    name = given["propagator"]
    if name is not None and name not in PROPAGATORS:
        raise ConfigError(f"--propagator {name!r}: unknown. Use one of {', '.join(PROPAGATORS)}.")
    values = {key: given[key] for key in ("window", "modality", "channel", "propagator", "overlap")}
    values["coordinates"] = "voxel" if given["voxel"] else "mm"
    return Options.from_dict({k: v for k, v in values.items() if v is not None}, "medseg prompt")


def check_places(places: Places, image: Path) -> None:
    """Refuse places that cannot be written, or that would replace something, before any work."""
    if places.out is None and places.session is None and places.sheet is None:
        raise ConfigError("nothing would be kept. Give -o LABELS.nii.gz, or a --session FOLDER.")
    if places.out is not None:
        check_output(image, places.out)
    if places.sheet is not None:
        if places.sheet.suffix.lower() != ".png":
            raise ConfigError(f"--sheet {places.sheet}: is written as PNG. Give a name that ends in .png.")
        for path, what in ((image, "the image"), (places.out, "the label map")):
            if path is not None and places.sheet.resolve() == path.resolve():
                raise ConfigError(f"--sheet {places.sheet}: would replace {what}. Choose another name.")
        check_writable(places.sheet)


def run_image(work: Work, said: Sequence[Said], dry_run: bool) -> None:
    """Open an image, point, and write what came out."""
    entries, places = read_entries(said), work.places
    with open_image(
        work.image, work.options, places.session, work.networks, overrides=work.overrides
    ) as session:
        if work.undo:
            session.undo(work.undo)
        if work.redo:
            session.redo(work.redo)
        requests = prepare(session, entries, work.options.coordinates)
        if dry_run:
            print_plan(session, requests)
            return
        point(session, requests, run=not work.again)
        session.run(again=work.again)
        say_outdated(session, work.changed)
        settle(session, work.resolve)
        rows = describe(session) if places.out is None else write_result(session, work.name, places.out)
        if places.sheet is not None:
            write_sheet(session, places.sheet, work.name)
        print_result(session, rows, places, work.options.coordinates, work.json)


def say_outdated(session: PromptSession, changed: Sequence[str]) -> None:
    """Say that settings of this run do not reach back to what was found before."""
    names = session.outdated() if changed else ()
    if names:
        log.logger.info(
            "%s: only for what is found from now on; found before and left as it was: %s. To find it anew, "
            "give --again.",
            ", ".join(map(flag_of, changed)),
            ", ".join(names),
        )


def settle(session: PromptSession, resolve: Sequence[tuple[str, str]]) -> None:
    """Give voxels that objects share to whom the user says.

    Raises
    ------
    DataError
        Objects share voxels, and nobody has said whose they are.
    """
    for winner, loser in resolve:
        session.resolve(winner, loser)
    for shared in session.conflicts():
        raise DataError(
            f"objects {shared.first!r} and {shared.second!r} share {shared.voxels} voxels. Say whose "
            f"they are: --resolve {shared.first},{shared.second} (or the other way round)."
        )


def run_everything(work: Work, said: Sequence[Said]) -> None:
    """Segment everything in an image, and write it."""
    settings = said[0] if said else Said("")
    axis, reach = read_axis(settings.axis), read_range(settings.range)
    found = find_everything(work.image, work.options, work.overrides, axis, reach, work.networks)
    if work.places.out is not None:
        found.write(work.name, work.places.out)
    if work.places.sheet is not None:
        found.write_sheet(work.places.sheet, work.name)
    print_found(found, work.places, work.json)


def run_file(path: Path, out: Path | None, networks: Networks, resume: bool, json: bool) -> None:
    """Prompt every case of a file.

    Raises
    ------
    PartialFailure
        Some cases failed; the others are done.
    """
    if out is None:
        raise ConfigError(f"{path}: many results need a folder. Give -o FOLDER.")
    rows = prompt_cases(path, out, networks, resume=resume)
    print_cases(rows, out, json)
    failed = [row.case for row in rows if row.status == "failed"]
    if failed:
        raise PartialFailure(
            f"{out}: {len(failed)} of {len(rows)} cases failed ({', '.join(failed[:5])}). What is wrong with "
            "each is said above. Mend them and run the same command with --resume."
        )
