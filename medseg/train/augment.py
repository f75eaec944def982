"""Augmentation: parameters are drawn first, then applied; both are pure functions of a generator.

The transforms, their order and their probabilities are nnU-Net 2.8.1's (batchgeneratorsv2 0.3.6); what
is faster here is that rotation, scaling and elastic shifts are one resampling of exactly the region
that the patch needs, and that it is skipped where none was drawn. Arrays are ``(channel, *patch)`` in
network order.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from medseg.train.config import AugmentConfig, Ranged
from medseg.types import FloatArray, IntArray

# nnU-Net treats a patch as a stack of slices when its first axis is this many times shorter.
DUMMY_2D_RATIO = 3.0
# nnU-Net interpolates every label linearly. With more labels than this in a patch ours takes the nearest,
# because the work grows with their number (a choice, not a measurement).
MAX_LINEAR_LABELS = 10


@dataclass(frozen=True)
class Spatial:
    """Where the voxels of a patch are read from.

    Attributes
    ----------
    matrix : (d, d), output offset from the patch centre to input offset, in voxels
    shifts : (d, *control points) displacement in voxels, or None
    """

    matrix: FloatArray
    shifts: FloatArray | None

    def reach(self, patch: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the input box, around the same centre, that holds every voxel that is read."""
        half = (np.array(patch) - 1) / 2
        needed = np.abs(self.matrix) @ half + 1
        if self.shifts is not None:
            needed = needed + np.abs(self.shifts).reshape(len(patch), -1).max(axis=1)
        margin = np.maximum(np.ceil(needed - half), 0).astype(int)  # the same on both sides: centre kept
        return tuple(int(n + 2 * m) for n, m in zip(patch, margin, strict=True))


def is_dummy_2d(patch: tuple[int, ...]) -> bool:
    """Return whether a 3D patch is augmented slice by slice (max / first axis > 3)."""
    return len(patch) == 3 and max(patch) / patch[0] > DUMMY_2D_RATIO


def initial_patch(patch: tuple[int, ...], config: AugmentConfig) -> tuple[int, ...]:
    """Return the enlarged patch that nnU-Net loads, so that rotation leaves no empty corners.

    Per-axis maximum over single-axis rotations, divided by the lower half of the scaling range (0.85).
    """
    flat = is_dummy_2d(patch)
    plane = patch[1:] if flat else patch
    limit = min(90.0, rotation_degrees(patch, config))
    size = np.array(plane, dtype=float)
    for axes in _planes(len(plane)):
        turn = _plane_rotation(len(plane), axes, np.deg2rad(limit))
        size = np.maximum(size, np.abs(turn.T @ np.array(plane)))  # signed sums, as nnU-Net has it
    size = (size / 0.85).astype(int)
    return (patch[0], *size.tolist()) if flat else tuple(size.tolist())


def rotation_degrees(patch: tuple[int, ...], config: AugmentConfig) -> float:
    """Return the largest angle: the set one in 3D; in a plane nnU-Net's, unless `degrees_2d` is set."""
    if len(patch) == 3 and not is_dummy_2d(patch):
        return config.rotation.degrees
    if config.rotation.degrees_2d is not None:
        return config.rotation.degrees_2d
    return 15.0 if len(patch) == 2 and max(patch) / min(patch) > 1.5 else 180.0


def draw_spatial(rng: np.random.Generator, patch: tuple[int, ...], config: AugmentConfig) -> Spatial | None:
    """Draw rotation, scaling and elastic shift; None when all are off for this sample."""
    dims, flat = len(patch), is_dummy_2d(patch)
    matrix = np.eye(dims)
    moved = False
    if rng.random() < config.rotation.p:
        moved = True
        limit = np.deg2rad(rotation_degrees(patch, config))
        planes = [(1, 2)] if flat else _planes(dims)
        for axes in planes:
            matrix = matrix @ _plane_rotation(dims, axes, rng.uniform(-limit, limit))
    if rng.random() < config.scaling.p:
        moved = True
        factor = np.full(dims, rng.uniform(config.scaling.low, config.scaling.high))
        if flat:
            factor[0] = 1.0
        matrix = matrix * factor
    shifts = None
    if rng.random() < config.elastic.p:
        moved = True
        knots = [max(2, int(np.ceil(n / config.elastic.grid_voxels)) + 1) for n in patch]
        shifts = rng.normal(0.0, config.elastic.shift_voxels, (dims, *knots))
        if flat:
            shifts[0] = 0.0
    return Spatial(matrix, shifts) if moved else None


