"""A comparison of two times as files: a table, JSON, the label map with lasting numbers, and a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.files import atomic_path, write_text
from medseg.instances.export.overlay import draw_outlines, font_of
from medseg.instances.export.tables import write_csv
from medseg.instances.follow_up import FollowUp
from medseg.instances.link import KINDS, Event, centroids
from medseg.instances.schema import Instances
from medseg.io import write
from medseg.types import FloatArray, IntArray, PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of a panel, rows of a picture, and how much is shown around an object.
_PANEL, _TEXT, _GAP, _HEAD = 230, 300, 8, 64
_COLUMNS, _MOST = 2, 16
_AROUND = 2.2
_LEAST_MM = 20.0
_GROUND, _INK, _MUTED = (17, 21, 27), (242, 245, 248), (154, 167, 181)
_COLOURS = {
    "new": (255, 107, 107),
    "gone": (154, 167, 181),
    "outside the follow-up": (110, 168, 254),
    "outside the baseline": (110, 168, 254),
    "merged": (255, 178, 77),
    "split": (201, 140, 255),
    "regrouped": (255, 240, 120),
    "persistent": (124, 252, 138),
}


def write_follow_up(
    found: FollowUp, folder: PathLike, images: tuple[Volume, Volume] | None = None, suffix: str = ".nii.gz"
) -> dict[str, Path]:
    """Write everything into a folder; return the files by what they are.

    Parameters
    ----------
    found : FollowUp
    folder : made if it is not there
    images : for the picture; without them outlines are drawn on black
    suffix : of the label map
    """
    folder = Path(folder)
    files = {
        "events": folder / "events.csv",
        "report": folder / "follow_up.json",
        "labels": folder / f"follow_up_labels{suffix}",
        "picture": folder / "follow_up.png",
    }
    write_csv(found.table, files["events"])
    write_text(files["report"], json.dumps(describe_follow_up(found), indent=2, allow_nan=False) + "\n")
    write(found.later_labels(), files["labels"])
    picture = draw_follow_up(found, images)
    with atomic_path(files["picture"]) as temporary:
        picture.save(temporary, format="PNG")
    return files


def describe_follow_up(found: FollowUp) -> dict[str, Any]:
    """Return counts, events, response and settings as plain data for strict JSON."""
    return {
        "baseline_objects": len(found.baseline),
        "follow_up_objects": len(found.later),
        "counts": found.counts(),
        "events": [{name: _plain(value) for name, value in row.items()} for row in found.table.rows()],
        "response": None if found.response is None else _response(found),
        "transform_baseline_to_follow_up": found.transform.tolist(),
        "provenance": found.provenance,
    }


def _response(found: FollowUp) -> dict[str, Any]:
    assert found.response is not None
    values = asdict(found.response)
    return {
        "criteria": "RECIST 1.1 (Eisenhauer et al. 2009, Eur J Cancer 45:228-247)",
        **{name: _plain(value) for name, value in values.items()},
    }


def _plain(value: Any) -> Any:
    """Return a value with null where a number is not known, also inside of tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_follow_up(found: FollowUp, images: tuple[Volume, Volume] | None = None) -> "Image":
    """Draw the events, those that matter most first: baseline on the left, follow-up on the right.

    Both are shown on one axial plane of the baseline (in microscopy, one plane of the array), the follow-up
    through the registration, so that they can be compared.
    """
    from PIL import Image, ImageDraw

    order = sorted(range(len(found.events)), key=lambda n: _weight(found, n))[:_MOST]
    width = _COLUMNS * (2 * _PANEL + _TEXT + 3 * _GAP)
    rows = max(1, -(-len(order) // _COLUMNS))
    sheet = np.full((_HEAD + rows * (_PANEL + _GAP), width, 3), _GROUND, np.uint8)
    places = [(_corner(n), order[n]) for n in range(len(order))]
    for (top, left), number in places:
        for side, panel in enumerate(_panels(found, found.events[number], images)):
            at = left + side * (_PANEL + _GAP)
            sheet[top : top + _PANEL, at : at + _PANEL] = panel
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    head, font = _headline(found, len(order)), font_of(15)
    for n, line in enumerate(head):
        draw.text((_GAP, 8 + 24 * n), line, fill=_INK if n == 0 else _MUTED, font=font)
    for top, left in [place for place, _ in places[:_COLUMNS]]:
        for side, name in enumerate(("baseline", "follow-up")):
            draw.text((left + side * (_PANEL + _GAP) + 6, top + 4), name, fill=_MUTED, font=font_of(12))
    for (top, left), number in places:
        for n, (line, colour) in enumerate(_words(found, number)):
            draw.text((left + 2 * (_PANEL + _GAP) + 4, top + 6 + 22 * n), line, fill=colour, font=font)
    return picture


def _corner(n: int) -> tuple[int, int]:
    row, column = divmod(n, _COLUMNS)
    return _HEAD + row * (_PANEL + _GAP), column * (2 * _PANEL + _TEXT + 3 * _GAP) + _GAP


def _weight(found: FollowUp, number: int) -> tuple[int, float]:
    """Return what sorts events: new and gone first, then by how much they changed."""
    event = found.events[number]
    change = next(column for name, column in found.table.columns.items() if name.startswith("change_"))
    return KINDS.index(event.kind), -abs(float(np.nan_to_num(change[number])))


def _headline(found: FollowUp, shown: int) -> list[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts().items() if count) or "no objects"
    more = f"  ({shown} of {len(found.events)} shown)" if shown < len(found.events) else ""
    lines = [f"{len(found.baseline)} objects at baseline, {len(found.later)} at follow-up: {counts}{more}"]
    response = found.response
    if response is None:
        return lines
    change = "" if math.isnan(response.change) else f" ({response.change:+.0%})"
    sums = f"{response.baseline_sum:.1f} mm to {response.sum_in_words()}{change}"
    lines.append(
        f"RECIST 1.1: {response.overall}  ·  targets {response.target}, {sums}  ·  "
        f"non-targets {response.non_target}  ·  {len(response.new_lesions)} new"
    )
    return lines


def _words(found: FollowUp, number: int) -> list[tuple[str, tuple[int, int, int]]]:
    event = found.events[number]
    row = {name: column[number] for name, column in found.table.columns.items()}
    unit = "µm" if found.baseline.unit == "micron" else "mm"
    power = "²" if found.baseline.ndim == 2 else "³"
    size = [float(v) for name, v in row.items() if name.startswith(("baseline_vol", "follow_up_vol"))]
    size = size or [float(v) for name, v in row.items() if name.startswith(("baseline_ar", "follow_up_ar"))]
    long = [float(v) for name, v in row.items() if name.startswith(("baseline_long", "follow_up_long"))]
    labels = [" ".join(map(str, side)) or "–" for side in (event.first, event.second)]
    lines = [(event.kind, _COLOURS[event.kind]), (f"{labels[0]}  →  {labels[1]}", _INK)]
    lines.append((f"{_number(size[0], 0)} → {_number(size[1], 0)} {unit}{power}", _INK))
    if size[0] > 0 and size[1] > 0:
        lines.append((f"{size[1] / size[0] - 1:+.0%}", _INK))
    lines.append((f"longest {_number(long[0], 1)} → {_number(long[1], 1)} {unit}", _MUTED))
    return lines


def _number(value: float, digits: int) -> str:
    return "?" if math.isnan(value) else f"{value:,.{digits}f}"


def _panels(found: FollowUp, event: Event, images: tuple[Volume, Volume] | None) -> tuple[IntArray, IntArray]:
    """Return the event at baseline and at follow-up on one plane."""
    points = _view(found, event)
    matrices = (np.eye(4), found.transform)
    drawn = []
    for n, instances in enumerate((found.baseline, found.later)):
        image = None if images is None else images[n]
        labels = (event.first, event.second)[n]
        drawn.append(_panel(instances, image, points, matrices[n], labels, _COLOURS[event.kind]))
    return drawn[0], drawn[1]


def _view(found: FollowUp, event: Event) -> FloatArray:
    """Return world positions (rows, columns, 3) at baseline of a square around an event."""
    back = np.linalg.inv(found.transform)
    middles, sizes = [], []
    for instances, labels, matrix in (
        (found.baseline, event.first, np.eye(4)),
        (found.later, event.second, back),
    ):
        at = centroids(instances)[np.array(labels, np.int64) - 1]
        middles.append(at @ matrix[:3, :3].T + matrix[:3, 3])
        voxel = np.prod(instances.geometry.spacing[: instances.ndim])
        sizes += (instances.voxels[np.array(labels, np.int64) - 1] * voxel).tolist()
    points = np.concatenate(middles)
    middle = points.mean(axis=0)
    across, down = _directions(found.baseline)
    if found.baseline.ndim == 3:  # through the largest piece, since a plane between two pieces shows neither
        pieces = slice(0, len(event.first)) if len(event.first) > len(event.second) else slice(None)
        pieces = slice(len(event.first), None) if len(event.second) > len(event.first) else pieces
        normal = np.cross(across, down)
        largest = points[pieces][int(np.argmax(sizes[pieces]))]
        middle = middle + normal * float((largest - middle) @ normal)
    ndim = found.baseline.ndim
    radius = max(sizes) ** (1 / ndim) + float(np.abs(points - middle).max())
    side = max(_AROUND * radius, _LEAST_MM if found.baseline.unit == "mm" else 0.0)
    steps = (np.arange(_PANEL) + 0.5) / _PANEL * side - side / 2
    return np.asarray(middle + steps[:, None, None] * down + steps[None, :, None] * across)


def _directions(instances: Instances) -> tuple[FloatArray, FloatArray]:
    """Return where a picture's right and bottom are in the world: patient's left and back in anatomy."""
    if instances.ndim == 3 and instances.unit == "mm":
        return np.array([-1.0, 0, 0]), np.array([0, -1.0, 0])
    columns = instances.geometry.affine[:3, :2] / np.linalg.norm(instances.geometry.affine[:3, :2], axis=0)
    return columns[:, 0], columns[:, 1]


def _panel(
    instances: Instances,
    image: Volume | None,
    points: FloatArray,
    matrix: FloatArray,
    labels: Sequence[int],
    colour: tuple[int, int, int],
) -> IntArray:
    """Sample an image and its labels at world positions of the baseline, and draw the event's objects."""
    from scipy.ndimage import map_coordinates

    world = points @ matrix[:3, :3].T + matrix[:3, 3]
    inverse = np.linalg.inv(instances.geometry.affine)
    index = np.moveaxis(world @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    nearest = np.round(index).astype(np.int64)
    shape = np.reshape(instances.geometry.shape, (3, 1, 1))
    inside = ((nearest >= 0) & (nearest < shape)).all(axis=0)
    place = np.clip(nearest, 0, shape - 1)
    found = np.where(inside, instances.volume.array[0][tuple(place)], 0)
    grey = np.zeros(found.shape)
    if image is not None:
        own = np.linalg.inv(image.geometry.affine)
        at = np.moveaxis(world @ own[:3, :3].T + own[:3, 3], -1, 0)
        values = map_coordinates(image.array[0].astype(np.float32), at, order=1, mode="nearest")
        low, high = np.percentile(values, (1, 99.5))
        grey = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * inside
    mine = np.isin(found, labels)
    others = draw_outlines(grey * 0.85, np.where(mine, 0, found > 0).astype(np.int32))
    edge = draw_outlines(np.zeros(found.shape), mine.astype(np.int32)).any(axis=2)
    plain = draw_outlines(grey * 0.85, np.zeros(found.shape, np.int32))
    dim = (others != plain).any(axis=2)
    plain[dim] = _MUTED
    plain[edge] = colour
    return plain
