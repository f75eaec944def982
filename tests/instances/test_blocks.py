"""Block by block is the same as at once: number by number, in two and three dimensions, for any blocks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import ConfigError
from medseg.instances.basins import find_basins
from medseg.instances.blocks import (
    basins_in_blocks,
    block_distance,
    components_in_blocks,
    distance_in_blocks,
    relabel_in_blocks,
    split_in_blocks,
    to_global,
    to_local,
)
from medseg.instances.components import label_components
from medseg.instances.distance import distance_map
from medseg.instances.grid import Grid
from medseg.instances.neighbours import offsets
from medseg.instances.split import BasinsConfig, split
from medseg.types import Array, FloatArray
from tests.instances.volumes import discs, integer_heights


@st.composite
def cut_heights(draw: st.DrawFn) -> tuple[FloatArray, Grid]:
    height = draw(integer_heights())
    block = [draw(st.integers(1, n + 1)) for n in height.shape]
    offset = [draw(st.integers(0, size)) for size in block]
    return height, Grid.of(height.shape, block, offset)


def random_grids(shape: tuple[int, ...], count: int = 5) -> list[Grid]:
    rng = np.random.default_rng(len(shape))
    sizes = [tuple(int(n) for n in rng.integers(4, 1 + np.array(shape) // 2)) for _ in range(count)]
    return [Grid.of(shape, size, tuple(int(n) for n in rng.integers(0, size))) for size in sizes]


def cells(ndim: int) -> tuple[Array, tuple[float, ...]]:
    """Return about twenty touching balls, and an anisotropic spacing."""
    rng = np.random.default_rng(ndim)
    shape, spacing = ((60, 70), (1.0, 0.5)) if ndim == 2 else ((18, 40, 42), (2.0, 1.0, 0.9))
    extent = np.array(shape) * spacing
    centres = [tuple(rng.uniform(0, extent)) for _ in range(20)]
    return discs(shape, centres, 5.0, spacing), spacing


@settings(max_examples=60, deadline=None)
@given(cut_heights(), st.booleans(), st.integers(0, 4), st.sampled_from((None, 0.0, 2.0)))
def test_basins_in_blocks_are_those_of_the_whole(
    cut: tuple[FloatArray, Grid], faces: bool, h: int, floor: float | None
) -> None:
    height, grid = cut
    connectivity = {2: (8, 4), 3: (26, 6)}[height.ndim][faces]
    numbers: Array = np.zeros(height.shape, dtype=np.int32)
    found = basins_in_blocks(height, numbers, grid, floor, connectivity)
    whole = find_basins(height, floor, connectivity)
    for name in ("roots", "peaks", "pairs", "saddles"):
        assert np.array_equal(getattr(found.hierarchy, name), getattr(whole.hierarchy, name)), name
    labels = np.full(height.shape, -1)
    relabel_in_blocks(numbers, labels, found.pieces, found.table(h))
    assert np.array_equal(labels, whole.labels(h))


@settings(max_examples=60, deadline=None)
@given(cut_heights(), st.integers(0, 2), st.integers(1, 4))
def test_components_in_blocks_are_those_of_the_whole(
    cut: tuple[FloatArray, Grid], kind: int, values: int
) -> None:
    height, grid = cut
    connectivity = {2: (8, 4, 18), 3: (26, 6, 18)}[height.ndim][kind]
    label_map = (height % (values + 1)).astype(np.uint8)
    numbers: Array = np.zeros(height.shape, dtype=np.int32)
    pieces, table = components_in_blocks(label_map, numbers, grid, connectivity)
    relabel_in_blocks(numbers, numbers, pieces, table)
    assert np.array_equal(numbers, label_components(label_map, connectivity))
    assert pieces.voxels.sum() == (label_map > 0).sum()


@settings(max_examples=40, deadline=None)
@given(cut_heights(), st.sampled_from((1.0, 2.0, 3.7)), st.lists(st.floats(0.2, 3), min_size=3, max_size=3))
def test_distances_in_blocks_are_those_of_the_whole(
    cut: tuple[FloatArray, Grid], factor: float, sizes: list[float]
) -> None:
    height, grid = cut
    mask, spacing = height > 1, sizes[: height.ndim]
    cap = factor * max(spacing)
    distances = np.zeros(mask.shape, dtype=np.float32)
    capped = distance_in_blocks(mask, distances, spacing, cap, grid)
    whole = distance_map(mask, spacing, cap)
    assert np.array_equal(distances, whole)
    assert capped == (whole >= np.float32(cap)).sum()


@pytest.mark.parametrize("ndim", [2, 3])
def test_objects_in_blocks_are_those_of_the_whole(ndim: int) -> None:
    mask, spacing = cells(ndim)
    least = {2: 70.0, 3: 400.0}[ndim]
    whole = split(mask, spacing, min_volume=least)
    assert whole.count > 5 and whole.dropped
    for grid in random_grids(mask.shape):
        distances, labels = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int32)
        found = split_in_blocks(mask, distances, labels, spacing, 12.0, grid, min_volume=least)
        assert np.array_equal(labels, whole.labels)
        assert (found.count, found.dropped, found.capped) == (whole.count, whole.dropped, 0)


def test_blocks_of_a_zarr_array_are_read_and_written_by_threads(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", minversion="3.0")
    mask, spacing = cells(3)

    def stored(name: str, dtype: Any) -> Any:
        return zarr.create_array(tmp_path / name, shape=mask.shape, chunks=(8, 16, 16), dtype=dtype)

    source, distances, labels = stored("m", bool), stored("d", np.float32), stored("l", np.int32)
    source[:] = mask
    grid = Grid.of(mask.shape, (8, 16, 16))
    with ThreadPoolExecutor(2) as pool:
        found = split_in_blocks(source, distances, labels, spacing, 12.0, grid, mapper=pool.map)
    assert np.array_equal(labels[:], split(mask, spacing).labels)
    assert found.count == labels[:].max()


class Counting:
    """An array that remembers the largest box that was read or written."""

    def __init__(self, array: Array) -> None:
        self.array, self.largest = array, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, box: Any) -> Array:
        part: Array = self.array[box]
        self.largest = max(self.largest, part.size)
        return part

    def __setitem__(self, box: Any, values: Array) -> None:
        self.largest = max(self.largest, values.size)
        self.array[box] = values


def test_no_step_touches_more_than_a_block_with_its_halo() -> None:
    mask, spacing = cells(3)
    arrays = [Counting(a) for a in (mask, np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int32))]
    cap = 4.0
    source, distances, labels = arrays
    split_in_blocks(source, distances, labels, spacing, cap, Grid.of(mask.shape, (6, 10, 10)))
    assert arrays[0].largest <= (6 + 2 * 2) * (10 + 2 * 4) * (10 + 2 * 5)
    assert max(array.largest for array in arrays[1:]) <= 8 * 12 * 12


def test_depth_can_be_chosen_again_without_reading_the_heights() -> None:
    mask, spacing = cells(2)
    height = distance_map(mask, spacing)
    numbers, labels = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, np.int32)
    found = basins_in_blocks(height, numbers, Grid.of(mask.shape, (16, 16)))
    for h in (0.0, 0.4, 2.0):
        relabel_in_blocks(numbers, labels, found.pieces, found.table(h))
        assert np.array_equal(labels, split(mask, spacing, config=BasinsConfig(h=h)).labels)


def test_a_cap_that_is_too_low_is_counted() -> None:
    mask, spacing = cells(2)
    distances, labels = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int32)
    found = split_in_blocks(mask, distances, labels, spacing, 2.0, Grid.of(mask.shape, (16, 16)))
    assert found.capped == (distance_map(mask, spacing) >= 2).sum() > 0


def test_indices_beyond_32_bits_are_exact() -> None:
    shape, box = (3000, 2000, 1000), (slice(2990, 3000), slice(1990, 2000), slice(990, 1000))
    last = np.array([999])
    assert to_global(last, box, shape).tolist() == [3000 * 2000 * 1000 - 1]
    assert to_local(to_global(last, box, shape), box, shape).tolist() == [999]
    assert offsets((2, 70_000, 70_000)).max() > 2**32


def test_a_halo_below_the_cap_is_impossible() -> None:
    with pytest.raises(AssertionError):
        block_distance(np.ones((8, 8)), (slice(2, 6), slice(2, 6)), (1.0, 1.0), 3.0, (2, 2))


def test_wrong_blocks_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="expected 3 positive sizes"):
        Grid.of((4, 4, 4), (2, 2))
    with pytest.raises(ConfigError, match="make the output as the input"):
        distance_in_blocks(np.ones((4, 4)), np.ones((4, 5)), (1.0, 1.0), 2.0, Grid.of((4, 4), (2, 2)))
    with pytest.raises(ConfigError, match="at least the longest side"):
        distance_in_blocks(np.ones((4, 4)), np.ones((4, 4)), (1.0, 3.0), 2.0, Grid.of((4, 4), (2, 2)))
