"""Patch size, pooling and kernels of a network, and what it costs to train it.

The memory of a network is counted in *feature-map elements*: outputs of all convolutions for one
sample. nnU-Net obtains the number by building the network; the closed form here gives the same
integer in microseconds.
"""

import math
from dataclasses import dataclass

import numpy as np

from medseg.errors import PlanError
from medseg.plan.presets import Rules
from medseg.plan.schema import Architecture
from medseg.types import Spacing

# Smallest edge of the coarsest feature map (nnU-Net `UNet_featuremap_min_edge_length`).
MIN_EDGE = 4
# Volume of the patch that shrinking starts from: 256^3 voxels, or 2048^2 pixels in 2D.
START_VOXELS = {3: 256**3, 2: 2048**2}
# Batch sizes that the memory references of the presets were measured with.
REFERENCE_BATCH = {3: 2, 2: 12}
MIN_BATCH = 2
# A time or host memory budget never shrinks a patch below this (medseg's choice: eight 4^3 bottleneck
# voxels still see 32 voxels of context).
FLOOR_VOXELS = {3: 32**3, 2: 64**2}


@dataclass(frozen=True)
class Topology:
    """Pooling of a U-Net: strides and kernels per stage, and the patch padded to fit them."""

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    divisor: tuple[int, ...]

    @property
    def n_stages(self) -> int:
        """Number of resolutions."""
        return len(self.strides)


@dataclass(frozen=True)
class Limits:
    """What a patch must respect.

    Attributes
    ----------
    elements : feature-map elements of one sample (memory)
    voxels : of the patch
    soft_elements : like `elements`, given up at :data:`FLOOR_VOXELS` (time, host memory)
    """

    elements: float = math.inf
    voxels: float = math.inf
    soft_elements: float = math.inf

    def allow(self, patch: tuple[int, ...], elements: int) -> bool:
        """Return whether a patch of so many elements may be used."""
        voxels = math.prod(patch)
        if elements > self.elements or voxels > self.voxels:
            return False
        return elements <= self.soft_elements or voxels <= FLOOR_VOXELS[len(patch)]


@dataclass(frozen=True)
class Fit:
    """A patch that keeps the limits.

    Attributes
    ----------
    topology, elements : the network and its feature-map elements for one sample
    tried : the patches on the way, the start first and the result last
    """

    topology: Topology
    elements: int
    tried: tuple[tuple[int, ...], ...]


