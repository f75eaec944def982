"""Lesion-wise Dice and HD95 of BraTS 2023, and the false volumes of autoPET, from two masks.

Both challenges loop over whole volumes for each lesion. Here one overlap table of the components says who
touches whom, and only surface distances look at voxels again, in a box around the lesion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.config import Config
from medseg.errors import GeometryError
from medseg.metrics.overlap_table import OverlapTable, overlap_table
from medseg.metrics.surface import surface_distances
from medseg.types import Array, BoolArray, IntArray

Box = tuple[slice, ...]


class LesionRules(Config):
    """How lesions are told apart and scored (BraTS 2023, script ``metrics_GLI.py`` of the organisers).

    Attributes
    ----------
    dilation : times a reference lesion grows by its 18 neighbours (8 in 2D); what touches then is one lesion
    ignore_mm3 : reference lesions of this volume and less are in no mean
    penalty_mm : HD95 of a lesion that was missed, and of one that was invented
    empty_dice, empty_hd95 : the score where there is no lesion to score on either side
    """

    dilation: int = 3
    ignore_mm3: float = 50.0
    penalty_mm: float = 374.0
    empty_dice: float = 1.0
    empty_hd95: float = 0.0


LESION_RULES: dict[str, LesionRules] = {
    "GLI": LesionRules(),
    "SSA": LesionRules(),
    "PED": LesionRules(),
    "MEN": LesionRules(dilation=1),
    "MET": LesionRules(dilation=1, ignore_mm3=2.0),
}
"""By task of the challenge: glioma, sub-Saharan Africa, paediatric, meningioma, metastases."""


@dataclass(frozen=True)
class Lesion:
    """One reference lesion.

    Attributes
    ----------
    volume : in cubic units of the spacing
    dice : with all predicted components that touch it after dilation
    hd95 : in units of the spacing; infinite if nothing touches it
    predictions : how many components that are
    ignored : whether it is too small to count
    """

    volume: float
    dice: float
    hd95: float
    predictions: int
    ignored: bool


@dataclass(frozen=True)
class LesionScores:
    """The scores of one case.

    Attributes
    ----------
    lesions : in order of their first voxel
    false_positives : predicted components that touch no reference lesion, not even an ignored one
    rules : that were used
    """

    lesions: tuple[Lesion, ...]
    false_positives: int
    rules: LesionRules

    @property
    def dice(self) -> float:
        """Sum of the lesions' Dice / (lesions + false positives)."""
        return self._mean([lesion.dice for lesion in self._counted], 0.0, self.rules.empty_dice)

    @property
    def hd95(self) -> float:
        """Sum of the lesions' HD95 / (lesions + false positives), a miss and an invention at the penalty."""
        penalty = self.rules.penalty_mm
        values = [lesion.hd95 if math.isfinite(lesion.hd95) else penalty for lesion in self._counted]
        return self._mean(values, penalty, self.rules.empty_hd95)

    @property
    def _counted(self) -> list[Lesion]:
        return [lesion for lesion in self.lesions if not lesion.ignored]

    def _mean(self, values: list[float], false_positive: float, empty: float) -> float:
        n = len(values) + self.false_positives
        return (sum(values) + false_positive * self.false_positives) / n if n else empty


def lesion_scores(
    reference: Array, prediction: Array, spacing: Sequence[float], rules: LesionRules | None = None
) -> LesionScores:
    """Score two masks of one class or region, lesion by lesion.

    Parameters
    ----------
    reference, prediction : arrays of one shape, 2 or 3 axes
        Masks; what is not 0 is lesion. Components are 26-connected (8 in 2D).
    spacing : sequence of float
        Voxel size along each axis, in mm.
    rules : LesionRules, optional
        From LESION_RULES. Default: of glioma.

    Raises
    ------
    GeometryError
        Shapes differ, or have not 2 or 3 axes with a spacing each.
    """
    _check(reference, prediction, spacing)
    rules = rules or LesionRules()
    box = _bounds((np.asarray(reference) != 0) | (np.asarray(prediction) != 0), rules.dilation)
    truth, guess = np.asarray(reference)[box] != 0, np.asarray(prediction)[box] != 0
    lesions, grown = _grown_lesions(truth, rules.dilation)
    components = components_of(guess, guess.ndim)
    touches = overlap_table(grown, components)
    labelled = _Labelled(lesions, components, overlap_table(lesions, components))
    voxel = math.prod(map(float, spacing))
    scored = [
        _score(k, labelled, touches.pairs[touches.pairs[:, 0] == k, 1], spacing) for k in range(touches.n_ref)
    ]
    touched = len(np.unique(touches.pairs[:, 1]))
    return LesionScores(
        tuple(
            Lesion(size * voxel, dice, hd95, n, ignored=bool(size * voxel <= rules.ignore_mm3))
            for size, dice, hd95, n in scored
        ),
        touches.n_pred - touched,
        rules,
    )


