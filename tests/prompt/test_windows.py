"""Windows: which values are drawn black and white."""

from pathlib import Path

import numpy as np
import pytest

import medseg
from medseg.errors import ConfigError, DataError
from medseg.prompt.prompts import Box, Lasso, Mask, ObjectMask, Point, Scribble
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.windows import (
    WINDOWS,
    choose_window,
    edges,
    find_window,
    looks_like_ct,
    prompted_region,
)
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

SHAPE = (20, 16, 12)
GRID = Geometry(SHAPE, affine("RAS", (1.0, 1.0, 2.0)))


def ct() -> Volume:
    """Air, with a body of soft tissue that holds a lung (i < 8) and a bone (i >= 14)."""
    values = np.full(SHAPE, -1000, np.int16)
    values[2:18, 2:14] = 50
    values[3:8, 4:10] = -800
    values[14:17, 4:10] = 700
    return Volume(values, GRID)


def mr(seed: int = 0) -> Volume:
    values = np.random.default_rng(seed).gamma(4.0, 100.0, SHAPE)
    values[:, :3] = 0
    return Volume(values.astype(np.float32), GRID)


def box(low: tuple[int, int, int], stop: tuple[int, int, int]) -> Region:
    return Region(SHAPE, low, np.ones(tuple(b - a for a, b in zip(low, stop, strict=True)), dtype=bool))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_preset_is_its_level_and_width(name: str) -> None:
    level, width = WINDOWS[name]
    low, high = choose_window(ct(), name)
    assert ((low + high) / 2, high - low) == (level, width)


def test_a_ct_is_never_shown_whole() -> None:
    low, high = choose_window(ct())
    assert (low, high) == edges(40, 400)
    with pytest.raises(ConfigError, match="always seen through a window"):
        choose_window(ct(), "percentiles")


@pytest.mark.parametrize(
    ("region", "name"),
    [
        (box((9, 4, 2), (13, 10, 8)), "soft tissue"),
        (box((3, 4, 2), (8, 10, 8)), "lung"),
        (box((14, 4, 2), (17, 10, 8)), "bone"),
        (box((0, 0, 0), (2, 2, 12)), "lung"),  # air: nothing shows it better
        (Region.empty(SHAPE), "soft tissue"),
    ],
)
def test_auto_takes_the_window_that_shows_what_was_pointed_at(region: Region, name: str) -> None:
    assert find_window(ct(), "auto", region=region).name == name


def test_auto_follows_the_prompt_in_a_volume_whose_axes_are_turned() -> None:
    turned = Volume(ct().array[0][::-1].transpose(2, 0, 1).copy(), _turned_grid())
    scene = Scene.of(turned, choose_window(turned))
    centre = scene.to_world(np.array([5.0, 7.0, 5.0]))
    region = prompted_region(scene, [Point(position_mm=tuple(centre))])
    assert find_window(turned, "auto", region=region).name == "lung"


def _turned_grid() -> Geometry:
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = (0, 0, 2.0), (-1.0, 0, 0), (0, 1.0, 0)
    matrix[:3, 3] = (40.0, 12.25, 100.0)
    return Geometry((12, 20, 16), matrix)


def test_every_kind_of_prompt_points_somewhere() -> None:
    scene = Scene.of(ct(), (0, 1))

    def world(*voxel: float) -> tuple[float, float, float]:
        i, j, k = (float(x) for x in scene.to_world(np.array(voxel)))
        return (i, j, k)

    line = (world(3, 4, 5), world(6, 8, 5), world(4, 9, 5))
    expected = {(3, 4, 5): (7, 10, 6)}
    for prompt in (Scribble(points_mm=line), Lasso(points_mm=line, plane="axial")):
        region = prompted_region(scene, [prompt])
        assert {region.start: region.stop} == expected
    cornered = Box(corner_mm=world(2.5, 3.5, 4.5), opposite_mm=world(6.5, 9.5, 5.5))
    region = prompted_region(scene, [cornered])
    assert {region.start: region.stop} == expected
    mask = prompted_region(scene, [Mask.of(box((3, 4, 5), (7, 10, 6)))])
    assert {mask.start: mask.stop} == expected
    click = prompted_region(scene, [Point(position_mm=world(5.1, 5.1, 5.1))])
    assert (click.start, click.stop) == ((2, 2, 4), (9, 9, 8))  # 3 mm are 3, 3 and 1.5 voxels
    flat = Box(corner_mm=world(2.5, 3.5, 5.0), opposite_mm=world(6.5, 9.5, 5.0), plane="axial")
    region = prompted_region(scene, [flat])
    assert {region.start: region.stop} == expected
    empty = prompted_region(scene, [Mask.of(Region.empty(SHAPE)), ObjectMask(object="liver")])
    assert empty.voxels == 0


