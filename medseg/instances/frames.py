"""Cells over the frames of a film: who is who from frame to frame, and who has divided.

Frame to frame, one-to-one assignment takes the pairs that share most voxels and lie nearest. A cell that is
left over near one that was assigned is its sister if both are smaller than their mother was; the tracks of
the daughters then begin, and the mother's ends. A track is what the Cell Tracking Challenge calls one
(https://celltrackingchallenge.net): label, first frame, last frame, parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import DataError
from medseg.instances.link import assign, centroids, shared_voxels
from medseg.instances.schema import Instances
from medseg.instances.table import Table
from medseg.log import progress
from medseg.types import FloatArray, IntArray
from medseg.volume import Volume


class FramesConfig(Config):
    """How cells are followed.

    Attributes
    ----------
    max_distance : float
        Of centroids between frames, in the unit of the grid; None: twice the median equivalent radius.
    min_share : float
        Part of the smaller cell that must be shared by cells farther apart.
    divisions : bool
        Look for divisions.
    most_daughter, least_daughter : float
        Size of a daughter over that of the mother.
    most_together : float
        Size of both daughters over that of the mother.
    """

    max_distance: float | None = Field(None, gt=0)
    min_share: float = Field(0.3, gt=0, le=1)
    divisions: bool = True
    most_daughter: float = Field(0.8, gt=0)
    least_daughter: float = Field(0.15, ge=0)
    most_together: float = Field(1.5, gt=0)


@dataclass(frozen=True)
class Track:
    """One cell from its first frame to its last; `parent` 0 is none."""

    label: int
    first: int
    last: int
    parent: int = 0


@dataclass(frozen=True, eq=False)
class Tracks:
    """Tracks of a film.

    Attributes
    ----------
    tracks : tuple of Track
        Labels are 1..N.
    ids : tuple of (K,) int64
        For each frame the track of each of its objects.
    """

    tracks: tuple[Track, ...]
    ids: tuple[IntArray, ...]

    def table(self) -> Table:
        """Return the columns of the challenge's ``man_track.txt``."""
        names = ("label", "first", "last", "parent")
        rows = [(t.label, t.first, t.last, t.parent) for t in self.tracks]
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        return Table(
            {
                name if name in ("label", "parent") else f"{name}_frame": column
                for name, column in zip(names, columns, strict=True)
            }
        )

    def relabel(self, frame: int, instances: Instances) -> Volume:
        """Return a frame's label map with the tracks' labels."""
        table = np.concatenate(([0], self.ids[frame])).astype(np.int32)
        return instances.volume.with_array(table[instances.volume.array])


def track_frames(frames: Sequence[Instances], config: FramesConfig | None = None) -> Tracks:
    """Follow objects over frames of one grid.

    Parameters
    ----------
    frames : Instances, in the order of time
    config : FramesConfig, optional

    Raises
    ------
    DataError
        There is no frame, or the frames' grids differ.
    """
    config = config or FramesConfig()
    if not frames:
        raise DataError("no frames: expected the label maps of a film in the order of time.")
    for number, frame in enumerate(frames):
        if not frames[0].geometry.matches(frame.geometry):
            raise DataError(f"frame {number}: its grid differs from that of frame 0. Resample the film.")
    limit = config.max_distance or _reach(frames)
    ids = [np.arange(1, len(frames[0]) + 1)]
    first, last, parent = [0] * len(frames[0]), [0] * len(frames[0]), [0] * len(frames[0])
    for number in progress(range(1, len(frames)), "Following objects"):
        earlier, later = frames[number - 1], frames[number]
        pairs = _continued(earlier, later, limit, config)
        mothers = _divided(earlier, later, pairs, limit, config) if config.divisions else {}
        now = np.zeros(len(later), np.int64)
        dividing = {mother for mother, _ in mothers.values()}
        for a, b in pairs.tolist():
            if a not in dividing:
                now[b - 1] = ids[-1][a - 1]
                last[now[b - 1] - 1] = number
        for b in np.flatnonzero(now == 0) + 1:
            mother = next((m for daughter, (m, sister) in mothers.items() if b in (daughter, sister)), 0)
            first.append(number)
            last.append(number)
            parent.append(int(ids[-1][mother - 1]) if mother else 0)
            now[b - 1] = len(first)
        ids.append(now)
    rows = zip(range(1, len(first) + 1), first, last, parent, strict=True)
    return Tracks(tuple(Track(*row) for row in rows), tuple(ids))


def _reach(frames: Sequence[Instances]) -> float:
    """Return twice the median equivalent radius of all objects, at least a voxel."""
    grid, ndim = frames[0].geometry, frames[0].ndim
    voxel = float(np.prod(grid.spacing[:ndim]))
    sizes = np.concatenate([frame.voxels for frame in frames]) * voxel
    if not sizes.size:
        return max(grid.spacing[:ndim])
    size = float(np.median(sizes))
    diameter: float = 2 * (size / np.pi) ** 0.5 if ndim == 2 else 2 * (3 * size / (4 * np.pi)) ** (1 / 3)
    return max(diameter, *grid.spacing[:ndim])


def _continued(earlier: Instances, later: Instances, limit: float, config: FramesConfig) -> IntArray:
    """Return pairs (m, 2) of objects that are the same."""
    from scipy.spatial import cKDTree

    here, there = centroids(earlier), centroids(later)
    if not len(here) or not len(there):
        return np.zeros((0, 2), np.int64)
    shared = shared_voxels(earlier, later)
    share = dict(zip(map(tuple, shared.pairs.tolist()), shared.share.tolist(), strict=True))
    near = cKDTree(here).query_ball_point(there, limit)
    close = {(a + 1, b + 1) for b, some in enumerate(near) for a in some}
    wanted = {pair for pair, part in share.items() if part >= config.min_share}
    pairs = np.array(sorted(close | wanted), np.int64).reshape(-1, 2)
    distance = np.linalg.norm(here[pairs[:, 0] - 1] - there[pairs[:, 1] - 1], axis=1)
    shares = np.array([share.get((a, b), 0.0) for a, b in pairs.tolist()])
    gain = shares.reshape(-1) + np.maximum(1 - distance / limit, 0.0) + 1e-9
    return np.asarray(pairs[assign(pairs, gain)])


def _divided(
    earlier: Instances, later: Instances, pairs: IntArray, limit: float, config: FramesConfig
) -> dict[int, tuple[int, int]]:
    """Return for each object that is left over and has a mother: (mother, sister), by label."""
    here, there = centroids(earlier), centroids(later)
    free = np.setdiff1d(np.arange(1, len(later) + 1), pairs[:, 1])
    found: list[tuple[float, int, int, int]] = []
    for daughter in free.tolist():
        distance: FloatArray = np.linalg.norm(here[pairs[:, 0] - 1] - there[daughter - 1], axis=1)
        for row in np.flatnonzero(distance <= limit):
            mother, sister = (int(v) for v in pairs[row])
            sizes = [later.voxels[k - 1] / earlier.voxels[mother - 1] for k in (daughter, sister)]
            if (
                max(sizes) <= config.most_daughter
                and min(sizes) >= config.least_daughter
                and sum(sizes) <= config.most_together
            ):
                found.append((float(distance[row]), mother, daughter, sister))
    mothers: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for _, mother, daughter, sister in sorted(found):
        if mother not in taken and daughter not in mothers:
            mothers[daughter] = (mother, sister)
            taken.add(mother)
    return mothers
