"""What the tests of ONNX and OpenVINO share: models, and tiles with what medseg's networks say to them."""

from dataclasses import replace

import numpy as np
import torch

from medseg.exchange import load_model
from medseg.geometry.tiles import pad_to
from medseg.io import list_cases, read_image
from medseg.nets import build_network
from medseg.preprocess import preprocess
from tests.infer.models import tiny_bundle

# Plain 3D z-score, 2D CT, residual encoder.
GOLDEN = ["a_hippocampus", "h_2d_aniso_ct", "i_resenc_hippocampus"]


def golden(golden_dir, model):
    """Return a golden bundle, a tile of its first image as the graph takes it, and the golden logits."""
    folder = golden_dir / "inference" / model
    bundle = load_model(folder / "model")
    case = list_cases(folder / "imagesTs", len(bundle.plan.channels))[0]
    data = preprocess(read_image(case), bundle.plan, bundle.configuration).data
    patch = bundle.settings.patch_size
    data = data if len(patch) == 3 else data[:, data.shape[1] // 2]
    padded, _ = pad_to(data, patch)
    tile = np.ascontiguousarray(padded[(None, slice(None), *(slice(0, size) for size in patch))])
    return bundle, raw(bundle, tile), logits(bundle, tile)


def raw(bundle, tile):
    """Undo the normalisation that is inside the graph."""
    values = tile.copy()
    for channel, scheme in enumerate(bundle.settings.normalization):
        if scheme == "ct":
            stats = bundle.plan.intensity[str(channel)]
            values[:, channel] = values[:, channel] * stats.std + stats.mean
        elif scheme == "rgb-0-1":
            values[:, channel] *= 255
    return values


def logits(bundle, tile, folds=None):
    """Return the mean logits of the folds for a normalised tile."""
    folds = folds or bundle.folds
    with torch.inference_mode():
        return sum(bundle.network(fold)(torch.from_numpy(tile)) for fold in folds).numpy() / len(folds)


def tiny(normalization, folds=1, network="unet", configuration="3d_fullres", **plan):
    """Return a tiny bundle with other normalisation or another network."""
    bundle = tiny_bundle(configuration, folds=folds, channels=("a", "b")[: len(normalization)], **plan)
    settings = bundle.settings.replace(
        normalization=normalization,
        architecture={**bundle.settings.architecture.to_dict(), "network": network},
    )
    configurations = {name: value.to_dict() for name, value in bundle.plan.configurations.items()}
    changed = bundle.plan.replace(configurations={**configurations, configuration: settings.to_dict()})
    if network == "unet":
        return replace(bundle, plan=changed)

    def state(seed):
        torch.manual_seed(seed)
        return build_network(settings.architecture, bundle.in_channels, bundle.labels.n_outputs).state_dict()

    weights = {str(fold): (lambda fold=fold: state(fold)) for fold in range(folds)}
    return replace(bundle, plan=changed, weights=weights)


def noise(bundle, batch, shape, seed=0):
    """Return a normalised tile of any size."""
    # Within the clips of the tiny plan's CT statistics, -0.5 to 3.5.
    values = np.random.default_rng(seed).uniform(-0.4, 1.0, (batch, bundle.in_channels, *shape))
    return values.astype(np.float32)
