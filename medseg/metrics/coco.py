"""Average precision of scored detections as COCO defines it, for boxes and for masks.

Detections of all images are ranked by score. Within an image the best-scored detection takes the free
reference of largest IoU, if it reaches the threshold. Precision is made monotone, read at 101 recalls and
averaged (Lin et al. 2014, Microsoft COCO; ``pycocotools.cocoeval``). It cannot be compared with the "average
precision" of cells in :mod:`medseg.metrics.average_precision`, which knows no scores.

COCO keeps the 100 best detections of an image, which drops cells without a word. Here nothing is dropped
unless `most` is given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import DatasetError, GeometryError
from medseg.metrics.overlap_table import OverlapTable
from medseg.metrics.summary import nanmean
from medseg.types import Array, BoolArray, FloatArray, IntArray

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""As pycocotools writes them, to the last bit: its 0.9 is 0.8999999999999999."""
LESION_THRESHOLDS = tuple(np.linspace(0.1, 0.5, 9).tolist())
"""Of nnDetection: large offsets of small lesions in 3D are no misses."""
_RECALLS = np.linspace(0.0, 1.0, 101)
# An IoU of 1 that was rounded down still counts at a threshold of 1.
_ALMOST_ONE = 1.0 - 1e-10
# References that are compared with all detections at a time.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Detections:
    """References and scored detections of one image and one class.

    Attributes
    ----------
    n_ref : references
    scores : (m,) float
        Of the detections; those of equal score keep their order.
    pairs : (p, 2) int
        Reference and detection that overlap, ascending. What is not listed has IoU 0.
    iou : (p,) float
    """

    n_ref: int
    scores: FloatArray
    pairs: IntArray
    iou: FloatArray


@dataclass(frozen=True, eq=False)
class CocoPrecision:
    """Average precision of one class.

    Attributes
    ----------
    taus : (t,) thresholds of IoU
    ap : (t,) float64
        NaN if there is no reference.
    recall : (t,) float64
        Part of the references that any detection found.
    most : detections kept in an image, None: all
    dropped : detections that this left out
    n_ref, n_pred : references, detections
    """

    taus: tuple[float, ...]
    ap: FloatArray
    recall: FloatArray
    most: int | None
    dropped: int
    n_ref: int
    n_pred: int

    @property
    def mean(self) -> float:
        """Mean over the thresholds: COCO's AP at .50:.05:.95."""
        return float(self.ap.mean())


def coco_average_precision(
    images: Sequence[Detections], taus: Sequence[float] = COCO_THRESHOLDS, most: int | None = None
) -> CocoPrecision:
    """Measure one class over a set of images.

    Parameters
    ----------
    images : sequence of Detections
        In the order in which equal scores of different images are ranked.
    taus : thresholds of IoU, inclusive
    most : int, optional
        Keep so many detections of the best score in each image (COCO: 100). Default: all.

    Raises
    ------
    DatasetError
        There is no image.
    """
    if not images:
        raise DatasetError("no image to measure. Pass the detections of at least one.")
    ranked = [np.argsort(-np.asarray(image.scores), kind="stable")[:most] for image in images]
    scores = np.concatenate([image.scores[order] for image, order in zip(images, ranked, strict=True)])
    order = np.argsort(-scores, kind="stable")
    n_ref = sum(image.n_ref for image in images)
    ap, recall = [], []
    for tau in taus:
        hits = [_hits(image, rank, tau) for image, rank in zip(images, ranked, strict=True)]
        precision, found = _precision(np.concatenate(hits)[order], n_ref)
        ap.append(precision)
        recall.append(found)
    total = sum(len(image.scores) for image in images)
    return CocoPrecision(
        tuple(taus), np.array(ap), np.array(recall), most, total - len(scores), n_ref, len(scores)
    )


def rank_hits(images: Sequence[Detections], tau: float) -> tuple[FloatArray, BoolArray]:
    """Return the scores of all detections, descending, and which of them are a reference's at IoU `tau`.

    Whether one is depends on better ones of its image alone, so the first k are the result of a least score.
    """
    ranked = [np.argsort(-np.asarray(image.scores), kind="stable") for image in images]
    scores = np.concatenate(
        [np.zeros(0), *(image.scores[order] for image, order in zip(images, ranked, strict=True))]
    )
    none = np.zeros(0, bool)
    hits = np.concatenate(
        [none, *(_hits(image, order, tau) for image, order in zip(images, ranked, strict=True))]
    )
    order = np.argsort(-scores, kind="stable")
    return scores[order], hits[order]


def mean_over_classes(classes: Mapping[str, CocoPrecision]) -> FloatArray:
    """Return the mean AP at each threshold over the classes that have references (COCO's "mAP")."""
    return nanmean(np.stack([entry.ap for entry in classes.values()]), axis=0)


