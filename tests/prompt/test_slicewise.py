"""What a slice is asked: LiteMedSAM's boxes to the pixel, crops that follow, islands, clicks that hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import BundleError
from medseg.nets.sam import SPECS, build_sam
from medseg.nets.sam_bundle import Card, save_tuned
from medseg.prompt import propagate
from medseg.prompt.automatic import AutomaticConfig, ask_clicks
from medseg.prompt.frame import Frame, resize_area
from medseg.prompt.known import VolumeConfig
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.slicewise import (
    BoxConfig,
    MaskConfig,
    Models,
    PointsConfig,
    Zoom,
    crop_around,
    grown,
    islands,
    obeying,
)
from medseg.prompt.target import Target
from medseg.prompt.travel import Seen
from tests.prompt.bright import box_of, click, models_of, scene_of, tube

SHAPE = (48, 44, 20)


def script_box(mask: np.ndarray) -> list[int]:
    """Return the box of ``CVPR24_LiteMedSAM_infer.py`` (get_bbox256 after resize and padding)."""
    frame = Frame.of(SPECS["lite-medsam"], mask.shape, 256)
    padded = np.zeros((256, 256), np.uint8)
    padded[: frame.new[0], : frame.new[1]] = resize_area(mask.astype(np.uint8), frame.new)
    rows, columns = np.where(padded > 0)
    first, last = (
        (max(0, int(a.min()) - 3) for a in (columns, rows)),
        (min(256, int(a.max()) + 3) for a in (columns, rows)),
    )
    return [*first, *last]


@settings(deadline=None, max_examples=60)
@given(st.integers(20, 600), st.integers(20, 600), st.data())
def test_the_next_box_is_that_of_the_official_script_to_the_pixel(
    rows: int, columns: int, data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, rows - 6)), data.draw(st.integers(0, columns - 6))
    mask = np.zeros((rows, columns), dtype=bool)
    mask[top : data.draw(st.integers(top + 5, rows)), left : data.draw(st.integers(left + 5, columns))] = True
    frame = Frame.of(SPECS["lite-medsam"], mask.shape, 256)
    found = frame.box(grown(mask, BoxConfig()))
    # The script lets a box reach into the padding; here it ends with the image.
    ends = frame.box((-0.5, -0.5, rows - 0.5, columns - 0.5))[2:]
    assert found.tolist() == np.minimum(script_box(mask), [*ends, *ends]).tolist()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 700), st.integers(1, 700), st.floats(1, 4), st.integers(8, 96), st.data())
def test_a_crop_holds_the_object_and_lies_in_the_slice(
    rows: int, columns: int, times: float, least: int, data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    box = (top - 0.5, left - 0.5, bottom - 0.5, right - 0.5)
    field = crop_around([box], (rows, columns), Zoom(times=times, least=least))
    assert 0 <= field[0] < field[2] <= rows
    assert 0 <= field[1] < field[3] <= columns
    if times >= 1.5:  # on a lattice of an eighth, a crop that barely fits may cut the object's edge
        assert field[0] <= top
        assert field[1] <= left
        assert field[2] >= bottom
        assert field[3] >= right


def test_an_object_that_moves_by_a_voxel_is_mostly_seen_through_the_same_crop() -> None:
    boxes = [(100 + n, 90.0, 140 + n, 120.0) for n in range(20)]
    assert len({crop_around([box], (512, 512), Zoom()) for box in boxes}) <= 4


def test_islands_are_split_the_largest_first_and_the_smallest_together() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[0:6, 0:6] = mask[10:14, 0:4] = mask[0:2, 12:14] = mask[18, 18] = True
    logits = np.where(mask, 3.0, -3.0).astype(np.float32)
    parts = list(islands(Seen(mask, logits=logits), 3))
    assert [part.area for part in parts] == [36, 16, 5]
    assert all(((part.logits > 0) == part.mask).all() for part in parts if part.logits is not None)
    assert [part.area for part in islands(Seen(mask), 1)] == [57]


def test_clicks_hold_even_where_the_network_does_not_obey() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[5:25, 5:25] = True
    clicks = SlicePrompts(np.array([[30.0, 30.0], [10.0, 10.0]]), np.array([True, False]))
    found = obeying(Seen(mask), clicks).mask
    assert found[30, 30]
    assert not found[10, 10]
    assert 0 < (found ^ mask).sum() < 40
    right = SlicePrompts(np.array([[10.0, 10.0]]), np.array([True]))
    assert obeying(Seen(mask), right).mask is mask


def test_box_with_limits_walks_the_range_and_starts_anew_after_an_empty_slice() -> None:
    mask = tube(SHAPE, 6, 14)
    mask[:, :, 11] = False
    scene = scene_of(mask)
    models, fake = models_of(scene)
    box = box_of(scene, (15, 13, 9), (34, 32, 10), "axial")
    found = propagate(models, Target((box,), 2, limits=(4, 16)), "box")
    assert (found.region.full() == mask).all()
    assert [index for _, index, _, _ in fake.asked] == [9, 8, 7, 6, 5, 4, *range(10, 17)]
    asked = {index: prompts.box for _, index, prompts, _ in fake.asked}
    assert asked[12] == asked[9]
    assert asked[10] != asked[9]
    assert all(field is None for *_, field in fake.asked)  # no crops


def test_mask_looks_through_a_crop_with_box_and_logits_and_points_with_points() -> None:
    mask = tube((200, 180, 20), 4, 15)
    scene = scene_of(mask)
    target = Target((box_of(scene, (92, 82, 9), (109, 99, 10), "axial"),), 2)
    models, fake = models_of(scene)
    propagate(models, target, "mask")
    _, _, prompts, field = fake.asked[1]
    assert field is not None
    assert field[2] - field[0] < 80
    assert prompts.mask is not None
    assert prompts.box is not None
    models, fake = models_of(scene)
    propagate(models, target, "points", PointsConfig(inside=3, outside=4, box=False))
    _, _, prompts, _ = fake.asked[1]
    assert prompts.box is None
    assert prompts.positive.tolist() == [True] * 3 + [False] * 4
    bright = scene.slice(2, 9) > 128
    assert [bright[int(r), int(c)] for r, c in prompts.points] == prompts.positive.tolist()


def test_a_click_alone_is_asked_on_the_whole_slice_and_then_in_a_crop() -> None:
    mask = tube((200, 180, 20), 4, 15)
    scene = scene_of(mask)
    models, fake = models_of(scene)
    found = propagate(models, Target((click(scene, 99, 90, 9),), 2), "mask")
    assert (found.region.full() == mask).all()
    assert fake.asked[0][3] is None
    assert fake.asked[1][3] is not None


def test_networks_are_loaded_when_asked_once_for_all_scenes(mobile_sam_path: Path) -> None:
    scene = scene_of(tube(SHAPE, 4, 15))
    models = Models.open(scene, given={"mobile-sam": mobile_sam_path})
    assert not models.ready
    assert models.click_segmenter is models.click_segmenter
    other = models.of(scene_of(tube(SHAPE, 3, 9)))
    assert other.click_segmenter is not models.click_segmenter
    assert other.weights("mobile-sam") is models.weights("mobile-sam")
    with pytest.raises(BundleError, match="mobile-sam"):
        Models.open(scene, given={"lite-medsam": mobile_sam_path}).box_segmenter  # noqa: B018


@pytest.fixture(scope="module")
def tuned_at_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tuned") / "bundle"
    save_tuned(folder, build_sam("mobile-sam"), Card(base="mobile-sam", base_sha256="", licence="", size=64))
    return folder


@pytest.mark.parametrize("name", ["volume", "mask", "points", "consensus"])
def test_a_fine_tuned_bundle_is_asked_at_the_size_of_its_training(name: str, tuned_at_64: Path) -> None:
    scene = scene_of(tube((40, 40, 6), 1, 4))
    models = Models.open(scene, given={"mobile-sam": tuned_at_64})
    box = box_of(scene, (13, 13, 3), (28, 28, 4), "axial")
    propagate(models, Target((box,), 2, limits=(2, 4)), name)
    assert set(models.ready) == {("mobile-sam", 64)}


def test_a_size_that_the_user_says_outdoes_that_of_the_training(tuned_at_64: Path) -> None:
    scene = scene_of(tube((40, 40, 6), 1, 4))
    models = Models.open(scene, given={"mobile-sam": tuned_at_64})
    ask_clicks(models, AutomaticConfig())
    ask_clicks(models, AutomaticConfig(size=128))
    propagate(models, Target((click(scene, 20, 20, 3),), 2), "volume", VolumeConfig(size=256))
    assert set(models.ready) == {("mobile-sam", size) for size in (64, 128, 256)}


def test_nothing_is_encoded_twice(mobile_sam_path: Path) -> None:
    from medseg.prompt.embeddings import EmbeddingCache

    mask = tube(SHAPE, 7, 10, 9.0)
    scene = scene_of(mask)
    models = Models.open(scene, EmbeddingCache(), given={"mobile-sam": mobile_sam_path})
    target = Target((box_of(scene, (14, 12, 9), (35, 32, 10), "axial"),), 2)
    first = propagate(models, target, "mask", MaskConfig())
    encoded = models.click_segmenter.encoded  # type: ignore[attr-defined]
    assert encoded <= 8
    again = propagate(models, target, "mask", MaskConfig())
    assert models.click_segmenter.encoded == encoded  # type: ignore[attr-defined]
    assert again.region == first.region
