"""Named recipes: values of TrainConfig and where they come from."""

from collections.abc import Sequence
from pathlib import Path

from medseg.errors import ConfigError
from medseg.plan import Recipe
from medseg.train.config import (
    AugmentConfig,
    Elastic,
    LossConfig,
    OptimizerConfig,
    Rotation,
    Scaling,
    ScheduleConfig,
    TrainConfig,
)

# nnU-Net 2.8.1, nnUNetTrainer: every default of TrainConfig.
NNUNET = TrainConfig()

# Found by measurement on 96 hippocampus cases (DECISIONS.md, 13): in a fortieth of
# nnU-Net's iterations, AdamW with a cosine schedule and averaged weights get furthest, and mirroring
# asks a small network to learn a harder problem than the one it is tested on.
CPU = TrainConfig(
    epochs=24,
    steps_per_epoch=250,
    val_samples=24,
    optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=1e-2),
    schedule=ScheduleConfig(name="cosine", warmup=0.03),
    loss=LossConfig(deep_supervision=False),
    augment=AugmentConfig(
        rotation=Rotation(p=0.6, degrees=25.0),
        scaling=Scaling(p=0.6, low=0.75, high=1.3),
        elastic=Elastic(p=0.3, grid_voxels=12.0, shift_voxels=1.5),
        mirror="off",
    ),
    ema_decay=0.995,
    loader_threads=1,
    checkpoint_seconds=60.0,
    final_mirroring=False,
)

# Detectors: their heads learn from regions that differ from step to step, which large momentum and rates
# do not forgive, so AdamW; validation follows training. No value here was tuned on a benchmark.
DETECTION = TrainConfig(
    epochs=100,
    steps_per_epoch=250,
    val_samples=0,
    oversample_foreground=0.5,
    optimizer=OptimizerConfig(name="adamw", lr=3e-4, weight_decay=1e-2, clip_norm=5.0),
    schedule=ScheduleConfig(name="cosine", warmup=0.03),
    augment=AugmentConfig(rotation=Rotation(p=0.4), scaling=Scaling(p=0.4, low=0.7, high=1.4)),
    ema_decay=0.998,
    compile="off",
    final_mirroring=False,
)
DETECTION_CPU = DETECTION.replace(
    epochs=16,
    optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=1e-2, clip_norm=5.0).to_dict(),
    ema_decay=0.99,
    loader_threads=1,
    checkpoint_seconds=60.0,
)

RECIPES: dict[str, TrainConfig] = {
    "nnunet": NNUNET,
    "cpu": CPU,
    "detection": DETECTION,
    "detection-cpu": DETECTION_CPU,
}
# Of a detector, by the recipe of the plan.
DETECTION_RECIPES: dict[Recipe, str] = {"nnunet": "detection", "cpu": "detection-cpu"}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return a recipe by name, or from a YAML file, with dotted overrides applied.

    Raises
    ------
    ConfigError
        No such recipe or file, or an override names an unknown key.
    """
    if name_or_path in RECIPES:
        return RECIPES[name_or_path].with_overrides(overrides, f"recipe {name_or_path}")
    if Path(name_or_path).is_file():
        return TrainConfig.load(name_or_path, overrides)
    raise ConfigError(f"recipe {name_or_path!r}: expected {', '.join(RECIPES)} or a YAML file.")
