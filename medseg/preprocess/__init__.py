"""There and exactly back: source grid to network input and return.

The way back is in ``preprocess.restore``, which needs torch; the way there and the store do without.
"""

from medseg.preprocess.locations import class_locations
from medseg.preprocess.pipeline import OUTSIDE, Preprocessed, preprocess, preprocess_labels
from medseg.preprocess.record import Record
from medseg.preprocess.store import Store, StoredCase, build_store, clean

__all__ = [
    "OUTSIDE",
    "Preprocessed",
    "Record",
    "Store",
    "StoredCase",
    "build_store",
    "class_locations",
    "clean",
    "preprocess",
    "preprocess_labels",
]
