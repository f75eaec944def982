"""An evaluation as JSON (a superset of nnU-Net's ``summary.json``) and as CSV.

JSON keys
---------
``foreground_mean``, ``mean`` and ``metric_per_case`` are nnU-Net's, with its names (``Dice IoU TP FP FN TN
n_pred n_ref``) and its means: over the defined values of a class, then plainly over classes. Each case also
has medseg's other metrics under their own names, and ``empty``. ``medseg`` holds what nnU-Net lacks: the
summary with intervals, failures, names without a partner, settings, and the definition of each metric.

The file is strict JSON: NaN and infinity, which it cannot hold, are ``null``; ``empty`` tells which it was.
"""

import csv
import io
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

import medseg
from medseg.files import write_text
from medseg.metrics.definitions import METRICS, ClassSummary, Row
from medseg.metrics.pairing import Source
from medseg.metrics.summary import nanmean
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.metrics.evaluation import Evaluation


def to_dict(evaluation: "Evaluation") -> dict[str, object]:
    """Return plain data that strict JSON can hold."""
    return {
        **_nnunet_means(evaluation),
        "metric_per_case": _per_case(evaluation),
        "medseg": {
            "version": medseg.__version__,
            "settings": {
                "nsd_mm": evaluation.nsd_mm,
                "resamples": evaluation.resamples,
                "seed": evaluation.seed,
                "interval": "95 % bootstrap percentile interval of the mean, cases resampled",
            },
            "labels": {
                name: {"key": evaluation.keys[name], "values": value}
                for name, value in evaluation.labels.items()
            },
            "ignore": evaluation.ignore,
            "definitions": {METRICS[name].column(name): METRICS[name].source for name in evaluation.metrics},
            "summary": {name: _summary(entry) for name, entry in evaluation.summary.items()},
            "failures": [asdict(failure) for failure in evaluation.failures],
            "predictions_without_reference": list(evaluation.predictions_alone),
            "references_without_prediction": list(evaluation.references_alone),
        },
    }


def write_json(evaluation: "Evaluation", path: PathLike) -> None:
    """Write :func:`to_dict`."""
    write_text(path, dump_json(evaluation))


def dump_json(evaluation: "Evaluation") -> str:
    """Return :func:`to_dict` as text."""
    return json.dumps(to_dict(evaluation), indent=2, allow_nan=False) + "\n"


def write_csv(evaluation: "Evaluation", path: PathLike) -> None:
    """Write a line per case and class, then a line per failed case; undefined is empty, infinite is inf."""
    stream = io.StringIO()
    counts = ("tp", "fp", "fn", "tn", "n_ref", "n_pred")
    writer = csv.writer(stream, lineterminator="\n")
    columns = [METRICS[name].column(name) for name in evaluation.metrics]
    writer.writerow(["case", "label", "empty", *columns, *counts, "error"])
    for row in evaluation.rows:
        values = ["" if math.isnan(v) else repr(v) for v in row.values.values()]
        writer.writerow(
            [row.case, row.label, row.empty, *values, *(getattr(row.counts, c) for c in counts), ""]
        )
    for failure in evaluation.failures:
        blank = [""] * (2 + len(evaluation.metrics) + len(counts))
        writer.writerow([failure.case, *blank, failure.error])
    write_text(path, stream.getvalue())


def _nnunet_values(row: Row) -> dict[str, float]:
    c = row.counts
    return {
        "Dice": c.dice,
        "FN": c.fn,
        "FP": c.fp,
        "IoU": c.iou,
        "TN": c.tn,
        "TP": c.tp,
        "n_pred": c.n_pred,
        "n_ref": c.n_ref,
    }


def _nnunet_means(evaluation: "Evaluation") -> dict[str, Any]:
    rows = [_nnunet_values(row) for row in evaluation.rows]
    names = list(rows[0])
    table = np.array([[row[n] for n in names] for row in rows]).reshape(
        -1, len(evaluation.labels), len(names)
    )
    means = nanmean(table, axis=0)
    return {
        "foreground_mean": _plain(dict(zip(names, means.mean(axis=0).tolist(), strict=True))),
        "mean": {
            evaluation.keys[label]: _plain(dict(zip(names, values.tolist(), strict=True)))
            for label, values in zip(evaluation.labels, means, strict=True)
        },
    }


def _per_case(evaluation: "Evaluation") -> list[dict[str, object]]:
    n = len(evaluation.labels)
    result: list[dict[str, object]] = []
    for k, pair in enumerate(evaluation.pairs):
        metrics = {}
        for row in evaluation.rows[k * n : (k + 1) * n]:
            ours = {METRICS[n].column(n): v for n, v in row.values.items() if n not in ("dice", "iou")}
            metrics[evaluation.keys[row.label]] = {
                **_plain(_nnunet_values(row) | ours),
                "empty": row.empty or None,
            }
        result.append(
            {
                "case": pair.name,
                "metrics": metrics,
                "prediction_file": _file(pair.prediction),
                "reference_file": _file(pair.reference),
            }
        )
    return result


def _summary(entry: ClassSummary) -> dict[str, object]:
    return {
        **{METRICS[name].column(name): _plain(asdict(value)) for name, value in entry.metrics.items()},
        "empty_both": entry.empty_both,
        "empty_reference": entry.empty_reference,
        "empty_prediction": entry.empty_prediction,
    }


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _file(source: Source) -> str | None:
    return None if isinstance(source, Volume) else str(source)
