"""What was removed on the way to a result, and why: never silently."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dropped:
    """Objects that a rule removed.

    Attributes
    ----------
    rule : str
        Which rule it was, in words.
    count : int
        Objects.
    voxels : int
        All of their voxels.
    """

    rule: str
    count: int
    voxels: int
