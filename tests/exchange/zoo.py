"""Small bundles in the layout of MONAI's Model Zoo, and what MONAI itself makes of them.

Keys and forms are those of the zoo's configurations (versions 0.1 to 0.5); networks are tiny, weights random.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
import yaml

CUDA = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 2,
    "norm": "batch",
}
SEGRESNET = {
    "_target_": "SegResNet",
    "blocks_down": [1, 1],
    "blocks_up": [1],
    "init_filters": 8,
    "in_channels": 1,
    "out_channels": 4,
    "dropout_prob": 0.2,
}
SWIN = {
    "_target_": "SwinUNETR",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "feature_size": 12,
    "use_checkpoint": False,
}
PAINT = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"


def compose(*transforms):
    return {"_target_": "Compose", "transforms": [{"_target_": name, **rest} for name, rest in transforms]}


def reading(key="image"):
    return ("LoadImaged", {"keys": key}), ("EnsureChannelFirstd", {"keys": key})


def invert(nearest=False, **more):
    rest = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": nearest, "to_tensor": True}
    return "Invertd", {"keys": "pred", **rest, **more}


SOFTMAX = ("Activationsd", {"keys": "pred", "softmax": True})
SIGMOID = ("Activationsd", {"keys": "pred", "sigmoid": True})
ARGMAX = ("AsDiscreted", {"keys": "pred", "argmax": True})
HALF = ("AsDiscreted", {"keys": "pred", "threshold": 0.5})
SAVE = ("SaveImaged", {"keys": "pred", "output_dir": "@output_dir"})
WINDOW = (
    "ScaleIntensityRanged",
    {"keys": "image", "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1, "clip": True},
)


def config(network, preprocessing, postprocessing, inferer=None, **more):
    sliding = {
        "_target_": "SlidingWindowInferer",
        "roi_size": [24, 24, 16],
        "sw_batch_size": 4,
        "overlap": 0.5,
    }
    found = {
        "imports": ["$import glob", "$import os", "$import numpy"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": CUDA,
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": preprocessing,
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": inferer or sliding,
        "postprocessing": postprocessing,
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": True,
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
        **more,
    }
    return copy.deepcopy(found)  # tests change what they get


def spleen():
    orient = ("Orientationd", {"keys": "@image_key", "axcodes": "RAS"})
    space = ("Spacingd", {"keys": "@image_key", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"})
    save = {"output_dtype": "$numpy.float32", "output_ext": ".nii.gz", "separate_folder": True}
    return config(
        UNET,
        compose(*reading("@image_key"), orient, space, WINDOW, ("EnsureTyped", {"keys": "@image_key"})),
        compose(SOFTMAX, invert(orig_keys="@image_key"), ARGMAX, (SAVE[0], {**SAVE[1], **save})),
        image_key="image",
        load_pretrain=True,
    )


def brats():
    normalise = ("NormalizeIntensityd", {"keys": "image", "nonzero": True, "channel_wise": True})
    sliding = {
        "_target_": "SlidingWindowInferer",
        "roi_size": [32, 32, 24],
        "sw_batch_size": 1,
        "overlap": 0.5,
    }
    paint = ("Lambdad", {"keys": "pred", "func": PAINT})
    read = ("LoadImaged", {"keys": "image", "image_only": False})
    return config(
        {**SEGRESNET, "in_channels": 4, "out_channels": 3},
        compose(read, normalise),
        compose(
            SIGMOID,
            invert(meta_keys="pred_meta_dict"),
            HALF,
            paint,
            (SAVE[0], {**SAVE[1], "resample": False}),
        ),
        sliding,
        ckpt_dir="$@bundle_root + '/models'",
        amp=True,
    )


def whole_body():
    found = config(
        {**SEGRESNET, "spatial_dims": 3},
        compose(
            ("LoadImaged", {"keys": "@image_key"}),
            ("EnsureTyped", {"keys": "@image_key"}),
            ("EnsureChannelFirstd", {"keys": "@image_key"}),
            ("Orientationd", {"keys": "@image_key", "axcodes": "RAS"}),
            ("Spacingd", {"keys": "@image_key", "pixdim": "@pixdim", "mode": "bilinear"}),
            ("NormalizeIntensityd", {"keys": "@image_key", "nonzero": True}),
            ("ScaleIntensityd", {"keys": "@image_key", "minv": -1.0, "maxv": 1.0}),
        ),
        compose(SOFTMAX, ARGMAX, invert(True), SAVE),
        {
            "_target_": "SlidingWindowInferer",
            "roi_size": [24, 24, 24],
            "sw_batch_size": "@displayable_configs#sw_batch_size",
            "overlap": "@displayable_configs#sw_overlap",
            "padding_mode": "replicate",
            "mode": "gaussian",
            "device": CUDA,
        },
        displayable_configs={"highres": False, "sw_overlap": 0.25, "sw_batch_size": 1},
        image_key="image",
        pixdim="$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        modelname="$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
    )
    found["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @modelname"
    return found


def swin():
    orient = ("Orientationd", {"keys": "image", "axcodes": "LPS"})
    space = ("Spacingd", {"keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"})
    read = ("LoadImaged", {"keys": "image", "reader": "NibabelReader"})
    sliding = {
        "_target_": "SlidingWindowInferer",
        "roi_size": [64, 32, 32],
        "sw_batch_size": 4,
        "overlap": 0.5,
    }
    return config(
        SWIN,
        compose(read, reading()[1], orient, space, WINDOW, ("EnsureTyped", {"keys": "image"})),
        compose(SOFTMAX, invert(), ARGMAX, SAVE),
        sliding,
    )


def prostate():
    orient = ("Orientationd", {"keys": "image", "axcodes": "RAS"})
    space = ("Spacingd", {"keys": "image", "pixdim": [1.2, 1.2, 1.2], "mode": "bilinear"})
    scale = ("ScaleIntensityd", {"keys": "image", "minv": 0, "maxv": 1})
    keep = ("KeepLargestConnectedComponentd", {"keys": "pred", "applied_labels": [1, 2]})
    normalise = ("NormalizeIntensityd", {"keys": "image"})
    return config(
        {**UNET, "out_channels": 3, "act": "prelu", "dropout": 0.15},
        compose(*reading(), orient, space, scale, normalise, ("EnsureTyped", {"keys": "image"})),
        compose(ARGMAX, keep, invert(True, meta_key_postfix="meta_dict"), SAVE),
    )


def pediatric():
    crop = {"keys": ["@image_key"], "source_key": "@image_key", "mode": ["minimum"]}
    space = {"keys": ["@image_key"], "pixdim": [1.5, 1.5, 3.0], "mode": ["bilinear"]}
    network = {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": "@spatial_dims",
        "in_channels": "@input_channels",
        "out_channels": "@output_channels",
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, [2, 2, 1]],
        "upsample_kernel_size": [2, [2, 2, 1]],
        "filters": [8, 12, 16],
        "norm_name": "instance",
        "deep_supervision": False,
        "res_block": True,
    }
    found = config(
        network,
        compose(
            *reading("@image_key"),
            ("Orientationd", {"keys": "image", "axcodes": "RAS"}),
            ("Spacingd", space),
            (WINDOW[0], {**WINDOW[1], "keys": "@image_key"}),
            ("CropForegroundd", crop),
            ("EnsureTyped", {"keys": "image"}),
            ("CastToTyped", {"keys": "@image_key", "dtype": "$torch.float32"}),
        ),
        compose(SOFTMAX, invert(meta_key_postfix="meta_dict"), ARGMAX, SAVE),
        workflow_type="inference",
        input_channels=1,
        output_channels=4,
        spatial_size=[96, 96, 96],
        spatial_dims="$len(@spatial_size)",
        image_key="image",
    )
    found["imports"].append("$import scripts.monai_utils")
    return found


def short_axis():
    read = ("LoadImaged", {"keys": "image", "image_only": False})
    ensure = ("EnsureTyped", {"keys": "image", "device": "@device"})
    return config(
        {**UNET, "spatial_dims": 2, "out_channels": 4, "norm": "instance"},
        compose(read, reading()[1], ("ScaleIntensityd", {"keys": "image"}), ensure),
        compose(SOFTMAX, invert(meta_key_postfix="meta_dict"), ARGMAX, SAVE),
        {"_target_": "SliceInferer", "roi_size": [32, 32], "spatial_dim": 2},
        ckpt_path="$@bundle_root + '/models/model.pt'",
    )


def template():
    pred = {"keys": "@pred"}
    found = config(
        {**UNET, "out_channels": "@num_classes"},
        {"_target_": "Compose", "transforms": "$@transforms"},
        compose(
            ("Activationsd", {**pred, "softmax": True}),
            ("AsDiscreted", {**pred, "argmax": True}),
            ("SaveImaged", {**pred, "output_dir": "@output_dir", "dtype": "$None", "output_dtype": "$None"}),
        ),
        {"_target_": "SimpleInferer"},
        image="$monai.utils.CommonKeys.IMAGE",
        pred="$monai.utils.CommonKeys.PRED",
        num_classes=4,
        transforms=[
            {"_target_": "LoadImaged", "keys": "@image", "image_only": True},
            {"_target_": "EnsureChannelFirstd", "keys": "@image"},
            {"_target_": "ScaleIntensityd", "keys": "@image"},
        ],
    )
    found["dataset"]["data"] = "$[{@image: i} for i in @datalist]"
    return found


def logits_last():
    found = prostate()
    found["postprocessing"] = compose(invert(), SOFTMAX, ARGMAX, SAVE)
    return found


ZOO = {
    function.__name__: function
    for function in (spleen, brats, whole_body, swin, prostate, pediatric, short_axis, template, logits_last)
}
NAMES = {
    "brats": ["Tumor core", "Whole tumor", "Enhancing tumor"],
    "spleen": ["background", "spleen"],
    "whole_body": ["background", "spleen", "kidney_right", "kidney_left"],
}


def metadata(name, inputs, outputs):
    channels = ["T1c", "T1", "T2", "FLAIR"] if inputs == 4 else ["image"]
    names = NAMES.get(name) or ["background", *(f"part {k}" for k in range(1, outputs))]

    def described(names):
        definition = {str(k): n for k, n in enumerate(names)}
        return {"type": "image", "num_channels": len(names), "channel_def": definition}

    return {
        "version": "0.5.3",
        "monai_version": "1.4.0",
        "network_data_format": {
            "inputs": {"image": described(channels)},
            "outputs": {"pred": {**described(names), "format": "segmentation"}},
        },
    }


def build(network):
    """Return a network with random weights whose outputs are balanced, so that every class is somewhere."""
    from monai.networks import nets

    torch.manual_seed(7)
    kinds = {"@spatial_dims": 3, "@input_channels": 1, "@output_channels": 4, "@num_classes": 4}
    arguments = {
        k: kinds.get(v, v) if isinstance(v, str) else v for k, v in network.items() if k != "_target_"
    }
    made = getattr(nets, network["_target_"].rpartition(".")[2])(**arguments).eval()
    dims = arguments.get("spatial_dims", 3)
    noise = torch.rand(1, arguments["in_channels"], *(64, 32, 32)[:dims])
    biases = [
        p
        for name, p in made.named_parameters()
        if name.endswith("bias") and len(p) == arguments["out_channels"]
    ]
    with torch.no_grad():
        outputs = made(noise)
        biases[-1] -= outputs.mean(dim=(0, *range(2, outputs.ndim)))
    return made, arguments


def write_bundle(root, name, settings=None, weights="model.pt", suffix=".json"):
    """Write a bundle folder; return it."""
    settings = settings or ZOO[name]()
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    network, arguments = build(settings["network_def"])
    text = json.dumps(settings, indent=1) if suffix == ".json" else yaml.safe_dump(settings, sort_keys=False)
    (root / "configs" / f"inference{suffix}").write_text(text)
    meta = metadata(name, arguments["in_channels"], arguments["out_channels"])
    (root / "configs" / "metadata.json").write_text(json.dumps(meta))
    torch.save(network.state_dict(), root / "models" / weights)
    return root


def write_image(folder, channels=1, shape=(40, 36, 20), codes="LPS", spacing=(1.2, 0.75, 3.0), tilt=True):
    """Write NIfTI files of smooth structures, one a channel; return their paths.

    The grid is oblique and its spacings are simple ratios of the bundles': the last bit of the affine then
    decides about shapes and nearest neighbours.
    """
    from scipy.ndimage import gaussian_filter

    from tests.phantoms import affine, tilted

    folder.mkdir(parents=True, exist_ok=True)
    matrix = affine(codes, spacing)
    matrix = tilted(matrix, (3.0, -4.0, 5.0)) if tilt else matrix
    paths = []
    for channel in range(channels):
        noise = np.random.default_rng(channel).normal(size=shape)
        values = (gaussian_filter(noise, 1.5) * 900 + 40).astype(np.int16)
        values[:3] = 0
        image = nibabel.Nifti1Image(values, matrix)
        image.set_sform(matrix, 1)
        image.set_qform(matrix, 1)
        paths.append(folder / (f"case_{channel:04d}.nii.gz" if channels > 1 else "case.nii.gz"))
        nibabel.save(image, paths[-1])
    return paths


# What `python -m monai.bundle run` does, without Ignite's engine, which is not a dependency of medseg.
RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch
torch.set_num_threads(1)
for job in json.load(sys.stdin):
    parser = ConfigParser()
    parser.read_config(job["config"])
    names = {"bundle_root": "root", "datalist": "data", "output_dir": "out"}
    parser.update({"device": "cpu", **{key: job[name] for key, name in names.items()}})
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(job["weights"], weights_only=True))
    inferer = parser.get_parsed_content("inferer")
    postprocessing = parser.get_parsed_content("postprocessing")
    for batch in parser.get_parsed_content("dataloader"):
        with torch.no_grad():
            batch["pred"] = inferer(batch["image"], network)
        for item in decollate_batch(batch):
            postprocessing(item)
"""


def run_monai(jobs):
    """Let MONAI predict: jobs name config, root, weights, data (a list of cases) and out."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_command(job, folder):
    """Let ``python -m monai.bundle run`` itself predict one job; it needs Ignite and Fire."""
    override = {
        "datalist": job["data"],
        "output_dir": job["out"],
        "bundle_root": job["root"],
        "device": "cpu",
    }
    args = folder / "args.json"
    args.write_text(json.dumps({"config_file": job["config"], **override}))
    words = [sys.executable, "-m", "monai.bundle", "run", "--args_file", str(args)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=job["root"])
    assert done.returncode == 0, done.stderr[-3000:]


def result(out):
    """Return the label map that MONAI saved."""
    (path,) = Path(out).rglob("*.nii.gz")
    return np.asarray(nibabel.load(path).dataobj)
