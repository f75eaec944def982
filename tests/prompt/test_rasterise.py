"""Prompts in the world become voxels: the same ones in every order of the axes, and never outside."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.errors import DataError
from medseg.prompt import rasterise
from medseg.prompt.prompts import Box, Lasso, Mask, ObjectMask, Point, Scribble
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.target import Target
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES, affine, noise, tilted

OBLIQUE = Geometry((20, 16, 12), tilted(affine("LAS", (0.9, 1.1, 2.5)), (3.0, -5.0, 4.0)))


def scene_of(geometry: Geometry = OBLIQUE) -> Scene:
    return Scene.of(noise(geometry), (50.0, 150.0))


def world(scene: Scene, *voxel: float) -> tuple[float, float, float]:
    x, y, z = scene.to_world(np.array(voxel))
    return float(x), float(y), float(z)


def box(scene: Scene, start: tuple[float, ...], stop: tuple[float, ...], plane: str | None = None) -> Box:
    """Return the box of a half-open range of voxels."""
    low, high = (world(scene, *(v - 0.5 for v in corner)) for corner in (start, stop))
    return Box(corner_mm=low, opposite_mm=high, plane=plane)


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_box_around_voxels_holds_exactly_these(name: str, data: st.DataObject) -> None:
    scene = scene_of(GEOMETRIES[name])
    start = [data.draw(st.integers(0, n - 1)) for n in scene.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, scene.shape, strict=True)]
    assert rasterise.box_voxels(scene, box(scene, start, stop)) == (tuple(start), tuple(stop))


def test_the_corners_of_a_box_may_come_in_any_order() -> None:
    scene = scene_of()
    low, high = world(scene, 1.5, 9.5, 2.5), world(scene, 7.5, 3.5, 6.5)
    found = {
        rasterise.box_voxels(scene, Box(corner_mm=a, opposite_mm=b)) for a, b in ((low, high), (high, low))
    }
    assert found == {((2, 4, 3), (8, 10, 7))}


def test_a_box_smaller_than_a_voxel_is_that_voxel() -> None:
    scene = scene_of()
    tiny = Box(corner_mm=world(scene, 3.1, 4.1, 5.1), opposite_mm=world(scene, 3.2, 4.2, 5.2))
    assert rasterise.check_prompts(scene, [tiny]) == ()
    assert rasterise.box_voxels(scene, tiny) == ((3, 4, 5), (4, 5, 6))


def test_a_flat_box_is_on_its_slice_and_its_edges_are_those_of_its_voxels() -> None:
    scene = scene_of()
    found = rasterise.anchors(scene, Target((box(scene, (2, 3, 5), (9, 8, 6), "axial"),), 2))
    assert list(found) == [5]
    assert found[5].box == pytest.approx((1.5, 2.5, 8.5, 7.5))
    assert found[5].mask is None
    assert len(found[5].points) == 0


def test_a_box_in_3d_is_on_its_middle_slice_and_limits_the_others() -> None:
    scene = scene_of()
    target = Target((box(scene, (2, 3, 4), (9, 8, 10)),), 2)
    assert list(rasterise.anchors(scene, target)) == [6]  # 4 + (9 - 4) // 2, LiteMedSAM's middle
    assert rasterise.limits(scene, target) == (4, 9)
    assert rasterise.limits(scene, Target(target.prompts, 2, limits=(5, 99))) == (5, 11)
    assert rasterise.limits(scene, Target((box(scene, (2, 3, 5), (9, 8, 6), "axial"),), 2)) is None


def test_a_box_on_another_plane_gives_a_click_in_its_middle() -> None:
    scene = scene_of()
    found = rasterise.anchors(scene, Target((box(scene, (2, 7, 3), (9, 8, 8), "coronal"),), 2))
    assert list(found) == [5]
    assert found[5].box is None
    assert found[5].points == pytest.approx(np.array([[5.0, 7.0]]))


def test_two_boxes_on_a_slice_are_enclosed_by_one_and_known_one_by_one() -> None:
    scene = scene_of()
    pair = (box(scene, (1, 1, 5), (4, 5, 6), "axial"), box(scene, (10, 8, 5), (14, 12, 6), "axial"))
    target = Target(pair, 2)
    assert rasterise.anchors(scene, target)[5].box == pytest.approx((0.5, 0.5, 13.5, 11.5))
    assert len(rasterise.boxes(scene, target)[5]) == 2


def test_clicks_keep_their_sign_and_place_on_their_slice() -> None:
    scene = scene_of()
    clicks = (
        Point(position_mm=world(scene, 3.25, 4, 5.3)),
        Point(position_mm=world(scene, 6, 7, 4.8), positive=False, plane="coronal"),
    )
    found = rasterise.anchors(scene, Target(clicks, 2))
    assert list(found) == [5]
    assert found[5].points == pytest.approx(np.array([[3.25, 4.0], [6.0, 7.0]]))
    assert found[5].positive.tolist() == [True, False]


def test_a_scribble_visits_every_voxel_between_its_points_and_is_thinned_on_a_slice() -> None:
    scene = scene_of()
    line = Scribble(points_mm=(world(scene, 1, 3, 2), world(scene, 18, 3, 2), world(scene, 18, 3, 8)))
    points, positive = rasterise.evidence(scene, Target((line,), 2))
    visited = {tuple(v) for v in rasterise.nearest(points).astype(int).tolist()}
    assert {(i, 3, 2) for i in range(1, 19)} | {(18, 3, k) for k in range(2, 9)} == visited
    assert positive.all()
    found = rasterise.anchors(scene, Target((line,), 2))
    assert list(found) == list(range(2, 9))
    assert len(found[2].points) == rasterise.POINTS_A_SLICE


def test_a_lasso_is_a_mask_on_its_slice_and_clicks_on_the_slices_that_cross_it() -> None:
    scene = scene_of()
    corners = [(4, 5, 6), (12, 5, 6), (12, 11, 6), (4, 11, 6)]
    lasso = Lasso(points_mm=tuple(world(scene, *c) for c in corners), plane="axial")
    same = rasterise.anchors(scene, Target((lasso,), 2))[6]
    assert same.mask is not None
    expected = np.zeros((20, 16), dtype=bool)
    expected[4:13, 5:12] = True
    assert ((same.mask > 0) == expected).all()
    assert same.box == pytest.approx((3.5, 4.5, 12.5, 11.5))
    across = rasterise.anchors(scene, Target((lasso,), 0))
    assert list(across) == list(range(4, 13))
    assert across[8].points[0].tolist() == [8.0, 6.0]
    outside = rasterise.anchors(scene, Target((lasso.replace(positive=False),), 2))[6]
    assert outside.mask is None
    assert not outside.positive.any()


def test_a_lasso_around_what_is_not_the_object_cuts_an_earlier_mask() -> None:
    scene = scene_of()
    around = Lasso(
        points_mm=tuple(world(scene, *c) for c in [(2, 2, 6), (12, 2, 6), (12, 12, 6), (2, 12, 6)]),
        plane="axial",
    )
    cut = Lasso(
        points_mm=tuple(world(scene, *c) for c in [(8, 1, 6), (14, 1, 6), (14, 13, 6), (8, 13, 6)]),
        plane="axial",
        positive=False,
    )
    found = rasterise.anchors(scene, Target((around, cut), 2))[6]
    assert found.mask is not None
    assert np.flatnonzero((found.mask > 0).any(axis=1)).tolist() == list(range(2, 8))


def test_a_mask_is_an_anchor_on_each_of_its_slices() -> None:
    scene = scene_of()
    array = np.zeros(scene.shape, dtype=bool)
    array[3:7, 4:9, 2:6] = True
    mask = Mask.of(Region.of(array))
    target = Target((mask,), 2)
    found = rasterise.anchors(scene, target)
    assert list(found) == [2, 3, 4, 5]
    assert all(known.mask is not None and int((known.mask > 0).sum()) == 20 for known in found.values())
    assert rasterise.limits(scene, target) == (2, 5)
    (area,) = rasterise.areas(scene, target)
    assert area.exact
    assert area.region == Region.of(array)


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_a_filled_polygon_agrees_with_scikit_image_inside_and_has_its_line(corners: int, seed: int) -> None:
    draw = pytest.importorskip("skimage.draw")
    shape = (24, 31)
    points = np.random.default_rng(seed).uniform(-4, 34, (corners, 2))
    found = rasterise.fill_polygon(points, shape)
    peer = draw.polygon2mask(shape, points)
    line = np.zeros(shape, dtype=bool)
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        for t in np.linspace(0, 1, 200):
            row, column = np.floor(a + (b - a) * t + 0.5).astype(int)
            if 0 <= row < shape[0] and 0 <= column < shape[1]:
                line[row, column] = True
    assert not (peer & ~found).any()
    assert not (found & ~peer & ~ndimage.binary_dilation(line, np.ones((3, 3)))).any()


def test_deepest_finds_the_middle_and_then_another_lobe() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[2:13, 2:13] = True
    mask[20:35, 20:35] = True
    assert rasterise.deepest(mask, 2).tolist() == [[27.0, 27.0], [7.0, 7.0]]
    assert rasterise.deepest(np.zeros((3, 3), dtype=bool), 2).shape == (0, 2)


PLACES = {
    "a point outside": (lambda s: Point(position_mm=world(s, 30, 4, 4)), "outside of the volume"),
    "a box outside": (lambda s: box(s, (30, 2, 2), (40, 6, 6)), "outside of the volume"),
    "a flat box on no slice": (lambda s: box(s, (2, 2, 30), (6, 6, 31), "axial"), "outside of the volume"),
    "a box without area": (lambda s: box(s, (2, 2, 4), (2, 6, 5), "axial"), "no area"),
    "a box without volume": (lambda s: box(s, (2, 2, 4), (6, 6, 4)), "no volume.*plane"),
    "a scribble outside": (lambda s: Scribble(points_mm=(world(s, -9, 0, 0), world(s, -3, 0, 0))), "outside"),
    "a lasso along a line": (
        lambda s: Lasso(
            points_mm=(world(s, 1, 1, 4), world(s, 5, 5, 4), world(s, 3, 3, 4)), plane="axial"
        ),
        "encloses nothing",
    ),
    "a lasso outside": (
        lambda s: Lasso(
            points_mm=(world(s, 1, 1, 40), world(s, 5, 1, 40), world(s, 3, 3, 40)), plane="axial"
        ),
        "outside",
    ),
    "an empty mask": (lambda s: Mask.of(Region.empty(s.shape)), "empty"),
    "a mask of another grid": (lambda s: Mask.of(Region.of(np.ones((3, 3, 3), dtype=bool))), "grid"),
    "an unknown object": (lambda s: ObjectMask(object="liver"), "liver"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLACES)
def test_what_cannot_be_meant_is_refused_with_its_number(what: str) -> None:
    scene = scene_of()
    make, message = PLACES[what]
    fine = Point(position_mm=world(scene, 4, 4, 4))
    with pytest.raises(DataError, match=f"prompt 2.*{message}"):
        rasterise.check_prompts(scene, [fine, make(scene)])


def test_a_box_that_reaches_out_of_the_volume_is_cut_and_said() -> None:
    scene = scene_of()
    large = box(scene, (-5, 3, 4), (9, 50, 5), "axial")
    (note,) = rasterise.check_prompts(scene, [large])
    assert "cut off" in note
    assert rasterise.box_voxels(scene, large) == ((0, 3, 4), (9, 16, 5))
    found = rasterise.anchors(scene, Target((large,), 2))[4]
    assert found.box == pytest.approx((-0.5, 2.5, 8.5, 15.5))


def test_a_point_in_air_is_a_note() -> None:
    array = np.full((1, 8, 8, 8), -1000, np.int16)
    array[0, 2:6, 2:6, 2:6] = 40
    scene = Scene.of(Volume(array, Geometry((8, 8, 8), affine())), (-160.0, 240.0))
    inside, air = (Point(position_mm=world(scene, *(n,) * 3)) for n in (3, 0))
    assert rasterise.check_prompts(scene, [inside]) == ()
    (note,) = rasterise.check_prompts(scene, [air])
    assert "air" in note
    assert rasterise.check_prompts(scene, [air.replace(positive=False)]) == ()


def test_a_volume_of_one_slice_takes_boxes_and_clicks() -> None:
    scene = scene_of(GEOMETRIES["one slice"])
    target = Target((box(scene, (2, 3, 0), (9, 8, 1)), Point(position_mm=world(scene, 4, 4, 0))), 2)
    assert rasterise.check_prompts(scene, target.prompts) == ()
    assert list(rasterise.anchors(scene, target)) == [0]
