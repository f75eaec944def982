"""Multi-page TIFF with its many ways to tell a voxel size, and PNG, JPG and BMP as flat volumes."""

import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medseg.errors import GeometryError, ReadError
from medseg.io.grids import FLAT_FACTOR, FLAT_NOTE, NO_SCALE_NOTE
from medseg.types import Array
from medseg.volume import Geometry, Unit, Volume

if TYPE_CHECKING:
    import tifffile

# tifffile and pillow are imported where they are used, for a quick start.

# The tightest codec in use (zstd) packs a constant image about 10,000 : 1; more is a damaged header.
MAX_RATIO = 10_000
UNKNOWN_SPACING_NOTE = "the TIFF does not tell its voxel size: 1 is assumed"
UNKNOWN_UNIT_NOTE = "the TIFF does not tell the unit of its voxel size: mm is assumed"
# TIFF and PNG hold sizes but neither position nor direction; lengths that agree so far are the same.
PLAIN_TOLERANCE = 1e-6

# Micrometres in one of the units that OME (PhysicalSizeXUnit) and ImageJ (unit) write.
_MICRONS = {"nm": 1e-3, "nanometer": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0}
_MICRONS |= {"micrometer": 1.0, "micrometre": 1.0, "\\u00b5m": 1.0, "å": 1e-4}
_MM = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1000.0, "inch": 25.4}
_CHANNEL_SUFFIX = re.compile(r"_\d{4}$")
# OME has no 64-bit integers (https://docs.openmicroscopy.org/ome-model/6.2.2/ome-tiff/data.html).
_SMALL_INTEGERS = (np.uint8, np.uint16, np.int16, np.int32, np.uint32)


def read_tiff(path: Path) -> Volume:
    """Read ``.tif`` or ``.tiff``: pages are k, columns i, rows j.

    The voxel size comes from nnU-Net's sidecar ``CASE.json`` ({"spacing": [z, y, x]}), else from OME
    metadata, else from ImageJ's, else it is 1 and a note says so.

    Raises
    ------
    ReadError
        The file is damaged, or has several time points.
    """
    import tifffile

    _refuse_circles(path)
    with tifffile.TiffFile(path) as tiff:
        if not tiff.series:
            raise ReadError(f"{path}: holds no image. Export it again.")
        series = tiff.series[0]
        axes = str(series.axes)
        if series.nbytes > path.stat().st_size * MAX_RATIO:
            raise ReadError(
                f"{path}: its header promises {series.shape} pixels, which this file cannot hold. "
                "It is damaged; export it again."
            )
        array = _pixels(series, path)
        spacing, unit, notes = _tiff_spacing(tiff, path)
    array, flat, assumed = _arrange(array, axes, path)
    if flat and spacing[2] is None:
        notes.append(FLAT_NOTE)
    return Volume(array, _plain_grid(array, spacing, unit), (*notes, *assumed))


def write_tiff(volume: Volume, path: Path) -> None:
    """Write an OME-TIFF, compressed, with voxel size and unit; the same volume gives the same bytes.

    What the volume's notes call unknown is not stated, nor is the nominal third size of a 2D image.

    Raises
    ------
    GeometryError
        The grid is rotated, flipped or shifted, which TIFF cannot say.
    """
    import tifffile

    _require_plain(volume, path)
    array = _without_64_bits(volume.array, path)
    pages = np.ascontiguousarray(array.transpose(0, 3, 2, 1))
    sizes = _stated_sizes(volume)
    tifffile.imwrite(
        path,
        pages,
        ome=True,
        photometric="minisblack",
        compression="zlib",
        metadata={"axes": "CZYX", "UUID": _content_uuid(pages, sizes), **sizes},
    )


def _stated_sizes(volume: Volume) -> dict[str, Any]:
    """Return OME's sizes and units, as far as they are known."""
    x, y, z = volume.spacing
    nominal = volume.shape[2] == 1 and bool(np.isclose(z, FLAT_FACTOR * max(x, y), rtol=PLAIN_TOLERANCE))
    open_scale = {NO_SCALE_NOTE, UNKNOWN_SPACING_NOTE} & set(volume.notes)
    if open_scale and (x, y) == (1.0, 1.0) and (nominal or z == 1.0):
        return {}
    unit = "µm" if volume.geometry.unit == "micron" else "mm"
    if UNKNOWN_UNIT_NOTE in volume.notes:
        unit = "pixel"  # without one, OME's is µm
    sizes: dict[str, Any] = {"PhysicalSizeX": x, "PhysicalSizeY": y}
    if not nominal:
        sizes["PhysicalSizeZ"] = z
    return sizes | {f"{key}Unit": unit for key in sizes}


def _content_uuid(pages: Array, sizes: dict[str, Any]) -> str:
    """Return a UUID that only the content decides: tifffile's own is another each time."""
    digest = hashlib.sha256(repr((pages.shape, pages.dtype.str, sizes)).encode())
    digest.update(pages.data)
    return str(uuid.UUID(bytes=digest.digest()[:16], version=5))


