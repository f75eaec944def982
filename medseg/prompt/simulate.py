"""A simulated user: draws a box around an object, then clicks where the result is most wrong.

No prompt is ideal: corners and clicks are moved, because scores of ideal prompts are optimistic. All
randomness comes from the generator that is passed in, and every prompt draws the same number of values
whatever it is drawn for, so a seed means the same user for every propagator.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from medseg.errors import DataError
from medseg.geometry.crop import bounding_box, box_slices
from medseg.prompt.regions import Region, Triple
from medseg.types import BoolArray

SliceBox = tuple[float, float, float, float]  # first row, first column, end row, end column: voxel EDGES

# Corners are moved by up to 5 % of the side of the box (the evaluation protocol of issue 4).
BOX_JITTER = 0.05
# Millimetres by which a click misses the place that it aims at.
CLICK_JITTER = 2.0
Aim = Literal["centre", "random"]
# float32 distances this near to the largest are as large.
_AS_DEEP = 1 - 1e-5


@dataclass(frozen=True)
class BoxPrompt:
    """A box drawn on one slice across `axis`; see :data:`SliceBox`."""

    axis: int
    index: int
    box: SliceBox


class Click(NamedTuple):
    """A click on a voxel: `positive` where the object was missed, else where it was invented."""

    voxel: Triple
    positive: bool


def acquisition_axis(spacing: tuple[float, float, float]) -> int:
    """Return the axis across which slices were acquired: that of clearly the thickest ones, else axial.

    >>> acquisition_axis((0.8, 3.0, 0.8)), acquisition_axis((1.0, 1.0, 1.05))
    (1, 2)
    """
    thickest = int(np.argmax(spacing))
    return thickest if max(spacing) > 1.3 * spacing[2] else 2


def largest_slice(reference: BoolArray, axis: int) -> int:
    """Return the index across `axis` where the object has most voxels.

    Raises
    ------
    DataError
        The mask is empty.
    """
    others = tuple(a for a in range(reference.ndim) if a != axis)
    areas = np.count_nonzero(reference, axis=others)
    if not areas.any():
        raise DataError("the reference has no voxel to point at. Check the label value of the case.")
    return int(np.argmax(areas))


def draw_box(mask: BoolArray, jitter: float, generator: np.random.Generator) -> SliceBox:
    """Draw a box around the object on a slice, each of its four sides moved.

    A side moves inward by up to `jitter` times the box, and outward by up to as much or one voxel, whichever
    is more: 5 % of a lesion of six voxels would move nothing, and who draws around something small leaves
    a margin rather than cutting it. Sides stay on voxel edges, within the slice.

    Parameters
    ----------
    mask : (rows, columns) bool
        The object on the slice.
    jitter : float
        Part of the box's side; 0 gives the tight box.
    generator : numpy Generator
        Four values are drawn.

    Returns
    -------
    (first row, first column, end row, end column)
        Voxel edges: voxel r reaches from r - 0.5 to r + 0.5.

    Raises
    ------
    DataError
        The mask is empty.
    """
    drawn = generator.uniform(size=4)
    if not mask.any():
        raise DataError("the reference has no voxel on this slice. Draw on a slice that the object crosses.")
    (top, bottom), (left, right) = bounding_box(mask)
    rows = _moved(top, bottom, mask.shape[0], jitter, drawn[0], drawn[1])
    columns = _moved(left, right, mask.shape[1], jitter, drawn[2], drawn[3])
    return rows[0] - 0.5, columns[0] - 0.5, rows[1] - 0.5, columns[1] - 0.5


def _moved(start: int, stop: int, size: int, jitter: float, first: float, last: float) -> tuple[int, int]:
    inward = jitter * (stop - start)
    outward = max(inward, 1.0) if jitter > 0 else 0.0
    low = start - round(first * (inward + outward) - inward)
    high = stop + round(last * (inward + outward) - inward)
    return max(0, low), min(size, high)


def draw_prompt(
    reference: BoolArray, axis: int, generator: np.random.Generator, jitter: float = BOX_JITTER
) -> BoxPrompt:
    """Draw a box on the slice across `axis` where the object, (i, j, k) bool, is largest."""
    index = largest_slice(reference, axis)
    return BoxPrompt(axis, index, draw_box(np.asarray(reference.take(index, axis)), jitter, generator))


def next_click(
    reference: BoolArray | Region,
    prediction: BoolArray | Region,
    axis: int = 2,
    generator: np.random.Generator | None = None,
    jitter: float = 0.0,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    aim: Aim = "centre",
) -> Click | None:
    """Click into the largest error in 3D.

    Missed and invented voxels form components of their own (26 neighbours). The click aims at the voxel of
    the largest component that lies deepest inside of it (largest distance to its border, the end of the
    image counting as border), and lands up to `jitter` beside it on the same slice, but within the error: a
    user sees what is wrong. Protocol of the CVPR 2025 challenge of interactive 3D segmentation.

    Parameters
    ----------
    reference, prediction : (i, j, k) bool, or Region of one grid
    axis : int
        Axis across which slices are shown.
    generator : numpy Generator, optional
        Three values are drawn. None: no jitter, and the first voxel of a random aim.
    jitter : float
        Radius of a disc on the slice, in the unit of `spacing` (voxels, if that is not given).
    spacing : three floats
        Voxel size along i, j, k, for distances.
    aim : "centre" or "random"
        Deepest voxel, or any of the component.

    Returns
    -------
    Click or None
        None where the prediction has no error.
    """
    drawn = np.zeros(3) if generator is None else generator.uniform(size=3)
    found = _largest_error(reference, prediction)
    if found is None:
        return None
    component, start, positive = found
    place = _deepest(component, spacing) if aim == "centre" else _any(component, drawn[2])
    if generator is not None and jitter > 0:
        place = _beside(component, place, axis, jitter * np.sqrt(drawn[0]), 2 * np.pi * drawn[1], spacing)
    i, j, k = (int(a + b) for a, b in zip(start, place, strict=True))
    return Click((i, j, k), positive)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two masks cut to the box that holds both, whose first voxel is `start`."""

    reference: BoolArray
    prediction: BoolArray
    start: Triple


