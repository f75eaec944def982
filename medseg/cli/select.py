"""``medseg select``."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def select(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, trained on the same folds.")],
    dataset: Annotated[Path, typer.Option("--dataset", "-d", help="The dataset they were trained on.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare, and store no post-processing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Choose the best run or pair of RUNS on cross-validation, and the post-processing that helps it."""
    from medseg.train.select import select as choose

    chosen = choose(runs, dataset, store=not dry_run)
    if json:
        typer.echo(json_module.dumps(asdict(chosen)))
        return
    for name, score in chosen.scores.items():
        typer.echo(f"  {'*' if name == chosen.best else ' '} Dice {score:.4f}  {name}")
    for trial in chosen.trials:
        verdict = "kept" if trial["accepted"] else "no gain"
        typer.echo(
            f"    largest component of {trial['target']}: {trial['mean_before']:.4f} -> "
            f"{trial['mean_after']:.4f}, {verdict}"
        )
    models = " ".join(f"-m {run}" for run in chosen.runs)
    typer.echo(f"Dice {chosen.dice_after:.4f} with: medseg predict INPUT {models} -o OUT")
