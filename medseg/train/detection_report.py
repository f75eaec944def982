"""What the training of a detector leaves for people: held-out cases, counts of what was found, curves."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg import log
from medseg.bundle import load_bundle, save_bundle
from medseg.errors import MedsegError
from medseg.files import write_text
from medseg.instances.detect import Detector, ObjectMap
from medseg.io import read_image, write
from medseg.metrics.instances_page import add_ranking
from medseg.metrics.ranking import Ranking
from medseg.metrics.report import HtmlReport, curves
from medseg.plan.objects import read_objects
from medseg.train.detection_sweep import Choice, Seen, class_maps, rank, sweep
from medseg.types import Array

if TYPE_CHECKING:
    from medseg.train.loop import Outcome
    from medseg.train.setup import Setup

logger = logging.getLogger("medseg")

# A found object is an object where their intersection is more than this part of their union.
IOU = 0.5


@dataclass(frozen=True)
class Counts:
    """Objects found, found where there is none, and missed."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 where there is nothing and nothing was found."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and F1 as plain data."""
        return {"tp": self.tp, "fp": self.fp, "fn": self.fn, "f1": round(self.f1, 5)}


def count_matches(found: Array, reference: Array, iou: float = IOU) -> Counts:
    """Count objects of two label maps that are the same; above one half no object matches twice.

    Parameters
    ----------
    found, reference : integers of one shape, 0 is background

    Examples
    --------
    >>> count_matches(np.array([1, 1, 1, 0, 2]), np.array([0, 5, 5, 5, 0]))
    Counts(tp=0, fp=2, fn=1)
    >>> count_matches(np.array([1, 1, 1, 0, 2]), np.array([5, 5, 5, 5, 0]))
    Counts(tp=1, fp=1, fn=0)
    """
    a, sizes_a = np.unique(found[found > 0], return_counts=True)
    b, sizes_b = np.unique(reference[reference > 0], return_counts=True)
    both = (found > 0) & (reference > 0)
    keys = np.searchsorted(a, found[both]).astype(np.int64) * max(1, len(b))
    pairs, shared = np.unique(keys + np.searchsorted(b, reference[both]), return_counts=True)
    union = sizes_a[pairs // max(1, len(b))] + sizes_b[pairs % max(1, len(b))] - shared
    tp = int(np.count_nonzero(shared / union > iou))
    return Counts(tp, len(a) - tp, len(b) - tp)


def finish(setup: "Setup", outcome: "Outcome", bundle: Path) -> Path:
    """Find the objects of held-out cases, choose how boxes become objects, and write the fold's report.

    Writes ``validation/CASE.nii.gz`` (objects 1 to k) and ``validation/CASE.json`` (their classes and
    scores), ``result.json`` and ``report.html``; what was chosen goes into the bundle's card (``score``,
    ``find``).

    Returns
    -------
    Path
        The report.
    """
    detector = Detector(load_bundle(bundle), fold=str(setup.fold))
    cases = _look(setup, detector)
    n_classes = len(setup.plan.labels.foreground)
    choice = sweep(cases, detector, n_classes) if cases else None
    ranked = None
    if choice is not None:
        chosen = {"cluster": choice.settings.cluster, "least_side": choice.settings.least_side}
        card = {**detector.bundle.card, "score": choice.score, "find": chosen}
        save_bundle(bundle, setup.plan, setup.configuration, {}, detector.bundle.mirror_axes, card)
        detector = Detector(load_bundle(bundle), fold=str(setup.fold))
        ranked = rank(cases, detector, n_classes)
    rows = {name: Counts() for name in setup.plan.labels.foreground}
    for case in cases:
        drawn = case.draw(detector, detector.score)
        _write(setup, case, drawn)
        for name, each in _count_classes(setup, case, drawn, detector).items():
            rows[name] += each
    result = _summarize(setup, outcome, rows, choice, ranked, detector.score)
    write_text(setup.folder / "result.json", json.dumps(result, indent=1))
    path = setup.folder / "report.html"
    _draw_page(setup, outcome, result, choice, ranked).write(path)
    return path


def _look(setup: "Setup", detector: Detector) -> list[Seen]:
    detection = detector.settings
    seen = []
    for case in log.progress(setup.validation, "Validating whole cases"):
        try:
            reference = read_objects(case, setup.plan.labels, detection.objects).array[0]
            image = read_image(case)
            seen.append(Seen(case, image.geometry, reference, *detector.look(image)))
        except MedsegError as error:
            logger.warning("%s: not validated. %s", case.name, error)
    return seen


def _count_classes(setup: "Setup", seen: Seen, drawn: ObjectMap, detector: Detector) -> dict[str, Counts]:
    """Count each class by itself: an object of the wrong class is one too many and one missed."""
    names = setup.plan.labels.foreground
    maps = class_maps(seen, drawn, detector, len(names))
    return {
        name: count_matches(found, reference) for name, (reference, found, _) in zip(names, maps, strict=True)
    }


def _write(setup: "Setup", seen: Seen, drawn: ObjectMap) -> None:
    folder = setup.folder / "validation"
    write(drawn.volume, folder / f"{seen.case.name}.nii.gz")
    names = {value: name for name, value in setup.plan.labels.foreground.items()}
    objects = [
        {"label": number + 1, "class": names[int(kind)], "score": round(float(score), 5)}
        for number, (kind, score) in enumerate(zip(drawn.classes, drawn.scores, strict=True))
    ]
    dropped = [vars(each) for each in drawn.dropped]
    facts = {"objects": objects, "dropped": dropped, "limited_tiles": drawn.limited}
    write_text(folder / f"{seen.case.name}.json", json.dumps(facts, indent=1))
    if drawn.limited:
        logger.warning(
            "%s: in %d tiles more was found than detection.find.detections allows; raise it.",
            *(seen.case.name, drawn.limited),
        )


def _summarize(
    setup: "Setup",
    outcome: "Outcome",
    rows: dict[str, Counts],
    choice: Choice | None,
    ranked: Ranking | None,
    score: float,
) -> dict[str, Any]:
    total = sum(rows.values(), Counts())
    return {
        "fold": setup.fold,
        "held_out": setup.fold != "all",
        "task": "detection",
        "configuration": setup.configuration,
        "cases": len(setup.train),
        "validation_cases": len(setup.validation),
        "iou": IOU,
        "objects": {name: each.to_dict() for name, each in rows.items()},
        "f1": round(total.f1, 5),
        "score": score,
        **({} if choice is None else _chosen(choice)),
        **({} if ranked is None else {"ranking": ranked.to_dict()}),
        "steps": outcome.progress.step,
        "training_seconds": round(outcome.progress.elapsed_seconds, 1),
        "ended": outcome.ended,
        "bundle": str(setup.run / "bundle"),
    }


def _chosen(choice: Choice) -> dict[str, Any]:
    settings = choice.settings
    return {
        "cluster": settings.cluster,
        "least_side": settings.least_side,
        "mean_f1": round(choice.f1, 5),
        "trials": list(choice.trials),
    }


def _draw_page(
    setup: "Setup",
    outcome: "Outcome",
    result: dict[str, Any],
    choice: Choice | None,
    ranked: Ranking | None,
) -> HtmlReport:
    facts = {
        "F1 at IoU above 0.5": f"{result['f1']:.3f}" if choice else "-",
        "validation cases": str(len(setup.validation)),
        "steps": f"{outcome.progress.step:,}",
        "minutes": f"{outcome.progress.elapsed_seconds / 60:.1f}",
    }
    page = HtmlReport(f"Detector of {setup.plan.dataset_name}, fold {setup.fold}", setup.configuration, facts)
    if setup.fold == "all":
        page.add_text("Not a validation", "This model was trained on every case that is measured here.")
    history = outcome.progress.history
    epochs = [row["epoch"] for row in history]
    page.add_figure("Loss", curves({"loss": (epochs, [row["loss"] for row in history])}, "epoch", "loss"))
    if choice is not None and ranked is not None:
        _add_choice(page, choice)
        add_ranking(page, ranked)
    for name, row in result["objects"].items():
        page.add_facts(
            f"Objects of class {name}", {"found": row["tp"], "found besides": row["fp"], "missed": row["fn"]}
        )
    settings = setup.settings
    assert settings.detection is not None  # this is a detector's page
    fit = settings.detection.anchor_fit
    page.add_facts(
        "What was trained",
        {
            "encoder": settings.architecture.network,
            "patch": settings.patch_size,
            "batch": setup.batch_size,
            "objects are": settings.detection.objects,
            "mean IoU of anchors": "-" if fit is None or fit.mean_iou is None else fit.mean_iou,
            "ended because": outcome.ended,
        },
    )
    recipe = {k: v for k, v in setup.config.to_dict().items() if not isinstance(v, dict)}
    return page.add_facts("Recipe", recipe)


def _add_choice(page: HtmlReport, choice: Choice) -> None:
    scores, f1 = choice.curve
    side, cluster = choice.settings.least_side, choice.settings.cluster
    caption = (
        "Of whole held-out cases, a mean over thresholds of IoU. The bundle keeps objects from "
        f"{choice.score:g} on, of boxes with sides of at least {side:g} voxels, and takes boxes for one "
        f"object from an IoU of {cluster:g} on: the best of {len(choice.trials)} settings that were tried."
    )
    page.add_figure(
        "Least score", curves({"F1": (scores.tolist(), f1.tolist())}, "least score", "F1"), caption
    )
