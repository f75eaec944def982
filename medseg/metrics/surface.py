"""Distances between two surfaces in millimetres, as DeepMind's ``surface-distance`` 0.1 defines them.

Which definition, and why
-------------------------
The public packages disagree on purpose. MedPy pools the border voxels of both masks before it takes a
percentile, so a large prediction outvotes a small reference. MONAI takes the larger of the two directed
percentiles but counts border voxels, so that a surface oblique to a 3 x 0.7 x 0.9 mm grid weighs more or
less than the same surface along it. `surface-distance` (Nikolov et al. 2018, arXiv:1809.04430) measures
between corners of voxels, where the surface really is, and weighs every surface element by its area in
mm^2, so results hardly depend on how the grid lies. All metrics here use its definition:

============================ ====================================================================
here                         surface-distance 0.1
============================ ====================================================================
``hausdorff(95)`` (HD95)     ``compute_robust_hausdorff(d, 95)``: max of the two directed percentiles
``hausdorff(100)`` (HD)      ``compute_robust_hausdorff(d, 100)``
``asd_*``                    ``compute_average_surface_distance(d)``
``assd``                     its distances and areas pooled: sum(d * area) / sum(area) over both surfaces,
                             which is the definition of ASSD (Heimann et al. 2009) with areas for counts
``nsd(t)``                   ``compute_surface_dice_at_tolerance(d, t)``
============================ ====================================================================

One departure: where both masks are empty everything is NaN (nothing was there to be measured; the package
returns infinity for its Hausdorff distance). Where one mask is empty, distances are infinite and NSD is 0.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from medseg.errors import GeometryError
from medseg.types import Array, BoolArray, FloatArray, IntArray

Corner = tuple[int, int, int]
Normal = tuple[float, float, float]

_CORNERS: tuple[Corner, ...] = tuple((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1))


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from each surface element to the other surface, nearest first, with the element's size.

    Attributes
    ----------
    reference_to_prediction, prediction_to_reference : (n,), (m,) float64
        Millimetres, ascending; infinite where the other mask is empty.
    reference_areas, prediction_areas : (n,), (m,) float64
        mm^2 of each element (mm of contour in 2D), in the same order.
    """

    reference_to_prediction: FloatArray
    reference_areas: FloatArray
    prediction_to_reference: FloatArray
    prediction_areas: FloatArray

    @property
    def empty(self) -> bool:
        """Whether neither mask has a surface."""
        return not (self.reference_areas.size or self.prediction_areas.size)

    def hausdorff(self, percent: float = 95.0) -> float:
        """Return the robust Hausdorff distance in mm (100: the Hausdorff distance).

        The percentile is over surface area, the larger of the two directions counts. Infinite where one
        mask is empty, NaN where both are.
        """
        if self.empty:
            return math.nan
        return max(
            _percentile(self.reference_to_prediction, self.reference_areas, percent),
            _percentile(self.prediction_to_reference, self.prediction_areas, percent),
        )

    @property
    def asd_reference_to_prediction(self) -> float:
        """Mean distance in mm from the reference surface; NaN where the reference is empty."""
        return _mean(self.reference_to_prediction, self.reference_areas)

    @property
    def asd_prediction_to_reference(self) -> float:
        """Mean distance in mm from the predicted surface; NaN where the prediction is empty."""
        return _mean(self.prediction_to_reference, self.prediction_areas)

    @property
    def assd(self) -> float:
        """Average symmetric surface distance in mm: the mean over the area of both surfaces."""
        if self.empty:
            return math.nan
        moments = self.reference_to_prediction @ self.reference_areas
        moments += self.prediction_to_reference @ self.prediction_areas
        return float(moments / (self.reference_areas.sum() + self.prediction_areas.sum()))

    def nsd(self, tolerance_mm: float) -> float:
        """Return the normalized surface Dice in [0, 1]: the part of both surfaces within the tolerance."""
        if self.empty:
            return math.nan
        near = self.reference_areas[self.reference_to_prediction <= tolerance_mm].sum()
        near += self.prediction_areas[self.prediction_to_reference <= tolerance_mm].sum()
        return float(near / (self.reference_areas.sum() + self.prediction_areas.sum()))


