"""Objects from a file: a label map as it is, or a mask whose connected parts are the objects."""

from pathlib import Path
from typing import Literal

import cc3d
import numpy as np

from medseg.errors import LabelError, MedsegError
from medseg.instances.scale import parse_spacing, require_spacing, with_spacing
from medseg.instances.schema import Instances, instances_of, whole_labels
from medseg.io import read
from medseg.types import IntArray, PathLike
from medseg.volume import Volume

Meaning = Literal["auto", "labels", "mask"]


def read_instances(
    path: PathLike, meaning: Meaning = "auto", pixel_size: str | None = None, measured: bool = True
) -> Instances:
    """Read the objects of one image.

    Parameters
    ----------
    path : file
    meaning : "labels", "mask" or "auto"
        Every number is an object, or everything that is not 0 is foreground and its connected parts (over
        faces, edges and corners) are the objects. ``auto``: a mask, if 1 is the only number.
    pixel_size : str, optional
        Of a file that does not tell it, or tells it wrong: ``0.5 micron`` (:func:`parse_spacing`).
    measured : bool
        Refuse a file that does not tell the size of its pixels.

    Raises
    ------
    ReadError
        The file cannot be read.
    LabelError
        It holds several channels, or values that are no labels.
    GeometryError
        It does not tell the size of its pixels, and neither does the caller.
    """
    volume = read(path)
    if pixel_size is not None:
        volume = with_spacing(volume, *parse_spacing(pixel_size))
    elif measured:
        volume = require_spacing(volume, Path(path).name)
    try:
        if volume.channels != 1:
            raise LabelError(f"has {volume.channels} channels, a label map has one. Is it an image?")
        labels = whole_labels(volume.array)
        split = meaning == "mask" or (meaning == "auto" and 0 <= int(labels.min()) <= int(labels.max()) <= 1)
        found = instances_of(components_of(volume) if split else volume)
    except MedsegError as error:
        raise type(error)(f"{Path(path).name}: {error}") from error
    found.provenance["objects"] = "connected parts of the mask" if split else "numbers of the label map"
    return found


def components_of(volume: Volume) -> Volume:
    """Number the connected parts (26 neighbours, 8 in a picture) of what is not 0, in raster order."""
    mask = volume.array[0] != 0
    padded = np.pad(mask, 1)  # cc3d 4.1 raises on grids of one slice that hold many single voxels
    labelled: IntArray = cc3d.connected_components(np.ascontiguousarray(padded), connectivity=26)
    return volume.with_array(labelled[1:-1, 1:-1, 1:-1].astype(np.int32))
