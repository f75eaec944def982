"""Every propagator, with a stand-in for its network and with published weights, on objects made by code."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from medseg import log
from medseg.errors import Cancelled, ConfigError, DataError
from medseg.prompt import PROPAGATORS, propagate
from medseg.prompt.prompts import Box, Mask
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.slicewise import BoxConfig, MaskConfig, Models
from medseg.prompt.target import Target
from medseg.types import BoolArray
from medseg.volume import Geometry, Volume
from tests.phantoms import affine, tilted
from tests.prompt.bright import box_of, click, models_of, scene_of, tube

SHAPE = (48, 44, 20)
NAMES = ("box", "mask", "points", "consensus")


def dice(a: BoolArray, b: BoolArray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("name", PROPAGATORS)
def test_a_propagator_finds_the_object_from_one_box_and_no_more(
    name: str, lite_medsam_path: Path, mobile_sam_path: Path
) -> None:
    mask = tube(SHAPE, 8, 11, 9.0)
    noisy = np.where(mask, 160, 60) + np.random.default_rng(0).normal(0, 6, SHAPE)
    scene = Scene.of(
        Volume(noisy.astype(np.float32)[None], Geometry(SHAPE, tilted(affine("RAS", (1, 1, 2.0))))), (0, 255)
    )
    models = Models.open(scene, given={"lite-medsam": lite_medsam_path, "mobile-sam": mobile_sam_path})
    found = propagate(models, Target((box_of(scene, (14, 12, 10), (35, 32, 11), "axial"),), 2), name)
    assert dice(found.region.full(), mask) > 0.8
    assert set(found.confidence) >= set(range(found.region.start[2], found.region.stop[2]))
    assert all(0 <= value <= 1 for value in found.confidence.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_is_followed_exactly_to_both_ends(name: str) -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    models, fake = models_of(scene)
    target = Target((box_of(scene, (16, 14, 9), (33, 31, 10), "axial"),), 2)
    found = propagate(models, target, name)
    assert dice(found.region.full(), mask) == 1.0
    assert len(fake.asked) < 200


@pytest.mark.parametrize("name", NAMES)
def test_all_48_orders_of_the_axes_give_the_same_world_mask(name: str) -> None:
    base = tilted(affine("RAS", (1.0, 1.2, 2.0)), (4.0, -3.0, 6.0))
    mask = tube((24, 22, 14), 4, 9, 5.0)
    array = np.where(mask, 200, 40).astype(np.int16)
    worlds = set()
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            turned, matrix = array.transpose(order), base[:, [*order, 3]].copy()
            for axis, flip in enumerate(flips):
                if flip:
                    turned = np.flip(turned, axis)
                    matrix[:, 3] += matrix[:, axis] * (turned.shape[axis] - 1)
                    matrix[:, axis] *= -1
            scene = Scene.of(Volume(turned[None], Geometry(turned.shape, matrix)), (0, 255))
            corners = np.array([(5, 4, 6), (19, 18, 7)]) - 0.5
            low, high = corners @ base[:3, :3].T + base[:3, 3]
            models, _ = models_of(scene)
            prompt = Box(corner_mm=tuple(low), opposite_mm=tuple(high), plane="axial")
            found = scene.restore(propagate(models, Target((prompt,), 2), name).region)
            for axis, flip in enumerate(flips):
                found = np.flip(found, axis) if flip else found
            worlds.add(np.ascontiguousarray(found.transpose(np.argsort(order))).tobytes())
    assert worlds == {mask.tobytes()}


@pytest.mark.parametrize("name", NAMES)
def test_a_volume_of_one_slice_gives_the_mask_of_that_slice(name: str) -> None:
    mask = tube((32, 30, 1), 0, 0)
    scene = scene_of(mask)
    models, _ = models_of(scene)
    found = propagate(models, Target((box_of(scene, (8, 7, 0), (25, 24, 1)),), 2), name)
    assert (found.region.full() == mask).all()


@pytest.mark.parametrize("name", NAMES)
def test_limits_and_the_voxels_of_others_hold(name: str) -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    models, _ = models_of(scene)
    others = np.zeros(SHAPE, dtype=bool)
    others[:20] = True
    target = Target(
        (box_of(scene, (14, 12, 9), (35, 32, 10), "axial"),), 2, limits=(6, 11), forbidden=Region.of(others)
    )
    found = propagate(models, target, name).region.full()
    expected = mask & ~others
    expected[:, :, :6] = expected[:, :, 12:] = False
    assert (found == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_work_is_reported_and_can_be_stopped(name: str) -> None:
    class Impatient(log.Listener):
        steps = 0

        def advanced(self, key: int, steps: int, note: str) -> None:
            self.steps += steps

        def cancelled(self) -> bool:
            return self.steps >= 3

    scene = scene_of(tube(SHAPE, 4, 15))
    models, fake = models_of(scene)
    target = Target((box_of(scene, (16, 14, 9), (33, 31, 10), "axial"),), 2)
    with log.listening(Impatient()), pytest.raises(Cancelled):
        propagate(models, target, name)
    assert len(fake.asked) <= 4


@pytest.mark.parametrize("name", NAMES)
def test_only_clicks_outside_are_an_error_and_only_a_click_inside_is_not(name: str) -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    models, _ = models_of(scene)
    with pytest.raises(DataError, match="only where the object is not"):
        propagate(models, Target((click(scene, 2, 2, 9, positive=False),), 2), name)
    found = propagate(models, Target((click(scene, 24, 22, 9),), 2), name)
    assert dice(found.region.full(), mask) > 0.95


def test_an_unknown_name_and_the_settings_of_another_are_refused() -> None:
    scene = scene_of(tube(SHAPE, 4, 15))
    models, _ = models_of(scene)
    target = Target((click(scene, 24, 22, 9),), 2)
    with pytest.raises(ConfigError, match="Use one of volume, box"):
        propagate(models, target, "bocks")
    with pytest.raises(ConfigError, match="BoxConfig, not a MaskConfig"):
        propagate(models, target, "box", MaskConfig())
    with pytest.raises(DataError, match="outside of the volume"):
        propagate(models, Target((click(scene, 90, 22, 9),), 2), "box", BoxConfig())


def test_a_mask_in_3d_is_the_object_and_no_network_is_asked() -> None:
    mask = tube(SHAPE, 4, 15)
    scene = scene_of(mask)
    models, fake = models_of(scene)
    found = propagate(models, Target((Mask.of(Region.of(mask)),), 2), "mask")
    assert (found.region.full() == mask).all()
    assert not fake.asked
