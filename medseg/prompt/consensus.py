"""Three axes voted: what one axis has found is looked at along the two others, and the majority stays."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.log import progress
from medseg.prompt.cleanup import clean
from medseg.prompt.rasterise import limits
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.slicewise import MaskConfig, Models, propagate_mask, shown_mask, zoomed
from medseg.prompt.target import Propagation, Target
from medseg.prompt.travel import Seen, Stack


class ConsensusConfig(Config):
    """Settings of `consensus`.

    Attributes
    ----------
    follow : MaskConfig
        The walk along the axis of the target, and how slices of the other axes are asked.
    votes : int
        Of the axes looked along, how many must agree on a voxel.
    aspect : float
        Most that the sides of a pixel may differ by: the slices of thick-slice images are not looked at
        across the other axes.
    """

    follow: MaskConfig = MaskConfig()
    votes: int = Field(2, ge=1, le=3)
    aspect: float = Field(3.0, ge=1)


def propagate_consensus(models: Models, target: Target, config: ConsensusConfig) -> Propagation:
    """Follow an object along one axis, ask its slices across the two others, and let the three vote.

    A slice of another axis is shown the first result as its mask and box. Nothing larger than the box of the
    results is held. A correction is that of the walk: it changes what is near it and is not voted away.
    """
    found = propagate_mask(models, target, config.follow)
    if (target.previous is not None and target.fresh) or not found.region.voxels:
        return found
    others = [axis for axis in range(3) if axis != target.axis]
    if max(_aspect(models.scene, axis) for axis in others) > config.aspect:
        return replace(found, notes=(*found.notes, "no vote: across the other axes, pixels are too long"))
    looks = [found.region, *(_look(models, target, found.region, axis, config) for axis in others)]
    region = vote(looks, config.votes)
    confined = replace(target, limits=limits(models.scene, target))
    return replace(found, region=clean(region, confined, found.region, config.follow.clean))


def _aspect(scene: Scene, axis: int) -> float:
    rows, columns = (step for a, step in enumerate(scene.spacing) if a != axis)
    return max(rows, columns) / min(rows, columns)


def _look(models: Models, target: Target, found: Region, axis: int, config: ConsensusConfig) -> Region:
    """Ask each slice of a result across another axis."""
    zoom = config.follow.zoom
    # Prompts of the target are on slices of its own axis: here only the result speaks.
    ask = zoomed(models, Target((), axis), zoom, lambda part: shown_mask(part, zoom))
    stack = Stack(found.shape, axis)
    for index in progress(range(found.start[axis], found.stop[axis]), f"Looking across axis {axis}"):
        stack.put(index, ask(index, None, Seen(found.plane(axis, index))).mask)
    return stack.region()


def vote(looks: Sequence[Region], votes: int) -> Region:
    """Return the voxels that at least `votes` regions of one grid have."""
    some = [look for look in looks if look.voxels]
    if not some:
        return looks[0]
    low = np.min([look.start for look in some], axis=0)
    high = np.max([look.stop for look in some], axis=0)
    start, stop = (int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2]))
    counts = np.zeros([b - a for a, b in zip(start, stop, strict=True)], dtype=np.uint8)
    for look in some:
        counts += look.window(start, stop)
    return Region.at(counts >= votes, start, looks[0].shape)
