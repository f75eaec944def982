"""TIFF stacks with their voxel sizes, and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import GeometryError, ReadError
from medseg.io import read, write
from medseg.io.microscopy import UNKNOWN_SPACING_NOTE, UNKNOWN_UNIT_NOTE
from medseg.volume import Geometry, Volume

STACK = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)  # (z, y, x)


def test_pages_are_reversed_to_x_y_z(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    volume = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(volume.array[0], STACK.transpose(2, 1, 0))
    assert volume.spacing == (1.0, 1.0, 1.0)
    assert volume.notes == ("the TIFF does not tell its voxel size: 1 is assumed",)


def test_the_real_stardist_stack_is_read(data_dir: Path) -> None:
    image = read(data_dir / "nuclei3d_stardist" / "img3d.tif")
    mask = read(data_dir / "nuclei3d_stardist" / "mask3d.tif")
    assert image.shape == mask.shape == (57, 61, 31)
    assert len(np.unique(mask.array)) == 52


@pytest.mark.parametrize("name", ["case.tif", "case_0000.tif"])
def test_nnunets_sidecar_tells_the_voxel_size(tmp_path: Path, name: str) -> None:
    tifffile.imwrite(tmp_path / name, STACK, photometric="minisblack")
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [3.0, 2.0, 1.0]}))
    volume = read(tmp_path / name)
    assert volume.spacing == (1.0, 2.0, 3.0)
    assert not volume.notes


@pytest.mark.parametrize("text", ['{"spacing": [1, 2]}', '{"voxel": 1}', "[", '{"spacing": [0, 1, 1]}'])
def test_a_wrong_sidecar_is_named(tmp_path: Path, text: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ReadError, match=r"a\.json.*Mend it"):
        read(tmp_path / "a.tif")


def test_imagej_metadata_tell_size_and_unit(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        STACK,
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"axes": "ZYX", "spacing": 1.5, "unit": "um"},
    )
    volume = read(tmp_path / "a.tif")
    assert volume.spacing == (0.25, 0.5, 1.5)
    assert volume.geometry.unit == "micron"


def test_imagej_frames_without_slices_are_taken_for_slices_aloud(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, metadata={"axes": "TYX"})
    volume = read(tmp_path / "a.tif")
    assert volume.shape == (4, 3, 2)
    assert any("taken for slices" in note for note in volume.notes)


def test_a_time_series_of_stacks_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([STACK, STACK]), imagej=True, metadata={"axes": "TZYX"})
    with pytest.raises(ReadError, match="Save each time point or position as a file of its own"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("unit", "expected", "scale"), [("µm", "micron", 1.0), ("nm", "micron", 1e-3), ("mm", "mm", 1.0)]
)
def test_ome_metadata_tell_size_and_unit(tmp_path: Path, unit: str, expected: str, scale: float) -> None:
    sizes = {"PhysicalSizeX": 1 / 3, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 0.7}
    units = {f"{key}Unit": unit for key in sizes}
    tifffile.imwrite(
        tmp_path / "a.ome.tif", STACK, photometric="minisblack", metadata={"axes": "ZYX", **sizes, **units}
    )
    volume = read(tmp_path / "a.ome.tif")
    assert volume.geometry.unit == expected
    np.testing.assert_allclose(volume.spacing, np.array([1 / 3, 0.2, 0.7]) * scale, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_a_tiff_keeps_size_unit_and_type_exactly(tmp_path: Path, dtype: str) -> None:
    geometry = Geometry((4, 3, 2), np.diag([0.1234567890123, 1 / 3, 2.0, 1.0]), "micron")
    volume = Volume(np.stack([STACK.transpose(2, 1, 0)] * 2).astype(dtype), geometry)
    write(volume, tmp_path / "a.tif")
    again = read(tmp_path / "a.tif")
    assert again.geometry == geometry
    assert again.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(again.array, volume.array)


def test_a_tiff_states_no_size_that_nobody_gave(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    write(read(tmp_path / "a.tif"), tmp_path / "b.tif")
    again = read(tmp_path / "b.tif")
    assert UNKNOWN_SPACING_NOTE in again.notes and again.spacing == (1.0, 1.0, 1.0)
    flat = Volume(
        np.zeros((4, 3, 1), np.uint8), Geometry((4, 3, 1), np.diag([0.5, 0.5, 499.5, 1.0]), "micron")
    )
    write(flat, tmp_path / "flat.tif")
    with tifffile.TiffFile(tmp_path / "flat.tif") as tiff:
        header = tiff.ome_metadata or ""
    assert 'PhysicalSizeX="0.5"' in header and "PhysicalSizeZ" not in header
    assert read(tmp_path / "flat.tif").geometry == flat.geometry
    thick = Volume(flat.array, Geometry((4, 3, 1), np.diag([0.5, 0.5, 3.0, 1.0]), "micron"))
    write(thick, tmp_path / "thick.tif")
    assert read(tmp_path / "thick.tif").spacing == (0.5, 0.5, 3.0)


def test_a_size_without_a_unit_stays_without(tmp_path: Path) -> None:
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 0.5}
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], ome=True, metadata={"axes": "YX", **sizes})
    first = read(tmp_path / "a.tif")
    write(first, tmp_path / "b.tif")
    again = read(tmp_path / "b.tif")
    assert UNKNOWN_UNIT_NOTE in again.notes and again.geometry == first.geometry


def test_the_same_volume_gives_the_same_bytes_and_another_another_uuid(tmp_path: Path) -> None:
    volume = Volume(STACK.transpose(2, 1, 0), Geometry((4, 3, 2), np.eye(4), "micron"))
    for name, each in (("a", volume), ("b", volume), ("c", volume.with_array(volume.array + 1))):
        write(each, tmp_path / f"{name}.tif")
    first, second, other = ((tmp_path / f"{name}.tif").read_bytes() for name in "abc")
    assert first == second and b"UUID" in first
    start = first.index(b"urn:uuid:")
    assert first[start : start + 45] != other[start : start + 45]


def test_64_bit_labels_are_stored_in_the_smallest_type_that_holds_them(tmp_path: Path) -> None:
    volume = Volume(STACK.transpose(2, 1, 0).astype(np.int64), Geometry((4, 3, 2), np.eye(4)))
    write(volume, tmp_path / "a.tif")
    assert read(tmp_path / "a.tif").array.dtype == np.uint8
    with pytest.raises(GeometryError, match="cannot hold values"):
        write(volume.with_array(volume.array * 10**12), tmp_path / "b.tif")


def test_a_compression_that_tifffile_lacks_is_read_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [Image.fromarray(page) for page in STACK]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", refuse)
    np.testing.assert_array_equal(read(tmp_path / "a.tif").array[0], STACK.transpose(2, 1, 0))


def test_a_grey_picture_is_one_slice_with_nnunets_spacing(tmp_path: Path) -> None:
    Image.fromarray(STACK[0].astype(np.uint8)).save(tmp_path / "a.png")
    volume = read(tmp_path / "a.png")
    assert volume.array.shape == (1, 4, 3, 1)
    assert volume.spacing == (1.0, 1.0, 999.0)
    np.testing.assert_array_equal(volume.array[0, ..., 0], STACK[0].T)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_colour_picture_has_three_channels(tmp_path: Path, suffix: str) -> None:
    colours = np.zeros((3, 4, 3), np.uint8)
    colours[..., 1] = 200
    Image.fromarray(colours).save(tmp_path / f"a{suffix}")
    volume = read(tmp_path / f"a{suffix}")
    assert volume.array.shape == (3, 4, 3, 1)
    assert volume.array[1].min() > 150
    assert volume.array[0].max() < 50


def test_a_palette_becomes_rgb(tmp_path: Path) -> None:
    picture = Image.fromarray(STACK[0].astype(np.uint8)).convert("P")
    picture.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").channels == 3


def test_real_nuclei_keep_their_16_bit_instances(data_dir: Path, tmp_path: Path) -> None:
    labels = sorted((data_dir / "nuclei2d_dsb2018" / "labels").iterdir())[:5]
    for file in labels:
        volume = read(file)
        assert volume.array.dtype == np.uint16
        write(volume, tmp_path / "again.png")
        again = read(tmp_path / "again.png")
        np.testing.assert_array_equal(again.array, volume.array)
        assert again.geometry == volume.geometry


def test_pages_in_a_circle_are_refused_instead_of_read_for_ever(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        first, last = tiff.pages[0].offset, tiff.pages[-1]
        next_page = last.offset + 2 + 12 * len(last.tags)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[next_page : next_page + 4] = first.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ReadError, match=r"a\.tif: its pages form a circle"):
        read(tmp_path / "a.tif")
