"""NRRD and MetaImage: LPS turned to RAS, hostile headers refused."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medseg.errors import MedsegError, ReadError
from medseg.io import read, write
from medseg.volume import Geometry, Volume

NRRD = """NRRD0004
type: uint8
dimension: 3
space: {space}
sizes: {sizes}
space directions: {directions}
space origin: (10,20,30)
encoding: raw
{more}
"""


def nrrd(path: Path, space="left-posterior-superior", sizes="2 3 4", directions=None, more="") -> Path:
    directions = directions or "(1,0,0) (0,2,0) (0,0,3)"
    text = NRRD.format(space=space, sizes=sizes, directions=directions, more=more).rstrip("\n")
    path.write_bytes(text.encode() + b"\n\n" + bytes(range(24)))
    return path


def test_lps_becomes_ras(tmp_path: Path) -> None:
    volume = read(nrrd(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(np.diag(volume.geometry.affine), [-1, -2, 3, 1])
    np.testing.assert_array_equal(volume.geometry.affine[:3, 3], [-10, -20, 30])
    # i runs fastest in the file.
    assert volume.array[0, :, 0, 0].tolist() == [0, 1]
    assert volume.array[0, 0, :, 0].tolist() == [0, 2, 4]
    assert volume.array[0, 0, 0, :].tolist() == [0, 6, 12, 18]


def test_a_nrrd_in_ras_stays_ras(tmp_path: Path) -> None:
    volume = read(nrrd(tmp_path / "a.nrrd", space="right-anterior-superior"))
    np.testing.assert_array_equal(volume.geometry.affine[:3, 3], [10, 20, 30])


def test_space_units_of_nrrd_are_understood(tmp_path: Path) -> None:
    path = nrrd(tmp_path / "a.nrrd", more='space units: "um" "um" "um"')
    assert read(path).geometry.unit == "micron"


def test_the_same_image_as_nifti_and_as_nrrd_lies_at_the_same_place(data_dir: Path, tmp_path: Path) -> None:
    file = data_dir / "brain_tumour_mr" / "brain1_image.nrrd"
    volume = read(file)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)), str(tmp_path / "itk.nii.gz"))
    through_nifti = read(tmp_path / "itk.nii.gz")
    np.testing.assert_array_equal(volume.array, through_nifti.array)
    assert volume.geometry.matches(through_nifti.geometry)
    assert volume.array.dtype == np.int16
    assert volume.spacing == through_nifti.spacing  # ITK's own differs in the last bit of a norm
    assert volume.spacing == pytest.approx(SimpleITK.ReadImage(str(file)).GetSpacing(), rel=1e-12)


def test_a_real_nrrd_survives_writing(data_dir: Path, tmp_path: Path) -> None:
    for name in ("brain1_image.nrrd", "brain1_label.nrrd"):
        volume = read(data_dir / "brain_tumour_mr" / name)
        write(volume, tmp_path / name)
        again = read(tmp_path / name)
        np.testing.assert_array_equal(again.array, volume.array)
        assert again.geometry.matches(volume.geometry, 1e-9)


def test_a_2d_image_gets_a_nominal_third_axis(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.arange(6, dtype=np.uint8).reshape(3, 2))
    image.SetSpacing((0.5, 0.25))
    SimpleITK.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read(tmp_path / "a.mha")
    assert volume.shape == (2, 3, 1)
    assert volume.spacing == (0.5, 0.25, 999 * 0.5)


def test_four_axes_and_vectors_both_become_channels(tmp_path: Path) -> None:
    array = np.arange(48, dtype=np.uint8).reshape(2, 4, 3, 2)  # (t, k, j, i)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=False), str(tmp_path / "four.nrrd"))
    vector = SimpleITK.GetImageFromArray(np.moveaxis(array, 0, -1), isVector=True)
    SimpleITK.WriteImage(vector, str(tmp_path / "vector.mha"))
    for name in ("four.nrrd", "vector.mha"):
        volume = read(tmp_path / name)
        assert volume.array.shape == (2, 2, 3, 4)
        np.testing.assert_array_equal(volume.array, array.transpose(0, 3, 2, 1))


def test_a_header_with_its_data_beside_it_is_read(tmp_path: Path) -> None:
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)), str(tmp_path / "a.mhd")
    )
    assert (tmp_path / "a.raw").is_file()
    assert read(tmp_path / "a.mhd").array.max() == 23
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ReadError, match=r"its data file a\.raw is missing. Copy both files together"):
        read(tmp_path / "a.mhd")


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret.raw"])
def test_a_header_that_points_out_of_its_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(24))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.nhdr").write_text(
        NRRD.format(
            space="left-posterior-superior",
            sizes="2 3 4",
            directions="(1,0,0) (0,1,0) (0,0,1)",
            more=f"data file: {target}",
        )
    )
    (folder / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\n"
        f"ElementDataFile = {target}\n"
    )
    for name in ("a.nhdr", "a.mhd"):
        with pytest.raises(ReadError, match="outside its folder"):
            read(folder / name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": "60000 60000 60000"},
        {"sizes": "0 3 4"},
        {"sizes": "-2 3 4"},
        {"directions": "(0,0,0) (0,2,0) (0,0,3)"},
        {"directions": "(1,0,0) (1,0,0) (0,0,3)"},
        {"directions": "(nan,0,0) (0,2,0) (0,0,3)"},
        {"sizes": "2 3"},
    ],
)
def test_hostile_headers_are_refused_with_the_name_of_the_file(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(MedsegError, match=r"a\.nrrd"):
        read(nrrd(tmp_path / "a.nrrd", **wrong))


def test_a_sheared_nrrd_keeps_its_shear(tmp_path: Path) -> None:
    volume = read(nrrd(tmp_path / "a.nrrd", directions="(1,0,0) (0.6,2,0) (0,0,3)"))
    np.testing.assert_allclose(volume.geometry.affine[:3, 1], [-0.6, -2, 0])


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros((2, 3, 4), np.complex64))
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(ReadError, match=r"a\.nrrd: holds complex numbers"):
        read(tmp_path / "a.nrrd")


def test_writing_a_header_suffix_makes_one_file_that_itk_reads(tmp_path: Path) -> None:
    volume = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), Geometry((2, 3, 4), np.eye(4)))
    for name in ("a.mhd", "a.nhdr"):
        write(volume, tmp_path / name)
        assert SimpleITK.ReadImage(str(tmp_path / name)).GetSize() == (2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mhd", "a.nhdr"]
