"""Turn a patient of TCIA's Soft-tissue-Sarcoma (DICOM series and RTSTRUCT) into NIfTI images and labels."""

import argparse
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.errors import DataError, ReadError
from medseg.files import atomic_folder
from medseg.io import write
from medseg.types import Array, BoolArray, FloatArray
from medseg.volume import Geometry, Volume

# The gross tumour without its oedema, which is a region of its own; the names go on with the modality.
TUMOUR = "GTV_Mass"
# Structure sets of this collection take half a megabyte.
LARGEST_FILE = 64 * 2**20

_ROI, _ROI_NUMBER, _ROI_NAME = (0x3006, 0x0020), (0x3006, 0x0022), (0x3006, 0x0026)
_CONTOURS, _CONTOUR, _REFERRED = (0x3006, 0x0039), (0x3006, 0x0040), (0x3006, 0x0084)
_KIND, _POINTS = (0x3006, 0x0042), (0x3006, 0x0050)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_SEQUENCES = {_ROI, _CONTOURS, _CONTOUR}
_IMPLICIT = b"1.2.840.10008.1.2"
Tag = tuple[int, int]


def convert(source: Path, out: Path) -> Path:
    """Convert each ``MODALITY/dicom`` of `source`, a patient, to ``images/`` and ``labels/`` of `out`.

    Raises
    ------
    ReadError
        There is no such folder, or a structure set cannot be read.
    """
    series = sorted(source.glob("*/dicom"))
    if not series:
        raise ReadError(f"{source}: has no MODALITY/dicom folders. Give the folder of one patient.")
    with atomic_folder(out) as folder:
        for dicom in series:
            name = f"{source.name}_{dicom.parent.name}.nii.gz"
            image = read_series(dicom / "image")
            contours = read_contours(dicom / "mask" / "RS.dcm", TUMOUR)
            for part, volume in (
                ("images", image),
                ("labels", Volume(rasterise(contours, image.geometry), image.geometry)),
            ):
                (folder / part).mkdir(exist_ok=True)
                write(volume, folder / part / name)
    return out


def read_series(folder: Path) -> Volume:
    """Read one series of axial slices through ITK."""
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # LPS to RAS
    array = np.ascontiguousarray(SimpleITK.GetArrayFromImage(image).T)
    return Volume(array, Geometry(array.shape, affine))


def rasterise(contours: list[FloatArray], geometry: Geometry) -> Array:
    """Fill contours, (n, 3) in RAS mm: voxels whose centre lies inside; a contour in a contour is a hole."""
    inverse = np.linalg.inv(geometry.affine)
    mask = np.zeros(geometry.shape, np.uint8)
    for contour in contours:
        voxels = contour @ inverse[:3, :3].T + inverse[:3, 3]
        k = round(float(voxels[:, 2].mean()))
        if np.abs(voxels[:, 2] - k).max() > 0.25:
            raise DataError("a contour lies between or across slices. It belongs to another series.")
        if 0 <= k < geometry.shape[2]:
            mask[:, :, k] ^= inside(voxels[:, :2], mask.shape[:2])
    return mask


def inside(polygon: FloatArray, shape: tuple[int, int]) -> BoolArray:
    """Return where centres of pixels lie in a polygon, by counting the edges to one side (even-odd rule)."""
    mask = np.zeros(shape, dtype=bool)
    columns = np.arange(shape[1])
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        low, high = sorted((start[0], end[0]))
        for i in range(max(0, int(np.ceil(low))), min(shape[0], int(high) + 1)):
            if (start[0] > i) != (end[0] > i):
                crossing = start[1] + (i - start[0]) / (end[0] - start[0]) * (end[1] - start[1])
                mask[i] ^= columns < crossing
    return mask


@dataclass
class Item:
    """An item of a sequence: values by tag, and items of the sequences in it."""

    values: dict[Tag, bytes] = field(default_factory=dict)
    items: dict[Tag, list["Item"]] = field(default_factory=dict)


def read_contours(path: Path, prefix: str) -> list[FloatArray]:
    """Read the closed contours of the one region of a structure set whose name begins so, (n, 3) in RAS mm.

    Only what this collection uses is understood: implicit little endian (PS3.5, A.1).

    Raises
    ------
    ReadError
        Another encoding, a damaged file, or no such region.
    """
    data = path.read_bytes()[: LARGEST_FILE + 1]
    if len(data) > LARGEST_FILE or data[128:132] != b"DICM" or _syntax(data) != _IMPLICIT:
        raise ReadError(f"{path}: is no structure set in implicit little endian. Use a general reader.")
    try:
        root, _ = _read_item(data, 144 + struct.unpack_from("<I", data, 140)[0], len(data))
    except (struct.error, RecursionError) as error:
        raise ReadError(f"{path}: is damaged ({error}). Fetch it again.") from error
    numbers = {_text(r, _ROI_NAME): _text(r, _ROI_NUMBER) for r in root.items.get(_ROI, [])}
    wanted = [number for name, number in numbers.items() if name.startswith(prefix)]
    if len(wanted) != 1:
        raise ReadError(f"{path}: has not one region {prefix}...; it has {', '.join(sorted(numbers))}.")
    regions = [r for r in root.items.get(_CONTOURS, []) if _text(r, _REFERRED) == wanted[0]]
    contours = [c for region in regions for c in region.items.get(_CONTOUR, [])]
    return [_points(contour) for contour in contours if _text(contour, _KIND) == "CLOSED_PLANAR"]


def _points(contour: Item) -> FloatArray:
    numbers = np.array(_text(contour, _POINTS).split("\\"), dtype=np.float64)
    return numbers.reshape(-1, 3) * (-1, -1, 1)


def _text(item: Item, tag: Tag) -> str:
    return item.values.get(tag, b"").decode("ascii", "replace").strip(" \0")


def _syntax(data: bytes) -> bytes:
    at = data.find(b"\x02\x00\x10\x00UI", 132, 1024)
    return data[at + 8 : at + 8 + struct.unpack_from("<H", data, at + 6)[0]].rstrip(b"\0") if at > 0 else b""


def _read_item(data: bytes, at: int, end: int) -> tuple[Item, int]:
    item = Item()
    while at + 8 <= end:
        tag, length = struct.unpack_from("<HH", data, at), struct.unpack_from("<I", data, at + 4)[0]
        at += 8
        if tag in (_ITEM_END, _SEQUENCE_END):
            break
        if tag in _SEQUENCES or length == 0xFFFFFFFF:
            item.items[tag], at = _read_sequence(data, at, length)
        else:
            item.values[tag] = data[at : at + length]
            at += length
    return item, at


def _read_sequence(data: bytes, at: int, length: int) -> tuple[list[Item], int]:
    end = len(data) if length == 0xFFFFFFFF else at + length
    items = []
    while at + 8 <= end:
        tag, size = struct.unpack_from("<HH", data, at), struct.unpack_from("<I", data, at + 4)[0]
        at += 8
        if tag != _ITEM:
            break
        item, at = _read_item(data, at, len(data) if size == 0xFFFFFFFF else at + size)
        items.append(item)
    return items, at


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of one patient, with MR_T1/dicom and CT/dicom")
    parser.add_argument("out", type=Path, help="folder to make, with images/ and labels/")
    given = parser.parse_args()
    print(convert(given.source, given.out))


if __name__ == "__main__":
    main()
