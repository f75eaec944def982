"""Tiny models built by code: the plan, bundles with random weights, and images for them."""

import numpy as np
import torch

from medseg.bundle import Bundle
from medseg.labels import LabelSet
from medseg.nets import build_network
from medseg.plan.schema import Architecture, ChannelStats, Configuration, Plan
from medseg.volume import Geometry, Volume

LABELS = {"background": 0, "kidney": 1, "cyst": 2}
STATS = ChannelStats(max=9, mean=1, median=1, min=0, percentile_00_5=0, percentile_99_5=8, std=2)


def tiny_plan(
    transpose=(0, 1, 2), spacing=(1.0, 1.0, 1.0), patch=(8, 8, 8), labels=None, channels=("MR",), **changes
):
    dims = len(patch)
    architecture = Architecture(
        features_per_stage=(4, 8),
        strides=((1,) * dims, (2,) * dims),
        kernel_sizes=((3,) * dims,) * 2,
        blocks_per_stage=(1, 1),
        decoder_convs_per_stage=(1,),
    )
    full = Configuration(
        spacing=spacing[-dims:],
        patch_size=patch,
        batch_size=2,
        median_shape=(12.0,) * dims,
        normalization=("zscore",) * len(channels),
        use_mask_for_norm=(False,) * len(channels),
        batch_dice=False,
        architecture=architecture,
    )
    name = "3d_fullres" if dims == 3 else "2d"
    cascade = full.replace(previous_stage=name)
    return Plan(
        dataset_name="Dataset901_Tiny",
        plans_name="nnUNetPlans",
        preset="nnunet",
        recipe="nnunet",
        channels=channels,
        labels=labels or LabelSet.parse(LABELS),
        file_ending=".nii.gz",
        reader="NibabelIO",
        transpose_forward=transpose,
        transpose_backward=tuple(int(n) for n in np.argsort(transpose)),
        original_median_spacing=(1.0, 1.0, 1.0),
        original_median_shape=(12, 12, 12),
        intensity={str(k): STATS for k in range(len(channels))},
        configurations={name: full, "3d_cascade_fullres": cascade},
        **changes,
    )


def tiny_weights(plan, configuration="3d_fullres", seed=0):
    torch.manual_seed(seed)
    settings = plan.configuration(configuration)
    extra = len(plan.labels.foreground_values) if settings.previous_stage else 0
    network = build_network(settings.architecture, len(plan.channels) + extra, plan.labels.n_outputs)
    weights = network.state_dict()
    for name, value in weights.items():
        if name.startswith("decoder.seg_layers") and name.endswith("weight"):
            value -= value.mean(dim=1, keepdim=True)  # so that no class wins everywhere
    return weights


def tiny_bundle(configuration="3d_fullres", seed=0, folds=1, previous=None, card=None, **plan):
    plan = tiny_plan(**plan)
    weights = {str(k): tiny_weights(plan, configuration, seed + k) for k in range(folds)}
    return Bundle(
        plan,
        configuration,
        {name: (lambda value=value: value) for name, value in weights.items()},
        mirror_axes=tuple(range(plan.configuration(configuration).dimensions)),
        card=card or {"precision": "fp32"},
        previous=previous,
    )


def image(shape=(13, 11, 9), seed=0, channels=1, affine=None):
    """Noise on a rotated, anisotropic grid; a border of zeros is there to be cropped."""
    array = np.random.default_rng(seed).normal(5, 2, (channels, *shape)).astype(np.float32)
    array[:, :2] = 0
    array[:, :, -1:] = 0
    if affine is None:
        turn = np.array([[0.0, -1.0, 0.0], [0.8, 0.0, -0.6], [0.6, 0.0, 0.8]])
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag([0.8, 1.0, 1.4])
        affine[:3, 3] = (-20, 5, 3)
    return Volume(array, Geometry(shape, affine))
