"""Neighbours and regions against brute force."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from medseg.errors import GeometryError
from medseg.instances import contacts
from medseg.instances.contacts import find_contacts, nearest_neighbours
from medseg.instances.regions import find_parents
from tests.instances.shapes import scattered


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(7, 8), (5, 6, 4), (1, 6)]), st.booleans())
def test_contacts_are_those_of_every_pair_of_neighbouring_voxels(
    seed: int, shape: tuple[int, ...], fortran: bool
) -> None:
    labels = scattered(shape, 8, seed)
    labels = np.asfortranarray(labels) if fortran else labels
    expected: dict[tuple[int, int], list[int]] = {}
    for place in np.ndindex(*shape):
        for axis in range(len(shape)):
            other = tuple(p + (a == axis) for a, p in enumerate(place))
            if other[axis] < shape[axis]:
                a, b = sorted((int(labels[place]), int(labels[other])))
                if a > 0 and a != b:
                    expected.setdefault((a, b), [0] * len(shape))[axis] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contacts, "_SLAB_VOXELS", 10)
        found = find_contacts(labels, 8)
    assert {
        tuple(pair): faces for pair, faces in zip(found.pairs.tolist(), found.faces.tolist(), strict=True)
    } == expected
    assert found.pairs.tolist() == [list(pair) for pair in sorted(expected)]
    assert found.degree(8).tolist() == [sum(k in pair for pair in expected) for k in range(1, 9)]


def test_contact_areas_use_the_spacing() -> None:
    labels = np.array([[[1, 2], [3, 2]]], np.int32)
    sizes = find_contacts(labels, 3).sizes((2.0, 3.0, 5.0))
    assert sizes.tolist() == [6.0, 10.0, 6.0]  # 1-2 and 2-3 across k, 1-3 across j


def test_the_nearest_neighbour_is_that_of_all_pairs_and_of_equal_ones_the_lower() -> None:
    points = np.array([[0.0, 0], [1, 0], [2, 0], [9, 9], [9, 9]])
    distance, label = nearest_neighbours(points)
    assert distance.tolist() == [1, 1, 1, 0, 0]
    assert label.tolist() == [2, 1, 2, 5, 4]
    assert nearest_neighbours(points[:1])[0].tolist() == [np.inf]
    assert nearest_neighbours(points[:0])[1].size == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(7, 8), (5, 6, 4)]))
def test_the_parent_is_the_region_with_most_of_the_object(seed: int, shape: tuple[int, ...]) -> None:
    labels, regions = scattered(shape, 6, seed), scattered(shape, 3, seed + 1).astype(np.int64) * 1000
    voxels = np.bincount(labels.ravel(), minlength=7)[1:]
    parents, counts = find_parents(labels, regions, voxels)
    for label in range(1, 7):
        inside = regions[(labels == label) & (regions > 0)]
        values, times = np.unique(inside, return_counts=True)
        parent = int(values[np.argmax(times)]) if len(values) else 0
        assert parents.region[label - 1] == parent
        if len(values):
            assert parents.fraction[label - 1] == times.max() / voxels[label - 1]
    for row, region in enumerate(counts.region):
        assert counts.voxels[row] == (regions == region).sum()
        assert counts.count[row] == (parents.region == region).sum()
        assert counts.object_voxels[row] == ((regions == region) & (labels > 0)).sum()
    assert counts.region.tolist() == [int(v) for v in np.unique(regions) if v]


def test_regions_of_another_shape_are_refused() -> None:
    with pytest.raises(GeometryError, match="do not fit"):
        find_parents(np.zeros((2, 2), np.int32), np.zeros((2, 3), np.int32), np.zeros(0, np.int64))
