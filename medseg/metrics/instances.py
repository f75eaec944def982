"""Measure objects of predicted label maps against reference label maps: 2D or 3D, one pair or whole folders.

Each case gives one overlap table (:mod:`medseg.metrics.overlap_table`), from which everything is computed.
Every number is given twice: *pooled*, where the counts of all images are added first, and as the *mean over
images*, where an image with two cells weighs as much as one with two hundred. Papers give either and rarely
say which.

What an image without objects counts as, on one side or on both, is a setting
(:class:`~medseg.metrics.matching.EmptyPolicy`) that is stored in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.errors import ConfigError, DatasetError
from medseg.io.grids import FLAT_NOTE
from medseg.log import logger
from medseg.metrics.aggregated_jaccard import aggregated_jaccard, aggregated_jaccard_plus
from medseg.metrics.average_precision import IOU_THRESHOLDS, CellPrecision, cell_average_precision
from medseg.metrics.cases import check_grids, measure_cases, pair_aloud
from medseg.metrics.cell_tracking import TrackingCounts, tracking_counts
from medseg.metrics.counting import CountAgreement, count_agreement
from medseg.metrics.definitions import Failure
from medseg.metrics.lesion_table import LesionRow, LesionTable, check_rules, lesion_row, lesion_table
from medseg.metrics.matching import EmptyPolicy, Matching, match_objects
from medseg.metrics.mistakes import KINDS, Kind, Mistake, find_mistakes
from medseg.metrics.overlap_table import OverlapTable, overlap_table
from medseg.metrics.pairing import NamedMaps, Pair, load_label_map
from medseg.metrics.panoptic import PanopticQuality, panoptic_quality
from medseg.metrics.ranking import Ranking, ScoredObjects, rank_objects, read_scores, score_objects
from medseg.metrics.summary import Statistic, bootstrap_weights, summarize
from medseg.types import PathLike
from medseg.volume import Volume


@dataclass(frozen=True)
class InstanceMetric:
    """What a number is; ``{tau}`` in a formula is the threshold of the evaluation.

    Attributes
    ----------
    title : heading of a table
    formula : how it is computed
    source : the public implementation that it equals
    """

    title: str
    formula: str
    source: str


INSTANCE_METRICS: dict[str, InstanceMetric] = {
    "f1": InstanceMetric("F1", "2 TP / (2 TP + FP + FN), IoU >= {tau}", "stardist 0.9.2, f1"),
    "precision": InstanceMetric("Precision", "TP / (TP + FP), IoU >= {tau}", "stardist 0.9.2, precision"),
    "recall": InstanceMetric("Recall", "TP / (TP + FN), IoU >= {tau}", "stardist 0.9.2, recall"),
    "ap": InstanceMetric("AP (cells)", "TP / (TP + FP + FN), IoU >= {tau}", "stardist 0.9.2, cellpose 4.2.1"),
    "msa": InstanceMetric("mSA", "mean of AP (cells) over IoU .5:.05:.95", "stardist 0.9.2, cellpose 4.2.1"),
    "pq": InstanceMetric(
        "PQ", "sum IoU / (TP + FP/2 + FN/2), IoU > 0.5", "torchmetrics 1.9.0, panoptica 2.1.7"
    ),
    "sq": InstanceMetric("SQ", "sum IoU / TP, IoU > 0.5", "torchmetrics 1.9.0, panoptica 2.1.7"),
    "rq": InstanceMetric("RQ", "TP / (TP + FP/2 + FN/2), IoU > 0.5", "torchmetrics 1.9.0, panoptica 2.1.7"),
    "aji": InstanceMetric(
        "AJI", "sum n / (sum unions + unused), best IoU each", "Kumar et al. 2017, own brute force"
    ),
    "aji_plus": InstanceMetric(
        "AJI+", "sum n / (sum unions + unused), one to one", "HoVer-Net 2019, own brute force"
    ),
    "seg": InstanceMetric("SEG", "sum IoU / n_ref, where over half is covered", "py-ctcmetrics 1.3.3, seg"),
    "det": InstanceMetric("DET", "1 - (5 splits + 10 FN + 1 FP) / 10 n_ref", "py-ctcmetrics 1.3.3, det"),
}
"""All ratios of an evaluation, in [0, 1], best 1."""


@dataclass(frozen=True, eq=False)
class InstanceRow:
    """One image.

    Attributes
    ----------
    case : name
    n_ref, n_pred, tp, fp, fn : objects, at the threshold of the evaluation
    values : by name of INSTANCE_METRICS; NaN where the policy leaves it undefined
    mistakes : every event, see :mod:`medseg.metrics.mistakes`
    """

    case: str
    n_ref: int
    n_pred: int
    tp: int
    fp: int
    fn: int
    values: dict[str, float]
    mistakes: tuple[Mistake, ...]

    def events(self, kind: str) -> int:
        """Return how many mistakes of one kind there are."""
        return sum(mistake.kind == kind for mistake in self.mistakes)


@dataclass(frozen=True, eq=False)
class InstanceEvaluation:
    """The result of :func:`evaluate_instances`.

    Attributes
    ----------
    rows : a row for each image, by name
    pooled : by name of INSTANCE_METRICS, counts of all images added first (AJI has no such form)
    means : mean over images with a bootstrap interval
    counts : agreement of the numbers of objects
    precision : AP (cells) at IoU .5:.05:.95
    tau, empty, resamples, seed : settings
    failures : cases that could not be measured
    predictions_alone, references_alone : case names without a partner
    pairs : where the label maps of the measured cases are, for pictures
    ranking : AP and FROC, where scores lie beside all predictions
    lesions : lesion-wise scores of each image, where they were asked for
    """

    rows: tuple[InstanceRow, ...]
    pooled: dict[str, float]
    means: dict[str, Statistic]
    counts: CountAgreement
    precision: CellPrecision
    tau: float
    empty: EmptyPolicy
    resamples: int
    seed: int
    failures: tuple[Failure, ...]
    predictions_alone: tuple[str, ...]
    references_alone: tuple[str, ...]
    pairs: tuple[Pair, ...] = field(repr=False)
    ranking: Ranking | None = None
    lesions: LesionTable | None = None

    @property
    def events(self) -> dict[Kind, int]:
        """How many mistakes of each kind there are in all images."""
        return {kind: sum(row.events(kind) for row in self.rows) for kind in KINDS}

    def formula(self, metric: str) -> str:
        """Return how a number was computed, with the threshold."""
        return INSTANCE_METRICS[metric].formula.format(tau=f"{self.tau:g}")

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain data that strict JSON can hold."""
        from medseg.metrics.instances_export import to_dict

        return to_dict(self)

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict`, atomically."""
        from medseg.metrics.instances_export import dump_json, write_text

        write_text(path, dump_json(self))

    def to_csv(self, path: PathLike) -> None:
        """Write one line per image, atomically."""
        from medseg.metrics.instances_export import write_csv

        write_csv(self, path)

    def to_html(self, path: PathLike, images: PathLike | None = None, title: str = "Objects") -> None:
        """Write one self-contained page with tables, a plot, and pictures of every kind of mistake.

        Parameters
        ----------
        path : file to write
        images : folder with the images (``CASE_0000.nii.gz`` or ``CASE.png``), drawn under the contours
        title : heading of the page
        """
        from medseg.metrics.instances_page import build_page

        build_page(self, images, title).write(path)


def evaluate_instances(
    predictions: NamedMaps,
    references: NamedMaps,
    *,
    tau: float = 0.5,
    empty: EmptyPolicy | None = None,
    seed: int = 0,
    resamples: int = 2000,
    lesion_rules: str | None = None,
) -> InstanceEvaluation:
    """Measure objects of predictions against references.

    Parameters
    ----------
    predictions, references : folder, file, Volume, sequence of these, or mapping by case name
        Label maps: 0 is background, every other value one object; numbers need not agree. Folders and
        mappings are matched by case name, sequences by position.
    tau : float in (0, 1]
        IoU from which on a prediction is a reference. (PQ, SQ and RQ are at > .5 by definition.)
    empty : EmptyPolicy
        What ratios of an image without objects are. Default: 0 where one side is empty, and no number
        where both are.
    seed, resamples : int
        Of the bootstrap over images, from ``numpy.random.default_rng(seed)``.
    lesion_rules : str, optional
        Score masks lesion by lesion too, by the rules of a task of BraTS 2023 (see
        :data:`~medseg.metrics.lesions.LESION_RULES`), and the false volumes of autoPET.

    Raises
    ------
    DatasetError
        Nothing matches, or not one case could be measured.
    ConfigError
        The threshold is out of range, or there are no such rules.

    Examples
    --------
    >>> from medseg.volume import Geometry, Volume
    >>> grid = Geometry((4, 4, 1), np.eye(4))
    >>> truth = np.zeros((4, 4, 1), np.int32)
    >>> truth[:2], truth[3:] = 1, 2
    >>> result = evaluate_instances(Volume(np.where(truth == 1, 5, 0), grid), Volume(truth, grid))
    >>> round(result.pooled["f1"], 3), result.events["missed"]
    (0.667, 1)
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}: expected a threshold of IoU above 0 and at most 1.")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}: expected at least 1 (1000 or more make sense).")
    check_rules(lesion_rules)
    empty = empty or EmptyPolicy()
    pairing = pair_aloud(predictions, references)
    seen, failures = _look(pairing.pairs, lesion_rules)
    tables = [(each.pair, each.table) for each in seen]
    matches = [match_objects(table, tau) for _, table in tables]
    parts = [_Parts(table, match) for (_, table), match in zip(tables, matches, strict=True)]
    precision = cell_average_precision([table for _, table in tables], IOU_THRESHOLDS, empty)
    rows = tuple(_row(k, tables[k][0].name, parts[k], precision, empty) for k in range(len(tables)))
    weights = bootstrap_weights(len(rows), resamples, np.random.default_rng(seed))
    values = np.array([list(row.values.values()) for row in rows])
    return InstanceEvaluation(
        rows=rows,
        pooled=_pooled(parts, precision),
        means=dict(zip(INSTANCE_METRICS, summarize(values, weights)[:-1], strict=True)),
        counts=count_agreement([row.n_ref for row in rows], [row.n_pred for row in rows]),
        precision=precision,
        tau=tau,
        empty=empty,
        resamples=resamples,
        seed=seed,
        failures=failures,
        predictions_alone=pairing.predictions_alone,
        references_alone=pairing.references_alone,
        pairs=tuple(pair for pair, _ in tables),
        ranking=_rank(seen, tau),
        lesions=None if lesion_rules is None else lesion_table(lesion_rules, [e.lesions for e in seen]),
    )


def load_pair(pair: Pair) -> tuple[Volume, Volume]:
    """Return reference and prediction on one grid.

    A flat image has no position and often no pixel size, so there only the shape must agree.

    Raises
    ------
    GeometryError
        The grids differ.
    """
    reference = load_label_map(pair.reference, pair.name)
    prediction = load_label_map(pair.prediction, pair.name)
    flat = any(FLAT_NOTE in note for volume in (reference, prediction) for note in volume.notes)
    if not (flat and reference.shape == prediction.shape):
        check_grids(pair.name, prediction.geometry, reference.geometry)
    return reference, prediction


@dataclass(frozen=True, eq=False)
class _Parts:
    """What is added up over images."""

    table: OverlapTable
    match: Matching

    @property
    def panoptic(self) -> PanopticQuality:
        return panoptic_quality(self.table)

    @property
    def tracking(self) -> TrackingCounts:
        return tracking_counts(self.table)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is kept of an image when its label maps are gone."""

    pair: Pair
    table: OverlapTable
    scored: ScoredObjects | None
    lesions: LesionRow | None


def _look(pairs: Sequence[Pair], rules: str | None) -> tuple[list[_Seen], tuple[Failure, ...]]:
    seen, failures = measure_cases(pairs, "evaluate objects", lambda pair: _measure(pair, rules))
    if max(max(each.table.n_ref, each.table.n_pred) for each in seen) == 1:
        logger.warning(
            "No map holds more than one object. If these are masks of a class, number their parts first: "
            "an object is a label of its own."
        )
    return seen, failures


def _measure(pair: Pair, rules: str | None) -> _Seen:
    reference, prediction = load_pair(pair)
    a, b = reference.array[0], prediction.array[0]
    table = overlap_table(a, b)
    known = read_scores(pair.prediction) if isinstance(pair.prediction, Path) else None
    scored = None
    if known is not None:
        missing = [int(label) for label in table.predictions if int(label) not in known]
        if missing:
            raise DatasetError(f"object {missing[0]} of the prediction has no score. Complete its table.")
        scores = np.array([known[int(label)] for label in table.predictions], float)
        scored = score_objects(a, b, scores, table)
    lesions = None if rules is None else lesion_row(pair.name, a, b, reference.spacing, rules)
    return _Seen(pair, table, scored, lesions)


def _rank(seen: Sequence[_Seen], tau: float) -> Ranking | None:
    scored = [each.scored for each in seen if each.scored is not None]
    if scored and len(scored) < len(seen):
        alone = next(each.pair.name for each in seen if each.scored is None)
        logger.warning("No scores lie beside %s, so nothing is ranked (COCO AP, FROC).", alone)
        return None
    return rank_objects(scored, tau) if scored else None


def _row(k: int, case: str, parts: _Parts, precision: CellPrecision, empty: EmptyPolicy) -> InstanceRow:
    table, match = parts.table, parts.match
    panoptic, tracking = parts.panoptic, parts.tracking
    measured = {
        "f1": match.f1,
        "precision": match.precision,
        "recall": match.recall,
        "ap": match.accuracy,
        "msa": float(precision.per_image[k].mean()),
        "pq": panoptic.pq,
        "sq": panoptic.sq,
        "rq": panoptic.rq,
        "aji": aggregated_jaccard(table),
        "aji_plus": aggregated_jaccard_plus(table),
        "seg": tracking.seg,
        "det": tracking.det,
    }
    values = {name: empty.value(table.n_ref, table.n_pred, measured[name]) for name in INSTANCE_METRICS}
    counts = match.tp, match.fp, match.fn
    return InstanceRow(case, table.n_ref, table.n_pred, *counts, values, find_mistakes(table, match))


def _pooled(parts: Sequence[_Parts], precision: CellPrecision) -> dict[str, float]:
    """Return what can be computed from counts of all images together."""
    none = np.zeros((0, 2), np.int64)
    iou = np.concatenate([part.match.iou for part in parts])
    match = Matching(
        parts[0].match.tau,
        np.concatenate([none, *(part.match.pairs for part in parts)]),
        iou,
        sum(part.table.n_ref for part in parts),
        sum(part.table.n_pred for part in parts),
    )
    panoptic = sum((part.panoptic for part in parts), PanopticQuality())
    tracking = sum((part.tracking for part in parts), TrackingCounts())
    return {
        "f1": match.f1,
        "precision": match.precision,
        "recall": match.recall,
        "ap": match.accuracy,
        "msa": precision.msa_pooled,
        "pq": panoptic.pq,
        "sq": panoptic.sq,
        "rq": panoptic.rq,
        "seg": tracking.seg,
        "det": tracking.det,
    }
