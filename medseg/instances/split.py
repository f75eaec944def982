"""Touching objects to one label each: the ways to split, by name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import ConfigError, LabelError
from medseg.instances.basins import find_basins, relabel
from medseg.instances.components import label_components
from medseg.instances.distance import check_spacing, distance_map, label_distances
from medseg.instances.dropped import Dropped
from medseg.instances.flood import flood
from medseg.instances.sizes import remove_small
from medseg.types import Array, FloatArray, IntArray

# Of the finest voxel size: on 729 touching ellipsoids, 0.5 to 0.75 found 728, 0.3 found 760 and 2 found 714.
DEFAULT_DEPTH = 0.75
# Smaller crops are split faster than threads start.
_SMALL = 1 << 20
# To start a distance map takes as long as so many of its voxels.
_START = 20_000
_MOST_GAPS = 1 << 20


class ComponentsConfig(Config):
    """Connected components.

    Attributes
    ----------
    floor : float
        A height map's foreground is above it.
    connectivity : int
        6, 18 or 26; in two dimensions 4 or 8, which 6 and the others stand for.
    """

    floor: float = 0.0
    connectivity: int = 26


class BasinsConfig(Config):
    """How deep the valley between two summits must be for them to be two objects.

    Attributes
    ----------
    h : float or None
        Depth below the lower summit: in mm (the unit of the spacing) for distances, in its own unit for
        another height map. None: 0.75 of the finest voxel size for distances; a height map needs one of
        `h` and `rel`.
    rel : float
        The same as a part of the lower summit, added to `h`. With it alone, `h` is 0.
    floor : float
        A height map's foreground is above it.
    connectivity : int
        26 or 6; in two dimensions 8 or 4, which these stand for.
    """

    h: float | None = Field(None, ge=0)
    rel: float = Field(0.0, ge=0, lt=1)
    floor: float = 0.0
    connectivity: int = 26


class WatershedConfig(BasinsConfig):
    """Flooding from the summits that the same depth leaves; `BasinsConfig` says what each setting means."""


@dataclass(frozen=True, eq=False)
class Heights:
    """What is split: a height map, its foreground above the floor of the settings.

    Attributes
    ----------
    array : (z, y, x) or (y, x) float32
    spacing : floats
        Size of a voxel along each axis.
    distances : bool
        The heights are distances in the unit of the spacing, measured from a mask.
    """

    array: FloatArray
    spacing: tuple[float, ...]
    distances: bool


@dataclass(frozen=True, eq=False)
class Split:
    """Objects, and what was decided on the way.

    Attributes
    ----------
    labels : int32, as the input
        0 is background, 1 to k the objects.
    sources : (k,) int64
        The label of the input that each object comes from; 1 for a height map.
    dropped : tuple of Dropped
        What was removed.
    """

    labels: IntArray
    sources: IntArray
    dropped: tuple[Dropped, ...] = ()

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.sources)


def split_basins(heights: Heights, config: BasinsConfig, threads: int = 1) -> IntArray:
    """Split by :func:`find_basins`, the default; to try several depths, keep what it returns."""
    h, floor = _depth(heights, config), _floor(heights, config.floor)
    basins = find_basins(heights.array, floor, config.connectivity, threads)
    return relabel(basins.numbers, basins.hierarchy.merge(h, config.rel), threads, in_place=True)


def split_watershed(heights: Heights, config: WatershedConfig, threads: int = 1) -> IntArray:
    """Flood from the summits that `split_basins` leaves: smoother borders, five times the work."""
    h, floor = _depth(heights, config), _floor(heights, config.floor)
    basins = find_basins(heights.array, floor, config.connectivity, threads)
    markers = np.zeros(heights.array.shape, dtype=np.int32)
    hierarchy = basins.hierarchy
    markers.reshape(-1)[hierarchy.roots] = hierarchy.merge(h, config.rel)[1:]
    return flood(heights.array, markers, floor, config.connectivity)


def split_components(heights: Heights, config: ComponentsConfig, threads: int = 1) -> IntArray:
    """Take what touches for one object."""
    inside = heights.array > _floor(heights, config.floor)
    return label_components(inside, config.connectivity)


# Each function takes settings of the type beside it.
SPLITTERS: dict[str, tuple[type[Config], Callable[..., IntArray]]] = {
    "basins": (BasinsConfig, split_basins),
    "watershed": (WatershedConfig, split_watershed),
    "components": (ComponentsConfig, split_components),
}
DEFAULT = "basins"


def split(
    image: Array,
    spacing: Sequence[float],
    method: str = DEFAULT,
    config: Config | None = None,
    min_volume: float = 0.0,
    threads: int = 1,
) -> Split:
    """Split a mask, a label map or a height map into objects.

    Parameters
    ----------
    image : (z, y, x) or (y, x)
        Integers or booleans are a label map: each label is split by its own distance map, and no object has
        voxels of two labels. Floats are a height map: high is inside.
    spacing : floats
        Size of a voxel along each axis, all in one unit.
    method : a key of :data:`SPLITTERS`
    config : of the type beside it there; its defaults, if not given
    min_volume : float
        Objects below it are removed, in the cubed (or squared) unit of the spacing.
    threads : int
        The result does not depend on it.

    Raises
    ------
    ConfigError
        The method is unknown, the settings are another's, or a height map comes without a depth.
    LabelError
        A label is negative.
    GeometryError
        The axes or the spacing are unusable.

    Examples
    --------
    >>> two = np.ones((5, 9), int)
    >>> two[[0, 1, 3, 4], 4] = 0  # a neck of one voxel
    >>> split(two, (1.0, 1.0)).count, split(two, (1.0, 1.0), "components").count
    (2, 1)
    """
    check_spacing(spacing, image.ndim)
    settings, function = _chosen(method, config)
    sizes, voxel = tuple(float(size) for size in spacing), float(np.prod(spacing))
    if image.dtype.kind == "f":
        labels = function(Heights(image, sizes, distances=False), settings, threads)
        sources: IntArray = np.ones(int(labels.max(initial=0)), dtype=np.int64)
    else:
        labels, sources = _split_labels(image, sizes, function, settings, threads)
    labels, kept, dropped = remove_small(labels, min_volume, voxel, threads)
    return Split(labels, sources[kept - 1], dropped)


def _chosen(method: str, config: Config | None) -> tuple[Config, Callable[..., Any]]:
    if method not in SPLITTERS:
        raise ConfigError(f"method {method!r} is unknown. Use one of {', '.join(SPLITTERS)}.")
    settings, function = SPLITTERS[method]
    if config is not None and type(config) is not settings:
        raise ConfigError(
            f"method {method!r} takes a {settings.__name__}, not a {type(config).__name__}. "
            "Give the settings of this method."
        )
    return config or settings(), function


def _split_labels(
    image: Array,
    spacing: tuple[float, ...],
    function: Callable[..., IntArray],
    settings: Config,
    threads: int,
) -> tuple[IntArray, IntArray]:
    """Split each label in its own box; return objects, and the label of each."""
    boxes = list(_boxes(image))
    if isinstance(settings, ComponentsConfig):
        labels = label_components(image, settings.connectivity)
        return labels, _values_at(image, labels)
    # many small objects: one sweep over all of the image is quicker than a start for each of them
    alone = sum(image[box].size + _START for _, box in boxes)
    distances = label_distances(image, spacing, threads) if len(boxes) > 1 and image.size < alone else None
    sources: list[int] = []
    result: IntArray = np.zeros(image.shape if len(boxes) != 1 else 0, dtype=np.int32)
    for value, box in boxes:
        crop = image[box] if image.dtype == bool else image[box] == value
        used = threads if crop.size > _SMALL else 1
        if distances is None:
            depth = distance_map(crop, spacing, threads=used)
        else:
            depth = np.where(crop, distances[box], np.float32(0))
        labels = function(Heights(depth, spacing, distances=True), settings, used)
        if len(boxes) == 1:  # whose box is the whole image
            result = labels
        else:
            labels[crop] += len(sources)
            result[box] += labels
        sources += [value] * (int(labels.max(initial=0)) - len(sources))
    return result, np.array(sources, dtype=np.int64)


def _boxes(image: Array) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield each label with the box around it and one voxel more; the whole image for a single label."""
    whole = tuple(slice(0, n) for n in image.shape)
    if image.dtype.kind not in "biu":
        raise LabelError(f"labels of type {image.dtype}: expected integers. Round or convert them.")
    if image.dtype.kind == "b" or not image.size:
        yield 1, whole
        return
    if image.min() < 0:
        raise LabelError(f"label {image.min()} is negative. Make it background (0) or a number of its own.")
    found = dict(_objects(image))
    for value, box in found.items():
        rim = (slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(box, image.shape, strict=True))
        yield value, whole if len(found) == 1 else tuple(rim)


