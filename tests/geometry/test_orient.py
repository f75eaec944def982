"""Turning a grid to RAS and back moves voxels, and neither changes nor misplaces one."""

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from medseg.geometry.orient import axis_codes, from_ras, to_ras
from medseg.volume import Geometry, Volume


def oblique(codes, shape=(5, 6, 7)):
    """Numbered voxels on an oblique, anisotropic grid whose axes run to `codes`."""
    angle = 0.4
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, :3] = affine[:3, :3] @ np.diag([0.8, 1.1, 2.5])
    affine[:3, 3] = (-3, 4, 5)
    image = nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    return Volume(np.asarray(image.dataobj), Geometry(image.shape, image.affine))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ASL"])
def test_every_orientation_becomes_the_same_image_and_comes_back(codes):
    turned, there = oblique(codes), oblique("RAS")
    ras = to_ras(turned)
    assert axis_codes(turned.geometry.affine) == codes and axis_codes(ras.geometry.affine) == "RAS"
    assert np.array_equal(ras.array, there.array)
    assert np.allclose(ras.geometry.affine, there.geometry.affine)
    back = from_ras(ras, turned.geometry)
    assert np.array_equal(back.array, turned.array) and back.geometry == turned.geometry
