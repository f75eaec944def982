"""Targets of the centre-offset network, and objects from votes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree

from medseg.errors import ConfigError, LabelError
from medseg.instances import centres as module
from medseg.instances.centre_targets import (
    CentreTargets,
    find_mass_centres,
    make_targets,
    normal_distance,
    number_objects,
)
from medseg.instances.centres import count_votes, find_centres, find_peaks, group_votes


def cells(shape: tuple[int, ...], count: int, spacing: tuple[float, ...], seed: int = 0) -> np.ndarray:
    """Touching cells: every voxel of a random foreground goes to the nearest of `count` random seeds."""
    rng = np.random.default_rng(seed)
    size = np.asarray(spacing)
    seeds = rng.uniform(0, 1, (count, len(shape))) * shape * size
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij"), -1) * size
    distance, nearest = cKDTree(seeds).query(grid)
    radius = 0.6 * (np.prod(np.asarray(shape) * size) / count) ** (1 / len(shape))
    return np.where(distance < radius, nearest + 1, 0).astype(np.int32)


def centres_of(labels: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    index, count = number_objects(labels)
    return find_mass_centres(index, count, spacing) if count else np.zeros((0, labels.ndim))


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label maps are equal up to the numbers."""
    if ((a > 0) != (b > 0)).any():
        return False
    pairs = np.unique(np.stack([a[a > 0], b[a > 0]]), axis=1)
    return bool(len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1])