def plan_topology(spacing: Spacing, patch: tuple[float, ...], max_stages: int | None = None) -> Topology:
    """Pool every axis while its edge allows it and its spacing is within a factor of 2 of the finest.

    Kernels of an axis grow from 1 to 3 when its spacing comes within a factor of 2 of the finest.

    Parameters
    ----------
    spacing : per axis
    patch : per axis; the median of an even number of cases may end in .5 and is used as it is
    max_stages : most resolutions, or None
    """
    now, size, kernel = list(spacing), list(patch), [1] * len(spacing)
    strides = [(1,) * len(spacing)]
    kernels: list[tuple[int, ...]] = []
    while max_stages is None or len(strides) < max_stages:
        axes = _axes_to_pool(now, size)
        if not axes:
            break
        finest = min(now)
        kernel = [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, now, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(len(now))))
        for axis in axes:
            now[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    kernels.append((3,) * len(spacing))
    divisor = tuple(math.prod(column) for column in zip(*strides, strict=True))
    padded = tuple(int(p + (-p) % d) for p, d in zip(patch, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded, divisor)


def _axes_to_pool(spacing: list[float], size: list[float]) -> list[int]:
    axes = [axis for axis, n in enumerate(size) if n >= 2 * MIN_EDGE]
    if not axes:
        return []
    finest = min(spacing[axis] for axis in axes)
    axes = [axis for axis in axes if spacing[axis] / finest < 2]
    # A single axis is pooled only while it stays clearly larger than the smallest edge.
    return [] if len(axes) == 1 and size[axes[0]] < 3 * MIN_EDGE else axes


def count_elements(
    patch: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    features: tuple[int, ...],
    blocks: tuple[int, ...],
    decoder_convs: tuple[int, ...],
    residual: bool,
    n_labels: int,
) -> int:
    """Return the feature-map elements of one sample: the number that nnU-Net calls its VRAM estimate.

    Parameters
    ----------
    patch : voxels
    strides, features, blocks : per stage, finest first
    decoder_convs : per decoder stage, deepest first
    residual : residual encoder (stem, two convolutions a block, skip projections) or plain
    n_labels : entries of ``labels`` in the dataset's description, background and ignore included

    Notes
    -----
    Equal to `compute_conv_feature_map_size` of dynamic_network_architectures 0.4.4 by construction:
    batch size, input channels and deep supervision heads do not count.
    """
    voxels, size = [], list(patch)
    for stride in strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    stage = [f * v for f, v in zip(features, voxels, strict=True)]
    convs = 2 if residual else 1
    encoder = sum(convs * b * s for b, s in zip(blocks, stage, strict=True))
    skips = sum(stage) if residual else 0  # the stem, and a projection for every further stage
    decoder = sum((n + 1) * s for n, s in zip(reversed(decoder_convs), stage[:-1], strict=True))
    return encoder + skips + decoder + n_labels * voxels[0]


def architecture_elements(architecture: Architecture, patch: tuple[int, ...], n_labels: int) -> int:
    """Return :func:`count_elements` of a planned network."""
    return count_elements(
        patch,
        architecture.strides,
        architecture.features_per_stage,
        architecture.blocks_per_stage,
        architecture.decoder_convs_per_stage,
        architecture.network == "resenc-unet",
        n_labels,
    )


def build_architecture(topology: Topology, rules: Rules) -> Architecture:
    """Return the network of a topology."""
    n = topology.n_stages
    return Architecture(
        network=rules.network,
        features_per_stage=rules.features(n, len(topology.patch)),
        strides=topology.strides,
        kernel_sizes=topology.kernels,
        blocks_per_stage=rules.blocks(n),
        decoder_convs_per_stage=(rules.decoder_convs,) * (n - 1),
    )


def start_patch(spacing: Spacing, shape: tuple[float, ...]) -> tuple[float, ...]:
    """Return the first patch: isotropic in space, too large for any memory, clipped to the median shape."""
    inverse = 1 / np.array(spacing)
    dimensions = len(spacing)
    scale = (START_VOXELS[dimensions] / np.prod(inverse)) ** (1 / dimensions)
    return tuple(min(round(float(t)), n) for t, n in zip(inverse * scale, shape, strict=True))


def fit_patch(spacing: Spacing, shape: tuple[float, ...], rules: Rules, n_labels: int, limits: Limits) -> Fit:
    """Shrink the first patch until it keeps the limits.

    The axis that is longest relative to the median shape is shortened (the last one on ties) by what
    its *next* topology requires, so that no valid size is skipped (224 lies between 256 and 192).

    Raises
    ------
    PlanError
        Nothing is left of the patch.
    """
    topology = plan_topology(spacing, start_patch(spacing, shape), rules.max_stages)
    tried = [topology.patch]
    while True:
        elements = _count(topology, rules, n_labels)
        if limits.allow(topology.patch, elements):
            return Fit(topology, elements, tuple(tried))
        topology = plan_topology(spacing, _shorten(topology, spacing, shape, rules), rules.max_stages)
        tried.append(topology.patch)


def _count(topology: Topology, rules: Rules, n_labels: int) -> int:
    n = topology.n_stages
    return count_elements(
        topology.patch,
        topology.strides,
        rules.features(n, len(topology.patch)),
        rules.blocks(n),
        (rules.decoder_convs,) * (n - 1),
        rules.network == "resenc-unet",
        n_labels,
    )


def _shorten(topology: Topology, spacing: Spacing, shape: tuple[float, ...], rules: Rules) -> tuple[int, ...]:
    patch = list(topology.patch)
    relative = [(p / n, axis) for axis, (p, n) in enumerate(zip(patch, shape, strict=True))]
    axis = max(relative)[1]
    shorter = list(patch)
    shorter[axis] -= topology.divisor[axis]
    patch[axis] -= plan_topology(spacing, tuple(shorter), rules.max_stages).divisor[axis]
    if patch[axis] < 1:
        raise PlanError(
            f"memory budget: even a patch of {topology.patch} needs more. Give more memory "
            "(gpu_memory_gb), or choose a smaller network (preset cpu)."
        )
    return tuple(patch)
