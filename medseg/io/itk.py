"""NRRD and MetaImage through SimpleITK: the only reader that sees LPS and reversed axes."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import ReadError
from medseg.geometry.affine import lps_to_ras, ras_to_lps
from medseg.geometry.orient import direction_cosines
from medseg.io.grids import FLAT_FACTOR, FLAT_NOTE, set_spacing
from medseg.io.nifti import MAX_DEFLATE
from medseg.types import Array, FloatArray
from medseg.volume import Geometry, Unit, Volume

if TYPE_CHECKING:
    import SimpleITK

# SimpleITK is imported where it is used: it costs 0.1 s.

# Both formats start with a text header; a real one is far shorter.
HEADER_BYTES = 1 << 16
_DATA_FILE = re.compile(r"^(?:data ?file|ElementDataFile)\s*[:=]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
# "space units" is NRRD's own field, "DistanceUnits" MetaImage's, "unit" the key that medseg writes.
_UNIT = re.compile(
    r"^(?:space units|DistanceUnits|unit)\s*(?::=|[:=])\s*\"?([^\"\s]+)", re.IGNORECASE | re.MULTILINE
)
_MICRON = {"um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"}
_ATTACHED = {".mhd": ".mha", ".nhdr": ".nrrd"}
_IN_THIS_FILE = {"local", ""}


def read_itk(path: Path) -> Volume:
    """Read ``.nrrd .nhdr .mha .mhd .gipl``; LPS becomes RAS here.

    A fourth axis, or the components of a vector image, become channels.

    Raises
    ------
    ReadError
        ITK cannot read the file, its header promises more than the file holds or points outside
        its folder, or voxels are complex.
    """
    import SimpleITK

    header = _header_text(path)
    stored = path.stat().st_size + sum(file.stat().st_size for file in _data_files(path, header))
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_information(reader, path, stored)
        image = reader.Execute()
    except RuntimeError as error:
        raise ReadError(f"{path}: ITK cannot read it ({_reason(error)}). Copy or export it again.") from error
    return _to_volume(image, path, _unit(header))


def write_itk(volume: Volume, path: Path) -> None:
    """Write ``.nrrd .nhdr .mha .mhd``, compressed; booleans become uint8, float16 float32.

    The header suffixes ``.mhd`` and ``.nhdr`` get the voxels attached, which both formats allow:
    one file appears at once, a pair cannot.
    """
    import SimpleITK

    attached = path.with_suffix(_ATTACHED.get(path.suffix.lower(), path.suffix))
    try:
        SimpleITK.WriteImage(_to_image(volume), str(attached), useCompression=True)
        os.replace(attached, path)
    except BaseException:
        attached.unlink(missing_ok=True)
        raise


def readable_by_itk(path: Path) -> bool:
    """Return whether SimpleITK accepts the header, which decides nnU-Net's choice of reader."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return False
    return True


def _header_text(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(HEADER_BYTES)
    end = start.find(b"\n\n") if start.startswith(b"NRRD") else -1
    return start[: None if end < 0 else end].replace(b"\r", b"").decode("utf-8", errors="replace")


def data_files(path: Path) -> list[Path]:
    """Return the files beside a header in which the voxels are; none where they are in the file itself.

    Raises
    ------
    ReadError
        One is missing, or lies outside the folder.
    """
    return _data_files(path, _header_text(path))


def _data_files(path: Path, header: str) -> list[Path]:
    """Return the files that a detached header names, which must lie beside it."""
    if path.suffix.lower() == ".gipl":
        return []
    names = [match.group(1) for match in _DATA_FILE.finditer(header)]
    if names and names[0].split()[0].upper() == "LIST":
        names = header[header.upper().rfind("LIST") :].split("\n")[1:]
    names = [name.strip() for name in names if name.strip().lower() not in _IN_THIS_FILE]
    folder = path.resolve().parent
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder):
            raise ReadError(
                f"{path}: the header points to {name!r}, outside its folder. Put the data file beside it."
            )
    files = [folder / name for name in names if "%" not in name]
    for file in files:
        if not file.is_file():
            raise ReadError(f"{path}: its data file {file.name} is missing. Copy both files together.")
    if any("%" in name for name in names):  # a numbered series; its files are what is beside it
        files += [file for file in folder.iterdir() if file.is_file()]
    return files


def _check_information(reader: "SimpleITK.ImageFileReader", path: Path, stored: int) -> None:
    size = reader.GetSize()
    if not 2 <= len(size) <= 4 or min(size) < 1:
        raise ReadError(f"{path}: has {len(size)} axes of sizes {size}; expected 2 to 4 axes, none empty.")
    if int(np.prod(size, dtype=object)) * reader.GetNumberOfComponents() > stored * MAX_DEFLATE:
        raise ReadError(
            f"{path}: the header promises {size} voxels, which this file cannot hold. "
            "It is damaged; copy or export it again."
        )


def _to_volume(image: "SimpleITK.Image", path: Path, unit: Unit) -> Volume:
    import SimpleITK

    array: Array = SimpleITK.GetArrayFromImage(image)
    if array.dtype.kind == "c":
        raise ReadError(f"{path}: holds complex numbers. Save magnitude or real part as a file of its own.")
    notes = (FLAT_NOTE,) if image.GetDimension() == 2 else ()
    array = _channels_first(array, image)
    return Volume(array, Geometry(array.shape[1:], lps_to_ras(_lps_affine(image)), unit), notes)


def _channels_first(array: Array, image: "SimpleITK.Image") -> Array:
    """Turn ITK's (t, k, j, i) with trailing components into (channel, i, j, k)."""
    dimension = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
        if dimension == 4:
            array = array.reshape(-1, *array.shape[2:])
    elif dimension < 4:
        array = array[None]
    if dimension == 2:
        array = array[:, None]
    return array.transpose(0, 3, 2, 1)


def _lps_affine(image: "SimpleITK.Image") -> FloatArray:
    dimension = image.GetDimension()
    used = min(dimension, 3)
    affine = np.eye(4)
    affine[:used, :used] = np.array(image.GetDirection()).reshape(dimension, dimension)[:used, :used]
    affine[:used, 3] = image.GetOrigin()[:used]
    spacing = np.ones(3)
    spacing[:used] = image.GetSpacing()[:used]
    if dimension == 2:
        spacing[2] = FLAT_FACTOR * spacing[:2].max()
    set_spacing(affine, spacing)
    return affine


def _to_image(volume: Volume) -> "SimpleITK.Image":
    import SimpleITK

    array = _storable(volume.array)
    if volume.channels == 1:
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array[0].transpose(2, 1, 0)))
    else:
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(3, 2, 1, 0)), isVector=True)
    affine = ras_to_lps(volume.geometry.affine)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(direction_cosines(affine).ravel().tolist())
    if volume.geometry.unit == "micron":
        image.SetMetaData("unit", "micron")
    return image


def _storable(array: Array) -> Array:
    small: dict[Any, Any] = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
    return array.astype(small.get(array.dtype, array.dtype), copy=False)


def _unit(header: str) -> Unit:
    found = _UNIT.search(header)
    return "micron" if found and found.group(1).lower() in _MICRON else "mm"


def _reason(error: RuntimeError) -> str:
    """Return the last informative line of an ITK exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1].split("): ")[-1] if lines else "no reason given").rstrip(".")[:200]
