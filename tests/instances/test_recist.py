"""Diameters against formulas, and against all pairs of points."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from medseg.instances.recist import acquisition_axis, measure_diameters
from medseg.instances.sums import sum_objects
from medseg.types import BoolArray, FloatArray
from tests.instances.shapes import ellipse
from tests.phantoms import affine

PIXEL = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def points_of(pixels: BoolArray, centres: bool) -> FloatArray:
    found = np.argwhere(pixels)
    corners = found if centres else (found[:, None] + PIXEL).reshape(-1, 2)
    return np.unique(corners, axis=0).astype(float)


def brute_force(mask: BoolArray, frame: FloatArray, centres: bool) -> tuple[float, int, FloatArray]:
    """Return the longest distance of two points of a slice, its slice and its ends; mask (s, a, b)."""
    best, at, ends = -1.0, 0, np.zeros((2, 2))
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        points = points_of(mask[index], centres)
        distances = np.linalg.norm((points[:, None] - points[None]) @ frame.T, axis=-1)
        if distances.max() > best * (1 + 1e-9):
            best, at = float(distances.max()), int(index)
            ends = points[np.argwhere(distances >= best * (1 - 1e-9))[0]]
    return best, at, ends


@pytest.mark.parametrize("degrees", range(0, 180, 15))
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.6, 1.1)])
def test_diameters_of_an_ellipse_are_its_axes_within_a_pixel(
    degrees: int, spacing: tuple[float, float]
) -> None:
    found = ellipse((90, 90), spacing, (40.0, 22.0), degrees)
    sums = sum_objects(found.labels, 1)
    for centres in (False, True):
        diameters = measure_diameters(found.labels, sums, np.diag(spacing), centres=centres)
        pixel = float(np.hypot(*spacing))
        assert abs(diameters.longest[0] - 40) <= pixel
        assert abs(diameters.across[0] - 22) <= pixel
        inside = measure_diameters(found.labels, sums, np.diag(spacing), centres=centres, inside=True)
        assert abs(inside.longest[0] - 40) <= pixel
        assert abs(inside.across[0] - 22) <= pixel


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(0.05, 0.6))
def test_diameters_are_those_of_all_pairs_with_the_same_ties(seed: int, centres: bool, part: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 7, 6)) < part
    mask[1, 2, 3] = True
    shear = rng.choice([0.0, 0.3])
    steps = np.array([[0.0, rng.choice([1.0, 1.4]), shear], [0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    labels = mask.astype(np.int32)
    found = measure_diameters(labels, sum_objects(labels, 1), steps, axis=0, centres=centres)
    frame = steps[:2, 1:]
    longest, at, ends = brute_force(mask, frame, centres)
    assert found.longest[0] == pytest.approx(longest)
    assert found.slice_index[0] == at
    np.testing.assert_allclose(found.ends[0, :2, 1:], ends - (0.0 if centres else 0.5))
    long, across = (steps @ (found.ends[0, a + 1] - found.ends[0, a]) for a in (0, 2))
    assert np.linalg.norm(across) == pytest.approx(found.across[0], abs=1e-9)
    assert abs(long @ across) < 1e-8


def test_a_single_pixel_measures_its_diagonal_or_nothing_between_centres() -> None:
    labels = np.zeros((3, 3, 3), np.int32)
    labels[1, 1, 1] = 1
    sums, steps = sum_objects(labels, 1), np.diag([3.0, 4.0, 9.0])
    corners = measure_diameters(labels, sums, steps)
    assert (corners.longest[0], corners.across[0]) == (5.0, pytest.approx(3.75))
    centres = measure_diameters(labels, sums, steps, centres=True)
    assert (centres.longest[0], centres.across[0]) == (0.0, 0.0)


def test_the_slice_is_the_one_with_the_longest_diameter_and_of_equal_ones_the_lower() -> None:
    labels = np.zeros((9, 9, 5), np.int32)
    labels[2:4, 2:4, :] = 1
    labels[2:8, 2, 2:4] = 1
    found = measure_diameters(labels, sum_objects(labels, 1), np.eye(3))
    assert found.slice_index[0] == 2
    assert found.ends[0, :2].tolist() == [[1.5, 3.5, 2.0], [7.5, 1.5, 2.0]]


def test_a_diameter_inside_a_bent_lesion_does_not_cross_the_gap() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[2:18, 2:5] = labels[2:18, 15:18] = labels[2:5, 2:18] = 1
    sums = sum_objects(labels, 1)
    across = measure_diameters(labels, sums, np.eye(2))
    inside = measure_diameters(labels, sums, np.eye(2), inside=True)
    assert across.longest[0] == pytest.approx(np.hypot(16, 16))
    assert np.hypot(16, 3) <= inside.longest[0] < 17
    assert inside.across[0] < 17


def test_slices_are_axial_wherever_the_array_has_that_axis() -> None:
    assert [acquisition_axis(affine(codes)) for codes in ("RAS", "SRA", "LSP", "PIR")] == [2, 0, 1, 1]
