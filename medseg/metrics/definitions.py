"""What the metrics are, whose definition each equals, and the rows that hold them."""

from dataclasses import dataclass
from typing import Literal

from medseg.metrics.overlap import Counts
from medseg.metrics.summary import Statistic

Empty = Literal["", "reference", "prediction", "both"]
MEAN = "mean"
"""Name of the summary entry that averages the classes."""


@dataclass(frozen=True)
class Metric:
    """What a column of the result is.

    Attributes
    ----------
    title : heading of a table
    unit : of the value, empty for a ratio
    best : the value of a perfect prediction
    surface : whether surfaces must be measured for it
    source : the public implementation that it equals
    """

    title: str
    unit: str
    best: float
    surface: bool
    source: str

    def column(self, name: str) -> str:
        """Return the metric's name in a file, which ends in its unit: ``hd95_mm``."""
        return f"{name}_{self.unit}" if self.unit in ("mm", "ml") else name


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", 1.0, False, "nnunetv2 2.8.1, summary.json 'Dice'"),
    "iou": Metric("IoU", "", 1.0, False, "nnunetv2 2.8.1, summary.json 'IoU'"),
    "volume_error": Metric("Volume error", "ml", 0.0, False, "n_pred - n_ref of nnunetv2, times voxel size"),
    "volume_error_relative": Metric("Volume error", "%", 0.0, False, "MedPy 0.5.2, ravd"),
    "nsd": Metric("NSD", "", 1.0, True, "surface-distance 0.1, compute_surface_dice_at_tolerance"),
    "hd95": Metric("HD95", "mm", 0.0, True, "surface-distance 0.1, compute_robust_hausdorff(95)"),
    "hd": Metric("HD", "mm", 0.0, True, "surface-distance 0.1, compute_robust_hausdorff(100)"),
    "assd": Metric("ASSD", "mm", 0.0, True, "surface-distance 0.1, areas and distances pooled"),
    "asd_prediction_to_reference": Metric(
        "ASD pred. to ref.", "mm", 0.0, True, "surface-distance 0.1, compute_average_surface_distance[1]"
    ),
    "asd_reference_to_prediction": Metric(
        "ASD ref. to pred.", "mm", 0.0, True, "surface-distance 0.1, compute_average_surface_distance[0]"
    ),
}


@dataclass(frozen=True)
class Row:
    """One class of one case.

    Attributes
    ----------
    case, label : names
    empty : which of the two masks has no voxel
    counts : voxels
    values : by name of METRICS; NaN or infinite as the table of this module says
    """

    case: str
    label: str
    empty: Empty
    counts: Counts
    values: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """A case that could not be measured, and why."""

    case: str
    error: str


@dataclass(frozen=True)
class ClassSummary:
    """One class (or the mean of the classes) over all measured cases."""

    label: str
    metrics: dict[str, Statistic]
    empty_both: int
    empty_reference: int
    empty_prediction: int
