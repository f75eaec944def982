"""Where to look next."""

import numpy as np
import pytest

from medseg.prompt.regions import Region
from medseg.prompt.review import find_doubt, middle_of

SHAPE = (20, 20, 12)


def column() -> np.ndarray:
    """An object of ten voxels' width through slices 2 to 9."""
    mask = np.zeros(SHAPE, bool)
    mask[5:15, 5:15, 2:10] = True
    return mask


def test_nothing_to_look_at_without_a_mask() -> None:
    assert find_doubt(Region.empty(SHAPE), {3: 0.1}, 2) is None


def test_the_slice_of_least_confidence_is_named() -> None:
    found = find_doubt(Region.of(column()), {k: 0.9 - 0.5 * (k == 7) for k in range(2, 10)}, 2)
    assert found == (7, "low confidence", pytest.approx(0.6))


def test_a_slice_that_was_prompted_is_not_named_again() -> None:
    confidence = {k: 0.9 - 0.5 * (k == 7) - 0.2 * (k == 4) for k in range(2, 10)}
    found = find_doubt(Region.of(column()), confidence, 2, {7})
    assert found is not None and found[0] == 4
    assert find_doubt(Region.of(column()), confidence, 2, range(12)) == (
        7,
        "low confidence",
        pytest.approx(0.6),
    )


def test_a_slice_unlike_its_neighbours_is_named() -> None:
    mask = column()
    mask[5:15, 5:15, 6] = False
    mask[10:15, 5:15, 6] = True
    found = find_doubt(Region.of(mask), dict.fromkeys(range(2, 10), 0.9), 2)
    assert found is not None
    assert found[0] in (5, 6, 7) and found[1] == "neighbouring slices disagree"
    assert found[2] == pytest.approx(0.5)


def test_the_ends_of_an_object_are_no_disagreement() -> None:
    found = find_doubt(Region.of(column()), {}, 2)
    assert found is not None and found[2] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_middle_lies_in_the_mask_on_the_slice(axis: int) -> None:
    mask = column()
    mask[8:12, 8:12, 3:9] = False  # a tube
    index = 6
    voxel = middle_of(Region.of(mask), axis, index)
    assert voxel[axis] == index and mask[tuple(int(v) for v in voxel)]
