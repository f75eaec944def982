"""What a dataset.json's labels mean: values, regions, sides."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.errors import ConfigError, LabelError
from medseg.labels import LabelSet, PanopticLabels, read_panoptic_labels

SIDED = ["kidney_l", "L_kidney", "left kidney", "kidney_right", "R", "rib_left_1", "Niere-rechts", "lung (l)"]
# The first ones are names of TotalSegmentator.
UNSIDED = [
    *("vertebrae_L1", "vertebrae_L5", "vertebrae_C1", "vertebrae_S1", "heart", "colon", "brain", "liver"),
    *("l2_disc", "1l", "cleft", "upright", "lr", "skull"),
]


@pytest.mark.parametrize(("name", "sided"), [*((n, True) for n in SIDED), *((n, False) for n in UNSIDED)])
def test_a_side_is_told_from_a_vertebra(name: str, sided: bool) -> None:
    assert LabelSet.parse({"background": 0, name: 1}).sided == ((name,) if sided else ())


def test_both_directions_of_the_mapping_are_read() -> None:
    forward = LabelSet.parse({"background": 0, "liver": 1})
    assert LabelSet.parse({"0": "background", "1": "liver"}) == forward
    assert forward.n_outputs == 2 and not forward.has_regions and forward.ignore is None


def test_regions_overlap_and_the_ignore_label_is_no_output() -> None:
    labels = LabelSet.parse({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    assert labels.has_regions and labels.n_outputs == 2 and labels.ignore == 3
    assert labels.values == (0, 1, 2, 3) and labels.foreground_values == (1, 2)
    np.testing.assert_array_equal(labels.mask(np.arange(4), "whole"), [False, True, True, False])


@pytest.mark.parametrize(
    ("entries", "order", "says"),
    [
        ({"liver": 1}, None, "'background' must be present"),
        ({"background": 0, "liver": 2}, None, "consecutive"),
        ({"background": 0, "liver": 1, "ignore": 3}, None, "largest other label plus one"),
        ({"background": 0, "whole": [1, 2], "core": 2}, [1], "one label for each of the 2 regions"),
    ],
)
def test_labels_that_do_not_fit_together_are_refused(entries, order, says: str) -> None:
    with pytest.raises(LabelError, match=says):
        LabelSet.parse(entries, order)


def test_many_labels_take_sixteen_bits() -> None:
    many = LabelSet.parse({"background": 0, **{f"part {k}": k for k in range(1, 256)}})
    assert many.dtype is np.uint16 and LabelSet.parse({"background": 0, "x": 1}).dtype is np.uint8


LIVER = PanopticLabels(labels={"background": 0, "liver": 2, "lesion": 5, "ignore": 6}, things=("lesion",))


def test_what_is_no_thing_is_stuff_and_a_written_table_reads_back(tmp_path: Path) -> None:
    assert LIVER.stuff == ("liver",) and LIVER.names == {2: "liver", 5: "lesion"} and LIVER.ignore == 6
    turned = PanopticLabels.from_dict({"labels": {"2": "liver", "5": "lesion"}, "things": ["lesion"]})
    assert turned.names == LIVER.names
    LIVER.save(tmp_path / "classes.json")
    assert read_panoptic_labels(tmp_path / "classes.json") == LIVER
    further = {"labels": LIVER.labels, "things": ["lesion"], "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(further))
    assert read_panoptic_labels(tmp_path / "dataset.json") == LIVER
    (tmp_path / "other.json").write_text(json.dumps(further))
    with pytest.raises(ConfigError, match="unknown key 'numTraining'"):
        read_panoptic_labels(tmp_path / "other.json")


@given(
    objects=arrays(np.int32, 12, elements=st.integers(1, 5000)),
    kinds=arrays(np.int8, 12, elements=st.sampled_from([0, 2, 5, 6])),
)
def test_packing_loses_nothing(objects: np.ndarray, kinds: np.ndarray) -> None:
    objects = np.where(kinds == 5, objects, 0)
    classes = LIVER.for_objects(int(objects.max()))
    packed = classes.pack(kinds, objects)
    assert packed.dtype == np.int32
    semantic, numbers = classes.unpack(packed)
    assert (semantic == kinds).all() and (numbers == objects).all()


@pytest.mark.parametrize("value", [5000, 2001, 3000, 7000, -1])
def test_a_number_that_is_no_thing_and_no_stuff_is_refused(value: int) -> None:
    with pytest.raises(LabelError, match=f"holds {value}, which with divisor 1000"):
        LIVER.unpack(np.array([0, 2000, value]))


def test_the_divisor_grows_with_the_objects_until_32_bits_are_full() -> None:
    assert LIVER.for_objects(999).divisor == 1000 and LIVER.for_objects(1000).divisor == 10000
    with pytest.raises(LabelError, match="do not fit in one map of 32 bits"):
        LIVER.for_objects(10**9)


def test_networks_need_values_without_gaps() -> None:
    with pytest.raises(LabelError, match="consecutive"):
        LIVER.label_set()
    close = PanopticLabels(labels={"lesion": 2, "liver": 1}, things=("lesion",)).label_set()
    assert list(close.entries) == ["background", "liver", "lesion"] and close.n_outputs == 3
