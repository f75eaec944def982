"""Voxels of each label."""

import numpy as np
from numpy.testing import assert_array_equal

from medseg.labels import LabelSet
from medseg.preprocess import class_locations
from medseg.preprocess.locations import object_locations


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


def test_every_object_has_one_of_its_voxels_under_its_class() -> None:
    seg = np.full((1, 3, 4, 5), -1, np.int16)
    seg[0, 0] = 0
    seg[0, 1, 1, 0:3], seg[0, 2, :, 4], seg[0, 0, 0, 0] = 5, 2, 1
    found = object_locations(seg, ("cell", "debris"))
    assert found["cell"].tolist() == [[0, 0, 0], [1, 1, 1]]  # values 1 and 5
    assert found["debris"].tolist() == [[2, 2, 4]]
    nothing = object_locations(np.zeros_like(seg), ("cell",))
    assert nothing["cell"].shape == (0, 3)
