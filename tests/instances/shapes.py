"""Objects with known sizes for tests of measuring, on any grid."""

import numpy as np

from medseg.instances.schema import Instances, instances_of
from medseg.types import FloatArray, IntArray
from medseg.volume import Geometry, Volume
from tests.phantoms import affine, tilted


def rotation(seed: int) -> FloatArray:
    """Return a random rotation."""
    matrix, upper = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    matrix = matrix * np.sign(np.diag(upper))
    return np.asarray(matrix * np.sign(np.linalg.det(matrix)))


def ellipsoid(geometry: Geometry, half_axes: tuple[float, ...], turn: FloatArray | None = None) -> Instances:
    """Return one ellipsoid in the middle of a grid; half-axes in mm along the columns of `turn`."""
    index = np.indices(geometry.shape).reshape(3, -1)
    middle = (np.array(geometry.shape) - 1) / 2
    world = geometry.affine[:3, :3] @ (index - middle[:, None])
    along = (np.eye(3) if turn is None else turn).T @ world
    inside = ((along / np.array(half_axes)[:, None]) ** 2).sum(axis=0) <= 1
    return instances_of(Volume(inside.reshape(geometry.shape).astype(np.uint8), geometry))


def ellipse(
    shape: tuple[int, int], spacing: tuple[float, float], axes: tuple[float, float], degrees: float
) -> Instances:
    """Return one ellipse with full axes in mm, turned from the first axis of the array to the second."""
    x, y = (np.indices(shape) - (np.array(shape).reshape(2, 1, 1) - 1) / 2) * np.reshape(spacing, (2, 1, 1))
    angle = np.deg2rad(degrees)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    inside = (2 * along / axes[0]) ** 2 + (2 * across / axes[1]) ** 2 <= 1
    grid = Geometry((*shape, 1), np.diag([*spacing, 1.0, 1.0]))
    return instances_of(Volume(inside[..., None].astype(np.uint8), grid))


OBLIQUE = tilted(affine("LAS", (0.8, 1.0, 1.6)))


def scattered(shape: tuple[int, ...], count: int, seed: int = 0) -> IntArray:
    """Return boxes of random sizes at random places, later ones over earlier ones; some may vanish."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for label in range(1, count + 1):
        low = [int(rng.integers(0, n)) for n in shape]
        labels[tuple(slice(a, a + int(rng.integers(1, 6))) for a in low)] = label
    return labels


def objects(labels: IntArray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), unit: str = "mm") -> Instances:
    """Return instances of an array of two or three axes on a straight grid."""
    array = labels if labels.ndim == 3 else labels[..., None]
    sizes = (*spacing, 1.0)[:3]
    geometry = Geometry(array.shape, np.diag([*sizes, 1.0]), "micron" if unit == "micron" else "mm")
    return instances_of(Volume(array, geometry))