def read_picture(path: Path) -> Volume:
    """Read ``.png``, ``.jpg`` or ``.bmp`` as (channel, x, y, 1), with nnU-Net's spacing (1, 1, 999).

    A palette becomes RGB, as nnU-Net sees it.
    """
    from PIL import Image

    with Image.open(path) as picture:
        indirect = picture.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
        plain = picture.convert("RGBA" if "transparency" in picture.info else "RGB") if indirect else picture
        array: Array = np.asarray(plain)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    array = array.transpose(2, 1, 0)[..., None]
    return Volume(array, _plain_grid(array, (1.0, 1.0, None), "mm"), (FLAT_NOTE,))


def write_picture(volume: Volume, path: Path) -> None:
    """Write ``.png`` or ``.bmp``: one slice of uint8 (or uint16, grey), 1, 3 or 4 channels.

    Raises
    ------
    GeometryError
        There is more than one slice, the values do not fit, or the grid is not the plain one.
    """
    from PIL import Image

    _require_plain(volume, path)
    array = _without_64_bits(volume.array, path)
    grey16 = array.dtype == np.uint16 and volume.channels == 1 and path.suffix.lower() == ".png"
    if volume.shape[2] != 1 or volume.channels not in (1, 3, 4) or not (array.dtype == np.uint8 or grey16):
        raise GeometryError(
            f"{path}: a picture holds one slice of uint8 with 1, 3 or 4 channels (PNG: or grey uint16), not "
            f"{volume.channels} channels of {volume.shape} {array.dtype}. Write .nii.gz or .tif instead."
        )
    pixels = np.ascontiguousarray(array[..., 0].transpose(2, 1, 0))
    Image.fromarray(pixels[..., 0] if volume.channels == 1 else pixels).save(path)


def tiff_is_flat(path: Path) -> bool:
    """Return whether nnU-Net's 2D reader would take this TIFF: one grey page, or RGB(A)."""
    import tifffile

    _refuse_circles(path)
    with tifffile.TiffFile(path) as tiff:
        shape = tiff.series[0].shape
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (3, 4))


def _refuse_circles(path: Path) -> None:
    """Walk the chain of page headers: one that bites its tail would keep tifffile busy for ever.

    A header is a count, that many entries, and the offset of the next header; sizes differ between
    TIFF 6.0 (page 14) and BigTIFF (https://www.awaresystems.be/imaging/tiff/bigtiff.html).
    """
    with path.open("rb") as stream:
        start = stream.read(16)
        order: Literal["little", "big"] = "big" if start[:2] == b"MM" else "little"
        big = int.from_bytes(start[2:4], order) == 43
        count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
        offset = int.from_bytes(start[8:16] if big else start[4:8], order)
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise ReadError(f"{path}: its pages form a circle. The file is damaged; export it again.")
            seen.add(offset)
            stream.seek(offset)
            entries = int.from_bytes(stream.read(count_bytes), order)
            stream.seek(offset + count_bytes + entries * entry_bytes)
            offset = int.from_bytes(stream.read(offset_bytes), order)


def _pixels(series: "tifffile.TiffPageSeries", path: Path) -> Array:
    """Decode; Pillow knows compressions (LZW among them) for which tifffile needs another package."""
    from PIL import Image, ImageSequence

    try:
        return np.asarray(series.asarray())
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
    with Image.open(path) as picture:
        pages = np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)])
    return pages.reshape(series.shape)


def _arrange(array: Array, axes: str, path: Path) -> tuple[Array, bool, list[str]]:
    """Return (channel, x, y, z), whether it is 2D, and what was assumed about the axes."""
    kept = [(axis, n) for axis, n in zip(axes, array.shape, strict=True) if n > 1 or axis in "YXZ"]
    array = array.reshape([n for _, n in kept])
    axes = "".join(axis for axis, _ in kept)
    notes = []
    # ImageJ saves stacks as frames (T); plain pages have no meaning (Q, I). Without a Z they are slices.
    other = [axis for axis in axes if axis not in "ZYXCS"]
    if len(other) == 1 and "Z" not in axes:
        notes = [f"the pages of the TIFF ({other[0]}) are taken for slices"] if other == ["T"] else []
        axes = axes.replace(other[0], "Z")
    elif other:
        raise ReadError(
            f"{path}: has axes {axes} of sizes {array.shape}; expected one volume. "
            "Save each time point or position as a file of its own."
        )
    flat = "Z" not in axes
    order = [axes.index(axis) for axis in "CSZYX" if axis in axes]
    array = array.transpose(order)
    size = array.shape
    return array.reshape(-1, 1 if flat else size[-3], *size[-2:]).transpose(0, 3, 2, 1), flat, notes


