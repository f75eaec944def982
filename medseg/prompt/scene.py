"""A volume ready for prompting: one channel, turned to RAS, with the window through which it is looked at."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from medseg.errors import DataError
from medseg.geometry.orient import from_ras, to_ras
from medseg.prompt.prompts import Position
from medseg.prompt.regions import Region, Triple
from medseg.types import Array, FloatArray
from medseg.volume import Geometry, Volume

Rectangle = tuple[int, int, int, int]  # first row, first column, end row, end column (half open) of a slice


@dataclass(frozen=True, eq=False)
class Scene:
    """One image, prepared once for every object and prompt.

    Everything inside :mod:`medseg.prompt` happens on `geometry`, the source grid turned (flips and swaps of
    axes only) until i, j, k run most nearly to R, A, S. So a volume gives the same world mask in each of its
    48 orders.

    Attributes
    ----------
    array : (i, j, k)
        Voxel values in their own type, turned to RAS; contiguous, read-only, finite.
    geometry : Geometry
        Their grid.
    source : Geometry
        The grid that the volume came with; results go back to it.
    window : (float, float)
        Values that are drawn black and white.
    digest : str
        SHA-256 of the voxels and the grid: what caches and sessions know the image by.
    """

    array: Array
    geometry: Geometry
    source: Geometry
    window: tuple[float, float]
    digest: str = field(default="")

    @classmethod
    def of(cls, volume: Volume, window: tuple[float, float]) -> "Scene":
        """Turn and check a volume; voxels that are not finite take the lowest finite value.

        Raises
        ------
        DataError
            Several channels, or no finite voxel.
        """
        if volume.channels != 1:
            raise DataError(
                f"the image has {volume.channels} channels or time points: prompting takes one. "
                "Pick one with `--channel N` (from 0)."
            )
        turned = to_ras(volume)
        array = np.ascontiguousarray(_finite(turned.array[0]))
        array.flags.writeable = False
        key = hashlib.sha256(f"{array.dtype.str}{array.shape}{turned.geometry.affine.tolist()}".encode())
        key.update(array.data)
        return cls(array, turned.geometry, volume.geometry, window, key.hexdigest())

    @property
    def shape(self) -> Triple:
        """Voxels along i, j, k of the turned grid."""
        return self.geometry.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along i, j, k of the turned grid."""
        return self.geometry.spacing

    def to_voxel(self, positions_mm: "Position | FloatArray") -> FloatArray:
        """Project world positions, (3,) or (n, 3), to voxel indices (centres at whole numbers)."""
        inverse = np.linalg.inv(self.geometry.affine)
        return np.asarray(np.asarray(positions_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3])

    def to_world(self, voxels: FloatArray) -> FloatArray:
        """Return the world positions, (3,) or (n, 3), of voxel indices."""
        affine = self.geometry.affine
        return np.asarray(np.asarray(voxels, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3])

    def grey(self, index: tuple[slice | int, ...]) -> FloatArray:
        """Return the part `index` of the voxels through the window: float32, 0 (black) to 255 (white)."""
        return self.through_window(self.array[index])

    def through_window(self, values: Array) -> FloatArray:
        """Return voxel values as they are seen through the window: float32, 0 (black) to 255 (white)."""
        low, high = self.window
        scale = np.float32(255.0 / max(high - low, 1e-6))
        return np.asarray(
            np.clip((values.astype(np.float32) - np.float32(low)) * scale, 0, 255), dtype=np.float32
        )

    def slice(self, axis: int, index: int, field: Rectangle | None = None) -> FloatArray:
        """Return slice `index` across `axis` through the window, or the part `field` of it.

        Rows and columns are the two other axes in their order. `field` must lie within the slice.
        """
        rows, columns = (slice(None), slice(None)) if field is None else _parts(field)
        where: list[slice | int] = [rows, columns]
        where.insert(axis, index)
        return self.grey(tuple(where))

    def restore(self, region: Region) -> Array:
        """Bring a mask back to the grid of the source: (i, j, k) bool."""
        return np.asarray(from_ras(Volume(region.full(), self.geometry), self.source).array[0])


def plane_size(shape: Triple, axis: int) -> tuple[int, int]:
    """Return rows and columns of a slice across `axis`."""
    rows, columns = (n for a, n in enumerate(shape) if a != axis)
    return rows, columns


def _parts(field: Rectangle) -> tuple[slice, slice]:
    return slice(field[0], field[2]), slice(field[1], field[3])


def _finite(array: Array) -> Array:
    if array.dtype.kind not in "fc":
        return array
    good = np.isfinite(array)
    if good.all():
        return array
    if not good.any():
        raise DataError("the image has no finite voxel. Re-export it.")
    return np.where(good, array, array[good].min())
