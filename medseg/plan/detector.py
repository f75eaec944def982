"""From a data set of images and objects to the plan of a detector."""

import logging
from typing import TYPE_CHECKING

import numpy as np

from medseg.errors import DatasetError, PlanError
from medseg.geometry.boxes import label_boxes
from medseg.log import progress
from medseg.plan.anchors import plan_anchors
from medseg.plan.detection import (
    Detection,
    DetectorChoices,
    FindSettings,
    HeadSettings,
    ProposalSettings,
)
from medseg.plan.objects import ObjectKind, check_labels, find_kind, read_objects
from medseg.plan.planner import make_plan
from medseg.plan.schema import Architecture, Configuration, Plan, Recipe
from medseg.types import FloatArray, PathLike

if TYPE_CHECKING:
    from medseg.io import Case, Dataset

logger = logging.getLogger("medseg")

# Nothing is decided by a recipe.
PLANNED = DetectorChoices()

# Small objects are at least this many strides of the finest level, which is the second or third stage; in
# volumes fewer, for the second has eight times as many anchors, by far the most of the memory.
SIDE_PER_STRIDE = {2: 3.0, 3: 2.0}
SMALL_PERCENTILE = 25
# FPN's number of levels (P2 to P5).
LEVELS = 4
# The medical detection toolkit takes the mean over the numbers of a box; summed, the loss of small lesions,
# whose sides are uncertain by a part of them, drowns that of their class.
MEAN_OF_SIX = round(1 / 6, 3)
# Widths and numbers by dimensions and recipe: the papers' on a GPU (Mask R-CNN's in planes, those of the
# medical detection toolkit in volumes, with more regions as a GPU has memory for them today); on a CPU what
# two cores train in minutes.
PROPOSALS: dict[tuple[int, Recipe], ProposalSettings] = {
    (2, "nnunet"): ProposalSettings(),
    (2, "cpu"): ProposalSettings(candidates_train=500, proposals_train=300, proposals_test=600),
    (3, "nnunet"): ProposalSettings(
        low=0.1,
        candidates_train=6000,
        candidates_test=6000,
        proposals_train=500,
        proposals_test=500,
    ),
    (3, "cpu"): ProposalSettings(
        high=0.5, low=0.1, samples=128, candidates_train=400, proposals_train=150, proposals_test=200
    ),
}
HEADS: dict[tuple[int, Recipe], HeadSettings] = {
    (2, "nnunet"): HeadSettings(),
    (2, "cpu"): HeadSettings(samples=96, positive_fraction=0.5, width=256, mask_channels=48, mask_convs=3),
    (3, "nnunet"): HeadSettings(
        high=0.3,
        low=0.1,
        samples=64,
        positive_fraction=0.5,
        box_weight=MEAN_OF_SIX,
        box_cells=(7, 7, 7),
        mask_cells=(14, 14, 14),
        mask_channels=128,
    ),
    (3, "cpu"): HeadSettings(
        high=0.3,
        low=0.1,
        samples=24,
        positive_fraction=0.5,
        box_weight=MEAN_OF_SIX,
        box_cells=(5, 5, 5),
        width=256,
        mask_cells=(7, 7, 7),
        mask_channels=24,
        mask_convs=3,
    ),
}
PYRAMID: dict[tuple[int, Recipe], int] = {
    (2, "nnunet"): 256,
    (2, "cpu"): 64,
    (3, "nnunet"): 128,
    (3, "cpu"): 32,
}
# Sides of anchors an axis (nnDetection: three); every anchor of a volume is matched at every step.
SIDES: dict[Recipe, int] = {"nnunet": 3, "cpu": 2}
# Images a step: detectors need more time and memory an image than the segmentations that were planned.
BATCH: dict[tuple[int, Recipe], int] = {(2, "nnunet"): 16, (2, "cpu"): 4, (3, "nnunet"): 4, (3, "cpu"): 2}
# Cells along the short axis of flat objects (medical detection toolkit: 7 x 7 x 3, masks 14 x 14 x 5).
FLAT_BOX_CELLS, FLAT_MASK_CELLS = 3, 5
# Objects of which an axis is this much shorter than the others have flatter masks.
FLAT = 0.5


def plan_detection(
    dataset: "Dataset",
    preset: PathLike | None = None,
    configuration: str | None = None,
    kind: ObjectKind | None = None,
    choices: DetectorChoices = PLANNED,
) -> Plan:
    """Decide everything about a detector: the segmentation's plan, with anchors and heads.

    Parameters
    ----------
    dataset : opened
    preset : as for `medseg.plan.make_plan`
    configuration : which of the plan's; 3d_fullres where there is one, else 2d
    kind : what one object of a label map is; by default found out from the label maps
    choices : what is not to be planned

    Raises
    ------
    DatasetError
        There is no object.
    PlanError
        Labels overlap or leave voxels out, or the network has no encoder for it.
    """
    check_labels(dataset.labels)
    plan = make_plan(dataset, preset or choices.preset)
    name = configuration or plan.default_configuration
    settings = plan.configuration(name)
    if settings.previous_stage or settings.architecture.network not in ("unet", "resenc-unet"):
        raise PlanError(
            f"{name} of the plan for {plan.dataset_name}: a detector needs a single stage with a U-Net's "
            "encoder. Choose 2d or 3d_fullres, and a preset with one."
        )
    kind = kind or find_kind(dataset)
    sizes = object_sizes(dataset, plan, settings, kind)
    if not len(sizes):
        raise DatasetError(f"{dataset.root}: no label map holds an object. Check the label files.")
    settings = _choose(settings, choices)
    changed = make_detector(settings, sizes, len(plan.labels.foreground), kind, plan.recipe, choices)
    return plan.replace(configurations={name: changed.to_dict()})


