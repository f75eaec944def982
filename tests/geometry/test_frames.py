"""World frames and axis directions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes
from numpy.testing import assert_allclose
from scipy.spatial.transform import Rotation

from medseg.geometry.affine import lps_to_ras, ras_to_lps
from medseg.geometry.orient import axis_codes, is_orthonormal, skew
from medseg.volume import Geometry


def random_affine(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() * rng.uniform(0.3, 5, 3) * rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.normal(size=3) * 100
    return affine


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_ras_to_lps_and_back_is_the_identity(seed: int) -> None:
    affine = random_affine(seed)
    assert_allclose(lps_to_ras(ras_to_lps(affine)), affine)
    assert_allclose((ras_to_lps(affine) @ [1, 2, 3, 1])[:2], -(affine @ [1, 2, 3, 1])[:2])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_axis_codes_use_each_world_axis_once(seed: int) -> None:
    codes = axis_codes(random_affine(seed))
    world = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}
    assert sorted(world[code] for code in codes) == ["x", "y", "z"]


def test_axis_codes_of_clear_orientations_equal_nibabel() -> None:
    for flips in np.ndindex(2, 2, 2):
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]):
            affine = np.eye(4)
            affine[:3, :3] = np.diag([1 - 2 * f for f in flips])[:, order] * [1, 2, 3]
            assert axis_codes(affine) == "".join(aff2axcodes(affine))


def test_a_sheared_grid_is_not_orthonormal() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    assert is_orthonormal(random_affine(5))
    assert not is_orthonormal(sheared)
    assert 0.09 < skew(sheared) < 0.11


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_spacing_of_an_oblique_grid_is_exactly_the_one_of_its_header(seed: int) -> None:
    rng = np.random.default_rng(seed)
    header = rng.choice([0.7, 0.9, 1.5, 2.5, 5.0], 3).astype(np.float32).astype(np.float64)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() * header
    assert Geometry((2, 2, 2), affine).spacing == tuple(header)
