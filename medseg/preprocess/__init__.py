"""There and exactly back: source grid to network input and return."""

from medseg.preprocess.locations import class_locations
from medseg.preprocess.pipeline import OUTSIDE, Preprocessed, preprocess, preprocess_labels
from medseg.preprocess.record import Record
from medseg.preprocess.restore import (
    decide_probabilities,
    labels_at_shape,
    probability_slabs,
    restore_array,
    restore_labels,
    restore_probabilities,
)
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
    "decide_probabilities",
    "labels_at_shape",
    "preprocess",
    "preprocess_labels",
    "probability_slabs",
    "restore_array",
    "restore_labels",
    "restore_probabilities",
]
