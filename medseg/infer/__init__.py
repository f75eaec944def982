"""Volume and bundle to labels or probabilities on the source grid."""

from medseg.infer.predictor import Options, Predictor
from medseg.infer.runtime import Runtime, choose_device, choose_runtime, cpu_has_bf16
from medseg.infer.sliding import sliding_window

__all__ = [
    "Options",
    "Predictor",
    "Runtime",
    "choose_device",
    "choose_runtime",
    "cpu_has_bf16",
    "sliding_window",
]
