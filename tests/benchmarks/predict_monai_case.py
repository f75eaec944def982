"""A folder predicted with MONAI's own parts, in one process; run by ``predict_vs_nnunet.py``.

Transforms, ``SlidingWindowInferer``, inversion and writing are MONAI's; the network and its weights are those
of the medseg bundle, which sees axes in the reversed order of nnU-Net's readers.
"""

import argparse
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    SaveImaged,
    Spacingd,
)

from medseg.bundle import load_bundle

FLIPS = [axes for number in range(4) for axes in combinations((2, 3, 4), number)]


def main() -> None:
    """Predict every image of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mirror", action="store_true")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    settings, (fold,) = bundle.settings, bundle.folds
    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Spacingd("image", pixdim=settings.spacing[::-1]),
            NormalizeIntensityd("image", channel_wise=True),
        ]
    )
    after = Compose(
        [
            Invertd("label", transform=before, orig_keys="image", nearest_interp=False),
            AsDiscreted("label", argmax=True),
            SaveImaged(
                "label",
                output_dir=options.output,
                output_postfix="",
                separate_folder=False,
                output_dtype="uint8",
                print_log=False,
            ),
        ]
    )
    inferer = SlidingWindowInferer(settings.patch_size[::-1], overlap=0.5, mode="gaussian", sigma_scale=0.125)
    call = seen_from_medseg(bundle.network(fold), options.mirror)
    with torch.inference_mode():
        for image in sorted(options.images.iterdir()):
            case = before({"image": image})
            case["label"] = inferer(case["image"][None], call)[0]
            after(case)


def seen_from_medseg(network: torch.nn.Module, mirror: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the network for tiles in (i, j, k), averaged over flips if wanted."""

    def call(tiles: Any) -> torch.Tensor:
        tiles = torch.as_tensor(tiles).permute(0, 1, 4, 3, 2).contiguous()
        total = network(tiles)
        for flip in FLIPS[1:] if mirror else ():
            total += network(tiles.flip(flip)).flip(flip)
        return total.permute(0, 1, 4, 3, 2)

    return call


if __name__ == "__main__":
    main()
