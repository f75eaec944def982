"""Scenes of touching cells with random shapes, contrast, blur and noise, drawn as training goes.

A network that has seen only such scenes does not depend on any organ, stain or microscope. The idea is
that of Billot et al., SynthSeg, Medical Image Analysis 86 (2023); for nuclei, touching ellipsoids serve as in
Weigert et al., StarDist 3D, WACV 2020.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medseg.train.centre_config import CentreConfig, SyntheticConfig
from medseg.train.centre_samples import make_goal
from medseg.train.config import TrainConfig
from medseg.train.samples import Sample
from medseg.train.shapes import smooth_noise
from medseg.types import FloatArray, IntArray


@dataclass(frozen=True)
class SyntheticSampler:
    """Draws scenes; the counterpart of `medseg.train.centre_samples.CentreSampler`.

    Attributes
    ----------
    patch : voxels an axis
    settings : the recipe, with `synthetic`
    train : False: other scenes of the same kind
    """

    patch: tuple[int, ...]
    settings: CentreConfig
    train: bool = True

    @property
    def config(self) -> TrainConfig:
        """The loop's settings."""
        return self.settings.train

    def sample(self, number: int, forced: bool) -> Sample:
        """Return scene `number` of the run; one in twenty of those not `forced` has no cell."""
        rng = np.random.default_rng([self.config.seed, int(self.train), number])
        scene = self.settings.synthetic
        assert scene is not None  # chosen by the recipe
        labels: IntArray = np.zeros(self.patch, np.int32)
        if forced or rng.random() > 0.05:
            labels = draw_cells(self.patch, scene, rng)
        image = paint_cells(labels, scene, rng)
        channels = self.settings.channels or 1
        shown = np.repeat(image[None], channels, axis=0)
        return Sample(np.ascontiguousarray(shown), make_goal(labels, self.settings.object_voxels))


def draw_cells(shape: tuple[int, ...], config: SyntheticConfig, rng: np.random.Generator) -> IntArray:
    """Return a label map of wobbly ellipsoids that touch where they are crowded, int32.

    A voxel that several reach belongs to the one in which it lies relatively deepest, so that neighbours
    meet in a wall between them.
    """
    n = len(shape)
    low, high = config.diameter
    mean = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    content = (np.pi / 4 if n == 2 else np.pi / 6) * mean**n
    margin = 0.5 * mean
    crowd = float(np.exp(rng.uniform(*np.log(config.crowd))))
    count = max(1, round(crowd * float(np.prod(np.array(shape) + 2 * margin)) / content))
    wobble = [smooth_noise(shape, max(1.5, 0.2 * mean), rng) for _ in range(2)]
    strength = float(rng.uniform(0, 0.12))
    elongation = float(np.exp(rng.uniform(0, np.log(config.elongation))))
    turn_all = _turn(n, rng) if rng.random() < 0.5 else None
    labels = np.zeros(shape, np.int32)
    best = np.ones(shape, np.float32)
    cluster = _cluster_centres(shape, rng) if rng.random() < 0.5 else None
    for number in range(1, count + 1):
        radius = 0.5 * mean * float(np.exp(rng.normal(0, config.spread)))
        axes = radius * elongation ** (rng.uniform(-0.5, 0.5, n))
        middle = _draw_middle(shape, margin, mean, cluster, rng)
        turn = _turn(n, rng) if turn_all is None else turn_all
        _add_cell(labels, best, number, middle, axes, turn, (wobble[number % 2], strength))
    return _without_crumbs(labels, 0.12 * content)


def _turn(n: int, rng: np.random.Generator) -> FloatArray:
    return np.asarray(np.linalg.qr(rng.standard_normal((n, n)))[0])


