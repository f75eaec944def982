"""A bundle as one graph for other runtimes: what is computed inside, and the description that goes with it.

The graph takes tiles of the *resampled* image and returns logits. Normalisation that is a fixed formula (CT,
colours) is inside. A z-score or a range is one of the whole image, which no tile knows, so for such channels
it is the caller's, before resampling; the description says which channel is which.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import medseg
from medseg.bundle import Bundle
from medseg.errors import BundleError, OutputError
from medseg.geometry.orient import reads_as_ras
from medseg.log import check_cancelled

INPUT, OUTPUT = "image", "logits"
# Smallest divisor of a normalisation; nnU-Net's value for float32.
EPSILON = 1e-8
# Schemes that are a fixed formula of a voxel.
FIXED = ("ct", "rgb-0-1", "none")
FORMAT, FORMAT_VERSION = "medseg-graph", 1
STEP_KINDS = ("keep_largest", "remove_small", "fill_holes")


class Graph(nn.Module):
    """Normalisation, the network of each fold, and the mean of their logits.

    Parameters
    ----------
    networks : one a fold
    low, high, mean, std : (c,) float32; a channel becomes ``(clip(x, low, high) - mean) / std``
    dimensions : spatial axes
    """

    def __init__(
        self, networks: list[nn.Module], low: Tensor, high: Tensor, mean: Tensor, std: Tensor, dimensions: int
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.clips = bool((low > -torch.inf).any() or (high < torch.inf).any())
        self.scales = bool((mean != 0).any() or (std != 1).any())
        largest = torch.finfo(torch.float32).max
        for name, values in (("low", low), ("high", high), ("mean", mean), ("std", std)):
            shaped = values.clamp(-largest, largest).reshape(1, -1, *(1,) * dimensions)
            self.register_buffer(name, shaped, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(n, c, ...) to logits (n, n_outputs, ...)."""
        if self.clips:
            image = torch.minimum(torch.maximum(image, cast(Tensor, self.low)), cast(Tensor, self.high))
        if self.scales:
            image = (image - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        total = cast(Tensor, self.networks[0](image))
        for network in self.networks[1:]:
            total = total + network(image)
        return total / len(self.networks) if len(self.networks) > 1 else total


def build_graph(bundle: Bundle, folds: tuple[str, ...]) -> Graph:
    """Return the graph of some folds, in evaluation mode.

    Raises
    ------
    BundleError
        There is no such fold, its weights do not fit, or CT statistics are missing.
    """
    rows = [_formula(bundle, number) for number in range(len(bundle.plan.channels))]
    rows += [(-torch.inf, torch.inf, 0.0, 1.0)] * (bundle.in_channels - len(rows))  # a cascade's labels
    low, high, mean, std = torch.tensor(rows, dtype=torch.float32).T
    networks = []
    for fold in folds:
        check_cancelled()
        networks.append(bundle.network(fold))
    return Graph(networks, low, high, mean, std, bundle.settings.dimensions).eval()


def example(bundle: Bundle, batch: int = 1) -> Tensor:
    """Return a batch of one patch, to trace the graph with."""
    return torch.zeros(batch, bundle.in_channels, *bundle.settings.patch_size)


def takes_any_size(bundle: Bundle) -> bool:
    """Return whether tiles may have any size that the strides divide; Swin UNETR's windows fix theirs."""
    return bundle.settings.architecture.network != "swin-unetr"


def size_bytes(graph: nn.Module) -> int:
    """Return the size of the weights."""
    return sum(value.numel() * value.element_size() for value in graph.parameters())


def _formula(bundle: Bundle, number: int) -> tuple[float, float, float, float]:
    """Return low, high, mean and std of a channel's normalisation inside the graph."""
    scheme = bundle.settings.normalization[number]
    if scheme == "rgb-0-1":
        return -torch.inf, torch.inf, 0.0, 255.0
    if scheme != "ct":
        return -torch.inf, torch.inf, 0.0, 1.0
    stats = bundle.plan.intensity.get(str(number))
    if stats is None:
        raise BundleError(f"{bundle}: its plan has no intensities of CT channel {number}. Plan again.")
    return stats.percentile_00_5, stats.percentile_99_5, stats.mean, max(stats.std, EPSILON)


def describe(bundle: Bundle, folds: tuple[str, ...]) -> dict[str, Any]:
    """Return all that a program needs around the graph, as plain data."""
    plan, settings = bundle.plan, bundle.settings
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "medseg": medseg.__version__,
        "bundle_sha256": bundle.digest,
        "dataset": plan.dataset_name,
        "configuration": bundle.configuration,
        "folds": list(folds),
        "input": _input(bundle),
        "output": _output(bundle),
        "axes": {
            "turn_to_ras": reads_as_ras(plan.reader),
            "reader_order": "k, j, i: the axes of the file, the last fastest",
            "transpose_forward": list(plan.transpose_forward),
            "transpose_backward": list(plan.transpose_backward),
        },
        "normalization": [_normalization(bundle, number) for number in range(len(plan.channels))],
        "intensity": {name: stats.to_dict() for name, stats in plan.intensity.items()},
        "resampling": {
            "image_order": settings.order_data,
            "logits_order": settings.order_probabilities,
            "across_slices_order": settings.order_z,
            "slice_by_slice": "if the largest spacing is more than 3 times the smallest",
        },
        "tiles": _tiles(bundle),
        "postprocessing": cleaning_steps(bundle),
        "steps": STEPS,
    }


