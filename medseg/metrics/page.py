"""The HTML page of an evaluation: summary, plots, worst cases as pictures, every case, definitions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

import medseg
from medseg.errors import MedsegError
from medseg.geometry.orient import axis_codes
from medseg.io import read
from medseg.labels import LabelValue
from medseg.log import logger, progress
from medseg.metrics.definitions import MEAN, METRICS, ClassSummary, Row
from medseg.metrics.pairing import Pair, find_cases, load_label_map
from medseg.metrics.report import (
    PALETTE,
    Cell,
    HtmlReport,
    Panel,
    Picture,
    slice_picture,
    strip_plot,
)
from medseg.metrics.summary import Statistic, nanmean
from medseg.types import Array, PathLike
from medseg.volume import Geometry

if TYPE_CHECKING:
    from medseg.metrics.evaluation import Evaluation

Images = PathLike | Mapping[str, Path] | None

# Tiles, plots and the summary show these, where they were measured; the table of cases shows all.
_HEADLINE = ("dice", "iou", "nsd", "hd95", "assd", "volume_error_relative")
_PLOTTED = ("dice", "nsd", "hd95", "assd")
_PICTURES = 6
_EMPTY = {"both": "both empty", "reference": "reference empty", "prediction": "prediction empty"}

_READING = (
    "Each mean is over the cases with a finite value; under it its 95 % confidence interval, from a "
    "bootstrap that resamples whole cases. The last line is the mean over the classes.",
    "Where one of the two masks is empty, Dice, IoU and NSD are 0 and enter the mean; distances are "
    "infinite, cannot enter a mean, and are counted as “inf”. Where both are empty nothing can be "
    "measured: such cases are left out of that class and counted as “empty”.",
)


def write_page(
    evaluation: "Evaluation", path: PathLike, images: Images = None, title: str = "Evaluation"
) -> None:
    """Write the page; see :meth:`medseg.metrics.Evaluation.to_html`."""
    build_page(evaluation, images, title).write(path)


def build_page(evaluation: "Evaluation", images: Images = None, title: str = "Evaluation") -> HtmlReport:
    """Return the page, so that a caller can add sections of its own."""
    n, classes = len(evaluation.cases), len(evaluation.labels)
    subtitle = f"{_count(n, 'case')}, {_count(classes, 'class', 'classes')}"
    return add_evaluation(HtmlReport(title, subtitle, _tiles(evaluation)), evaluation, images)


def add_evaluation(report: HtmlReport, evaluation: "Evaluation", images: Images = None) -> HtmlReport:
    """Add all sections of an evaluation to a page, such as the report of a training.

    Parameters
    ----------
    report : the page
    evaluation : what is shown
    images : folder, or mapping of case name to file, with what is drawn under the contours
    """
    _add_problems(report, evaluation)
    _add_summary(report, evaluation)
    _add_plots(report, evaluation)
    add_worst_cases(report, evaluation, images)
    _add_cases(report, evaluation)
    report.add_text("How to read this", *_READING)
    report.add_facts(
        "Definitions and settings",
        {
            **{
                heading(name, evaluation.nsd_mm): f"equals {METRICS[name].source}"
                for name in evaluation.metrics
            },
            "bootstrap": f"{evaluation.resamples} resamples of cases, seed {evaluation.seed}",
            "medseg": medseg.__version__,
        },
    )
    return report


def heading(metric: str, nsd_mm: float) -> str:
    """Return the title of a metric with its unit, such as ``HD95 (mm)`` or ``NSD at 1 mm``."""
    entry = METRICS[metric]
    if metric == "nsd":
        return f"NSD at {nsd_mm:g} mm"
    return f"{entry.title} ({entry.unit})" if entry.unit else entry.title


def shown(metric: str, value: float) -> str:
    """Return a value with the digits that it deserves: three for a ratio, two for a length or volume."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "inf"
    if METRICS[metric].unit == "%":
        return f"{100 * value:+.1f}".replace("-", "−")
    if metric == "volume_error":
        return f"{value:+.2f}".replace("-", "−")
    return f"{value:.2f}" if METRICS[metric].unit else f"{value:.3f}"


def interval(metric: str, statistic: Statistic) -> str:
    """Return ``0.871 – 0.894``, or nothing where there is no interval."""
    if math.isnan(statistic.low):
        return ""
    return f"{shown(metric, statistic.low)} – {shown(metric, statistic.high)}"


