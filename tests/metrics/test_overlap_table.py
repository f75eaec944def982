"""The table of pairs: against counting by hand, both engines, and what it refuses."""

import importlib.util
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.metrics import overlap_table as module
from medseg.metrics.overlap_table import Engine, OverlapTable, overlap_table

NUMBA = pytest.param(
    "numba",
    marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed"),
)
ENGINES = pytest.mark.parametrize("engine", ["numpy", NUMBA])
SHAPES = st.sampled_from([(7,), (5, 6), (3, 4, 5)])
MAPS = SHAPES.flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.int32, shape, elements=st.sampled_from([0, 0, 1, 2, 5, 900]))] * 2
    )
)


def by_hand(a: np.ndarray, b: np.ndarray) -> dict[tuple[int, int], int]:
    counted: dict[tuple[int, int], int] = {}
    for pair in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        counted[pair] = counted.get(pair, 0) + 1
    return {pair: n for pair, n in counted.items() if 0 not in pair}


def as_dict(table: OverlapTable) -> dict[tuple[int, int], int]:
    return {
        (int(table.references[i]), int(table.predictions[j])): int(n)
        for (i, j), n in zip(table.pairs, table.pair_voxels, strict=True)
    }


def same(one: OverlapTable, other: OverlapTable) -> bool:
    names = ("references", "predictions", "reference_voxels", "prediction_voxels", "pairs", "pair_voxels")
    return (
        all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names) and one.voxels == other.voxels
    )


