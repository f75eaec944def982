"""Settings of ``medseg train --task promptable``."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medseg.config import Config
from medseg.errors import ConfigError
from medseg.prompt.simulate import BOX_JITTER, CLICK_JITTER


class LoraConfig(Config):
    """Adapters in the image encoder.

    Attributes
    ----------
    rank : int
        0 leaves the encoder as it is: slices are then encoded once, before training.
    alpha : float
        A change is multiplied by `alpha` / `rank`.
    targets : several str
        Own names of the linear layers that get one.
    """

    rank: int = Field(0, ge=0, le=256)
    alpha: float = Field(8.0, gt=0)
    targets: tuple[str, ...] = Field(("qkv", "proj"), min_length=1)


class StartConfig(Config):
    """How often a simulated user begins in which way; the numbers are weights.

    Attributes
    ----------
    box : float
        With a jittered box.
    click : float
        With one click, which the network answers by one mask or by three, of which the best one is trained.
    neighbour : float
        With the box around the object on the next slice and its mask there, as objects are followed.
    """

    box: float = Field(0.6, ge=0)
    click: float = Field(0.15, ge=0)
    neighbour: float = Field(0.25, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.box + self.click + self.neighbour <= 0:
            raise ValueError("all ways to begin have weight 0. Give one of box, click, neighbour a weight.")
        return self


class LossWeights(Config):
    """Weights of soft Dice, of cross entropy, and of the error of the IoU that the network expects.

    `focal_gamma` above 0 makes the cross entropy focal (Lin et al., ICCV 2017): SAM was trained with 2 and a
    weight of 20; MedSAM with 0 and 1.
    """

    dice: float = Field(1.0, ge=0)
    pixel: float = Field(1.0, ge=0)
    iou: float = Field(1.0, ge=0)
    focal_gamma: float = Field(0.0, ge=0)


class PromptableConfig(Config):
    """Everything that decides a fine-tuning besides the data.

    Attributes
    ----------
    base : str
        Asset whose weights are the start.
    size : int
        Side of the network's input in pixels, a multiple of 4 strides.
    precision : of the encoder; the decoder is always fp32
    prompt_encoder : bool
        Train what reads prompts too, not only the mask decoder.
    lora : LoraConfig
    labels : several str
        Names of labels to point at; none: all.
    objects : a label on a slice is one object, or each of its components is
    axis : across which slices are taken; auto: the axis of the thickest ones
    window : as for ``medseg prompt``
    channel : int, optional
        Of images with several.
    slices_per_case : int
        Drawn from those that hold an object.
    views : what the network sees: a crop around the object as when it is followed, the whole slice, or both
    least_voxels : int
        Smaller objects on a slice are left out.
    steps, batch_size : int
    start : StartConfig
    box_jitter : float
        Part of a box's side by which sides are moved.
    click_jitter_mm : float
    clicks : int
        Most corrective clicks, each into the largest error of the network's last answer.
    click_share : float
        Of steps that have any.
    lr, weight_decay, clip_norm : of AdamW
    warmup : part of the schedule in which the rate rises; then it falls as a cosine
    loss : LossWeights
    val_slices : slices a held-out case that are measured
    val_clicks : clicks after the box that are measured
    checkpoint_seconds : time between checkpoints
    """

    base: str = "mobile-sam"
    size: int = Field(512, ge=32)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    prompt_encoder: bool = False
    lora: LoraConfig = LoraConfig()
    labels: tuple[str, ...] = ()
    objects: Literal["labels", "components"] = "labels"
    axis: Literal["auto"] | Annotated[int, Field(ge=0, le=2)] = "auto"
    window: str | tuple[float, float] = "auto"
    channel: int | None = Field(None, ge=0)
    slices_per_case: int = Field(4, ge=1)
    views: tuple[Literal["crop", "slice"], ...] = Field(("crop",), min_length=1)
    least_voxels: int = Field(8, ge=1)
    steps: int = Field(1500, ge=1)
    batch_size: int = Field(8, ge=1)
    start: StartConfig = StartConfig()
    box_jitter: float = Field(2 * BOX_JITTER, ge=0, le=0.5)
    click_jitter_mm: float = Field(CLICK_JITTER, ge=0)
    clicks: int = Field(3, ge=0, le=20)
    click_share: float = Field(0.5, ge=0, le=1)
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    loss: LossWeights = LossWeights()
    val_slices: int = Field(4, ge=1)
    val_clicks: int = Field(3, ge=0)
    checkpoint_seconds: float = Field(60.0, gt=0)
    seed: int = Field(1234, ge=0)
    threads: int = Field(0, ge=0)


def load_promptable(recipe: str | None, overrides: tuple[str, ...] = ()) -> PromptableConfig:
    """Return the default recipe, or one from a YAML file, with dotted overrides applied.

    Raises
    ------
    ConfigError
        No such file, or a key is unknown.
    """
    if recipe is None or recipe == "promptable":
        return PromptableConfig().with_overrides(overrides, "recipe promptable")
    if not Path(recipe).is_file():
        raise ConfigError(f"recipe {recipe!r}: expected promptable or a YAML file.")
    return PromptableConfig.load(recipe, overrides)
