"""``medseg prompt``: point at an organ or a lesion and get it whole, in 3D."""

import json as json_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from medseg.cli.signals import mortal

if TYPE_CHECKING:
    from medseg.prompt.batch import CaseRow
    from medseg.prompt.entries import ObjectEntry, Request
    from medseg.prompt.results import Networks, Options
    from medseg.prompt.session import PromptSession

# Panels of the help.
WHERE, HOW, AFTER = "Where the object is", "How it is found", "What becomes of it"
_PLANES = ("axial", "coronal", "sagittal")
# Lines about objects that a screen has room for.
_MOST_ROWS = 20
FLAG = " "  # in the place of a flag's value
# Options whose order counts, by the names of the function's parameters.
ORDERED = (
    *("object_", "plane", "axis", "z_range"),
    *("box", "point", "not_point", "scribble", "not_scribble"),
    *("lasso", "not_lasso", "mask", "like"),
)
_ORDER = "medseg.prompt.order"
_FILES = (".yaml", ".yml", ".json")


class PromptCommand(TyperCommand):
    """A command that remembers in which order its options came: prompts belong to the object before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and note the order of options."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order if parameter.name in ORDERED]
        return super().parse_args(ctx, args)


def prompt(
    context: typer.Context,
    volume: Annotated[
        Path,
        typer.Argument(
            metavar="VOLUME",
            readable=False,
            help="Image, the sample mni-t1, or a YAML file of prompts for many images.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="PATH", help="Label map to write; of a YAML file: the folder."),
    ] = None,
    object_: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            metavar="NAME",
            rich_help_panel=WHERE,
            help="Name of the object. Given again, it begins the next one: prompts belong to the name before "
            "them.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,Z,X,Y,Z",
            rich_help_panel=WHERE,
            help="Two opposite corners: on one slice, if they agree along an axis; else in 3D.",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y,Z", rich_help_panel=WHERE, help="A click inside the object."),
    ] = None,
    not_point: Annotated[
        list[str] | None,
        typer.Option(
            "--not-point",
            metavar="X,Y,Z",
            rich_help_panel=WHERE,
            help="A click outside of it, where the mask leaks.",
        ),
    ] = None,
    scribble: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A line drawn through the object."),
    ] = None,
    not_scribble: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A line through what is not it."),
    ] = None,
    lasso: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A closed line around it on a slice."
        ),
    ] = None,
    not_lasso: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="The same around what is not it."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:VALUE]", rich_help_panel=WHERE, help="A drawn label map on the grid of the image."
        ),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", rich_help_panel=WHERE, help="The mask of another object."),
    ] = None,
    voxel: Annotated[
        bool,
        typer.Option(
            "--voxel",
            metavar=FLAG,
            rich_help_panel=WHERE,
            help="Numbers are voxel indices of the file's own array, from 0 (a box: first and last voxel), "
            "not world mm (RAS+).",
        ),
    ] = False,
    plane: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=WHERE,
            help="axial, coronal or sagittal: of a flat box or line, where the numbers do not say it.",
        ),
    ] = None,
    z_range: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIRST,LAST",
            rich_help_panel=WHERE,
            help="The object lies between these slices (mm along the axis, or --voxel).",
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HOW,
            help="Across which slices it is followed: axial, coronal, sagittal, or 0, 1, 2 of the file. By "
            "default those of the flat box, or of thick slices.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HOW,
            help="auto, soft tissue, lung, bone, brain, liver, ..., LEVEL/WIDTH, or percentiles.",
        ),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=HOW, help="CT, MR or PET, if the values mislead."),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", rich_help_panel=HOW, help="Of a 4D image, from 0."),
    ] = None,
    propagator: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=HOW, help="How it is followed through the slices."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=HOW, help="A setting of the propagator; repeatable."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            rich_help_panel=HOW,
            help="Weights to use instead of a download, such as mobile-sam=mobile_sam.pt; repeatable.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything", metavar=FLAG, rich_help_panel=HOW, help="No prompts: find all there is."
        ),
    ] = False,
    overlap: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=AFTER,
            help="Who gets voxels that two objects want: overwrite (the later), keep (the earlier), or ask.",
        ),
    ] = None,
    resolve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WINNER,LOSER", rich_help_panel=AFTER, help="The answer to --overlap ask; repeatable."
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=AFTER,
            help="Keep every step here, and go on with what is there: correct, undo, tomorrow too.",
        ),
    ] = None,
    undo: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=AFTER, help="First take back N steps of it.")
    ] = 0,
    redo: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=AFTER, help="First take N steps again.")
    ] = 0,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="PNG", rich_help_panel=AFTER, help="Draw a contact sheet of the result."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=FLAG, help="Check the prompts, say where they are, and stop.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Point at an organ or a lesion in VOLUME and get it whole, in 3D, on the grid of the image.

    A box on one slice is enough:

    medseg prompt ct.nii.gz --box -12,-40,88,95,61,88 --object liver -o liver.nii.gz

    Then look at the --sheet, and correct with --point and --not-point in
    the same --session.
    """
    given = {name: context.params.get(name) or [] for name in ORDERED}
    said = gather(context.meta.get(_ORDER, []), given)
    with mortal():  # torch comes with it
        from medseg.prompt.results import Options
    networks = _networks(weights or [], session)
    if volume.suffix.lower() in _FILES:
        _refuse_beside_file(context.params)
        _run_file(volume, out, networks, json)
        return
    if overlap is not None:
        _one_of("--overlap", overlap, ("overwrite", "keep", "ask"))
    values = {
        "coordinates": "voxel" if voxel else "mm",
        **{"window": window, "modality": modality, "channel": channel},
        **{"propagator": propagator, "overlap": overlap},
        "config": None if everything else _config(propagator, set_ or [], session),
    }
    options = Options.from_dict({k: v for k, v in values.items() if v is not None}, "medseg prompt")
    work = Work(
        volume.name,
        _image(volume),
        out,
        session,
        sheet,
        options,
        tuple(set_ or []),
        undo,
        redo,
        _pairs(resolve or []),
    )
    work.check(said, everything)
    if everything:
        work.run_everything(said, networks, json)
    else:
        work.run(_entries(said), networks, dry_run, json)


