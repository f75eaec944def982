import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.errors import ConfigError, DataError
from medseg.nets.sam import Sam, build_sam, load_sam
from medseg.prompt.embeddings import EmbeddingCache
from medseg.prompt.scene import Scene
from medseg.prompt.segmenter import SlicePrompts, SliceSegmenter
from medseg.types import BoolArray
from medseg.volume import Geometry, Volume
from tests.nets.peer_sam import SHAPES, corners, organ, unpacked

GOLDEN = json.loads((Path(__file__).parents[1] / "nets" / "golden" / "sam.json").read_text())
CLICK = SlicePrompts(np.array([[30.0, 20.0]]), np.array([True]))


@pytest.fixture(scope="module")
def lite(lite_medsam_path: Path) -> Sam:
    return load_sam(lite_medsam_path)


@pytest.fixture(scope="module")
def mobile(mobile_sam_path: Path) -> Sam:
    return load_sam(mobile_sam_path)


@pytest.fixture(scope="module")
def untrained() -> Sam:
    """A network with random weights: what is asked of it is counted, not believed."""
    torch.manual_seed(0)
    return build_sam("mobile-sam")


def scene_of(*slices: np.ndarray) -> Scene:
    """A volume whose axial slices are `slices`, seen as they are."""
    array = np.stack(slices, axis=-1).astype(np.float32)
    return Scene.of(Volume(array[None], Geometry(array.shape, np.eye(4))), (0, 255))


@pytest.fixture
def small() -> Scene:
    return scene_of(*(np.roll(organ(60, 48), each, axis=0) for each in range(4)))


def voxel_edges(rows: int, columns: int) -> tuple[float, float, float, float]:
    first_row, first_column, last_row, last_column = corners(rows, columns)
    return first_row - 0.5, first_column - 0.5, last_row + 0.5, last_column + 0.5


def iou(a: BoolArray, b: BoolArray) -> float:
    return float((a & b).sum() / (a | b).sum())