def _cluster_centres(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    return np.asarray(rng.uniform(0, 1, (int(rng.integers(1, 5)), len(shape))) * shape)


def _draw_middle(
    shape: tuple[int, ...], margin: float, mean: float, cluster: FloatArray | None, rng: np.random.Generator
) -> FloatArray:
    """Return where a cell lies: anywhere, or near one of the cluster's centres."""
    if cluster is None or rng.random() < 0.2:
        return np.asarray(rng.uniform(-margin, np.array(shape) + margin))
    return np.asarray(cluster[int(rng.integers(len(cluster)))] + rng.normal(0, 1.3 * mean, len(shape)))


def _add_cell(
    labels: IntArray,
    best: FloatArray,
    number: int,
    middle: FloatArray,
    axes: FloatArray,
    turn: FloatArray,
    wobble: tuple[FloatArray, float],
) -> None:
    """Draw one ellipsoid into `labels` where its relative radius is below 1 and below that of the others."""
    reach = float(axes.max()) * 1.2
    low = np.maximum(np.floor(middle - reach), 0).astype(int)
    high = np.minimum(np.ceil(middle + reach) + 1, labels.shape).astype(int)
    if (high <= low).any():
        return
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    grids = np.ogrid[box]
    relative = np.zeros(tuple(high - low), np.float32)
    for row, axis in zip(turn, axes, strict=True):
        along = sum(w * (g - m) for w, g, m in zip(row, grids, middle, strict=True))
        relative += np.asarray(along / axis, np.float32) ** 2
    field, strength = wobble
    relative = np.sqrt(relative) + np.float32(strength) * field[box]
    inside = relative < np.minimum(best[box], 1.0)
    labels[box][inside] = number
    best[box][inside] = relative[inside]


def _without_crumbs(labels: IntArray, least: float) -> IntArray:
    """Remove what others have left of a cell, if it is little, unless the border cut it."""
    sizes = np.bincount(labels.ravel())
    crumbs = sizes < least
    for axis in range(labels.ndim):
        for side in (0, -1):
            crumbs[np.unique(np.take(labels, side, axis))] = False
    return np.where(crumbs[labels], 0, labels).astype(np.int32)


def paint_cells(labels: IntArray, config: SyntheticConfig, rng: np.random.Generator) -> FloatArray:
    """Return an image of a scene, float32, about 0 to 1: fluorescence of a random kind."""
    shape = labels.shape
    count = int(labels.max())
    brightness = rng.uniform(rng.uniform(0.15, 0.9), 1.0, count + 1)
    brightness[0] = 0.0
    inside = brightness[labels].astype(np.float32)
    cells = inside > 0
    if rng.random() < 0.7:  # chromatin
        texture = smooth_noise(shape, float(rng.uniform(0.8, 4)), rng)
        inside *= np.clip(1 + float(rng.uniform(0, 0.4)) * texture, 0.1, 2.0)
    if rng.random() < 0.3:  # bright or dark rims
        depth = ndimage.gaussian_filter(cells.astype(np.float32), 1.5)
        inside *= 1 + float(rng.uniform(-0.6, 0.8)) * (1 - depth)
    image: FloatArray = inside + _surroundings(labels, rng)
    image = _blur(image, config, rng)
    image = _add_noise(image, config, rng)
    low, high = np.percentile(image, (0.1, 99.9))
    image = np.asarray(image - low) / max(float(high - low), 1e-6)
    power = float(np.exp(rng.uniform(-0.5, 0.5)))
    bent = np.sign(image) * np.abs(image) ** power
    return np.asarray(np.clip(bent, -1, 2), np.float32)


def _surroundings(labels: IntArray, rng: np.random.Generator) -> FloatArray:
    """Return what shines besides the cells: cytoplasm, walls, a slow gradient, specks."""
    shape = labels.shape
    result = np.zeros(shape, np.float32)
    if rng.random() < 0.6:
        slow = smooth_noise(shape, float(rng.uniform(6, 24)), rng)
        result += float(rng.uniform(0, 0.25)) * slow
    if rng.random() < 0.5:
        result += float(rng.uniform(0, 0.3)) * np.clip(
            smooth_noise(shape, float(rng.uniform(1, 5)), rng), 0, 3
        )
    if rng.random() < 0.25:  # walls and fibres: where a smooth field passes zero
        field = np.abs(smooth_noise(shape, float(rng.uniform(4, 12)), rng))
        result += float(rng.uniform(0.1, 1.0)) * (field < float(rng.uniform(0.03, 0.15)))
    if rng.random() < 0.3:
        specks = rng.random(shape) < float(10 ** rng.uniform(-4, -2.7))
        spots = ndimage.gaussian_filter(specks.astype(np.float32), float(rng.uniform(0.4, 1.2)))
        result += float(rng.uniform(0.5, 2.0)) * spots / max(float(spots.max()), 1e-6)
    return result


def _blur(image: FloatArray, config: SyntheticConfig, rng: np.random.Generator) -> FloatArray:
    """Blur as a microscope does: along one axis up to three times as much."""
    sigma = np.full(image.ndim, rng.uniform(*config.blur))
    if image.ndim == 3 and rng.random() < 0.7:
        sigma[int(rng.integers(3))] *= rng.uniform(1, 3)
    return np.asarray(ndimage.gaussian_filter(image, sigma, truncate=2.5))


def _add_noise(image: FloatArray, config: SyntheticConfig, rng: np.random.Generator) -> FloatArray:
    """Add noise of voxels, some of it blurred by resampling, part of it growing with brightness."""
    low, high = config.noise
    strength = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.5:
        sigma = rng.uniform(0.3, 0.8, image.ndim)
        noise = ndimage.gaussian_filter(noise, sigma, truncate=2.5)
        noise /= max(float(noise.std()), 1e-6)
    if rng.random() < 0.5:
        noise = noise * np.sqrt(np.clip(image, 0.02, None))
    return image + np.float32(strength) * noise
