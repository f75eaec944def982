"""The "average precision" of cell segmentation, TP / (TP + FP + FN), in both ways to average it.

It is not the area under a precision-recall curve (:mod:`medseg.metrics.coco`): objects have no score here.
StarDist pools the counts of all images, so that an image counts by its objects; cellpose and the Data
Science Bowl 2018 average over images, so that an image with two cells counts as much as one with 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import DatasetError
from medseg.metrics.matching import EmptyPolicy, match_objects
from medseg.metrics.overlap_table import OverlapTable
from medseg.metrics.summary import nanmean
from medseg.types import FloatArray, IntArray

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Of mSA and of the Data Science Bowl 2018."""


@dataclass(frozen=True, eq=False)
class CellPrecision:
    """TP / (TP + FP + FN) of some images at some thresholds.

    Attributes
    ----------
    taus : (t,) thresholds of IoU, inclusive
    tp, fp, fn : (images, t) int64
    per_image : (images, t) float64
        NaN where `empty` leaves it undefined.
    empty : what an image without objects counts as in `per_image`
    """

    taus: tuple[float, ...]
    tp: IntArray
    fp: IntArray
    fn: IntArray
    per_image: FloatArray
    empty: EmptyPolicy

    @property
    def pooled(self) -> FloatArray:
        """Counts added up over images, (t,): ``accuracy`` of StarDist's ``matching_dataset``; else NaN."""
        tp, fp, fn = (counts.sum(axis=0) for counts in (self.tp, self.fp, self.fn))
        total = tp + fp + fn
        return np.where(total > 0, tp / np.maximum(total, 1), np.nan)

    @property
    def mean_over_images(self) -> FloatArray:
        """Mean over the images where it is defined, (t,): cellpose's ``average_precision``, averaged."""
        return nanmean(self.per_image, axis=0)

    @property
    def msa_pooled(self) -> float:
        """Mean of `pooled` over the thresholds."""
        return float(self.pooled.mean())

    @property
    def msa_per_image(self) -> float:
        """Mean over thresholds of each image, then over images: the score of the Data Science Bowl 2018."""
        return float(nanmean(self.per_image.mean(axis=1), axis=0))


def cell_average_precision(
    tables: Sequence[OverlapTable],
    taus: Sequence[float] = IOU_THRESHOLDS,
    empty: EmptyPolicy | None = None,
) -> CellPrecision:
    """Measure a set of images, one table each.

    Parameters
    ----------
    tables : sequence of OverlapTable
    taus : thresholds in (0, 1]
    empty : EmptyPolicy
        Of `per_image`. By default an image without any object is in no mean.

    Raises
    ------
    DatasetError
        There is no image.
    ConfigError
        A threshold is out of range.
    """
    if not tables:
        raise DatasetError("no image to measure. Pass the overlap table of at least one.")
    empty = empty or EmptyPolicy()
    matches = [[match_objects(table, tau) for tau in taus] for table in tables]
    per_image = [[empty.value(m.n_ref, m.n_pred, m.accuracy) for m in row] for row in matches]
    counts = np.array([[(m.tp, m.fp, m.fn) for m in row] for row in matches], np.int64)
    return CellPrecision(
        tuple(taus), counts[..., 0], counts[..., 1], counts[..., 2], np.array(per_image, np.float64), empty
    )
