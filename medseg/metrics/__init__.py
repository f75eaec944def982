"""Numbers from two label maps: overlap, volumes, surfaces, objects, intervals, and pages to read them."""

from medseg.metrics.definitions import MEAN, METRICS, Metric, Row
from medseg.metrics.evaluation import Evaluation, evaluate
from medseg.metrics.export import dump_json
from medseg.metrics.instances import InstanceEvaluation, evaluate_instances
from medseg.metrics.matching import EmptyPolicy, Matching, match_objects
from medseg.metrics.overlap import Contingency, Counts, contingency
from medseg.metrics.overlap_table import OverlapTable
from medseg.metrics.panoptic import PanopticQuality, panoptic_quality
from medseg.metrics.surface import SurfaceDistances, surface_distances

__all__ = [
    "MEAN",
    "METRICS",
    "Contingency",
    "Counts",
    "EmptyPolicy",
    "Evaluation",
    "InstanceEvaluation",
    "Matching",
    "Metric",
    "OverlapTable",
    "PanopticQuality",
    "Row",
    "SurfaceDistances",
    "contingency",
    "dump_json",
    "evaluate",
    "evaluate_instances",
    "match_objects",
    "panoptic_quality",
    "surface_distances",
]
