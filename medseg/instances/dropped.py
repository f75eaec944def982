"""What was removed, and why: nothing is dropped silently."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dropped:
    """Objects that one rule removed.

    Attributes
    ----------
    rule : str
        The rule with its threshold, in words.
    count, voxels : int
        Objects removed, and voxels of all of them.
    """

    rule: str
    count: int
    voxels: int
