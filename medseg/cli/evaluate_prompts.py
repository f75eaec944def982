"""``medseg evaluate-prompts``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.prompt.evaluate import PromptEvaluation


def evaluate_prompts(
    cases: Annotated[
        Path, typer.Argument(readable=False, help="YAML or JSON with cases: image, labels, value, ...")
    ],
    propagator: Annotated[
        str,
        typer.Option(
            help="What to measure: a propagator, NAME:key=value with other settings, NAME@z with the true "
            "range of slices, or watershed, slice-boxes, extruded. Default: the default propagator."
        ),
    ] = "",
    compare: Annotated[
        list[str] | None, typer.Option(help="Measure this one beside it, on the same prompts; repeatable.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder in which the paths of the cases are searched; repeatable. Default: theirs."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the simulated user.", min=0)] = 0,
    repeats: Annotated[int, typer.Option(help="Simulated users: seed, seed + 1, ...", min=1, max=100)] = 1,
    clicks: Annotated[int, typer.Option(help="Corrective clicks after the box.", min=0, max=100)] = 5,
    nsd_mm: Annotated[float, typer.Option(help="Tolerance of the surface Dice (NSD).", min=0.0)] = 2.0,
    box_jitter: Annotated[
        float, typer.Option(help="Part of the box's side by which its sides are moved.", min=0.0, max=0.5)
    ] = 0.05,
    click_jitter_mm: Annotated[float, typer.Option(help="How far clicks miss their aim.", min=0.0)] = 2.0,
    random_clicks: Annotated[
        bool, typer.Option("--random-clicks", help="Click anywhere in the largest error, not in its middle.")
    ] = False,
    separate: Annotated[
        bool, typer.Option("--separate", help="Keep no embeddings between objects: seconds of each alone.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps embeddings for the next run (seconds then tell less)."),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: weights to use instead of a download; repeatable.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON here; - prints it and nothing else.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves and tables here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves over clicks here (PNG).")] = None,
) -> None:
    """Measure propagators on CASES with a simulated user: a box, then clicks where the mask is most wrong.

    Dice and NSD after the box and after 1, 3, 5 and 10 clicks, clicks to Dice 0.8 and 0.9, areas under the
    curves of five clicks, seconds and encoder calls. Exit code 3 if some cases could not be measured.
    """
    from medseg.errors import PartialFailure
    from medseg.files import check_writable
    from medseg.prompt.evaluate import EvaluateConfig, evaluate_prompts

    for path in (json, html, plot):
        if path is not None and path != Path("-"):
            check_writable(path)
    config = EvaluateConfig(
        seeds=tuple(range(seed, seed + repeats)),
        clicks=clicks,
        nsd_mm=nsd_mm,
        box_jitter=box_jitter,
        click_jitter_mm=click_jitter_mm,
        aim="random" if random_clicks else "centre",
        share=not separate,
    )
    kept = None
    if cache is not None:
        from medseg.prompt.embeddings import EmbeddingCache

        kept = EmbeddingCache(cache)
    result = evaluate_prompts(
        cases, propagator, compare or (), data or (), config, _weights(weights or ()), kept
    )
    _show(result, json, html, plot)
    if result.failures:
        first = result.failures[0]
        raise PartialFailure(
            f"{len(result.failures)} measurements failed; {len(result.traces)} are done. "
            f"First: {' '.join(filter(None, (first.dataset, first.name, first.entrant)))}: {first.error}"
        )


def _weights(given: "list[str] | tuple[()]") -> dict[str, str | Path]:
    from medseg.errors import ConfigError

    result: dict[str, str | Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--weights {text!r}: expected NAME=FILE, such as mobile-sam=mobile_sam.pt.")
        result[name] = Path(path)
    return result


def _show(result: "PromptEvaluation", json: Path | None, html: Path | None, plot: Path | None) -> None:
    from medseg.prompt.evaluate_page import dump_json

    quiet = json == Path("-")
    if quiet:
        typer.echo(dump_json(result), nl=False)
    else:
        _print(result)
    if json is not None and not quiet:
        result.to_json(json)
    for path, name, write in ((html, "Page", result.to_html), (plot, "Curves", result.to_png)):
        if path is not None:
            write(path)
            if not quiet:
                typer.echo(f"{name}: {path}")


def _print(result: "PromptEvaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    from medseg.prompt.evaluate_page import by_dataset, columns_of, compared, shown

    if not result.traces:
        return
    columns = columns_of(result)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("Dice after", overflow="fold")
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for dataset, groups in by_dataset(result).items():
        table.add_row(f"{dataset} ({groups[0].objects})", style="bold")
        for group in groups:
            table.add_row(f" {group.entrant}", *(shown(name, group.means[name]) for name in columns))
    console = Console(width=80, highlight=False)
    console.print(table)
    for comparison in result.comparisons:
        console.print(compared(comparison))
