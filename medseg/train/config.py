"""The training recipe as values. A variant is another set of values, never another class."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medseg.config import Config
from medseg.plan.detection import DetectorChoices


def _check_order(low: float, high: float) -> None:
    if low > high:
        raise ValueError(f"low {low} is above high {high}")


class Rotation(Config):
    """Rotation about every network axis; in-plane only where the patch is very anisotropic.

    Attributes
    ----------
    degrees : largest angle in 3D
    degrees_2d : largest angle in a plane; None is nnU-Net's rule: 180, or 15 for elongated 2D patches
    """

    p: float = Field(0.2, ge=0, le=1)
    degrees: float = Field(30.0, ge=0, le=180)
    degrees_2d: float | None = Field(None, ge=0, le=180)


class Scaling(Config):
    """One zoom factor for all axes."""

    p: float = Field(0.2, ge=0, le=1)
    low: float = Field(0.7, gt=0)
    high: float = Field(1.4, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_order(self.low, self.high)
        return self


class Elastic(Config):
    """Smooth random displacement, given by random shifts of control points `grid_voxels` apart."""

    p: float = Field(0.0, ge=0, le=1)
    grid_voxels: float = Field(12.0, gt=1)
    shift_voxels: float = Field(2.0, ge=0)


class Ranged(Config):
    """A transform with a probability per sample and a range for its one parameter."""

    p: float = Field(ge=0, le=1)
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_order(self.low, self.high)
        return self


class LowResolution(Ranged):
    """Nearest down, linear up; drawn per channel with `p_channel`."""

    p_channel: float = Field(0.5, ge=0, le=1)


class Blur(Ranged):
    """Gaussian blur; sigma in voxels, drawn per axis, per channel with `p_channel`."""

    p_channel: float = Field(0.5, ge=0, le=1)


class CascadeNoise(Config):
    """Errors added to the previous stage's labels (cascade only)."""

    p_morphology: float = Field(0.4, ge=0, le=1)
    p_label: float = Field(0.5, ge=0, le=1)
    max_radius: int = Field(8, ge=1)
    p_remove: float = Field(0.2, ge=0, le=1)
    max_fraction: float = Field(0.15, ge=0, le=1)


class AugmentConfig(Config):
    """Augmentations in the order they are applied; the defaults are nnU-Net 2.8.1's."""

    rotation: Rotation = Rotation()
    scaling: Scaling = Scaling()
    elastic: Elastic = Elastic()
    noise: Ranged = Ranged(p=0.1, low=0.0, high=0.1)
    blur: Blur = Blur(p=0.2, low=0.5, high=1.0)
    brightness: Ranged = Ranged(p=0.15, low=0.75, high=1.25)
    contrast: Ranged = Ranged(p=0.15, low=0.75, high=1.25)
    low_resolution: LowResolution = LowResolution(p=0.25, low=0.5, high=1.0)
    gamma_inverted: Ranged = Ranged(p=0.1, low=0.7, high=1.5)
    gamma: Ranged = Ranged(p=0.3, low=0.7, high=1.5)
    mirror: Literal["auto", "off"] | tuple[Annotated[int, Field(ge=0, le=2)], ...] = "auto"
    p_mirror: float = Field(0.5, ge=0, le=1)
    cascade: CascadeNoise = CascadeNoise()


class OptimizerConfig(Config):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(3e-5, ge=0)
    clip_norm: float = Field(12.0, gt=0)


class ScheduleConfig(Config):
    """Learning rate over the run: ``poly`` is lr * (1 - t)^power, ``cosine`` falls to zero."""

    name: Literal["poly", "cosine"] = "poly"
    power: float = Field(0.9, gt=0)
    warmup: float = Field(0.0, ge=0, lt=1)


class LossConfig(Config):
    """Cross entropy (BCE for regions) plus soft Dice, with deep supervision."""

    dice_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    smooth: float = Field(1e-5, ge=0)
    deep_supervision: bool = True


class TrainConfig(Config):
    """Everything that decides a training run besides the plan; the defaults are nnU-Net 2.8.1's.

    Attributes
    ----------
    epochs, steps_per_epoch : length of the schedule; an epoch ends with validation
    val_samples : validation patches an epoch
    batch_size : overrides the plan's
    oversample_foreground : share of each batch that is centred on a labelled voxel
    ema_decay : decay of the averaged weights that are validated and kept; 0 switches it off
    precision : auto is fp16 on CUDA, and on a CPU bf16 where the processor has it
    compile : auto compiles on CUDA only; on a CPU it did not pay (DECISIONS.md, 14)
    patience_epochs : stop when the best score is this old; 0 never stops early
    checkpoint_seconds : time between checkpoints (also one at every epoch's end)
    detector : what the recipe decides about a detector in the planner's place
    final_mirroring : average over mirrored copies in the final validation (and by default at prediction)
    """

    epochs: int = Field(1000, ge=1)
    steps_per_epoch: int = Field(250, ge=1)
    val_samples: int = Field(100, ge=0)
    batch_size: int | None = Field(None, ge=1)
    oversample_foreground: float = Field(0.33, ge=0, le=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    ema_decay: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = Field(1234, ge=0)
    threads: int = Field(0, ge=0)
    loader_threads: int = Field(2, ge=1)
    cache_gb: float = Field(2.0, ge=0)
    patience_epochs: int = Field(0, ge=0)
    checkpoint_seconds: float = Field(300.0, gt=0)
    final_mirroring: bool = True
    tensorboard: bool = False
    detector: DetectorChoices | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        return self.epochs * self.steps_per_epoch
