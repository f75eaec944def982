"""Dataset and plan to a trained bundle."""

from medseg.train.config import TrainConfig
from medseg.train.recipes import RECIPES, load_recipe
from medseg.train.run import fit
from medseg.train.setup import describe

__all__ = ["RECIPES", "TrainConfig", "describe", "fit", "load_recipe"]
