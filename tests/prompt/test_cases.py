"""Files of cases: what they may say, and what they are refused for."""

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import ConfigError, DataError, GeometryError, ReadError
from medseg.geometry.orient import to_ras
from medseg.io import write
from medseg.prompt.cases import CaseEntry, load_cases, open_entry, world_box, world_point
from medseg.prompt.scene import Scene
from medseg.prompt.simulate import Click, draw_prompt
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

SHAPE = (20, 24, 16)


def labels() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[4:12, 6:16, 5:9] = 1
    array[14:18, 18:22, 10:13] = 1
    array[2, 2, 2] = 1
    array[16, 3:9, 3:5] = 2
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    geometry = Geometry(SHAPE, affine("LPS", (0.8, 0.9, 3.0)))
    image = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32) + 60 * (labels() > 0)
    write(Volume(image, geometry), tmp_path / "image.nii.gz")
    write(Volume(labels(), geometry), tmp_path / "labels.nii.gz")
    return tmp_path


def entry(**changes: object) -> CaseEntry:
    return CaseEntry.from_dict({"image": "image.nii.gz", "labels": "labels.nii.gz", **changes})


FORMS = {
    "mapping": "cases:\n- {image: a, labels: b, value: 2}\n",
    "list": "# made by hand\n- {image: a, labels: b, value: 2}\n",
    "document": "---\n- image: a\n  labels: b\n  value: 2\n",
    "json": '[{"image": "a", "labels": "b", "value": 2}]',
    "json mapping": '{"cases": [{"image": "a", "labels": "b", "value": 2}]}',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mapping_and_a_plain_list_are_read_alike(form: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    path.write_text(FORMS[form])
    assert load_cases(path).cases == (CaseEntry(image="a", labels="b", value=2),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases: []", "cases"),
        ("- {image: a, label: b}", "did you mean 'labels'"),
        ("- {image: a, labels: b, prompt: {kind: box2d, axis: 3, slice: 0, box: [0, 0, 1, 1]}}", "axis"),
        ("- {image: a, labels: b, prompt: {kind: point, axis: 2, slice: 0, box: [0, 0, 1, 1]}}", "box2d"),
        ("cases: {", "not readable"),
        ("", "mapping"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_cases(path)
    assert str(path) in str(caught.value)


def test_an_entry_becomes_an_object_on_the_turned_grid(folder: Path) -> None:
    (item,) = open_entry(entry(name="organ", dataset="mr", value=(1, 2)), [folder])
    assert (item.dataset, item.name, item.axis) == ("mr", "organ", 2)
    assert item.reference.voxels == (labels() > 0).sum()
    assert np.array_equal(item.reference.full(), (labels() > 0)[::-1, ::-1])  # LPS to RAS
    assert item.limits == (2, 12)


def test_components_are_objects_of_their_own_largest_first(folder: Path) -> None:
    items = list(open_entry(entry(components_mm3=50), [folder]))
    assert [item.name for item in items] == ["image_01", "image_02"]
    assert [item.reference.voxels for item in items] == [8 * 10 * 4, 4 * 4 * 3]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "PIR"])
@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_box_of_the_file_is_the_same_box_of_the_turned_grid(
    codes: str, across: int, tmp_path: Path
) -> None:
    geometry = Geometry(SHAPE, affine(codes, (0.8, 0.9, 3.0)))
    write(Volume(np.ones(SHAPE, np.float32), geometry), tmp_path / "image.nii.gz")
    write(Volume(labels(), geometry), tmp_path / "labels.nii.gz")
    bounds = [(4, 12), (6, 16), (5, 9)]
    (top, bottom), (left, right) = (b for a, b in enumerate(bounds) if a != across)
    prompt = {"axis": across, "slice": bounds[across][0], "box": (top, left, bottom, right)}
    (item,) = open_entry(entry(prompt=prompt), [tmp_path])
    box = item.prompt
    assert box is not None
    marked = np.zeros(item.volume.shape, bool)
    rows, columns = (slice(round(box.box[n] + 0.5), round(box.box[n + 2] + 0.5)) for n in (0, 1))
    where: list = [rows, columns]
    where.insert(box.axis, box.index)
    marked[tuple(where)] = True
    wanted = np.zeros(SHAPE, np.uint8)
    inside: list = [slice(*b) for b in bounds]
    inside[across] = bounds[across][0]
    wanted[tuple(inside)] = 1
    assert np.array_equal(marked, to_ras(Volume(wanted, geometry)).array[0] > 0)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"image": "other.nii.gz"}, ReadError, "no such file"),
        ({"value": 7}, DataError, "no voxel of value 7"),
        ({"components_mm3": 1e6}, DataError, "the largest has"),
        ({"channel": 1}, DataError, "no channel 1"),
        ({"prompt": {"axis": 2, "slice": 7, "box": (0, 0, 2, 2)}}, DataError, "does not touch"),
        ({"prompt": {"axis": 2, "slice": 99, "box": (4, 6, 12, 16)}}, DataError, "outside the image"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, changes: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        list(open_entry(entry(**changes), [folder]))


def test_labels_on_another_grid_are_refused(folder: Path) -> None:
    write(Volume(labels()[:-1], Geometry((19, 24, 16), np.eye(4))), folder / "labels.nii.gz")
    with pytest.raises(GeometryError, match="on the grid of the image"):
        list(open_entry(entry(), [folder]))


def test_files_are_searched_in_the_folders_in_order(folder: Path, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert len(list(open_entry(entry(), [empty, folder]))) == 1


def test_prompts_in_the_world_come_back_to_their_voxels(folder: Path) -> None:
    (item,) = open_entry(entry(value=2), [folder])
    drawn = draw_prompt(item.reference.full(), item.axis, np.random.default_rng(0))
    scene = item.scene(drawn)
    box = world_box(scene, drawn)
    corners = scene.to_voxel(np.array([box.corner_mm, box.opposite_mm]))
    assert np.allclose(corners[:, 2], drawn.index)
    assert np.allclose(corners[:, :2].ravel(), drawn.box)
    point = world_point(scene, Click((3, 4, 5), False), 2)
    assert np.allclose(scene.to_voxel(point.position_mm), (3, 4, 5))
    assert (point.positive, point.plane, box.plane) == (False, "axial", "axial")


def test_a_ct_is_seen_through_the_window_of_what_is_pointed_at(folder: Path) -> None:
    geometry = Geometry(SHAPE, affine("LPS", (0.8, 0.9, 3.0)))
    image = np.where(labels() == 1, -600, -1000).astype(np.int16)
    image[:, :, :4] = 60
    write(Volume(image, geometry), folder / "image.nii.gz")
    (item,) = open_entry(entry(), [folder])
    scene = item.scene(draw_prompt(item.reference.full(), item.axis, np.random.default_rng(0), 0.0))
    assert scene.window == (-1350.0, 150.0)  # lung
    assert isinstance(scene, Scene)