def test_negative_and_outside_prompts_do_not_choose_the_window() -> None:
    scene = Scene.of(ct(), (0, 1))
    far = Point(position_mm=(1e4, 1e4, 1e4))
    lung = Point(position_mm=tuple(scene.to_world(np.array([5.0, 7.0, 5.0]))), positive=False)
    assert prompted_region(scene, [far, lung]).voxels == 0


def test_mr_takes_percentiles_of_the_voxels_above_zero() -> None:
    volume = mr()
    above = volume.array[volume.array > 0]
    assert choose_window(volume) == pytest.approx(tuple(np.percentile(above, (0.5, 99.5))))
    assert find_window(volume, modality="mri").to_dict()["name"] == "percentiles"


def test_a_normalised_mr_keeps_its_tissue_below_zero() -> None:
    volume = mr()
    scaled = volume.with_array((volume.array - volume.array.mean()) / volume.array.std())
    low, high = choose_window(scaled)
    assert low < 0 < high


def test_a_cropped_ct_without_air_is_known_by_its_fat() -> None:
    values = np.random.default_rng(1).normal(60, 15, SHAPE)
    values[:4] -= 160
    assert looks_like_ct(values)
    assert not looks_like_ct(mr().array[0])


def test_being_told_outweighs_the_values() -> None:
    assert find_window(ct(), modality="MR").name == "percentiles"
    assert find_window(mr(), modality="CT").name == "soft tissue"
    assert find_window(mr(), "brain", modality="CT").values == edges(40, 80)


@pytest.mark.parametrize("wanted", [(-10.0, 90.0), "40/100"])
def test_a_window_may_be_given_in_numbers(wanted: str | tuple[float, float]) -> None:
    assert choose_window(ct(), wanted) == (-10.0, 90.0)


@pytest.mark.parametrize("wanted", [(3.0, 3.0), (5.0, 1.0), (0.0, np.inf), "40/0", "40/", "a/b", "1.2.3/4"])
def test_a_window_without_width_is_refused(wanted: str | tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="black below white"):
        choose_window(ct(), wanted)


def test_an_unknown_window_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'liver'"):
        choose_window(ct(), "livr")
    assert find_window(ct(), "Soft_Tissue").name == "soft tissue"


def test_a_ct_window_on_an_mr_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not look like CT"):
        choose_window(mr(), "lung")
    with pytest.raises(ConfigError, match="this image is MR"):
        choose_window(mr(), "lung", modality="MR")


def test_voxels_that_are_not_finite_do_not_count() -> None:
    volume = mr()
    array = volume.array.copy()
    array[0, ::2] = np.nan
    array[0, 1] = np.inf
    low, high = choose_window(volume.with_array(array))
    assert 0 < low < high < np.inf
    with pytest.raises(DataError, match="no finite voxel"):
        choose_window(volume.with_array(np.full_like(array, np.nan)))


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_a_constant_image_has_a_window(value: float) -> None:
    low, high = choose_window(Volume(np.full(SHAPE, value, np.float32), GRID))
    assert low < high


def test_a_region_of_another_grid_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit"):
        find_window(ct(), region=Region((9, 9, 9), (0, 0, 0), np.ones((2, 2, 2), bool)))


def test_large_images_are_sampled_to_nearly_the_same_window() -> None:
    values = np.random.default_rng(3).gamma(4.0, 100.0, (200, 200, 150)).astype(np.float32)
    grid = Geometry((200, 200, 150), np.eye(4))
    whole = np.percentile(values, (0.5, 99.5))
    assert choose_window(Volume(values, grid)) == pytest.approx(tuple(whole), rel=0.05)


def test_modalities_of_real_images_are_seen(data_dir: Path) -> None:
    ct_image = medseg.read(data_dir / "ct_organs" / "example_ct.nii.gz")
    assert find_window(ct_image).modality == "CT"
    for name in ("mr_organs/example_mr_sm.nii.gz", "ms_lesion/patient19/FLAIR.nii.gz"):
        assert find_window(medseg.read(data_dir / name)).name == "percentiles"
    assert find_window(medseg.read(data_dir / "brain_tumour_mr/brain1_image.nrrd")).name == "percentiles"
