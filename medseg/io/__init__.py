"""Files to Volume and back, and folders to datasets."""

from medseg.io.check import check_dataset
from medseg.io.dataset import Case, Dataset, list_cases, open_dataset, read_image, read_label, with_channels
from medseg.io.findings import Finding
from medseg.io.formats import READERS, WRITERS, read, write

__all__ = [
    "READERS",
    "WRITERS",
    "Case",
    "Dataset",
    "Finding",
    "check_dataset",
    "list_cases",
    "open_dataset",
    "read",
    "read_image",
    "read_label",
    "with_channels",
    "write",
]