def detections_from_table(table: OverlapTable, scores: FloatArray) -> Detections:
    """Return the masks of two label maps as detections.

    Parameters
    ----------
    table : OverlapTable
    scores : (table.n_pred,) float
        In order of ``table.predictions``.

    Raises
    ------
    DatasetError
        The number of scores is another.
    """
    if len(scores) != table.n_pred:
        raise DatasetError(
            f"{len(scores)} scores for {table.n_pred} predicted objects: expected one for each label."
        )
    return Detections(table.n_ref, np.asarray(scores, np.float64), table.pairs, table.iou)


def detections_from_boxes(references: Array, predictions: Array, scores: FloatArray) -> Detections:
    """Return boxes as detections.

    Parameters
    ----------
    references, predictions : (n, 2 d), (m, 2 d) float
        (lo_0 .. lo_d-1, hi_0 .. hi_d-1) in half-open edge coordinates.
    scores : (m,) float

    Raises
    ------
    GeometryError
        The arrays are no boxes of one dimension, or a box has a side below 0.
    DatasetError
        The number of scores is another.
    """
    if len(scores) != len(predictions):
        raise DatasetError(f"{len(scores)} scores for {len(predictions)} boxes: expected one for each box.")
    pairs, iou = box_overlaps(references, predictions)
    return Detections(len(references), np.asarray(scores, np.float64), pairs, iou)


def box_overlaps(references: Array, predictions: Array) -> tuple[IntArray, FloatArray]:
    """Return all pairs of boxes that overlap, (p, 2) ascending, and their IoU.

    Computed for a few references at a time: n x m matrices of many boxes do not fit into memory.
    """
    a, b = _boxes(references, "references"), _boxes(predictions, "predictions")
    if len(a) and len(b) and a.shape[1] != b.shape[1]:
        raise GeometryError(f"boxes of {a.shape[1]} and {b.shape[1]} numbers: expected one dimension.")
    if not (len(a) and len(b)):
        return np.zeros((0, 2), np.int64), np.zeros(0)
    d = a.shape[1] // 2
    size_a, size_b = (np.prod(x[:, d:] - x[:, :d], axis=1) for x in (a, b))
    pairs, values = [], []
    for start in range(0, len(a), _ROWS):
        part = a[start : start + _ROWS, None]
        sides = np.minimum(part[..., d:], b[None, :, d:]) - np.maximum(part[..., :d], b[None, :, :d])
        inside = np.prod(np.clip(sides, 0.0, None), axis=2)
        rows, columns = np.nonzero(inside)
        n = inside[rows, columns]
        pairs.append(np.stack([rows + start, columns], axis=1))
        values.append(n / (size_a[rows + start] + size_b[columns] - n))
    return np.concatenate(pairs), np.concatenate(values)


def _boxes(boxes: Array, side: str) -> FloatArray:
    array = np.asarray(boxes, np.float64)
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] % 2 or not np.isfinite(array).all():
        raise GeometryError(
            f"{side} of shape {array.shape}: expected (n, 2 d) finite numbers, lows then highs."
        )
    d = array.shape[1] // 2
    if (array[:, d:] < array[:, :d]).any():
        raise GeometryError(
            f"{side}: a box ends before it begins. Expected (lo_0, .., hi_0, ..) with lo <= hi."
        )
    return array


def _hits(image: Detections, ranked: IntArray, tau: float) -> BoolArray:
    """Return which of the ranked detections take a reference."""
    enough = image.iou >= min(tau, _ALMOST_ONE)
    by_detection: dict[int, list[tuple[float, int]]] = {}
    for (reference, detection), iou in zip(
        image.pairs[enough].tolist(), image.iou[enough].tolist(), strict=True
    ):
        by_detection.setdefault(detection, []).append((iou, reference))
    taken: set[int] = set()
    hits = np.zeros(len(ranked), bool)
    for place, detection in enumerate(ranked.tolist()):
        # Of equal IoU pycocotools takes the later reference.
        free = [item for item in by_detection.get(detection, ()) if item[1] not in taken]
        if free:
            taken.add(max(free)[1])
            hits[place] = True
    return hits


def _precision(hits: BoolArray, n_ref: int) -> tuple[float, float]:
    """Return the interpolated precision of ranked detections, and the recall of all of them."""
    if not n_ref:
        return math.nan, math.nan
    if not hits.size:
        return 0.0, 0.0
    found = np.cumsum(hits)
    recall = found / n_ref
    precision = np.maximum.accumulate((found / np.arange(1, hits.size + 1))[::-1])[::-1]
    place = np.searchsorted(recall, _RECALLS, side="left")
    reached = place < hits.size
    values = np.where(reached, precision[np.minimum(place, hits.size - 1)], 0.0)
    return float(values.mean()), float(recall[-1])
