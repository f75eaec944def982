"""What ``medseg prompt`` prints: lines of at most 80 columns for people, JSON for programs."""

import json as json_module
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from medseg.prompt.batch import CaseRow
from medseg.prompt.entries import Grid, Request, Unit
from medseg.prompt.found import Found
from medseg.prompt.prompts import PLANES
from medseg.prompt.results import report_path
from medseg.prompt.session import PromptSession

# Lines about objects that a screen has room for.
_MOST_ROWS = 20
# From this doubt on, 0 to 1, a place to look at next is said: a choice, so that a good result says nothing.
_DOUBTFUL = 0.2


@dataclass(frozen=True)
class Places:
    """Where the results of one image go."""

    out: Path | None = None
    sheet: Path | None = None
    session: Path | None = None

    def to_json(self, rows: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, str]]) -> str:
        """Return a result for a program."""
        places = {"output": self.out, "sheet": self.sheet, "session": self.session}
        named = {name: None if path is None else str(path) for name, path in places.items()}
        return json_module.dumps({**named, "objects": list(rows), "models": list(models)})

    def lines(self, models: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yield a line for each file, and what the licences of the weights are."""
        if self.out is not None:
            yield f"{self.out}: label map; names and provenance in {report_path(self.out).name}"
        if self.sheet is not None:
            yield f"{self.sheet}: contact sheet"
        if self.session is not None:
            yield f"{self.session}: session; correct with --session {self.session} and more prompts"
        if models:
            yield "weights: " + ", ".join(f"{model['name']} ({model['licence']})" for model in models)


def print_result(
    session: PromptSession, rows: Sequence[Mapping[str, Any]], places: Places, unit: Unit, json: bool
) -> None:
    """Print the objects of a session; what the user should know goes to stderr."""
    models = session.provenance()["models"]
    if json:
        typer.echo(places.to_json(rows, models))
        return
    for note in (*session.notes, *(f"{row['name']}: {note}" for row in rows for note in row["notes"])):
        typer.echo(note, err=True)
    grid = Grid(session.scene, unit)
    _echo(line for row in rows for line in _lines(row, grid))
    _echo(places.lines(models))


def print_found(found: Found, places: Places, json: bool) -> None:
    """Print everything in an image, the largest first."""
    rows = found.rows()
    if json:
        typer.echo(places.to_json(rows, found.models))
        return
    _echo(_line(row) for row in rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        typer.echo(f"... and {len(rows) - _MOST_ROWS} smaller objects")
    _echo(places.lines(found.models))


def print_plan(session: PromptSession, requests: Sequence[Request]) -> None:
    """Print where the prompts are, in mm, and how they would be used."""
    settings = session.state.settings
    shape = " x ".join(map(str, session.scene.source.shape))
    typer.echo(f"image: {shape} voxels; propagator {settings.propagator}; window {settings.window}")
    for request in requests:
        axis = "" if request.axis is None else f", {PLANES[request.axis]} slices"
        reach = "" if request.limits is None else f" {request.limits[0]} to {request.limits[1]}"
        count = len(request.prompts)
        typer.echo(f"{request.name}: {count} prompt{'s' if count != 1 else ''}{axis}{reach}")
        for each in request.prompts:
            values = each.to_dict()
            numbers = {k: v for k, v in values.items() if k.endswith("_mm")}
            plane = f" ({values['plane']})" if values.get("plane") else ""
            places = "; ".join(str(v) for v in numbers.values())
            typer.echo(f"  {each.kind}{plane} {places}".rstrip())


def print_cases(rows: Sequence[CaseRow], out: Path, json: bool) -> None:
    """Print the cases of a file, and how many are done."""
    found = Counter(row.status for row in rows)
    counts = {name: found[name] for name in ("done", "skipped", "failed")}
    if json:
        cases = [row.to_dict() for row in rows]
        typer.echo(json_module.dumps({"output": str(out), "counts": counts, "cases": cases}))
        return
    for row in rows:
        if row.status != "failed":  # failures have been said on stderr
            sizes = ", ".join(f"{each['name']} {each['volume_ml']:,.4g} ml" for each in row.objects)
            typer.echo(f"{row.status:<8}{row.output}  {sizes}")
    words = {"done": "done", "skipped": "done before", "failed": "failed"}
    said = [f"{n} {words[name]}" for name, n in counts.items() if n or name == "done"]
    typer.echo(", ".join(said), err=True)


def _lines(row: Mapping[str, Any], grid: Grid) -> Iterator[str]:
    """Yield the lines about an object, within 80 columns but for long names."""
    if not row["voxels"]:
        yield f"{row['name']}: nothing found. Give a box around it, or a click in its middle."
        return
    yield _line(row)
    look = row.get("look_next")
    if look is not None and look["doubt"] >= _DOUBTFUL:
        place = ",".join(f"{x:g}" for x in grid.spoken(look["position"]))
        yield f"  look next at {place} ({look['reason']})"


def _line(row: Mapping[str, Any]) -> str:
    score = "" if row["confidence"] is None else f"   confidence {row['confidence']:.2f}"
    slices = f"{row['slices']:>3} {row['plane']} slice{'s' if row['slices'] != 1 else ''}"
    return f"{row['name']:<20} {row['volume_ml']:>9,.4g} ml   {slices}{score}"


def _echo(lines: Iterator[str]) -> None:
    for line in lines:
        typer.echo(line)
