"""Every format keeps what it is given, and every broken file gives one clear error."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.errors import GeometryError, MedsegError, ReadError
from medseg.io import READERS, WRITERS, read, write
from medseg.io.formats import is_image, stem_of, suffix_of
from medseg.io.microscopy import read_picture, read_tiff
from medseg.volume import Geometry, Volume

PICTURES = [suffix for suffix, reader in READERS.items() if reader is read_picture]
PLAIN = [suffix for suffix, reader in READERS.items() if reader in (read_picture, read_tiff)]
ORIENTED = [suffix for suffix in WRITERS if suffix not in PLAIN]


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = [i for i in range(3) if i != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = result @ turn
    return result


@st.composite
def affines(draw) -> np.ndarray:
    affine = np.eye(4)
    spacing = draw(st.tuples(*[st.floats(0.05, 20)] * 3))
    flips = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    turned = rotation(draw(st.tuples(*[st.floats(-3.1, 3.1)] * 3)))
    affine[:3, :3] = (turned[:, draw(st.permutations([0, 1, 2]))] * flips) * spacing
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    return affine


def volume_for(suffix: str, channels: int = 1, dtype: str = "uint8") -> Volume:
    """An image that the format can hold: a picture has one slice, TIFF and PNG no direction."""
    rng = np.random.default_rng(3)
    shape = (5, 4, 1 if suffix in PICTURES else 3)
    array = rng.integers(0, 200, (channels, *shape)).astype(dtype)
    affine = np.diag([1.0, 1.0, 999.0, 1.0]) if suffix in PICTURES else np.diag([0.5, 0.75, 2.5, 1.0])
    if suffix in ORIENTED:
        affine[:3, :3] = rotation((0.3, -0.2, 0.1)) @ affine[:3, :3]
        affine[:3, 3] = (-12.5, 30.25, 100.0)
    return Volume(array, Geometry(shape, affine))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_written_volume_is_read_back_with_values_type_and_grid(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(suffix)
    write(volume, tmp_path / f"image{suffix}")
    again = read(tmp_path / f"image{suffix}")
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.array.dtype == volume.array.dtype
    assert again.geometry.matches(volume.geometry, 1e-5)
    np.testing.assert_allclose(again.spacing, volume.spacing, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [f"image{suffix}"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_channels_come_back_in_order(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(suffix, channels=3)
    write(volume, tmp_path / f"image{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"image{suffix}").array, volume.array)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_the_data_type_is_kept(suffix: str, dtype: str, tmp_path: Path) -> None:
    volume = volume_for(suffix, dtype=dtype)
    write(volume, tmp_path / f"image{suffix}")
    again = read(tmp_path / f"image{suffix}")
    assert again.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(again.array, volume.array)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_boolean_mask_is_stored_as_uint8(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(suffix)
    write(volume.with_array(volume.array > 100), tmp_path / f"mask{suffix}")
    again = read(tmp_path / f"mask{suffix}")
    assert again.array.dtype == np.uint8
    np.testing.assert_array_equal(again.array, volume.array > 100)


@pytest.mark.parametrize("suffix", [s for s in WRITERS if s not in PICTURES])
def test_micrometres_stay_micrometres(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(suffix)
    geometry = Geometry(volume.shape, volume.geometry.affine, "micron")
    write(Volume(volume.array, geometry), tmp_path / f"cells{suffix}")
    again = read(tmp_path / f"cells{suffix}")
    assert again.geometry.unit == "micron"
    np.testing.assert_allclose(again.spacing, volume.spacing, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@given(affine=affines(), shape=st.tuples(*[st.integers(1, 6)] * 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_right_angled_grid_survives(
    suffix: str, affine: np.ndarray, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    geometry = Geometry(shape, affine)
    write(Volume(np.zeros(shape, np.uint8), geometry), tmp_path / f"grid{suffix}")
    again = read(tmp_path / f"grid{suffix}")
    assert again.shape == shape
    # float32 in a NIfTI header: 6e-8 of the largest coordinate.
    np.testing.assert_allclose(again.geometry.affine, affine, atol=1e-4, rtol=1e-5)
    assert not again.notes


@given(array=arrays(np.int16, (2, 3, 4), elements=st.integers(-32768, 32767)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_writing_twice_changes_nothing(array: np.ndarray, tmp_path: Path) -> None:
    first = Volume(array, Geometry((2, 3, 4), np.diag([0.7, 0.7, 5.0, 1.0])))
    write(first, tmp_path / "a.nii.gz")
    second = read(tmp_path / "a.nii.gz")
    write(second, tmp_path / "b.nii.gz")
    third = read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(third.array[0], array)
    assert third.geometry == second.geometry


@pytest.mark.parametrize("suffix", READERS)
def test_a_missing_file_is_said_so(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"absent.*no such file\. Check the path"):
        read(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("suffix", READERS)
def test_an_empty_file_is_said_so(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(ReadError, match=r"empty.*the file is empty"):
        read(tmp_path / f"empty{suffix}")


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_of_something_else_is_one_sentence_with_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"letter{suffix}"
    path.write_bytes(b"Dear colleague, the image is attached.\n" * 20)
    with pytest.raises(ReadError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_truncated_file_is_an_error(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(suffix)
    path = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (1, 64, 64, volume.shape[2])).astype(np.uint8)
    write(Volume(noise, Geometry(noise.shape[1:], volume.geometry.affine)), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(MedsegError, match="image"):
        read(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_bytes_never_raise_anything_but_medseg_errors(suffix: str, tmp_path: Path) -> None:
    write(volume_for(suffix), tmp_path / f"good{suffix}")
    content = (tmp_path / f"good{suffix}").read_bytes()
    rng = np.random.default_rng(8)
    path = tmp_path / f"bad{suffix}"
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(damaged), 400), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read(path)
        except MedsegError as error:
            assert "bad" in str(error)


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"does not read this format. Known suffixes: \.nii\.gz"):
        read(tmp_path / "image.xyz")
    with pytest.raises(ReadError, match="does not write this format"):
        write(volume_for(".nii.gz"), tmp_path / "image.jpg")


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(
        ReadError, match=r"is a folder; expected one image file\. DICOM series come in a later"
    ):
        read(tmp_path)


def test_dicom_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "slice.dcm").write_bytes(b"x")
    with pytest.raises(ReadError, match=r"DICOM series comes in a later release.*dcm2niix"):
        read(tmp_path / "slice.dcm")


@pytest.mark.parametrize("suffix", [suffix for suffix in PLAIN if suffix in WRITERS])
def test_a_format_without_directions_refuses_a_rotated_grid(suffix: str, tmp_path: Path) -> None:
    volume = volume_for(".nii.gz")
    with pytest.raises(GeometryError, match="cannot hold this image's position"):
        write(volume, tmp_path / f"image{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write(volume_for(".png"), path)
    before = path.read_bytes()
    with pytest.raises(GeometryError, match=r"image\.png: a picture holds one slice of uint8"):
        write(volume_for(".png", channels=2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_suffixes_are_the_longest_known_and_ignore_case() -> None:
    assert suffix_of("A/B.C.NII.GZ") == ".nii.gz"
    assert stem_of("A/B.C.NII.GZ") == "B.C"
    assert suffix_of("notes.txt") == ""
    assert stem_of("notes.txt") == "notes"


def test_hidden_twins_of_macos_are_no_images(tmp_path: Path) -> None:
    for name in ("._a.nii.gz", "a.nii.gz", "b.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_image(path)] == ["a.nii.gz"]


def test_importing_the_tables_loads_no_imaging_library() -> None:
    code = (
        "import sys, medseg.io; "
        "print(sorted({'nibabel', 'SimpleITK', 'tifffile', 'PIL', 'torch', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
