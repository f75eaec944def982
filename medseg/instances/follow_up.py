"""Lesions of a patient at two times: which is which, what is new or gone, how they grew, and the response."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import DataError
from medseg.instances.field_of_view import mark_outside, require_overlap
from medseg.instances.link import Event, LinkConfig, Links, centroids, group_events, link_objects
from medseg.instances.recist import acquisition_axis
from medseg.instances.register import register_images
from medseg.instances.response import Followed, Lesion, RecistConfig, Response, assess_response
from medseg.instances.schema import Instances
from medseg.instances.table import MeasureConfig, Table, measure_objects
from medseg.types import FloatArray, IntArray
from medseg.volume import Geometry, Volume

_DIAMETERS = MeasureConfig(surface=False, contacts=False)


class FollowUpConfig(Config):
    """How two times are compared.

    Attributes
    ----------
    link : LinkConfig
    registration : "none", "rigid" or "affine"
        Of the images, where both are given.
    seed : int
        Of the registration.
    recist : RecistConfig
    nodes : tuple of str
        An object is a lymph node if one of these words is in the name of its class or organ.
    days : float, optional
        Between the times, for doubling times.
    smallest_sum : float, optional
        Smallest sum of target diameters of examinations in between, mm.
    """

    link: LinkConfig = LinkConfig()
    registration: Literal["none", "rigid", "affine"] = "rigid"
    seed: int = Field(0, ge=0)
    recist: RecistConfig = RecistConfig()
    nodes: tuple[str, ...] = ("lymph", "node")
    days: float | None = Field(None, gt=0)
    smallest_sum: float | None = Field(None, ge=0)


@dataclass(frozen=True, eq=False)
class FollowUp:
    """What became of the objects of a baseline image.

    Attributes
    ----------
    baseline, later : Instances
    links : Links
    events : tuple of Event
        Every object is in exactly one.
    table : Table
        A row for each event, in the same order. Of several objects volumes and longest diameters are added
        up, and the largest short axis is taken. What lies outside of an image has NaN on its side.
    transform : (4, 4) float64
        From world positions at baseline to those at follow-up.
    response : Response or None
        By RECIST 1.1; None where objects are not measured in mm and 3D.
    provenance : dict
    """

    baseline: Instances
    later: Instances
    links: Links
    events: tuple[Event, ...]
    table: Table
    transform: FloatArray
    response: Response | None
    provenance: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many events there are of each kind."""
        from medseg.instances.link import KINDS

        return {kind: sum(event.kind == kind for event in self.events) for kind in KINDS}

    def later_labels(self) -> Volume:
        """Return the follow-up's label map with the numbers of baseline; new objects come after those.

        An object that several have merged into takes the smallest of their numbers, parts of one share its.
        """
        table = np.zeros(len(self.later) + 1, np.int32)
        number = len(self.baseline)
        for event in self.events:
            if event.first:
                table[list(event.second)] = min(event.first)
            else:
                number += 1
                table[list(event.second)] = number
        return self.later.volume.with_array(table[self.later.volume.array])


def follow_up(
    baseline: Instances,
    later: Instances,
    images: tuple[Volume, Volume] | None = None,
    organs: Volume | None = None,
    organ_names: dict[int, str] | None = None,
    config: FollowUpConfig | None = None,
) -> FollowUp:
    """Compare the objects of two times.

    Parameters
    ----------
    baseline, later : Instances
    images : (Volume, Volume), optional
        At baseline and at follow-up; they are registered as the configuration says. Without them both label
        maps are taken to lie in one frame, and lesions are found again by overlap and distance.
    organs : Volume, optional
        A label map on the grid of the baseline, for the two targets per organ of RECIST.
    organ_names : dict, optional
    config : FollowUpConfig, optional

    Raises
    ------
    GeometryError
        Grids or units do not fit, the grids share no place, or the images cannot be registered on theirs.
    DataError
        The images cannot be registered.
    """
    config = config or FollowUpConfig()
    transform, registration = _transform(images, config)
    links = link_objects(baseline, later, transform, config.link)
    require_overlap(baseline.geometry, later.geometry, transform)
    grouped = group_events(links, len(baseline), len(later))
    events = _sorted(mark_outside(grouped, baseline, later, transform))
    before = measure_objects(baseline, regions=organs, region_titles=organ_names, config=_DIAMETERS)
    tables = (before, measure_objects(later, config=_DIAMETERS))
    distance = _distances(events, baseline, later, transform)
    table = _event_table(events, (baseline, later), tables, distance, config.days)
    response = None
    if baseline.ndim == later.ndim == 3 and baseline.unit == "mm":
        response = _response(events, tables, baseline.geometry, config)
    provenance = {
        **{name: metadata.version(name) for name in ("medseg", "numpy", "SimpleITK")},
        "settings": config.to_dict(),
        "registration": registration,
    }
    return FollowUp(baseline, later, links, tuple(events), table, transform, response, provenance)


def _transform(
    images: tuple[Volume, Volume] | None, config: FollowUpConfig
) -> tuple[FloatArray, dict[str, Any]]:
    if images is None or config.registration == "none":
        return np.eye(4), {"kind": "none"}
    found = register_images(*images, config.registration, config.seed)
    if found.end < found.start:
        raise DataError(
            "registering the images made their agreement worse. Take registration none, or register them "
            "elsewhere."
        )
    information = {"before": found.start, "after": found.end}
    return found.matrix, {"kind": config.registration, "mutual_information": information}


