"""Whether an image tells the size of its pixels, and what to do where it does not: ask, never guess."""

import re
from typing import Literal

import numpy as np

from medseg.errors import ConfigError, GeometryError
from medseg.io.grids import FLAT_FACTOR, FLAT_NOTE, NO_SCALE_NOTE
from medseg.io.microscopy import UNKNOWN_SPACING_NOTE, UNKNOWN_UNIT_NOTE
from medseg.volume import Geometry, Unit, Volume

Scale = Literal["pixel", "mm", "micron"]
"""Unit of lengths in an image; "pixel" where the size of a pixel is not known."""

_UNKNOWN = {NO_SCALE_NOTE, UNKNOWN_SPACING_NOTE, UNKNOWN_UNIT_NOTE}
_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_SPACING = re.compile(rf"((?:{_NUMBER})(?:\s*x\s*(?:{_NUMBER})){{0,2}})\s*(mm|micron|microns|um|µm|μm)")


def knows_spacing(volume: Volume) -> bool:
    """Return whether the size of a pixel was read from the file.

    PNG, JPG and BMP have no such thing, and many a TIFF does not say, or says no unit: the readers then put
    1, or mm. A micrometre was read from somewhere.
    """
    picture = FLAT_NOTE in volume.notes and volume.spacing[:2] == (1.0, 1.0) and volume.geometry.unit == "mm"
    return not _UNKNOWN & set(volume.notes) and not picture


def scale_of(volume: Volume) -> Scale:
    """Return the unit of the size of a pixel, or "pixel" where that was not read from the file."""
    return volume.geometry.unit if knows_spacing(volume) else "pixel"


def require_spacing(volume: Volume, name: str) -> Volume:
    """Return the volume if it tells the size of its pixels.

    Raises
    ------
    GeometryError
        It does not, so nothing can be measured in mm or micrometres.
    """
    if knows_spacing(volume):
        return volume
    raise GeometryError(
        f"{name}: does not tell the size of its pixels, and medseg does not guess. How large is one? "
        "Give it with its unit, for example --pixel-size '0.5 micron'."
    )


def parse_spacing(text: str) -> tuple[tuple[float, ...], Unit]:
    """Return lengths along i, j, k and their unit.

    Raises
    ------
    ConfigError
        The text is none.

    Examples
    --------
    >>> parse_spacing("0.5 micron"), parse_spacing("0.7 x 0.7 x 3 mm")
    (((0.5,), 'micron'), ((0.7, 0.7, 3.0), 'mm'))
    """
    found = _SPACING.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"pixel size '{text}': expected lengths with a unit, such as '0.5 micron' or '0.7 x 0.7 x 3 mm'."
        )
    sizes = tuple(float(size) for size in re.split(r"\s*x\s*", found[1].strip()))
    return sizes, "mm" if found[2] == "mm" else "micron"


def with_spacing(volume: Volume, spacing: tuple[float, ...], unit: Unit) -> Volume:
    """Return the volume with another size of pixel and unit; position 0, axes along the world's.

    Parameters
    ----------
    volume : Volume
    spacing : one to three lengths
        Along i, j, k. One is for all axes; two are for a picture, the third is then nominal.
    unit : "mm" or "micron"

    Raises
    ------
    GeometryError
        A length is not positive.

    Examples
    --------
    >>> picture = Volume(np.zeros((4, 3, 1)), Geometry((4, 3, 1), np.eye(4)))
    >>> with_spacing(picture, (0.5,), "micron").spacing
    (0.5, 0.5, 499.5)
    """
    sizes = tuple(float(s) for s in spacing)
    if not 1 <= len(sizes) <= 3 or not np.isfinite(sizes).all() or min(sizes) <= 0:
        raise GeometryError(f"spacing {spacing}: expected one to three positive lengths.")
    flat = volume.shape[2] == 1
    if len(sizes) == 2 and not flat:
        raise GeometryError(f"spacing {spacing}: the image has three axes; give one or three lengths.")
    x, y = (sizes * 2)[:2]
    z = sizes[2] if len(sizes) == 3 else FLAT_FACTOR * max(x, y) if flat else x
    notes = tuple(note for note in volume.notes if note not in _UNKNOWN)
    if knows_spacing(volume) is False and flat and len(sizes) < 3 and FLAT_NOTE not in notes:
        notes = (*notes, FLAT_NOTE)
    return Volume(volume.array, Geometry(volume.shape, np.diag([x, y, z, 1.0]), unit), notes)
