"""Label map to label map: connected components, and the choice by cross-validation."""

from medseg.postprocess.components import fill_holes, keep_largest, remove_small
from medseg.postprocess.select import (
    Postprocessing,
    Step,
    Trial,
    apply,
    choose_best,
    choose_postprocessing,
    singles_and_pairs,
)

__all__ = [
    "Postprocessing",
    "Step",
    "Trial",
    "apply",
    "choose_best",
    "choose_postprocessing",
    "fill_holes",
    "keep_largest",
    "remove_small",
    "singles_and_pairs",
]