def _sorted(events: Sequence[Event]) -> list[Event]:
    """Order events by their baseline objects, new ones last."""
    return sorted(events, key=lambda event: (not event.first, event.first, event.second))


def _distances(
    events: Sequence[Event], baseline: Instances, later: Instances, transform: FloatArray
) -> FloatArray:
    """Return how far the centroids of both sides of each event lie apart, NaN where one side is empty."""
    back = np.linalg.inv(transform)
    here = centroids(baseline)
    there = centroids(later) @ back[:3, :3].T + back[:3, 3]
    result = np.full(len(events), np.nan)
    for n, event in enumerate(events):
        if event.first and event.second:
            middle = [
                np.average(
                    points[np.array(labels) - 1], axis=0, weights=instances.voxels[np.array(labels) - 1]
                )
                for points, labels, instances in (
                    (here, event.first, baseline),
                    (there, event.second, later),
                )
            ]
            result[n] = np.linalg.norm(middle[0] - middle[1])
    return result


def _event_table(
    events: Sequence[Event],
    both: tuple[Instances, Instances],
    tables: tuple[Table, ...],
    distance: FloatArray,
    days: float | None,
) -> Table:
    unit = "um" if both[0].unit == "micron" else "mm"
    power = both[0].ndim
    size_name = f"{'area' if power == 2 else 'volume'}_{unit}{power}"
    sides = [(event.first, event.second) for event in events]
    size = np.array([[_total(tables[n][size_name], side[n]) for n in range(2)] for side in sides]).reshape(
        -1, 2
    )
    long = np.array(
        [[_total(tables[n][f"recist_longest_{unit}"], side[n]) for n in range(2)] for side in sides]
    )
    short = np.array(
        [[_largest(tables[n][f"recist_perp_{unit}"], side[n]) for n in range(2)] for side in sides]
    )
    long, short = long.reshape(-1, 2), short.reshape(-1, 2)
    for n, kind in enumerate(("outside the baseline", "outside the follow-up")):
        unseen = [event.kind == kind for event in events]
        for values in (size, long, short):
            values[unseen, n] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where((size > 0).all(axis=1), size[:, 1] / size[:, 0], np.nan)
        diameter = np.where((long > 0).all(axis=1), long[:, 1] / long[:, 0] - 1, np.nan)
        doubling = np.log(2) / np.log(ratio) * (days or math.nan)
    columns = {
        "event": np.array([event.kind for event in events], dtype=object),
        "baseline_labels": np.array([" ".join(map(str, a)) for a, _ in sides], dtype=object),
        "follow_up_labels": np.array([" ".join(map(str, b)) for _, b in sides], dtype=object),
        f"baseline_{size_name}": size[:, 0],
        f"follow_up_{size_name}": size[:, 1],
        f"change_{size_name}": size[:, 1] - size[:, 0],
        f"change_{size_name.split('_')[0]}_percent": 100 * (ratio - 1),
        f"baseline_longest_{unit}": long[:, 0],
        f"follow_up_longest_{unit}": long[:, 1],
        "change_longest_percent": 100 * diameter,
        f"baseline_short_{unit}": short[:, 0],
        f"follow_up_short_{unit}": short[:, 1],
        f"centroid_distance_{unit}": distance,
    }
    if days is not None:
        columns["volume_doubling_days"] = doubling
    return Table(columns)


def _total(column: IntArray | FloatArray, labels: tuple[int, ...]) -> float:
    return float(sum(column[label - 1] for label in labels))


def _largest(column: IntArray | FloatArray, labels: tuple[int, ...]) -> float:
    return float(max((column[label - 1] for label in labels), default=0.0))


def _response(
    events: Sequence[Event], tables: tuple[Table, ...], grid: Geometry, config: FollowUpConfig
) -> Response:
    before, after = (_lesions(table, config.nodes) for table in tables)
    followed = [
        Followed(
            before[label - 1],
            tuple(_as(after[k - 1], before[label - 1]) for k in event.second),
            event.kind != "outside the follow-up",
        )
        for event in events
        for label in event.first
    ]
    new = [after[label - 1] for event in events if event.kind == "new" for label in event.second]
    thickness = grid.spacing[acquisition_axis(grid.affine)]
    beyond = [
        after[label - 1] for event in events if event.kind == "outside the baseline" for label in event.second
    ]
    return assess_response(followed, new, thickness, config.smallest_sum, config.recist, beyond)


def _lesions(table: Table, nodes: tuple[str, ...]) -> list[Lesion]:
    found = []
    for row in table.rows():
        organ = str(row.get("parent_name", ""))
        words = f"{organ} {row['class_name']}".lower()
        node = any(word.lower() in words for word in nodes)
        found.append(Lesion(row["label"], row["recist_longest_mm"], row["recist_perp_mm"], organ, node))
    return found


def _as(later: Lesion, earlier: Lesion) -> Lesion:
    """Return a lesion with the organ that it had at baseline."""
    return Lesion(later.label, later.longest, later.short, earlier.organ, earlier.node)
