"""What is asked about one object, and what comes back: the two values between sessions and propagators."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from medseg.prompt.prompts import Prompt
from medseg.prompt.regions import Region


@dataclass(frozen=True, eq=False)
class Target:
    """One object as its user has described it so far.

    Attributes
    ----------
    prompts : tuple of Prompt
        In the order in which they were given; an ObjectMask has been replaced by a Mask already.
    axis : int
        Axis of the turned grid across which slices are taken (0 sagittal, 1 coronal, 2 axial).
    limits : (int, int), optional
        First and last slice (both included) that the object may reach, where the user gave them.
    previous : Region, optional
        The mask before the newest `fresh` prompts: a correction changes what is near them and no more.
    fresh : int
        How many of the last prompts the previous mask has not seen. 0 with `previous` None: all of them.
    forbidden : Region, optional
        Voxels of other objects that must be kept (overlap policy ``keep``).
    """

    prompts: tuple[Prompt, ...]
    axis: int
    limits: tuple[int, int] | None = None
    previous: Region | None = None
    fresh: int = 0
    forbidden: Region | None = None


@dataclass(frozen=True, eq=False)
class Propagation:
    """The object in 3D.

    Attributes
    ----------
    region : Region
        On the turned grid of the scene.
    confidence : mapping of int to float
        Slice index across the axis -> 0..1; only slices that were looked at.
    notes : tuple of str
        What the user should know, e.g. why it stopped where it did.
    """

    region: Region
    confidence: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
