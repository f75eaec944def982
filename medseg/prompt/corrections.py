"""Corrections of the ``volume`` propagator: a look at the newest prompts; beyond it, the mask stays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medseg.log import Task
from medseg.nets.refiner import GRID
from medseg.prompt.cleanup import clean
from medseg.prompt.known import Known, VolumeConfig, ask, clicked, side_mm, voxel_of
from medseg.prompt.lattice import Canvas, Lattice, paint, sample
from medseg.prompt.looks import Search, confidence, held, load_refiner, obeying
from medseg.prompt.overlap import subtract, union
from medseg.prompt.rasterise import anchors, mask_box
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.slicewise import Models, widened
from medseg.prompt.target import Propagation, Target
from medseg.types import FloatArray


def correct(
    models: Models, target: Target, config: VolumeConfig, given: Mapping[int, SlicePrompts], steps: Task
) -> Propagation:
    """Look again where the newest prompts are; beyond the cubes of these looks, the mask stays as it was."""
    assert target.previous is not None
    scene, axis, previous = models.scene, target.axis, target.previous
    newest = replace(target, prompts=target.prompts[len(target.prompts) - target.fresh :])
    fresh = anchors(scene, newest)
    known = [
        each
        for index, asked in given.items()
        if (each := _recall(models, axis, index, asked, previous, config, index in fresh))
    ]
    points, positive = clicked(scene, target)
    new, signs = clicked(scene, newest)
    places = _places(axis, known, new, fresh)
    side = max([side_mm(scene, axis, each.box) for each in known] or [_reach(scene, axis, previous)])
    step = max(side / config.zoom, config.finest * min(scene.spacing))
    lattice = Lattice.around(scene, axis, places[0], step)
    canvas = _recalled(lattice, previous, places)
    search = Search(scene, lattice, canvas, known, points, positive, load_refiner(), steps, config.looks)
    for place in places:
        search.look(lattice.to_lattice(place), anew=True)
    return _patch(search, target, config, {bool(sign) for sign in signs})


def _recall(
    models: Models,
    axis: int,
    index: int,
    asked: SlicePrompts,
    previous: Region,
    config: VolumeConfig,
    fresh: bool,
) -> Known | None:
    """Return what is known of a prompted slice: what was drawn there, or, after new prompts, SAM's answer."""
    before = previous.plane(axis, index)
    if not fresh:
        # A slice that was only clicked on is as doubtful as any other after a further click.
        return Known(index, asked.box, before) if asked.box is not None and before.any() else None
    box = asked.box or (mask_box(before) if before.any() else None)
    if box is None or not config.ask_again:
        return None
    return ask(models, axis, index, replace(asked, box=widened(box, asked.points[asked.positive])), config)


def _places(
    axis: int, known: Sequence[Known], points: FloatArray, fresh: Mapping[int, SlicePrompts]
) -> list[FloatArray]:
    """Return the voxels to look at: new clicks (of a scribble, some), and the middles of new boxes."""
    places = list(points[:: max(1, len(points) // 8)]) if len(points) > 8 else list(points)
    if not places:
        places = [voxel_of(axis, each) for each in known if each.index in fresh]
    return places


def _reach(scene: Scene, axis: int, region: Region) -> float:
    """Return the longer side of a region across the slices, in mm."""
    return max(
        float(n * s)
        for a, (n, s) in enumerate(zip(region.array.shape, scene.spacing, strict=True))
        if a != axis
    )


def _recalled(lattice: Lattice, previous: Region, places: Sequence[FloatArray]) -> Canvas:
    """Return a canvas that covers all cubes around `places`, filled with the mask so far."""
    middles = lattice.to_lattice(np.array(places))
    low = np.floor(middles.min(axis=0)).astype(int) - GRID // 2 - 1
    high = np.ceil(middles.max(axis=0)).astype(int) + GRID // 2 + 1
    canvas = Canvas.over(low, high)
    ends = np.sort(lattice.to_scene(np.array([low, high], float)), axis=0)
    start, stop = np.floor(ends[0]).astype(int) - 1, np.ceil(ends[1]).astype(int) + 2
    mask = previous.window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    axes = list(lattice.axes)
    first = (lattice.to_scene(low.astype(float)) - start)[axes]
    shape = canvas.total.shape
    inside = mask.transpose(axes).astype(np.float32)
    found = sample(inside, first, lattice.steps, (shape[0], shape[1], shape[2]))
    return canvas.filled(8 * found.numpy() - 4)


def _patch(search: Search, target: Target, config: VolumeConfig, signs: set[bool]) -> Propagation:
    """Put what was seen anew in place of what the mask had there.

    Who clicks on what is missing takes the rest as right: nothing is removed. And the other way round.
    """
    assert target.previous is not None
    previous = target.previous
    seen = _cubes(search)
    drawn = paint(search.scene, search.lattice, search.canvas)
    region = union(subtract(previous, seen), _within(drawn, seen))
    if signs == {True}:
        region = union(region, previous)
    elif signs == {False}:
        region = _within(region, previous)
    kept = subtract(region, seen)
    region = clean(obeying(region, search), target, union(kept, held(search, target)), config.clean)
    region = obeying(region, search)  # filling holes may undo a click
    looked = range(seen.start[target.axis], seen.stop[target.axis])
    sure = confidence(search, region, target.axis)
    return Propagation(region, {index: value for index, value in sure.items() if index in looked}, ())


def _cubes(search: Search) -> Region:
    """Return the voxels of the scene that the looks have covered."""
    shape = search.scene.shape
    found = Region.empty(shape)
    for start in search.cubes:
        ends = np.sort(search.lattice.to_scene(np.array([start, start + GRID - 1], float)), axis=0)
        low = np.clip(np.ceil(ends[0]), 0, shape).astype(int)
        high = np.clip(np.floor(ends[1]) + 1, low, shape).astype(int)
        cube = np.ones(tuple(int(n) for n in high - low), bool)
        found = union(found, Region.at(cube, (int(low[0]), int(low[1]), int(low[2])), shape))
    return found


def _within(region: Region, other: Region) -> Region:
    return Region.at(region.array & other.window(region.start, region.stop), region.start, region.shape)