@dataclass
class Said:
    """What the command line says about one object."""

    name: str
    prompts: list[dict[str, Any]] = field(default_factory=list)
    planes: list[str] = field(default_factory=list)
    axis: str | None = None
    range: str | None = None


def gather(order: Sequence[str], given: Mapping[str, Sequence[str]]) -> list[Said]:
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
    from medseg.errors import ConfigError

    values = {name: iter(given.get(name, ())) for name in ORDERED}
    names = list(given.get("object_", ()))
    first = Said(names[0] if len(names) == 1 else "object")  # one name may come last
    objects = {first.name: first}
    now = first
    for option in order:
        value = next(values[option])
        if option == "object_":
            if len(names) > 1 and first.prompts:
                raise ConfigError(
                    f"several objects, and {_flag(first.prompts[0])} stands before the first name. Name "
                    f"each object before its prompts: --object {names[0]} --box ..."
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


def _flag(prompt: Mapping[str, Any]) -> str:
    return "--" + next(iter(prompt)).replace("_", "-")


def _entries(said: Sequence[Said]) -> "list[ObjectEntry]":
    from medseg.prompt.entries import ObjectEntry

    return [ObjectEntry.from_dict(_plain(each), f"object {each.name!r}") for each in said]


def _plain(said: Said) -> dict[str, Any]:
    from medseg.prompt.entries import parse_numbers

    for plane in said.planes:
        _one_of("--plane", plane, _PLANES)
    found: dict[str, Any] = {
        "name": said.name,
        "prompts": [_read_prompt(each, said) for each in said.prompts],
    }
    if said.axis is not None:
        found["axis"] = _axis(said.axis)
    if said.range is not None:
        found["range"] = parse_numbers(said.range, "--z-range", 2)
    return found


def _read_prompt(prompt: Mapping[str, Any], said: Said) -> dict[str, Any]:
    """Return one prompt with its numbers; a plane that is named once holds for all of the object."""
    from medseg.prompt.entries import parse_numbers, parse_positions

    option = next(iter(prompt))
    value: Any = prompt[option]
    if option == "box":
        value = parse_numbers(value, "--box", 6)
    elif option in ("point", "not_point"):
        value = parse_numbers(value, _flag(prompt), 3)
    elif option not in ("mask", "like"):
        value = parse_positions(value, _flag(prompt))
    plane = said.planes[0] if len(said.planes) == 1 else prompt["plane"]
    return {option: value} if plane is None else {option: value, "plane": plane}


@dataclass
class Work:
    """One image on the command line, and the name that its user has for it."""

    name: str
    volume: Path
    out: Path | None
    folder: Path | None
    sheet: Path | None
    options: "Options"
    overrides: tuple[str, ...]
    undo: int
    redo: int
    resolve: tuple[tuple[str, str], ...]

    def check(self, said: Sequence[Said], everything: bool) -> None:
        """Refuse what leads to nothing, before anything is read."""
        from medseg.errors import ConfigError
        from medseg.files import check_writable
        from medseg.prompt.results import check_output

        silent = [each.name for each in said if not each.prompts]
        if everything and (self.folder is not None or len(silent) < len(said)):
            raise ConfigError("--everything is by itself. Leave prompts and --session out.")
        if silent and not everything:
            raise ConfigError(f"object {silent[0]!r} has no prompt. Add --box, --point or --scribble.")
        if not said and self.folder is None and not everything:
            raise ConfigError(
                "nothing points at an object. Give a --box around it on one slice, a --point in it, or "
                "--scribble, --lasso, --mask; or --everything."
            )
        if self.out is None and self.folder is None and self.sheet is None:
            raise ConfigError("nothing would be kept. Give -o LABELS.nii.gz, or a --session FOLDER.")
        if (self.undo or self.redo) and self.folder is None:
            raise ConfigError("--undo and --redo are about a --session FOLDER. Name it.")
        if self.out is not None:
            check_output(self.volume, self.out)
        if self.sheet is not None:
            check_writable(self.sheet)

    def run(self, entries: "Sequence[ObjectEntry]", networks: "Networks", dry_run: bool, json: bool) -> None:
        """Open the image, point, and write what came out."""
        from medseg.prompt.entries import prepare
        from medseg.prompt.results import open_image, point

        with open_image(self.volume, self.options, self.folder, networks) as session:
            if self.overrides and self.options.config is None:
                session.change(config=_changed(session.state.settings, self.overrides))
            if self.undo:
                session.undo(self.undo)
            if self.redo:
                session.redo(self.redo)
            requests = prepare(session, entries, self.options.coordinates)
            if dry_run:
                _say_plan(session, requests)
                return
            point(session, requests)
            session.run()
            self.settle(session)
            rows = self.write(session)
            self.say(session, rows, json)

    def run_everything(self, said: Sequence[Said], networks: "Networks", json: bool) -> None:
        """Segment everything, and write it."""
        from medseg.prompt.entries import parse_numbers
        from medseg.prompt.found import find_everything

        settings = said[0] if said else Said("")
        ends = None if settings.range is None else parse_numbers(settings.range, "--z-range", 2)
        reach = None if ends is None else (ends[0], ends[1])
        axis = _axis(settings.axis)
        found = find_everything(self.volume, self.options, self.overrides, axis, reach, networks)
        if self.out is not None:
            found.write(self.name, self.out)
        if self.sheet is not None:
            from medseg.files import atomic_path
            from medseg.prompt.sheet import draw_sheet

            png = draw_sheet(found.scene, found.sheet(), self.name, together=True)
            with atomic_path(self.sheet) as temporary:
                temporary.write_bytes(png)
        rows = found.rows()
        if json:
            typer.echo(self.to_json(rows, found.models))
            return
        for row in rows[:_MOST_ROWS]:
            typer.echo(_line(row))
        if len(rows) > _MOST_ROWS:
            typer.echo(f"... and {len(rows) - _MOST_ROWS} smaller objects")
        for line in self.files(found.models):
            typer.echo(line)

    def settle(self, session: "PromptSession") -> None:
        """Give voxels that objects share to whom the user says."""
        from medseg.errors import DataError

        for winner, loser in self.resolve:
            session.resolve(winner, loser)
        for shared in session.conflicts():
            raise DataError(
                f"objects {shared.first!r} and {shared.second!r} share {shared.voxels} voxels. Say whose "
                f"they are: --resolve {shared.first},{shared.second} (or the other way round)."
            )

    def write(self, session: "PromptSession") -> list[dict[str, Any]]:
        """Write what was asked for; return what is known of the objects."""
        from medseg.prompt.results import describe, write_result
        from medseg.prompt.sheet import write_sheet

        rows = describe(session) if self.out is None else write_result(session, self.name, self.out)
        if self.sheet is not None:
            write_sheet(session, self.sheet, self.name)
        return rows

    def say(self, session: "PromptSession", rows: list[dict[str, Any]], json: bool) -> None:
        """Print the result."""
        models = session.provenance()["models"]
        if json:
            typer.echo(self.to_json(rows, models))
            return
        for note in (*session.notes, *(f"{row['name']}: {note}" for row in rows for note in row["notes"])):
            typer.echo(note, err=True)
        for row in rows:
            for line in _lines(row, self.options.coordinates, session):
                typer.echo(line)
        for line in self.files(models):
            typer.echo(line)

    def to_json(self, rows: list[dict[str, Any]], models: Sequence[Mapping[str, str]]) -> str:
        """Return the result for a program."""
        places = {"output": self.out, "sheet": self.sheet, "session": self.folder}
        named = {name: None if path is None else str(path) for name, path in places.items()}
        return json_module.dumps({**named, "objects": rows, "models": list(models)})

    def files(self, models: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yield a line for each file, and what the licences of the weights are."""
        from medseg.prompt.results import report_path

        if self.out is not None:
            yield f"{self.out}: label map; names and provenance in {report_path(self.out).name}"
        if self.sheet is not None:
            yield f"{self.sheet}: contact sheet"
        if self.folder is not None:
            yield f"{self.folder}: session; correct with --session {self.folder} and more prompts"
        if models:
            yield "weights: " + ", ".join(f"{model['name']} ({model['licence']})" for model in models)


def _lines(row: Mapping[str, Any], unit: str, session: "PromptSession") -> Iterator[str]:
    """Yield the lines about an object, within 80 columns but for long names."""
    if not row["voxels"]:
        yield f"{row['name']}: nothing found. Give a box around it, or a click in its middle."
        return
    yield _line(row)
    look = row.get("look_next")
    if look is not None and look["doubt"] >= 0.2:
        place = ",".join(f"{x:g}" for x in _position(look["position"], unit, session))
        yield f"  look next at {place} ({look['reason']})"


def _line(row: Mapping[str, Any]) -> str:
    score = "" if row["confidence"] is None else f"   confidence {row['confidence']:.2f}"
    slices = f"{row['slices']:>3} {row['plane']} slice{'s' if row['slices'] != 1 else ''}"
    return f"{row['name']:<20} {row['volume_ml']:>9,.4g} ml   {slices}{score}"


def _axis(text: str | None) -> int | str | None:
    """Return a plane or a number, or refuse it."""
    if text is None:
        return None
    _one_of("--axis", text, (*_PLANES, "0", "1", "2"))
    return int(text) if text.isdecimal() else text


def _one_of(flag: str, text: str, known: Sequence[str]) -> None:
    from medseg.errors import ConfigError

    if text not in known:
        raise ConfigError(f"{flag} {text[:40]!r}: use {', '.join(known[:-1])} or {known[-1]}.")


def _position(position: Sequence[float], unit: str, session: "PromptSession") -> list[float]:
    """Return a position in the world in the numbers that the user speaks."""
    import numpy as np

    if unit == "mm":
        return [round(x, 1) for x in position]
    inverse = np.linalg.inv(session.scene.source.affine)
    return [float(round(x)) for x in inverse[:3, :3] @ np.array(position) + inverse[:3, 3]]


def _say_plan(session: "PromptSession", requests: "Sequence[Request]") -> None:
    """Say where the prompts are, in mm, and how they would be used."""
    from medseg.prompt.prompts import PLANES

    settings = session.state.settings
    shape = " x ".join(map(str, session.scene.source.shape))
    typer.echo(f"image: {shape} voxels; propagator {settings.propagator}; window {settings.window}")
    for request in requests:
        axis = "" if request.axis is None else f", {PLANES[request.axis]} slices"
        reach = "" if request.limits is None else f" {request.limits[0]} to {request.limits[1]}"
        typer.echo(f"{request.name}: {len(request.prompts)} prompts{axis}{reach}")
        for each in request.prompts:
            values = each.to_dict()
            numbers = {k: v for k, v in values.items() if k.endswith("_mm")}
            plane = f" ({values['plane']})" if values.get("plane") else ""
            places = "; ".join(str(v) for v in numbers.values())
            typer.echo(f"  {each.kind}{plane} {places}".rstrip())


def _config(propagator: str | None, overrides: Sequence[str], folder: Path | None) -> dict[str, Any] | None:
    """Return the settings of the propagator; None: as they are in the session, or the defaults."""
    from medseg.prompt.journal import JOURNAL

    going_on = folder is not None and (folder / JOURNAL).exists()
    if propagator is None and (going_on or not overrides):
        return None
    from medseg.errors import ConfigError
    from medseg.prompt import DEFAULT, PROPAGATORS

    name = DEFAULT if propagator is None else propagator
    if name not in PROPAGATORS:
        raise ConfigError(f"--propagator {name!r}: unknown. Use one of {', '.join(PROPAGATORS)}.")
    return PROPAGATORS[name][0]().with_overrides(overrides, "--set").to_dict() if overrides else {}


def _changed(settings: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the propagator of a session with overrides."""
    from medseg.prompt import PROPAGATORS

    known = PROPAGATORS[settings.propagator][0].from_dict(settings.config)
    return known.with_overrides(overrides, "--set").to_dict()


def _pairs(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    from medseg.errors import ConfigError

    found = []
    for text in texts:
        winner, comma, loser = (part.strip() for part in text.partition(","))
        if not (winner and comma and loser):
            raise ConfigError(f"--resolve {text!r}: expected WINNER,LOSER, such as liver,spleen.")
        found.append((winner, loser))
    return tuple(found)


def _image(volume: Path) -> Path:
    """Return the file of an image, which may be a sample named by its asset."""
    from medseg.assets import ASSETS, find
    from medseg.io.formats import suffix_of

    named = ASSETS.get(str(volume))
    if named is None or volume.exists() or not suffix_of(named.filename):
        return volume
    return find(named.name)


def _networks(weights: Sequence[str], folder: Path | None) -> "Networks":
    """Return the networks; with a session, what they see of each slice is kept for tomorrow."""
    from medseg.assets import default_cache, get_asset
    from medseg.errors import ConfigError
    from medseg.prompt.results import Networks

    given = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--weights {text!r}: expected NAME=FILE, such as mobile-sam=mobile_sam.pt.")
        given[get_asset(name).name] = Path(path)
    return Networks(given, None if folder is None else default_cache().parent / "embeddings")


def _refuse_beside_file(params: Mapping[str, Any]) -> None:
    """Refuse options that a file of prompts says for itself."""
    from medseg.errors import ConfigError

    fine = ("volume", "out", "weights", "json")
    extra = [name for name, value in params.items() if name not in fine and value]
    if extra:
        flag = "--" + extra[0].strip("_").replace("_", "-")
        raise ConfigError(f"{flag} is not for a file of prompts, which says it itself. Leave it out.")


def _run_file(path: Path, out: Path | None, networks: "Networks", json: bool) -> None:
    """Prompt every case of a file."""
    from medseg.errors import ConfigError, PartialFailure
    from medseg.prompt.batch import prompt_cases

    if out is None:
        raise ConfigError(f"{path}: many results need a folder. Give -o FOLDER.")
    rows = prompt_cases(path, out, networks)
    if json:
        typer.echo(json_module.dumps({"output": str(out), "cases": [row.to_dict() for row in rows]}))
    else:
        for row in rows:
            _print_row(row)
    failed = [row.case for row in rows if row.status == "failed"]
    if failed:
        raise PartialFailure(
            f"{out}: {len(failed)} of {len(rows)} cases failed ({', '.join(failed[:5])}). What is wrong with "
            "each is said above."
        )


def _print_row(row: "CaseRow") -> None:
    if row.status == "done":
        sizes = ", ".join(f"{each['name']} {each['volume_ml']:,.4g} ml" for each in row.objects)
        typer.echo(f"done    {row.output}  {sizes}")
