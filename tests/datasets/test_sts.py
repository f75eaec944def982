"""The converter of soft-tissue sarcomas: contours of a structure set onto the grid of the series."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medseg.errors import DataError, ReadError
from medseg.io import read
from medseg.volume import Geometry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sts_convert", ROOT / "datasets" / "sts" / "convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def square(low: float, high: float, k: float) -> np.ndarray:
    corners = [(low, low), (low, high), (high, high), (high, low)]
    return np.array([(i, j, k) for i, j in corners])


def test_a_voxel_is_inside_where_its_centre_is_and_a_contour_in_a_contour_is_a_hole(sts: ModuleType) -> None:
    grid = Geometry((12, 12, 3), np.eye(4))
    mask = sts.rasterise([square(1.5, 8.5, 1), square(3.5, 5.5, 1)], grid)
    wanted = np.zeros((12, 12, 3), np.uint8)
    wanted[2:9, 2:9, 1] = 1
    wanted[4:6, 4:6, 1] = 0
    assert np.array_equal(mask, wanted)


def test_the_area_of_a_polygon_is_kept(sts: ModuleType) -> None:
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    circle = 50 + 30.3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert sts.inside(circle, (100, 100)).sum() == pytest.approx(np.pi * 30.3**2, rel=0.01)


def test_a_contour_between_slices_is_refused(sts: ModuleType) -> None:
    with pytest.raises(DataError, match="another series"):
        sts.rasterise([square(1.5, 8.5, 1.5)], Geometry((12, 12, 3), np.eye(4)))


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\0" * 128 + b"DICM" + b"\0" * 40])
def test_what_is_no_structure_set_is_refused(sts: ModuleType, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "RS.dcm"
    path.write_bytes(content)
    with pytest.raises(ReadError, match="structure set"):
        sts.read_contours(path, "GTV")


def element(group: int, number: int, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return struct.pack("<HHI", group, number, len(value)) + value


def structure_set(name: bytes = b"GTV_Mass_CT") -> bytes:
    """Return a structure set of one square, sequences with known length and without."""
    item = struct.Struct("<HHI")
    roi = element(0x3006, 0x22, b"4") + element(0x3006, 0x26, name)
    rois = element(0x3006, 0x20, item.pack(0xFFFE, 0xE000, len(roi)) + roi)
    contour = element(0x3006, 0x42, b"CLOSED_PLANAR") + element(0x3006, 0x50, rb"1\2\3\4\5\3\6\7\3")
    contours = element(0x3006, 0x40, item.pack(0xFFFE, 0xE000, len(contour)) + contour)
    region = contours + element(0x3006, 0x84, b"4")
    regions = item.pack(0x3006, 0x39, 0xFFFFFFFF) + item.pack(0xFFFE, 0xE000, 0xFFFFFFFF) + region
    regions += item.pack(0xFFFE, 0xE00D, 0) + item.pack(0xFFFE, 0xE0DD, 0)
    syntax = b"1.2.840.10008.1.2\0"
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(syntax)) + syntax
    return (
        b"\0" * 128
        + b"DICM"
        + b"\x02\x00\x00\x00UL\x04\x00"
        + struct.pack("<I", len(meta))
        + meta
        + rois
        + regions
    )


def test_contours_are_read_into_ras(sts: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "RS.dcm"
    path.write_bytes(structure_set())
    (contour,) = sts.read_contours(path, "GTV_Mass")
    assert np.array_equal(contour, [(-1, -2, 3), (-4, -5, 3), (-6, -7, 3)])
    with pytest.raises(ReadError, match="it has GTV_Mass_CT"):
        sts.read_contours(path, "Oedema")


def test_the_patient_of_the_shared_data_is_converted(sts: ModuleType, data_dir: Path, tmp_path: Path) -> None:
    out = sts.convert(data_dir / "sts" / "STS_001", tmp_path / "sts")
    for modality in ("CT", "MR_T1"):
        image, label = (read(out / part / f"STS_001_{modality}.nii.gz") for part in ("images", "labels"))
        assert image.geometry.matches(label.geometry)
        # 365 ml; a contour of a whole tumour has no slice missing.
        assert label.array.sum() * label.geometry.voxel_volume / 1000 == pytest.approx(365, abs=2)
        assert np.ptp(np.flatnonzero(label.array[0].any(axis=(0, 1)))) + 1 == 31
