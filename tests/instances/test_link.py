"""Which objects are the same: against brute force, on equal and on different grids."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from medseg.errors import GeometryError
from medseg.instances.link import LinkConfig, Links, assign, group_events, link_objects, shared_voxels
from tests.instances.patients import Ball, centred, lesions, rigid
from tests.instances.shapes import objects, scattered

GRID = centred((40, 36, 24), (2.0, 2.0, 3.0))
BALLS = [Ball(1, (-20, 0, 0), 7), Ball(2, (12, -14, 10), 5), Ball(3, (10, 16, -12), 3)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(9, 8, 7), (12, 11)]))
def test_shares_on_one_grid_are_those_of_counting(seed: int, shape: tuple[int, ...]) -> None:
    first, second = objects(scattered(shape, 5, seed)), objects(scattered(shape, 6, seed + 1))
    found = shared_voxels(first, second)
    expected = {}
    for a in range(1, len(first) + 1):
        for b in range(1, len(second) + 1):
            both = int(((first.labels == a) & (second.labels == b)).sum())
            if both:
                expected[a, b] = both / min(first.voxels[a - 1], second.voxels[b - 1])
    assert [tuple(pair) for pair in found.pairs.tolist()] == sorted(expected)
    np.testing.assert_allclose(found.share, [expected[pair] for pair in sorted(expected)])


def test_objects_are_found_again_on_a_turned_grid_of_other_voxels() -> None:
    transform = rigid((8, -5, 12), (6, -4, 9))
    fine = centred((90, 80, 60), (1.0, 1.1, 1.5))
    links = link_objects(lesions(GRID, BALLS), lesions(fine, BALLS, transform), transform)
    assert links.pairs.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert links.share.min() > 0.9
    assert links.distance.max() < 0.6


def test_what_shares_nothing_is_paired_by_distance_and_not_beyond_the_limit() -> None:
    moved = [Ball(b.label, (b.centre[0] + 8, b.centre[1], b.centre[2]), b.radius) for b in BALLS]
    first, second = lesions(GRID, BALLS), lesions(GRID, moved)
    near = link_objects(first, second, config=LinkConfig(max_distance=10))
    assert [1, 1] in near.pairs.tolist()
    assert near.pairs.tolist() == [[1, 1], [2, 2], [3, 3]]
    far = link_objects(first, second, config=LinkConfig(max_distance=0))
    assert [3, 3] not in far.pairs.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_the_assignment_has_the_largest_gain_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = np.array([(a, b) for a in range(4) for b in range(4) if rng.random() < 0.5]).reshape(-1, 2)
    gain = rng.random(len(pairs))
    taken = assign(pairs, gain)
    assert len(set(pairs[taken, 0])) == len(set(pairs[taken, 1])) == len(taken)
    table = {tuple(pair): value for pair, value in zip(pairs.tolist(), gain.tolist(), strict=True)}
    best = max(
        sum(table.get((a, b), 0.0) for a, b in enumerate(order)) for order in itertools.permutations(range(4))
    )
    assert gain[taken].sum() == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=9, unique=True))
def test_every_object_is_in_exactly_one_event(pairs: list[tuple[int, int]]) -> None:
    links = Links(np.array(pairs, np.int64).reshape(-1, 2), np.ones(len(pairs)), np.zeros(len(pairs)))
    events = group_events(links, 5, 6)
    assert sorted(a for event in events for a in event.first) == [1, 2, 3, 4, 5]
    assert sorted(b for event in events for b in event.second) == [1, 2, 3, 4, 5, 6]
    for a, b in pairs:
        assert any(a in event.first and b in event.second for event in events)


def test_grids_of_different_units_are_refused() -> None:
    labels = scattered((5, 5, 5), 2)
    with pytest.raises(GeometryError, match="micron"):
        link_objects(objects(labels), objects(labels, unit="micron"))
