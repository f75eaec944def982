"""Things and stuff in one map: every voxel has a class, and voxels of things an object besides.

Two rules make such a map. With masks that have scores it is that of Kirillov et al., Panoptic Segmentation
(CVPR 2019, arXiv 1801.00868) and Panoptic Feature Pyramid Networks (CVPR 2019, arXiv 1901.02446): the best
mask is drawn first, one that is mostly hidden is left out, and stuff fills the rest. With a map of objects
that have no class it is the vote of Cheng et al., Panoptic-DeepLab (CVPR 2020, arXiv 1911.10194): an object
takes the class of things that most of its voxels have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.config import Config
from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.instances.dropped import Dropped
from medseg.instances.schema import Instances, contiguous_labels, whole_labels
from medseg.instances.split import split
from medseg.instances.sums import count_voxels
from medseg.labels import PanopticLabels
from medseg.metrics.overlap_table import overlap_table
from medseg.types import Array, BoolArray, FloatArray, IntArray
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.instances.centre_model import Found

NO_CLASS = "object without a voxel of a thing"
NO_OBJECT = "voxels of things without an object"
HIDDEN = "mostly hidden by objects of higher score"
EMPTY = "mask without a voxel"
# Up to this value, counting voxels is faster than sorting them.
_MOST_CLASSES = 1 << 16


@dataclass(frozen=True, eq=False)
class Merged:
    """Things and stuff of one image.

    Attributes
    ----------
    semantic : (*shape) int32
        Class of each voxel, also under objects; 0 where there is none.
    labels : (*shape) int32
        Objects 1..K.
    classes : (K,) int64
    scores : (K,) float64
        NaN where nothing gave one.
    sources : (K,) int64
        The number of each object in the map that it comes from, or its place among the masks.
    dropped : tuple of Dropped
        What was left out; areas count no object.
    """

    semantic: IntArray
    labels: IntArray
    classes: IntArray
    scores: FloatArray
    sources: IntArray
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, eq=False)
class ObjectMask:
    """One object that may overlap others.

    Attributes
    ----------
    low : first voxel of the window along each axis
    mask : bool, as many axes
        The object in its window, which lies inside of the image.
    value : class of the object
    score : 0 to 1
    """

    low: tuple[int, ...]
    mask: BoolArray
    value: int
    score: float

    @property
    def window(self) -> tuple[slice, ...]:
        """Where the mask is in the image."""
        return tuple(slice(a, a + n) for a, n in zip(self.low, self.mask.shape, strict=True))


def mask_of(voxels: IntArray, shape: tuple[int, ...], value: int, score: float) -> ObjectMask:
    """Return the mask of an object whose voxels are given by their linear index in an image of `shape`.

    >>> mask_of(np.array([5, 9]), (3, 4), 2, 0.9).low
    (1, 1)
    """
    if not voxels.size:
        return ObjectMask((0,) * len(shape), np.zeros((1,) * len(shape), bool), value, score)
    places = np.stack(np.unravel_index(voxels, shape))
    low = places.min(axis=1)
    mask = np.zeros(places.max(axis=1) - low + 1, bool)
    mask[tuple(places - low[:, None])] = True
    return ObjectMask(tuple(int(v) for v in low), mask, value, score)


def merge_dense(
    semantic: Array,
    objects: Array,
    classes: PanopticLabels,
    min_stuff: float = 0.0,
    voxel: float = 1.0,
    scores: FloatArray | None = None,
    dropped: tuple[Dropped, ...] = (),
) -> Merged:
    """Give each object the class of things that most of its voxels have; stuff fills what no object covers.

    Parameters
    ----------
    semantic : (*shape) int
        Class of each voxel.
    objects : (*shape) int
        Objects of any class, gaps allowed. An object keeps all of its voxels, whatever class they have.
    classes : PanopticLabels
    min_stuff, voxel : float
        A class of stuff with less than that in the image becomes 0; size of a voxel in the same unit.
    scores : (K,), optional
        Of the objects in ascending order of their numbers.
    dropped : tuple of Dropped
        What was left out before.

    Raises
    ------
    GeometryError
        The maps have different shapes.
    LabelError
        A value of `semantic` has no class, or a map is no label map.

    Notes
    -----
    Of equally frequent classes the lowest value wins. An object without a voxel of a thing is dropped, and so
    are voxels of things that have no object: they become 0.

    Examples
    --------
    >>> classes = PanopticLabels(labels={"liver": 1, "lesion": 2, "cyst": 3}, things=("lesion", "cyst"))
    >>> merged = merge_dense(np.array([1, 2, 3, 3, 2]), np.array([0, 8, 8, 8, 0]), classes)
    >>> merged.semantic.tolist(), merged.labels.tolist(), merged.dropped[0].voxels
    ([1, 3, 3, 3, 0], [0, 1, 1, 1, 0], 1)
    """
    known, numbered, ids = _checked(semantic, objects, classes)
    table = overlap_table(numbered, known)
    votes = _majority(table.pairs, table.pair_voxels, table.predictions, len(ids), classes)
    kept = votes > 0
    lut = np.zeros(len(ids) + 1, np.int32)
    lut[1:][kept] = np.arange(1, int(kept.sum()) + 1)
    labels = lut[numbered]
    lost = list(dropped)
    if not kept.all():
        lost.append(Dropped(NO_CLASS, int((~kept).sum()), int(table.reference_voxels[~kept].sum())))
    given = np.full(len(ids), np.nan) if scores is None else np.asarray(scores, np.float64)
    if given.shape != (len(ids),):
        raise LabelError(f"{len(given)} scores for {len(ids)} objects. Give one for each.")
    things = (votes[kept], given[kept], ids[kept])
    return _filled(known, labels, *things, classes, tuple(lost), min_stuff / voxel)


def merge_masks(
    masks: Sequence[ObjectMask],
    semantic: Array,
    classes: PanopticLabels,
    least_score: float = 0.5,
    most_hidden: float = 0.5,
    min_stuff: float = 0.0,
    voxel: float = 1.0,
) -> Merged:
    """Draw masks that may overlap, best first; stuff fills what none of them covers.

    Parameters
    ----------
    masks : several ObjectMask
    semantic : (*shape) int
        Class of each voxel. Where it has a thing and no mask is, the voxel becomes 0.
    classes, min_stuff, voxel : as for :func:`merge_dense`
    least_score : float
        Masks of a lower score are dropped.
    most_hidden : float
        And so is one of which more than this part is covered by better ones; of another, what is left stays.

    Raises
    ------
    ConfigError
        A mask is of a class that is no thing, or lies outside of the image.
    LabelError
        A value of `semantic` has no class.

    Notes
    -----
    Objects are numbered best first. Of equal scores, the mask comes first whose first voxel does.

    Examples
    --------
    >>> classes = PanopticLabels(labels={"liver": 1, "lesion": 2}, things=("lesion",))
    >>> good, bad = (ObjectMask((n,), np.ones(3, bool), 2, score) for n, score in ((1, 0.9), (2, 0.8)))
    >>> merged = merge_masks([bad, good], np.ones(6, int), classes)
    >>> merged.labels.tolist(), merged.dropped[0].rule
    ([0, 1, 1, 1, 0, 0], 'mostly hidden by objects of higher score')
    """
    known = known_classes(semantic, classes)
    labels = np.zeros(known.shape, np.int32)
    lost: dict[str, list[int]] = {}
    order: list[int] = []
    for number in sorted(range(len(masks)), key=lambda k: _rank(masks[k], known.shape)):
        each = masks[number]
        if each.value not in classes.thing_values:
            raise ConfigError(
                f"mask {number} has class {each.value}, which is no thing. Give it one that is."
            )
        part, size = labels[each.window], int(np.count_nonzero(each.mask))
        free = each.mask & (part == 0)
        rule = _refusal(each, size, int(np.count_nonzero(free)), least_score, most_hidden)
        if rule:
            lost.setdefault(rule, []).append(size)
            continue
        order.append(number)
        part[free] = len(order)
    dropped = tuple(Dropped(rule, len(sizes), sum(sizes)) for rule, sizes in lost.items())
    values = np.array([masks[n].value for n in order], np.int64)
    scores = np.array([masks[n].score for n in order], np.float64)
    things = (values, scores, np.array(order, np.int64))
    return _filled(known, labels, *things, classes, dropped, min_stuff / voxel)


def merge_found(
    found: "Found", classes: PanopticLabels, min_stuff: float = 0.0, voxel: float = 1.0
) -> Merged:
    """Paint the objects that a network found over its stuff; parameters as for :func:`merge_dense`."""
    areas = np.zeros(found.labels.shape, np.int32) if found.areas is None else found.areas.astype(np.int32)
    count = len(found.scores)
    things = (found.classes, found.scores.astype(np.float64), np.arange(1, count + 1))
    return _filled(areas, found.labels, *things, classes, found.dropped, min_stuff / voxel)


def split_things(
    semantic: Array,
    classes: PanopticLabels,
    spacing: Sequence[float],
    method: str = "components",
    config: Config | None = None,
    min_volume: float = 0.0,
    threads: int = 1,
) -> tuple[IntArray, IntArray, tuple[Dropped, ...]]:
    """Make objects of the things of a map of classes.

    Parameters
    ----------
    semantic : (*shape) int
    classes : PanopticLabels
    spacing, method, config, min_volume, threads : as for :func:`medseg.instances.split.split`

    Returns
    -------
    semantic : int32, without the things that are in no object
    objects : int32
    dropped : what was too small
    """
    known = known_classes(semantic, classes)
    thing = np.isin(known, classes.thing_values)
    found = split(np.where(thing, known, 0).astype(np.int32), spacing, method, config, min_volume, threads)
    return np.where(thing & (found.labels == 0), 0, known), found.labels, found.dropped


def _rank(mask: ObjectMask, shape: tuple[int, ...]) -> tuple[float, int]:
    """Return what masks are sorted by: best first, then by their first voxel."""
    if any(s.start < 0 or s.stop > n for s, n in zip(mask.window, shape, strict=True)):
        raise ConfigError(f"a mask at {mask.low} reaches out of the image {shape}. Clip it.")
    if not mask.mask.any():
        return -mask.score, 0
    first = np.unravel_index(int(mask.mask.argmax()), mask.mask.shape)
    place = tuple(int(a) + b for a, b in zip(first, mask.low, strict=True))
    return -mask.score, int(np.ravel_multi_index(place, shape))


def _refusal(mask: ObjectMask, size: int, free: int, least_score: float, most_hidden: float) -> str:
    if mask.score < least_score:
        return f"score below {least_score:g}"
    if not size:
        return EMPTY
    return HIDDEN if size - free > most_hidden * size else ""


def known_classes(semantic: Array, classes: PanopticLabels) -> IntArray:
    """Return a map of classes as int32.

    Raises
    ------
    LabelError
        It holds a value that is no class, or is no label map.
    """
    whole = whole_labels(semantic)
    found = _values(whole)
    unknown = found[~np.isin(found, [0, *classes.labels.values()])]
    if unknown.size:
        raise LabelError(
            f"semantic map holds {int(unknown[0])}, which is no class ("
            f"{', '.join(f'{v} {n}' for v, n in classes.names.items())}). Add it to 'labels', or set it to 0."
        )
    return whole.astype(np.int32)


def _values(whole: IntArray) -> IntArray:
    """Return the values that occur, ascending."""
    low, high = int(whole.min(initial=0)), int(whole.max(initial=0))
    if low < 0 or high > _MOST_CLASSES:
        return np.unique(whole)
    return np.flatnonzero(count_voxels(whole.astype(np.int32, copy=False), high))


def _checked(semantic: Array, objects: Array, classes: PanopticLabels) -> tuple[IntArray, IntArray, IntArray]:
    if semantic.shape != objects.shape:
        raise GeometryError(
            f"semantic map {semantic.shape} and objects {objects.shape}: expected one shape. Resample one "
            "onto the grid of the other."
        )
    known = known_classes(semantic, classes)
    numbered, ids = contiguous_labels(objects[None])
    return known, numbered[0], ids


def _majority(
    pairs: IntArray, voxels: IntArray, values: IntArray, count: int, classes: PanopticLabels
) -> IntArray:
    """Return the most frequent thing of each object, 0 for none; the lowest of equals."""
    result = np.zeros(count, np.int64)
    thing = np.isin(values[pairs[:, 1]], classes.thing_values)
    owner, value, n = pairs[thing, 0], values[pairs[thing, 1]], voxels[thing]
    order = np.lexsort((value, -n, owner))
    owner, value = owner[order], value[order]
    first = np.concatenate([np.ones(min(1, len(owner)), bool), owner[1:] != owner[:-1]])
    result[owner[first]] = value[first]
    return result


def _filled(
    semantic: IntArray,
    labels: IntArray,
    values: IntArray,
    scores: FloatArray,
    sources: IntArray,
    classes: PanopticLabels,
    dropped: tuple[Dropped, ...],
    least_voxels: float,
) -> Merged:
    """Paint objects over stuff; things without an object, and areas that are too small, become 0."""
    table = np.concatenate([[0], values]).astype(np.int32)
    outside = labels == 0
    result = np.where(outside, semantic, table[labels])
    bare = outside & np.isin(semantic, classes.thing_values)
    lost = list(dropped)
    if bare.any():
        lost.append(Dropped(NO_OBJECT, 0, int(np.count_nonzero(bare))))
        result[bare] = 0
    for value in classes.stuff_values:
        area = result == value
        size = int(np.count_nonzero(area))
        if 0 < size < least_voxels:
            lost.append(
                Dropped(f"stuff {classes.names[value]} of less than {least_voxels:g} voxels", 0, size)
            )
            result[area] = 0
    return Merged(result, labels, values.astype(np.int64), scores, sources, tuple(lost))


@dataclass(frozen=True, eq=False)
class Panoptic:
    """A panoptic map on the grid of its image.

    Attributes
    ----------
    semantic : Volume
        One channel of int32: the class of each voxel, also under objects; 0 where there is none.
    instances : Instances
        Objects of the things, with class, score, and everything that was dropped.
    classes : PanopticLabels
        Its divisor leaves room for all objects.
    provenance : dict
        Plain data.
    """

    semantic: Volume
    instances: Instances
    classes: PanopticLabels
    provenance: dict[str, Any] = field(default_factory=dict)

    def packed(self) -> Volume:
        """Return ``value * divisor + object`` in one channel of int32; 0 where there is no class.

        The number of an object is that of its row in the table and of its voxels in the map of objects.
        """
        objects = self.instances.volume.array
        return self.semantic.with_array(self.classes.pack(self.semantic.array, objects))

    def stuff_voxels(self) -> dict[str, int]:
        """Return the voxels of each class of stuff that is there."""
        counts = np.bincount(self.semantic.array.ravel(), minlength=max(self.classes.labels.values()) + 1)
        named = {self.classes.names[value]: int(counts[value]) for value in self.classes.stuff_values}
        return {name: count for name, count in named.items() if count}


def panoptic_of(
    merged: Merged, grid: Volume, classes: PanopticLabels, provenance: dict[str, Any] | None = None
) -> Panoptic:
    """Put a merged map on a grid.

    Parameters
    ----------
    merged : Merged
        With the axes of the grid; two for a picture of one slice.
    grid : Volume
        Any one on that grid.
    """
    shape = (1, *grid.shape)
    provenance = dict(provenance or {})
    names = {value: classes.names[value] for value in classes.thing_values}
    instances = Instances(
        grid.with_array(merged.labels.reshape(shape)),
        merged.classes,
        merged.scores,
        names,
        merged.sources,
        merged.dropped,
        provenance,
    )
    semantic = grid.with_array(merged.semantic.reshape(shape).astype(np.int32, copy=False))
    return Panoptic(semantic, instances, classes.for_objects(len(instances)), provenance)