CASES = [
    ((64, 72), (1.0, 1.0)),
    ((64, 72), (0.3, 0.7)),
    ((20, 32, 40), (1.0, 1.0, 1.0)),
    ((12, 40, 40), (0.28, 0.127, 0.127)),
]


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_perfect_targets_give_back_the_label_map(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    labels = cells(shape, 25, spacing)
    targets = make_targets(labels, spacing)
    found = group_votes(labels > 0, targets.offset, centres_of(labels, spacing), spacing, max(spacing))
    assert same_partition(found.labels, labels) and found.unassigned == 0
    assert found.labels.dtype == np.int32


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_perfect_votes_show_their_centres_without_a_map_of_them(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    labels = cells(shape, 12, spacing, seed=5)
    targets = make_targets(labels, spacing)
    found = find_centres(labels > 0, targets.offset, spacing, sigma=min(spacing))
    assert len(found) == len(np.unique(labels)) - 1
    assert same_partition(group_votes(labels > 0, targets.offset, found, spacing).labels, labels)


@pytest.mark.parametrize("shape", [(9,) * 2, (9,) * 3])
def test_one_object_and_no_object(shape: tuple[int, ...]) -> None:
    spacing = (1.0,) * len(shape)
    for labels in (np.zeros(shape, np.int32), np.ones(shape, np.int32), np.zeros((0, *shape[1:]), np.uint8)):
        targets = make_targets(labels, spacing)
        found = (
            find_centres(labels > 0, targets.offset, spacing, sigma=1.0) if labels.size else np.zeros((0, 2))
        )
        grouped = group_votes(labels > 0, targets.offset, found, spacing)
        assert (grouped.labels == labels).all()
        assert np.isfinite(targets.distance).all() and (targets.distance == labels).all()


def test_touching_squares_of_one_voxel_are_told_apart() -> None:
    labels = np.arange(1, 26, dtype=np.int32).reshape(5, 5)
    spacing = (1.0, 2.0)
    targets = make_targets(labels, spacing)
    assert (targets.offset == 0).all() and (targets.distance == 1).all()
    found = group_votes(labels > 0, targets.offset, centres_of(labels, spacing), spacing)
    assert (found.labels == labels).all()


def test_the_centre_of_a_ring_is_a_voxel_of_the_ring_and_the_disc_inside_keeps_its_own() -> None:
    i, j = np.indices((31, 31)) - 15
    radius = np.hypot(i, j)
    labels = np.where(radius < 5, 2, np.where((radius > 8) & (radius < 12), 7, 0)).astype(np.uint16)
    found = centres_of(labels, (1.0, 1.0))
    assert found[0] == pytest.approx([15.5, 15.5])
    assert labels[tuple(np.floor(found[1]).astype(int))] == 7
    targets = make_targets(labels, (1.0, 1.0))
    grouped = group_votes(labels > 0, targets.offset, found, (1.0, 1.0))
    assert same_partition(grouped.labels, labels)


def test_gaps_and_huge_labels_do_not_matter() -> None:
    labels = cells((30, 30), 6, (1.0, 1.0))
    odd = np.where(labels > 0, labels.astype(np.int64) * 1_000_000_007, 0)
    a, b = make_targets(labels, (1.0, 1.0)), make_targets(odd, (1.0, 1.0))
    assert (a.offset == b.offset).all() and (a.distance == b.distance).all()


def test_distances_are_physical_and_borders_of_the_image_are_no_borders() -> None:
    labels = cells((14, 40, 40), 20, (0.5, 0.2, 0.2), seed=2)
    spacing = (0.5, 0.2, 0.2)
    index, count = number_objects(labels)
    found = normal_distance(index, count, spacing)
    for number in range(1, count + 1):
        padded = np.pad(index == number, 30, mode="edge") if count == 1 else index == number
        depth = ndimage.distance_transform_edt(padded, sampling=spacing)
        inside = index == number
        assert found[inside] == pytest.approx(depth[inside] / depth[inside].max(), abs=1e-5)
        assert found[inside].max() == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.booleans())
def test_grouping_equals_the_nearest_centre_of_every_single_vote(seed: int, n: int, limited: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, n))
    spacing = tuple(rng.choice([0.25, 0.5, 1.0, 2.0], n))
    foreground = rng.random(shape) < 0.6
    # quarter steps around half voxels, so that rounding to half a voxel changes nothing
    offset = rng.integers(-12, 13, (n, *shape)) * 0.5 * np.asarray(spacing).reshape(-1, *[1] * n)
    centres = rng.uniform(0, 1, (rng.integers(1, 9), n)) * shape * np.asarray(spacing)
    reach = 1.5 if limited else None
    grouped = group_votes(foreground, offset, centres, spacing, reach=reach, unassigned="drop")
    grid = np.moveaxis(np.indices(shape), 0, -1) + 0.5
    votes = grid * np.asarray(spacing) + np.moveaxis(offset, 0, -1)
    distance, nearest = cKDTree(centres).query(votes[foreground])
    expected = np.where(distance <= (reach or np.inf), nearest + 1, 0)
    assert (grouped.labels[foreground] == expected).all() and not grouped.labels[~foreground].any()
    assert grouped.unassigned == np.count_nonzero(expected == 0)
    assert sum(each.voxels for each in grouped.dropped) == grouped.unassigned


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_blocks_give_what_the_whole_gives(
    shape: tuple[int, ...], spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = cells(shape, 25, spacing, seed=3)
    rng = np.random.default_rng(0)
    offset = make_targets(labels, spacing).offset + rng.normal(0, 0.5, (len(shape), *shape))
    middles = centres_of(labels, spacing)
    whole = group_votes(labels > 0, offset, middles, spacing).labels
    votes = count_votes(labels > 0, offset, spacing)
    monkeypatch.setattr(module, "CHUNK", 700)
    assert (group_votes(labels > 0, offset, middles, spacing).labels == whole).all()
    assert (count_votes(labels > 0, offset, spacing) == votes).all()
    for size in (5, 9, 16):
        result = np.zeros_like(whole)
        for corner in np.ndindex(*[-(-n // size) for n in shape]):
            low = tuple(size * c for c in corner)
            block = tuple(slice(a, a + size) for a in low)
            part = group_votes(labels[block] > 0, offset[(slice(None), *block)], middles, spacing, origin=low)
            result[block] = part.labels
        assert (result == whole).all()


def test_votes_to_nowhere_are_counted_then_dropped_or_grown() -> None:
    labels = np.zeros((8, 12), np.int32)
    labels[1:6, 1:5], labels[1:6, 6:11] = 1, 2
    offset = make_targets(labels, (1.0, 1.0)).offset
    offset[:, 1, 1], offset[:, 5, 10], offset[0, 2, 7] = 1e30, -500.0, np.nan
    middles = centres_of(labels, (1.0, 1.0))
    dropped = group_votes(labels > 0, offset, middles, (1.0, 1.0), reach=2.0, unassigned="drop")
    assert dropped.unassigned == 3 and [(d.count, d.voxels) for d in dropped.dropped] == [(0, 3)]
    assert np.count_nonzero(dropped.labels) == np.count_nonzero(labels) - 3
    grown = group_votes(labels > 0, offset, middles, (1.0, 1.0), reach=2.0, unassigned="grow")
    assert (grown.labels == labels).all() and grown.unassigned == 3 and not grown.dropped
    nothing = group_votes(labels > 0, offset, np.zeros((0, 2)), (1.0, 1.0))
    assert not nothing.labels.any() and nothing.unassigned == np.count_nonzero(labels)
    # without a limit only what is no number has no centre
    assert group_votes(labels > 0, offset, middles, (1.0, 1.0), unassigned="drop").unassigned == 1


def test_of_equally_near_centres_the_first_is_taken() -> None:
    foreground = np.ones((1, 1), bool)
    middles = np.array([[5.5, 5.5], [0.5, -1.5], [-1.5, 0.5], [2.5, 0.5], [0.5, 2.5]])
    grouped = group_votes(foreground, np.zeros((2, 1, 1)), middles, (1.0, 1.0))
    assert grouped.labels[0, 0] == 2


def test_a_plateau_is_one_peak_and_its_first_voxel() -> None:
    height = np.zeros((7, 9))
    height[2:4, 2:7] = 3.0
    height[6, 0] = 1.0
    assert find_peaks(height, (1.0, 1.0), 1.0).tolist() == [[2, 2], [6, 0]]
    assert find_peaks(height, (1.0, 1.0), 1.0, threshold=2.0).tolist() == [[2, 2]]
    assert find_peaks(np.zeros((4, 4)), (1.0, 1.0), 1.0).shape == (0, 2)


def test_the_window_of_peaks_is_physical() -> None:
    height = np.zeros((9, 9))
    height[4, 2], height[4, 5], height[1, 5] = 1.0, 2.0, 1.5
    assert len(find_peaks(height, (1.0, 1.0), 3.0)) == 1
    assert find_peaks(height, (2.0, 1.0), 3.0).tolist() == [[1, 5], [4, 5]]


def test_few_votes_make_no_centre() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[2:10, 2:10], labels[15, 15] = 1, 2
    offset = make_targets(labels, (1.0, 1.0)).offset
    assert len(find_centres(labels > 0, offset, (1.0, 1.0), 1.0)) == 2
    assert len(find_centres(labels > 0, offset, (1.0, 1.0), 1.0, least_votes=3.0)) == 1


def test_what_does_not_fit_is_one_sentence() -> None:
    labels = np.zeros((4, 4), np.int32)
    with pytest.raises(ConfigError, match="one an axis"):
        make_targets(labels, (1.0,))
    with pytest.raises(LabelError, match="whole numbers"):
        make_targets(labels.astype(float), (1.0, 1.0))
    with pytest.raises(LabelError, match="holds -1"):
        make_targets(labels - 1, (1.0, 1.0))
    with pytest.raises(ConfigError, match="do not fit"):
        group_votes(labels > 0, np.zeros((3, 4, 4)), np.zeros((1, 2)), (1.0, 1.0))


def test_time_does_not_grow_with_the_number_of_objects() -> None:
    """The grouping asks a tree for places, not all centres for all voxels: 10,000 of them fit in memory."""
    labels = np.kron(np.arange(1, 10_001).reshape(100, 100), np.ones((6, 6), int)).astype(np.int32)
    targets: CentreTargets = make_targets(labels, (1.0, 1.0))
    found = find_centres(labels > 0, targets.offset, (1.0, 1.0), 1.0)
    assert len(found) == 10_000
    assert same_partition(group_votes(labels > 0, targets.offset, found, (1.0, 1.0)).labels, labels)
