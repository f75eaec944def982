"""Outlines as a zip of ImageJ ROIs, which the ROI Manager of ImageJ and Fiji opens.

The format is that of ImageJ's ``RoiEncoder`` (ij.io, version 1.54): 64 bytes of header, big-endian, and
coordinates. An object of one piece without holes is a *traced* polygon, whose corners are corners of pixels;
any other is a *composite*, a path of floats.
"""

import io
import struct
import zipfile

import numpy as np

from medseg.errors import GeometryError
from medseg.files import atomic_path
from medseg.instances.outlines import Polygon, trace_outlines
from medseg.instances.schema import Instances
from medseg.instances.sums import sum_objects
from medseg.types import IntArray, PathLike

_VERSION = 227
_RECTANGLE, _TRACED = 1, 8
_MOVE, _LINE, _CLOSE = 0.0, 1.0, 4.0  # java.awt.geom.PathIterator
# ImageJ reads two bytes as a number from -5000 to 60535 (ij.io.RoiDecoder, getShort).
_LARGEST = 60535
_STAMP = (1980, 1, 1, 0, 0, 0)


def write_rois(instances: Instances, path: PathLike) -> None:
    """Write a zip with a ROI for each object, named by its label and class (``0001-nucleus.roi``).

    Raises
    ------
    GeometryError
        The objects are three-dimensional, or the picture is larger than ImageJ's ROIs reach.
    """
    if max(instances.labels.shape) > _LARGEST:
        raise GeometryError(
            f"{path}: the picture has {max(instances.labels.shape)} pixels along an axis, ImageJ's ROIs end "
            f"at {_LARGEST}. Write GeoJSON, or cut the picture."
        )
    sums = sum_objects(instances.labels, len(instances))
    width = max(4, len(str(len(instances))))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for label, polygons in trace_outlines(instances.labels, sums):
            name = "".join(c if c.isalnum() or c in " -_." else "_" for c in _class_of(instances, label))
            entry = zipfile.ZipInfo(f"{label:0{width}d}-{name}.roi", _STAMP)
            archive.writestr(entry, encode_roi(polygons), zipfile.ZIP_DEFLATED)
    with atomic_path(path) as temporary:
        temporary.write_bytes(stream.getvalue())


def _class_of(instances: Instances, label: int) -> str:
    return instances.class_name(int(instances.classes[label - 1]))


def encode_roi(polygons: list[Polygon]) -> bytes:
    """Return the bytes of one ROI."""
    points = np.concatenate([each.outer for each in polygons])
    low, high = points.min(axis=0), points.max(axis=0)
    if len(polygons) == 1 and not polygons[0].holes and len(points) <= 65535:
        relative = (points - low).astype(">u2")
        return _header(_TRACED, low, high, len(points), 0) + bytes(relative.T.tobytes())
    rings = [ring for each in polygons for ring in (each.outer, *each.holes)]
    floats = [value for ring in rings for value in _path(ring)]
    return _header(_RECTANGLE, low, high, 0, len(floats)) + bytes(np.array(floats, ">f4").tobytes())


def _path(ring: IntArray) -> list[float]:
    steps = [_MOVE] + [_LINE] * (len(ring) - 1)
    points = [float(value) for step, (x, y) in zip(steps, ring, strict=True) for value in (step, x, y)]
    return [*points, _CLOSE]


def _header(kind: int, low: IntArray, high: IntArray, corners: int, floats: int) -> bytes:
    """Return the header; offsets as in RoiDecoder: box at 8, corners at 16, length of a path at 36."""
    box = [int(v) & 0xFFFF for v in (low[1], low[0], high[1], high[0])]  # top, left, bottom, right
    start = struct.pack(">4sHBx4HH", b"Iout", _VERSION, kind, *box, corners)
    return start + bytes(18) + struct.pack(">i", floats) + bytes(24)