def touching_boxes(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cells^3 boxes that fill a cube, and the same shifted by a voxel or two, renumbered."""
    steps = np.arange(side) * cells // side
    reference = (1 + steps[:, None, None] * cells**2 + steps[:, None] * cells + steps).astype(np.int32)
    names = 1 + np.random.default_rng(0).permutation(cells**3).astype(np.int32)
    return reference, names[np.roll(reference, (1, 2, 1), axis=(0, 1, 2)) - 1]


@ENGINES
@given(maps=MAPS)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_counted_as_by_hand(engine: Engine, maps: tuple[np.ndarray, np.ndarray]) -> None:
    table = overlap_table(*maps, engine=engine)
    assert as_dict(table) == by_hand(*maps)
    for labels, sizes, side in (
        (table.references, table.reference_voxels, maps[0]),
        (table.predictions, table.prediction_voxels, maps[1]),
    ):
        values, counts = np.unique(side[side > 0], return_counts=True)
        assert np.array_equal(labels, values) and np.array_equal(sizes, counts)
    assert table.voxels == maps[0].size
    assert np.array_equal(table.pairs, table.pairs[np.lexsort(table.pairs.T[::-1])])


@given(maps=MAPS)
@settings(max_examples=30, deadline=None)
def test_swapped_is_the_table_of_the_swapped_maps(maps: tuple[np.ndarray, np.ndarray]) -> None:
    assert same(overlap_table(*maps).swapped(), overlap_table(*maps[::-1]))


@given(maps=MAPS)
@settings(max_examples=30, deadline=None)
def test_a_subset_is_the_table_of_maps_without_the_others(maps: tuple[np.ndarray, np.ndarray]) -> None:
    table = overlap_table(*maps)
    odd = [labels % 2 == 1 for labels in (table.references, table.predictions)]
    assert same(table.subset(*odd), overlap_table(*(np.where(m % 2 == 1, m, 0) for m in maps)))


@ENGINES
def test_runs_across_chunks_and_full_tables_add_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = np.random.default_rng(1).integers(0, 40, (2, 30, 31))
    expected = overlap_table(*maps, engine="numpy")
    monkeypatch.setattr(module, "_CHUNK", 7)
    monkeypatch.setattr(module, "_FIRST_SLOTS", 4)
    monkeypatch.setattr(module, "_MOST_SLOTS", 16)
    monkeypatch.setattr(module, "_MOST_UNMERGED", 50)
    assert same(overlap_table(*maps, engine=engine), expected)


@ENGINES
def test_thousands_of_touching_objects_take_little_time_and_memory(engine: Engine) -> None:
    maps = touching_boxes(128, 17)
    overlap_table(*(m[:2] for m in maps), engine=engine)  # compiles
    tracemalloc.start()
    start = time.process_time()
    table = overlap_table(*maps, engine=engine)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (table.n_ref, table.n_pred) == (4913, 4913)
    assert table.pair_voxels.sum() == 128**3
    assert seconds < 2.0
    assert peak < 4 * maps[0].nbytes


@ENGINES
@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, np.float32, np.float64]
)
def test_any_type_that_holds_whole_numbers_gives_the_same_table(engine: Engine, dtype: type) -> None:
    maps = np.random.default_rng(2).integers(0, 9, (2, 8, 9, 10))
    assert same(overlap_table(*maps.astype(dtype), engine=engine), overlap_table(*maps, engine="numpy"))


@ENGINES
def test_memory_order_and_steps_do_not_matter(engine: Engine) -> None:
    maps = np.random.default_rng(3).integers(0, 5, (2, 8, 9, 10)).astype(np.int32)
    expected = overlap_table(*maps, engine="numpy")
    fortran = [np.asfortranarray(m) for m in maps]
    for pair in (fortran, (fortran[0], maps[1]), [np.repeat(m, 2, axis=1)[:, ::2] for m in maps]):
        assert same(overlap_table(*pair, engine=engine), expected)


@ENGINES
def test_labels_beyond_32_bits_keep_their_names(engine: Engine) -> None:
    a = np.array([0, 2**40, 2**40, 3])
    b = np.array([2**35, 2**35, 5, 2**33])
    table = overlap_table(a, b, engine=engine)
    assert as_dict(table) == {(2**40, 2**35): 1, (2**40, 5): 1, (3, 2**33): 1}
    assert table.references.tolist() == [3, 2**40]
    assert overlap_table(b, a, engine=engine).references.tolist() == [5, 2**33, 2**35]


@ENGINES
def test_empty_maps_and_masks_are_tables_too(engine: Engine) -> None:
    nothing = overlap_table(np.zeros((0, 4), int), np.zeros((0, 4), int), engine=engine)
    assert (nothing.n_ref, nothing.n_pred, nothing.voxels) == (0, 0, 0)
    one_sided = overlap_table(np.zeros((3, 4), int), np.ones((3, 4), bool), engine=engine)
    assert (one_sided.n_ref, one_sided.n_pred, one_sided.pairs.shape) == (0, 1, (0, 2))


def test_iou_and_dice_are_those_of_the_pairs() -> None:
    table = overlap_table(np.array([1, 1, 1, 2]), np.array([1, 1, 3, 3]))
    assert table.iou.tolist() == pytest.approx([2 / 3, 1 / 4, 1 / 2])
    assert table.dice.tolist() == pytest.approx([4 / 5, 2 / 5, 2 / 3])


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (np.zeros((2, 3), int), GeometryError, "expected one shape"),
        (np.array([0.5, 1.0]), LabelError, "not whole numbers"),
        (np.array([np.nan, 1.0]), LabelError, "not whole numbers"),
        (np.array([np.inf, 1.0]), LabelError, "not whole numbers"),
        (np.array([-1, 1]), LabelError, "negative labels"),
        (np.array([-2.0, 1.0]), LabelError, "negative labels"),
        (np.array([1j, 1]), LabelError, "complex128"),
        (np.array(["a", "b"]), LabelError, "whole numbers"),
        (np.array([2**63, 1], np.uint64), LabelError, "Renumber"),
    ],
)
def test_what_is_no_label_map_is_refused_on_either_side(wrong: np.ndarray, error: type, words: str) -> None:
    good = np.array([0, 1])
    for pair in ((wrong, good), (good, wrong)):
        with pytest.raises(error, match=words):
            overlap_table(*pair)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="Choose from"):
        overlap_table(np.ones(1, int), np.ones(1, int), engine="fast")  # type: ignore[arg-type]


def test_numba_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        overlap_table(np.ones(1, int), np.ones(1, int), engine="numba")
    assert overlap_table(np.ones(1, int), np.ones(1, int)).pair_voxels.tolist() == [1]
