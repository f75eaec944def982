"""One slice, or a rectangle of one, at a time: what is asked of a promptable network and what it answers."""

from dataclasses import dataclass, field

import numpy as np

from medseg.prompt.scene import Rectangle
from medseg.types import BoolArray, FloatArray


@dataclass(frozen=True, eq=False)
class SlicePrompts:
    """What is known on one slice.

    Attributes
    ----------
    points : (n, 2) float
        Clicks as (row, column); voxel centres are whole numbers.
    positive : (n,) bool
        Whether each lies inside the object.
    box : (float, float, float, float), optional
        First row, first column, end row, end column, as voxel edges: voxel r covers r - 0.5 to r + 0.5.
    mask : (rows, columns) float, optional
        Logits of the whole slice.
    """

    points: FloatArray = field(default_factory=lambda: np.zeros((0, 2)))
    positive: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    box: tuple[float, float, float, float] | None = None
    mask: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class SliceMask:
    """The answer: logits of `field`, and the network's own estimate of their IoU."""

    logits: FloatArray
    field: Rectangle
    score: float

    def mask(self, shape: tuple[int, int]) -> BoolArray:
        """Return the mask of the whole slice of `shape`."""
        mask = np.zeros(shape, dtype=bool)
        mask[self.field[0] : self.field[2], self.field[1] : self.field[3]] = self.logits > 0
        return mask
