"""Cells of a film with known tracks and divisions."""

from collections.abc import Sequence

import numpy as np
import pytest

from medseg.errors import DataError
from medseg.instances.frames import FramesConfig, Track, track_frames
from medseg.instances.schema import Instances
from tests.instances.shapes import objects

Disc = tuple[float, float, float]


def frame(discs: Sequence[Disc], shape: tuple[int, int] = (60, 60)) -> Instances:
    """Return discs (x, y, radius) as objects in the order given."""
    x, y = np.indices(shape)
    labels = np.zeros(shape, np.int32)
    for label, (a, b, radius) in enumerate(discs, 1):
        labels[(x - a) ** 2 + (y - b) ** 2 <= radius**2] = label
    return objects(labels, (0.5, 0.5), "micron")


def test_cells_keep_their_track_while_they_move_and_change_places_in_the_list() -> None:
    film = [[(10 + 3 * t, 10, 5), (40, 45 - 3 * t, 5), (15, 45, 5)] for t in range(5)]
    frames = [frame(discs if t % 2 == 0 else discs[::-1]) for t, discs in enumerate(film)]
    found = track_frames(frames)
    assert found.tracks == (Track(1, 0, 4), Track(2, 0, 4), Track(3, 0, 4))
    assert [ids.tolist() for ids in found.ids] == [[1, 2, 3], [3, 2, 1]] * 2 + [[1, 2, 3]]
    assert (found.relabel(1, frames[1]).array > 0).sum() == frames[1].voxels.sum()


def test_a_division_ends_the_mothers_track_and_begins_two() -> None:
    film = [[(20, 20, 6)], [(20, 20, 6)], [(16, 20, 4), (24, 20, 4)], [(14, 20, 4), (26, 20, 4)]]
    found = track_frames([frame(discs) for discs in film])
    assert found.tracks == (Track(1, 0, 1), Track(2, 2, 3, 1), Track(3, 2, 3, 1))
    assert found.table()["parent"].tolist() == [0, 1, 1]
    assert list(found.table().columns) == ["label", "first_frame", "last_frame", "parent"]


def test_a_cell_that_comes_in_beside_another_is_no_daughter() -> None:
    film = [[(20, 20, 6)], [(20, 20, 6), (33, 20, 6)]]
    assert track_frames([frame(discs) for discs in film]).tracks[1] == Track(2, 1, 1, 0)


def test_divisions_can_be_left_out_and_far_cells_are_new() -> None:
    film = [[(20, 20, 6)], [(16, 20, 4), (24, 20, 4)]]
    found = track_frames([frame(discs) for discs in film], FramesConfig(divisions=False))
    assert [track.parent for track in found.tracks] == [0, 0]
    far = track_frames([frame([(10, 10, 4)]), frame([(50, 50, 4)])])
    assert far.tracks == (Track(1, 0, 0), Track(2, 1, 1))


def test_fast_cells_are_followed_by_distance_alone() -> None:
    film = [[(10 + 11 * t, 10, 4), (10 + 11 * t, 40, 4)] for t in range(4)]
    found = track_frames([frame(discs) for discs in film], FramesConfig(max_distance=7.0))
    assert found.tracks == (Track(1, 0, 3), Track(2, 0, 3))


def test_empty_frames_end_tracks_and_no_frames_are_refused() -> None:
    found = track_frames([frame([(10, 10, 4)]), frame([]), frame([(10, 10, 4)])])
    assert found.tracks == (Track(1, 0, 0), Track(2, 2, 2))
    with pytest.raises(DataError, match="no frames"):
        track_frames([])
    with pytest.raises(DataError, match="frame 1"):
        track_frames([frame([]), frame([], (50, 60))])
