"""An evaluation of objects as strict JSON and as CSV.

NaN and infinity, which strict JSON cannot hold, are ``null``: an undefined number.
"""

import csv
import io
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import medseg
from medseg.files import write_text
from medseg.metrics.mistakes import KINDS
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.metrics.instances import InstanceEvaluation, InstanceRow

__all__ = ["dump_json", "to_dict", "write_csv", "write_text"]

_COUNTS = ("n_ref", "n_pred", "tp", "fp", "fn")


def to_dict(evaluation: "InstanceEvaluation") -> dict[str, object]:
    """Return plain data: every number with its formula and the implementation that it equals."""
    from medseg.metrics.instances import INSTANCE_METRICS

    numbers = {
        name: {
            "formula": evaluation.formula(name),
            "equals": metric.source,
            "pooled": _plain(evaluation.pooled.get(name, math.nan)),
            "mean_over_images": _all_plain(asdict(evaluation.means[name])),
        }
        for name, metric in INSTANCE_METRICS.items()
    }
    return {
        "medseg": medseg.__version__,
        "settings": {
            "tau": evaluation.tau,
            "empty": evaluation.empty.to_dict(),
            "empty_meaning": "value of an image's ratios where both sides, the reference or the prediction "
            "have no object; null: undefined, in no mean",
            "resamples": evaluation.resamples,
            "seed": evaluation.seed,
            "interval": "95 % bootstrap percentile interval of the mean, images resampled",
        },
        "metrics": numbers,
        "ap_by_threshold": {
            "formula": "TP / (TP + FP + FN), IoU >= tau",
            "taus": list(evaluation.precision.taus),
            "pooled": [_plain(value) for value in evaluation.precision.pooled.tolist()],
            "mean_over_images": [_plain(v) for v in evaluation.precision.mean_over_images.tolist()],
        },
        **({} if evaluation.ranking is None else {"ranking": evaluation.ranking.to_dict()}),
        **({} if evaluation.lesions is None else {"lesions": evaluation.lesions.to_dict()}),
        "counts": _all_plain(asdict(evaluation.counts)),
        "mistakes": {kind: {"events": n, "what": KINDS[kind]} for kind, n in evaluation.events.items()},
        "images": [_image(row) for row in evaluation.rows],
        "failures": [asdict(failure) for failure in evaluation.failures],
        "predictions_without_reference": list(evaluation.predictions_alone),
        "references_without_prediction": list(evaluation.references_alone),
    }


def dump_json(evaluation: "InstanceEvaluation") -> str:
    """Return :func:`to_dict` as text."""
    return json.dumps(to_dict(evaluation), indent=2, allow_nan=False) + "\n"


def write_csv(evaluation: "InstanceEvaluation", path: PathLike) -> None:
    """Write a line per image, then a line per failed case; undefined is empty."""
    names = list(evaluation.rows[0].values)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["case", *_COUNTS, *names, *KINDS, "error"])
    for row in evaluation.rows:
        values = ["" if math.isnan(v) else repr(v) for v in row.values.values()]
        events = [row.events(kind) for kind in KINDS]
        writer.writerow([row.case, *(getattr(row, c) for c in _COUNTS), *values, *events, ""])
    for failure in evaluation.failures:
        blank = [""] * (len(_COUNTS) + len(names) + len(KINDS))
        writer.writerow([failure.case, *blank, failure.error])
    write_text(path, stream.getvalue())


def _image(row: "InstanceRow") -> dict[str, object]:
    return {
        "case": row.case,
        **{name: getattr(row, name) for name in _COUNTS},
        **_all_plain(row.values),
        "mistakes": [asdict(mistake) for mistake in row.mistakes],
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _all_plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, float) else value for name, value in values.items()}
