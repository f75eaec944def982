"""An evaluation of prompting as JSON, table, curves and one HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

import medseg
from medseg.files import atomic_path, write_text
from medseg.metrics.report import PALETTE, Cell, CellLike, HtmlReport, Panel, curves, strip_plot
from medseg.prompt.scores import (
    ALL,
    AUC_CLICKS,
    DEFINITIONS,
    NOTABLE_LOSS,
    TOLD,
    Comparison,
    Group,
    Trace,
    measures,
    per_object,
)
from medseg.types import FloatArray, PathLike

if TYPE_CHECKING:
    from medseg.prompt.evaluate import PromptEvaluation


def to_dict(evaluation: "PromptEvaluation") -> dict[str, Any]:
    """Return plain data that strict JSON can hold: what is not a finite number is None."""
    return {
        "medseg": medseg.__version__,
        "title": evaluation.title,
        "settings": evaluation.config.to_dict(),
        "entrants": list(evaluation.entrants),
        "definitions": dict(DEFINITIONS),
        "auc": {"points": AUC_CLICKS, "first_click": 1, "most": AUC_CLICKS - 1, "rule": "trapezoid"},
        "summary": [_group(group) for group in evaluation.groups],
        "comparison": [asdict(comparison) for comparison in evaluation.comparisons],
        "objects": [
            {"dataset": dataset, "name": name, "entrant": entrant, **_plain(values)}
            for entrant in evaluation.entrants
            for (dataset, name), values in per_object(
                trace for trace in evaluation.traces if trace.entrant == entrant
            ).items()
        ],
        "traces": [_trace(trace) for trace in evaluation.traces],
        "failures": [asdict(failure) for failure in evaluation.failures],
    }


def dump_json(evaluation: "PromptEvaluation") -> str:
    """Return :func:`to_dict` as text."""
    return json.dumps(to_dict(evaluation), indent=1, allow_nan=False) + "\n"


def write_json(evaluation: "PromptEvaluation", path: PathLike) -> None:
    """Write :func:`to_dict`, atomically."""
    write_text(path, dump_json(evaluation))


def _group(group: Group) -> dict[str, Any]:
    return {
        "entrant": group.entrant,
        "dataset": group.dataset,
        "objects": group.objects,
        "mean": _plain(group.means),
        "spread_over_seeds": _plain(group.spread),
    }


def _trace(trace: Trace) -> dict[str, Any]:
    return {**asdict(trace), **_plain(measures(trace))}


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}


COLUMNS: Mapping[str, str] = {
    "dice_box": "box",
    **{f"dice_{n}": f"{n}" for n in TOLD},
    "nsd_box": "NSD\nbox",
    "nsd_5": "NSD\n5",
    "noc_80": "NoC\n0.8",
    "noc_90": "NoC\n0.9",
    "dsc_auc": "DSC\nAUC",
    "seconds_box": "s\nbox",
    "seconds_click": "s\nclick",
}
_WITHOUT_DIGITS = ("noc", "seconds", "cpu", "encoded")


def shown(name: str, value: float) -> str:
    """Return a measure as text: clicks and seconds with fewer digits; a dash where it is missing.

    >>> shown("dice_box", 0.8123), shown("noc_80", 2.24), shown("seconds_box", 0.0123)
    ('0.812', '2.2', '0.01')
    """
    if math.isnan(value):
        return "–"
    if name.startswith(("noc", "encoded")) or (name.startswith(_WITHOUT_DIGITS) and value >= 10):
        return f"{value:.1f}"
    return f"{value:.2f}" if name.startswith(_WITHOUT_DIGITS) else f"{value:.3f}"


def columns_of(evaluation: "PromptEvaluation") -> dict[str, str]:
    """Return the measures that the table shows, with their headings."""
    measured = evaluation.groups[0].means if evaluation.traces else {}
    return {name: title for name, title in COLUMNS.items() if name in measured}


def by_dataset(evaluation: "PromptEvaluation") -> dict[str, list[Group]]:
    """Return the groups of each data set, ``all`` last, one for each entrant."""
    groups = evaluation.groups
    names = [name for name in dict.fromkeys(group.dataset for group in groups) if name != ALL]
    wanted = names if len(names) == 1 else [*names, ALL]
    return {name: [group for group in groups if group.dataset == name] for name in wanted}


def compared(comparison: Comparison) -> str:
    """Say a comparison in one sentence."""
    return (
        f"{comparison.entrant} minus {comparison.other}, {comparison.objects} objects: "
        f"{comparison.box:+.3f} after the box, {comparison.final:+.3f} after all clicks; "
        f"{comparison.worse} objects lose more than {NOTABLE_LOSS:g}, worst {comparison.worst:+.3f} "
        f"({' '.join(comparison.worst_object)})."
    )


def mean_curves(evaluation: "PromptEvaluation", measure: str) -> dict[str, FloatArray]:
    """Return for each entrant the mean Dice or NSD over objects (each a mean over seeds) at every click."""
    result = {}
    for entrant in evaluation.entrants:
        rows: dict[tuple[str, str], list[Sequence[float]]] = {}
        for trace in evaluation.traces:
            if trace.entrant == entrant:
                rows.setdefault(trace.object, []).append(getattr(trace, measure))
        if rows:
            result[entrant] = np.mean([np.mean(values, axis=0) for values in rows.values()], axis=0)
    return result


def write_plot(evaluation: "PromptEvaluation", path: PathLike) -> None:
    """Write the curves of Dice and NSD over clicks as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained", dpi=140)
    colours = [colour for colour in PALETTE if colour != "#F0E442"]  # yellow lines vanish on white
    titles = {"dice": "Dice", "nsd": f"NSD at {evaluation.config.nsd_mm:g} mm"}
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for n, (entrant, values) in enumerate(mean_curves(evaluation, measure).items()):
            line = "-" if n < len(colours) else "--"
            axes.plot(values, line, color=colours[n % len(colours)], marker="o", markersize=3, label=entrant)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("corrective clicks after the box")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dfe4ea", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1)
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})


