"""Draw the picture of the README: ``python datasets/phantom/preview.py OUT.png`` (or ``make preview``)."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from medseg.metrics.report import PALETTE
from medseg.phantom import Phantom, make_phantom

SEED, VOXELS = 12, 176


def main(path: Path) -> None:
    """Draw axial and coronal slices of one phantom, with and without its truth."""
    phantom = make_phantom(SEED, VOXELS, oblique_deg=0.0)
    height = int(phantom.image.shape[2] * 0.50)
    front = int(phantom.image.shape[1] * 0.62)
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.55), facecolor="black")
    for panel, (axis, index, truth) in zip(
        axes, ((2, height, False), (2, height, True), (1, front, False), (1, front, True)), strict=True
    ):
        draw(panel, phantom, axis, index, truth)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    figure.savefig(path, dpi=80, facecolor="black")


def draw(panel: Axes, phantom: Phantom, axis: int, index: int, truth: bool) -> None:
    """Draw one slice of an LPS phantom as a radiologist sees it."""
    image, label = (v.array[0].take(index, axis).T for v in (phantom.image, phantom.label))
    if axis == 1:
        image, label = image[::-1], label[::-1]
    rest = [phantom.image.spacing[k] for k in range(3) if k != axis]
    aspect = rest[1] / rest[0]
    panel.imshow(image, cmap="gray", vmin=-160, vmax=240, aspect=aspect, interpolation="bilinear")
    if truth:
        colours = ListedColormap(PALETTE[:4])
        panel.imshow(
            np.ma.masked_equal(label, 0),
            cmap=colours,
            vmin=1,
            vmax=4,
            alpha=0.5,
            aspect=aspect,
            interpolation="nearest",
        )
    panel.axis("off")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "preview.png"))
