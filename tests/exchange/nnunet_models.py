"""nnU-Net models built by code: plans of every age, phantom cases, checkpoints as nnU-Net writes them."""

import copy
import json
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from medseg.exchange.nnunet import with_aliases
from medseg.nets import build_network
from medseg.plan import from_nnunet

STATS = {
    **{"max": 9.0, "mean": 1.0, "median": 1.0, "min": -3.0},
    **{"percentile_00_5": -2.0, "percentile_99_5": 6.0, "std": 2.0},
}
DATASET = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "left organ": 1, "lesion": 2},  # nnU-Net flips sides as well
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
REGIONS = {
    **DATASET,
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "lesion": [2], "ignore": 3},
    "regions_class_order": [1, 2],
}
LOWRES, FULLRES, CASCADE = "3d_lowres", "3d_fullres", "3d_cascade_fullres"


def configuration(
    spacing, patch, strides, masked=False, normalization="ZScoreNormalization", network="plain"
):
    """Return a configuration as nnU-Net 2.8.1 writes it, with a network of two resolutions."""
    dims = len(patch)
    resampling = {"order_z": 0, "force_separate_z": None}
    blocks = "n_conv_per_stage" if network == "plain" else "n_blocks_per_stage"
    name = "PlainConvUNet" if network == "plain" else "ResidualEncoderUNet"
    return {
        "data_identifier": "nnUNetPlans_any",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(n) for n in patch],
        "spacing": list(spacing),
        "normalization_schemes": [normalization],
        "use_mask_for_norm": [masked],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resampling},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resampling},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [8, 16],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 2,
                "strides": [[1] * dims, list(strides)],
                blocks: [1, 2],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }


def plans(low=(2.0, 2.0, 2.0), full=(1.2, 1.2, 1.2), strides=(2, 2, 2), transpose=(0, 1, 2), **settings):
    """Return plans with a low resolution, a full one, and the cascade of both."""
    return {
        "dataset_name": "Dataset900_Phantom",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [40, 40, 40],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(n) for n in np.argsort(transpose)],
        "configurations": {
            LOWRES: configuration(low, (16, 24, 16), strides, **settings) | {"next_stage": CASCADE},
            FULLRES: configuration(full, (16, 24, 32), strides, **settings),
            CASCADE: {"inherits_from": FULLRES, "previous_stage": LOWRES},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": STATS},
    }


def as_old_format(content):
    """Rewrite plans as nnU-Net 2.0 to 2.2 did: the network by class name, base and cap of its features."""
    old = copy.deepcopy(content)
    for values in old["configurations"].values():
        if "architecture" not in values:
            continue
        network = values.pop("architecture")
        settings = network["arch_kwargs"]
        values.update(
            UNet_class_name=network["network_class_name"].rsplit(".", 1)[-1],
            UNet_base_num_features=settings["features_per_stage"][0],
            unet_max_num_features=320,
            n_conv_per_stage_encoder=settings.get("n_conv_per_stage", settings.get("n_blocks_per_stage")),
            n_conv_per_stage_decoder=settings["n_conv_per_stage_decoder"],
            num_pool_per_axis=[1, 1, 1],
            pool_op_kernel_sizes=settings["strides"],
            conv_kernel_sizes=settings["kernel_sizes"],
        )
    return old


def write_descriptions(folder, content, dataset=DATASET):
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def random_weights(content, dataset, name, seed=0):
    """Return weights under all names that nnU-Net gives them."""
    torch.manual_seed(seed)
    plan = from_nnunet(content, dataset, name)
    settings = plan.configuration(name)
    extra = len(plan.labels.foreground_values) if settings.previous_stage else 0
    network = build_network(settings.architecture, len(plan.channels) + extra, plan.labels.n_outputs)
    return with_aliases(network.state_dict())


def checkpoint(weights, name=FULLRES, trainer="nnUNetTrainer", mirror_axes=(0, 1, 2), **more):
    """Return the content of a checkpoint of nnU-Net 2.8.1."""
    return {
        "network_weights": weights,
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.01}],
        },
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.1)]},
        "_best_ema": np.float32(0.4),
        "current_epoch": 1000,
        "init_args": {"configuration": name, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirror_axes,
        **more,
    }


def write_model(folder, content=None, dataset=DATASET, name=FULLRES, folds=(0,), file="final", **changes):
    """Write a results folder with random weights."""
    content = content or plans()
    write_descriptions(folder, content, dataset)
    for seed, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir()
        weights = random_weights(content, dataset, name, seed)
        torch.save(checkpoint(weights, name, **changes), folder / f"fold_{fold}" / f"checkpoint_{file}.pth")
    return folder


def phantom_case(seed, shape=(44, 52, 36), spacing=(1.1, 0.9, 1.3)):
    """Return image, labels and affine: a head in zeros, an organ that reaches its surface, a lesion."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    head = (grid**2).sum(0) < 0.8
    centre = rng.uniform(-0.2, 0.2, 3)[:, None, None, None]
    organ = head & (((grid - centre - 0.35) ** 2).sum(0) < 0.3)
    lesion = organ & (((grid - centre - 0.3) ** 2).sum(0) < 0.08)
    labels = organ.astype(np.uint8) + lesion
    image = np.array([1.0, 2.5, 4.5])[labels] + rng.normal(0, 0.6, shape)
    image = np.where(head, np.maximum(image, 0.05), 0).astype(np.float32)
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = (-20, 15, 4)
    return image, labels, affine


def write_cases(folder, seeds, codes=None, **geometry):
    """Write images and labels of phantom cases, turned to `codes`; return both folders."""
    images, labels = folder / "images", folder / "labels"
    for place in (images, labels):
        place.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image, label, affine = phantom_case(seed, **geometry)
        for array, file in (
            (image, images / f"case_{seed}_0000.nii.gz"),
            (label, labels / f"case_{seed}.nii.gz"),
        ):
            nibabel.save(turned(nibabel.Nifti1Image(array, affine), codes), file)
    return images, labels


def turned(image, codes):
    """Return an image whose axes are swapped and flipped so that they run to `codes`."""
    if codes is None:
        return image
    start, end = io_orientation(image.affine), axcodes2ornt(codes)
    return image.as_reoriented(ornt_transform(start, end))


def disturb(folder, out, seed=0):
    """Write label maps with errors of a first stage, outside of the head as well."""
    out.mkdir()
    rng = np.random.default_rng(seed)
    for file in sorted(Path(folder).glob("*.nii.gz")):
        image = nibabel.load(file)
        labels = np.asarray(image.dataobj).astype(np.uint8)
        for _ in range(6):
            corner = [rng.integers(0, n - 8) for n in labels.shape]
            labels[tuple(slice(c, c + 7) for c in corner)] = rng.integers(0, 3)
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), out / file.name)
    return out
