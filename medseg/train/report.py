"""What a training run leaves for people: validation of whole cases, curves, tables, pictures."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg import log
from medseg.bundle import load_bundle
from medseg.errors import MedsegError
from medseg.files import write_text
from medseg.infer import Predictor
from medseg.io import read, read_image, write
from medseg.metrics import Evaluation, evaluate
from medseg.metrics.page import add_evaluation
from medseg.metrics.report import HtmlReport, curves
from medseg.train.setup import previous_results

if TYPE_CHECKING:
    from medseg.train.loop import Outcome
    from medseg.train.setup import Setup

NSD_TOLERANCE_MM = 1.0


def finish(setup: "Setup", outcome: "Outcome", bundle: Path) -> Path:
    """Predict the held-out cases as `medseg predict` would, measure them, and write the fold's report.

    Writes ``validation/CASE.nii.gz``, ``validation/metrics.json``, ``result.json`` and ``report.html``.

    Returns
    -------
    Path
        The report.
    """
    predictions = predict_validation(setup, bundle)
    evaluation = None
    if predictions:
        references = {
            c.name: c.label for c in setup.validation if c.name in predictions and c.label is not None
        }
        evaluation = evaluate(
            predictions,
            references,
            NSD_TOLERANCE_MM,
            setup.plan.labels,
            metrics=("dice", "iou", "hd95", "nsd"),
        )
        evaluation.to_json(setup.folder / "validation" / "metrics.json")
    result = summarize(setup, outcome, evaluation)
    write_text(setup.folder / "result.json", json.dumps(result, indent=1))
    path = setup.folder / "report.html"
    draw(setup, outcome, evaluation, result).write(path)
    return path


def predict_validation(setup: "Setup", bundle: Path) -> dict[str, Path]:
    """Segment the validation cases with this fold's weights; a case that fails is named and left out."""
    trained = replace(load_bundle(bundle), postprocessing=None)  # chosen later, on these results
    predictor = Predictor(trained, folds=(str(setup.fold),))
    # a cascade sees what it was trained on: the first stage of folds that did not know the case
    earlier = previous_results(setup.previous) if setup.previous is not None else {}
    written = {}
    for case in log.progress(setup.validation, "Validating whole cases"):
        path = setup.folder / "validation" / f"{case.name}.nii.gz"
        try:
            first = read(earlier[case.name]) if case.name in earlier else None
            write(predictor.segment(read_image(case), previous=first).volume, path)
        except MedsegError as error:
            log.logger.warning("%s: not validated. %s", case.name, error)
            continue
        written[case.name] = path
    return written


def summarize(setup: "Setup", outcome: "Outcome", evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the figures that ``--json`` prints."""
    dice: dict[str, float | None] = {}
    mean: float | None = None
    if evaluation is not None:
        for name in setup.plan.labels.foreground:
            value = evaluation.mean("dice", name)
            dice[name] = value if math.isfinite(value) else None
        mean = evaluation.mean("dice")
    return {
        "fold": setup.fold,
        "held_out": setup.fold != "all",
        "configuration": setup.configuration,
        "cases": len(setup.train),
        "validation_cases": len(setup.validation),
        "validation_dice": dice,
        "mean_dice": mean,
        "steps": outcome.progress.step,
        "training_seconds": round(outcome.progress.elapsed_seconds, 1),
        "ended": outcome.ended,
        "bundle": str(setup.run / "bundle"),
    }


def draw(
    setup: "Setup", outcome: "Outcome", evaluation: Evaluation | None, result: Mapping[str, Any]
) -> HtmlReport:
    """Lay out the page."""
    mean = result["mean_dice"]
    facts = {
        "mean Dice": "-" if mean is None else f"{mean:.3f}",
        "validation cases": str(len(setup.validation)),
        "steps": f"{outcome.progress.step:,}",
        "minutes": f"{outcome.progress.elapsed_seconds / 60:.1f}",
    }
    page = HtmlReport(f"Training of {setup.plan.dataset_name}, fold {setup.fold}", setup.configuration, facts)
    if setup.fold == "all":
        page.add_text("Not a validation", "This model was trained on every case that is measured here.")
    add_curves(page, outcome.progress.history)
    if evaluation is not None:
        images = {case.name: case.images[0] for case in setup.validation}
        add_evaluation(page, evaluation, images)
    settings = setup.settings
    page.add_facts(
        "What was trained",
        {
            "network": settings.architecture.network,
            "features": settings.architecture.features_per_stage,
            "patch": settings.patch_size,
            "spacing": settings.spacing,
            "batch": setup.batch_size,
            "training cases": len(setup.train),
            "ended because": outcome.ended,
        },
    )
    recipe = {k: v for k, v in setup.config.to_dict().items() if not isinstance(v, dict)}
    return page.add_facts("Recipe", recipe)


def add_curves(page: HtmlReport, history: list[dict[str, Any]]) -> None:
    """Draw loss, and Dice per class, over epochs."""
    epochs = [row["epoch"] for row in history]
    page.add_figure("Loss", curves({"loss": (epochs, [row["loss"] for row in history])}, "epoch", "loss"))
    measured = [row for row in history if "dice" in row]
    epochs = [row["epoch"] for row in measured]
    lines = {
        name: (epochs, [math.nan if row["dice"][name] is None else row["dice"][name] for row in measured])
        for name in (measured[0]["dice"] if measured else ())
    }
    if lines:
        caption = "On random patches of the validation cases, pooled; whole cases are measured below."
        page.add_figure("Dice while training", curves(lines, "epoch", "Dice"), caption)
