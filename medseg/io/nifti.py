"""NIfTI-1 and NIfTI-2: the one format that keeps everything a Volume has.

The header is described at https://nifti.nimh.nih.gov/nifti-1/documentation/nifti1fields.
"""

import gzip
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from medseg.errors import ReadError
from medseg.geometry.orient import is_orthonormal
from medseg.io.grids import FLAT_FACTOR, FLAT_NOTE, set_spacing
from medseg.types import Array, FloatArray
from medseg.volume import Geometry, Unit, Volume

if TYPE_CHECKING:
    import nibabel

# nibabel is imported where it is used: it costs 0.1 s, which a command that reads no image should not pay.

# A header stores the affine and the voxel sizes as float32; lengths that agree so far are the same.
ZOOM_TOLERANCE = 1e-5
# Directions and places of sform and qform that agree within this many voxels are the same place.
CONFLICT_VOXELS = 0.01
# DEFLATE cannot compress better than 1032 : 1 (https://www.zlib.net/zlib_tech.html).
MAX_DEFLATE = 1032
# sform_code and qform_code 1: scanner coordinates.
SCANNER = 1

_SCALE_TO_MM = {"meter": 1000.0, "mm": 1.0, "unknown": 1.0, "micron": 1.0}


def read_nifti(path: Path) -> Volume:
    """Read ``.nii`` or ``.nii.gz``.

    The affine is the sform where its code is above 0, else the qform, else nibabel's default.
    Its columns get exactly the header's voxel sizes where the two agree within 1e-5, so the
    spacing is what ITK (and therefore nnU-Net) sees. Integers stay integers unless the header
    rescales them; a trailing axis, vector or RGB becomes channels.

    Returns
    -------
    Volume
        Voxels (channel, i, j, k); ``notes`` tell of a conflict of sform and qform.

    Raises
    ------
    ReadError
        The file is truncated or damaged, or holds voxels that are not numbers of an image.
    """
    with closing(_open(path)) as stream:
        image = _parse(stream, path)
        _check_header(image, path)
        array = _load(image, stream, path)
    unit, scale = _unit(image)
    affine, notes = _affine(image)
    affine[:3] *= scale
    return Volume(array, Geometry(array.shape[1:], affine, unit), tuple(notes))


def write_nifti(volume: Volume, path: Path) -> None:
    """Write ``.nii`` or ``.nii.gz`` with sform, qform and unit; booleans become uint8, float16 float32."""
    import nibabel

    array = _storable(volume.array)
    array = array[0] if volume.channels == 1 else np.moveaxis(array, 0, -1)
    # Passing dtype says that 64-bit integers are meant; nibabel asks otherwise.
    image = nibabel.Nifti1Image(array, None, dtype=array.dtype)
    affine = volume.geometry.affine
    header = image.header
    header.set_zooms((*volume.spacing, 1.0)[: array.ndim])
    header.set_xyzt_units(volume.geometry.unit)
    header.set_sform(affine, code=SCANNER)
    # A qform cannot hold a shear; a rounded one would contradict the sform.
    if is_orthonormal(affine):
        header.set_qform(affine, code=SCANNER)
        header.set_zooms((*volume.spacing, 1.0)[: array.ndim])
    nibabel.save(image, path)


