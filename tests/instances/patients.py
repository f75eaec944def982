"""A patient with lesions at two times, made by formulas: what moved, what grew, and how is known."""

from dataclasses import dataclass

import numpy as np

from medseg.instances.schema import Instances, instances_of
from medseg.types import FloatArray
from medseg.volume import Geometry, Volume


@dataclass(frozen=True)
class Ball:
    """A lesion: centre and radius in mm, in the frame of the baseline."""

    label: int
    centre: tuple[float, float, float]
    radius: float


def rigid(degrees: tuple[float, float, float], shift: tuple[float, float, float]) -> FloatArray:
    """Return a rotation about the axes of the world, then a shift in mm."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = (k for k in range(3) if k != axis)
        turn = np.eye(4)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    matrix[:3, 3] = shift
    return matrix


def world_of(geometry: Geometry, transform: FloatArray) -> FloatArray:
    """Return (n, 3) baseline positions of all voxels of a grid that lies in the other frame."""
    index = np.indices(geometry.shape).reshape(3, -1)
    matrix = np.linalg.inv(transform) @ geometry.affine
    return np.asarray((matrix[:3, :3] @ index).T + matrix[:3, 3])


def lesions(geometry: Geometry, balls: list[Ball], transform: FloatArray | None = None) -> Instances:
    """Return balls as a label map; balls of one label are one object."""
    points = world_of(geometry, np.eye(4) if transform is None else transform)
    labels = np.zeros(len(points), np.int32)
    for ball in balls:
        labels[np.linalg.norm(points - ball.centre, axis=1) <= ball.radius] = ball.label
    return instances_of(Volume(labels.reshape(geometry.shape), geometry))


def body(geometry: Geometry, transform: FloatArray | None = None, seed: int = 0) -> Volume:
    """Return an image with an outline and blobs inside, the same anatomy on any grid."""
    points = world_of(geometry, np.eye(4) if transform is None else transform)
    rng = np.random.default_rng(7)
    inside = ((points / (42.0, 34.0, 38.0)) ** 2).sum(axis=1) <= 1
    image = 100.0 * inside
    for _ in range(14):
        centre, width = rng.uniform(-24, 24, 3), rng.uniform(4, 9)
        image += (
            rng.uniform(40, 120) * np.exp(-((points - centre) ** 2).sum(axis=1) / (2 * width**2)) * inside
        )
    image += np.random.default_rng(seed).normal(0, 3, len(image))
    return Volume(image.reshape(geometry.shape).astype(np.float32), geometry)


def centred(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Geometry:
    """Return a grid whose middle is the origin of the world."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return Geometry(shape, affine)