def cases_of(entry: ClassSummary) -> int:
    """Return over how many cases the mean Dice is (without Dice: the metric that most cases have)."""
    statistics = entry.metrics
    return statistics["dice"].n if "dice" in statistics else max(s.n for s in statistics.values())


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _tiles(evaluation: "Evaluation") -> dict[str, str]:
    mean = evaluation.summary[MEAN].metrics
    tiles = {}
    for name in ("dice", "nsd", "hd95"):
        if name in mean:
            title = heading(name, evaluation.nsd_mm).split(" (")[0]
            tiles[f"Mean {title}"] = f"{_with_unit(name, mean[name])}\n{_aside(name, mean[name])}"
    tiles["Cases measured"] = str(len(evaluation.cases))
    if evaluation.failures:
        tiles["Cases failed"] = str(len(evaluation.failures))
    return tiles


def _with_unit(metric: str, statistic: Statistic) -> str:
    return f"{shown(metric, statistic.mean)} {METRICS[metric].unit}".strip()


def _aside(metric: str, statistic: Statistic) -> str:
    between = interval(metric, statistic)
    parts = [f"95 % CI {between}"] if between else []
    parts += [f"{statistic.n_infinite} infinite left out"] if statistic.n_infinite else []
    return ", ".join(parts)


def _add_problems(report: HtmlReport, evaluation: "Evaluation") -> None:
    rows = [(Cell(f.case, tone="bad"), f.error) for f in evaluation.failures]
    rows += [(Cell(n, tone="warn"), "no reference of this name") for n in evaluation.predictions_alone]
    rows += [(Cell(n, tone="warn"), "no prediction of this name") for n in evaluation.references_alone]
    if rows:
        note = "These are in none of the numbers below."
        report.add_table("Cases that were not measured", ["case", "why"], rows, note=note)


def _add_summary(report: HtmlReport, evaluation: "Evaluation") -> None:
    metrics = [name for name in _HEADLINE if name in evaluation.metrics]
    columns = ["class", "cases", *(heading(name, evaluation.nsd_mm) for name in metrics), "empty masks"]
    rows = [_summary_row(entry, metrics) for name, entry in evaluation.summary.items()]
    several = len(evaluation.labels) > 1
    rows = rows if several else rows[:1]
    note = "Mean over cases; below it the 95 % bootstrap interval, then the median."
    report.add_table("Summary", columns, rows, note=note, total=several)


def _summary_row(entry: ClassSummary, metrics: Sequence[str]) -> list[Cell]:
    n = cases_of(entry)
    name = "mean of classes" if entry.label == MEAN else entry.label
    cells = [Cell(name), Cell(str(n), float(n))]
    for metric in metrics:
        statistic = entry.metrics[metric]
        part = statistic.mean if METRICS[metric].best == 1.0 and statistic.n else None
        median = f"median {shown(metric, statistic.median)}" if statistic.n else ""
        infinite = f"+ {statistic.n_infinite} infinite" if statistic.n_infinite else ""
        note = "\n".join(text for text in (interval(metric, statistic), median, infinite) if text)
        cells.append(Cell(shown(metric, statistic.mean), statistic.mean, note, part=part))
    return [*cells, _empties(entry)]


def _empties(entry: ClassSummary) -> Cell:
    counts = {
        "missed (prediction empty)": entry.empty_prediction,
        "invented (reference empty)": entry.empty_reference,
        "absent (both empty)": entry.empty_both,
    }
    found = [f"{n} {kind}" for kind, n in counts.items() if n]
    return Cell(", ".join(found) or "none", tone="warn" if found else "")


def _add_plots(report: HtmlReport, evaluation: "Evaluation") -> None:
    panels = []
    for metric in _PLOTTED:
        if metric in evaluation.metrics:
            values = {
                name: np.array([row.values[metric] for row in evaluation.rows if row.label == name])
                for name in evaluation.labels
            }
            panels.append(Panel(heading(metric, evaluation.nsd_mm), values, METRICS[metric].best))
    if panels:
        caption = (
            "A point is one case; boxes (from five cases on) are quartiles with the median as a thick line. "
            "The dotted line is a perfect result."
        )
        report.add_figure("Every case, by class", strip_plot(panels), caption)


def add_worst_cases(
    report: HtmlReport, evaluation: "Evaluation", images: Images = None, most: int = _PICTURES
) -> None:
    """Add pictures of the cases with the lowest mean Dice, each on the slice where it errs most."""
    files = images if isinstance(images, Mapping) else find_cases(images) if images else {}
    values = _legend_values(evaluation.labels)
    colours = {value: PALETTE[k % len(PALETTE)] for k, value in enumerate(values)}
    pictures = []
    for case in progress(_worst(evaluation, most), "draw worst cases"):
        rows = [row for row in evaluation.rows if row.case == case]
        pair = next(pair for pair in evaluation.pairs if pair.name == case)
        try:
            pictures.append(_picture(pair, rows, files, colours, evaluation.ignore))
        except MedsegError as error:  # a file that vanished since it was measured costs only its picture
            logger.warning("%s: no picture (%s)", case, error)
    note = (
        "Solid line: reference. Tinted area with dashed line: prediction. Tint outside of the solid line is "
        "too much, no tint inside of it is missed. Radiological view: the patient's left is on the right."
    )
    legend = {values[value]: colour for value, colour in colours.items()}
    report.add_pictures("Worst cases", pictures, note, legend)


