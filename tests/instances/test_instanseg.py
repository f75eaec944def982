"""InstanSeg's published nets: their own answer, pixel by pixel, without their limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.errors import AssetError, ConfigError, DataError, GeometryError
from medseg.instances import instanseg
from medseg.instances.instanseg import InstanSeg, find_seeds, load_instanseg, merge_overlapping, tidy
from medseg.instances.rescale import normalise
from medseg.train.centre_measure import count_matches
from medseg.volume import Geometry, Unit, Volume

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nets(instanseg_paths: dict[str, Path]) -> dict[str, InstanSeg]:
    return {
        name: load_instanseg(name, "cpu", 1, instanseg_paths[kind.asset])
        for name, kind in instanseg.KINDS.items()
    }


def drawn(shape: tuple[int, int], pitch: float = 24.0, radius: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture (float32) of jittered discs on a grid, and their label map."""
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.int32)
    rows, columns = np.indices(shape)
    for number, (i, j) in enumerate(np.ndindex(int(shape[0] / pitch), int(shape[1] / pitch)), 1):
        y, x = (np.array([i, j]) + 0.5) * pitch + rng.uniform(-0.1, 0.1, 2) * pitch
        box = tuple(slice(max(0, int(c - radius - 1)), int(c + radius + 2)) for c in (y, x))
        inside = np.hypot(rows[box] - y, columns[box] - x) < radius * rng.uniform(0.85, 1.0)
        labels[box][inside] = number
    soft = ndimage.gaussian_filter((labels > 0).astype(np.float32), radius / 16)
    return (100 * soft + 20 + rng.normal(0, 3, shape)).astype(np.float32), labels


def picture(array: np.ndarray, pixel: float = 0.5, unit: Unit = "micron") -> Volume:
    shaped = array[..., None] if array.ndim == 3 else array[None, :, :, None]
    return Volume(shaped, Geometry(shaped.shape[1:], np.diag([pixel, pixel, 1.0, 1.0]), unit))


def own_answer(net: Any, image: np.ndarray, target: int) -> np.ndarray:
    """Return what the TorchScript module says by itself, numbered from 1."""
    shown = torch.from_numpy(normalise(image, cut=(-2.0, 3.0)))[None]
    wanted = torch.tensor([target == 0, target == 1]).int()
    with torch.no_grad():
        labels = net(shown, target_segmentation=wanted)[0, 0].numpy().astype(np.int64)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")  # the net's own sum over objects
