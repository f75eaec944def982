"""A result: the label map on the source grid, what its integers mean, and where it came from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import LabelError
from medseg.labels import LabelSet
from medseg.volume import Volume


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What every model of medseg returns.

    Attributes
    ----------
    volume : Volume
        One channel of unsigned integers on the grid of the input image.
    labels : LabelSet
        Their meaning.
    provenance : dict
        Model, versions, settings and input hashes; plain data.
    probabilities : Path, optional
        File with the probabilities, where they were asked for.
    """

    volume: Volume
    labels: LabelSet
    provenance: dict[str, Any] = field(default_factory=dict)
    probabilities: Path | None = None

    def __post_init__(self) -> None:
        if self.volume.channels != 1 or self.volume.array.dtype.kind not in "ui":
            raise LabelError(
                f"a segmentation needs one channel of integers, not {self.volume.channels} "
                f"of {self.volume.array.dtype}."
            )

    def volume_ml(self) -> dict[str, float]:
        """Volume of each foreground entry, in millilitres."""
        scale = self.volume.geometry.voxel_volume / 1000.0
        if self.volume.geometry.unit == "micron":
            scale *= 1e-9
        return {
            name: float(self.labels.mask(self.volume.array, name).sum()) * scale
            for name in self.labels.foreground
        }
