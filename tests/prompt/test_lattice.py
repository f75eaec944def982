"""The lattice of cubes over a scene, and the canvas that joins the looks."""

import numpy as np
import pytest

from medseg.nets.refiner import GRID
from medseg.prompt.lattice import Canvas, Lattice, cube_image, paint
from medseg.prompt.scene import Scene
from medseg.volume import Geometry, Volume


def scene_with(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Scene:
    return Scene.of(Volume(array[None], Geometry(array.shape, np.diag([*spacing, 1.0]))), (0.0, 255.0))


@pytest.mark.parametrize("axis", range(3))
def test_positions_go_to_the_lattice_and_back(axis: int) -> None:
    scene = scene_with(np.zeros((20, 30, 10), np.uint8), (1.0, 0.5, 3.0))
    lattice = Lattice.around(scene, axis, np.array([4.0, 7.5, 2.0]), 0.7)
    voxels = np.random.default_rng(0).uniform(0, 10, (9, 3))
    assert np.allclose(lattice.to_scene(lattice.to_lattice(voxels)), voxels)
    one = lattice.to_scene(np.eye(3)) - lattice.to_scene(np.zeros((1, 3)))
    assert np.allclose(np.linalg.norm(one * scene.spacing, axis=1), 0.7)
    assert one[2, axis] != 0  # slices run along the last axis


@pytest.mark.parametrize("axis", range(3))
def test_a_cube_at_the_scenes_own_step_holds_the_scenes_voxels(axis: int) -> None:
    array = np.random.default_rng(1).integers(0, 255, (60, 61, 62)).astype(np.uint8)
    scene = scene_with(array)
    lattice = Lattice.around(scene, axis, np.array([5.0, 6.0, 7.0]), 1.0)
    cube = cube_image(scene, lattice, np.zeros(3, int)).numpy()
    expected = scene.grey((slice(5, 5 + GRID), slice(6, 6 + GRID), slice(7, 7 + GRID)))
    assert np.allclose(cube, expected.transpose(lattice.axes), atol=1e-2)


def test_larger_steps_average_what_they_span() -> None:
    array = np.zeros((200, 200, 200), np.uint8)
    array[::2] = 200  # stripes that a look at single voxels would take for black or white
    scene = scene_with(array)
    lattice = Lattice.around(scene, 2, np.array([20.0, 20.0, 20.0]), 4.0)
    cube = cube_image(scene, lattice, np.zeros(3, int)).numpy()
    assert np.abs(cube - 100).max() < 35


def test_a_canvas_remembers_what_was_seen_and_what_was_not() -> None:
    canvas = Canvas.over(np.array([-30, -30, -30]), np.array([60, 60, 60]))
    weights = np.ones((GRID,) * 3, np.float32)
    canvas.add(np.array([-10, -10, -10]), np.full((GRID,) * 3, 3.0, np.float32), weights)
    before = canvas.previous(np.array([10, -10, -10])).numpy()
    assert (before[: GRID - 20] == 1).all() and (before[GRID - 20 :] == 0).all()
    canvas.replace(np.array([-10, -10, -10]), np.full((GRID,) * 3, -2.0, np.float32), weights)
    assert canvas.logits()[20:60, 20:60, 20:60].max() == pytest.approx(-2)
    part = canvas.part()
    assert part.total.shape == (GRID + 2,) * 3 and (part.start == -11).all()
    assert part.logits().max() == canvas.logits().max() and np.shares_memory(part.total, canvas.total)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (2.0, 1.0, 0.8)])
def test_a_ball_on_a_coarse_lattice_is_painted_smoothly(spacing: tuple[float, float, float]) -> None:
    shape = tuple(round(90 / s) for s in spacing)
    scene = scene_with(np.zeros(shape, np.uint8), spacing)
    middle = np.array(shape) / 2
    lattice = Lattice.around(scene, 2, middle, 2.5)
    canvas = Canvas.over(np.full(3, -18), np.full(3, 18))
    along = np.arange(-18, 19) * 2.5
    radius = np.sqrt(along[:, None, None] ** 2 + along[:, None] ** 2 + along**2)
    canvas = canvas.filled(np.clip(30 - radius, -8, 8).astype(np.float32))
    grid = np.indices(shape).reshape(3, -1).T
    truth = np.linalg.norm((grid - middle) * spacing, axis=1).reshape(shape) < 30
    mask = paint(scene, lattice, canvas).full()
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.985