@pytest.mark.parametrize("name", instanseg.KINDS)
def test_every_pixel_is_as_the_net_itself_says_whatever_the_tiles(
    name: str, nets: dict[str, InstanSeg], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = drawn((130, 250))
    channels = instanseg.KINDS[name].channels or 1
    stained = np.stack([255 - image * (c + 1) / 3 for c in range(3)]) if channels == 3 else image[None]
    expected = own_answer(nets[name].net, stained, instanseg.KINDS[name].target)
    found = nets[name].segment(stained, (0.5, 0.5))
    np.testing.assert_array_equal(found.labels, expected)
    assert len(found.scores) == expected.max() > 30 and (found.scores > 0.5).all()
    monkeypatch.setattr(instanseg, "TILE", 128)
    np.testing.assert_array_equal(nets[name].segment(stained, (0.5, 0.5)).labels, expected)


def test_thousands_of_nuclei_are_found_where_the_package_gives_up_at_2000(nets: dict[str, InstanSeg]) -> None:
    image, labels = drawn((576, 576), pitch=12, radius=4.8)
    assert labels.max() > 2200
    found = nets["instanseg-fluorescence"].segment(image[None], (0.5, 0.5))
    true, invented, missed = count_matches(labels, found.labels)[0.5]
    assert true > 2000 and invented < 0.01 * true and missed < 0.1 * labels.max()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_picture_of_another_scale_is_brought_to_that_of_the_net(
    scale: float, nets: dict[str, InstanSeg]
) -> None:
    image, labels = drawn((int(120 * scale), int(144 * scale)), pitch=24 * scale, radius=8 * scale)
    found = nets["instanseg-fluorescence"].find(picture(image, 0.5 / scale))
    true, invented, missed = count_matches(labels, found.labels)[0.5]
    assert (true, invented, missed) == (labels.max(), 0, 0)
    assert found.labels.shape == image.shape and found.labels.dtype == np.int32


def test_objects_that_the_window_may_cut_are_noted(nets: dict[str, InstanSeg]) -> None:
    image, _ = drawn((150, 150), pitch=150, radius=40)
    found = nets["instanseg-cells"].segment(image[None], (0.5, 0.5))
    assert "window of 32 micrometres" in found.notes[0]
    assert nets["instanseg-cells"].segment(drawn((72, 72))[0][None], (0.5, 0.5)).notes == ()


def test_a_known_diameter_stands_for_the_size_of_a_pixel(nets: dict[str, InstanSeg]) -> None:
    image, labels = drawn((240, 240), pitch=48, radius=16)
    found = nets["instanseg-fluorescence"].find(picture(image, 1.0), diameter=30.0, in_pixels=True)
    assert found.labels.max() == labels.max()
    assert found.diameter == 30.0


def test_the_size_of_a_pixel_is_asked_for_and_one_that_shows_nothing_is_refused(
    nets: dict[str, InstanSeg],
) -> None:
    net, image = nets["instanseg-fluorescence"], drawn((48, 48))[0]
    with pytest.raises(GeometryError, match=r"--pixel-size '0\.5 micron', or --diameter"):
        net.find(picture(image), in_pixels=True)
    with pytest.raises(GeometryError, match="a pixel of 1000 micrometres"):
        net.find(picture(image, 1.0, "mm"))
    with pytest.raises(ConfigError, match="diameter"):
        net.find(picture(image), diameter=0.0)


def test_volumes_nan_and_other_numbers_of_channels_are_refused(nets: dict[str, InstanSeg]) -> None:
    image = drawn((48, 48))[0]
    with pytest.raises(DataError, match="volume of 5 slices"):
        nets["instanseg-fluorescence"].find(Volume(np.zeros((1, 9, 9, 5)), Geometry((9, 9, 5), np.eye(4))))
    with pytest.raises(DataError, match="NaN"):
        nets["instanseg-fluorescence"].segment(np.where(image > 100, np.nan, image)[None], (0.5, 0.5))
    with pytest.raises(ConfigError, match="5 channels"):
        nets["instanseg-brightfield"].segment(np.stack([image * c for c in range(5)]), (0.5, 0.5))


def test_type_and_range_do_not_matter_and_nothing_holds_nothing(nets: dict[str, InstanSeg]) -> None:
    net, (image, _) = nets["instanseg-fluorescence"], drawn((72, 72))
    expected = net.segment(image[None], (0.5, 0.5)).labels
    for other in ((image * 40).astype(np.uint16), (image * 1e-9).astype(np.float64)):
        true, invented, missed = count_matches(expected, net.segment(other[None], (0.5, 0.5)).labels)[0.7]
        assert (true, invented, missed) == (expected.max(), 0, 0)
    for empty in (np.zeros((1, 80, 90), np.uint8), np.zeros((1, 0, 90)), np.full((1, 3, 3), 1e-30)):
        found = net.segment(empty, (0.5, 0.5))
        assert found.labels.shape == empty.shape[1:] and not found.labels.any() and not len(found.scores)


def test_pictures_smaller_than_a_window_are_taken(nets: dict[str, InstanSeg]) -> None:
    image, labels = drawn((30, 40), pitch=20, radius=7)
    assert nets["instanseg-fluorescence"].segment(image[None], (0.5, 0.5)).labels.max() == labels.max()


def test_only_the_published_file_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"anything")
    with pytest.raises(AssetError, match="is not instanseg-fluorescence"):
        load_instanseg("instanseg-fluorescence", given=tmp_path / "net.pt")


def test_seeds_are_the_highest_around_and_the_first_of_equal_ones() -> None:
    middle = np.zeros((12, 30), np.float32)
    middle[3, 4] = middle[3, 6] = 0.9
    middle[8, 20], middle[8, 28] = 0.8, 0.7
    assert find_seeds(middle, 5, 0.7).tolist() == [[3, 4], [8, 20]]


def test_a_window_keeps_the_part_at_its_seed_without_holes() -> None:
    crop = np.zeros((2, 30, 30), np.float32)
    crop[:, 5:15, 5:15] = 0.9
    crop[:, 9:11, 9:11] = 0.1
    crop[:, 20:25, 20:25] = 0.8
    tidy(crop, np.array([[7, 7], [19, 19]]), 0.5)
    assert (crop[0, 5:15, 5:15] >= 0.5).all() and crop[0, 9, 9] == 0.5 and not crop[0, 20:].any()
    assert (crop[1, 20:25, 20:25] == np.float32(0.8)).all() and not crop[1, :15].any()


def test_objects_that_share_more_than_a_part_of_the_smaller_are_one() -> None:
    pixels = [np.arange(10), np.arange(100, 110), np.arange(6, 16), np.arange(12, 32), np.zeros(0, np.int64)]
    assert merge_overlapping(pixels, 0.3).tolist() == [0, 1, 2, 1, 1, 5]
    assert merge_overlapping(pixels, 0.4).tolist() == [0, 1, 2, 3, 4, 5]
    assert merge_overlapping([], 0.3).tolist() == [0]
