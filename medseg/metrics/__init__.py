"""Numbers from two label maps: overlap, volumes, surface distances, intervals, and a page to read them."""

from medseg.metrics.definitions import MEAN, METRICS, Metric, Row
from medseg.metrics.evaluation import Evaluation, evaluate
from medseg.metrics.export import dump_json
from medseg.metrics.overlap import Contingency, Counts, contingency
from medseg.metrics.surface import SurfaceDistances, surface_distances

__all__ = [
    "MEAN",
    "METRICS",
    "Contingency",
    "Counts",
    "Evaluation",
    "Metric",
    "Row",
    "SurfaceDistances",
    "contingency",
    "dump_json",
    "evaluate",
    "surface_distances",
]
