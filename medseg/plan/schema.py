"""The plan: every decision of a pipeline as plain, readable values.

Numbers that belong to axes (spacing, shapes, patch, strides, kernels) are in *network order*: the
source array ``(i, j, k)`` reversed to ``(k, j, i)`` as nnU-Net's readers deliver it, then permuted by
``transpose_forward``. A ``2d`` configuration leaves out the first network axis.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.config import Config
from medseg.errors import ConfigError, PlanError
from medseg.labels import LabelSet
from medseg.plan.detection import Detection

NetworkName = Literal["unet", "resenc-unet", "segresnet", "swin-unetr"]
Normalization = Literal["ct", "zscore", "none", "rescale-0-1", "rgb-0-1"]
Preset = Literal["nnunet", "resenc", "resenc-m", "resenc-l", "resenc-xl", "cpu"]
Recipe = Literal["nnunet", "cpu"]

Positive = Annotated[float, Field(gt=0)]


class Architecture(Config):
    """A network, as values; `medseg.nets.NETS` turns it into modules.

    Attributes
    ----------
    features_per_stage : one number a resolution, finest first
    strides, kernel_sizes : per stage, one number a network axis
    blocks_per_stage : convolutions (plain) or residual blocks (resenc) of each encoder stage
    decoder_convs_per_stage : convolutions of each decoder stage, deepest last resolution excluded
    """

    error: ClassVar[type[ConfigError]] = PlanError

    network: NetworkName = "unet"
    features_per_stage: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    blocks_per_stage: tuple[int, ...]
    decoder_convs_per_stage: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = self.n_stages
        lengths = (len(self.strides), len(self.kernel_sizes), len(self.blocks_per_stage))
        if lengths != (n, n, n) or len(self.decoder_convs_per_stage) != n - 1:
            raise ValueError(
                f"{n} feature numbers need {n} strides, kernels, blocks and {n - 1} decoder stages"
            )
        if n == 0 or len({len(axes) for axes in (*self.strides, *self.kernel_sizes)}) != 1:
            raise ValueError("every stage needs a stride and a kernel of one number an axis")
        if min(map(min, (*self.strides, *self.kernel_sizes, self.features_per_stage))) < 1:
            raise ValueError("strides, kernels and features must be at least 1")
        return self

    @property
    def n_stages(self) -> int:
        """Number of resolutions."""
        return len(self.features_per_stage)

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.strides[0])

    @property
    def divisor(self) -> tuple[int, ...]:
        """Product of the strides along each axis, of which a patch must be a multiple."""
        return tuple(math.prod(strides) for strides in zip(*self.strides, strict=True))


class ChannelStats(Config):
    """Foreground intensities of one channel over the training set (fingerprint)."""

    max: float
    mean: float
    median: float
    min: float
    percentile_00_5: float
    percentile_99_5: float
    std: float


class Fingerprint(Config):
    """What a dataset looks like: nnU-Net's ``dataset_fingerprint.json``, axes in reader order (k, j, i)."""

    foreground_intensity_properties_per_channel: dict[str, ChannelStats]
    median_relative_size_after_cropping: float
    shapes_after_crop: tuple[tuple[int, ...], ...]
    spacings: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.spacings or len(self.spacings) != len(self.shapes_after_crop):
            raise ValueError("one spacing and one shape a case are needed, and at least one case")
        if any(len(values) != 3 for values in (*self.spacings, *self.shapes_after_crop)):
            raise ValueError("spacings and shapes need three numbers (k, j, i); a 2D image has k = 1")
        if min(map(min, self.spacings)) <= 0 or min(map(min, self.shapes_after_crop)) < 1:
            raise ValueError("spacings must be above 0 and shapes at least 1")
        return self


