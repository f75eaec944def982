"""Label maps of shapes that nobody has seen: what the refiner learns to follow edges on.

Source of the idea: Hoffmann et al., SynthMorph (2022), and Billot et al., SynthSeg (2023): a network trained
on random shapes with random contrast does not come to depend on any organ or scanner.
"""

import numpy as np
import SimpleITK
from scipy import ndimage

from medseg.types import FloatArray, IntArray

SIZE = 80  # voxels along each axis of a synthetic label map


def smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> FloatArray:
    """Return Gaussian noise of correlation length `sigma` voxels, mean 0 and deviation 1, float32."""
    # Drawn coarse and enlarged: a blur of many voxels costs seconds at full size.
    step = max(1.0, sigma / 2)
    coarse = tuple(max(3, int(np.ceil(n / step)) + 3) for n in shape)
    field = ndimage.gaussian_filter(rng.standard_normal(coarse).astype(np.float32), sigma / step)
    grown = ndimage.zoom(field, [n / (c - 3) for n, c in zip(shape, coarse, strict=True)], order=1)
    cut = tuple(slice(0, n) for n in shape)
    result = grown[cut]
    return np.asarray((result - result.mean()) / (result.std() + 1e-6), dtype=np.float32)


def draw_label_map(rng: np.random.Generator, size: int = SIZE) -> IntArray:
    """Return one synthetic label map, (size, size, size) uint8, from one mixture of shapes."""
    shape = (size, size, size)
    labels = _cells(shape, int(rng.integers(3, 16)), rng)
    for _ in range(int(rng.integers(4, 12))):
        draw = (_blob, _blob, _tube, _shell, _burr)[int(rng.integers(5))]
        draw(labels, int(labels.max()) + 1, rng)
    return labels


def draw_regions(image: FloatArray, rng: np.random.Generator, smallest: int = 120) -> IntArray:
    """Return what the edges of a real image enclose, as labels like its shape, uint8; 0 between them.

    Basins of the gradient, merged up to a random height: shapes that no model and no expert has labelled.
    """
    sigma = float(rng.uniform(0.8, 2))
    steep = ndimage.gaussian_gradient_magnitude(image.astype(np.float32), sigma)
    height = float(np.quantile(steep, 0.99) * rng.uniform(0.03, 0.1))
    basins = SimpleITK.MorphologicalWatershed(
        SimpleITK.GetImageFromArray(steep), level=height, markWatershedLine=False, fullyConnected=False
    )
    found = SimpleITK.GetArrayFromImage(basins)
    values = rng.integers(1, 255, int(found.max()) + 1).astype(np.uint8)
    values[np.bincount(found.ravel(), minlength=len(values)) < smallest] = 0
    values[np.unique(found[image <= image.min()])] = 0  # air, or what a window cut off
    return np.asarray(values[found])


def _cells(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> IntArray:
    """Divide the space into `count` smooth, touching parts."""
    sigma = float(np.exp(rng.uniform(np.log(4), np.log(16))))
    best = smooth_noise(shape, sigma, rng)
    labels = np.zeros(shape, dtype=np.uint8)
    for value in range(1, count):
        field = smooth_noise(shape, sigma, rng)
        labels[field > best] = value
        np.maximum(best, field, out=best)
    return labels


def _ellipsoid(shape: tuple[int, ...], rng: np.random.Generator, largest: float) -> FloatArray:
    """Return the signed depth (positive inside, in voxels, roughly) of a turned ellipsoid."""
    middle = rng.uniform(0.15, 0.85, 3) * shape
    radii = np.exp(rng.uniform(np.log(3.0), np.log(largest), 3))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    axes = [np.arange(n, dtype=np.float32) - m for n, m in zip(shape, middle, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    squared = np.zeros(shape, dtype=np.float32)
    for row, radius in zip(turn, radii, strict=True):
        along = sum(np.float32(w / radius) * g for w, g in zip(row, grid, strict=True))
        squared += np.asarray(along) ** 2
    return np.asarray((1 - np.sqrt(squared)) * np.float32(radii.mean()))


def _paint(labels: IntArray, value: int, inside: FloatArray) -> None:
    labels[inside > 0] = value


def _blob(labels: IntArray, value: int, rng: np.random.Generator) -> None:
    """An organ: an ellipsoid with a wavy surface."""
    depth = _ellipsoid(labels.shape, rng, 24)
    rough = float(rng.uniform(0, 3))
    _paint(labels, value, depth + rough * smooth_noise(labels.shape, float(rng.uniform(3, 9)), rng))


def _burr(labels: IntArray, value: int, rng: np.random.Generator) -> None:
    """A lesion: irregular, with lobes and spikes."""
    depth = _ellipsoid(labels.shape, rng, 14)
    rough = float(rng.uniform(1, 5))
    _paint(labels, value, depth + rough * smooth_noise(labels.shape, float(rng.uniform(1.5, 4)), rng))


def _shell(labels: IntArray, value: int, rng: np.random.Generator) -> None:
    """An organ in a wall of another material."""
    depth = _ellipsoid(labels.shape, rng, 22)
    depth = depth + float(rng.uniform(0, 2)) * smooth_noise(labels.shape, 5.0, rng)
    _paint(labels, value, depth)
    _paint(labels, value + 1, depth - float(rng.uniform(2, 7)))


def _tube(labels: IntArray, value: int, rng: np.random.Generator) -> None:
    """A vessel or a bowel: a random curve of changing radius, sometimes forked."""
    shape = labels.shape
    line = np.ones(shape, dtype=bool)
    for _ in range(int(rng.integers(1, 3))):
        line[tuple(_curve(shape, rng).T)] = False
    distance = ndimage.distance_transform_edt(line).astype(np.float32)
    radius = float(rng.uniform(1.5, 8))
    waves = float(rng.uniform(0, 0.3)) * radius
    _paint(labels, value, radius - distance + waves * smooth_noise(shape, 8.0, rng))


def _curve(shape: tuple[int, ...], rng: np.random.Generator) -> IntArray:
    """Return the voxels of a random curve through the volume, (n, 3)."""
    knots = rng.uniform(0.05, 0.95, (int(rng.integers(3, 6)), 3)) * (np.array(shape) - 1)
    at = np.linspace(0, len(knots) - 1, 400)
    curve = np.stack([np.interp(at, range(len(knots)), knots[:, axis]) for axis in range(3)], 1)
    smooth = ndimage.gaussian_filter1d(curve, 25, axis=0, mode="nearest")
    voxels: IntArray = np.clip(np.rint(smooth), 0, np.array(shape) - 1).astype(np.int64)
    return voxels