def surface_distances(reference: Array, prediction: Array, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Measure two masks against each other.

    Parameters
    ----------
    reference, prediction : bool arrays of one shape, 2 or 3 axes
        Two axes give contours weighted by length. Three axes always give surfaces, also where there is only
        one slice: a thin plate then has an upper and a lower side. Beyond the array everything is outside.
    spacing_mm : sequence of float
        Voxel size along each axis, in mm.

    Raises
    ------
    GeometryError
        Shapes differ, or they have not 2 or 3 axes with one spacing each.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.zeros((5, 5, 5), bool)
    >>> a[1:4, 1:4, 1:3] = True
    >>> surface_distances(a, np.roll(a, 1, axis=2), (1.0, 1.0, 2.0)).hausdorff(100)
    2.0
    """
    if reference.shape != prediction.shape or not len(spacing_mm) == reference.ndim in (2, 3):
        raise GeometryError(
            f"masks of shape {reference.shape} and {prediction.shape} with spacing {tuple(spacing_mm)}: "
            "expected one shape with 2 or 3 axes and a spacing for each."
        )
    reference, prediction = np.asarray(reference, bool), np.asarray(prediction, bool)
    box = _box(reference | prediction)
    reference_codes = _neighbour_codes(reference[box])
    prediction_codes = _neighbour_codes(prediction[box])
    areas = element_sizes(tuple(float(s) for s in spacing_mm))
    return SurfaceDistances(
        *_directed(reference_codes, prediction_codes, areas, spacing_mm),
        *_directed(prediction_codes, reference_codes, areas, spacing_mm),
    )


def element_sizes(spacing_mm: tuple[float, ...]) -> FloatArray:
    """Return the size of the surface in a 2x2x2 (2x2) neighbourhood, for each of its 256 (16) codes.

    Bit ``7 - (4 a + 2 b + c)`` of a code (2D: ``3 - (2 a + b)``) tells whether corner (a, b, c) is inside.
    The result is an area in mm^2 (a length in mm).
    """
    if len(spacing_mm) == 2:
        return _contour_lengths(*spacing_mm)
    across = np.array([math.prod(spacing_mm) / s for s in spacing_mm])
    return np.array(
        [sum(float(np.linalg.norm(across * normal)) for normal in normals) for normals in _surface_normals()]
    )


@functools.cache
def _surface_normals() -> tuple[tuple[Normal, ...], ...]:
    """Return the triangles' area vectors (absolute values, unit cube) of each neighbourhood code.

    These are the classes of marching cubes (Lorensen & Cline 1987, fig. 3): a neighbourhood and its
    complement have the same surface, and each group of corners that hang together along cube edges has its
    own. The triangulation of the two groups whose outline is not flat is the one of `surface-distance`.
    """
    table = []
    for code in range(256):
        corners = {corner for bit, corner in enumerate(_CORNERS) if code >> (7 - bit) & 1}
        if len(corners) > 4:
            corners = set(_CORNERS) - corners
        table.append(tuple(n for group in _edge_connected(corners) for n in _group_normals(group)))
    return tuple(table)


def _edge_connected(corners: set[Corner]) -> list[list[Corner]]:
    groups: list[list[Corner]] = []
    left = sorted(corners)
    while left:
        group = [left.pop()]
        for corner in group:  # grows while it is walked
            near = [other for other in left if _distance(corner, other) == 1]
            group += near
            left = [other for other in left if other not in near]
        groups.append(group)
    return groups


def _distance(a: Corner, b: Corner) -> int:
    return sum(p != q for p, q in zip(a, b, strict=True))


def _group_normals(group: list[Corner]) -> list[Normal]:
    """Return area vectors for one group of 1 to 4 edge-connected corners, in units of the cube's faces."""
    small, middle, large = [(size, size, size) for size in (1 / 8, 1 / 4, 3 / 8)]
    edges = [(a, b) for a, b in itertools.combinations(group, 2) if _distance(a, b) == 1]
    match len(group), len(edges):
        case 1, _:  # a corner: one small triangle
            return [small]
        case 2, _:  # an edge: a rectangle, cut in two
            return [_flat(_axis(*edges[0]), 1 / 4, 0.0)] * 2
        case 3, _:  # an L: a pentagon
            return [_flat(_constant_axis(group), 0.0, 1 / 2), small, middle]
        case 4, 4:  # a face: a square, cut in two
            return [_flat(_constant_axis(group), 0.0, 1 / 2)] * 2
    degree = {corner: sum(corner in edge for edge in edges) for corner in group}
    if max(degree.values()) == 3:  # a corner and its three neighbours: a flat hexagon
        return [small, small, middle, middle]
    inner = next(edge for edge in edges if degree[edge[0]] == degree[edge[1]] == 2)
    ends = [axis for axis in range(3) if axis != _axis(*inner)]  # a chain along three axes: a bent hexagon
    return [small, large, *(_flat(axis, 1 / 4, 0.0) for axis in ends)]


def _flat(axis: int, others: float, along: float) -> Normal:
    first, second, third = (along if a == axis else others for a in range(3))
    return (first, second, third)


def _axis(a: Corner, b: Corner) -> int:
    return next(axis for axis in range(3) if a[axis] != b[axis])


def _constant_axis(group: list[Corner]) -> int:
    return next(axis for axis in range(3) if len({corner[axis] for corner in group}) == 1)


def _contour_lengths(down: float, right: float) -> FloatArray:
    """Return marching-squares contour lengths; a contour runs through the middles of the cell's edges."""
    slanted = math.hypot(down, right) / 2
    lengths = np.full(16, slanted)
    lengths[[0b0000, 0b1111]] = 0.0
    lengths[[0b0011, 0b1100]] = right
    lengths[[0b0101, 0b1010]] = down
    lengths[[0b0110, 0b1001]] = 2 * slanted
    return lengths


def _box(mask: BoolArray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(box)


def _neighbour_codes(mask: BoolArray) -> IntArray:
    """Return the code of the 2x2x2 voxels around each voxel corner; one longer than `mask` on every axis."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = tuple(n + 1 for n in mask.shape)
    codes = np.zeros(shape, np.uint8)
    for corner in itertools.product((0, 1), repeat=mask.ndim):
        codes <<= 1
        codes |= padded[tuple(slice(start, start + n) for start, n in zip(corner, shape, strict=True))]
    return codes


def _directed(
    codes: IntArray, other_codes: IntArray, areas: FloatArray, spacing_mm: Sequence[float]
) -> tuple[FloatArray, FloatArray]:
    inside = len(areas) - 1
    border = (codes != 0) & (codes != inside)
    other = (other_codes != 0) & (other_codes != inside)
    distances = _nearest(border, other, np.asarray(spacing_mm, np.float64))
    sizes = areas[codes[border]]
    order = np.lexsort((sizes, distances))
    return distances[order], sizes[order]


def _nearest(border: BoolArray, other: BoolArray, spacing_mm: FloatArray) -> FloatArray:
    """Return, for each point of `border`, the distance to `other`.

    A k-d tree is exact in float64 (a float32 distance transform errs by up to 1e-5 mm) and only looks at
    surfaces. The distance is taken from the difference of indices, so that three voxels of 0.7 mm are the
    same everywhere and a tolerance of 2.1 mm includes them all or none.
    """
    distances = np.zeros(int(border.sum()))
    if not other.any():
        return distances + math.inf
    apart = ~other[border]
    points = np.argwhere(border)[apart]
    targets = np.argwhere(other)
    tree = cKDTree(targets * spacing_mm, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(points * spacing_mm)
    distances[apart] = np.sqrt((((points - targets[nearest]) * spacing_mm) ** 2).sum(axis=1))
    return distances


def _percentile(distances: FloatArray, areas: FloatArray, percent: float) -> float:
    if not distances.size:
        return math.inf
    if percent >= 100:
        return float(distances[-1])
    share = np.cumsum(areas) / areas.sum()
    index = int(np.searchsorted(share, percent / 100.0))
    return float(distances[min(index, distances.size - 1)])


def _mean(distances: FloatArray, areas: FloatArray) -> float:
    return float(distances @ areas / areas.sum()) if distances.size else math.nan
