"""Voxels of each label."""

import numpy as np
from numpy.testing import assert_array_equal

from medseg.labels import LabelSet
from medseg.preprocess import class_locations


def test_locations_lie_on_their_label_and_are_distinct() -> None:
    seg = np.random.default_rng(0).integers(-1, 3, (1, 6, 7, 8)).astype(np.int16)
    labels = LabelSet.parse({"background": 0, "b": 2, "a": 1})
    places = class_locations(seg, labels)
    assert list(places) == ["a", "b"]  # drawn by ascending label, as the peer does
    for name, value in (("a", 1), ("b", 2)):
        assert len(places[name]) == (seg == value).sum()
        assert_array_equal(seg[0][tuple(places[name].T)], value)
        assert len(np.unique(places[name], axis=0)) == len(places[name])


def test_an_absent_label_has_no_locations() -> None:
    labels = LabelSet.parse({"background": 0, "a": 1, "b": 2})
    places = class_locations(np.zeros((1, 3, 3, 3), dtype=np.int16), labels)
    assert {name: p.shape for name, p in places.items()} == {"a": (0, 3), "b": (0, 3)}


def test_a_large_label_is_thinned_to_the_limit_or_one_percent() -> None:
    labels = LabelSet.parse({"background": 0, "a": 1})
    seg = np.ones((1, 20, 20, 20), dtype=np.int16)
    assert len(class_locations(seg, labels, limit=100)["a"]) == 100
    assert len(class_locations(seg, labels, limit=10)["a"]) == 80


def test_with_an_ignore_label_all_annotated_voxels_are_an_entry() -> None:
    labels = LabelSet.parse({"background": 0, "a": 1, "ignore": 2})
    seg = np.random.default_rng(0).integers(-1, 3, (1, 6, 7, 8)).astype(np.int16)
    places = class_locations(seg, labels)
    assert list(places) == ["a", "annotated"]
    assert_array_equal(np.unique(seg[0][tuple(places["annotated"].T)]), [-1, 0, 1])
    assert len(places["annotated"]) == (seg != 2).sum()