def object_sizes(dataset: "Dataset", plan: Plan, settings: Configuration, kind: ObjectKind) -> FloatArray:
    """Return the sides (k, d) of all training objects' boxes in voxels of the network, network order."""
    cases = [case for case in dataset.training if case.label is not None]
    found = [_case_sizes(case, plan, settings, kind) for case in progress(cases, "objects")]
    return np.concatenate([np.zeros((0, settings.dimensions)), *found])


def _case_sizes(case: "Case", plan: Plan, settings: Configuration, kind: ObjectKind) -> FloatArray:
    from medseg.geometry.orient import reads_as_ras, to_ras

    volume = read_objects(case, plan.labels, kind)
    if reads_as_ras(plan.reader):
        volume = to_ras(volume)
    array = volume.array[0].transpose([2 - axis for axis in plan.transpose_forward])
    spacing = np.array([volume.spacing[2 - axis] for axis in plan.transpose_forward])
    dims = settings.dimensions
    maps = [array] if dims == 3 else list(array)
    boxes = np.concatenate([label_boxes(each)[1] for each in maps])
    scale = spacing[3 - dims :] / np.array(settings.spacing)
    sizes: FloatArray = (boxes[:, dims:] - boxes[:, :dims]).astype(float) * scale
    return sizes


def make_detector(
    settings: Configuration,
    sizes: FloatArray,
    n_classes: int,
    kind: ObjectKind,
    recipe: Recipe,
    choices: DetectorChoices = PLANNED,
) -> Configuration:
    """Return a configuration with a detector for objects of `sizes` (k, d), in voxels of the network."""
    dims, architecture = settings.dimensions, settings.architecture
    finest = _finest_stage(architecture, sizes) if choices.finest_stage is None else choices.finest_stage
    architecture = _first_stages(architecture, finest + LEVELS)
    strides = np.cumprod(np.array(architecture.strides), axis=0)[finest:]
    strides = np.concatenate([strides, 2 * strides[-1:]])
    anchors, fit = plan_anchors(sizes, strides.tolist(), SIDES[recipe])
    typical = np.median(sizes, axis=0)
    heads = HEADS[dims, recipe]
    if dims == 3 and typical[0] < FLAT * typical[1:].mean():
        box, mask = heads.box_cells[1:], heads.mask_cells[1:]
        heads = heads.replace(box_cells=(FLAT_BOX_CELLS, *box), mask_cells=(FLAT_MASK_CELLS, *mask))
    detection = Detection(
        objects=kind,
        n_classes=n_classes,
        finest_stage=finest,
        pyramid_channels=choices.pyramid_channels or PYRAMID[dims, recipe],
        anchors=anchors,
        anchor_fit=fit,
        proposals=PROPOSALS[dims, recipe].replace(**choices.proposals),
        heads=heads.replace(**choices.heads),
        find=FindSettings().replace(**choices.find),
    )
    changes = {
        "architecture": architecture.to_dict(),
        "detection": detection.to_dict(),
        "order_seg": 0,
        "batch_size": min(settings.batch_size, BATCH[dims, recipe]),
    }
    return settings.replace(**changes)


def _choose(settings: Configuration, choices: DetectorChoices) -> Configuration:
    """Return a configuration with the patch and the widths that a recipe chooses.

    Raises
    ------
    PlanError
        The network has fewer stages, or cannot halve the patch that often.
    """
    architecture, patch = settings.architecture, choices.patch_size or settings.patch_size
    if choices.features is not None:
        if len(choices.features) > architecture.n_stages:
            raise PlanError(
                f"features {list(choices.features)}: the planned network has {architecture.n_stages} stages. "
                "Give no more numbers."
            )
        architecture = _first_stages(architecture, len(choices.features))
        architecture = architecture.replace(features_per_stage=choices.features)
    divisor = architecture.divisor
    if len(patch) != len(divisor) or any(n % d for n, d in zip(patch, divisor, strict=True)):
        raise PlanError(f"patch_size {list(patch)}: the network needs multiples of {list(divisor)}.")
    return settings.replace(architecture=architecture.to_dict(), patch_size=patch)


def _finest_stage(architecture: Architecture, sizes: FloatArray) -> int:
    """Return the stage whose strides suit the smaller objects: the second or the third."""
    side = np.percentile(sizes[:, -2:].mean(1), SMALL_PERCENTILE)
    strides = np.cumprod(np.array(architecture.strides), axis=0)[:, -2:].mean(1)
    last = architecture.n_stages - 1
    enough = SIDE_PER_STRIDE[architecture.dimensions]
    return min(last, 2 if last >= 2 and strides[2] * enough <= side else 1)


def _first_stages(architecture: Architecture, count: int) -> Architecture:
    count = min(count, architecture.n_stages)
    return architecture.replace(
        features_per_stage=architecture.features_per_stage[:count],
        strides=architecture.strides[:count],
        kernel_sizes=architecture.kernel_sizes[:count],
        blocks_per_stage=architecture.blocks_per_stage[:count],
        decoder_convs_per_stage=architecture.decoder_convs_per_stage[: count - 1],
    )
