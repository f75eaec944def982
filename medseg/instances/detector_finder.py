"""A trained detector among what finds objects by name."""

from dataclasses import dataclass

import numpy as np

from medseg.errors import ConfigError, DataError
from medseg.instances.centre_model import Found
from medseg.instances.detect import Detector
from medseg.volume import Volume


@dataclass(frozen=True, eq=False)
class DetectorFinder:
    """Answers as :class:`medseg.instances.finders.Finder` asks.

    Attributes
    ----------
    name : path of the bundle
    detector : Detector
    """

    name: str
    detector: Detector

    @property
    def class_names(self) -> dict[int, str]:
        """What an object of each class is called."""
        labels = self.detector.bundle.labels.foreground
        return {value: label for label, value in labels.items() if isinstance(value, int)}

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find the objects of a picture (2D detectors) or a volume (3D).

        Raises
        ------
        ConfigError
            A diameter is given: a detector finds objects of all sizes.
        DataError
            A picture for a 3D detector, a volume for a 2D one.
        """
        if diameter is not None:
            raise ConfigError(f"{self.name}: a detector finds objects of all sizes. Leave --diameter out.")
        flat, dimensions = image.shape[2] == 1, self.detector.settings.dimensions
        if flat != (dimensions == 2):
            kind = "picture" if flat else f"volume of {image.shape[2]} slices"
            raise DataError(
                f"{self.name} finds objects in {dimensions}D, and the image is a {kind}. "
                "Take a model (--model) that was trained on such images."
            )
        found = self.detector.find(image)
        labels = found.volume.array[0]
        notes = (f"{found.limited} tiles held more than is kept",) if found.limited else ()
        return Found(
            labels[..., 0] if flat else labels,
            np.asarray(found.scores, np.float32),
            None,
            0,
            tuple(found.dropped),
            np.asarray(found.classes, np.int64),
            notes=notes,
        )
