"""What the words of ``medseg prompt`` say: which prompt is of which object, what does not go together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import ConfigError

if TYPE_CHECKING:
    from medseg.prompt.entries import ObjectEntry

PLANES = ("axial", "coronal", "sagittal")
# Options whose order counts, by the names of the command's parameters.
ORDERED = (
    *("object_", "plane", "axis", "z_range"),
    *("box", "point", "not_point", "scribble", "not_scribble"),
    *("lasso", "not_lasso", "mask", "like"),
)
# Options that go with a file of prompts, and with --everything.
_WITH_FILE = ("volume", "out", "weights", "json", "resume")
_WITH_EVERYTHING = (
    *("volume", "out", "weights", "json", "everything", "sheet"),
    *("voxel", "axis", "z_range", "window", "modality", "channel", "set_"),
)
# Of one image and one run: no file says them.
_OF_ONE_RUN = ("session", "undo", "redo", "again", "resolve", "sheet", "everything", "dry_run")


@dataclass
class Said:
    """What the command line says about one object."""

    name: str
    prompts: list[dict[str, Any]] = field(default_factory=list)
    planes: list[str] = field(default_factory=list)
    axis: str | None = None
    range: str | None = None


def gather(order: Sequence[str], given: Mapping[str, Sequence[str] | None]) -> list[Said]:
    """Return what is said about each object.

    Parameters
    ----------
    order : names of options as they came, one for each value
    given : values of each option, in order

    Raises
    ------
    ConfigError
        Several objects are named, and a prompt stands before the first name.
    """
    values = {name: iter(given.get(name) or ()) for name in ORDERED}
    names = list(given.get("object_") or ())
    first = Said(names[0] if len(names) == 1 else "object")  # one name may come last
    objects = {first.name: first}
    now = first
    for option in order:
        value = next(values[option])
        if option == "object_":
            if len(names) > 1 and first.prompts:
                flag = flag_of(_option(first.prompts[0]))
                raise ConfigError(
                    f"several objects, and {flag} stands before the first name. Name each object before its "
                    f"prompts: --object {names[0]} --box ..."
                )
            now = objects.setdefault(value, Said(value, axis=first.axis, range=first.range))
        elif option == "plane":
            now.planes.append(value)
        elif option in ("axis", "z_range"):
            setattr(now, option.removeprefix("z_"), value)
        else:
            now.prompts.append({option: value, "plane": now.planes[-1] if now.planes else None})
    if len(names) > 1:
        del objects[first.name]
    return [each for each in objects.values() if each.prompts or names or each.range or each.axis]


def flag_of(parameter: str) -> str:
    """Return how an option is typed.

    >>> flag_of("not_point"), flag_of("set_")
    ('--not-point', '--set')
    """
    return "--" + parameter.strip("_").replace("_", "-")


def _option(prompt: Mapping[str, Any]) -> str:
    return next(iter(prompt))


def read_entries(said: Sequence[Said]) -> "list[ObjectEntry]":
    """Return the objects with numbers for what was typed."""
    from medseg.prompt.entries import ObjectEntry

    return [ObjectEntry.from_dict(_plain(each), f"object {each.name!r}") for each in said]


def _plain(said: Said) -> dict[str, Any]:
    for plane in said.planes:
        check_known("--plane", plane, PLANES)
    found: dict[str, Any] = {
        "name": said.name,
        "prompts": [_read_prompt(each, said) for each in said.prompts],
    }
    axis, ends = read_axis(said.axis), read_range(said.range)
    return {**found, **{k: v for k, v in (("axis", axis), ("range", ends)) if v is not None}}


def _read_prompt(prompt: Mapping[str, Any], said: Said) -> dict[str, Any]:
    """Return one prompt with its numbers; a plane that is named once holds for all of the object."""
    from medseg.prompt.entries import parse_numbers, parse_positions

    option = _option(prompt)
    value: Any = prompt[option]
    if option == "box":
        value = parse_numbers(value, "--box", 6)
    elif option in ("point", "not_point"):
        value = parse_numbers(value, flag_of(option), 3)
    elif option not in ("mask", "like"):
        value = parse_positions(value, flag_of(option))
    plane = said.planes[0] if len(said.planes) == 1 else prompt["plane"]
    return {option: value} if plane is None else {option: value, "plane": plane}


def read_axis(text: str | None) -> int | str | None:
    """Return a plane or the number of an axis, or refuse it."""
    if text is None:
        return None
    check_known("--axis", text, (*PLANES, "0", "1", "2"))
    return int(text) if text.isdecimal() else text


def read_range(text: str | None) -> tuple[float, float] | None:
    """Return first and last slice."""
    from medseg.prompt.entries import parse_numbers

    if text is None:
        return None
    first, last = parse_numbers(text, "--z-range", 2)
    return first, last


def read_pairs(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return winner and loser of each --resolve."""
    found = []
    for text in texts:
        winner, comma, loser = (part.strip() for part in text.partition(","))
        if not (winner and comma and loser):
            raise ConfigError(f"--resolve {text!r}: expected WINNER,LOSER, such as liver,spleen.")
        found.append((winner, loser))
    return tuple(found)


def read_weights(texts: Iterable[str]) -> dict[str, Path]:
    """Return the files of each --weights by the name of their asset."""
    from medseg.assets import get_asset

    given = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--weights {text!r}: expected NAME=FILE, such as mobile-sam=mobile_sam.pt.")
        given[get_asset(name).name] = Path(path)
    return given


def check_known(flag: str, text: str, known: Sequence[str]) -> None:
    """Refuse a word that an option does not know."""
    if text not in known:
        raise ConfigError(f"{flag} {text[:40]!r}: use {', '.join(known[:-1])} or {known[-1]}.")


def check_beside_file(typed: Iterable[str]) -> None:
    """Refuse options that a file of prompts says for itself, and those of one image.

    `typed` are names of parameters.
    """
    for name in typed:
        if name in _OF_ONE_RUN:
            raise ConfigError(f"{flag_of(name)} is about one image, not a file of prompts. Leave it out.")
        if name not in _WITH_FILE:
            raise ConfigError(
                f"{flag_of(name)} is not for a file of prompts, which says it itself. Leave it out."
            )


def check_together(typed: Iterable[str], said: Sequence[Said], everything: bool, session: bool) -> None:
    """Refuse options of one image that do not go together, and those that lead to nothing."""
    silent = [each.name for each in said if not each.prompts]
    if everything and (session or len(silent) < len(said)):
        raise ConfigError("--everything is by itself. Leave prompts and --session out.")
    for name in typed:
        if name == "resume":
            raise ConfigError(
                "--resume is for a YAML file of many images. One image goes on with --session FOLDER."
            )
        if everything and name not in _WITH_EVERYTHING:
            raise ConfigError(f"{flag_of(name)} does not go with --everything. Leave it out.")
        if name in ("undo", "redo", "again") and not session:
            raise ConfigError("--undo, --redo and --again are about a --session FOLDER. Name it.")
    if silent and not everything:
        raise ConfigError(f"object {silent[0]!r} has no prompt. Add --box, --point or --scribble.")
    if not said and not session and not everything:
        raise ConfigError(
            "nothing points at an object. Give a --box around it on one slice, a --point in it, or "
            "--scribble, --lasso, --mask; or --everything."
        )
