"""What a user points with: points, boxes, scribbles, lassos and masks, in world millimetres.

Prompts are data. They are kept in the world (RAS+, in the unit of the volume) and projected to voxels late,
so that one file of prompts fits a volume in every order of its axes. Planes have anatomical names for the
same reason: the slices of ``axial`` are those across the voxel axis that runs most nearly from inferior to
superior.
"""

import base64
import zlib
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from medseg.config import Config
from medseg.prompt.regions import Region

Position = tuple[float, float, float]
Plane = Literal["sagittal", "coronal", "axial"]
PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by axis of a volume turned to RAS

# A mask of 2**33 voxels is larger than any scanner's; what unpacks to more is not a mask.
LARGEST_MASK = 2**33


class Point(Config):
    """A click: inside the object, or (``positive=False``) outside of it."""

    kind: Literal["point"] = "point"
    position_mm: Position
    positive: bool = True
    plane: Plane | None = None  # of the slice on which it was made; None: any


class Box(Config):
    """Two opposite corners: on one slice of `plane`, or, without a plane, in 3D.

    The corners are the outer edges of the outermost voxels: a box from the lower edge of voxel 3 to the
    upper edge of voxel 5 holds voxels 3, 4 and 5. On a plane, the slice is the one that holds the middle of
    the corners.
    """

    kind: Literal["box"] = "box"
    corner_mm: Position
    opposite_mm: Position
    plane: Plane | None = None


class Scribble(Config):
    """A line drawn through the object (or, ``positive=False``, through what is not the object)."""

    kind: Literal["scribble"] = "scribble"
    points_mm: Annotated[tuple[Position, ...], Field(min_length=1)]
    positive: bool = True
    plane: Plane | None = None


class Lasso(Config):
    """A closed line around the object (or around what is not the object) on one slice."""

    kind: Literal["lasso"] = "lasso"
    points_mm: Annotated[tuple[Position, ...], Field(min_length=3)]
    plane: Plane
    positive: bool = True


class Mask(Config):
    """A mask on the grid of the volume turned to RAS; with `plane`, it is known on its slices only."""

    kind: Literal["mask"] = "mask"
    shape: tuple[int, int, int]
    start: tuple[int, int, int]
    size: tuple[int, int, int]
    packed: str  # base64 of zlib of np.packbits of the box, in C order
    plane: Plane | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        inside = all(
            min(a, n) >= 0 and a + n <= whole
            for a, n, whole in zip(self.start, self.size, self.shape, strict=True)
        )
        if not inside or int(np.prod(self.shape, dtype=np.float64)) > LARGEST_MASK:
            raise ValueError(f"the box {self.start} + {self.size} does not lie in the grid {self.shape}")
        return self

    @classmethod
    def of(cls, region: Region, plane: Plane | None = None) -> Self:
        """Pack a region."""
        size = tuple(int(n) for n in region.array.shape)
        packed = base64.b64encode(zlib.compress(np.packbits(region.array).tobytes(), 1)).decode()
        return cls.from_dict(
            {"shape": region.shape, "start": region.start, "size": size, "packed": packed, "plane": plane}
        )

    def region(self) -> Region:
        """Unpack.

        Raises
        ------
        ConfigError
            The packed text is damaged.
        """
        count = int(np.prod(self.size))
        need = (count + 7) // 8
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(self.packed, validate=True), need + 1)
        except (ValueError, zlib.error) as error:
            raise self.error(
                f"mask prompt: its packed voxels are damaged ({error}). Draw it again."
            ) from error
        if len(data) != need:
            raise self.error("mask prompt: its packed voxels do not fit its size. Draw it again.")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
        return Region(self.shape, self.start, bits.reshape(self.size))


class ObjectMask(Config):
    """The mask that another object of the session has now."""

    kind: Literal["object"] = "object"
    object: str


Prompt = Annotated[Point | Box | Scribble | Lasso | Mask | ObjectMask, Field(discriminator="kind")]
