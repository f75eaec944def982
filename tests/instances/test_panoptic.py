"""Things and stuff merged by both rules: by score, and by the vote of an object's voxels."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.instances.dropped import Dropped
from medseg.instances.panoptic import (
    EMPTY,
    HIDDEN,
    NO_CLASS,
    NO_OBJECT,
    Merged,
    ObjectMask,
    merge_dense,
    merge_masks,
    panoptic_of,
    split_things,
)
from medseg.labels import PanopticLabels
from medseg.volume import Volume
from tests.phantoms import GEOMETRIES

CLASSES = PanopticLabels(
    labels={"liver": 1, "spleen": 2, "lesion": 4, "cyst": 7, "ignore": 9}, things=("lesion", "cyst")
)
VALUES = [0, 1, 2, 4, 7, 9]


def by_hand(semantic: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and objects (by their old numbers), voxel by voxel and object by object."""
    result, kept = semantic.copy(), np.zeros_like(objects)
    result[np.isin(semantic, (4, 7))] = 0
    for number in np.unique(objects[objects > 0]):
        inside = objects == number
        votes = {value: int((semantic[inside] == value).sum()) for value in (4, 7)}
        if any(votes.values()):
            result[inside] = max(votes, key=lambda value: (votes[value], -value))
            kept[inside] = number
    return result, kept


def disc(low: tuple[int, ...], shape: tuple[int, ...], value: int, score: float) -> ObjectMask:
    return ObjectMask(low, np.ones(shape, bool), value, score)


def rules(merged: Merged) -> dict[str, tuple[int, int]]:
    return {each.rule: (each.count, each.voxels) for each in merged.dropped}


@given(
    maps=st.tuples(
        arrays(np.int16, (3, 4, 5), elements=st.sampled_from(VALUES)),
        arrays(np.int32, (3, 4, 5), elements=st.sampled_from([0, 0, 3, 8, 70000])),
    )
)
@settings(max_examples=60, deadline=None)
def test_the_vote_is_that_of_a_loop_over_objects(maps: tuple[np.ndarray, np.ndarray]) -> None:
    semantic, objects = maps
    merged = merge_dense(semantic, objects, CLASSES)
    known, kept = by_hand(semantic, objects)
    assert (merged.semantic == known).all()
    assert (np.concatenate([[0], merged.sources])[merged.labels] == kept).all()
    assert np.isin(merged.classes, CLASSES.thing_values).all()
    # what is of an object and what is of a thing is the same
    assert ((merged.labels > 0) == np.isin(merged.semantic, CLASSES.thing_values)).all()
    again = merge_dense(merged.semantic, merged.labels, CLASSES)
    assert (again.semantic == merged.semantic).all() and (again.labels == merged.labels).all()
    assert not again.dropped, "a merged map is consistent"
    lost = {rule: voxels for rule, (_, voxels) in rules(merged).items()}
    assert lost.get(NO_OBJECT, 0) == int((np.isin(semantic, (4, 7)) & (known == 0)).sum())
    assert lost.get(NO_CLASS, 0) == int(((objects > 0) & (kept == 0)).sum())


def test_of_equal_votes_the_lowest_class_wins_and_objects_keep_their_order() -> None:
    semantic = np.array([[7, 4, 4, 7, 7, 1]])
    merged = merge_dense(semantic, np.array([[6, 6, 2, 2, 2, 2]]), CLASSES, scores=np.array([0.25, 0.5]))
    assert merged.classes.tolist() == [7, 4] and merged.sources.tolist() == [2, 6]
    assert merged.scores.tolist() == [0.25, 0.5]
    assert merged.semantic.tolist() == [[4, 4, 7, 7, 7, 7]]


def test_small_stuff_dissolves_by_its_physical_size_and_is_listed() -> None:
    semantic = np.array([[1, 1, 1, 2, 2, 9]])
    merged = merge_dense(semantic, np.zeros((1, 6), int), CLASSES, min_stuff=5.0, voxel=2.0)
    assert merged.semantic.tolist() == [[1, 1, 1, 0, 0, 9]], "what is void stays void"
    assert merged.dropped == (Dropped("stuff spleen of less than 2.5 voxels", 0, 2),)
    kept = merge_dense(semantic, np.zeros((1, 6), int), CLASSES, min_stuff=4.0, voxel=2.0)
    assert not kept.dropped


def test_masks_are_drawn_best_first_and_what_is_mostly_hidden_is_dropped() -> None:
    semantic = np.full((4, 10), 1)
    semantic[0, 9] = 4
    masks = [
        disc((0, 4), (4, 4), 7, 0.7),  # half hidden: what is left stays
        disc((0, 2), (4, 4), 4, 0.9),
        disc((0, 3), (4, 4), 4, 0.8),  # three of four columns are hidden
        disc((0, 8), (1, 1), 4, 0.4),
        ObjectMask((0, 0), np.zeros((2, 2), bool), 4, 0.95),
    ]
    merged = merge_masks(masks, semantic, CLASSES)
    assert merged.labels[0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 0, 0]
    assert merged.semantic[0].tolist() == [1, 1, 4, 4, 4, 4, 7, 7, 1, 0]
    assert merged.sources.tolist() == [1, 0] and merged.scores.tolist() == [0.9, 0.7]
    assert rules(merged) == {
        EMPTY: (1, 0),
        HIDDEN: (1, 16),
        "score below 0.5": (1, 1),
        NO_OBJECT: (0, 1),
    }
    assert len(merge_masks(masks, semantic, CLASSES, most_hidden=0.8).sources) == 3