def _largest_error(
    reference: BoolArray | Region, prediction: BoolArray | Region
) -> tuple[BoolArray, Triple, bool] | None:
    pair = cut_pair(reference, prediction)
    if pair is None:
        return None
    missed = _largest(pair.reference & ~pair.prediction)
    invented = _largest(pair.prediction & ~pair.reference)
    positive = int(missed.sum()) >= int(invented.sum())
    error = missed if positive else invented
    if not error.any():
        return None
    box = bounding_box(error)
    i, j, k = (s + a for s, (a, _) in zip(pair.start, box, strict=True))
    return np.asarray(error[box_slices(box)]), (i, j, k), positive


def cut_pair(reference: BoolArray | Region, prediction: BoolArray | Region) -> Pair | None:
    """Cut two masks of one grid to the box that holds both; None where both are empty.

    Raises
    ------
    DataError
        They lie on different grids.
    """
    if reference.shape != prediction.shape:
        raise DataError(
            f"reference {reference.shape} and prediction {prediction.shape} lie on different grids. "
            "Turn both to the grid of the scene."
        )
    known = reference if isinstance(reference, Region) else Region.of(reference)
    guess = prediction if isinstance(prediction, Region) else Region.of(prediction)
    filled = [region for region in (known, guess) if region.array.size]
    if not filled:
        return None
    i, j, k = np.min([region.start for region in filled], axis=0).tolist()
    a, b, c = np.max([region.stop for region in filled], axis=0).tolist()
    return Pair(known.window((i, j, k), (a, b, c)), guess.window((i, j, k), (a, b, c)), (i, j, k))


def _largest(mask: BoolArray) -> BoolArray:
    import cc3d

    if not mask.any():
        return mask
    components = cc3d.connected_components(mask, connectivity=26)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return np.asarray(components == int(np.argmax(sizes)))


def _deepest(component: BoolArray, spacing: tuple[float, float, float]) -> Triple:
    import edt

    depth = edt.edt(np.pad(component, 1), anisotropy=spacing, black_border=True, parallel=1)
    deepest = np.argwhere(depth >= depth.max() * _AS_DEEP) - 1
    # A plate or a rod is equally deep along its middle: its own middle is what a user means.
    away = (((deepest - deepest.mean(axis=0)) * spacing) ** 2).sum(axis=1)
    i, j, k = deepest[int(np.argmin(away))].tolist()
    return i, j, k


def _any(component: BoolArray, drawn: float) -> Triple:
    voxels = np.argwhere(component)
    i, j, k = voxels[min(int(drawn * len(voxels)), len(voxels) - 1)].tolist()
    return i, j, k


def _beside(
    component: BoolArray,
    place: Triple,
    axis: int,
    radius: float,
    angle: float,
    spacing: tuple[float, float, float],
) -> Triple:
    """Move `place` on its slice, to the voxel of the component that is nearest to where the click fell."""
    rows, columns = (a for a in range(3) if a != axis)
    fallen = np.array(place, dtype=np.float64)
    fallen[rows] += radius * np.cos(angle) / spacing[rows]
    fallen[columns] += radius * np.sin(angle) / spacing[columns]
    voxels = np.argwhere(component)
    voxels = voxels[voxels[:, axis] == place[axis]]
    nearest = int(np.argmin((((voxels - fallen) * spacing) ** 2).sum(axis=1)))
    i, j, k = voxels[nearest].tolist()
    return i, j, k
