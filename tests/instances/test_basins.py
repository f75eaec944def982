"""The basin merge: equal to reconstruction, equal without numba, and the same whoever asks."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import ConfigError, DataError
from medseg.instances import basins_compiled, basins_numpy
from medseg.instances.basins import find_basins, from_levels, to_levels
from medseg.instances.compiled import COMPILED
from medseg.types import Array, FloatArray
from tests.instances.volumes import integer_heights, maxima_by_reconstruction

CONNECTIVITIES = {2: (8, 4), 3: (26, 6)}


@settings(max_examples=60, deadline=None)
@given(integer_heights(), st.integers(0, 5), st.booleans())
def test_objects_are_the_maxima_that_a_reconstruction_finds(height: FloatArray, h: int, faces: bool) -> None:
    connectivity = CONNECTIVITIES[height.ndim][faces]
    labels = find_basins(height, connectivity=connectivity).labels(h)
    maxima = maxima_by_reconstruction(height, h, connectivity)
    assert labels.max() == maxima.max()
    assert ((labels > 0) == (height > 0)).all()
    for object_ in range(1, labels.max() + 1):  # each holds one of them
        assert len(np.unique(maxima[(labels == object_) & (maxima > 0)])) == 1


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: there is nothing to compare")
@settings(max_examples=60, deadline=None)
@given(
    integer_heights(), st.sampled_from((6, 26)), st.sampled_from((None, -1.5, 0.0, 2.0)), st.integers(1, 3)
)
def test_numpy_gives_what_the_compiled_sweeps_give(
    height: FloatArray, connectivity: int, floor: float | None, threads: int
) -> None:
    volume = height[None] if height.ndim == 2 else height
    levels, lowest = to_levels(volume - 3 if floor and floor < 0 else volume, floor)
    codes = basins_compiled.ascend(levels, lowest, connectivity, threads)
    assert np.array_equal(codes, basins_numpy.ascend(levels, lowest, connectivity))
    numbers, roots = basins_compiled.resolve(codes, threads)
    for ours, theirs in zip((numbers, roots), basins_numpy.resolve(codes), strict=True):
        assert np.array_equal(ours, theirs)
    found = basins_compiled.find_saddles(levels, numbers, connectivity, threads)
    for ours, theirs in zip(found, basins_numpy.find_saddles(levels, numbers, connectivity), strict=True):
        assert np.array_equal(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(integer_heights(), st.floats(0, 4), st.floats(0, 0.9))
def test_a_deeper_valley_is_never_asked_for_by_more_objects(height: FloatArray, h: float, rel: float) -> None:
    basins = find_basins(height)
    counts = [basins.labels(depth, rel).max() for depth in (0, h, h + 1)]
    assert counts == sorted(counts, reverse=True)
    assert basins.labels(h, rel).max() <= basins.labels(h, 0).max()


@settings(max_examples=30, deadline=None)
@given(integer_heights(ndim=3), st.integers(0, 3))
def test_objects_do_not_depend_on_threads_nor_on_memory_order(height: FloatArray, h: int) -> None:
    labels = find_basins(height, threads=1).labels(h)
    assert np.array_equal(labels, find_basins(height, threads=3).labels(h, threads=2))
    assert np.array_equal(labels, find_basins(np.asfortranarray(height)).labels(h))


def test_a_plateau_is_one_object_however_many_summits_it_has() -> None:
    height = np.zeros((5, 9), dtype=np.float32)
    height[1:4, 1:8] = 2
    basins = find_basins(height)
    assert basins.labels().max() == 1
    # Two steps to a plateau of the same height around a pit: a ring.
    ring = height.copy()
    ring[2, 3:6] = 1
    assert find_basins(ring, connectivity=4).labels().max() == 1


def test_two_tops_that_touch_over_a_corner_are_one_with_eight_neighbours_and_two_with_four() -> None:
    height = np.array([[3, 0], [0, 3]], dtype=np.float32)
    assert find_basins(height, connectivity=8).labels().max() == 1
    assert find_basins(height, connectivity=4).labels().max() == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float64, bool])
def test_any_type_of_number_is_a_height(dtype: type) -> None:
    height: Array = np.array([[0, 1, 1, 0, 1]]).astype(dtype)
    assert find_basins(height).labels().tolist() == [[0, 1, 1, 0, 2]]


def test_negative_heights_have_a_floor_below_them() -> None:
    height = np.array([[-9.0, -2.0, -5.0, -3.0, -1000.0]])
    assert find_basins(height, floor=-500.0).labels(2.0).tolist() == [[1, 1, 1, 2, 0]]
    assert find_basins(height, floor=None).labels(2.0).tolist() == [[1, 1, 1, 2, 2]]
    assert find_basins(height, floor=-500.0).labels(2.5).tolist() == [[1, 1, 1, 1, 0]]


def test_levels_order_as_heights_do_and_turn_back() -> None:
    height = np.array([-np.float32(1e30), -2.5, -1e-30, -0.0, 0.0, 1e-40, 3.0], dtype=np.float32)
    levels, lowest = to_levels(height, -1e31)
    assert (np.diff(levels.astype(np.int64)) > 0).all()
    assert lowest < levels[0]
    assert np.array_equal(from_levels(levels), height)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_height_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        find_basins(np.array([[1.0, bad]]))


@pytest.mark.parametrize(("h", "rel"), [(-1.0, 0.0), (0.0, 1.0), (0.0, -0.1), (np.nan, 0.0)])
def test_a_depth_out_of_range_is_refused(h: float, rel: float) -> None:
    with pytest.raises(ConfigError, match="expected h"):
        find_basins(np.ones((2, 2))).labels(h, rel)


def test_rel_of_negative_heights_is_refused() -> None:
    with pytest.raises(ConfigError, match="rel needs"):
        find_basins(np.array([[-1.0, -2.0]]), floor=None).labels(0.0, 0.5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 2), (4, 4), (1, 1, 1)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    labels = find_basins(np.zeros(shape, dtype=np.float32)).labels(1.0)
    assert labels.shape == shape and not labels.any()


def test_thousands_of_basins_outgrow_the_first_table_of_pairs() -> None:
    height = np.zeros((3, 101, 101), dtype=np.float32)
    height[:] = 1
    height[:, ::2, ::2] = 2
    basins = find_basins(height)
    assert len(basins.hierarchy.roots) >= 51 * 51
    assert len(basins.hierarchy.pairs) > 4096
    assert basins.labels(1.0).max() == 51 * 51
    assert basins.labels(1.5).max() == 1


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # an import of it fails
import numpy as np
from medseg.instances.compiled import COMPILED
from medseg.instances.split import SPLITTERS, split
mask = np.random.default_rng(3).random((6, 14, 15)) < 0.8
for method in SPLITTERS:
    found = split(mask, (2.0, 1.0, 1.0), method)
    print(COMPILED, found.count, hash(found.labels.tobytes()))
"""


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: there is nothing to compare")
def test_every_method_gives_the_same_without_numba() -> None:
    with_numba = WITHOUT_NUMBA.replace('sys.modules["numba"] = None', "")
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        ).stdout
        for code in (with_numba, WITHOUT_NUMBA)
    ]
    assert texts[1].count("False") == texts[0].count("True") == 3
    assert texts[0].replace("True", "") == texts[1].replace("False", "")
