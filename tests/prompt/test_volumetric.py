"""The volume propagator, with a stand-in for SAM and the network of the package."""

import itertools

import numpy as np
import pytest

from medseg.errors import BundleError
from medseg.prompt import propagate
from medseg.prompt.known import VolumeConfig
from medseg.prompt.looks import load_refiner
from medseg.prompt.prompts import Box
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.target import Propagation, Target
from medseg.types import BoolArray
from medseg.volume import Geometry, Volume
from tests.phantoms import affine, tilted
from tests.prompt.bright import box_of, click, models_of, tube

SHAPE = (64, 60, 40)


def dice(a: BoolArray, b: BoolArray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def noisy_scene(mask: BoolArray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Scene:
    array = np.where(mask, 180, 70) + np.random.default_rng(0).normal(0, 8, mask.shape)
    return Scene.of(
        Volume(array.astype(np.float32)[None], Geometry(mask.shape, np.diag([*spacing, 1.0]))), (0.0, 255.0)
    )


def ellipsoid(shape: tuple[int, int, int], middle: tuple[int, ...], radii: tuple[float, ...]) -> BoolArray:
    grid = np.indices(shape).reshape(3, -1).T
    return np.asarray((((grid - middle) / radii) ** 2).sum(axis=1) <= 1).reshape(shape)


def find(scene: Scene, target: Target, config: VolumeConfig | None = None) -> Propagation:
    return propagate(models_of(scene)[0], target, "volume", config)


def test_an_organ_is_found_whole_from_a_box_on_one_slice() -> None:
    mask = ellipsoid(SHAPE, (30, 30, 20), (12, 9, 13))
    scene = noisy_scene(mask)
    found = find(scene, Target((box_of(scene, (17, 20, 20), (44, 40, 21), "axial"),), 2))
    assert dice(found.region.full(), mask) > 0.93
    assert set(found.confidence) == set(range(found.region.start[2], found.region.stop[2]))
    assert all(0 <= value <= 1 for value in found.confidence.values())


def test_what_leaves_the_first_cube_is_followed() -> None:
    mask = tube((64, 60, 160), 10, 150, 7.0)
    scene = noisy_scene(mask)
    index = int(mask.any(axis=(0, 1)).nonzero()[0].mean())
    rows, columns = (np.flatnonzero(mask[:, :, index].any(axis=1 - a)) for a in range(2))
    box = box_of(
        scene, (rows[0] - 1, columns[0] - 1, index), (rows[-1] + 2, columns[-1] + 2, index + 1), "axial"
    )
    assert dice(find(scene, Target((box,), 2)).region.full(), mask) > 0.85


def test_thick_slices_across_any_axis_do_no_harm() -> None:
    mask = ellipsoid((16, 60, 64), (8, 30, 30), (3.5, 10, 12))
    scene = noisy_scene(mask, (4.0, 1.0, 1.0))
    found = find(scene, Target((box_of(scene, (8, 19, 17), (9, 42, 44), "sagittal"),), 0))
    assert dice(found.region.full(), mask) > 0.85


def test_limits_and_the_voxels_of_others_hold() -> None:
    mask = ellipsoid(SHAPE, (30, 30, 20), (12, 9, 13))
    scene = noisy_scene(mask)
    others = np.zeros(SHAPE, bool)
    others[:25] = True
    box = box_of(scene, (17, 20, 20), (44, 40, 21), "axial")
    found = find(scene, Target((box,), 2, limits=(15, 22), forbidden=Region.of(others))).region.full()
    assert found.any() and not (found & others).any()
    assert not found[:, :, :15].any() and not found[:, :, 23:].any()


def test_a_correction_obeys_its_click_and_leaves_what_is_far_as_it_was() -> None:
    mask = ellipsoid((120, 60, 40), (30, 30, 20), (12, 9, 13)) | ellipsoid(
        (120, 60, 40), (95, 30, 20), (9, 9, 9)
    )
    scene = noisy_scene(mask)
    first = Region.of(
        ellipsoid((120, 60, 40), (30, 30, 20), (12, 9, 9)) | ellipsoid((120, 60, 40), (95, 30, 20), (6, 6, 6))
    )
    box = box_of(scene, (17, 20, 20), (44, 40, 21), "axial")
    missed = click(scene, 30, 30, 31)
    found = find(scene, Target((box, missed), 2, previous=first, fresh=1)).region.full()
    assert found[30, 30, 31]
    assert dice(found[:60], mask[:60]) > dice(first.full()[:60], mask[:60])
    assert (found[80:] == first.full()[80:]).all()


def test_a_click_only_adds_or_only_removes() -> None:
    mask = ellipsoid(SHAPE, (30, 30, 20), (12, 9, 13))
    scene = noisy_scene(mask)
    odd = mask | ellipsoid(SHAPE, (44, 30, 20), (5, 5, 5)) ^ ellipsoid(SHAPE, (22, 30, 20), (3, 3, 3))
    box = box_of(scene, (17, 20, 20), (44, 40, 21), "axial")
    for prompt in (click(scene, 22, 30, 20), click(scene, 46, 30, 20, positive=False)):
        found = find(scene, Target((box, prompt), 2, previous=Region.of(odd), fresh=1)).region.full()
        kept = odd & ~found if prompt.positive else found & ~odd
        assert not kept.any() and (found != odd).any()


def test_a_click_against_the_image_is_obeyed_too() -> None:
    mask = ellipsoid(SHAPE, (30, 30, 20), (12, 9, 13))
    scene = noisy_scene(mask)
    box = box_of(scene, (17, 20, 20), (44, 40, 21), "axial")
    wrong = click(scene, 31, 30, 22, positive=False)
    found = find(scene, Target((box, wrong), 2, previous=Region.of(mask), fresh=1)).region.full()
    assert not found[31, 30, 22]


def test_nothing_on_the_slice_gives_an_empty_mask_and_says_so() -> None:
    scene = noisy_scene(np.zeros(SHAPE, bool))
    found = find(scene, Target((click(scene, 30, 30, 20),), 2))
    assert found.region.voxels == 0 and found.notes


def test_all_48_orders_of_the_axes_give_the_same_world_mask() -> None:
    base = tilted(affine("RAS", (1.0, 1.2, 2.0)), (4.0, -3.0, 6.0))
    mask = tube((30, 28, 14), 3, 10, 6.0)
    array = (np.where(mask, 200, 40) + np.random.default_rng(0).normal(0, 9, mask.shape)).astype(np.int16)
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
            low, high = (np.array([(7, 6, 6), (24, 22, 7)]) - 0.5) @ base[:3, :3].T + base[:3, 3]
            prompt = Box(corner_mm=tuple(low), opposite_mm=tuple(high), plane="axial")
            found = scene.restore(find(scene, Target((prompt,), 2)).region)
            for axis, flip in enumerate(flips):
                found = np.flip(found, axis) if flip else found
            worlds.add(np.ascontiguousarray(found.transpose(np.argsort(order))).tobytes())
    assert len(worlds) == 1


def test_a_volume_of_one_slice_gives_a_mask_of_that_slice() -> None:
    mask = tube((40, 38, 1), 0, 0, 8.0)
    scene = noisy_scene(mask)
    found = find(scene, Target((box_of(scene, (10, 9, 0), (31, 29, 1)),), 2))
    assert dice(found.region.full(), mask) > 0.9


def test_other_weights_are_refused(tmp_path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="Reinstall"):
        load_refiner(tmp_path / "w.safetensors")