def resample_patch(
    image: FloatArray, seg: IntArray, spatial: Spatial, patch: tuple[int, ...]
) -> tuple[FloatArray, IntArray]:
    """Read a patch at the places that `spatial` says, around the centre of the given box.

    Parameters
    ----------
    image, seg : (c, *box) float32 and (s, *box) int
        Box of size ``spatial.reach(patch)`` around the patch centre, already padded.
    """
    grid = _sampling_grid(spatial, patch, image.shape[1:])
    values = [np.unique(channel) for channel in seg]
    weights = [_one_hot(channel, found) for channel, found in zip(seg, values, strict=True)]
    everything = torch.from_numpy(np.concatenate([image, *weights]))[None]
    moved = F.grid_sample(everything, grid, align_corners=True)[0].numpy()
    image, *weights = np.split(moved, np.cumsum([len(image), *[len(w) for w in weights[:-1]]]))
    labels = [
        _winner(w, found) if len(w) else _nearest(channel, grid)
        for channel, found, w in zip(seg, values, weights, strict=True)
    ]
    return image, np.stack(labels)


def augment_intensity(image: FloatArray, rng: np.random.Generator, config: AugmentConfig) -> FloatArray:
    """Apply noise, blur, brightness, contrast, low resolution and gamma, each with its probability."""
    image = _noise(image, rng, config.noise)
    if rng.random() < config.blur.p:
        image = _blur(image, rng, config.blur.low, config.blur.high, config.blur.p_channel)
    if rng.random() < config.brightness.p:
        image = np.stack([c * _balanced(rng, config.brightness) for c in image])
    if rng.random() < config.contrast.p:
        image = np.stack([_contrast(c, _balanced(rng, config.contrast)) for c in image])
    if rng.random() < config.low_resolution.p:
        image = _low_resolution(image, rng, config)
    if rng.random() < config.gamma_inverted.p:
        image = -np.stack([_gamma(-c, _balanced(rng, config.gamma_inverted)) for c in image])
    if rng.random() < config.gamma.p:
        image = np.stack([_gamma(c, _balanced(rng, config.gamma)) for c in image])
    return np.ascontiguousarray(image, dtype=np.float32)


def draw_mirror(rng: np.random.Generator, axes: tuple[int, ...], p: float) -> tuple[int, ...]:
    """Draw the network axes to flip among the allowed ones."""
    return tuple(axis for axis in axes if rng.random() < p)


def disturb_previous(
    onehot: FloatArray, rng: np.random.Generator, config: AugmentConfig, dims: int
) -> FloatArray:
    """Imitate mistakes of the first stage: grown, shrunk or missing parts (cascade)."""
    noise = config.cascade
    result = onehot.copy()
    if rng.random() < noise.p_morphology:
        for index in rng.permutation(len(result)):
            if rng.random() < noise.p_label:
                result[index] = _random_morphology(result[index] > 0, rng, noise.max_radius, dims)
    if rng.random() < noise.p_remove:
        for index in rng.permutation(len(result)):
            if rng.random() < noise.p_label:
                result[index] = _without_random_part(result[index] > 0, rng, noise.max_fraction)
    return result


def _planes(dims: int) -> list[tuple[int, int]]:
    return [(0, 1)] if dims == 2 else [(1, 2), (2, 0), (0, 1)]


def _plane_rotation(dims: int, axes: tuple[int, int], angle: float) -> FloatArray:
    turn = np.eye(dims)
    a, b = axes
    turn[a, a] = turn[b, b] = np.cos(angle)
    turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
    return turn


def _sampling_grid(spatial: Spatial, patch: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    dims = len(patch)
    offsets = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing="ij", sparse=True)
    places = []
    for axis in range(dims):
        place = sum(spatial.matrix[axis, k] * offsets[k] for k in range(dims))
        places.append(torch.from_numpy(np.ascontiguousarray(np.broadcast_to(place, patch), dtype=np.float32)))
    stacked = torch.stack(places)
    if spatial.shifts is not None:
        mode = "trilinear" if dims == 3 else "bilinear"
        control = torch.from_numpy(spatial.shifts.astype(np.float32))[None]
        stacked = stacked + F.interpolate(control, size=patch, mode=mode, align_corners=True)[0]
    scale = torch.tensor([2.0 / max(1, n - 1) for n in box]).view(-1, *[1] * dims)
    # grid_sample wants the last array axis first
    return (stacked * scale).flip(0).movedim(0, -1)[None]


