"""What was done to a case, as plain values: enough to bring any result back to the source grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from medseg.errors import DataError
from medseg.geometry.crop import Box, box_slices
from medseg.types import Array
from medseg.volume import Geometry

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Record:
    """The way of one case from its source grid to the network.

    Attributes
    ----------
    geometry : Geometry
        The source grid (i, j, k).
    transpose : (int, int, int)
        ``transpose_forward``: network axis n is axis ``transpose[n]`` of the reader order (k, j, i).
    crop : three (start, stop)
        The part of the transposed grid that was kept.
    shape : (int, int, int)
        Size of the network's input, after resampling.
    spacing, new_spacing : (float, float, float)
        Voxel size before and after resampling, network order.
    """

    geometry: Geometry
    transpose: Triple
    crop: Box
    shape: Triple
    spacing: tuple[float, float, float]
    new_spacing: tuple[float, float, float]

    @property
    def cropped_shape(self) -> Triple:
        """Size of the kept part before resampling, network order."""
        return cast(Triple, tuple(stop - start for start, stop in self.crop))

    @property
    def inner(self) -> tuple[slice, ...]:
        """Index of the kept part in a (c, a0, a1, a2) array on the transposed source grid."""
        return (slice(None), *box_slices(self.crop))

    @property
    def left_right_axis(self) -> int:
        """The network axis that runs most nearly left-right in the world."""
        source = int(np.argmax(np.abs(self.geometry.affine[0, :3] / self.geometry.spacing)))
        return self.transpose.index(2 - source)

    def to_network(self, array: Array) -> Array:
        """Return a view of a (c, i, j, k) array in network order."""
        return array.transpose(network_axes(self.transpose))

    def to_source(self, array: Array) -> Array:
        """Return a view of a (c, a0, a1, a2) array in network order as (c, i, j, k)."""
        return array.transpose(np.argsort(network_axes(self.transpose)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; floats survive exactly."""
        return {
            "shape_source": list(self.geometry.shape),
            "affine": self.geometry.affine.tolist(),
            "unit": self.geometry.unit,
            "transpose": list(self.transpose),
            "crop": [list(pair) for pair in self.crop],
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "new_spacing": list(self.new_spacing),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """Rebuild from :meth:`to_dict`.

        Raises
        ------
        DataError
            A value is missing.
        """
        try:
            grid = Geometry(values["shape_source"], np.array(values["affine"]), values["unit"])
            crop = tuple((int(start), int(stop)) for start, stop in values["crop"])
            triples = (tuple(values[key]) for key in ("transpose", "shape", "spacing", "new_spacing"))
        except KeyError as error:
            raise DataError(f"record: {error} is missing. Preprocess the case again.") from error
        transpose, shape, spacing, new_spacing = triples
        return cls(grid, transpose, crop, shape, spacing, new_spacing)


def network_axes(transpose: Triple) -> tuple[int, ...]:
    """Return the permutation that takes (c, i, j, k) to network order.

    >>> network_axes((0, 1, 2))
    (0, 3, 2, 1)
    """
    return (0, *(3 - axis for axis in transpose))
