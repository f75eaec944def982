"""What another grid does not show, against where every voxel lies."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from medseg.errors import GeometryError
from medseg.instances.export.follow_up import write_follow_up
from medseg.instances.field_of_view import outside_voxels, require_overlap
from medseg.instances.follow_up import FollowUp, follow_up
from medseg.instances.schema import Instances, instances_of
from medseg.volume import Geometry, Volume
from tests.instances.patients import Ball, centred, lesions, rigid

GRID = centred((48, 44, 36), (2.0, 2.0, 2.5))
BALLS = [Ball(1, (-25, 0, 0), 8), Ball(2, (10, -14, 12), 7), Ball(3, (20, 16, -14), 6)]


def part_of(instances: Instances, start: int, stop: int) -> Instances:
    """Return the columns from `start` to `stop`, in their place."""
    labels, shift = instances.volume.array[0, start:stop], np.eye(4)
    shift[0, 3] = start
    return instances_of(Volume(labels, Geometry(labels.shape, instances.geometry.affine @ shift)))


def counts(found: FollowUp) -> dict[str, int]:
    return {kind: count for kind, count in found.counts().items() if count}


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(-40, 40)] * 3), st.tuples(*[st.integers(-60, 60)] * 3))
def test_voxels_outside_are_those_whose_place_no_voxel_of_the_other_grid_holds(
    degrees: tuple[int, int, int], shift: tuple[int, int, int]
) -> None:
    transform = rigid(degrees, shift)
    other, first = centred((30, 26, 20), (2.1, 1.9, 3.0)), lesions(GRID, BALLS)
    outside = outside_voxels(first, other, transform)
    labels = first.volume.array[0]
    for label in range(1, 4):
        where = np.argwhere(labels == label)
        world = np.c_[where, np.ones(len(where))] @ (transform @ GRID.affine).T
        half = np.array(other.shape) * other.spacing / 2
        assert outside[label - 1] == int((np.abs(world[:, :3]) > half).any(axis=1).sum())


def test_lesions_outside_have_not_gone_and_the_response_is_not_evaluable() -> None:
    first = lesions(GRID, BALLS)
    found = follow_up(first, part_of(first, 0, 22))
    assert counts(found) == {"outside the follow-up": 2, "persistent": 1}
    assert found.response is not None and found.response.overall == "NE"
    row = list(found.table.rows())[1]
    unseen = [row[name] for name in ("follow_up_volume_mm3", "change_volume_mm3", "follow_up_longest_mm")]
    assert row["event"] == "outside the follow-up" and row["baseline_volume_mm3"] > 0
    assert np.isnan(unseen).all()


def test_an_empty_slab_beside_the_lesions_is_no_complete_response() -> None:
    first = lesions(GRID, BALLS)
    found = follow_up(first, part_of(first, 44, 48))
    assert counts(found) == {"outside the follow-up": 3}
    assert found.response is not None and found.response.overall == "NE"


def test_lesions_where_baseline_shows_nothing_are_not_new() -> None:
    later = lesions(GRID, BALLS)
    found = follow_up(part_of(later, 0, 22), later)
    assert counts(found) == {"outside the baseline": 2, "persistent": 1}
    assert found.response is not None and found.response.overall == "SD"
    assert found.response.new_lesions == ()
    assert sorted(np.unique(found.later_labels().array)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("columns", "kind"), [(11, "outside the follow-up"), (13, "persistent")])
def test_a_lesion_that_the_edge_cuts_is_outside_if_more_than_half_of_it_is(columns: int, kind: str) -> None:
    first = lesions(GRID, BALLS[:1])  # its middle is between columns 10 and 12
    found = follow_up(first, part_of(first, 0, columns))
    assert [(event.kind, event.first, event.second) for event in found.events] == [(kind, (1,), (1,))]


def test_a_lesion_that_has_gone_inside_of_the_follow_up_is_gone_still() -> None:
    first = lesions(GRID, BALLS)
    later = part_of(lesions(GRID, BALLS[1:2]), 0, 32)
    assert counts(follow_up(first, later)) == {"gone": 1, "outside the follow-up": 1, "persistent": 1}


@pytest.mark.parametrize("shift", [(5000.0, 0.0, 0.0), (96.0, 0.0, 0.0), (0.0, 0.0, -90.0)])
def test_grids_that_share_no_place_are_refused_also_where_they_touch(shift: tuple[float, ...]) -> None:
    with pytest.raises(GeometryError, match="do not overlap"):
        require_overlap(GRID, GRID, rigid((0, 0, 0), (shift[0], shift[1], shift[2])))
    nearer = [0.99 * value for value in shift]
    if max(np.abs(shift)) < 1000:
        require_overlap(GRID, GRID, rigid((0, 0, 0), (nearer[0], nearer[1], nearer[2])))


def test_what_is_outside_is_drawn(tmp_path: Path) -> None:
    first = lesions(GRID, BALLS)
    files = write_follow_up(follow_up(first, part_of(first, 0, 22)), tmp_path)
    assert "outside the follow-up,2,,1" in files["events"].read_text()
