"""``medseg check``: everything that is wrong with a dataset, one line a finding."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from medseg.io.check import Examination
    from medseg.io.findings import Finding

# Lines of one kind before the rest is only counted.
SHOWN_OF_A_KIND = 10
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def check(
    dataset: Annotated[Path, typer.Argument(help="nnU-Net or MSD folder, images/ + labels/, or a CSV.")],
    json: Annotated[bool, typer.Option("--json", help="Print findings as JSON on stdout.")] = False,
) -> None:
    """Find everything wrong with a dataset at once, and say what to do about it."""
    import logging

    from medseg.errors import DataError
    from medseg.io.check import examine_dataset

    # nibabel and tifffile tell of every odd header themselves; here that is a finding or of no interest.
    for name in ("nibabel.global", "tifffile"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    seen = examine_dataset(dataset)
    if json:
        _print_json(dataset, seen)
    else:
        _print_text(dataset, seen)
    if any(finding.severity == "error" for finding in seen.findings):
        raise typer.Exit(DataError.exit_code)


def _print_json(dataset: Path, seen: "Examination") -> None:
    from json import dumps

    counts = {severity: sum(f.severity == severity for f in seen.findings) for severity in _COLOURS}
    result = {
        "dataset": str(dataset),
        "training_cases": seen.n_training,
        "test_cases": seen.n_test,
        **counts,
        "findings": [finding.to_dict() for finding in seen.findings],
    }
    typer.echo(dumps(result, indent=2))


def _print_text(dataset: Path, seen: "Examination") -> None:
    from rich.console import Console

    findings = seen.findings
    console = Console(highlight=False)
    for severity in _COLOURS:
        group = [finding for finding in findings if finding.severity == severity]
        if group:
            console.print(f"[bold {_COLOURS[severity]}]{_count(len(group), severity)}[/]")
            _print_group(console, group)
    console.print(_summary(dataset, seen), markup=False, soft_wrap=True)


def _print_group(console: "Console", group: Sequence["Finding"]) -> None:
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in group:
        kinds[finding.code].append(finding)
    for code, findings in kinds.items():
        for finding in findings[:SHOWN_OF_A_KIND]:
            _print_finding(console, finding)
        rest = len(findings) - SHOWN_OF_A_KIND
        if rest > 0:
            console.print(f"  - ... and {rest} more of the kind {code} (--json lists all)", markup=False)


def _print_finding(console: "Console", finding: "Finding") -> None:
    """Print one finding: folded with a hanging indent on a terminal, exactly one line into a pipe."""
    from rich.text import Text

    case = (f"{finding.case}: " if finding.case else "", "bold")
    line = Text.assemble(case, f"{finding.message}. ", (finding.remedy, "italic"))
    parts = line.wrap(console, console.width - 4) if console.is_terminal else [line]
    for number, part in enumerate(parts):
        part.rstrip()
        console.print(Text("    " if number else "  - ") + part, soft_wrap=True)


def _summary(dataset: Path, seen: "Examination") -> str:
    test = f" and {_count(seen.n_test, 'test case')}" if seen.n_test else ""
    cases = f"{_count(seen.n_training, 'training case')}{test} looked at"
    if not seen.findings:
        return f"{dataset}: {cases}, nothing wrong."
    counts = [(severity, sum(f.severity == severity for f in seen.findings)) for severity in _COLOURS]
    told = ", ".join(_count(count, severity) for severity, count in counts if count)
    ready = "can be trained on" if not dict(counts)["error"] else "mend the errors before training"
    return f"{dataset}: {cases}, {told}; {ready}."


def _count(number: int, severity: str) -> str:
    return f"{number} {severity}" + ("s" if number != 1 and severity != "info" else "")
