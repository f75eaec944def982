"""``medseg evaluate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.labels import LabelSet
    from medseg.metrics import Evaluation


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(readable=False, help="Folder with predicted label maps, or one file.")
    ],
    references: Annotated[
        Path, typer.Argument(readable=False, help="Folder with reference label maps, or one file.")
    ],
    nsd_mm: Annotated[float, typer.Option(min=0.0, help="Tolerance of the surface Dice (NSD).")] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write JSON here; - prints it and nothing else.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and pictures here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table of all cases here.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="dataset.json, plan or bundle that names the labels, if not beside them."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder with the images, for the page.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    instances: Annotated[
        bool, typer.Option("--instances", help="Every value is one object: match and count them, 2D or 3D.")
    ] = False,
    iou: Annotated[
        float | None,
        typer.Option(help="With --instances: IoU from which on an object is found.", show_default="0.5"),
    ] = None,
    panoptic: Annotated[
        bool, typer.Option("--panoptic", help="Folders of medseg panoptic, or data sets with semantic/.")
    ] = False,
    background_is_void: Annotated[
        bool, typer.Option("--background-is-void", help="With --panoptic: judge nothing where no class is.")
    ] = False,
    lesions: Annotated[
        str | None,
        typer.Option(
            metavar="GLI|SSA|PED|MEN|MET",
            help="With --instances: lesion-wise Dice and HD95 too, by the rules of this task of BraTS 2023.",
        ),
    ] = None,
) -> None:
    """Measure PREDICTIONS against REFERENCES, matched by case name.

    Dice, IoU, volume error, surface Dice, HD95 and ASSD, with 95 % bootstrap intervals; with --instances F1,
    AP, PQ, AJI, SEG, DET, counts, and what was missed, invented, merged or split, and where scores lie beside
    the predictions (CASE.json, or CASE_objects.csv of medseg count) COCO AP and FROC; with --panoptic PQ, SQ
    and RQ of things, stuff and both. Exit code 3 if some cases could not be measured, 4 if none matches.
    """
    from medseg import metrics
    from medseg.errors import ConfigError
    from medseg.files import check_distinct, check_writable

    for path in (json, html, csv):
        if path is not None and path != Path("-"):
            check_writable(path)
            check_distinct([path], [predictions, references])
    if panoptic or background_is_void:
        from medseg.cli.evaluate_panoptic import evaluate_maps

        wrong = {"--instances": instances or None, "--html": html, "--labels": labels, "--images": images}
        others = {**wrong, "--iou": iou, "--lesions": lesions}
        return evaluate_maps(predictions, references, json, csv, panoptic, background_is_void, others)
    if instances:
        from medseg.cli.evaluate_instances import evaluate_objects

        least = 0.5 if iou is None else iou
        return evaluate_objects(
            predictions, references, least, json, html, csv, images, seed, labels, lesions
        )
    for name, value in (("--lesions", lesions), ("--iou", iou)):
        if value is not None:
            raise ConfigError(f"{name} is for objects. Pass --instances too, or leave it out.")
    result = metrics.evaluate(predictions, references, nsd_mm, _labels(labels), seed=seed)
    _show(result, json, html, csv, images)


def _show(
    result: "Evaluation", json: Path | None, html: Path | None, csv: Path | None, images: Path | None
) -> None:
    """Print and write what was asked for.

    Raises
    ------
    PartialFailure
        Some cases were not measured.
    """
    from medseg import metrics
    from medseg.errors import PartialFailure

    if json == Path("-"):
        typer.echo(metrics.dump_json(result), nl=False)
    else:
        _print(result)
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
            f"{len(result.failures)} of {len(result.failures) + len(result.cases)} cases were not measured; "
            f"the others are. First: {first.case}: {first.error}"
        )


def _labels(path: Path | None) -> "LabelSet | Path | None":
    """Return the labels of a bundle; leave other paths to the library."""
    if path is None or not (
        path.suffix == ".medseg" or (path.is_dir() and not (path / "dataset.json").exists())
    ):
        return path
    from medseg.bundle import load_bundle

    return load_bundle(path).plan.labels


def _print(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    from medseg.metrics.page import cases_of, heading, interval, shown

    shown_metrics = ("dice", "nsd", "hd95", "assd", "volume_error_relative")
    names = [name for name in shown_metrics if name in result.metrics]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    table.add_column("cases", justify="right")
    for name in names:
        title = f"{heading(name, result.nsd_mm)}\n95 % interval" if name == "dice" else _narrow(name, result)
        table.add_column(title, justify="right")
    for entry in result.summary.values():
        cells = []
        for name in names:
            statistic = entry.metrics[name]
            between = (
                f" ({interval(name, statistic)})" if name == "dice" and interval(name, statistic) else ""
            )
            infinite = f"\n+{statistic.n_infinite} inf" if statistic.n_infinite else ""
            cells.append(shown(name, statistic.mean) + between + infinite)
        last = entry.label == "mean"
        table.add_row(entry.label, str(cases_of(entry)), *cells, style="bold" if last else "")
    console = Console(width=80, highlight=False)
    console.print(table)


def _narrow(name: str, result: "Evaluation") -> str:
    titles = {"hd95": "HD95\nmm", "assd": "ASSD\nmm", "volume_error_relative": "volume\n%"}
    return titles.get(name, f"NSD\n{result.nsd_mm:g} mm")
