"""Measure a set of predictions: a row per case and class, a summary with confidence intervals.

What empty masks do
-------------------
========================= ================= ============ ======================= =====================
masks                     Dice, IoU, NSD    distances    volume error            ``Row.empty``
========================= ================= ============ ======================= =====================
both have voxels          number            number       number                  ``""``
reference empty           0                 infinite     ml a number, rel. inf.  ``"reference"``
prediction empty          0                 infinite     -100 %                  ``"prediction"``
both empty                NaN (nnU-Net's)   NaN          0 ml, relative NaN      ``"both"``
========================= ================= ============ ======================= =====================

Means, medians and intervals are over finite values. What is left out is counted beside them
(:class:`~medseg.metrics.summary.Statistic`), so a missed object shows as Dice 0 and as one infinite distance,
never as a better mean distance that nobody can explain.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from medseg.errors import ConfigError, DatasetError, LabelError
from medseg.labels import LabelSet, LabelValue
from medseg.log import logger
from medseg.metrics.cases import check_grids, measure_cases, pair_aloud
from medseg.metrics.definitions import MEAN, METRICS, ClassSummary, Empty, Failure, Row
from medseg.metrics.overlap import Contingency, Counts, contingency, mask_of
from medseg.metrics.pairing import (
    NamedMaps,
    Pair,
    find_labels,
    found_labels,
    load_label_map,
)
from medseg.metrics.summary import Statistic, bootstrap_weights, summarize
from medseg.metrics.surface import SurfaceDistances, surface_distances
from medseg.types import Array, PathLike

# Without a description, more different values than these are taken for intensities.
MOST_FOUND = 50


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes
    ----------
    rows : per case and class, cases in order of name, classes in order of `labels`
    summary : per class, and ``"mean"`` over the classes
    failures : cases that could not be measured
    predictions_alone, references_alone : case names without a partner
    labels : the measured classes and regions
    keys : name of a class as nnU-Net's ``summary.json`` writes it, such as ``1`` or ``(1, 2)``
    nsd_mm, resamples, seed : settings
    pairs : where the label maps of the measured cases are, for pictures
    """

    rows: tuple[Row, ...]
    summary: dict[str, ClassSummary]
    failures: tuple[Failure, ...]
    predictions_alone: tuple[str, ...]
    references_alone: tuple[str, ...]
    labels: dict[str, LabelValue]
    keys: dict[str, str]
    ignore: int | None
    nsd_mm: float
    resamples: int
    seed: int
    pairs: tuple[Pair, ...] = field(repr=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the measured metrics."""
        return tuple(self.summary[MEAN].metrics)

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the measured cases."""
        return tuple(pair.name for pair in self.pairs)

    def mean(self, metric: str = "dice", label: str = MEAN) -> float:
        """Return the mean over cases of one class, or of all classes.

        Raises
        ------
        ConfigError
            The metric was not measured, or there is no such class.
        """
        if metric not in self.metrics:
            raise ConfigError(f"metric {metric!r}: was not measured. Choose from {', '.join(self.metrics)}.")
        if label not in self.summary:
            raise ConfigError(f"label {label!r}: is not among {', '.join(self.summary)}. Choose one of them.")
        return self.summary[label].metrics[metric].mean

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain data; see :mod:`medseg.metrics.export` for the keys."""
        from medseg.metrics.export import to_dict

        return to_dict(self)

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as strict JSON, atomically."""
        from medseg.metrics.export import write_json

        write_json(self, path)

    def to_csv(self, path: PathLike) -> None:
        """Write one line per case and class, atomically."""
        from medseg.metrics.export import write_csv

        write_csv(self, path)

    def to_html(self, path: PathLike, images: PathLike | None = None, title: str = "Evaluation") -> None:
        """Write one self-contained page with tables, plots and pictures of the worst cases.

        Parameters
        ----------
        path : file to write
        images : folder with the images (``CASE_0000.nii.gz`` or ``CASE.nii.gz``), drawn under the contours
        title : heading of the page
        """
        from medseg.metrics.page import write_page

        write_page(self, path, images, title)


def evaluate(
    predictions: NamedMaps,
    references: NamedMaps,
    nsd_mm: float = 1.0,
    labels: LabelSet | PathLike | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    seed: int = 0,
    resamples: int = 2000,
) -> Evaluation:
    """Measure predictions against references.

    Parameters
    ----------
    predictions, references : folder, file, Volume, sequence of these, or mapping by case name
        Folders and mappings are matched by case name, sequences by position. Both maps of a case must lie
        on one grid. A name on one side only is a warning and is not in the means.
    nsd_mm : float
        Tolerance of the normalized surface Dice.
    labels : LabelSet or path, optional
        What is measured, in order; regions and the ignore label are respected. A path is a ``dataset.json``,
        a plan, or a folder with a ``dataset.json``. None: a ``dataset.json`` beside the label maps, else
        the ``predictions.json`` that ``medseg predict`` left there, else every value that
        occurs (at most 50).
    metrics : sequence of str
        Names of :data:`METRICS`. Without any surface metric, surfaces are not measured.
    seed, resamples : int
        Of the bootstrap: 2000 resamples of cases from ``numpy.random.default_rng(seed)``.

    Returns
    -------
    Evaluation

    Raises
    ------
    DatasetError
        Nothing matches, or not one case could be measured.
    ConfigError
        A metric is unknown or the tolerance is negative.
    """
    _check_settings(metrics, nsd_mm, resamples)
    label_set = find_labels(labels, predictions, references)
    pairing = pair_aloud(predictions, references)
    tolerance = nsd_mm if any(METRICS[name].surface for name in metrics) else None
    measured, failures = measure_cases(
        pairing.pairs, "evaluate", lambda pair: _measure(pair, label_set, tolerance)
    )
    targets = label_set.foreground if label_set else found_labels(v for m in measured for v in m.values)
    rows = tuple(row for case in measured for row in _rows(case, targets, metrics))
    return Evaluation(
        rows=rows,
        summary=_summary(rows, list(targets), metrics, resamples, np.random.default_rng(seed)),
        failures=failures,
        predictions_alone=pairing.predictions_alone,
        references_alone=pairing.references_alone,
        labels=targets,
        keys=_keys(targets, label_set),
        ignore=label_set.ignore if label_set else None,
        nsd_mm=nsd_mm,
        resamples=resamples,
        seed=seed,
        pairs=tuple(case.pair for case in measured),
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """What is kept of one case: counts of all values and, per class, its surface metrics."""

    pair: Pair
    voxel_ml: float
    table: Contingency
    surfaces: dict[str, dict[str, float]]

    @property
    def values(self) -> list[int]:
        return [int(v) for v in self.table.values]


def _check_settings(metrics: Sequence[str], nsd_mm: float, resamples: int) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ConfigError(f"metrics {unknown}: not known. Choose from {', '.join(METRICS)}.")
    if not (math.isfinite(nsd_mm) and nsd_mm >= 0):
        raise ConfigError(f"nsd_mm is {nsd_mm}: expected a tolerance of at least 0 mm.")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}: expected at least 1 (1000 or more make sense).")


def _measure(pair: Pair, labels: LabelSet | None, nsd_mm: float | None) -> _Measured:
    reference = load_label_map(pair.reference, pair.name)
    prediction = load_label_map(pair.prediction, pair.name)
    check_grids(pair.name, prediction.geometry, reference.geometry)
    truth, guess = reference.array[0], prediction.array[0]
    ignore = labels.ignore if labels else None
    table = contingency(truth, guess, ignore)
    targets = labels.foreground if labels else found_labels(int(v) for v in table.values)
    if labels is None and len(targets) > MOST_FOUND:
        raise LabelError(
            f"{pair.name}: holds {len(targets)} different values. Are these intensity images, or is one "
            "of the folders another than meant? Pass label maps; if these are, name the labels with --labels."
        )
    _warn_unknown(pair.name, table, labels)
    to_mm = 1e-3 if reference.geometry.unit == "micron" else 1.0
    spacing = tuple(s * to_mm for s in reference.spacing)
    keep = None if ignore is None else truth != ignore
    surfaces = {}
    if nsd_mm is not None:
        for name, label in targets.items():
            surfaces[name] = _surface_values(_distances(truth, guess, label, spacing, keep), nsd_mm)
    return _Measured(pair, reference.geometry.voxel_volume * to_mm**3 / 1000.0, table, surfaces)


def _warn_unknown(name: str, table: Contingency, labels: LabelSet | None) -> None:
    unknown = sorted(set(table.values.tolist()) - set(labels.values)) if labels else []
    if unknown:
        logger.warning("%s: values %s are not among the labels and count as background", name, unknown)


def _distances(
    truth: Array, guess: Array, label: LabelValue, spacing: tuple[float, ...], keep: Array | None
) -> SurfaceDistances:
    """Measure one class; ignored voxels are outside of both masks. A grid of one slice is measured in 2D."""
    reference, prediction = mask_of(truth, label), mask_of(guess, label)
    if keep is not None:
        reference, prediction = reference & keep, prediction & keep
    if 1 in reference.shape:
        axis = reference.shape.index(1)
        reference, prediction = reference.squeeze(axis), prediction.squeeze(axis)
        spacing = spacing[:axis] + spacing[axis + 1 :]
    return surface_distances(reference, prediction, spacing)


def _rows(case: _Measured, targets: dict[str, LabelValue], metrics: Sequence[str]) -> Iterable[Row]:
    unmeasured = {name: math.nan for name, metric in METRICS.items() if metric.surface}
    for name, label in targets.items():
        counts = case.table.counts(label)
        values = _overlap_values(counts, case.voxel_ml) | case.surfaces.get(name, unmeasured)
        yield Row(
            case.pair.name, name, _emptiness(counts), counts, {metric: values[metric] for metric in metrics}
        )


def _overlap_values(counts: Counts, voxel_ml: float) -> dict[str, float]:
    return {
        "dice": counts.dice,
        "iou": counts.iou,
        "volume_error": counts.volume_error_ml(voxel_ml),
        "volume_error_relative": counts.volume_error_relative,
    }


def _surface_values(surfaces: SurfaceDistances, nsd_mm: float) -> dict[str, float]:
    return {
        "nsd": surfaces.nsd(nsd_mm),
        "hd95": surfaces.hausdorff(95),
        "hd": surfaces.hausdorff(100),
        "assd": surfaces.assd,
        "asd_prediction_to_reference": surfaces.asd_prediction_to_reference,
        "asd_reference_to_prediction": surfaces.asd_reference_to_prediction,
    }


def _emptiness(counts: Counts) -> Empty:
    if counts.n_ref == 0:
        return "reference" if counts.n_pred else "both"
    return "" if counts.n_pred else "prediction"


def _summary(
    rows: Sequence[Row],
    names: list[str],
    metrics: Sequence[str],
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, ClassSummary]:
    if not names:
        raise DatasetError("no label was found in any case: all maps are background. Check the files.")
    n_cases = len(rows) // len(names)
    weights = bootstrap_weights(n_cases, resamples, generator)
    statistics: dict[str, list[Statistic]] = {}
    for metric in metrics:
        values = np.array([row.values[metric] for row in rows]).reshape(n_cases, len(names))
        statistics[metric] = summarize(values, weights)
    empties = [[row.empty for row in rows if row.label == name] for name in names]
    empties.append([row.empty for row in rows])
    return {
        name: ClassSummary(
            name,
            {metric: statistics[metric][k] for metric in metrics},
            *(empties[k].count(kind) for kind in ("both", "reference", "prediction")),
        )
        for k, name in enumerate([*names, MEAN])
    }


def _keys(targets: dict[str, LabelValue], labels: LabelSet | None) -> dict[str, str]:
    """Write labels as nnU-Net does: a number, or a tuple where the label set has regions."""
    regions = labels is not None and labels.has_regions
    return {
        name: str(value if regions or isinstance(value, int) else value[0]) for name, value in targets.items()
    }
