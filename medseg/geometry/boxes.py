"""Boxes of the objects of a label map: half-open edge coordinates, (lo_0 .. lo_{n-1}, hi_0 .. hi_{n-1})."""

import numpy as np
from scipy import ndimage

from medseg.types import FloatArray, IntArray


def label_boxes(labels: IntArray) -> tuple[IntArray, FloatArray]:
    """Return the objects of a label map and their boxes.

    Parameters
    ----------
    labels : (a0, a1[, a2]) integers, 0 is background; values may have gaps

    Returns
    -------
    values : (n,) ascending
    boxes : (n, 2d) float32

    Examples
    --------
    >>> label_boxes(np.array([[0, 7, 7], [0, 0, 7]]))[1].tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    values = np.unique(labels)
    values = values[values != 0]
    # find_objects makes a list as long as the largest value
    dense = np.searchsorted(values, labels) + 1
    dense[labels == 0] = 0
    places = ndimage.find_objects(dense, len(values))
    boxes = [[s.start for s in place] + [s.stop for s in place] for place in places]
    return values, np.array(boxes, np.float32).reshape(len(values), 2 * labels.ndim)
