"""What ``medseg evaluate --panoptic`` prints: PQ, SQ and RQ of each class and their means."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from medseg.metrics.panoptic_maps import PanopticEvaluation


def evaluate_maps(
    predictions: Path,
    references: Path,
    json: Path | None,
    csv: Path | None,
    panoptic: bool,
    background_is_void: bool,
    others: Mapping[str, object],
) -> None:
    """Measure panoptic maps, print and write what was asked for.

    Parameters
    ----------
    others : options that have no effect here, with their values, None where they were not given

    Raises
    ------
    ConfigError
        One of them was given, or --panoptic was not.
    PartialFailure
        Some cases were not measured.
    """
    from medseg.errors import ConfigError, PartialFailure
    from medseg.files import write_text
    from medseg.metrics.panoptic_maps import evaluate_panoptic

    if not panoptic:
        raise ConfigError("--background-is-void belongs to --panoptic. Add that, or leave it out.")
    wrong = next((name for name, value in others.items() if value is not None), None)
    if wrong:
        raise ConfigError(f"{wrong} does not go with --panoptic. Leave it out.")
    result = evaluate_panoptic(predictions, references, background_is_void)
    if json == Path("-"):
        typer.echo(result.dump_json(), nl=False)
    else:
        print_quality(result)
    if json is not None and json != Path("-"):
        write_text(json, result.dump_json())
    if csv is not None:
        result.to_csv(csv)
    if result.failures:
        first = result.failures[0]
        raise PartialFailure(
            f"{len(result.failures)} of {len(result.failures) + len(result.cases)} cases were not measured; "
            f"the others are. First: {first.case}: {first.error}"
        )


def print_quality(result: "PanopticEvaluation") -> None:
    """Print a line a class, at most 80 columns wide."""
    from rich.console import Console
    from rich.table import Table

    facts = result.to_dict()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    for title in ("kind", "TP", "FP", "FN", "PQ", "SQ", "RQ"):
        table.add_column(title, justify="left" if title == "kind" else "right")
    for name, row in facts["classes"].items():
        table.add_row(name, row["kind"], str(row["tp"]), str(row["fp"]), str(row["fn"]), *_ratios(row))
    for part in ("things", "stuff", "overall"):
        style = "bold" if part == "overall" else None
        table.add_row(f"mean, {part}", "", "", "", "", *_ratios(facts[part]), style=style)
    console = Console(width=80, highlight=False)
    console.print(f"{len(result.cases)} cases; PQ = {facts['formulas']['pq']}")
    console.print(table)


def _ratios(row: dict[str, Any]) -> list[str]:
    return ["-" if row[name] is None else f"{row[name]:.4f}" for name in ("pq", "sq", "rq")]
