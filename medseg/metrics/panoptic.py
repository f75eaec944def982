"""Panoptic quality: PQ = SQ * RQ (Kirillov et al. 2019, Panoptic Segmentation, eq. 1), with void and classes.

A pair is a true positive if its IoU is above .5, not at it: only then can no object be in two pairs.
Voxels that are void on either side belong to no object and to no union; an object of which more than half is
void is neither false positive nor false negative. That is ``PanopticQuality`` of torchmetrics and, with void
in the reference alone, the COCO evaluation.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from medseg.errors import ConfigError, LabelError
from medseg.metrics.overlap_table import OverlapTable
from medseg.types import BoolArray, FloatArray, IntArray

THRESHOLD = 0.5
# An unmatched object is not held against a prediction if more than this part of it is void.
_MOST_VOID = 0.5


@dataclass(frozen=True)
class PanopticQuality:
    """Counts of one class, from one image or the sum of many (``+``).

    Attributes
    ----------
    tp, fp, fn : matched pairs, predictions alone, references alone
    iou_sum : IoU of the matched pairs, added up
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0

    def __add__(self, other: "PanopticQuality") -> "PanopticQuality":
        return PanopticQuality(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou_sum + other.iou_sum
        )

    @property
    def present(self) -> bool:
        """Whether there is anything to be measured."""
        return self.tp + self.fp + self.fn > 0

    @property
    def pq(self) -> float:
        """Panoptic quality: iou_sum / (TP + FP/2 + FN/2); NaN where nothing is present."""
        return self.iou_sum / (self.tp + self.fp / 2 + self.fn / 2) if self.present else math.nan

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matched pairs, 0 if none; NaN where nothing is present."""
        return self.iou_sum / max(1, self.tp) if self.present else math.nan

    @property
    def rq(self) -> float:
        """Recognition quality: TP / (TP + FP/2 + FN/2), the F1; NaN where nothing is present."""
        return self.tp / (self.tp + self.fp / 2 + self.fn / 2) if self.present else math.nan


@dataclass(frozen=True)
class PanopticMean:
    """PQ, SQ and RQ averaged over the `classes` classes that are present; NaN if none is."""

    pq: float
    sq: float
    rq: float
    classes: int


@dataclass(frozen=True)
class PanopticClasses:
    """Counts by class; add the results of several images with :meth:`merged`, then read the means.

    Attributes
    ----------
    things, stuff : classes of countable objects, and of areas
    counts : by class
    """

    things: tuple[str, ...]
    stuff: tuple[str, ...]
    counts: Mapping[str, PanopticQuality]

    @property
    def overall(self) -> PanopticMean:
        """Mean over all classes that are present."""
        return self._mean((*self.things, *self.stuff))

    @property
    def overall_things(self) -> PanopticMean:
        """Mean over the things."""
        return self._mean(self.things)

    @property
    def overall_stuff(self) -> PanopticMean:
        """Mean over the stuff."""
        return self._mean(self.stuff)

    @classmethod
    def merged(cls, results: Iterable["PanopticClasses"]) -> "PanopticClasses":
        """Add up the counts of several images.

        Raises
        ------
        ConfigError
            There is no result, or their classes differ.
        """
        parts = list(results)
        if not parts or any((p.things, p.stuff) != (parts[0].things, parts[0].stuff) for p in parts):
            raise ConfigError(
                "panoptic results to be merged need the same things and stuff, and one of them."
            )
        names = (*parts[0].things, *parts[0].stuff)
        counts = {name: sum((p.counts[name] for p in parts), PanopticQuality()) for name in names}
        return cls(parts[0].things, parts[0].stuff, counts)

    def _mean(self, names: Iterable[str]) -> PanopticMean:
        present = [self.counts[name] for name in names if self.counts[name].present]
        if not present:
            return PanopticMean(math.nan, math.nan, math.nan, 0)
        values = np.array([(q.pq, q.sq, q.rq) for q in present]).mean(axis=0)
        return PanopticMean(float(values[0]), float(values[1]), float(values[2]), len(present))


def panoptic_quality(
    table: OverlapTable,
    void_references: Collection[int] = (),
    void_predictions: Collection[int] = (),
) -> PanopticQuality:
    """Return the counts of one class of objects, in which every object may match every other.

    Parameters
    ----------
    table : OverlapTable
    void_references, void_predictions : labels
        Areas of either map in which nothing is judged. 0 may be among them: then the background is void.

    Examples
    --------
    >>> from medseg.metrics.overlap_table import overlap_table
    >>> quality = panoptic_quality(overlap_table(np.array([1, 1, 1, 2, 0]), np.array([4, 4, 0, 0, 5])))
    >>> quality.tp, quality.fp, quality.fn, round(quality.pq, 4)
    (1, 1, 1, 0.3333)
    """
    void = _voids(table.references, void_references), _voids(table.predictions, void_predictions)
    judged = _judge(
        table, void, (0 in void_references, 0 in void_predictions), np.ones(len(table.pairs), bool)
    )
    return PanopticQuality(
        int(judged.matched.sum()),
        int(judged.false_positives.sum()),
        int(judged.false_negatives.sum()),
        float(judged.iou[judged.matched].sum()),
    )


def panoptic_quality_by_class(
    table: OverlapTable,
    reference_classes: Mapping[int, str],
    prediction_classes: Mapping[int, str],
    *,
    things: Collection[str],
    stuff: Collection[str] = (),
    background_is_void: bool = True,
) -> PanopticClasses:
    """Return the counts by class of two panoptic maps; only segments of one class can match.

    Parameters
    ----------
    table : OverlapTable
        Of two maps in which every segment has a label of its own (stuff: one segment a class).
    reference_classes, prediction_classes : mapping of label to class
        A class that is neither in `things` nor in `stuff` makes its segments void.
    things, stuff : classes
    background_is_void : bool
        Whether label 0 is void (panoptic maps) or counts as background (objects on an empty ground).

    Raises
    ------
    LabelError
        A label has no class.
    """
    names = [*things, *stuff]
    classes_a = _class_numbers(table.references, reference_classes, names, "reference")
    classes_b = _class_numbers(table.predictions, prediction_classes, names, "prediction")
    same = classes_a[table.pairs[:, 0]] == classes_b[table.pairs[:, 1]]
    void = classes_a < 0, classes_b < 0
    judged = _judge(table, void, (background_is_void, background_is_void), same)
    matched_class = classes_a[table.pairs[judged.matched, 0]]
    counts = {
        name: PanopticQuality(
            int((matched_class == k).sum()),
            int((judged.false_positives & (classes_b == k)).sum()),
            int((judged.false_negatives & (classes_a == k)).sum()),
            float(judged.iou[judged.matched][matched_class == k].sum()),
        )
        for k, name in enumerate(names)
    }
    return PanopticClasses(tuple(things), tuple(stuff), counts)


@dataclass(frozen=True, eq=False)
class _Judged:
    """IoU and whether matched by pair; who is held against the prediction."""

    iou: FloatArray
    matched: BoolArray
    false_positives: BoolArray
    false_negatives: BoolArray


def _judge(
    table: OverlapTable, void: tuple[BoolArray, BoolArray], ground: tuple[bool, bool], allowed: BoolArray
) -> _Judged:
    """Match at IoU > .5 among the allowed pairs of segments that are not void."""
    a, b = table.pairs.T
    n = table.pair_voxels
    lost_a = _on_void(a, n, table.reference_voxels, void[1][b], ground[1])
    lost_b = _on_void(b, n, table.prediction_voxels, void[0][a], ground[0])
    union = table.reference_voxels[a] - lost_a[a] + table.prediction_voxels[b] - lost_b[b] - n
    allowed = allowed & ~void[0][a] & ~void[1][b]
    iou = np.where(allowed, n / np.where(allowed, union, 1), 0.0)
    matched = iou > THRESHOLD
    return _Judged(
        iou,
        matched,
        _unmatched(b[matched], lost_b, table.prediction_voxels, void[1]),
        _unmatched(a[matched], lost_a, table.reference_voxels, void[0]),
    )


def _on_void(
    places: IntArray, n: IntArray, sizes: IntArray, other_is_void: BoolArray, ground_is_void: bool
) -> IntArray:
    """Return how many voxels of each segment lie on void of the other side."""
    lost = np.zeros_like(sizes)
    np.add.at(lost, places[other_is_void], n[other_is_void])
    if ground_is_void:
        covered = np.zeros_like(sizes)
        np.add.at(covered, places, n)
        lost += sizes - covered
    return lost


def _unmatched(matched: IntArray, lost: IntArray, sizes: IntArray, void: BoolArray) -> BoolArray:
    alone = ~void & (lost <= _MOST_VOID * sizes)
    alone[matched] = False
    return alone


def _voids(labels: IntArray, void: Collection[int]) -> BoolArray:
    return np.isin(labels, np.array(sorted(void), np.int64))


def _class_numbers(labels: IntArray, classes: Mapping[int, str], names: list[str], side: str) -> IntArray:
    """Return the position of each label's class in `names`, -1 for another class (void)."""
    unknown = [int(label) for label in labels if int(label) not in classes]
    if unknown:
        raise LabelError(
            f"the {side} holds label {unknown[0]}, which has no class. Give every label a class; one that "
            "is neither thing nor stuff is void."
        )
    place = {name: k for k, name in enumerate(names)}
    return np.array([place.get(classes[int(label)], -1) for label in labels], np.int64)
