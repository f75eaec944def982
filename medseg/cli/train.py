"""``medseg train`` and ``medseg stop``."""

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder or CSV manifest.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe settings, e.g. optimizer.lr=0.001 epochs=50.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder.")] = Path("run"),
    plan: Annotated[Path | None, typer.Option(help="Plan file; made from the dataset if not given.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="nnunet, resenc-m, resenc-l, resenc-xl or cpu; cpu without a GPU.")
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option("--configuration", "-c", help="2d, 3d_lowres, 3d_fullres, 3d_cascade_fullres."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="segment; detection: find objects with a Mask R-CNN; centre-offset: find crowded objects, "
            "whose numbers label maps hold; panoptic: these and the stuff around them, from maps of classes "
            "in semantic/ besides; or promptable: fine-tune MobileSAM to answer boxes and clicks."
        ),
    ] = "segment",
    fold: Annotated[str, typer.Option(help="0 to 4, or all.")] = "0",
    max_minutes: Annotated[
        float | None, typer.Option(min=0.05, help="Finish in this time, learning rate annealed.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Name of configs/train, or a YAML file.")] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="Bundle to fine-tune from; for promptable also a file of weights.")
    ] = None,
    previous: Annotated[Path | None, typer.Option(help="Run folder of the cascade's first stage.")] = None,
    splits: Annotated[Path | None, typer.Option(help="splits_final.json with custom folds.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model on DATASET and write a bundle, its validation and a report to the run folder."""
    from medseg.errors import ConfigError

    if fold != "all" and not fold.isdigit():
        raise ConfigError(f"--fold {fold}: expected a number or 'all'.")
    chosen: dict[str, object] = {
        "fold": "all" if fold == "all" else int(fold),
        "overrides": tuple(overrides or ()),
        "recipe": recipe,
        "splits": splits,
    }
    planned = {"plan": plan, "preset": preset, "configuration": configuration}
    if task in OTHER_TASKS:
        _refuse(task, {**planned, "previous": previous})
        chosen["pretrained"] = pretrained
        limits: dict[str, object] = {"max_minutes": max_minutes, "resume": resume, "device": device}
        OTHER_TASKS[task](dataset, out, chosen, limits, dry_run, json)
        return
    if task not in ("segment", "detection"):
        raise ConfigError(f"--task {task}: expected segment, detection, {' or '.join(OTHER_TASKS)}.")
    if task == "detection" and previous is not None:
        raise ConfigError("--previous: a detector has no first stage. Leave it out.")
    from medseg.train import describe, fit

    chosen |= {**planned, "task": task}
    limits = {"max_minutes": max_minutes, "resume": resume, "pretrained": pretrained, "device": device}
    _carry_out(
        lambda: describe(dataset, out, **chosen),
        lambda: fit(dataset, out, previous=previous, **limits, **chosen),  # type: ignore[arg-type]
        out / f"fold_{fold}",
        _found if task == "detection" else _dice,
        dry_run,
        json,
    )


def _carry_out(
    describe: Callable[[], dict[str, Any]],
    train: Callable[[], object],
    folder: Path,
    say: Callable[[dict[str, Any]], str],
    dry_run: bool,
    json: bool,
) -> None:
    """Say what would be trained, or train and `say` what result.json of the fold's folder holds."""
    if dry_run:
        facts = describe()
        typer.echo(json_module.dumps(facts, indent=1) if json else _readable(facts))
        return
    bundle = train()
    summary = json_module.loads((folder / "result.json").read_text())
    if json:
        typer.echo(json_module.dumps(summary))
        return
    typer.echo(f"Bundle: {bundle}")
    typer.echo(f"Report: {folder / 'report.html'}")
    if said := say(summary):  # nothing, where no case was held out
        typer.echo(said)


def _dice(summary: dict[str, Any]) -> str:
    """Say how well each label of held-out cases was found."""
    return "\n".join(
        f"  Dice {name}: {dice:.4f}" if dice is not None else f"  Dice {name}: no case has it"
        for name, dice in summary["validation_dice"].items()
    )


def _found(summary: dict[str, Any]) -> str:
    """Say how well the objects of held-out cases were found."""
    if not summary["validation_cases"]:
        return "  no case was held out"
    lines = [
        f"  {name}: found {row['tp']} of {row['tp'] + row['fn']}, {row['fp']} besides (IoU above 0.5)"
        for name, row in summary["objects"].items()
    ]
    return "\n".join([*lines, f"  least score {summary['score']:g}"])


def _refuse(task: str, planned: dict[str, object]) -> None:
    from medseg.errors import ConfigError

    given = [f"--{name}" for name, value in planned.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: --task {task} has no plan file. Leave it out; settings go into --recipe or "
            "behind the dataset, e.g. seed=4."
        )


def _tune(
    dataset: Path,
    out: Path,
    chosen: dict[str, object],
    limits: dict[str, object],
    dry_run: bool,
    json: bool,
) -> None:
    """Fine-tune a promptable network and say how much better it is."""
    from medseg.train.promptable import describe_tuning, tune

    _carry_out(
        lambda: describe_tuning(dataset, out, **chosen),
        lambda: tune(dataset, out, **chosen, **limits),  # type: ignore[arg-type]
        out / f"fold_{chosen['fold']}",
        _clicks,
        dry_run,
        json,
    )


def _clicks(summary: dict[str, Any]) -> str:
    """Say how well held-out cases are answered."""
    lines = ["Dice on slices of held-out cases, after a jittered box and after each click:"]
    for name in ("before", "after"):
        lines.append(f"  {name:<7}" + "".join(f"{dice:8.4f}" for dice in summary[name]["dice"]))
    return "\n".join(lines)


def _find_objects(
    dataset: Path,
    out: Path,
    chosen: dict[str, object],
    limits: dict[str, object],
    dry_run: bool,
    json: bool,
) -> None:
    """Train a network that finds objects and say how many it finds."""
    from medseg.train.centre import describe_centre, train_centre

    _carry_out(
        lambda: describe_centre(dataset, out, **chosen),
        lambda: train_centre(dataset, out, **chosen, **limits),  # type: ignore[arg-type]
        out / f"fold_{chosen['fold']}",
        _matched,
        dry_run,
        json,
    )


def _matched(summary: dict[str, Any]) -> str:
    """Say how many objects of held-out cases are matched."""
    lines = [
        f"  TP/(TP+FP+FN) at IoU {threshold}, all objects of held-out cases: {accuracy:.4f}"
        for threshold, accuracy in summary["accuracy"].items()
    ]
    for part in ("overall", "things", "stuff") if "panoptic" in summary else ():
        pq = summary["panoptic"][part]["pq"]
        lines.append(f"  PQ {part}: {'-' if pq is None else f'{pq:.4f}'}")
    return "\n".join(lines)


def _find_all(
    dataset: Path,
    out: Path,
    chosen: dict[str, object],
    limits: dict[str, object],
    dry_run: bool,
    json: bool,
) -> None:
    """Train a network for things and stuff: that of objects, on a data set that has maps of classes."""
    from medseg.io.semantic import require_semantic_maps

    require_semantic_maps(dataset)
    _find_objects(dataset, out, chosen, limits, dry_run, json)


# Tasks besides labels: what trains each.
OTHER_TASKS = {"promptable": _tune, "centre-offset": _find_objects, "panoptic": _find_all}


def stop(run: Annotated[Path, typer.Argument(help="Run folder of a training in progress.")]) -> None:
    """Ask a running training to end after this epoch, keep its best weights, and write its bundle."""
    from medseg.errors import TrainingError
    from medseg.train.processes import is_claimed

    folders = [folder for folder in sorted(run.glob("fold_*")) if is_claimed(folder)]
    if not folders:
        raise TrainingError(
            f"{run}: no training is at work here. Give the folder that was passed with -o; "
            "an interrupted run goes on with --resume."
        )
    for folder in folders:
        (folder / "STOP").touch()
    typer.echo(f"{run}: training will stop at the end of its epoch.")


def _readable(facts: dict[str, object]) -> str:
    return "\n".join(f"{name:<16}{value}" for name, value in facts.items())
