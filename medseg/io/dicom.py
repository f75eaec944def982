"""DICOM series: the place in the table, for a later release."""

from pathlib import Path

from medseg.errors import ReadError
from medseg.volume import Volume


def read_dicom(path: Path) -> Volume:
    """Refuse, and say what to do meanwhile.

    Raises
    ------
    ReadError
        Always.
    """
    raise ReadError(
        f"{path}: reading DICOM series comes in a later release. Convert the series to NIfTI first, "
        "for example with dcm2niix."
    )
