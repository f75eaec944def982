"""medseg: self-configuring 3D medical segmentation, from the scanner's file to a measured result.

The public names below are loaded on first use, so that ``import medseg`` stays cheap
(neither torch nor MONAI is imported by it).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Dataset": "medseg.io",
    "Geometry": "medseg.volume",
    "LabelSet": "medseg.labels",
    "MedsegError": "medseg.errors",
    "Plan": "medseg.plan",
    "Predictor": "medseg.infer",
    "PromptSession": "medseg.prompt.session",
    "Segmentation": "medseg.segmentation",
    "Volume": "medseg.volume",
    "evaluate": "medseg.metrics",
    "fit": "medseg.train",
    "load_bundle": "medseg.bundle",
    "load_model": "medseg.exchange",
    "make_plan": "medseg.plan",
    "open_dataset": "medseg.io",
    "propagate": "medseg.prompt",
    "read": "medseg.io",
    "segment": "medseg.pipeline",
    "write": "medseg.io",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medseg' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
