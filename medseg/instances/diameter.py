"""How large are the objects of an image of unknown scale: the size at which a network agrees with itself.

A network that was trained on objects of one size, give or take a factor, is shown the image at several sizes.
Where it sees objects of the size that was assumed, the assumption is right; then it is refined. Cellpose
(Stringer et al., Nature Methods 2021) asks a second network for the size; ours asks its own.
"""

from collections.abc import Sequence

import numpy as np

from medseg.instances.centre_model import CentreNetwork, Found
from medseg.types import FloatArray

# Assumed diameters, in the image's finest voxels.
CANDIDATES = (60.0, 24.0, 10.0)
# An image is looked at in windows of so many network tiles at most.
TILES = 2.0
WINDOWS = 3
# Ratio of found to assumed size that is good enough, and rounds to get there.
CLOSE = 1.2
ROUNDS = 3
# In the image's finest voxels. Specks are no objects, and at their size an image would be enlarged so much
# that finding them takes minutes.
SMALLEST = 4.0


def estimate_diameter(network: CentreNetwork, image: FloatArray, spacing: Sequence[float]) -> float | None:
    """Return the usual diameter of objects, physical, :data:`SMALLEST` at least; None: nothing is found.

    Parameters
    ----------
    image : (channel, *shape) float32
        Normalised.
    """
    least = SMALLEST * min(spacing)
    diameter = _first_guess(network, image, spacing, least)
    for _ in range(ROUNDS if diameter is not None else 0):
        assert diameter is not None
        found = _look(network, image, spacing, diameter)
        if found is None:
            break
        size = max(least, found[0])
        ratio = size / diameter
        diameter = size
        if 1 / CLOSE < ratio < CLOSE:
            break
    return diameter


def _first_guess(
    network: CentreNetwork, image: FloatArray, spacing: Sequence[float], least: float
) -> float | None:
    """Return what is found at the best of the candidates, `least` at least."""
    best: tuple[float, float] | None = None
    for assumed in CANDIDATES:
        diameter = assumed * min(spacing)
        found = _look(network, image, spacing, diameter)
        if found is None:
            continue
        size, trust = found
        # agreement counts most; among equals, the size that explains more of the image with confidence
        value = trust * float(np.exp(-abs(np.log(size / diameter))))
        if best is None or value > best[0]:
            best = (value, size)
    return None if best is None else max(least, best[1])


def _look(
    network: CentreNetwork, image: FloatArray, spacing: Sequence[float], diameter: float
) -> tuple[float, float] | None:
    """Return the median size (by content) of what is found at an assumed size, and its mean score."""
    sizes: list[float] = []
    scores: list[float] = []
    voxel = diameter / network.settings.object_voxels
    sides = [
        min(n, max(1, round(TILES * p * voxel / s)))
        for n, p, s in zip(image.shape[1:], network.patch_size, spacing, strict=True)
    ]
    for corner in _corners(image, sides):
        box = tuple(slice(a, a + side) for a, side in zip(corner, sides, strict=True))
        found = network.find(np.ascontiguousarray(image[(slice(None), *box)]), spacing, diameter)
        contents, trusted = _contents(found)
        sizes += contents
        scores += trusted
    if not sizes:
        return None
    contents_sorted = np.sort(sizes)
    middle = contents_sorted[np.searchsorted(np.cumsum(contents_sorted), contents_sorted.sum() / 2)]
    content = float(middle) * float(np.prod(spacing))
    n = len(spacing)
    size = 2 * np.sqrt(content / np.pi) if n == 2 else (6 * content / np.pi) ** (1 / 3)
    return float(size), float(np.average(scores, weights=sizes))


def _contents(found: Found) -> tuple[list[float], list[float]]:
    sizes = np.bincount(found.labels.ravel(), minlength=len(found.scores) + 1)[1:]
    return [float(size) for size in sizes], [float(score) for score in found.scores]


def _corners(image: FloatArray, sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the lower corners of the windows that show most: those of the largest deviation."""
    starts = [
        sorted({0, (n - side) // 2, n - side}) if n > side else [0]
        for n, side in zip(image.shape[1:], sides, strict=True)
    ]
    corners = [
        tuple(int(v) for v in place)
        for place in np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(starts))
    ]
    if len(corners) <= WINDOWS:
        return corners

    def deviation(corner: tuple[int, ...]) -> float:
        box = tuple(slice(a, a + side, max(1, side // 64)) for a, side in zip(corner, sides, strict=True))
        return float(image[(slice(None), *box)].std())

    return sorted(corners, key=lambda corner: (-deviation(corner), corner))[:WINDOWS]
