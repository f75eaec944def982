"""Outlines as GeoJSON (RFC 7946), in the form that QuPath 0.4 and later reads as detections.

Coordinates are pixels from the top left corner of the picture, x to the right and y down, as pathology
programs expect, not longitude and latitude. Measurements are in physical units by their names.
"""

import json
import math
from typing import Any

from medseg.files import write_text
from medseg.instances.outlines import Polygon, trace_outlines
from medseg.instances.schema import Instances
from medseg.instances.sums import sum_objects
from medseg.instances.table import Table
from medseg.metrics.report import PALETTE
from medseg.types import IntArray, PathLike

# Columns of the table that say who an object is; the others are its measurements.
_IDENTITY = ("label", "source_id", "class", "class_name", "score")


def write_geojson(instances: Instances, path: PathLike, table: Table | None = None) -> None:
    """Write a FeatureCollection with a Polygon or MultiPolygon for each object.

    Parameters
    ----------
    instances : Instances
        Of a picture.
    path : file
    table : Table, optional
        Measurements of the same objects, in the same order.

    Raises
    ------
    GeometryError
        The objects are three-dimensional.
    """
    sums = sum_objects(instances.labels, len(instances))
    rows: list[dict[str, Any]] = [{} for _ in range(len(instances))] if table is None else list(table.rows())
    features = [
        _feature(instances, label, polygons, rows[label - 1])
        for label, polygons in trace_outlines(instances.labels, sums)
    ]
    spacing = [float(s) for s in instances.geometry.spacing[:2]]
    content = {
        "type": "FeatureCollection",
        "features": features,
        "pixel_size": {"x": spacing[0], "y": spacing[1], "unit": instances.unit},
    }
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


def _feature(
    instances: Instances, label: int, polygons: list[Polygon], row: dict[str, Any]
) -> dict[str, Any]:
    value = int(instances.classes[label - 1])
    colour = PALETTE[(value - 1) % len(PALETTE)].lstrip("#")
    properties: dict[str, Any] = {
        "objectType": "detection",
        "name": f"object {label}",
        "label": label,
        "classification": {
            "name": instances.class_name(value),
            "color": [int(colour[n : n + 2], 16) for n in (0, 2, 4)],
        },
        "measurements": {name: cell for name, cell in row.items() if _is_measurement(name, cell)},
    }
    score = float(instances.scores[label - 1])
    if math.isfinite(score):
        properties["measurements"]["score"] = score
    return {"type": "Feature", "id": label, "geometry": geometry_of(polygons), "properties": properties}


def geometry_of(polygons: list[Polygon]) -> dict[str, Any]:
    """Return a GeoJSON geometry: outer rings first, every ring closed."""
    shapes = [[_closed(each.outer), *(_closed(hole) for hole in each.holes)] for each in polygons]
    if len(shapes) == 1:
        return {"type": "Polygon", "coordinates": shapes[0]}
    return {"type": "MultiPolygon", "coordinates": shapes}


def _closed(ring: IntArray) -> list[list[int]]:
    points: list[list[int]] = ring.tolist()
    return [*points, points[0]]


def _is_measurement(name: str, value: Any) -> bool:
    return name not in _IDENTITY and isinstance(value, int | float) and math.isfinite(value)
