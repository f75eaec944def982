"""The tables of file formats, and the two functions that everything reads and writes through."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from medseg.errors import MedsegError, ReadError, ResourceError
from medseg.files import atomic_path
from medseg.io.dicom import read_dicom
from medseg.io.itk import read_itk, write_itk
from medseg.io.microscopy import read_picture, read_tiff, write_picture, write_tiff
from medseg.io.nifti import read_nifti, write_nifti
from medseg.types import PathLike
from medseg.volume import Volume

T = TypeVar("T")

READERS: dict[str, Callable[[Path], Volume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".nrrd": read_itk,
    ".nhdr": read_itk,
    ".mha": read_itk,
    ".mhd": read_itk,
    ".gipl": read_itk,
    ".tif": read_tiff,
    ".tiff": read_tiff,
    ".png": read_picture,
    ".bmp": read_picture,
    ".jpg": read_picture,
    ".jpeg": read_picture,
    ".dcm": read_dicom,
}

# Without .jpg, which loses values, and .gipl, which has no directions.
WRITERS: dict[str, Callable[[Volume, Path], None]] = {
    ".nii.gz": write_nifti,
    ".nii": write_nifti,
    ".nrrd": write_itk,
    ".nhdr": write_itk,
    ".mha": write_itk,
    ".mhd": write_itk,
    ".tif": write_tiff,
    ".tiff": write_tiff,
    ".png": write_picture,
    ".bmp": write_picture,
}


def read(path: PathLike) -> Volume:
    """Read an image or a label map; the suffix chooses the reader from :data:`READERS`.

    Returns
    -------
    Volume
        (channel, i, j, k) in the stored type, on its RAS+ grid.

    Raises
    ------
    ReadError
        The file is missing, empty, damaged, or of a format that medseg does not know.
    GeometryError
        Its affine is unusable.
    ResourceError
        It does not fit in memory.
    """
    path = Path(path)
    reader = _lookup(path, READERS, "read")
    try:
        _require_file(path)
        return reader(path)
    except MedsegError as error:
        if str(path.parent) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except PermissionError as error:
        raise ReadError(f"{path}: may not be read. Change its permissions.") from error
    except MemoryError as error:
        raise ResourceError(f"{path}: does not fit in memory. Close other programs or crop it.") from error
    except Exception as error:
        # A hostile file makes a parser raise anything at all; this is the border where it ends.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ReadError(
            f"{path}: not readable as {suffix_of(path)} ({reason}). Copy or export it again."
        ) from error


def write(volume: Volume, path: PathLike) -> None:
    """Write a volume; it appears at `path` whole or not at all.

    Values, data type, grid and unit are kept; booleans become uint8 and float16 float32 where the
    format has neither.

    Raises
    ------
    ReadError
        The suffix is not in :data:`WRITERS`.
    GeometryError
        The format cannot hold the grid or the values.
    ResourceError
        The disk is full.
    """
    path = Path(path)
    writer = _lookup(path, WRITERS, "write")
    with atomic_path(path) as temporary:
        try:
            writer(volume, temporary)
        except MedsegError as error:
            raise type(error)(str(error).replace(str(temporary), str(path))) from error.__cause__


def check_format(path: PathLike) -> None:
    """Refuse an output whose format medseg does not write, before any work is done for it.

    Raises
    ------
    ReadError
        The suffix is not in :data:`WRITERS`.
    """
    _lookup(Path(path), WRITERS, "write")


def suffix_of(path: PathLike) -> str:
    """Return the longest known suffix of a file's name, lower case, or an empty string.

    >>> suffix_of("a/CASE.01.nii.gz")
    '.nii.gz'
    """
    name = Path(path).name.lower()
    return max((suffix for suffix in READERS if name.endswith(suffix)), key=len, default="")


def stem_of(path: PathLike) -> str:
    """Return a file's name without its known suffix.

    >>> stem_of("a/CASE.01.nii.gz")
    'CASE.01'
    """
    name = Path(path).name
    suffix = suffix_of(name)
    return name[: len(name) - len(suffix)] if suffix else Path(name).stem


def is_image(path: Path) -> bool:
    """Return whether a folder's entry is an image: known suffix, not hidden, not macOS's ``._`` twin."""
    return bool(suffix_of(path)) and not path.name.startswith(".") and path.is_file()


def _lookup(path: Path, table: dict[str, T], verb: str) -> T:
    suffix = suffix_of(path)
    if suffix in table:
        return table[suffix]
    if verb == "read" and not path.suffix and not path.exists():
        raise ReadError(f"{path}: no such file. Check the path.")
    if path.is_dir():
        raise ReadError(
            f"{path}: is a folder; expected one image file. DICOM series come in a later release: "
            "convert them to NIfTI first, for example with dcm2niix."
        )
    raise ReadError(f"{path}: medseg does not {verb} this format. Known suffixes: {' '.join(table)}.")


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise ReadError(f"{path}: is a folder; expected one image file. Give the path of a file.")
    if not path.is_file():
        raise ReadError(f"{path}: no such file. Check the path.")
    if path.stat().st_size == 0:
        raise ReadError(f"{path}: the file is empty. Copy or download it again.")
    with path.open("rb"):
        pass  # no permission is told here: some parsers call it a damaged file
