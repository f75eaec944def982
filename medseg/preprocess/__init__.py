"""There and exactly back: source grid to network input and return."""

from medseg.preprocess.bricks import Block, Way
from medseg.preprocess.locations import class_locations
from medseg.preprocess.pipeline import OUTSIDE, Preprocessed, preprocess, preprocess_labels
from medseg.preprocess.record import Record
from medseg.preprocess.restore import (
    Logits,
    Part,
    decide_probabilities,
    labels_at_shape,
    probability_parts,
    restore_array,
    restore_labels,
    restore_probabilities,
)
from medseg.preprocess.store import Store, StoredCase, build_store, clean

__all__ = [
    "OUTSIDE",
    "Block",
    "Logits",
    "Part",
    "Preprocessed",
    "Record",
    "Store",
    "StoredCase",
    "Way",
    "build_store",
    "class_locations",
    "clean",
    "decide_probabilities",
    "labels_at_shape",
    "preprocess",
    "preprocess_labels",
    "probability_parts",
    "restore_array",
    "restore_labels",
    "restore_probabilities",
]
