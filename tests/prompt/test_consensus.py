"""The vote of three axes removes what one axis alone has made up, and is refused where it can say nothing."""

import numpy as np

from medseg.prompt import propagate
from medseg.prompt.consensus import ConsensusConfig, vote
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.target import Target
from medseg.volume import Geometry, Volume
from tests.prompt.bright import box_of, models_of, scene_of, tube

SHAPE = (48, 44, 20)


def test_a_voxel_stays_where_two_of_three_have_it() -> None:
    looks = []
    for start in (0, 1, 2):
        mask = np.zeros((6, 5, 4), dtype=bool)
        mask[start : start + 3, 1:3, 1:3] = True
        looks.append(Region.of(mask))
    expected = np.zeros((6, 5, 4), dtype=bool)
    expected[1:4, 1:3, 1:3] = True
    assert (vote(looks, 2).full() == expected).all()
    assert vote(looks, 3).voxels == 4
    assert vote([Region.empty((6, 5, 4))] * 3, 2).voxels == 0


def test_each_axis_is_looked_along_within_the_object_only() -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    models, fake = models_of(scene)
    target = Target((box_of(scene, (16, 14, 9), (33, 31, 10), "axial"),), 2)
    found = propagate(models, target, "consensus", ConsensusConfig())
    assert (found.region.full() == mask).all()
    assert {axis for axis, *_ in fake.asked} == {0, 1, 2}
    for axis in (0, 1):
        asked = {index for a, index, *_ in fake.asked if a == axis}
        assert asked == set(range(found.region.start[axis], found.region.stop[axis]))


def test_thick_slices_are_not_looked_at_from_the_side() -> None:
    array = np.where(tube(SHAPE, 4, 15), 200, 40).astype(np.int16)[None]
    scene = Scene.of(Volume(array, Geometry(SHAPE, np.diag([1.0, 1.0, 5.0, 1.0]))), (0, 255))
    models, fake = models_of(scene)
    target = Target((box_of(scene, (16, 14, 9), (33, 31, 10), "axial"),), 2)
    found = propagate(models, target, "consensus")
    assert {axis for axis, *_ in fake.asked} == {2}
    assert any("no vote" in note for note in found.notes)