def _plain_grid(array: Array, spacing: tuple[float, float, float | None], unit: Unit) -> Geometry:
    x, y, z = spacing
    if z is None:
        z = FLAT_FACTOR * max(x, y) if array.shape[3] == 1 else 1.0
    return Geometry(array.shape[1:], np.diag([x, y, z, 1.0]), unit)


def _tiff_spacing(
    tiff: "tifffile.TiffFile", path: Path
) -> tuple[tuple[float, float, float | None], Unit, list[str]]:
    """Return voxel size (x, y, z), unit and notes; a missing z is None."""
    sidecar = _sidecar(path)
    if sidecar is not None:
        return sidecar, "mm", []
    if tiff.ome_metadata:
        found = _ome_spacing(tiff.ome_metadata)
    elif tiff.imagej_metadata:
        found = _imagej_spacing(tiff)
    else:
        found = None
    if found is None:
        return (1.0, 1.0, None), "mm", [UNKNOWN_SPACING_NOTE]
    sizes, unit = found
    return sizes, unit or "mm", [] if unit else [UNKNOWN_UNIT_NOTE]


def _sidecar(path: Path) -> tuple[float, float, float] | None:
    """Return (x, y, z) of nnU-Net's ``CASE.json`` (nnunetv2/imageio/tif_reader_writer.py)."""
    stem = path.name[: -len(path.suffix)]
    for name in dict.fromkeys((_CHANNEL_SUFFIX.sub("", stem), stem)):
        file = path.with_name(f"{name}.json")
        if not file.is_file():
            continue
        try:
            z, y, x = (float(value) for value in json.loads(file.read_text("utf-8"))["spacing"])
        except (ValueError, KeyError, TypeError) as error:
            raise ReadError(f'{file}: expected {{"spacing": [z, y, x]}} for {path.name}. Mend it.') from error
        if not (np.isfinite([x, y, z]).all() and min(x, y, z) > 0):
            raise ReadError(f"{file}: spacing {[z, y, x]} must be three positive numbers. Mend it.")
        return x, y, z
    return None


def _ome_spacing(xml: str) -> tuple[tuple[float, float, float | None], Unit | None] | None:
    """Take PhysicalSizeX/Y/Z and their unit (default µm) of the first Pixels element."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    found: dict[str, str] = dict(
        re.findall(r'PhysicalSize(\w+)="([^"]*)"', pixels.group(0) if pixels else "")
    )
    if "X" not in found:
        return None
    unit, scale = _length(found.get("XUnit", "µm"))
    sizes = {axis: float(found[axis]) * scale for axis in "XYZ" if axis in found}
    return _positive((sizes["X"], sizes.get("Y", sizes["X"]), sizes.get("Z")), unit)


def _imagej_spacing(
    tiff: "tifffile.TiffFile",
) -> tuple[tuple[float, float, float | None], Unit | None] | None:
    """Take ImageJ's ``spacing`` and ``unit``, and pixels per unit from the resolution tags."""
    metadata: dict[str, Any] = tiff.imagej_metadata or {}
    unit, scale = _length(str(metadata.get("unit", "")))
    sizes = []
    for name in ("XResolution", "YResolution"):
        tag = tiff.pages[0].tags.get(name)
        per_unit = tag.value[0] / (tag.value[1] or 1) if tag is not None else 1.0
        sizes.append(scale / per_unit if per_unit > 0 else 1.0)
    if "unit" not in metadata and "spacing" not in metadata:
        return None
    z = metadata.get("spacing")
    return _positive((sizes[0], sizes[1], None if z is None else float(z) * scale), unit)


def _positive(
    sizes: tuple[float, float, float | None], unit: Unit | None
) -> tuple[tuple[float, float, float | None], Unit | None] | None:
    given = [size for size in sizes if size is not None]
    return (sizes, unit) if np.isfinite(given).all() and min(given) > 0 else None


def _length(name: str) -> tuple[Unit | None, float]:
    """Return medseg's unit for a unit's name, and the factor to it; None for "pixel" and the like."""
    name = name.strip().lower()
    if name in _MICRONS:
        return "micron", _MICRONS[name]
    return ("mm", _MM[name]) if name in _MM else (None, 1.0)


def _require_plain(volume: Volume, path: Path) -> None:
    affine = volume.geometry.affine
    plain = np.diag([*volume.spacing, 1.0])
    if np.abs(affine - plain).max() > PLAIN_TOLERANCE * max(volume.spacing):
        raise GeometryError(
            f"{path}: {path.suffix} cannot hold this image's position and direction. "
            "Write .nii.gz, .nrrd or .mha instead."
        )


def _without_64_bits(array: Array, path: Path) -> Array:
    """Store booleans as uint8, float16 as float32, and 64-bit integers in the smallest type that fits."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8:
        small: dict[Any, Any] = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
        return array.astype(small.get(array.dtype, array.dtype), copy=False)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in _SMALL_INTEGERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise GeometryError(f"{path}: {path.suffix} cannot hold values {low} to {high}. Write .nii.gz instead.")
