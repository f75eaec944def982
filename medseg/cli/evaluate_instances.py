"""What ``medseg evaluate --instances`` prints: numbers, counts and mistakes on 80 columns."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from medseg.metrics.instances import InstanceEvaluation
    from medseg.metrics.lesion_table import LesionTable
    from medseg.metrics.ranking import Ranking


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
    lesions: str | None = None,
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
    result = evaluate_instances(predictions, references, tau=iou, seed=seed, lesion_rules=lesions)
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
    if result.ranking is not None:
        _print_ranking(console, result.ranking)
    if result.lesions is not None:
        _print_lesions(console, result.lesions)
    events = ", ".join(f"{n} {kind}" for kind, n in result.events.items())
    console.print(f"\nmistakes: {events}")


def _print_ranking(console: "Console", ranking: "Ranking") -> None:
    """Print what scores add: average precision and FROC."""
    from rich.table import Table

    from medseg.metrics.froc import RATES
    from medseg.metrics.instances_page import ratio
    from medseg.metrics.ranking import AP_FORMULA

    taus = [f"{tau:.2f}" for tau in ranking.masks.taus]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("AP (COCO)", *taus[::5], "mean"):
        table.add_column(title, justify="left" if title == "AP (COCO)" else "right")
    for kind, found in (("masks", ranking.masks), ("boxes", ranking.boxes)):
        table.add_row(kind, *(ratio(v) for v in found.ap[::5].tolist()), ratio(found.mean))
    console.print()
    console.print(table)
    console.print(f"{AP_FORMULA}; mean over IoU {taus[0]} to {taus[-1]}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("FROC", *(f"{rate:g}" for rate in RATES), "CPM"):
        table.add_column(title, justify="left" if title == "FROC" else "right")
    curve = ranking.froc
    table.add_row("sensitivity", *(ratio(curve.sensitivity_at(rate)) for rate in RATES), ratio(curve.cpm))
    console.print(table)
    console.print(ranking.froc_formula)


def _print_lesions(console: "Console", lesions: "LesionTable") -> None:
    """Print means over images of the lesion-wise scores."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("lesion by lesion")
    table.add_column("mean", justify="right")
    table.add_column("formula", overflow="fold")
    formulas = lesions.formulas()
    for name, value in lesions.means.items():
        table.add_row(name, f"{value:.3f}", formulas[name])
    console.print()
    console.print(table)