@dataclass(frozen=True)
class FalseVolumes:
    """False volumes of autoPET in millilitres (of the spacing in mm), and how many components they are."""

    false_positive_ml: float
    false_negative_ml: float
    false_positives: int
    false_negatives: int


def false_volumes(
    reference: Array, prediction: Array, spacing_mm: Sequence[float], neighbours: Literal[1, 2, 3] = 2
) -> FalseVolumes:
    """Return the volume of components that do not touch the other mask (Gatidis et al. 2022, autoPET).

    Parameters
    ----------
    reference, prediction : arrays of one shape
        Masks; what is not 0 is lesion.
    spacing_mm : sequence of float
    neighbours : 1, 2 or 3
        Voxels that share a face, an edge or a corner belong together. The challenge: 2 (18 neighbours).

    Raises
    ------
    GeometryError
        Shapes differ, or have not 2 or 3 axes with a spacing each.
    """
    _check(reference, prediction, spacing_mm)
    rank = min(neighbours, np.ndim(reference))
    sides = [components_of(np.asarray(mask) != 0, rank) for mask in (reference, prediction)]
    table = overlap_table(*sides)
    voxel_ml = math.prod(map(float, spacing_mm)) / 1000.0
    missed, invented = np.ones(table.n_ref, bool), np.ones(table.n_pred, bool)
    missed[table.pairs[:, 0]] = invented[table.pairs[:, 1]] = False
    return FalseVolumes(
        float(table.prediction_voxels[invented].sum() * voxel_ml),
        float(table.reference_voxels[missed].sum() * voxel_ml),
        int(invented.sum()),
        int(missed.sum()),
    )


def components_of(mask: BoolArray, rank: int) -> IntArray:
    """Number the connected parts of a mask from 1; `rank` 1: by faces, 2: also edges, 3: also corners."""
    from scipy.ndimage import generate_binary_structure, label

    labels: IntArray = label(mask, generate_binary_structure(mask.ndim, rank))[0]
    return labels


def _grown_lesions(mask: BoolArray, times: int) -> tuple[IntArray, IntArray]:
    """Return lesions that touch after growing as one each, as they are and grown.

    The union of all grown components is the grown union, so each grows in its own box.
    """
    from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure

    element = generate_binary_structure(mask.ndim, min(2, mask.ndim))
    grown = mask.copy()
    if times:
        components = components_of(mask, mask.ndim)
        for k, found in enumerate(find_objects(components), start=1):
            box = _padded(found, times, mask.shape)
            grown[box] |= binary_dilation(components[box] == k, element, iterations=times)
    labels = components_of(grown, mask.ndim)
    return np.where(mask, labels, 0), labels


class _Labelled:
    """Lesions and predicted components, both numbered from 1 without gaps, with their table and boxes."""

    def __init__(self, lesions: IntArray, components: IntArray, table: OverlapTable) -> None:
        from scipy.ndimage import find_objects

        self.lesions, self.components, self.table = lesions, components, table
        self.boxes: tuple[list[Box], list[Box]] = find_objects(lesions), find_objects(components)


def _score(
    k: int, labelled: _Labelled, touching: IntArray, spacing: Sequence[float]
) -> tuple[int, float, float, int]:
    """Return voxels, Dice, HD95 and number of predictions of the k-th lesion."""
    table = labelled.table
    size = int(table.reference_voxels[k])
    if not touching.size:
        return size, 0.0, math.inf, 0
    shared = (table.pairs[:, 0] == k) & np.isin(table.pairs[:, 1], touching)
    total = size + int(table.prediction_voxels[touching].sum())
    box = _around([labelled.boxes[0][k], *(labelled.boxes[1][j] for j in touching)])
    truth = labelled.lesions[box] == k + 1
    guess = np.isin(labelled.components[box], touching + 1)
    distance = surface_distances(truth, guess, tuple(map(float, spacing))).hausdorff(95)
    return size, 2 * int(table.pair_voxels[shared].sum()) / total, distance, len(touching)


def _around(boxes: Sequence[Box]) -> Box:
    return tuple(
        slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True)
    )


def _bounds(mask: BoolArray, margin: int) -> Box:
    """Return the box of a mask with a margin, inside of the image; an empty one for an empty mask."""
    found = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        found.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return _padded(tuple(found), margin, mask.shape)


def _padded(box: Box, margin: int, shape: tuple[int, ...]) -> Box:
    return tuple(
        slice(max(0, side.start - margin), min(n, side.stop + margin))
        for side, n in zip(box, shape, strict=True)
    )


def _check(reference: Array, prediction: Array, spacing: Sequence[float]) -> None:
    if np.shape(reference) != np.shape(prediction) or not len(spacing) == np.ndim(reference) in (2, 3):
        raise GeometryError(
            f"masks of shape {np.shape(reference)} and {np.shape(prediction)} with spacing {tuple(spacing)}: "
            "expected one shape with 2 or 3 axes and a spacing for each."
        )
