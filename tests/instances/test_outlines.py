"""Outlines hold exactly the pixels of their object."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageDraw

from medseg.errors import GeometryError
from medseg.instances.outlines import Polygon, trace_outlines
from medseg.instances.sums import sum_objects
from medseg.types import BoolArray


def painted(polygons: list[Polygon], shape: tuple[int, int]) -> BoolArray:
    """Return the pixels inside polygons, painted by another program at four times the size."""
    picture = Image.new("1", (shape[0] * 4, shape[1] * 4))
    draw = ImageDraw.Draw(picture)
    for polygon in polygons:
        draw.polygon([(4 * x, 4 * y) for x, y in polygon.outer.tolist()], fill=1)
        for hole in polygon.holes:
            draw.polygon([(4 * x, 4 * y) for x, y in hole.tolist()], fill=0)
    return np.asarray(picture)[2::4, 2::4].T


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 0.95))
def test_polygons_hold_exactly_the_pixels_and_no_ring_meets_itself(seed: int, part: float) -> None:
    mask = np.random.default_rng(seed).random((7, 9)) < part
    mask[3, 4] = True
    labels = mask.astype(np.int32)
    (label, polygons), *others = trace_outlines(labels, sum_objects(labels, 1))
    assert (label, others) == (1, [])
    assert sum(polygon.area for polygon in polygons) == mask.sum()
    assert (painted(polygons, (7, 9)) == mask).all()
    for polygon in polygons:
        assert polygon.area > 0
        for ring in (polygon.outer, *polygon.holes):
            assert len({tuple(point) for point in ring.tolist()}) == len(ring)


def test_an_island_in_a_hole_is_a_polygon_of_its_own() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[1:8, 1:8], labels[3:6, 3:6], labels[4, 4] = 1, 0, 1
    polygons = next(trace_outlines(labels, sum_objects(labels, 1)))[1]
    assert [(polygon.area, len(polygon.holes)) for polygon in polygons] == [(40, 1), (1, 0)]


def test_volumes_have_no_outlines() -> None:
    labels = np.ones((2, 2, 2), np.int32)
    with pytest.raises(GeometryError, match="one slice"):
        next(trace_outlines(labels, sum_objects(labels, 1)))