def the_organ(rows: int, columns: int) -> BoolArray:
    y, x = np.mgrid[:rows, :columns]
    v, u = (y + 0.5) / rows, (x + 0.5) / columns
    return np.asarray(((v - 0.5) / 0.19) ** 2 + ((u - 0.42) / 0.16) ** 2 < 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_lite_medsam_draws_the_mask_of_its_reference(lite: Sam, shape: tuple[int, int]) -> None:
    golden = GOLDEN["lite-medsam"]["{}x{}".format(*shape)]
    segmenter = SliceSegmenter(lite, scene_of(organ(*shape)), precision="fp32")
    answer = segmenter.predict(2, 0, SlicePrompts(box=voxel_edges(*shape)))
    assert iou(answer.mask(shape), unpacked(golden["mask"], shape)) >= 0.999
    assert answer.score == pytest.approx(golden["score"], abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_mobile_sam_draws_the_masks_of_its_reference(mobile: Sam, shape: tuple[int, int]) -> None:
    golden = GOLDEN["mobile-sam"]["{}x{}".format(*shape)]
    segmenter = SliceSegmenter(mobile, scene_of(organ(*shape)), size=1024, precision="fp32")
    answer = segmenter.predict(2, 0, SlicePrompts(box=voxel_edges(*shape)))
    assert iou(answer.mask(shape), unpacked(golden["mask"], shape)) >= 0.999
    assert answer.score == pytest.approx(golden["score"], abs=1e-3)
    click = SlicePrompts(np.array([[shape[0] // 2, int(0.42 * shape[1])]]), np.array([True]))
    answer = segmenter.predict(2, 0, click, multimask=True)
    best = int(np.argmax(golden["scores"]))
    assert iou(answer.mask(shape), unpacked(golden["click"][best], shape)) >= 0.999
    assert segmenter.encoded == 1


def test_a_slice_is_encoded_once_for_every_prompt_and_every_segmenter(
    untrained: Sam, small: Scene, tmp_path: Path
) -> None:
    cache = EmbeddingCache(tmp_path)
    first = SliceSegmenter(untrained, small, cache, size=64)
    answers = [first.predict(2, 1, prompts) for prompts in (CLICK, SlicePrompts(box=(3, 3, 40, 30)), CLICK)]
    assert first.encoded == 1
    np.testing.assert_array_equal(answers[0].logits, answers[2].logits)
    first.predict(2, 2, CLICK)
    first.predict(2, 1, CLICK, field=(0, 0, 50, 40))
    first.predict(0, 1, SlicePrompts(box=(1, 0, 20, 3)))
    assert first.encoded == 4
    for each in (cache, EmbeddingCache(tmp_path)):  # in memory, and on the disk of yesterday
        again = SliceSegmenter(untrained, small, each, size=64)
        np.testing.assert_array_equal(again.predict(2, 1, CLICK).logits, answers[0].logits)
        assert again.encoded == 0


def test_another_image_window_network_or_size_is_encoded_anew(untrained: Sam, small: Scene) -> None:
    cache = EmbeddingCache()
    SliceSegmenter(untrained, small, cache, size=64).predict(2, 1, CLICK)
    darker = Scene(small.array, small.geometry, small.source, (0, 300), small.digest)
    torch.manual_seed(1)
    others: list[tuple[Sam, Scene, dict[str, Any]]] = [
        (untrained, scene_of(*np.moveaxis(small.array, 2, 0)[::-1]), {"size": 64}),
        (untrained, darker, {"size": 64}),
        (build_sam("mobile-sam"), small, {"size": 64}),
        (untrained, small, {"size": 128}),
    ]
    for model, scene, settings in others:
        segmenter = SliceSegmenter(model, scene, cache, **settings)
        segmenter.predict(2, 1, CLICK)
        assert segmenter.encoded == 1


def test_a_damaged_cache_gives_the_same_mask(untrained: Sam, small: Scene, tmp_path: Path) -> None:
    first = SliceSegmenter(untrained, small, EmbeddingCache(tmp_path), size=64).predict(2, 1, CLICK)
    (path,) = tmp_path.glob("??/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    segmenter = SliceSegmenter(untrained, small, EmbeddingCache(tmp_path), size=64)
    np.testing.assert_array_equal(segmenter.predict(2, 1, CLICK).logits, first.logits)
    assert segmenter.encoded == 1


def test_a_field_is_answered_in_place(untrained: Sam, small: Scene) -> None:
    segmenter = SliceSegmenter(untrained, small, size=64)
    field = (10, 8, 50, 40)
    whole = np.zeros((60, 48))
    whole[20:30, 20:30] = 1
    part = whole[10:50, 8:40]
    answers = [segmenter.predict(2, 1, SlicePrompts(mask=mask), field=field) for mask in (whole, part)]
    assert answers[0].logits.shape == (40, 32)
    np.testing.assert_array_equal(answers[0].logits, answers[1].logits)
    mask = answers[0].mask((60, 48))
    assert not mask[:10].any() and not mask[50:].any()
    np.testing.assert_array_equal(mask[10:50, 8:40], answers[0].logits > 0)


def test_clicks_outside_the_field_are_left_out(untrained: Sam, small: Scene) -> None:
    segmenter = SliceSegmenter(untrained, small, size=64)
    field = (10, 8, 50, 40)
    both = SlicePrompts(np.array([[30.0, 20.0], [2.0, 2.0]]), np.array([True, False]))
    one = segmenter.predict(2, 1, CLICK, field, multimask=False)
    np.testing.assert_array_equal(segmenter.predict(2, 1, both, field, multimask=False).logits, one.logits)


@pytest.mark.parametrize(
    ("axis", "index", "prompts", "field", "words"),
    [
        (2, 4, CLICK, None, "slices 0 to 3"),
        (2, -1, CLICK, None, "slices 0 to 3"),
        (2, 0, SlicePrompts(), None, "nothing is asked"),
        (2, 0, CLICK, (0, 0, 61, 48), "does not lie in a slice of 60 rows and 48 columns"),
        (2, 0, CLICK, (5, 5, 5, 9), "does not lie"),
        (2, 0, CLICK, (40, 0, 60, 10), "nothing is asked"),
        (2, 0, SlicePrompts(box=(5, 5, 5, 9)), None, "has no area"),
        (2, 0, SlicePrompts(box=(70, 5, 90, 9)), None, "has no area"),
        (2, 0, SlicePrompts(mask=np.zeros((3, 3))), None, "mask of shape"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    untrained: Sam, small: Scene, axis: int, index: int, prompts: SlicePrompts, field: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        SliceSegmenter(untrained, small, size=64).predict(axis, index, prompts, field)


def test_a_size_that_the_network_cannot_take_is_refused(untrained: Sam, small: Scene) -> None:
    for size in (100, 32):
        with pytest.raises(ConfigError, match="multiple of 16"):
            SliceSegmenter(untrained, small, size=size)


def test_a_volume_of_one_slice_is_answered(untrained: Sam) -> None:
    answer = SliceSegmenter(untrained, scene_of(organ(60, 48)), size=64).predict(2, 0, CLICK)
    assert answer.logits.shape == (60, 48)
    assert 0 <= answer.score <= 1


@pytest.fixture(scope="module")
def boxes_only(lite: Sam) -> SliceSegmenter:
    return SliceSegmenter(lite, scene_of(organ(128, 128)))


def test_a_network_of_boxes_finds_an_organ_by_a_click(boxes_only: SliceSegmenter) -> None:
    answer = boxes_only.predict(2, 0, SlicePrompts(np.array([[64.0, 54.0]]), np.array([True])))
    assert iou(answer.mask((128, 128)), the_organ(128, 128)) > 0.8


def test_a_network_of_boxes_obeys_its_clicks(boxes_only: SliceSegmenter) -> None:
    box = (39.5, 33.5, 88.5, 74.5)
    before = boxes_only.predict(2, 0, SlicePrompts(box=box)).mask((128, 128))
    clicks = np.array([[64.0, 54.0], [64.0, 95.0], [60.0, 50.0]])
    positive = np.array([True, True, False])  # one beside the organ, one within it: right is what is clicked
    after = boxes_only.predict(2, 0, SlicePrompts(clicks, positive, box)).mask((128, 128))
    assert [bool(after[int(r), int(c)]) for r, c in clicks] == positive.tolist()
    assert iou(before, the_organ(128, 128)) > 0.8
    inside = boxes_only.predict(2, 0, SlicePrompts(clicks[:1], positive[:1], box)).mask((128, 128))
    assert iou(inside, before) > 0.9  # shown to the network itself, this click would halve the mask


def test_negative_clicks_alone_are_an_empty_mask(boxes_only: SliceSegmenter) -> None:
    answer = boxes_only.predict(2, 0, SlicePrompts(np.array([[64.0, 54.0]]), np.array([False])))
    assert not answer.mask((128, 128)).any()
    assert answer.score == 0


def test_a_mask_alone_is_taken_as_its_box_and_itself(boxes_only: SliceSegmenter) -> None:
    organ_mask = the_organ(128, 128)
    answer = boxes_only.predict(2, 0, SlicePrompts(mask=np.where(organ_mask, 6.9, -6.9)))
    assert iou(answer.mask((128, 128)), organ_mask) > 0.8
