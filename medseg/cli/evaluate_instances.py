"""What ``medseg evaluate --instances`` prints: numbers, counts and mistakes on 80 columns."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from medseg.metrics.instances import InstanceEvaluation


def evaluate_objects(
    predictions: Path,
    references: Path,
    iou: float,
    json: Path | None,
    html: Path | None,
    csv: Path | None,
    images: Path | None,
    seed: int,
    labels: Path | None,
) -> None:
    """Measure objects, print and write what was asked for.

    Raises
    ------
    ConfigError
        Names of labels were given.
    PartialFailure
        Some images were not measured.
    """
    from medseg.errors import ConfigError, PartialFailure
    from medseg.metrics.instances import evaluate_instances
    from medseg.metrics.instances_export import dump_json

    if labels is not None:
        raise ConfigError("--labels names classes, and objects have none. Leave it out with --instances.")
    result = evaluate_instances(predictions, references, tau=iou, seed=seed)
    if json == Path("-"):
        typer.echo(dump_json(result), nl=False)
    else:
        print_objects(result)
    if json is not None and json != Path("-"):
        result.to_json(json)
    if csv is not None:
        result.to_csv(csv)
    if html is not None:
        result.to_html(html, images)
        if json != Path("-"):
            typer.echo(f"Page: {html}")
    if result.failures:
        first = result.failures[0]
        raise PartialFailure(
            f"{len(result.failures)} of {len(result.failures) + len(result.rows)} images were not measured; "
            f"the others are. First: {first.case}: {first.error}"
        )


def print_objects(result: "InstanceEvaluation") -> None:
    """Print the summary, at most 80 columns wide."""
    from rich.console import Console
    from rich.table import Table

    from medseg.metrics.instances import INSTANCE_METRICS
    from medseg.metrics.instances_page import ratio, signed

    counts = result.counts
    console = Console(width=80, highlight=False)
    console.print(
        f"{counts.images} image{'' if counts.images == 1 else 's'}: {counts.n_pred} "
        f"object{'' if counts.n_pred == 1 else 's'} predicted, {counts.n_ref} in the reference\n"
        f"count error per image: {signed(counts.error)} (absolute {counts.absolute_error:.2f})\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("pooled", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("formula", overflow="fold")
    for name, metric in INSTANCE_METRICS.items():
        pooled = ratio(result.pooled.get(name, math.nan))
        table.add_row(metric.title, pooled, ratio(result.means[name].mean), result.formula(name))
    console.print(table)
    events = ", ".join(f"{n} {kind}" for kind, n in result.events.items())
    console.print(f"\nmistakes: {events}")
