"""What a detector finds, as masks on the grid of the image that may overlap."""

import numpy as np

from medseg.geometry.orient import reads_as_ras, to_ras
from medseg.instances.detect import Detector
from medseg.instances.panoptic import ObjectMask, mask_of
from medseg.instances.paste import mask_window
from medseg.preprocess.record import Record
from medseg.types import IntArray
from medseg.volume import Geometry, Volume


def find_masks(detector: Detector, image: Volume, score: float | None = None) -> list[ObjectMask]:
    """Find the objects of an image, best first in each slice of a 2D detector.

    Those of a lower score are there too, without a voxel, so that they can be counted.

    Parameters
    ----------
    detector : Detector
    image : Volume
    score : least score of an object; that of the detector by default

    Raises
    ------
    PlanError, DataError
        The image does not fit the model.
    """
    found, record = detector.detect(image)
    least = detector.score if score is None else score
    places = _places(detector, image.geometry, record)
    kinds = detector.bundle.labels.foreground_values
    result = []
    for number, each in enumerate(found):
        where = places if detector.settings.dimensions == 3 else places[number]
        for k, (value, sure) in enumerate(zip(each.classes.tolist(), each.scores.tolist(), strict=True)):
            voxels: IntArray = np.zeros(0, np.int64)
            if sure >= least:
                threshold = detector.finding.mask
                window, inside = mask_window(each.boxes[k], each.masks[k], each.shape, threshold)
                voxels = where[window][inside]
            result.append(mask_of(voxels, image.shape, kinds[value], sure))
    return result


def _places(detector: Detector, grid: Geometry, record: Record) -> IntArray:
    """Return where in the image, as a linear index, each voxel of the cropped source grid is."""
    numbers = np.arange(np.prod(grid.shape), dtype=np.int64).reshape(1, *grid.shape)
    volume = Volume(numbers, grid)
    if reads_as_ras(detector.bundle.plan.reader):
        volume = to_ras(volume)
    return np.asarray(record.to_network(volume.array)[record.inner][0])
