"""Axes, surfaces and hulls against formulas and scikit-image."""

import numpy as np
import pytest

from medseg.instances import shape
from medseg.instances.compiled import COMPILED
from medseg.instances.shape import convex_hulls, principal_axes, surface_sizes
from medseg.instances.sums import sum_objects
from medseg.volume import Geometry
from tests.instances.shapes import OBLIQUE, ellipsoid, rotation, scattered

GRID = Geometry((44, 40, 30), OBLIQUE)


@pytest.mark.parametrize("seed", range(12))
def test_axes_of_an_ellipsoid_are_found_at_any_angle_on_an_oblique_grid(seed: int) -> None:
    turn = rotation(seed)
    found = ellipsoid(GRID, (15.0, 10.0, 7.0), turn)
    sums = sum_objects(found.labels, 1)
    axes = principal_axes(sums, GRID.affine[:3, :3])
    np.testing.assert_allclose(axes.lengths[0], [30, 20, 14], rtol=0.015)
    for axis in range(3):
        assert abs(axes.directions[0, axis] @ turn[:, axis]) > np.cos(np.deg2rad(2))
    volume = sums.voxels[0] * GRID.voxel_volume
    assert volume == pytest.approx(4 / 3 * np.pi * 15 * 10 * 7, rel=0.01)


def test_axes_equal_scikit_image_without_the_voxels_extent() -> None:
    measure = pytest.importorskip("skimage.measure")
    for size in ((30, 31), (14, 13, 12)):
        labels, spacing = scattered(size, 12, seed=4), (0.7, 1.2, 2.5)[: len(size)]
        sums = sum_objects(labels, 12)
        lengths = principal_axes(sums, np.diag(spacing), voxel_extent=False).lengths
        for region in measure.regionprops(labels, spacing=spacing):
            if region.num_pixels > 8:
                ours = lengths[region.label - 1][[0, -1]]
                theirs = [region.axis_major_length, region.axis_minor_length]
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_surface_is_that_of_marching_cubes() -> None:
    measure = pytest.importorskip("skimage.measure")
    grid = Geometry((34, 30, 22), np.diag([0.7, 1.0, 1.3, 1.0]))
    labels = ellipsoid(grid, (9.0, 11.0, 8.0)).labels
    ours = surface_sizes(labels, sum_objects(labels, 1), grid.spacing)[0]
    mesh = measure.marching_cubes(np.pad(labels, 1).astype(float), 0.5, spacing=grid.spacing)
    assert ours == pytest.approx(measure.mesh_surface_area(*mesh[:2]), rel=1e-6)


def test_a_sphere_is_rounder_than_its_cube_and_a_discs_outline_is_near_its_circumference() -> None:
    sphere = ellipsoid(Geometry((60, 60, 60), np.diag([0.5, 0.5, 0.5, 1.0])), (14.0,) * 3).labels
    area = surface_sizes(sphere, sum_objects(sphere, 1), (0.5,) * 3)[0]
    assert area == pytest.approx(4 * np.pi * 14**2 * 1.085, rel=0.01), "marching cubes is 8 to 9 % above"
    disc = np.ascontiguousarray(sphere[:, :, 30])
    outline = surface_sizes(disc, sum_objects(disc, 1), (0.5, 0.5))[0]
    assert outline == pytest.approx(2 * np.pi * 14 * 1.05, rel=0.01)
    volume = np.array([sphere.sum() / 8])
    assert shape.sphericity(volume, np.array([area]), 3)[0] == pytest.approx(0.92, abs=0.01)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: only the numpy twin is here")
@pytest.mark.parametrize("size", [(14, 15), (8, 9, 10)])
def test_surfaces_are_equal_without_numba(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = scattered(size, 9)
    spacing = (0.5, 1.0, 3.0)[: len(size)]
    sums = sum_objects(labels, 9)
    compiled = surface_sizes(labels, sums, spacing)
    monkeypatch.setattr(shape, "COMPILED", False)
    np.testing.assert_array_equal(compiled, surface_sizes(labels, sums, spacing))


def test_hulls_of_a_box_are_the_box_with_its_diagonal() -> None:
    labels = np.zeros((9, 9, 9), np.int32)
    labels[2:5, 1:8, 3] = 1
    labels[7, 7, 7] = 2
    hulls = convex_hulls(labels, sum_objects(labels, 2), np.diag([1.0, 0.5, 2.0]))
    np.testing.assert_allclose(hulls.feret, [np.sqrt(9 + 3.5**2 + 4), np.sqrt(1 + 0.25 + 4)])
    np.testing.assert_allclose(hulls.volume, [21.0, 1.0])


def test_a_hollow_object_is_less_solid_than_its_hull() -> None:
    labels = np.ones((5, 5), np.int32)
    labels[1:4, 1:4] = 0
    hulls = convex_hulls(labels, sum_objects(labels, 1), np.eye(2))
    assert hulls.volume[0] == pytest.approx(25)