STEPS = [
    "with turn_to_ras, flip and swap axes until i, j, k run to R, A, S",
    "transpose the axes (k, j, i) by transpose_forward",
    "crop to the box of voxels that are not zero in any channel",
    "normalise channels that are marked 'before'; clip CT channels to [low, high], so that resampling does "
    "not mix in what the graph would clip",
    "resample to input.spacing (a 2D network: within slices) by splines of image_order",
    "pad to the patch, centred, with input.pad_value",
    "run the graph on tiles, and on their flips along mirror_axes, flipped back; take the mean logits",
    "add tiles with Gaussian weights and divide by the sum of the weights",
    "resample the logits to the cropped grid by logits_order",
    "classes: the largest logit; regions: where a logit exceeds 0, painted in regions_class_order",
    "undo the crop (0 outside), the transposition and the turn; apply postprocessing",
]


def output_names(bundle: Bundle) -> list[str]:
    """Return the name of each output of the network."""
    labels = bundle.labels
    if labels.has_regions:
        return list(labels.foreground)
    names = {value: name for name, value in labels.foreground.items()}
    return ["background", *(names[value] for value in labels.foreground_values)]


def cleaning_steps(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the post-processing of this model alone, as plain data that was looked at.

    Raises
    ------
    BundleError
        A step is unknown.
    """
    wanted = bundle.postprocessing or {}
    if wanted.get("ensemble"):  # chosen for several models together
        return []
    try:
        return [_cleaning_step(**step) for step in wanted.get("steps", ())]
    except (TypeError, ValueError) as error:
        raise BundleError(f"{bundle}: its post-processing is unknown ({error}). Update medseg.") from error


def _cleaning_step(kind: str, labels: list[int], min_mm3: float | None = None) -> dict[str, Any]:
    if kind not in STEP_KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(STEP_KINDS)}")
    least = None if min_mm3 is None else float(min_mm3)
    return {"kind": kind, "labels": [int(label) for label in labels], "min_mm3": least}


def check_replaceable(out: Path, file: str, mark: str) -> None:
    """Refuse a folder that holds something else than an older export, so that nothing of others is lost.

    Parameters
    ----------
    out : the folder
    file, mark : a file of every export, and what its text then holds

    Raises
    ------
    OutputError
        It holds something else, or is a file.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = out / file
    if not found.is_file() or mark not in found.read_text(encoding="utf-8", errors="replace"):
        raise OutputError(f"{out}: holds something else already. Choose another name, or remove it.")


def _input(bundle: Bundle) -> dict[str, Any]:
    settings = bundle.settings
    first_stage = [str(value) for value in bundle.labels.foreground_values] if settings.previous_stage else []
    return {
        "name": INPUT,
        "layout": "batch, channel, " + ", ".join("zyx"[-settings.dimensions :]) + " (network order)",
        "dtype": "float32",
        "channels": list(bundle.plan.channels),
        # Of a cascade: one 0/1 channel a label of its first stage, resampled to this grid.
        "channels_of_first_stage": first_stage,
        "first_stage": settings.previous_stage,
        "spacing": list(settings.spacing),
        "patch_size": list(settings.patch_size),
        "any_size": takes_any_size(bundle),
        "multiple_of": list(settings.architecture.divisor),
        # What normalisation inside the graph turns into 0, nnU-Net's padding.
        "pad_value": [_formula(bundle, number)[2] for number in range(len(bundle.plan.channels))]
        + [0.0] * len(first_stage),
    }


def _output(bundle: Bundle) -> dict[str, Any]:
    labels = bundle.labels
    order = labels.regions_class_order
    return {
        "name": OUTPUT,
        "kind": "regions" if labels.has_regions else "classes",
        "names": output_names(bundle),
        "labels": labels.to_dict()["entries"],
        "regions_class_order": None if order is None else list(order),
        "activation": "sigmoid" if labels.has_regions else "softmax",
    }


def _normalization(bundle: Bundle, number: int) -> dict[str, Any]:
    settings = bundle.settings
    scheme = settings.normalization[number]
    low, high, mean, std = _formula(bundle, number)
    found: dict[str, Any] = {
        "channel": bundle.plan.channels[number],
        "scheme": scheme,
        "where": "graph" if scheme in FIXED else "before",
    }
    if scheme == "ct":
        found |= {"low": low, "high": high, "mean": mean, "std": std}
    if scheme == "zscore":
        found["nonzero_only"] = settings.use_mask_for_norm[number]
    return found


def _tiles(bundle: Bundle) -> dict[str, Any]:
    return {
        "step": 0.5,
        "starts": "n = ceil((size - patch) / (step * patch)) + 1 tiles, "
        "the i-th at round(i * (size - patch) / (n - 1))",
        "weights": "Gaussian about patch // 2, sigma = patch / 8",
        "mirror_axes": list(bundle.mirror_axes) if bundle.card.get("mirroring", True) else [],
        # Labels with left or right in their name: do not flip the axis that runs left-right in the image.
        "sided_labels": list(bundle.labels.sided) if bundle.keeps_sides else [],
    }