def _objects(image: Array) -> Iterator[tuple[int, tuple[slice, ...]]]:
    from scipy.ndimage import find_objects

    highest = int(image.max())
    if highest > max(_MOST_GAPS, image.size):  # find_objects keeps an entry for each number up to the highest
        values, dense = np.unique(image, return_inverse=True)
        dense = dense.reshape(image.shape) + (values[0] > 0)
        values = values[values > 0]
    else:
        values, dense = np.arange(1, highest + 1), image
    small = dense.astype(np.int32) if dense.dtype.itemsize > 4 or dense.dtype == np.uint32 else dense
    for value, box in zip(values, find_objects(small), strict=True):
        if box is not None:
            yield int(value), box


def _values_at(image: Array, labels: IntArray) -> IntArray:
    """Return the value of the image under each label, which is the same all over it."""
    values = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int64)
    values[labels.reshape(-1)] = image.reshape(-1)
    return values[1:]


def depth_of(config: BasinsConfig, spacing: Sequence[float]) -> float:
    """Return the depth `h` for distances: the one of the settings, or 0.75 of the finest voxel size."""
    if config.h is not None or config.rel:
        return config.h or 0.0
    return DEFAULT_DEPTH * min(spacing)


def _depth(heights: Heights, config: BasinsConfig) -> float:
    if heights.distances or config.h is not None or config.rel:
        return depth_of(config, heights.spacing)
    raise ConfigError(
        "a height map has no natural depth: how deep must the valley between two objects be? "
        "Give h in the unit of the height map, or rel as a part of the lower summit (for example 0.1)."
    )


def _floor(heights: Heights, floor: float) -> float:
    return 0.0 if heights.distances else floor