def test_of_equal_scores_the_first_voxel_decides_in_whatever_order_masks_come() -> None:
    semantic = np.zeros((3, 9), int)
    masks = [disc((1, 3), (2, 4), 4, 0.8), disc((0, 5), (2, 4), 7, 0.8), disc((1, 0), (1, 4), 4, 0.8)]
    one = merge_masks(masks, semantic, CLASSES, most_hidden=0.9)
    other = merge_masks(masks[::-1], semantic, CLASSES, most_hidden=0.9)
    assert (one.labels == other.labels).all() and (one.semantic == other.semantic).all()
    assert one.sources.tolist() == [1, 2, 0]


def test_exactly_half_hidden_is_not_mostly_hidden() -> None:
    masks = [disc((0,), (4,), 4, 0.9), disc((2,), (4,), 4, 0.8)]
    assert merge_masks(masks, np.zeros(8, int), CLASSES).labels.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_masks_lose_no_voxel_without_a_word(data: st.DataObject) -> None:
    masks = []
    for _ in range(data.draw(st.integers(0, 5))):
        low = data.draw(st.integers(0, 8))
        size = data.draw(st.integers(1, 12 - low))
        score = data.draw(st.sampled_from([0.3, 0.6, 0.9]))
        masks.append(disc((low,), (size,), data.draw(st.sampled_from([4, 7])), score))
    merged = merge_masks(masks, np.full(12, 2), CLASSES)
    assert len(merged.sources) + sum(each.count for each in merged.dropped) == len(masks)
    union = np.zeros(12, bool)
    for number in merged.sources:
        union[masks[number].window] = True
    assert ((merged.labels > 0) == union).all()
    assert (merged.semantic[merged.labels == 0] == 2).all()
    assert (np.sort(merged.scores)[::-1] == merged.scores).all()


def test_things_are_split_into_objects_of_one_class() -> None:
    semantic = np.array([[4, 4, 7, 7, 0, 4, 1, 7]])
    known, objects, dropped = split_things(semantic, CLASSES, (1.0, 1.0))
    assert objects.tolist() == [[1, 1, 2, 2, 0, 3, 0, 4]] and not dropped
    known, objects, dropped = split_things(semantic, CLASSES, (1.0, 2.0), min_volume=3.0)
    assert objects.tolist() == [[1, 1, 2, 2, 0, 0, 0, 0]] and dropped[0].count == 2
    assert known.tolist() == [[4, 4, 7, 7, 0, 0, 1, 0]]
    merged = merge_dense(known, objects, CLASSES, dropped=dropped)
    assert merged.dropped == dropped, "a voxel is listed once"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objects": np.zeros((2, 3), int)}, GeometryError, "expected one shape"),
        ({"semantic": np.array([[1, 5]])}, LabelError, "holds 5, which is no class .*1 liver"),
        ({"semantic": np.array([[1, 70000]])}, LabelError, "holds 70000"),
        ({"semantic": np.array([[1, -1]])}, LabelError, "holds -1"),
        ({"semantic": np.array([[0.5, 1.0]])}, LabelError, "not whole numbers"),
        ({"objects": np.array([[0.5, 1.0]])}, LabelError, "not whole numbers"),
        ({"objects": np.array([[-1, 1]])}, LabelError, "expected 0 for background"),
        ({"scores": np.array([1.0, 2.0])}, LabelError, "2 scores for 1 objects"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"semantic": np.array([[1, 4]]), "objects": np.array([[0, 1]]), "classes": CLASSES, **change}
    with pytest.raises(error, match=message):
        merge_dense(**given)


def test_masks_of_stuff_or_outside_of_the_image_are_refused() -> None:
    with pytest.raises(ConfigError, match="no thing"):
        merge_masks([disc((0,), (2,), 1, 0.9)], np.zeros(4, int), CLASSES)
    with pytest.raises(ConfigError, match="reaches out"):
        merge_masks([disc((3,), (2,), 4, 0.9)], np.zeros(4, int), CLASSES)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_panoptic_map_keeps_its_grid_and_packs_what_it_holds(name: str) -> None:
    geometry = GEOMETRIES[name]
    rng = np.random.default_rng(0)
    grid = Volume(np.zeros(geometry.shape, np.uint8), geometry)
    semantic, objects = rng.choice(VALUES, geometry.shape), rng.integers(0, 5, geometry.shape)
    panoptic = panoptic_of(merge_dense(semantic, objects, CLASSES), grid, CLASSES, {"from": "noise"})
    packed = panoptic.packed()
    assert packed.geometry == geometry and packed.array.dtype == np.int32
    classes, numbers = panoptic.classes.unpack(packed.array[0])
    assert (classes == panoptic.semantic.array[0]).all()
    assert (numbers == panoptic.instances.volume.array[0]).all()
    assert panoptic.instances.provenance == {"from": "noise"}
    counted = {n: int((semantic[numbers == 0] == v).sum()) for v, n in ((1, "liver"), (2, "spleen"))}
    assert panoptic.stuff_voxels() == {name: count for name, count in counted.items() if count}


def test_an_empty_image_has_neither_things_nor_stuff() -> None:
    nothing = np.zeros((4, 3), np.uint8)
    for merged in (merge_dense(nothing, nothing, CLASSES), merge_masks([], nothing, CLASSES)):
        assert not merged.semantic.any() and not merged.labels.any() and not len(merged.classes)
        assert not merged.dropped


def test_thousands_of_objects_get_a_divisor_that_holds_them() -> None:
    objects = np.arange(40 * 50).reshape(40, 50)
    merged = merge_dense(np.full((40, 50), 4), objects, CLASSES)
    grid = Volume(np.zeros((40, 50, 1), np.uint8), GEOMETRIES["one slice"].__class__((40, 50, 1), np.eye(4)))
    panoptic = panoptic_of(merged, grid, CLASSES)
    assert panoptic.classes.divisor == 10000
    assert panoptic.packed().array.max() == 4 * 10000 + 1999
