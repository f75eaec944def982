"""A grid and its voxels cannot disagree, and MONAI gets all of both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import GeometryError
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES

DTYPES = ("uint8", "uint16", "int16", "int32", "int64", "float32", "float64")


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    channels=st.integers(1, 3),
    grid=st.sampled_from(sorted(GEOMETRIES)),
    unit=st.sampled_from(("mm", "micron")),
    seed=st.integers(0, 99),
)
def test_a_metatensor_and_back_is_lossless(dtype, channels, grid, unit, seed) -> None:
    affine = GEOMETRIES[grid].affine.copy()
    affine[:3] += 1e-9  # lost in float32
    geometry = Geometry(GEOMETRIES[grid].shape, affine, unit)
    values = np.random.default_rng(seed).normal(0, 50, (channels, *geometry.shape)).astype(dtype)
    for array in (values, values[..., ::-1]):  # a view with negative strides too
        array.flags.writeable = False
        volume = Volume(array, geometry)
        back = Volume.from_metatensor(volume.to_metatensor())
        assert back.geometry == volume.geometry
        assert back.array.dtype == volume.array.dtype
        np.testing.assert_array_equal(back.array, volume.array)


def test_a_metatensor_of_monai_is_in_millimetres() -> None:
    import torch
    from monai.data import MetaTensor

    volume = Volume.from_metatensor(MetaTensor(torch.zeros(2, 3, 4, 5), affine=torch.eye(4)))
    assert (volume.channels, volume.shape, volume.geometry.unit) == (2, (3, 4, 5), "mm")


def test_an_array_that_does_not_fit_its_grid_is_refused() -> None:
    grid = Geometry((2, 3, 4), np.eye(4))
    assert Volume(np.zeros((2, 3, 4)), grid).array.shape == (1, 2, 3, 4)
    for shape in ((2, 3, 5), (1, 4, 3, 2), (2, 3), (0, 2, 3, 4)):
        with pytest.raises(GeometryError):
            Volume(np.zeros(shape), grid)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_an_affine_without_volume_is_refused(affine) -> None:
    with pytest.raises(GeometryError, match="affine"):
        Geometry((2, 2, 2), affine)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_grid_matches_itself_and_no_shifted_one(name: str) -> None:
    grid = GEOMETRIES[name]
    moved = grid.affine.copy()
    moved[:3, 3] += 0.01 * np.array(grid.spacing)
    assert grid.matches(grid) and not grid.matches(Geometry(grid.shape, moved))
    assert np.prod(grid.spacing) == pytest.approx(grid.voxel_volume)