def build_page(evaluation: "PromptEvaluation") -> HtmlReport:
    """Build the page: what won, the curves, every data set, every object, what failed, and the rules."""
    config = evaluation.config
    report = HtmlReport(
        evaluation.title,
        f"{len({t.object for t in evaluation.traces})} objects, a jittered box and up to {config.clicks} "
        f"clicks each, {len(config.seeds)} simulated user{'s' if len(config.seeds) > 1 else ''}",
        _tiles(evaluation),
    )
    if evaluation.failures:
        rows = [[f.dataset, f.name, f.entrant, str(f.seed or ""), f.error] for f in evaluation.failures]
        report.add_table("Not measured", ["data set", "object", "entrant", "seed", "why"], rows)
    if evaluation.traces:
        _add_results(report, evaluation)
    report.add_facts("Settings", {**config.to_dict(), "medseg": medseg.__version__})
    report.add_facts("Definitions", dict(DEFINITIONS))
    return report


def _add_results(report: HtmlReport, evaluation: "PromptEvaluation") -> None:
    for measure, title in (("dice", "Dice"), ("nsd", f"NSD at {evaluation.config.nsd_mm:g} mm")):
        series = {name: (range(len(y)), y.tolist()) for name, y in mean_curves(evaluation, measure).items()}
        report.add_figure(title, curves(series, "corrective clicks after the box", f"mean {title}"))
    columns = columns_of(evaluation)
    headings = ["data set", "objects", "entrant", *(_heading(c) for c in columns)]
    rows: list[list[CellLike]] = [
        [group.dataset, group.objects, group.entrant, *(_cell(name, group) for name in columns)]
        for groups in by_dataset(evaluation).values()
        for group in groups
    ]
    note = "Small: standard deviation of the mean over seeds. Seconds are medians."
    report.add_table("Data sets", headings, rows, note=note if len(evaluation.config.seeds) > 1 else "")
    if evaluation.comparisons:
        report.add_text("Comparison", *(compared(c) for c in evaluation.comparisons))
    first = per_object(t for t in evaluation.traces if t.entrant == evaluation.entrants[0])
    if first:
        report.add_figure(f"Objects, {evaluation.entrants[0]}", strip_plot(_panels(first)))
    report.add_table("Objects", *_object_table(evaluation), sortable=True)


def _tiles(evaluation: "PromptEvaluation") -> dict[str, str]:
    overall = next((g for g in evaluation.groups if g.dataset == ALL), None)
    if overall is None:
        return {"measured": "nothing"}
    names = {"dice_box": "Dice after the box", f"dice_{AUC_CLICKS}": f"Dice after {AUC_CLICKS} clicks"}
    names |= {"seconds_box": "seconds to the mask", "seconds_click": "seconds a click"}
    known = {
        title: shown(name, overall.means[name]) for name, title in names.items() if name in overall.means
    }
    return {"propagator": overall.entrant, **known}


def _heading(name: str) -> str:
    title = COLUMNS[name].replace("\n", " ")
    return f"Dice {title}" if name.startswith("dice") else title


def _cell(name: str, group: Group) -> Cell:
    value, spread = group.means[name], group.spread[name]
    note = "" if math.isnan(spread) else f"± {shown(name, spread)}"
    return Cell(shown(name, value), None if math.isnan(value) else value, note)


def _panels(objects: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Panel]:
    datasets = list(dict.fromkeys(dataset for dataset, _ in objects))
    titles = {"dice_box": "Dice after the box", "gain": "gain by clicks", "nsd_box": "NSD after the box"}
    return [
        Panel(
            title,
            {name: np.array([v[measure] for (d, _), v in objects.items() if d == name]) for name in datasets},
            0.0 if measure == "gain" else 1.0,
        )
        for measure, title in titles.items()
    ]


def _object_table(evaluation: "PromptEvaluation") -> tuple[list[str], list[list[CellLike]]]:
    """Return a row for each object, with Dice after the box and after all clicks of every entrant."""
    tables = {
        entrant: per_object(t for t in evaluation.traces if t.entrant == entrant)
        for entrant in evaluation.entrants
    }
    voxels = {trace.object: trace.voxels for trace in evaluation.traces}
    headings = ["data set", "object", "voxels"]
    headings += [f"{entrant}, {when}" for entrant in tables for when in ("box", "all clicks")]
    rows: list[list[CellLike]] = []
    for key, size in voxels.items():
        row: list[CellLike] = [*key, size]
        for table in tables.values():
            values = table.get(key)
            row += (
                [None, None] if values is None else [values["dice_box"], values["dice_box"] + values["gain"]]
            )
        rows.append(row)
    return headings, rows