def _open(path: Path) -> IO[bytes]:
    """Open by content, not by name: a gzip file starts with 1f 8b."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path) if zipped else path.open("rb"))


def _parse(stream: IO[bytes], path: Path) -> "nibabel.Nifti1Image":
    import nibabel

    start = stream.read(4)
    stream.seek(0)
    # sizeof_hdr, either byte order, is 540 in NIfTI-2.
    version2 = 540 in (int.from_bytes(start, "little"), int.from_bytes(start, "big"))
    kind = nibabel.Nifti2Image if version2 else nibabel.Nifti1Image
    try:
        return kind.from_stream(stream)
    except EOFError as error:
        raise _truncated(path) from error


def _check_header(image: "nibabel.Nifti1Image", path: Path) -> None:
    """Refuse what cannot be an image before memory is asked for."""
    dtype = image.get_data_dtype()
    if dtype.kind == "c":
        raise ReadError(
            f"{path}: holds complex numbers ({dtype}). Save magnitude or real part as a file of its own."
        )
    if dtype.kind not in "uifV" or (dtype.kind == "f" and dtype.itemsize > 8):
        raise ReadError(
            f"{path}: voxels of type {dtype} are not supported. Save them as integers or float32."
        )
    promised = int(np.prod(image.shape, dtype=object)) * dtype.itemsize
    possible = path.stat().st_size * MAX_DEFLATE
    if min(image.shape, default=0) < 1 or promised > possible:
        raise ReadError(
            f"{path}: the header promises {image.shape} voxels of {dtype}, which this file cannot hold. "
            "It is damaged; copy or export it again."
        )


def _load(image: "nibabel.Nifti1Image", stream: IO[bytes], path: Path) -> Array:
    """Return voxels as (channel, i, j, k), in the memory order of the file."""
    stored = image.get_data_dtype()
    try:
        array = np.asanyarray(image.dataobj)
        while stream.read(1 << 20):  # to the end, where gzip keeps its checksum
            pass
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _truncated(path) from error
    if stored.kind == "V":
        array = np.stack([array[name] for name in stored.names or ()], axis=-1)
    elif array.dtype.itemsize == 8 and stored.kind in "ui" and stored.itemsize <= 2:
        array = array.astype(np.float32)  # rescaled 16-bit integers lose nothing in float32
    return _channels_first(array.astype(array.dtype.newbyteorder("="), copy=False), path)


def _channels_first(array: Array, path: Path) -> Array:
    shape = array.shape
    # (i, j, k, t, v): vectors are stored along the fifth axis.
    trailing = [n for n in shape[3:] if n > 1]
    if len(trailing) > 1:
        raise ReadError(
            f"{path}: has shape {shape}, which is neither one volume nor a list of channels. "
            "Split it into 3D files."
        )
    padded = shape[:3] + (1,) * (3 - len(shape[:3]))
    channels = trailing[0] if trailing else 1
    return np.moveaxis(array.reshape(*padded, channels, order="F"), -1, 0)


def _unit(image: "nibabel.Nifti1Image") -> tuple[Unit, float]:
    """Return the unit and what lengths are multiplied with to be in it."""
    name = image.header.get_xyzt_units()[0]
    return "micron" if name == "micron" else "mm", _SCALE_TO_MM.get(name, 1.0)


def _affine(image: "nibabel.Nifti1Image") -> tuple[FloatArray, list[str]]:
    """Return the affine that is used and what is odd about the header."""
    header: Any = image.header
    notes: list[str] = []
    sform, qform = _transform(header, "sform"), _transform(header, "qform")
    affine = sform if sform is not None else qform
    if affine is None:
        affine = np.array(image.affine, dtype=np.float64)
        notes.append("neither sform nor qform is set: left, right and position are guessed")
    elif sform is not None and qform is not None:
        notes += _conflict(image.shape, sform, qform)
    if len(image.shape) < 3:
        return _flat(affine), [*notes, FLAT_NOTE]
    differing = _adopt_zooms(affine, np.array(header.get_zooms()[:3], dtype=np.float64))
    return affine, notes or differing


def _adopt_zooms(affine: FloatArray, zooms: FloatArray) -> list[str]:
    """Give the affine the header's voxel sizes, in place, or say that the two contradict each other."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        agree = np.abs(lengths / zooms - 1.0) < ZOOM_TOLERANCE
    if agree.all():
        set_spacing(affine, zooms)
        return []
    return [f"sform has voxel sizes {_round(lengths)}, pixdim has {_round(zooms)}: sform is used"]


def _transform(header: Any, name: str) -> FloatArray | None:
    if int(header[f"{name}_code"]) <= 0:
        return None
    matrix = header.get_sform() if name == "sform" else header.get_qform()
    return np.array(matrix, dtype=np.float64)


def _conflict(shape: tuple[int, ...], sform: FloatArray, qform: FloatArray) -> list[str]:
    """Describe how far apart the two transforms put the corners of the grid."""
    size = [*shape[:3], 1, 1][:3]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in size], [1])).reshape(4, -1)
    shift = float(np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max())
    shortest = float(np.linalg.norm(sform[:3, :3], axis=0).min())
    if shift <= CONFLICT_VOXELS * shortest:
        return []
    return [f"sform and qform put the image up to {shift:.3g} apart: sform is used, qform ignored"]


def _flat(affine: FloatArray) -> FloatArray:
    """Give the missing third axis of a 2D image a direction and nnU-Net's nominal size."""
    longest = np.linalg.norm(affine[:3, :2], axis=0).max()
    normal = affine[:3, 2] if affine[:3, 2].any() else np.array([0.0, 0.0, 1.0])
    affine[:3, 2] = normal / np.linalg.norm(normal) * FLAT_FACTOR * longest
    return affine


def _storable(array: Array) -> Array:
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array


def _truncated(path: Path) -> ReadError:
    return ReadError(f"{path}: the file is truncated or damaged. Copy or download it again.")


def _round(values: FloatArray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
