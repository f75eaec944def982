"""Objects of one image: a label map on the source grid, and what is known of each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.errors import LabelError
from medseg.instances.dropped import Dropped
from medseg.instances.sums import count_voxels
from medseg.types import Array, FloatArray, IntArray
from medseg.volume import Geometry, Unit, Volume

MOST_OBJECTS = 2**31 - 1
# Integers above these cannot be told apart in the type.
_EXACT_FLOAT = {2: 2**11, 4: 2**24, 8: 2**53}


@dataclass(frozen=True, eq=False)
class Instances:
    """Objects 1..K of an image.

    Build it from any label map with :func:`instances_of`.

    Attributes
    ----------
    volume : Volume
        One channel of int32 on the grid of the image: 0 is background, objects are 1..K without a gap.
    classes : (K,) int64
        Class of each object; 1 where there is only one.
    scores : (K,) float64
        Confidence in 0..1; NaN where nothing gave one.
    class_names : mapping of class to name
    source_ids : (K,) int64
        The number of each object in the label map that it was read from.
    dropped : tuple of Dropped
        Everything that was removed on the way, and by which rule.
    provenance : dict
        Model, versions, settings and input hashes; plain data.
    voxels : (K,) int64
        Counted at construction.
    """

    volume: Volume
    classes: IntArray
    scores: FloatArray
    class_names: Mapping[int, str] = field(default_factory=dict)
    source_ids: IntArray | None = None
    dropped: tuple[Dropped, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    voxels: IntArray = field(init=False)

    def __post_init__(self) -> None:
        labels = self.volume.array
        if self.volume.channels != 1 or labels.dtype != np.int32:
            raise LabelError(
                f"objects need one channel of int32, not {self.volume.channels} of {labels.dtype}. "
                "Build them with instances_of()."
            )
        count = len(self.classes)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > count:
            raise LabelError(
                f"label map holds {low} to {high}, but there are {count} objects: expected 0..K."
            )
        voxels = count_voxels(labels[0], count)[1:]
        if not voxels.all():
            missing = int(np.flatnonzero(voxels == 0)[0]) + 1
            raise LabelError(f"object {missing} of {count} has no voxel. Renumber them with instances_of().")
        object.__setattr__(self, "voxels", voxels)
        object.__setattr__(self, "classes", np.asarray(self.classes, np.int64))
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float64))
        ids = np.arange(1, count + 1) if self.source_ids is None else np.asarray(self.source_ids, np.int64)
        object.__setattr__(self, "source_ids", ids)
        for name in ("scores", "source_ids"):
            if getattr(self, name).shape != (count,):
                raise LabelError(f"{name}: expected one for each of {count} objects.")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def geometry(self) -> Geometry:
        """The grid."""
        return self.volume.geometry

    @property
    def unit(self) -> Unit:
        """Unit of lengths: mm or micron."""
        return self.geometry.unit

    @property
    def ndim(self) -> int:
        """2 for a picture or a single slice (one voxel along k), whose objects have areas; else 3."""
        return 2 if self.geometry.shape[2] == 1 else 3

    @property
    def labels(self) -> IntArray:
        """(i, j, k) int32; (i, j) where :attr:`ndim` is 2."""
        return np.asarray(self.volume.array[0, :, :, 0] if self.ndim == 2 else self.volume.array[0])

    def class_name(self, value: int) -> str:
        """Return the name of a class, or its number."""
        return self.class_names.get(int(value), str(int(value)))


def instances_of(
    labels: Volume,
    classes: Mapping[int, int] | Sequence[int] | Array | None = None,
    scores: Mapping[int, float] | Sequence[float] | Array | None = None,
    class_names: Mapping[int, str] | None = None,
    dropped: tuple[Dropped, ...] = (),
    provenance: dict[str, Any] | None = None,
) -> Instances:
    """Take objects from a label map of any type, with or without gaps in its numbers.

    Parameters
    ----------
    labels : Volume
        One channel. Floating-point values are taken if all of them are whole.
    classes, scores : per object
        A mapping from the numbers in `labels`, or one value for each object in ascending order of them.
        None: class 1, no score.
    class_names, dropped, provenance
        As in :class:`Instances`.

    Raises
    ------
    LabelError
        Values are negative, not whole, or too large; or classes and scores do not fit the objects.

    Examples
    --------
    >>> row = np.array([0, 7, 7, 0, 3.0]).reshape(5, 1, 1)
    >>> found = instances_of(Volume(row, Geometry((5, 1, 1), np.eye(4))))
    >>> found.labels.ravel().tolist(), found.source_ids.tolist()
    ([0, 2, 2, 0, 1], [3, 7])
    """
    if labels.channels != 1:
        raise LabelError(f"label map has {labels.channels} channels; expected one. Take one channel.")
    array, ids = contiguous_labels(labels.array)
    return Instances(
        labels.with_array(array),
        _per_object(classes, ids, 1, "classes").astype(np.int64),
        _per_object(scores, ids, np.nan, "scores").astype(np.float64),
        dict(class_names or {}),
        ids,
        dropped,
        dict(provenance or {}),
    )


def contiguous_labels(labels: Array) -> tuple[IntArray, IntArray]:
    """Return a label map of any type as int32 without gaps, and the number that each object had.

    Parameters
    ----------
    labels : array with a leading axis

    Raises
    ------
    LabelError
        Values are negative, not whole, or too large.
    """
    whole = whole_labels(labels)
    low, high = int(whole.min()), int(whole.max())
    if low < 0:
        raise LabelError(
            f"label map holds {low}; expected 0 for background and positive numbers for objects."
        )
    if high <= max(whole.size, 1 << 20) and high <= MOST_OBJECTS:
        present = count_voxels(whole[0].astype(np.int32, copy=False), high)[1:] > 0
        ids = np.flatnonzero(present) + 1
        if len(ids) == high:
            return whole.astype(np.int32, copy=False), ids
        table = np.zeros(high + 1, np.int32)
        table[ids] = np.arange(1, len(ids) + 1)
        return table[whole], ids
    values, inverse = np.unique(whole, return_inverse=True)  # few voxels with huge numbers
    shift = 0 if values[0] == 0 else 1
    return (inverse.reshape(whole.shape) + shift).astype(np.int32), values[values > 0].astype(np.int64)


def whole_labels(labels: Array) -> IntArray:
    """Return a label map of any type as integers.

    Raises
    ------
    LabelError
        Values are not finite, not whole, or too large for their floating-point type to tell them apart.
    """
    if labels.dtype.kind in "iu":
        return labels
    if labels.dtype == np.bool_:
        return labels.astype(np.uint8)
    if labels.dtype.kind != "f":
        raise LabelError(f"label map of {labels.dtype}: expected integers. Convert it.")
    highest = float(np.abs(labels).max(initial=0))
    if not np.isfinite(highest):
        raise LabelError("label map holds NaN or infinite values. Replace them, for example by 0.")
    if not (np.trunc(labels) == labels).all():
        raise LabelError(
            "label map holds values that are not whole numbers: it was interpolated, or holds probabilities. "
            "Threshold it, or resample labels by nearest neighbour."
        )
    if highest > _EXACT_FLOAT.get(labels.dtype.itemsize, 2**53):
        raise LabelError(
            f"label map holds {highest:.0f}, which {labels.dtype} cannot tell from its neighbours."
        )
    return labels.astype(np.int64)


def _per_object(given: Any, ids: IntArray, default: float, name: str) -> Array:
    if given is None:
        return np.full(len(ids), default)
    if isinstance(given, Mapping):
        missing = [int(i) for i in ids if int(i) not in given]
        if missing:
            raise LabelError(f"{name}: nothing is said of object {missing[0]}. Give a value for each object.")
        return np.array([given[int(i)] for i in ids])
    values = np.asarray(given)
    if values.shape != (len(ids),):
        raise LabelError(f"{name}: {values.shape} values for {len(ids)} objects. Give one for each.")
    return values
