"""Objects from label maps of every kind, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.instances.read import read_instances
from medseg.instances.scale import knows_spacing, parse_spacing, require_spacing, with_spacing
from medseg.instances.schema import Instances, instances_of
from medseg.types import Array
from medseg.volume import Geometry, Volume


def volume(values: Array) -> Volume:
    array = np.reshape(values, (-1, 1, 1)) if np.ndim(values) == 1 else np.asarray(values)
    return Volume(array, Geometry(array.shape[-3:], np.eye(4)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.float32, np.float64])
def test_label_maps_of_any_type_lose_their_gaps_and_keep_their_numbers(dtype: type) -> None:
    found = instances_of(
        volume(np.array([0, 9, 9, 3, 0, 200]).astype(dtype)), scores={3: 0.5, 9: 1.0, 200: 0.1}
    )
    assert found.labels.dtype == np.int32
    assert found.labels.ravel().tolist() == [0, 2, 2, 1, 0, 3]
    assert found.source_ids is not None
    assert found.source_ids.tolist() == [3, 9, 200]
    assert found.voxels.tolist() == [1, 2, 1]
    assert found.scores.tolist() == [0.5, 1.0, 0.1]


def test_a_mask_and_huge_numbers_are_taken_and_an_empty_image_has_no_objects() -> None:
    assert len(instances_of(volume(np.array([True, False])))) == 1
    huge = instances_of(volume(np.array([0, 2**40, 7], np.int64)))
    assert huge.labels.ravel().tolist() == [0, 2, 1]
    empty = instances_of(volume(np.zeros((4, 3, 2), np.uint8)))
    assert len(empty) == 0
    assert empty.ndim == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([0.0, 0.5]), "not whole"),
        (np.array([0.0, np.nan]), "NaN or infinite"),
        (np.array([0, -1]), "-1"),
        (np.array([0, 2**25], np.float32), "cannot tell"),
        (np.array([0, 1j]), "expected integers"),
    ],
)
def test_what_is_no_label_map_is_refused_in_a_sentence(values: Array, words: str) -> None:
    with pytest.raises(LabelError, match=words):
        instances_of(volume(values))


def test_classes_and_scores_must_fit_the_objects() -> None:
    labels = volume(np.array([0, 4, 5]))
    with pytest.raises(LabelError, match="object 5"):
        instances_of(labels, classes={4: 1})
    with pytest.raises(LabelError, match="scores"):
        instances_of(labels, scores=[0.1])
    with pytest.raises(LabelError, match="2 channels"):
        instances_of(Volume(np.zeros((2, 3, 1, 1), np.uint8), labels.geometry))


def test_instances_check_type_range_and_gaps_at_construction() -> None:
    ones, scores = np.ones(2, np.int64), np.ones(2)
    for values, words in (([0, 1, 3], "0..K"), ([0, 1, 1], "object 2"), ([-1, 1, 2], "0..K")):
        with pytest.raises(LabelError, match=words):
            Instances(volume(np.array(values, np.int32)), ones, scores)
    with pytest.raises(LabelError, match="int32"):
        Instances(volume(np.array([0, 1, 2], np.uint8)), ones, scores)


def test_an_image_that_does_not_tell_its_pixel_size_is_a_question(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import tifffile
    from PIL import Image

    from medseg.io import read

    folder = tmp_path_factory.mktemp("pictures")
    tifffile.imwrite(folder / "plain.tif", np.zeros((5, 6), np.uint8))
    tifffile.imwrite(
        folder / "known.ome.tif",
        np.zeros((5, 6), np.uint8),
        metadata={"PhysicalSizeX": 0.4, "PhysicalSizeY": 0.4},
        ome=True,
    )
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "plain.png")
    for name in ("plain.tif", "plain.png"):
        image = read(folder / name)
        with pytest.raises(GeometryError, match=f"{name}.*How large"):
            require_spacing(image, name)
        told = with_spacing(image, (0.5,), "micron")
        assert require_spacing(told, name).spacing[:2] == (0.5, 0.5)
        assert told.geometry.unit == "micron"
    assert knows_spacing(read(folder / "known.ome.tif"))
    with pytest.raises(GeometryError, match="positive"):
        with_spacing(read(folder / "plain.tif"), (0.5, -1), "mm")


@pytest.mark.parametrize("text", ["0.5", "0.5 inch", "micron", "1x2x3x4 mm", "-1 mm", "1,5 mm"])
def test_a_pixel_size_without_length_or_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.5 micron"):
        parse_spacing(text)


def test_a_mask_is_read_as_its_parts_and_a_label_map_as_its_numbers(tmp_path: Path) -> None:
    import tifffile

    mask = np.zeros((8, 9), np.uint8)
    mask[1:3, 1:3], mask[3, 3], mask[6, 6] = 1, 1, 1
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    tifffile.imwrite(tmp_path / "labels.tif", mask * 4)
    with pytest.raises(GeometryError, match="pixel-size"):
        read_instances(tmp_path / "mask.tif")
    assert len(read_instances(tmp_path / "mask.tif", pixel_size="0.5 micron")) == 2, "corners join"
    assert len(read_instances(tmp_path / "labels.tif", measured=False)) == 1
    assert len(read_instances(tmp_path / "labels.tif", "mask", "1 mm")) == 2
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((8, 9, 3), np.uint8), photometric="rgb")
    with pytest.raises(LabelError, match=r"colour\.tif: has 3 channels"):
        read_instances(tmp_path / "colour.tif", measured=False)
