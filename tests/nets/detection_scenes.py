"""Small scenes with known objects, and detectors small enough for a test."""

import numpy as np
import torch
from torch import Tensor

from medseg.plan.detection import Detection, HeadSettings, ProposalSettings
from medseg.plan.schema import Architecture


def blobs(
    shape: tuple[int, ...],
    count: int,
    rng: np.random.Generator,
    n_classes: int = 1,
    radii: tuple[float, float] = (0.11, 0.17),
) -> tuple[Tensor, Tensor]:
    """Return an image (1, *shape) and its label map; an object's class decides its brightness.

    Ellipsoids that do not overlap, with `radii` as parts of the image's sides; the values of the label map
    are as `medseg.nets.maskrcnn` wants them.
    """
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij"))
    labels = np.zeros(shape, np.int64)
    image = rng.normal(0, 0.1, shape).astype(np.float32)
    placed = 0
    for _ in range(1000):
        radius = np.array([rng.uniform(*radii) * n for n in shape])
        centre = np.array([rng.uniform(r + 1, n - r - 1) for r, n in zip(radius, shape, strict=True)])
        axes = (-1, *[1] * len(shape))
        inside = (((grid - centre.reshape(axes)) / radius.reshape(axes)) ** 2).sum(0) <= 1
        if (labels[inside] != 0).any():
            continue
        kind = placed % n_classes
        labels[inside] = 1 + kind + n_classes * placed
        image[inside] += 1.0 if kind == 0 else -1.0
        placed += 1
        if placed == count:
            break
    assert placed == count
    return torch.from_numpy(image)[None], torch.from_numpy(labels)


def tiny_architecture(dims: int) -> Architecture:
    """Three resolutions of strides 1, 2 and 4."""
    return Architecture(
        features_per_stage=(8, 16, 32),
        strides=((1,) * dims, (2,) * dims, (2,) * dims),
        kernel_sizes=((3,) * dims,) * 3,
        blocks_per_stage=(1, 1, 1),
        decoder_convs_per_stage=(1, 1),
    )


def tiny_detection(dims: int, n_classes: int = 1, **changes: object) -> Detection:
    """Levels of strides 4 and 8 (the extra one), in volumes also 2, for objects of about ten voxels."""
    anchors = (((8.0,) * dims, (12.0,) * dims), ((16.0,) * dims, (24.0,) * dims))
    values: dict[str, object] = {
        "n_classes": n_classes,
        "finest_stage": 4 - dims,
        "pyramid_channels": 24,
        "anchors": anchors if dims == 2 else (((5.0,) * 3, (7.0,) * 3), *anchors),
        "proposals": ProposalSettings(
            high=0.5,
            samples=64,
            candidates_train=100,
            candidates_test=100,
            proposals_train=60,
            proposals_test=60,
        ),
        "heads": HeadSettings(
            samples=32,
            positive_fraction=0.5,
            box_cells=(5,) * dims if dims == 2 else (4,) * dims,
            width=64,
            mask_cells=(14,) * dims if dims == 2 else (7,) * dims,
            mask_channels=16,
            mask_convs=2,
        ),
    }
    return Detection(**{**values, **changes})
