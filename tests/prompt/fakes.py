"""A propagator of milliseconds that depends on everything that a real one depends on."""

from typing import Any

import numpy as np

from medseg import log
from medseg.config import Config
from medseg.prompt.overlap import subtract, union
from medseg.prompt.prompts import Box, Lasso, Mask, Point, Prompt, Scribble
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.target import Propagation, Target


def fake_models(scene: Scene) -> Scene:
    """Return what :func:`fake_propagate` takes for networks."""
    return scene


def fake_propagate(models: Any, target: Target, propagator: str, config: Config | None = None) -> Propagation:
    """Put balls where prompts are; the newest ones change the previous mask.

    Radii depend on the window, the axis and the propagator's name, so that a replay that forgets one of
    them gives other bytes.
    """
    scene: Scene = models
    region = target.previous or Region.empty(scene.shape)
    fresh = (
        target.prompts if target.previous is None else target.prompts[len(target.prompts) - target.fresh :]
    )
    radius = 1.5 + 0.5 * target.axis + 0.3 * (len(propagator) % 3) + (scene.window[1] > 1) * 0.7
    for prompt in log.progress(fresh, "fake"):
        stamp = _stamp(scene, prompt, radius)
        positive = getattr(prompt, "positive", True)
        region = union(region, stamp) if positive else subtract(region, stamp)
    region = _limit(region, target)
    if target.forbidden is not None:
        region = subtract(region, target.forbidden)
    low, high = region.start[target.axis], region.stop[target.axis]
    confidence = {k: 1.0 / (2 + (k * 7 + len(target.prompts)) % 5) for k in range(low, high)}
    return Propagation(region, confidence, (f"{len(fresh)} prompts were new",))


def _limit(region: Region, target: Target) -> Region:
    if target.limits is None:
        return region
    mask = region.full()
    outside = np.ones(mask.shape[target.axis], dtype=bool)
    outside[target.limits[0] : target.limits[1] + 1] = False
    mask[tuple(outside if a == target.axis else slice(None) for a in range(3))] = False
    return Region.of(mask)


def _stamp(scene: Scene, prompt: Prompt, radius: float) -> Region:
    if isinstance(prompt, Mask):
        return prompt.region()
    if isinstance(prompt, Point):
        centres = np.array([prompt.position_mm])
    elif isinstance(prompt, Box):
        centres = np.array([prompt.corner_mm, prompt.opposite_mm]).mean(axis=0)[None]
    else:
        assert isinstance(prompt, Scribble | Lasso)
        centres = np.array(prompt.points_mm)
    index = np.indices(scene.shape).reshape(3, -1).T
    near = np.zeros(len(index), dtype=bool)
    for centre in scene.to_voxel(centres):
        near |= ((index - centre) ** 2).sum(axis=1) <= radius**2
    return Region.of(near.reshape(scene.shape))
