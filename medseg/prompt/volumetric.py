"""The ``volume`` propagator: a slice by SAM, then the object in 3D by a light network that follows edges.

What a box or a click means on its slice is SAM's answer. In 3D, the refiner (`medseg.nets.refiner`) is shown
cubes of the image at a zoom that the object's own size sets: first around the prompt, then wherever the
object leaves the cubes seen so far. A correction is a look at the click and no more: what lies beyond its
cube stays as it was.
"""

from collections.abc import Sequence

import numpy as np

from medseg.log import Task, task
from medseg.nets.refiner import GRID
from medseg.prompt.cleanup import clean
from medseg.prompt.corrections import correct
from medseg.prompt.known import Known, VolumeConfig, ask, clicked, side_mm, steady, voxel_of
from medseg.prompt.lattice import Canvas, Lattice, paint
from medseg.prompt.looks import Search, confidence, held, load_refiner, obeying
from medseg.prompt.rasterise import anchors
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.slicewise import Models
from medseg.prompt.target import Propagation, Target


def propagate_volume(models: Models, target: Target, config: VolumeConfig) -> Propagation:
    """Find the object of a target in 3D, or correct it where its newest clicks are."""
    given = {index: steady(asked) for index, asked in anchors(models.scene, target).items()}
    with task("Looking around the object") as steps:
        if target.previous is not None and target.previous.voxels:
            return correct(models, target, config, given, steps)
        known = [
            each for index, asked in given.items() if (each := ask(models, target.axis, index, asked, config))
        ]
        if not known:
            return Propagation(
                Region.empty(models.scene.shape), {}, ("Nothing was found on the prompted slices.",)
            )
        return _find(models, target, config, known, steps)


def _find(
    models: Models, target: Target, config: VolumeConfig, known: Sequence[Known], steps: Task
) -> Propagation:
    scene, axis = models.scene, target.axis
    points, positive = clicked(scene, target)
    widest = max(known, key=lambda each: side_mm(scene, axis, each.box))
    step = max(side_mm(scene, axis, widest.box) / config.zoom, config.finest * min(scene.spacing))
    lattice = Lattice.around(scene, axis, voxel_of(axis, widest), step)
    canvas = _canvas(lattice, scene, config.reach)
    search = Search(scene, lattice, canvas, known, points, positive, load_refiner(), steps, config.looks)
    search.follow(search.look(np.zeros(3)))
    for forward in (True, False):
        search.walk(widest, forward)
    for each in known:
        middle = lattice.to_lattice(voxel_of(axis, each))
        if not search.seen(middle):
            search.follow(search.look(middle))
    notes = () if search.looks < config.looks else ("The object goes on: the most cubes were looked at.",)
    return _finish(search, target, config, notes)


def _canvas(lattice: Lattice, scene: Scene, reach: float) -> Canvas:
    low, high = lattice.extent(scene.shape)
    most = int(reach * GRID)
    return Canvas.over(np.clip(low, -most, 0), np.clip(high, 0, most))


def _finish(search: Search, target: Target, config: VolumeConfig, notes: tuple[str, ...]) -> Propagation:
    region = paint(search.scene, search.lattice, search.canvas)
    region = obeying(clean(region, target, held(search, target), config.clean), search)
    return Propagation(region, confidence(search, region, target.axis), notes)
