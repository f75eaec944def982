"""Voxels with their geometry: the one value that everything in medseg passes on.

Arrays are ``(channel, i, j, k)``; ``affine`` maps voxel indices to RAS+ world coordinates.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from medseg.errors import GeometryError
from medseg.types import Array, FloatArray

if TYPE_CHECKING:
    from monai.data import MetaTensor

Unit = Literal["mm", "micron"]

# Relative to the spacing: what float32 headers lose when they store an affine.
AFFINE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in the world.

    Attributes
    ----------
    shape : (int, int, int)
        Voxels along i, j, k.
    affine : (4, 4) float64
        Voxel index to RAS+ world position, in `unit`. The array is read-only.
    unit : "mm" or "micron"
        Unit of the world.
    """

    shape: tuple[int, int, int]
    affine: FloatArray
    unit: Unit = "mm"

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"shape {shape}: expected three positive sizes (i, j, k).")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(
                "affine: expected 4x4 finite numbers. Re-export the image with a valid header."
            )
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise GeometryError(
                "affine: its axes are degenerate (determinant 0), so voxels have no volume. "
                "Re-export the image with a valid header."
            )
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along i, j, k, in `unit`."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        # Headers hold float32: where the norm of an oblique column misses one by rounding, take it, so that
        # sizes derived from spacings do not hang on the last bit.
        single = lengths.astype(np.float32).astype(np.float64)
        lengths = np.where(np.abs(single - lengths) < 1e-9 * lengths, single, lengths)
        return cast(tuple[float, float, float], tuple(float(x) for x in lengths))

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel, in cubic `unit`."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def matches(self, other: "Geometry", tolerance: float = AFFINE_TOLERANCE) -> bool:
        """Return whether both grids have the same shape and, within `tolerance` voxels, the same place."""
        if self.shape != other.shape or self.unit != other.unit:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], [1])).reshape(4, -1)
        moved = np.linalg.solve(self.affine, other.affine) @ corners - corners  # in voxels of this grid
        return bool(np.abs(moved[:3]).max() <= tolerance * max(1.0, max(self.shape) / 100))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.unit == other.unit
            and bool(np.array_equal(self.affine, other.affine))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label map and its grid; a mismatch of the two cannot be built.

    Attributes
    ----------
    array : (channel, i, j, k)
        Voxel values, any dtype. A 3-dimensional array is given a leading channel.
    geometry : Geometry
        The grid of every channel.
    notes : tuple of str
        What the reader found worth saying (for example a conflict of sform and qform).
    """

    array: Array
    geometry: Geometry
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim == 3:
            array = array[None]
            object.__setattr__(self, "array", array)
        if array.ndim != 4 or array.shape[0] < 1:
            raise GeometryError(f"array of shape {array.shape}: expected (channel, i, j, k) or (i, j, k).")
        if array.shape[1:] != self.geometry.shape:
            raise GeometryError(f"array {array.shape[1:]} does not fit its grid {self.geometry.shape}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along i, j, k (without the channel)."""
        return self.geometry.shape

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[0])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along i, j, k."""
        return self.geometry.spacing

    def with_array(self, array: Array) -> "Volume":
        """Return the same grid with other values."""
        return Volume(array, self.geometry, self.notes)

    def to_metatensor(self) -> "MetaTensor":
        """Return a MONAI MetaTensor that carries the affine and the unit."""
        import torch
        from monai.data import MetaTensor

        # A copy: torch takes no negative strides and warns of read-only memory.
        tensor = MetaTensor(
            torch.from_numpy(self.array.copy(order="C")), affine=torch.tensor(self.geometry.affine)
        )
        tensor.meta["unit"] = self.geometry.unit
        return tensor

    @classmethod
    def from_metatensor(cls, tensor: "MetaTensor") -> "Volume":
        """Rebuild a Volume from :meth:`to_metatensor`, or from any channel-first MetaTensor in mm."""
        array = tensor.as_tensor().detach().cpu().numpy()
        affine = np.asarray(tensor.affine, dtype=np.float64)
        return cls(array, Geometry(array.shape[-3:], affine, tensor.meta.get("unit", "mm")))