def _one_hot(seg: IntArray, values: IntArray) -> FloatArray:
    """Return a channel for every value, none where they are too many to be interpolated."""
    if len(values) > MAX_LINEAR_LABELS:
        values = values[:0]
    onehot: FloatArray = (seg == values.reshape(-1, *[1] * seg.ndim)).astype(np.float32)
    return onehot


def _winner(weights: FloatArray, values: IntArray) -> IntArray:
    """Return the value of the largest weight, the first of equals (argmax, but 20 times faster)."""
    labels = np.full(weights.shape[1:], values[0], dtype=np.int16)
    best = weights[0].copy()
    for value, weight in zip(values[1:], weights[1:], strict=True):
        np.copyto(labels, value, where=weight > best, casting="same_kind")
        np.maximum(best, weight, out=best)
    return labels


def _nearest(seg: IntArray, grid: torch.Tensor) -> IntArray:
    tensor = torch.from_numpy(seg.astype(np.float32))[None, None]
    nearest = F.grid_sample(tensor, grid, mode="nearest", align_corners=True)
    labels: IntArray = nearest[0, 0].numpy().astype(np.int16)
    return labels


def _balanced(rng: np.random.Generator, ranged: Ranged) -> float:
    """Draw below or above 1 with equal chance ("BG range" of batchgenerators)."""
    if rng.random() < 0.5 and ranged.low < 1:
        return float(rng.uniform(ranged.low, 1.0))
    return float(rng.uniform(max(ranged.low, 1.0), ranged.high))


def _noise(image: FloatArray, rng: np.random.Generator, ranged: Ranged) -> FloatArray:
    if rng.random() >= ranged.p:
        return image
    sigma = rng.uniform(ranged.low, ranged.high)
    return image + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)


def _blur(
    image: FloatArray, rng: np.random.Generator, low: float, high: float, p_channel: float
) -> FloatArray:
    image = image.copy()
    for channel in range(len(image)):
        if rng.random() < p_channel:
            sigma = rng.uniform(low, high, image.ndim - 1)
            image[channel] = ndimage.gaussian_filter(image[channel], sigma, truncate=3.0)
    return image


def _contrast(channel: FloatArray, factor: float) -> FloatArray:
    mean = channel.mean()
    stretched: FloatArray = np.clip((channel - mean) * factor + mean, channel.min(), channel.max())
    return stretched


def _gamma(channel: FloatArray, gamma: float) -> FloatArray:
    mean, std, low = channel.mean(), channel.std(), channel.min()
    span = max(float(channel.max() - low), 1e-7)
    bent = np.power((channel - low) / span, gamma) * span + low
    result: FloatArray = (bent - bent.mean()) * (std / max(float(bent.std()), 1e-8)) + mean
    return result


def _low_resolution(image: FloatArray, rng: np.random.Generator, config: AugmentConfig) -> FloatArray:
    settings, size = config.low_resolution, image.shape[1:]
    image = image.copy()
    for channel in range(len(image)):
        if rng.random() < settings.p_channel:
            factor = rng.uniform(settings.low, settings.high)
            small = [max(1, round(n * factor)) for n in size]
            if is_dummy_2d(size):
                small[0] = size[0]
            tensor = torch.from_numpy(image[channel])[None, None]
            low = F.interpolate(tensor, size=small, mode="nearest-exact")
            mode = "trilinear" if len(size) == 3 else "bilinear"
            image[channel] = F.interpolate(low, size=size, mode=mode)[0, 0].numpy()
    return image


def _random_morphology(mask: FloatArray, rng: np.random.Generator, max_radius: int, dims: int) -> FloatArray:
    operation = rng.choice(["dilation", "erosion", "opening", "closing"])
    radius = int(rng.integers(1, max_radius + 1))
    axes = np.meshgrid(*[np.arange(-radius, radius + 1)] * dims, indexing="ij")
    ball = sum(a**2 for a in axes) <= radius**2
    result: FloatArray = getattr(ndimage, f"binary_{operation}")(mask, ball).astype(np.float32)
    return result


def _without_random_part(mask: FloatArray, rng: np.random.Generator, max_fraction: float) -> FloatArray:
    parts, count = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    removable = [k for k in range(1, count + 1) if sizes[k] < max_fraction * mask.size]
    if removable:
        mask = mask & (parts != rng.choice(removable))
    return mask.astype(np.float32)
