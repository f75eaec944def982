"""Settings of ``medseg train --task centre-offset``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medseg.config import Config
from medseg.errors import ConfigError
from medseg.plan.schema import Architecture
from medseg.train.config import OptimizerConfig, Ranged, ScheduleConfig, TrainConfig


class CentreLoss(Config):
    """Weights of the three terms.

    A network that says nothing has a semantic term of about 1.2, a distance term of 0.2 to 0.3 and an offset
    term of 0.4; with these weights all begin near 1.2 (measured on synthetic cells in 2D and 3D).

    Attributes
    ----------
    semantic, distance, offset : float
    hard_share : float
        Part of the voxels, those of largest cross entropy, that count in it.
    """

    semantic: float = Field(1.0, ge=0)
    distance: float = Field(5.0, ge=0)
    offset: float = Field(3.0, ge=0)
    hard_share: float = Field(1.0, gt=0, le=1)


class CentreAugment(Config):
    """What is done to a patch; intensities are 0 to 1 between the image's extreme percentiles.

    Attributes
    ----------
    rotate : float
        Probability of a rotation by any angle, about every axis.
    zoom : float
        Log-uniform factor of size, from 1/zoom to zoom, on top of the case's own.
    stretch : float
        The same for single axes.
    mirror : bool
        Flip along every axis at random.
    gamma, contrast, brightness, blur, noise, shade : Ranged
        Exponent (log-uniform); factor about the mean; shift; Gaussian blur in voxels; deviation of the noise;
        strength of a slow change of brightness.
    speckle : Ranged
        Noise that grows with the root of brightness, as photons do.
    dim : Ranged
        Each object is made dimmer (or darker) by a factor of its own, down to `low`.
    invert : float
        Probability of swapping bright and dark.
    grey : float
        Probability of a colour image to lose its colours.
    recolour : float
        Probability of a colour image to have its channels scaled and mixed.
    """

    rotate: float = Field(0.7, ge=0, le=1)
    zoom: float = Field(1.4, ge=1)
    stretch: float = Field(1.15, ge=1)
    mirror: bool = True
    gamma: Ranged = Ranged(p=0.6, low=0.5, high=2.0)
    contrast: Ranged = Ranged(p=0.5, low=0.5, high=1.5)
    brightness: Ranged = Ranged(p=0.3, low=-0.2, high=0.2)
    blur: Ranged = Ranged(p=0.3, low=0.3, high=1.5)
    noise: Ranged = Ranged(p=0.5, low=0.0, high=0.1)
    speckle: Ranged = Ranged(p=0.2, low=0.0, high=0.15)
    shade: Ranged = Ranged(p=0.2, low=0.0, high=0.3)
    dim: Ranged = Ranged(p=0.3, low=0.3, high=1.0)
    invert: float = Field(0.15, ge=0, le=1)
    grey: float = Field(0.3, ge=0, le=1)
    recolour: float = Field(0.5, ge=0, le=1)


class SyntheticConfig(Config):
    """Scenes of touching cells that are drawn as training goes; lengths in voxels of the network.

    Attributes
    ----------
    diameter : (float, float)
        Range of the mean size of a scene's cells.
    spread : float
        Log-normal deviation of sizes in a scene.
    crowd : (float, float)
        Range of cells a scene, in cell volumes a scene volume; log-uniform.
    elongation : float
        Largest ratio of the axes of a cell.
    blur : (float, float)
        Range of the point spread in voxels; along the first axis up to three times that.
    noise : (float, float)
        Range of the noise, in parts of the contrast between cells and background.
    """

    diameter: tuple[float, float] = (9.0, 22.0)
    spread: float = Field(0.25, ge=0)
    crowd: tuple[float, float] = (0.05, 1.2)
    elongation: float = Field(2.0, ge=1)
    blur: tuple[float, float] = (0.3, 1.8)
    noise: tuple[float, float] = (0.02, 1.0)


class CentreConfig(Config):
    """Everything that decides a training of a centre-offset network besides the data.

    Attributes
    ----------
    preset : of the planner, whose rules shape the network
    architecture : the network itself, in place of the planned one
    channels : of the input: 1, or 3 for colour (grey images are repeated); none: as the images have
    size_of : objects are brought to one size by the median of the "dataset", or of each "case"
    object_voxels : diameter in voxels that they are brought to
    patch_size : voxels of a training patch, a multiple of what the network needs; none: 128 in 2D, 48 in 3D
    percentiles : of each channel of an image, which become 0 and 1
    groups : cases by the channels of their images (1 or 3), with the share of patches drawn from them;
        none: by the number of cases
    hold_out : cases that are drawn by `hold_out_seed` and never trained on, in place of the folds; -1: all,
        where scenes are synthetic
    synthetic : draw scenes in place of the data set's images
    loss, augment : CentreLoss, CentreAugment
    train : loop, optimiser and schedule; its own losses and augmentations are not used
    """

    preset: str = "cpu"
    architecture: Architecture | None = None
    channels: Literal[1, 3] | None = None
    size_of: Literal["dataset", "case"] = "dataset"
    object_voxels: float = Field(20.0, ge=4)
    patch_size: tuple[Annotated[int, Field(ge=8)], ...] | None = None
    percentiles: tuple[float, float] = (0.1, 99.9)
    groups: dict[Literal["grey", "colour"], float] | None = None
    hold_out: int = Field(0, ge=-1)
    hold_out_seed: int = Field(0, ge=0)
    synthetic: SyntheticConfig | None = None
    loss: CentreLoss = CentreLoss()
    augment: CentreAugment = CentreAugment()
    train: TrainConfig = TrainConfig(
        epochs=20,
        steps_per_epoch=100,
        val_samples=32,
        batch_size=8,
        optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=1e-2),
        schedule=ScheduleConfig(name="cosine", warmup=0.03),
        ema_decay=0.99,
        loader_threads=1,
        checkpoint_seconds=60.0,
        final_mirroring=False,
        oversample_foreground=0.8,
    )


def load_centre(recipe: str | None, overrides: tuple[str, ...] = ()) -> CentreConfig:
    """Return the default recipe, or one from a YAML file, with dotted overrides applied.

    Raises
    ------
    ConfigError
        No such file, or a key is unknown.
    """
    if recipe is None or recipe == "centre-offset":
        return CentreConfig().with_overrides(overrides, "recipe centre-offset")
    if not Path(recipe).is_file():
        raise ConfigError(f"recipe {recipe!r}: expected centre-offset or a YAML file.")
    return CentreConfig.load(recipe, overrides)
