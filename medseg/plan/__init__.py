"""From data to plan: what a dataset looks like, and every decision that follows from it."""

from medseg.plan.explain import Explanation, explain
from medseg.plan.files import load_plan, save_nnunet_plan, save_plan
from medseg.plan.fingerprint import extract_fingerprint
from medseg.plan.nnunet import from_nnunet, to_nnunet
from medseg.plan.planner import DatasetInfo, make_plan, plan_dataset
from medseg.plan.presets import PRESETS, Rules, default_preset
from medseg.plan.schema import (
    Architecture,
    ChannelStats,
    Configuration,
    Fingerprint,
    Plan,
    PlanOptions,
    Recipe,
)
from medseg.plan.splits import Split, choose_split, make_splits

__all__ = [
    "PRESETS",
    "Architecture",
    "ChannelStats",
    "Configuration",
    "DatasetInfo",
    "Explanation",
    "Fingerprint",
    "Plan",
    "PlanOptions",
    "Recipe",
    "Rules",
    "Split",
    "choose_split",
    "default_preset",
    "explain",
    "extract_fingerprint",
    "from_nnunet",
    "load_plan",
    "make_plan",
    "make_splits",
    "plan_dataset",
    "save_nnunet_plan",
    "save_plan",
    "to_nnunet",
]
