"""What people write: numbers in mm or voxels become the same prompts on every grid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import ConfigError, DataError, GeometryError
from medseg.io import write
from medseg.prompt.entries import Grid, ObjectEntry, PromptEntry, parse_numbers, parse_positions, prepare
from medseg.prompt.prompts import Box, Lasso, Mask, ObjectMask, Point, Scribble
from medseg.prompt.rasterise import box_voxels
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.session import PromptSession
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES, affine, noise
from tests.prompt.fakes import fake_models, fake_propagate

GRIDS = [name for name, geometry in GEOMETRIES.items() if min(geometry.shape) > 3]


def open_session(geometry: Geometry) -> PromptSession:
    return PromptSession.open(noise(geometry), propagate=fake_propagate, models=fake_models)


def grid(name: str = "straight", unit: Any = "voxel") -> Grid:
    return Grid(Scene.of(noise(GEOMETRIES[name]), (0, 200)), unit)


def entry(**values: Any) -> PromptEntry:
    return PromptEntry.from_dict(values)


@pytest.mark.parametrize("name", GRIDS)
@settings(deadline=None)
@given(data=st.data())
def test_a_box_of_voxels_holds_its_first_and_its_last_voxel(name: str, data: st.DataObject) -> None:
    shape = GEOMETRIES[name].shape
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, n - 1)] * 2))) for n in shape]
    wide = sum(a != b for a, b in ends)
    low, high = zip(*ends, strict=True)
    if wide < 2:
        return  # one voxel, or a row of them
    known = grid(name)
    box = known.prompt(entry(box=[*low, *high]))
    assert isinstance(box, Box)
    start, stop = box_voxels(known.scene, box)
    found = Region.at(np.ones(np.subtract(stop, start), dtype=bool), start, known.scene.shape)
    expected = np.zeros(shape, dtype=bool)
    expected[tuple(slice(a, b + 1) for a, b in ends)] = True
    assert np.array_equal(known.scene.restore(found), expected)
    assert (box.plane is None) == (wide == 3)


@pytest.mark.parametrize("name", GRIDS)
def test_voxels_and_millimetres_say_the_same(name: str) -> None:
    geometry = GEOMETRIES[name]
    voxel = np.array([2, 3, 1])
    x, y, z = (geometry.affine[:3, :3] @ voxel + geometry.affine[:3, 3]).tolist()
    one = grid(name).prompt(entry(point=voxel.tolist()))
    other = grid(name, "mm").prompt(entry(point=[x, y, z]))
    assert isinstance(one, Point) and isinstance(other, Point)
    assert np.allclose(one.position_mm, other.position_mm)


@pytest.mark.parametrize("flat, plane", [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_a_flat_box_in_millimetres_names_its_own_plane(flat: int, plane: str) -> None:
    corners = np.array([[-28.0, 15.0, 102.0], [-24.0, 19.0, 105.0]])
    corners[1, flat] = corners[0, flat]
    box = grid(unit="mm").prompt(entry(box=corners.reshape(-1).tolist()))
    assert isinstance(box, Box) and box.plane == plane


def test_a_flat_box_of_voxels_lies_on_the_axis_of_the_file_not_of_the_world() -> None:
    box = grid("permuted").prompt(
        entry(box=[3, 2, 2, 3, 8, 7])
    )  # the first axis of this file runs to the head
    assert isinstance(box, Box) and box.plane == "axial"


def test_signs_and_shapes_are_kept() -> None:
    line = [[1, 2, 3], [5, 2, 3], [5, 6, 3]]
    known = grid()
    click, stroke, lasso = (
        known.prompt(entry(**{k: v}))
        for k, v in {"not_point": [1, 2, 3], "scribble": line, "not_lasso": line}.items()
    )
    assert isinstance(click, Point) and not click.positive
    assert isinstance(stroke, Scribble) and stroke.positive and stroke.plane == "axial"
    assert isinstance(lasso, Lasso) and not lasso.positive and lasso.plane == "axial"
    assert known.prompt(entry(like="liver")) == ObjectMask(object="liver")


def test_a_lasso_across_slices_needs_a_plane() -> None:
    tilted = [[1, 2, 3], [5, 2, 4], [5, 6, 5]]
    with pytest.raises(DataError, match="Say its plane"):
        grid().prompt(entry(lasso=tilted))
    lasso = grid().prompt(entry(lasso=tilted, plane="axial"))
    assert isinstance(lasso, Lasso) and lasso.plane == "axial"


@pytest.mark.parametrize("corner", [[4, 4, 4], [0, 0, 0]])
def test_a_box_of_one_voxel_has_no_area(corner: list[int]) -> None:
    with pytest.raises(DataError, match="no area"):
        grid().prompt(entry(box=[*corner, *corner]))


@pytest.mark.parametrize("name", GRIDS)
def test_a_range_of_voxels_is_turned_with_the_file(name: str) -> None:
    known = grid(name)
    for file_axis, size in enumerate(GEOMETRIES[name].shape):
        axis = known.axis(file_axis)
        first, last = known.limits((1, 2), axis)
        mask = np.zeros(known.scene.shape, dtype=bool)
        mask[tuple(slice(first, last + 1) if a == axis else slice(None) for a in range(3))] = True
        hit = np.flatnonzero(
            known.scene.restore(Region.of(mask)).any(axis=tuple(a for a in range(3) if a != file_axis))
        )
        assert hit.tolist() == [1, 2]
        with pytest.raises(DataError, match="outside"):
            known.limits((size + 3, size + 5), axis)


def test_a_range_in_millimetres_runs_along_the_axis_and_is_cut() -> None:
    known = grid(unit="mm")  # slices at 100 to 107
    assert known.limits((104.2, 101.9), 2) == (2, 4)
    assert known.limits((-1000, 103), 2) == (0, 3)
    with pytest.raises(DataError, match="mm"):
        known.limits((0, 50), 2)


@pytest.mark.parametrize("name", GRIDS)
def test_a_mask_is_read_by_value_and_one_slice_of_it_is_flat(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    labels = np.zeros(geometry.shape, np.uint8)
    labels[1:4, 2:5, 2] = 1
    labels[2, 3, 2] = 2
    labels[1, 1, 1] = 3
    write(Volume(labels, geometry), tmp_path / "drawn.nii.gz")
    known = Grid(grid(name).scene, "mm", tmp_path)
    for text, expected in {"drawn.nii.gz": labels > 0, "drawn.nii.gz:1": labels == 1}.items():
        mask = known.prompt(entry(mask=text))
        assert isinstance(mask, Mask)
        assert np.array_equal(known.scene.restore(mask.region()), expected)
        assert (mask.plane is None) == (text == "drawn.nii.gz")
    with pytest.raises(DataError, match="no voxel of value 9"):
        known.prompt(entry(mask="drawn.nii.gz:9"))


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    write(noise(Geometry((12, 10, 8), affine("RAS", (1, 1, 2)))), tmp_path / "drawn.nii.gz")
    with pytest.raises(GeometryError, match="on the grid of the image"):
        Grid(grid().scene, "mm", tmp_path).prompt(entry(mask="drawn.nii.gz"))


@pytest.mark.parametrize("values", [{}, {"point": [1, 2, 3], "box": [1, 2, 3, 4, 5, 6]}, {"plane": "axial"}])
def test_a_prompt_is_exactly_one_thing(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a prompt is one of"):
        entry(**values)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,b,c", "1,2,nan", "1,,2;;inf", "1,2,0x10"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--point"):
        parse_numbers(text, "--point", 3)


def test_positions_are_triples_in_any_spelling() -> None:
    assert parse_positions("1,2,3 -4,5,6", "--lasso") == ((1, 2, 3), (-4, 5, 6))
    assert parse_positions("1 2 3; -4 5 6", "--lasso") == ((1, 2, 3), (-4, 5, 6))
    with pytest.raises(ConfigError, match="three numbers"):
        parse_positions("1,2,3 4,5", "--lasso")


def object_entry(name: str, *prompts: dict[str, Any], **values: Any) -> ObjectEntry:
    return ObjectEntry.from_dict({"name": name, "prompts": prompts, **values})


def test_everything_is_checked_before_anything_is_computed() -> None:
    session = open_session(GEOMETRIES["straight"])
    good = object_entry("a", {"point": [4, 4, 4]})
    with pytest.raises(DataError, match="outside"):
        prepare(session, [good, object_entry("b", {"point": [400, 4, 4]})], "voxel")
    with pytest.raises(DataError, match="like 'c', which is not there; there are: a"):
        prepare(session, [good, object_entry("b", {"like": "c"})], "voxel")
    assert not session.objects
    (first, second) = prepare(session, [good, object_entry("b", {"like": "a"})], "voxel")
    assert (first.name, second.name) == ("a", "b")


def test_axis_and_range_of_an_object_that_exists_stay_with_it() -> None:
    session = open_session(GEOMETRIES["straight"])
    (first,) = prepare(session, [object_entry("a", {"point": [4, 4, 4]}, axis="coronal")], "voxel")
    session.add(first.name, *first.prompts, axis=first.axis)
    (second,) = prepare(session, [object_entry("a", {"not_point": [4, 6, 4]}, range=[2, 7])], "voxel")
    assert (second.axis, second.limits) == (1, (2, 7))
