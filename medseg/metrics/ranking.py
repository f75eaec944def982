"""Objects with scores: how well the sure ones come first. COCO AP of masks and boxes, and FROC.

Scores lie beside a label map: ``CASE.json`` of ``medseg train --task detection`` (``objects`` with ``label``
and ``score``), or ``CASE_objects.csv`` of ``medseg count`` (columns ``label`` and ``score``).
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import ReadError
from medseg.geometry.boxes import label_boxes
from medseg.metrics.coco import (
    COCO_THRESHOLDS,
    CocoPrecision,
    Detections,
    coco_average_precision,
    detections_from_boxes,
    detections_from_table,
)
from medseg.metrics.froc import RATES, Froc, Scan, froc
from medseg.metrics.overlap_table import OverlapTable
from medseg.metrics.pairing import LABELS_SUFFIX, case_name
from medseg.types import Array, FloatArray

AP_FORMULA = "COCO: precision, made monotone, mean at 101 recalls, all images together, nothing capped"
FROC_FORMULA = "part of the objects found (mask IoU >= {tau}) at so many false positives per image"


@dataclass(frozen=True, eq=False)
class ScoredObjects:
    """What was found in one image, compared by masks and by boxes."""

    masks: Detections
    boxes: Detections


@dataclass(frozen=True, eq=False)
class Ranking:
    """Measures of a set of images; `tau` is the IoU of a hit in the FROC."""

    masks: CocoPrecision
    boxes: CocoPrecision
    froc: Froc
    tau: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, every number with its formula."""
        curve = self.froc
        read = {f"{rate:g}": plain(curve.sensitivity_at(rate)) for rate in RATES}
        return {
            "average_precision": {
                "formula": AP_FORMULA,
                "taus": [round(tau, 2) for tau in self.masks.taus],
                "masks": [plain(value) for value in self.masks.ap.tolist()],
                "boxes": [plain(value) for value in self.boxes.ap.tolist()],
                "mean_masks": plain(self.masks.mean),
                "mean_boxes": plain(self.boxes.mean),
            },
            "froc": {
                "formula": self.froc_formula,
                "sensitivity": read,
                "cpm": plain(curve.cpm),
                "cpm_formula": "mean of the sensitivities at " + ", ".join(read),
                "objects": curve.n_ref,
                "images": curve.scans,
            },
        }

    @property
    def froc_formula(self) -> str:
        """How the sensitivity is computed."""
        return FROC_FORMULA.format(tau=f"{self.tau:g}")


def score_objects(
    reference: Array, prediction: Array, scores: FloatArray, table: OverlapTable
) -> ScoredObjects:
    """Compare two label maps whose table is known.

    Parameters
    ----------
    scores : (table.n_pred,) of the predicted labels, ascending

    Raises
    ------
    DatasetError
        The number of scores is another.
    """
    boxes = (label_boxes(reference)[1], label_boxes(prediction)[1])
    return ScoredObjects(detections_from_table(table, scores), detections_from_boxes(*boxes, scores))


def join_classes(parts: Sequence[ScoredObjects]) -> ScoredObjects:
    """Return the objects of all classes of one image; those of two classes never meet."""
    return ScoredObjects(
        join_detections([part.masks for part in parts]), join_detections([part.boxes for part in parts])
    )


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Return what was found of several classes as one; those of two never meet."""
    starts = np.cumsum([[0, 0]] + [[part.n_ref, len(part.scores)] for part in parts], axis=0)
    return Detections(
        int(starts[-1, 0]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.pairs + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.iou for part in parts]),
    )


def rank_objects(
    images: Sequence[ScoredObjects], tau: float = 0.5, taus: Sequence[float] = COCO_THRESHOLDS
) -> Ranking:
    """Measure the ranking over some images.

    Parameters
    ----------
    tau : IoU from which a mask hits, for the FROC
    taus : of the average precision

    Raises
    ------
    DatasetError
        There is no image.
    """
    masks = [image.masks for image in images]
    scans = [Scan(each.n_ref, each.scores, each.pairs[each.iou >= tau]) for each in masks]
    boxes = coco_average_precision([image.boxes for image in images], taus)
    return Ranking(coco_average_precision(masks, taus), boxes, froc(scans), tau)


def read_scores(label_map: Path) -> dict[int, float] | None:
    """Return the score of each label of a file, or None where none lie beside it.

    Raises
    ------
    ReadError
        A file of scores is there and cannot be read.
    """
    name = case_name(label_map) or label_map.stem
    table = label_map.with_name(f"{name.removesuffix(LABELS_SUFFIX)}_objects.csv")
    facts = label_map.with_name(f"{name}.json")
    try:
        if table.is_file():
            return _read_table(table)
        return _read_facts(facts) if facts.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = table if table.is_file() else facts
        raise ReadError(
            f"{path}: expected a label and a score for each object. Mend or remove it."
        ) from error


def _read_table(path: Path) -> dict[int, float] | None:
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if any(not row["score"] for row in rows):  # a model that gives none
        return None
    return {int(row["label"]): float(row["score"]) for row in rows}


def _read_facts(path: Path) -> dict[int, float] | None:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "objects" not in found:  # another file of this name
        return None
    return {int(each["label"]): float(each["score"]) for each in found["objects"]}


def plain(value: float) -> float | None:
    """Return a number that strict JSON can hold."""
    return value if math.isfinite(value) else None
