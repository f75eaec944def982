"""NIfTI headers in all their states."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from medseg.errors import GeometryError, ReadError
from medseg.geometry.affine import ras_to_lps
from medseg.io import read, write
from medseg.volume import Geometry, Volume

ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def save(path: Path, sform=None, qform=None, codes=(1, 0), array=ARRAY, unit="mm", change=None) -> Path:
    sform = np.eye(4) if sform is None and codes[0] else sform
    image = nibabel.Nifti1Image(array, None)
    header = image.header
    header.set_xyzt_units(unit)
    if qform is not None:
        header.set_qform(qform)
    if sform is not None:
        header.set_sform(sform)
    header["sform_code"], header["qform_code"] = codes
    if change:
        change(header)
    nibabel.save(image, path)
    return path


def diagonal(*spacing: float) -> np.ndarray:
    return np.diag([*spacing, 1.0])


def test_a_conflict_of_sform_and_qform_is_told_and_sform_wins(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", diagonal(1, 1, 2), diagonal(-1, -1, 2), (1, 1))
    volume = read(path)
    np.testing.assert_array_equal(volume.geometry.affine, diagonal(1, 1, 2))
    assert volume.notes == ("sform and qform put the image up to 4.47 apart: sform is used, qform ignored",)


@pytest.mark.parametrize(("codes", "expected"), [((1, 0), 3.0), ((0, 1), -3.0), ((2, 1), 3.0)])
def test_the_transform_with_a_code_is_used(tmp_path: Path, codes: tuple[int, int], expected: float) -> None:
    path = save(tmp_path / "a.nii.gz", diagonal(3, 1, 2), diagonal(-3, -1, 2), codes)
    volume = read(path)
    assert volume.geometry.affine[0, 0] == expected
    assert bool(volume.notes) == all(codes)


def test_a_header_without_any_transform_is_told(tmp_path: Path) -> None:
    volume = read(save(tmp_path / "a.nii.gz", codes=(0, 0)))
    assert volume.notes == ("neither sform nor qform is set: left, right and position are guessed",)


def test_pixdim_that_contradicts_the_sform_is_told(tmp_path: Path) -> None:
    def change(header) -> None:
        header["pixdim"][1:4] = (1.0, 1.0, 1.0)

    volume = read(save(tmp_path / "a.nii.gz", diagonal(1, 1, 2), change=change))
    assert volume.spacing == (1.0, 1.0, 2.0)
    assert "pixdim has [1.0, 1.0, 1.0]: sform is used" in volume.notes[0]


def test_the_spacing_is_what_itk_sees_to_the_last_bit(golden_dir: Path) -> None:
    files = sorted((golden_dir / "preprocess").glob("*/imagesTr/*.nii.gz"))
    assert files
    for file in files:
        assert read(file).spacing == SimpleITK.ReadImage(str(file)).GetSpacing()


def test_the_affine_is_what_itk_sees_in_the_other_frame(golden_dir: Path) -> None:
    for file in sorted((golden_dir / "preprocess" / "aniso_ct").glob("imagesTr/*.nii.gz")):
        image = SimpleITK.ReadImage(str(file))
        lps = np.eye(4)
        lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        lps[:3, 3] = image.GetOrigin()
        np.testing.assert_allclose(ras_to_lps(read(file).geometry.affine), lps, atol=1e-4)


def test_both_transforms_and_the_unit_are_written(tmp_path: Path) -> None:
    affine = diagonal(-0.5, 0.5, 3)
    affine[:3, 3] = (1, 2, 3)
    write(Volume(ARRAY, Geometry(ARRAY.shape, affine, "micron")), tmp_path / "a.nii.gz")
    header = nibabel.load(tmp_path / "a.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-6)
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-6)
    assert header.get_xyzt_units()[0] == "micron"
    assert (tmp_path / "a.nii.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_a_sheared_grid_is_written_in_the_sform_alone(tmp_path: Path) -> None:
    affine = diagonal(1, 1, 2)
    affine[0, 1] = 0.3
    write(Volume(ARRAY, Geometry(ARRAY.shape, affine)), tmp_path / "a.nii.gz")
    again = read(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(again.geometry.affine, affine, atol=1e-6)
    assert not again.notes


def test_metres_become_millimetres(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", diagonal(0.001, 0.001, 0.002), unit="meter")
    np.testing.assert_allclose(read(path).spacing, (1.0, 1.0, 2.0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 1, 5), (2, 3, 4, 5, 1)])
def test_a_trailing_axis_becomes_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    volume = read(save(tmp_path / "a.nii.gz", diagonal(1, 1, 2), array=array))
    assert volume.array.shape == (5, 2, 3, 4)
    np.testing.assert_array_equal(volume.array[3], array.reshape(2, 3, 4, 5)[..., 3])


def test_a_time_series_of_vectors_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", array=np.zeros((2, 3, 4, 2, 3), np.int16))
    with pytest.raises(ReadError, match=r"neither one volume nor a list of channels\. Split it"):
        read(path)


def test_a_2d_image_gets_nnunets_nominal_third_axis(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", diagonal(0.5, 0.8, 1), array=ARRAY[..., 0])
    volume = read(path)
    assert volume.shape == (2, 3, 1)
    np.testing.assert_allclose(volume.spacing, (0.5, 0.8, 999 * 0.8), rtol=1e-6)
    assert "2D image" in volume.notes[-1]


def test_rgb_voxels_become_three_channels(tmp_path: Path) -> None:
    colours = np.zeros((2, 3, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = 7
    volume = read(save(tmp_path / "a.nii.gz", array=colours))
    assert volume.channels == 3
    assert [int(channel.max()) for channel in volume.array] == [0, 7, 0]


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", array=ARRAY.astype(np.complex64))
    with pytest.raises(ReadError, match=r"holds complex numbers.*magnitude"):
        read(path)


def test_rescaled_integers_become_float32_and_the_others_stay(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(ARRAY, np.eye(4))
    nibabel.save(image, tmp_path / "plain.nii")
    image.header.set_slope_inter(2.0, -10.0)
    nibabel.save(nibabel.Nifti1Image(ARRAY * 2.0 - 10, np.eye(4), image.header), tmp_path / "scaled.nii")
    assert read(tmp_path / "plain.nii").array.dtype == np.int16
    scaled = read(tmp_path / "scaled.nii").array
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[0], ARRAY * 2.0 - 10, atol=0.01)


@pytest.mark.parametrize("lost", [1, 8, 40, 400])
def test_a_truncated_gzip_is_told_even_when_only_its_checksum_is_gone(tmp_path: Path, lost: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
    path = save(tmp_path / "a.nii.gz", array=noise)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ReadError, match=r"a\.nii\.gz: the file is truncated or damaged. Copy or download"):
        read(path)


def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_memory_is_asked(
    tmp_path: Path,
) -> None:
    def change(header) -> None:
        header["dim"][1:4] = (30000, 30000, 30000)

    image = nibabel.Nifti1Image(ARRAY, np.eye(4))
    content = bytearray(image.to_bytes())
    change(image.header)
    content[40:56] = image.header["dim"].tobytes()
    for name, data in (("a.nii", bytes(content)), ("a.nii.gz", gzip.compress(bytes(content)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ReadError, match="promises"):
            read(tmp_path / name)


def test_an_uncompressed_file_called_gz_is_read_by_its_content(tmp_path: Path) -> None:
    save(tmp_path / "a.nii")
    (tmp_path / "a.nii").rename(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "b.nii.gz").array[0], ARRAY)


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(ARRAY, diagonal(1, 2, 3)), tmp_path / "a.nii.gz")
    assert read(tmp_path / "a.nii.gz").spacing == (1.0, 2.0, 3.0)


def test_big_endian_files_are_read_in_native_order(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(ARRAY, np.eye(4), header.as_byteswapped(">"))
    nibabel.save(image, tmp_path / "a.nii")
    array = read(tmp_path / "a.nii").array
    assert array.dtype.isnative
    np.testing.assert_array_equal(array[0], ARRAY)


def test_a_degenerate_affine_names_the_file(tmp_path: Path) -> None:
    flat = diagonal(1, 1, 1)
    flat[:3, 2] = 0
    with pytest.raises(GeometryError, match=r"a\.nii\.gz: affine: its axes are degenerate"):
        read(save(tmp_path / "a.nii.gz", flat))


def test_real_images_keep_type_grid_and_values_when_written_again(data_dir: Path, tmp_path: Path) -> None:
    names = [
        "hippocampus/images/hippocampus_001.nii.gz",
        "nuclei3d_ovules/labels/ovule_1135.nii.gz",
        "ms_lesion/patient19/GOLD_STANDARD.nii.gz",
        "ct_organs/example_ct.nii.gz",
    ]
    for name in names:
        volume = read(data_dir / name)
        write(volume, tmp_path / "again.nii.gz")
        again = read(tmp_path / "again.nii.gz")
        assert again.array.dtype == volume.array.dtype
        np.testing.assert_array_equal(again.array, volume.array)
        assert again.geometry.matches(volume.geometry, 1e-6)
        assert again.spacing == volume.spacing


def test_micrometre_data_keeps_its_unit(data_dir: Path) -> None:
    volume = read(data_dir / "nuclei3d_ovules" / "images" / "ovule_1135.nii.gz")
    assert volume.geometry.unit == "micron"
    np.testing.assert_allclose(volume.spacing, (0.1268, 0.1268, 0.2837), atol=1e-4)


def test_a_qform_alone_is_used(data_dir: Path) -> None:
    volume = read(data_dir / "ms_lesion" / "patient19" / "FLAIR.nii.gz")
    reference = nibabel.load(data_dir / "ms_lesion" / "patient19" / "FLAIR.nii.gz")
    np.testing.assert_allclose(volume.geometry.affine, reference.affine)
    assert not volume.notes
