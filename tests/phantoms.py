"""Small volumes made by code for tests: every awkward grid, and the label maps that break assumptions.

Whole bodies come from `medseg.phantom`; these are for laws that must hold on any grid.
"""

import numpy as np

from medseg.types import FloatArray
from medseg.volume import Geometry, Volume


def affine(codes: str = "RAS", spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> FloatArray:
    """Return an affine whose voxel axes point to `codes`, away from the origin of the world."""
    rows = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    matrix = np.eye(4)
    matrix[:3] = 0
    for voxel, (letter, step) in enumerate(zip(codes, spacing, strict=True)):
        matrix[rows[letter], voxel] = step if letter in "RAS" else -step
    matrix[:3, 3] = (-31.5, 12.25, 100.0)
    return matrix


def tilted(matrix: FloatArray, degrees: tuple[float, float, float] = (9.0, -14.0, 21.0)) -> FloatArray:
    """Return `matrix` turned about the world axes, so that its grid is oblique."""
    turned = np.array(matrix)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        turned[:3, :3] = turn @ turned[:3, :3]
    return turned


GEOMETRIES: dict[str, Geometry] = {
    "straight": Geometry((12, 10, 8), affine()),
    "flipped": Geometry((12, 10, 8), affine("LPS", (1.0, 1.0, 2.0))),
    "permuted": Geometry((8, 12, 10), affine("SRA", (2.0, 1.0, 1.5))),
    "oblique": Geometry((11, 9, 8), tilted(affine("LAS", (0.9, 1.1, 1.3)))),
    "anisotropic": Geometry((14, 14, 5), affine("RAS", (0.7, 0.7, 5.0))),
    "one slice": Geometry((16, 12, 1), affine("LPS", (1.0, 1.0, 4.0))),
    "one voxel": Geometry((1, 1, 1), affine()),
    "micron": Geometry((9, 10, 11), affine("RAS", (0.127, 0.127, 0.28)), "micron"),
}


def noise(geometry: Geometry, seed: int = 0, channels: int = 1) -> Volume:
    """Return float32 noise about 100 with standard deviation 20."""
    values = np.random.default_rng(seed).normal(100, 20, (channels, *geometry.shape))
    return Volume(values.astype(np.float32), geometry)


def ball(geometry: Geometry, value: int = 1) -> Volume:
    """Return a label map with an ellipsoid that fills half of each side, in the middle of the grid."""
    index = np.indices(geometry.shape, dtype=float)
    half = np.array(geometry.shape).reshape(3, 1, 1, 1) / 2
    inside = (((index + 0.5 - half) / (0.5 * half)) ** 2).sum(axis=0) <= 1
    return Volume((inside * value).astype(np.uint8), geometry)


def touching(geometry: Geometry) -> Volume:
    """Return labels 1 and 2 that fill the grid's middle and share a face along the first axis."""
    array = np.zeros(geometry.shape, np.uint8)
    half = geometry.shape[0] // 2
    inner = tuple(slice(n // 4, max(n // 4 + 1, n - n // 4)) for n in geometry.shape[1:])
    array[(slice(geometry.shape[0] // 4, half), *inner)] = 1
    array[(slice(half, geometry.shape[0] - geometry.shape[0] // 4), *inner)] = 2
    return Volume(array, geometry)


def empty(geometry: Geometry) -> Volume:
    """Return a label map of zeros."""
    return Volume(np.zeros(geometry.shape, np.uint8), geometry)
