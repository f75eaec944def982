"""What a propagated mask is cleaned of, in 3D: islands that no prompt touches, holes, voxels of others."""

import cc3d
import numpy as np

from medseg.config import Config
from medseg.geometry.crop import fill_holes
from medseg.prompt.rasterise import nearest
from medseg.prompt.regions import Region, Triple
from medseg.prompt.target import Target
from medseg.types import BoolArray, FloatArray


class CleanConfig(Config):
    """What is cleaned.

    Attributes
    ----------
    islands : bool
        Remove components (26 neighbours) that hold no voxel of an anchor.
    gap : int
        Slices without the object across which two parts still are one component.
    holes : bool
        Fill what the object encloses.
    """

    islands: bool = True
    gap: int = 1
    holes: bool = True


def clean(region: Region, target: Target, anchor: Region | None, config: CleanConfig | None = None) -> Region:
    """Clean a mask, at the cost of the box that it fills.

    Parameters
    ----------
    region : Region
    target : Target
        Its limits and its forbidden voxels hold whatever the settings.
    anchor : Region, optional
        Voxels known to be of the object: components with one of them stay, or else the largest.
    config : CleanConfig, optional

    Returns
    -------
    Region
    """
    config = config or CleanConfig()
    mask = region.array.copy()
    start = region.start
    if config.holes and mask.size:
        mask = fill_holes(mask)
    confine(mask, start, target)
    if config.islands and mask.any():
        held = None if anchor is None else anchor.window(start, region.stop)
        mask = keep_touching(mask, held, target.axis, config.gap)
    return Region.at(mask, start, region.shape)


def confine(mask: BoolArray, start: Triple, target: Target) -> None:
    """Remove, in place, what lies beyond the limits of a target and what belongs to other objects."""
    if target.limits is not None:
        first, last = sorted(target.limits)
        along = np.moveaxis(mask, target.axis, 0)
        along[: max(0, first - start[target.axis])] = False
        along[max(0, last + 1 - start[target.axis]) :] = False
    if target.forbidden is not None:
        i, j, k = (s + n for s, n in zip(start, mask.shape, strict=True))
        mask &= ~target.forbidden.window(start, (i, j, k))


def keep_touching(mask: BoolArray, held: BoolArray | None, axis: int, gap: int = 0) -> BoolArray:
    """Keep the components that hold a voxel of `held`, or, if none does, the largest.

    Parameters
    ----------
    mask, held : (i, j, k) bool
    axis, gap : int
        Parts that face each other across up to `gap` empty slices across `axis` are one component.
    """
    labelled = cc3d.connected_components(_joined(mask, axis, gap), connectivity=26)
    components = np.where(mask, labelled[tuple(slice(n) for n in mask.shape)], 0)
    chosen = np.zeros(0, int) if held is None else np.unique(components[held & mask])
    if not chosen.size:
        sizes = np.bincount(components.ravel(order="K"))
        sizes[0] = 0
        chosen = np.array([sizes.argmax()])
    return np.asarray(np.isin(components, chosen) & mask)


def _joined(mask: BoolArray, axis: int, gap: int) -> BoolArray:
    """Draw each voxel `gap` slices long: what faces it beyond them touches it then."""
    # One layer more: cc3d 4.1 raises on grids of one slice that hold many single voxels.
    joined = np.pad(mask, [(0, gap + 1 if a == axis else 1) for a in range(mask.ndim)])
    along = np.moveaxis(joined, axis, 0)
    once = along.copy()
    for shift in range(1, gap + 1):
        along[shift:] |= once[:-shift]
    return joined


def touched(region: Region, points: FloatArray) -> BoolArray:
    """Return for each of (n, 3) voxel positions whether it lies in the mask."""
    voxels = nearest(points).astype(int) - np.array(region.start)
    inside = ((voxels >= 0) & (voxels < np.array(region.array.shape))).all(axis=1)
    found = np.zeros(len(voxels), dtype=bool)
    found[inside] = region.array[tuple(voxels[inside].T)]
    return found