class Configuration(Config):
    """One way to train on the dataset: 2d, 3d_lowres, 3d_fullres or 3d_cascade_fullres.

    Attributes
    ----------
    spacing : target voxel size, in the unit of the images
    patch_size : voxels seen by the network
    batch_size : samples a step
    median_shape : median size of the cases at `spacing`, in voxels (may end in .5)
    normalization, use_mask_for_norm : one a channel
    batch_dice : pool Dice over the batch instead of each sample
    previous_stage : configuration whose result is fed in as extra channels (cascade)
    next_stage : the cascade that continues this one
    detection : a detector instead of a segmentation; it has the architecture's encoder
    """

    error: ClassVar[type[ConfigError]] = PlanError

    spacing: tuple[Positive, ...]
    patch_size: tuple[Annotated[int, Field(ge=1)], ...]
    batch_size: int = Field(ge=1)
    median_shape: tuple[float, ...]
    normalization: tuple[Normalization, ...]
    use_mask_for_norm: tuple[bool, ...]
    batch_dice: bool
    architecture: Architecture
    order_data: int = Field(default=3, ge=0, le=5)
    order_seg: int = Field(default=1, ge=0, le=5)
    order_probabilities: int = Field(default=1, ge=0, le=5)
    order_z: int = Field(default=0, ge=0, le=5)
    previous_stage: str | None = None
    next_stage: str | None = None
    detection: Detection | None = None

    @model_serializer(mode="wrap")
    def _leave_out_detection(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write a detector only where there is one: plans of segmentations stay as they are."""
        values: dict[str, Any] = serialize(self)
        if self.detection is None:
            values.pop("detection", None)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = self.architecture.dimensions
        if self.detection is not None:
            check_detection(self.detection, self.architecture)
        lengths = {
            "spacing": len(self.spacing),
            "patch_size": len(self.patch_size),
            "median_shape": len(self.median_shape),
        }
        wrong = [f"{name} has {length}" for name, length in lengths.items() if length != n]
        if wrong:
            raise ValueError(f"the network has {n} axes, but {', '.join(wrong)}. Give one number an axis.")
        if len(self.normalization) != len(self.use_mask_for_norm):
            raise ValueError("'normalization' and 'use_mask_for_norm' need one entry a channel.")
        divisor = self.architecture.divisor
        fitting = tuple(math.ceil(size / by) * by for size, by in zip(self.patch_size, divisor, strict=True))
        if fitting != self.patch_size:
            raise ValueError(
                f"patch {self.patch_size} must be divisible by {divisor}, the product of its strides. "
                f"Use {fitting}."
            )
        return self

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.patch_size)


def check_detection(detection: Detection, architecture: Architecture) -> None:
    """Refuse a detector that does not fit its encoder (ValueError, for validators)."""
    levels = architecture.n_stages - detection.finest_stage
    if levels < 1:
        raise ValueError(
            f"'detection.finest_stage' is {detection.finest_stage}; there are {architecture.n_stages} stages."
        )
    wanted = levels + detection.extra_level
    if len(detection.anchors) != wanted or detection.dimensions != architecture.dimensions:
        raise ValueError(
            f"'detection.anchors' has {len(detection.anchors)} levels of {detection.dimensions} axes; the "
            f"encoder has {wanted} of {architecture.dimensions}. Plan the detector again."
        )


class PlanOptions(Config):
    """What a person asked of the planner beyond the preset; all empty by default.

    Attributes
    ----------
    gpu_memory_gb : memory of the GPU; nnU-Net's ``-gpu_memory_target``
    ram_gb : host memory that training may use
    minutes : training time
    max_batch_size : no batch is larger
    target_spacing : of 3d_fullres in reader order (k, j, i); nnU-Net's ``-overwrite_target_spacing``
    suppress_transpose : leave the axes in reader order
    rules : changes to the preset's :class:`~medseg.plan.presets.Rules`, by name
    """

    gpu_memory_gb: Positive | None = None
    ram_gb: Positive | None = None
    minutes: Positive | None = None
    max_batch_size: Annotated[int, Field(ge=1)] | None = None
    target_spacing: tuple[Positive, Positive, Positive] | None = None
    suppress_transpose: bool = False
    rules: dict[str, Any] = Field(default_factory=dict)

    @property
    def departs_from_nnunet(self) -> bool:
        """Whether a budget is set that nnU-Net does not know."""
        return (self.ram_gb, self.minutes, self.max_batch_size) != (None, None, None)


class Plan(Config):
    """All decisions for one dataset.

    Attributes
    ----------
    dataset_name, plans_name : names, the latter as nnU-Net would call it
    preset : which planner made it
    planner : class name that nnU-Net records, where it is not the preset's own
    options : what was asked of the planner
    recipe : the training recipe that goes with it
    channels : channel names in order
    labels : label set
    file_ending : of the dataset's images
    reader : nnU-Net's reader class name, kept for export
    transpose_forward, transpose_backward : permutation of reader order (k, j, i) and its inverse
    original_median_spacing, original_median_shape : for display, network order
    intensity : fingerprint statistics per channel, read by CT normalisation
    configurations : by name
    """

    error: ClassVar[type[ConfigError]] = PlanError

    schema_version: Literal[1] = 1
    dataset_name: str
    plans_name: str
    preset: Preset
    planner: str | None = None
    options: PlanOptions = PlanOptions()
    recipe: Recipe
    channels: tuple[str, ...]
    labels: LabelSet
    file_ending: str
    reader: str
    transpose_forward: tuple[int, int, int]
    transpose_backward: tuple[int, int, int]
    original_median_spacing: tuple[float, ...]
    original_median_shape: tuple[int, ...]
    intensity: dict[str, ChannelStats]
    configurations: dict[str, Configuration] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        forward, backward = self.transpose_forward, self.transpose_backward
        if (
            sorted(forward) != [0, 1, 2]
            or sorted(backward) != [0, 1, 2]
            or [forward[b] for b in backward] != [0, 1, 2]
        ):
            raise ValueError(
                "'transpose_forward' must be an order of 0, 1, 2, and 'transpose_backward' its inverse."
            )
        for name, configuration in self.configurations.items():
            if len(configuration.normalization) != len(self.channels):
                raise ValueError(
                    f"configuration {name}: {len(configuration.normalization)} normalizations for "
                    f"{len(self.channels)} channels. Give one a channel."
                )
        return self

    def configuration(self, name: str) -> Configuration:
        """Return a configuration by name.

        Raises
        ------
        PlanError
            There is none of that name.
        """
        if name not in self.configurations:
            raise PlanError(
                f"plan of {self.dataset_name}: no configuration {name!r}. "
                f"It has {', '.join(self.configurations)}."
            )
        return self.configurations[name]

    @property
    def default_configuration(self) -> str:
        """3d_fullres where it exists, else 2d."""
        return "3d_fullres" if "3d_fullres" in self.configurations else next(iter(self.configurations))
