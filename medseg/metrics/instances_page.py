"""The HTML page of an evaluation of objects: numbers with their formulas, and pictures of every mistake."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import medseg
from medseg.errors import MedsegError
from medseg.geometry.orient import axis_codes
from medseg.io import read
from medseg.log import logger, progress
from medseg.metrics.froc import RATES
from medseg.metrics.instances import INSTANCE_METRICS, InstanceEvaluation, InstanceRow, load_pair
from medseg.metrics.lesion_table import LESION_METRICS, LesionTable
from medseg.metrics.mistakes import KINDS, Mistake
from medseg.metrics.pairing import Source, find_cases
from medseg.metrics.ranking import AP_FORMULA, Ranking
from medseg.metrics.report import PALETTE, Cell, HtmlReport, Picture, curves, slice_picture
from medseg.metrics.summary import Statistic
from medseg.types import Array, IntArray, PathLike
from medseg.volume import Volume

_PICTURES = 6
# What is shown around a mistake, as a part of its extent and in voxels at least.
_MARGIN, _MARGIN_VOXELS = 0.6, 6
_NO_PATIENT = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"}
# Slices this much thicker than a pixel is wide are looked at as they were taken.
_THICK = 1.3
_NEIGHBOUR, _NEIGHBOUR_COLOUR = 1, "#8a94a0"
_FIRST = 2
_TILES = ("f1", "pq", "msa")

_READING = (
    "Pooled: the counts of all images are added first, so an image weighs by its objects. Mean over images: "
    "each image weighs the same; under it the 95 % interval of a bootstrap that resamples images.",
    "The “average precision” of cells, TP / (TP + FP + FN), is not the area under a precision-recall curve, "
    "and the two cannot be compared. The panoptic quality counts a pair at an IoU above 0.5, everything else "
    "at or above its threshold.",
)
_PICTURE_NOTE = (
    "Solid line: reference. Tinted area with dashed line: prediction. Grey: neighbours that take no part. "
    "The largest are shown, on the slice where most of what takes part is to be seen."
)


def build_page(
    evaluation: InstanceEvaluation, images: PathLike | None = None, title: str = "Objects"
) -> HtmlReport:
    """Return the page, so that a caller can add sections of its own."""
    n = len(evaluation.rows)
    report = HtmlReport(title, f"{n} image{'s' if n != 1 else ''}", _tiles(evaluation))
    _add_problems(report, evaluation)
    _add_numbers(report, evaluation)
    _add_curve(report, evaluation)
    if evaluation.ranking is not None:
        add_ranking(report, evaluation.ranking)
    if evaluation.lesions is not None:
        _add_lesions(report, evaluation.lesions)
    _add_counts(report, evaluation)
    _add_mistakes(report, evaluation)
    _add_pictures(report, evaluation, find_cases(images) if images else {})
    _add_images(report, evaluation)
    report.add_text("How to read this", *_READING)
    report.add_facts("Settings", _settings(evaluation))
    return report


def ratio(value: float) -> str:
    """Return three digits, or a dash for what is not defined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, or a dash for what is not defined."""
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def interval(statistic: Statistic) -> str:
    """Return ``0.871 – 0.894``, or nothing where there is no interval."""
    return "" if math.isnan(statistic.low) else f"{ratio(statistic.low)} – {ratio(statistic.high)}"


def _tiles(evaluation: InstanceEvaluation) -> dict[str, str]:
    tiles = {
        INSTANCE_METRICS[name].title: f"{ratio(evaluation.pooled[name])}\n{evaluation.formula(name)}"
        for name in _TILES
    }
    counts = evaluation.counts
    tiles["Objects"] = f"{counts.n_pred}\nof {counts.n_ref} in the reference"
    if evaluation.failures:
        tiles["Images failed"] = str(len(evaluation.failures))
    return tiles


def _add_problems(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    rows = [(Cell(f.case, tone="bad"), f.error) for f in evaluation.failures]
    rows += [(Cell(n, tone="warn"), "no reference of this name") for n in evaluation.predictions_alone]
    rows += [(Cell(n, tone="warn"), "no prediction of this name") for n in evaluation.references_alone]
    if rows:
        note = "These are in none of the numbers below."
        report.add_table("Images that were not measured", ["image", "why"], rows, note=note)


def _add_numbers(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    rows = []
    for name, metric in INSTANCE_METRICS.items():
        pooled, mean = evaluation.pooled.get(name, math.nan), evaluation.means[name]
        undefined = f"\n{mean.n_undefined} undefined" if mean.n_undefined else ""
        rows.append(
            [
                Cell(metric.title),
                Cell(ratio(pooled), pooled, part=None if math.isnan(pooled) else pooled),
                Cell(ratio(mean.mean), mean.mean, (interval(mean) + undefined).strip()),
                Cell(evaluation.formula(name)),
                Cell(metric.source),
            ]
        )
    columns = ["", "pooled", "mean over images", "formula", "equals"]
    report.add_table("Numbers", columns, rows)


def _add_curve(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    precision = evaluation.precision
    series = {
        "pooled": (precision.taus, precision.pooled.tolist()),
        "mean over images": (precision.taus, precision.mean_over_images.tolist()),
    }
    drawing = curves(series, "IoU threshold", "AP (cells)")
    caption = "TP / (TP + FP + FN) at each threshold: how exact the outlines of the objects found are."
    report.add_figure("How exact", drawing, caption)


def add_ranking(report: HtmlReport, ranking: Ranking) -> None:
    """Add average precision and FROC of objects with scores."""
    rows = [
        [Cell(kind), *(Cell(ratio(v), v) for v in found.ap.tolist()), Cell(ratio(found.mean), found.mean)]
        for kind, found in (("masks", ranking.masks), ("boxes", ranking.boxes))
    ]
    columns = ["", *(f"IoU {tau:.2f}" for tau in ranking.masks.taus), "mean"]
    report.add_table("Average precision of scored objects", columns, rows, note=f"{AP_FORMULA}.")
    curve = ranking.froc
    drawing = curves(
        {"sensitivity": (curve.rates.tolist(), curve.sensitivities.tolist())},
        "false positives per image",
        "sensitivity",
    )
    read = ", ".join(f"{ratio(curve.sensitivity_at(rate))} at {rate:g}" for rate in RATES)
    caption = f"FROC: {ranking.froc_formula}. {read}; their mean (CPM) is {ratio(curve.cpm)}."
    report.add_figure("Found against invented", drawing, caption)


def _add_lesions(report: HtmlReport, lesions: LesionTable) -> None:
    rows = [
        [Cell(row.case), *(Cell(f"{value:.3f}", value) for value in row.values.values())]
        for row in lesions.rows
    ]
    means = [Cell(f"{value:.3f}", value) for value in lesions.means.values()]
    columns = ["image", *LESION_METRICS]
    note = "; ".join(f"{name}: {formula}" for name, formula in lesions.formulas().items())
    report.add_table("Lesion by lesion", columns, [[Cell("mean"), *means], *rows], note=f"{note}.")


def _add_counts(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    c = evaluation.counts
    low, high = signed(c.low), signed(c.high)
    facts = {
        "objects, predicted / reference": f"{c.n_pred} / {c.n_ref} ({signed(100 * c.relative_total, 1)} %)",
        "mean error per image": f"{signed(c.error)} objects, Bland-Altman limits {low} to {high}",
        "mean absolute error": f"{c.absolute_error:.2f} objects",
        "mean relative error": f"{_percent(c.relative_error)} over {c.relative_images} images with objects",
        "R² (of predicted = reference)": ratio(c.r2),
    }
    report.add_facts("Counts", facts)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _add_mistakes(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    rows = []
    for kind, n in evaluation.events.items():
        some = max(evaluation.rows, key=lambda row: row.events(kind))
        most = f"{some.case} ({some.events(kind)})" if n else "–"
        rows.append([Cell(kind), Cell(str(n), float(n)), Cell(KINDS[kind]), Cell(most)])
    columns = ["mistake", "events", "what it is", "most of them in"]
    note = "Every object that is not matched takes part in at least one event."
    report.add_table("Mistakes", columns, rows, note=note)


def _add_pictures(report: HtmlReport, evaluation: InstanceEvaluation, images: Mapping[str, Path]) -> None:
    chosen = {kind: _largest(evaluation.rows, kind) for kind in KINDS}
    wanted: dict[str, list[Mistake]] = {}
    for events in chosen.values():
        for case, mistake in events:
            wanted.setdefault(case, []).append(mistake)
    pictures: dict[tuple[str, Mistake], Picture] = {}
    for pair in progress([p for p in evaluation.pairs if p.name in wanted], "draw mistakes"):
        try:
            reference, prediction = load_pair(pair)
            image = _image(pair.name, images, reference)
            for mistake in wanted[pair.name]:
                png = draw_mistake(
                    mistake, reference, prediction, image, letters=_of_a_patient(pair.reference)
                )
                pictures[pair.name, mistake] = Picture(png, pair.name, _caption(mistake))
        except MedsegError as error:  # a file that vanished since it was measured costs only its pictures
            logger.warning("%s: no picture (%s)", pair.name, error)
    totals = evaluation.events
    for kind, events in chosen.items():
        found = [pictures[event] for event in events if event in pictures]
        title = f"{kind.capitalize()}: {totals[kind]}"
        what = f"{KINDS[kind].capitalize()}."
        if found:
            report.add_pictures(title, found, f"{what} {_PICTURE_NOTE}")
        else:
            report.add_text(
                title, what, "There is none." if not totals[kind] else "No picture could be drawn."
            )


def _largest(rows: Sequence[InstanceRow], kind: str) -> list[tuple[str, Mistake]]:
    events = [(row.case, m) for row in rows for m in row.mistakes if m.kind == kind]
    return sorted(events, key=lambda event: -event[1].voxels)[:_PICTURES]


def _caption(mistake: Mistake) -> str:
    sides = []
    for name, labels in (("reference", mistake.references), ("prediction", mistake.predictions)):
        if labels:
            shown = ", ".join(map(str, labels[:4])) + (", …" if len(labels) > 4 else "")
            sides.append(f"{name} {shown}")
    return f"{mistake.kind}: {'; '.join(sides)} ({mistake.voxels} voxels)"


def draw_mistake(
    mistake: Mistake,
    reference: Volume,
    prediction: Volume,
    image: Array | None = None,
    letters: bool = True,
) -> bytes:
    """Draw what takes part in a mistake, each in a colour of its own, among its grey neighbours.

    Parameters
    ----------
    mistake : of the two label maps
    reference, prediction : Volume, one channel, one grid
    image : (i, j, k), optional
    letters : bool
        Whether it is a patient, seen as a radiologist does; else columns go right and rows down, as on disk.

    Returns
    -------
    bytes
        A PNG.
    """
    truth, guess = reference.array[0], prediction.array[0]
    axis, codes = _view_of(reference)
    letters = letters and reference.geometry.unit == "mm"
    taking_part = np.isin(truth, mistake.references) & (truth != 0)
    taking_part |= np.isin(guess, mistake.predictions) & (guess != 0)
    box = _box(taking_part)
    truth, colours = _recoloured(truth[box], mistake.references, 0)
    guess, more = _recoloured(guess[box], mistake.predictions, len(mistake.references))
    index = _best_slice(truth, guess, axis)
    return slice_picture(
        None if image is None else image[box],
        truth,
        guess,
        reference.spacing,
        codes if letters else "LPS",
        axis,
        index,
        {_NEIGHBOUR: _NEIGHBOUR_COLOUR, **colours, **more},
        letters=letters,
    )


def _of_a_patient(source: Source) -> bool:
    """Return whether a file may know where left and right are: TIFF and pictures do not."""
    return not (isinstance(source, Path) and source.suffix.lower() in _NO_PATIENT)


def _view_of(volume: Volume) -> tuple[int, str]:
    """Return the axis that is looked along, and the letters of the axes."""
    codes, spacing = axis_codes(volume.geometry.affine), volume.spacing
    if 1 in volume.shape:
        axis = volume.shape.index(1)
    elif max(spacing) > _THICK * min(spacing):
        axis = int(np.argmax(spacing))
    else:
        axis = next(a for a in range(3) if codes[a] in "SI")
    return axis, codes


def _recoloured(labels: IntArray, names: Sequence[int], offset: int) -> tuple[IntArray, dict[int, str]]:
    """Number what takes part from _FIRST + offset on, with colours; all else is a neighbour."""
    result = np.where(labels != 0, _NEIGHBOUR, 0)
    colours = {}
    for k, name in enumerate(names, start=offset):
        result[labels == name] = _FIRST + k
        colours[_FIRST + k] = PALETTE[k % len(PALETTE)]
    return result, colours


def _best_slice(truth: IntArray, guess: IntArray, axis: int) -> int:
    """Return the slice with the most objects of the mistake, and among those the most of their voxels."""
    others = tuple(a for a in range(truth.ndim) if a != axis)
    values = [(side, v) for side in (truth, guess) for v in np.unique(side) if v >= _FIRST]
    areas = np.array([(side == v).sum(axis=others) for side, v in values])
    seen = (areas > 0).sum(axis=0)
    return int(np.argmax(seen * (areas.sum() + 1) + areas.sum(axis=0)))


def _box(mask: Array) -> tuple[slice, ...]:
    box = []
    for axis, n in enumerate(mask.shape):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        low, high = int(hit[0]), int(hit[-1]) + 1
        margin = max(_MARGIN_VOXELS, math.ceil(_MARGIN * (high - low)))
        box.append(slice(max(0, low - margin), min(n, high + margin)))
    return tuple(box)


def _image(name: str, images: Mapping[str, Path], reference: Volume) -> Array | None:
    path = images.get(f"{name}_0000") or images.get(name)
    volume = read(path) if path else None
    if volume is None or volume.shape != reference.shape:
        if volume is not None:
            logger.warning("%s: the image has another shape than the label maps, so it is not drawn", name)
        return None
    array: Array = volume.array.mean(axis=0) if volume.channels in (3, 4) else volume.array[0]
    return array


def _add_images(report: HtmlReport, evaluation: InstanceEvaluation) -> None:
    names = list(INSTANCE_METRICS)
    titles = [INSTANCE_METRICS[name].title for name in names]
    columns = ["image", "reference", "predicted", "TP", "FP", "FN", *titles, *KINDS]
    rows = []
    for row in evaluation.rows:
        counts: list[Cell | int] = [row.n_ref, row.n_pred, row.tp, row.fp, row.fn]
        values = [Cell(ratio(v), None if math.isnan(v) else v) for v in row.values.values()]
        rows.append([Cell(row.case), *counts, *values, *(row.events(kind) for kind in KINDS)])
    note = "Click a heading to sort."
    report.add_table("All images", columns, rows, note=note, sortable=True)


def _settings(evaluation: InstanceEvaluation) -> dict[str, object]:
    empty = evaluation.empty.to_dict()
    return {
        "IoU of a match": f"{evaluation.tau:g} and above",
        **{
            f"ratios where {name.replace('both', 'both sides')} {'are' if name == 'both' else 'is'} empty": (
                "not defined, in no mean" if value is None else f"{value:g}"
            )
            for name, value in empty.items()
        },
        "bootstrap": f"{evaluation.resamples} resamples of images, seed {evaluation.seed}",
        "medseg": medseg.__version__,
    }
