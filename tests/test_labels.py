"""What a dataset.json's labels mean: values, regions, sides."""

import numpy as np
import pytest

from medseg.errors import LabelError
from medseg.labels import LabelSet

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