def _legend_values(labels: Mapping[str, LabelValue]) -> dict[int, str]:
    """Return the names of each label value: its class, or all regions that hold it."""
    names: dict[int, list[str]] = {}
    for name, value in labels.items():
        for v in value if isinstance(value, tuple) else (value,):
            names.setdefault(v, []).append(name)
    return {value: " + ".join(names[value]) for value in sorted(names)}


def _worst(evaluation: "Evaluation", most: int) -> list[str]:
    dice = np.array([row.counts.dice for row in evaluation.rows]).reshape(-1, len(evaluation.labels))
    score = nanmean(dice, axis=1)
    order = np.argsort(np.where(np.isnan(score), np.inf, score), kind="stable")
    return [evaluation.cases[k] for k in order[:most] if not math.isnan(score[k])]


def _picture(
    pair: Pair,
    rows: Sequence[Row],
    images: Mapping[str, Path],
    colours: Mapping[int, str],
    ignore: int | None,
) -> Picture:
    reference, prediction = (
        load_label_map(pair.reference, pair.name),
        load_label_map(pair.prediction, pair.name),
    )
    truth, guess = (
        _drawn(reference.array[0], reference.array[0], colours, ignore),
        _drawn(prediction.array[0], reference.array[0], colours, ignore),
    )
    image = _image(pair.name, images, reference.geometry)
    codes = axis_codes(reference.geometry.affine)
    png = slice_picture(image, truth, guess, reference.spacing, codes, colours=colours)
    return Picture(png, pair.name, _caption(rows))


def _drawn(label_map: Array, reference: Array, colours: Mapping[int, str], ignore: int | None) -> Array:
    keep = np.isin(label_map, list(colours))
    if ignore is not None:
        keep &= reference != ignore
    return np.where(keep, label_map, 0)


def _image(name: str, images: Mapping[str, Path], grid: Geometry) -> Array | None:
    path = images.get(f"{name}_0000") or images.get(name)
    if path is None:
        return None
    volume = read(path)
    return volume.array[0] if volume.geometry.matches(grid) else None


def _caption(rows: Iterable[Row], most: int = 5) -> str:
    known = sorted((row for row in rows if not math.isnan(row.counts.dice)), key=lambda row: row.counts.dice)
    text = ", ".join(f"{row.label} {row.counts.dice:.3f}" for row in known[:most])
    return "Dice: " + text + (", …" if len(known) > most else "")


def _add_cases(report: HtmlReport, evaluation: "Evaluation") -> None:
    columns = ["case", "class", *(heading(name, evaluation.nsd_mm) for name in evaluation.metrics), "empty"]
    low = _low_dice(evaluation)
    rows = []
    for row in evaluation.rows:
        cells = [
            Cell(shown(name, value), None if math.isnan(value) else value, tone=_tone(name, row, low))
            for name, value in row.values.items()
        ]
        rows.append([Cell(row.case), Cell(row.label), *cells, Cell(_EMPTY.get(row.empty, ""))])
    note = (
        "Click a heading to sort. Marked: Dice of 0, and Dice more than 1.5 interquartile ranges below the "
        "first quartile of its class."
    )
    report.add_table("All cases", columns, rows, note=note, sortable=True)


def _low_dice(evaluation: "Evaluation") -> dict[str, float]:
    """Return, by class, the Dice below which a case is an outlier (Tukey's fence)."""
    fences = {}
    for name in evaluation.labels:
        dice = np.array([row.counts.dice for row in evaluation.rows if row.label == name])
        dice = dice[~np.isnan(dice)]
        first, third = np.percentile(dice, (25, 75)) if dice.size else (0.0, 0.0)
        fences[name] = float(first - 1.5 * (third - first))
    return fences


def _tone(metric: str, row: Row, fences: Mapping[str, float]) -> Literal["", "warn", "bad"]:
    if metric != "dice" or math.isnan(row.counts.dice):
        return ""
    if row.counts.dice == 0.0:
        return "bad"
    return "warn" if row.counts.dice < fences[row.label] else ""
