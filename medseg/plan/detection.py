"""What a detector is, as values: anchors, proposals, heads, and how its results are picked.

Lengths are voxels of the network's grid, a number a network axis. The defaults for planes are those of the
two papers; those for volumes follow the medical detection toolkit (Jaeger et al., Retina U-Net, ML4H 2019).
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from medseg.config import Config
from medseg.errors import ConfigError, PlanError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, le=1)]


class AnchorFit(Config):
    """How well the planned anchors cover the objects of the training set.

    Attributes
    ----------
    boxes : int
        Objects that were fitted.
    mean_iou, iou_percentile_5 : float, optional
        Of the best overlap of every object with an anchor of its centre; None where defaults are used.
    note : str
        What a reader of the plan should know.
    """

    boxes: int = Field(ge=0)
    mean_iou: Part | None = None
    iou_percentile_5: Part | None = None
    note: str = ""


class ProposalSettings(Config):
    """The region proposal network (Ren et al., Faster R-CNN, NeurIPS 2015).

    Attributes
    ----------
    matcher : by the thresholds `high` and `low`, or by each object's own ("atss": Zhang et al., CVPR 2020)
    high, low : IoU from which an anchor is an object, and below which it is background
    sampler : negatives at random, or among those taken most for objects ("hard")
    samples, positive_fraction : anchors an image and step, and the most of them that are objects
    candidates_train, candidates_test : best anchors a level that are looked at
    proposals_train, proposals_test : boxes an image that go on to the heads
    nms : IoU above which the worse of two proposals is dropped
    """

    matcher: Literal["iou", "atss"] = "iou"
    high: Part = 0.7
    low: Part = 0.3
    sampler: Literal["random", "hard"] = "random"
    samples: Count = 256
    positive_fraction: Part = 0.5
    candidates_train: Count = 2000
    candidates_test: Count = 1000
    proposals_train: Count = 2000
    proposals_test: Count = 1000
    nms: Part = 0.7


class HeadSettings(Config):
    """Box, mask and landmark heads on regions of interest (He et al., Mask R-CNN, ICCV 2017).

    Attributes
    ----------
    high, low : IoU from which a region is an object, and below which it is background
    samples, positive_fraction : regions an image and step, and the most of them that are objects
    box_weight : of the loss of boxes, which grows with their numbers: four in planes, six in volumes
    box_cells : of the features that classes and boxes are read from
    width : of the two fully connected layers
    mask_cells : of the features of the mask head; masks have twice as many
    mask_channels, mask_convs : of the mask head
    landmarks : points an object that are found by a head of their own; 0 for none
    """

    high: Part = 0.5
    low: Part = 0.5
    samples: Count = 512
    positive_fraction: Part = 0.25
    box_weight: Positive = 1.0
    box_cells: tuple[Count, ...] = (7, 7)
    width: Count = 1024
    mask_cells: tuple[Count, ...] = (14, 14)
    mask_channels: Count = 256
    mask_convs: Count = 4
    landmarks: int = Field(0, ge=0)


class FindSettings(Config):
    """Which detections are kept.

    Attributes
    ----------
    score : least probability
    nms : IoU above which the worse of two objects of a class is dropped, within a tile
    cluster : IoU above which boxes of several tiles are one object
    least_side : boxes with a shorter side are left out
    detections : most objects an image, or tile; whether the limit was met is reported
    mask : least probability of a voxel
    """

    score: Part = 0.05
    nms: Part = 0.5
    cluster: Part = 0.5
    least_side: float = Field(0.0, ge=0)
    detections: Count = 1000
    mask: Part = 0.5


class DetectorChoices(Config):
    """What a recipe decides about a detector itself; what it leaves out is planned.

    Attributes
    ----------
    channels : images of another number of channels are brought to it: grey is repeated, colour averaged
    hold_out, hold_out_seed : cases that are drawn by the seed and neither trained on nor validated with
    preset : of the planner
    patch_size : voxels an axis
    features : of the encoder's stages, finest first; as many as there are names the stages
    finest_stage, pyramid_channels : as in :class:`Detection`
    proposals, heads, find : values of these settings, by name
    """

    channels: Literal[1, 3] | None = None
    hold_out: int = Field(0, ge=0)
    hold_out_seed: int = Field(0, ge=0)
    preset: str | None = None
    patch_size: tuple[Count, ...] | None = None
    features: tuple[Count, ...] | None = None
    finest_stage: int | None = Field(None, ge=0)
    pyramid_channels: Count | None = None
    proposals: dict[str, Any] = Field(default_factory=dict)
    heads: dict[str, Any] = Field(default_factory=dict)
    find: dict[str, Any] = Field(default_factory=dict)


class Detection(Config):
    """A Mask R-CNN beside the encoder that the configuration's architecture describes.

    Attributes
    ----------
    objects : what one object of a label map is: every value ("values"), or every connected component of a
        label ("components")
    n_classes : kinds of objects
    finest_stage : of the encoder's stages, the finest that objects are looked for on; all coarser ones count
    pyramid_channels : features a level
    extra_level : one level more, of half the size, where objects are proposed only
    anchors : of each level, the extra one too, the sizes of anchors around a cell
    anchor_fit : how well they cover the training objects
    least_voxels : objects of fewer voxels in a patch are not learnt
    proposals, heads, find : see there
    """

    error: ClassVar[type[ConfigError]] = PlanError

    objects: Literal["values", "components"] = "components"
    n_classes: Count = 1
    finest_stage: int = Field(2, ge=0)
    pyramid_channels: Count = 256
    extra_level: bool = True
    anchors: tuple[tuple[tuple[Positive, ...], ...], ...] = Field(min_length=1)
    anchor_fit: AnchorFit | None = None
    least_voxels: Count = 1
    proposals: ProposalSettings = ProposalSettings()
    heads: HeadSettings = HeadSettings()
    find: FindSettings = FindSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({len(level) for level in self.anchors}) != 1 or not self.anchors[0]:
            raise ValueError("every level needs the same number of anchors, at least one")
        axes = {len(size) for level in self.anchors for size in level}
        axes |= {len(self.heads.box_cells), len(self.heads.mask_cells)}
        if len(axes) != 1:
            raise ValueError("anchors, heads.box_cells and heads.mask_cells need one number an axis each")
        return self

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.anchors[0][0])

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Cells of a mask, an axis."""
        return tuple(2 * cells for cells in self.heads.mask_cells)
