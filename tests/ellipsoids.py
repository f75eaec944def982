"""Thousands of touching ellipsoids: the phantom of counting and splitting, whose truth is known."""

import numpy as np

from medseg.types import FloatArray, IntArray

# Parts of the pitch of the lattice: how far a centre moves along each axis, and the shortest and longest
# half axis. On a lattice of 17 x 17 x 17 in 512 voxels, nearly everything touches: 4,913 cells are 153
# components over corners.
JITTER = 0.2
HALF_AXES = (0.38, 0.60)


def touching_ellipsoids(per_axis: int = 17, size: int = 512, seed: int = 0) -> IntArray:
    """Return labels 1 to ``per_axis ** 3`` on a cube of ``size`` voxels a side, uint16.

    A voxel belongs to the ellipsoid in which its radius, as a part of the surface's, is smallest. One
    generator gives jitters, half axes and rotations (of a QR decomposition of normals), in this order.
    """
    pitch = size / per_axis
    count = per_axis**3
    rng = np.random.default_rng(seed)
    lattice = (np.indices((per_axis,) * 3).reshape(3, -1).T + 0.5) * pitch
    centres = lattice + rng.uniform(-JITTER, JITTER, (count, 3)) * pitch
    axes = rng.uniform(*HALF_AXES, (count, 3)) * pitch
    turns = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    labels = np.zeros((size,) * 3, dtype=np.uint16)
    nearest = np.ones((size,) * 3, dtype=np.float32)  # on the surface; nothing beyond it is inside
    for label, (centre, half, turn) in enumerate(zip(centres, axes, turns, strict=True), start=1):
        reach = np.sqrt((turn**2 * half**2).sum(axis=1))
        low = np.maximum(np.floor(centre - reach).astype(int), 0)
        high = np.minimum(np.ceil(centre + reach).astype(int) + 1, size)
        box = tuple(map(slice, low, high))
        radius = _radius(low, high, centre, (turn / half**2) @ turn.T)
        closer = radius < nearest[box]
        nearest[box][closer] = radius[closer]
        labels[box][closer] = label
    return labels


def _radius(low: IntArray, high: IntArray, centre: FloatArray, form: FloatArray) -> FloatArray:
    """Return the squared radius of voxels of a box, 1 on the surface: a quadratic form."""
    along = [np.arange(a, b) + 0.5 - c for a, b, c in zip(low, high, centre, strict=True)]
    z, y, x = np.ix_(*(values.astype(np.float32) for values in along))
    form = form.astype(np.float32)
    plane = form[1, 1] * y * y + 2 * form[1, 2] * y * x + form[2, 2] * x * x
    across = 2 * (form[0, 1] * y + form[0, 2] * x)
    total: FloatArray = form[0, 0] * z * z + z * across + plane
    return total
