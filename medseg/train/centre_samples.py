"""Patches for a centre-offset network: a place, a size and a look that are drawn, and what is to be learned.

Every sample is a function of (seed, stream, number), as in `medseg.train.samples`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medseg.errors import TrainingError
from medseg.instances.centre_targets import make_targets, number_objects
from medseg.instances.rescale import labels_to_grid, normalise, one_if_equal, to_grid
from medseg.io.channels import set_channels
from medseg.train.centre_config import CentreAugment, CentreConfig
from medseg.train.config import Ranged, TrainConfig
from medseg.train.samples import Sample
from medseg.types import Array, FloatArray, IntArray

# Cases are kept no finer than this many voxels a voxel of the network: the rest would be thrown away.
KEPT = 1.3
# Voxels of each class of stuff that patches are drawn around, besides the objects. Of small areas far from
# all objects, a network found nothing without them, and had a PQ of 0.94 with them (200 steps, drawn scenes).
STUFF_PLACES = 4


@dataclass(frozen=True, eq=False)
class CentreCase:
    """An image and its objects in memory.

    Attributes
    ----------
    name : str
    image : (channel, *shape) float32
        0 to 1 between its extreme percentiles; one channel if all are equal.
    labels : (*shape) int32
        Objects 1..K.
    step : (n,) float
        Voxels of this image along each axis in a voxel of the network, when objects have their usual size.
    middles : (m, n) float
        A voxel of each object, roughly its middle, and some voxels of each class of stuff.
    classes : (*shape) uint8
        Class of each voxel; 1 in objects where there is only one.
    """

    name: str
    image: FloatArray
    labels: IntArray
    step: FloatArray
    middles: FloatArray
    classes: IntArray

    @property
    def colour(self) -> bool:
        """Whether its channels differ."""
        return len(self.image) > 1


def median_diameter(labels: IntArray, spacing: Sequence[float]) -> float:
    """Return the diameter, physical, of the object in which the middle voxel of all objects lies; 0 for none.

    It is that of a disc or ball of the same content. Weighting by content keeps crumbs and objects that the
    border cuts from ruling.
    """
    index, count = number_objects(labels)
    if not count:
        return 0.0
    sizes = np.sort(np.bincount(index.ravel(), minlength=count + 1)[1:])
    middle = sizes[np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)]
    return diameter_of(float(middle) * float(np.prod(spacing)), len(spacing))


def diameter_of(content: float, dimensions: int) -> float:
    """Return the diameter of a disc of this area, or of a ball of this volume."""
    if dimensions == 2:
        return float(2 * np.sqrt(content / np.pi))
    return float((6 * content / np.pi) ** (1 / 3))


def make_case(
    name: str,
    image: Array,
    labels: IntArray,
    spacing: Sequence[float],
    diameter: float,
    config: CentreConfig,
    classes: IntArray | None = None,
) -> CentreCase:
    """Bring an image (channel, *shape) and its label map to about the network's voxels.

    Parameters
    ----------
    diameter : physical, of what is to become `config.object_voxels` wide
    classes : (*shape), class of each voxel; 1 in objects, if not given
    """
    voxel = diameter / config.object_voxels
    shape = labels.shape
    finest = [max(s, voxel / KEPT) for s in spacing]
    sizes = tuple(max(1, round(n * s / f)) for n, s, f in zip(shape, spacing, finest, strict=True))
    shown = to_grid(normalise(one_if_equal(image), config.percentiles), sizes)
    kept, count = number_objects(labels_to_grid(labels, sizes))
    actual = np.array(shape) * np.asarray(spacing, float) / sizes
    known = (kept > 0 if classes is None else labels_to_grid(classes, sizes)).astype(np.uint8)
    middles = ndimage.center_of_mass(kept > 0, kept, np.arange(1, count + 1)) if count else []
    return CentreCase(
        name,
        np.ascontiguousarray(shown),
        kept,
        voxel / actual,
        np.concatenate([np.asarray(middles, float).reshape(-1, labels.ndim), _stuff_places(known, kept)]),
        known,
    )


def _stuff_places(classes: IntArray, labels: IntArray) -> FloatArray:
    """Return some voxels of every class that no object has, (m, n): rare stuff has to be seen, too."""
    places = [np.zeros((0, classes.ndim))]
    alone = np.where(labels == 0, classes, 0).ravel()
    for value in np.flatnonzero(np.bincount(alone[alone > 0])):
        voxels = np.flatnonzero(alone == value)
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(STUFF_PLACES, len(voxels))).astype(int)]
        places.append(np.stack(np.unravel_index(chosen, classes.shape), 1))
    return np.concatenate(places)


class CentreSampler:
    """Draws patches and their goals, (2 + n, *patch): class, distance, offset in typical radii.

    Parameters
    ----------
    cases : several CentreCase
    patch : voxels an axis
    config : the recipe
    train : False for validation: cases as they are
    channels : of the network; if not given, of the recipe, or the most of these cases
    """

    def __init__(
        self,
        cases: Sequence[CentreCase],
        patch: tuple[int, ...],
        config: CentreConfig,
        train: bool = True,
        channels: int | None = None,
    ) -> None:
        if not cases:
            raise TrainingError("no cases to draw patches from. Check the split and the dataset.")
        self.cases, self.patch, self.settings, self.train = cases, patch, config, train
        self.config: TrainConfig = config.train
        self.weights = _weights(cases, config)
        self.channels = channels or count_channels(cases, config)

    def sample(self, number: int, forced: bool) -> Sample:
        """Return patch `number` of the run; `forced` puts an object near its middle."""
        rng = np.random.default_rng([self.config.seed, int(self.train), number])
        case = self.cases[int(rng.choice(len(self.cases), p=self.weights))]
        middle = _draw_middle(case, rng, forced)
        matrix = np.diag(case.step)
        if self.train:
            matrix = matrix @ draw_matrix(len(self.patch), self.settings.augment, rng)
        image, labels, classes = read_patch(case, middle, matrix, self.patch)
        if self.train:
            image, labels, classes = _mirrored(image, labels, classes, self.settings.augment, rng)
            image = change_look(image, labels, self.settings.augment, rng)
        image = np.ascontiguousarray(set_channels(image, self.channels))
        return Sample(image, make_goal(labels, self.settings.object_voxels, classes))


def count_channels(cases: Sequence[CentreCase], config: CentreConfig) -> int:
    """Return the channels that a network of the recipe takes: the most of all cases, if it does not say."""
    return config.channels or max(len(case.image) for case in cases)


def make_goal(labels: IntArray, object_voxels: float, classes: IntArray | None = None) -> FloatArray:
    """Return what a network is to say of a patch: (2 + n, *patch) float32.

    Parameters
    ----------
    classes : (*patch), class of each voxel; 1 in objects, if not given
    """
    targets = make_targets(labels, (1.0,) * labels.ndim)
    known = ((labels > 0) if classes is None else classes).astype(np.float32)
    return np.concatenate([known[None], targets.distance[None], targets.offset * (2 / object_voxels)])


def _weights(cases: Sequence[CentreCase], config: CentreConfig) -> FloatArray:
    """Return the probability of each case."""
    weights = np.ones(len(cases))
    if config.groups is not None:
        colour = np.array([case.colour for case in cases])
        for name, share in config.groups.items():
            members = colour == (name == "colour")
            weights[members] = share / max(1, int(np.count_nonzero(members)))
    return np.asarray(weights / weights.sum())


def _draw_middle(case: CentreCase, rng: np.random.Generator, forced: bool) -> FloatArray:
    shape = np.array(case.labels.shape)
    if forced and len(case.middles):
        jitter = rng.normal(0, 10, len(shape)) * case.step
        return np.asarray(np.clip(case.middles[int(rng.integers(len(case.middles)))] + jitter, 0, shape - 1))
    return np.asarray(rng.uniform(0, 1, len(shape)) * (shape - 1))


def draw_matrix(dimensions: int, config: CentreAugment, rng: np.random.Generator) -> FloatArray:
    """Return the map from a patch's voxels to the case's, both at the usual size of objects."""
    matrix = np.eye(dimensions)
    if rng.random() < config.rotate:
        turn, _ = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))
        matrix = turn if np.linalg.det(turn) > 0 else turn[::-1]
    factor = np.exp(rng.uniform(-1, 1) * np.log(config.zoom))
    factors = factor * np.exp(rng.uniform(-1, 1, dimensions) * np.log(config.stretch))
    return np.asarray(matrix * factors)


def read_patch(
    case: CentreCase, middle: FloatArray, matrix: FloatArray, patch: tuple[int, ...]
) -> tuple[FloatArray, IntArray, IntArray]:
    """Read a patch around `middle` (voxels of the case); beyond its border the image is mirrored.

    Returns
    -------
    image : (channel, *patch) float32, linear
    labels : (*patch) int32, nearest; a mirrored object is another object
    classes : (*patch) uint8, nearest
    """
    n = len(patch)
    offsets = np.stack(np.meshgrid(*[np.arange(p) - (p - 1) / 2 for p in patch], indexing="ij"))
    places = np.tensordot(matrix, offsets, 1) + np.reshape(middle, (n, *[1] * n))
    index, copy = [], np.zeros(patch, np.int32)
    grid = np.empty((n, *patch), np.float32)
    for axis, size in enumerate(case.labels.shape):
        folded, turn = _fold(places[axis], size)
        index.append(np.clip(np.rint(folded), 0, size - 1).astype(np.int64))
        copy = copy * 3 + turn
        grid[n - 1 - axis] = (2 * folded + 1) / size - 1  # grid_sample wants the last axis first
    labels: IntArray = case.labels[tuple(index)]
    if copy.any():
        labels = np.where(labels > 0, labels + copy * (int(case.labels.max()) + 1), 0)
    image = F.grid_sample(
        torch.from_numpy(case.image)[None],
        torch.from_numpy(np.moveaxis(grid, 0, -1))[None],
        padding_mode="border",
        align_corners=False,
    )
    return image[0].numpy(), labels.astype(np.int32), case.classes[tuple(index)]


def _fold(places: FloatArray, size: int) -> tuple[FloatArray, IntArray]:
    """Return positions mirrored into 0..size-1 and which copy (of three) of the image each was in."""
    moved = places + 0.5
    turn = np.floor(moved / size)
    inside = moved - turn * size
    folded = np.where(turn % 2 == 1, size - inside, inside) - 0.5
    return folded, (np.abs(turn) + (turn < 0)).astype(np.int32) % 3


def _mirrored(
    image: FloatArray, labels: IntArray, classes: IntArray, config: CentreAugment, rng: np.random.Generator
) -> tuple[FloatArray, IntArray, IntArray]:
    axes = tuple(axis for axis in range(labels.ndim) if config.mirror and rng.random() < 0.5)
    if not axes:
        return image, labels, classes
    shown = np.flip(image, tuple(a + 1 for a in axes)).copy()
    return shown, np.flip(labels, axes).copy(), np.flip(classes, axes).copy()


def change_look(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    """Change brightness, contrast, colours, sharpness and noise of a patch; float32.

    Returns
    -------
    (channel, *patch), of one channel where there are no colours or they were taken away
    """
    colour = len(image) > 1 and rng.random() >= config.grey
    result = image if colour else image.mean(axis=0, keepdims=True)
    if colour and rng.random() < config.recolour:
        result = _recoloured(result, rng)
    for apply in (_dimmed, _bent, _stretched, _shaded):
        result = apply(result, labels, config, rng)
    if rng.random() < config.invert:
        result = 1 - result
    for apply in (_blurred, _noisy):
        result = apply(result, labels, config, rng)
    return np.clip(result, -1, 2).astype(np.float32)


def _draw(ranged: Ranged, rng: np.random.Generator) -> float | None:
    """Return a value of the range, or None where the transform is not drawn."""
    return float(rng.uniform(ranged.low, ranged.high)) if rng.random() < ranged.p else None


def _recoloured(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    mixed = image[rng.permutation(len(image))] if rng.random() < 0.3 else image
    shape = (len(image), *[1] * (image.ndim - 1))
    return np.asarray(mixed * rng.uniform(0.7, 1.2, shape) + rng.uniform(-0.1, 0.1, shape), np.float32)


def _dimmed(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    """Bring each object nearer to the background by a factor of its own."""
    if rng.random() >= config.dim.p or not labels.any() or labels.all():
        return image
    numbers, count = number_objects(labels)
    factors = rng.uniform(config.dim.low, config.dim.high, count + 1)
    factors[0] = 1.0
    field = ndimage.gaussian_filter(factors[numbers].astype(np.float32), 0.7)
    background = np.median(image[:, labels == 0], axis=1).reshape(-1, *[1] * labels.ndim)
    return np.asarray(background + (image - background) * field, np.float32)


def _bent(image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator) -> FloatArray:
    if rng.random() >= config.gamma.p:
        return image
    power = np.exp(rng.uniform(np.log(config.gamma.low), np.log(config.gamma.high)))
    if rng.random() < 0.3:
        return np.asarray(1 - np.power(np.clip(1 - image, 0, 2), power), np.float32)
    return np.asarray(np.power(np.clip(image, 0, 2), power), np.float32)


def _stretched(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    factor, shift = _draw(config.contrast, rng), _draw(config.brightness, rng)
    if factor is not None:
        mean = image.mean()
        image = (image - mean) * np.float32(factor) + mean
    return image if shift is None else image + np.float32(shift)


def _shaded(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    strength = _draw(config.shade, rng)
    if strength is None:
        return image
    coarse = torch.from_numpy(rng.standard_normal((1, 1, *[3] * labels.ndim)).astype(np.float32))
    mode = "bilinear" if labels.ndim == 2 else "trilinear"
    slow: Tensor = F.interpolate(coarse, size=labels.shape, mode=mode, align_corners=True)
    return np.asarray(image + np.float32(strength) * slow[0].numpy())


def _blurred(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    sigma = _draw(config.blur, rng)
    if sigma is None:
        return image
    return np.stack([ndimage.gaussian_filter(channel, sigma, truncate=3.0) for channel in image])


def _noisy(
    image: FloatArray, labels: IntArray, config: CentreAugment, rng: np.random.Generator
) -> FloatArray:
    sigma, photons = _draw(config.noise, rng), _draw(config.speckle, rng)
    if sigma is not None:
        image = image + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    if photons is not None:
        root = np.sqrt(np.clip(image, 0, 1)) * np.float32(photons)
        image = image + root * rng.standard_normal(image.shape, dtype=np.float32)
    return image
