"""Choose post-processing and the best model by cross-validation, by nnU-Net's rules.

Source: nnunetv2 2.8.1, ``postprocessing/remove_connected_components.py`` (``determine_postprocessing``) and
``evaluation/find_best_configuration.py``. Three departures: a class that occurs in no case is left out of the
mean (in nnU-Net its NaN blocks every choice), a region's step is refused if another region falls (nnU-Net
looks at that region alone, though regions overlap), and the result is plain data, never a pickle.
"""

import ast
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from medseg.config import Config
from medseg.errors import ConfigError, DatasetError, PlanError
from medseg.labels import LabelSet, LabelValue
from medseg.log import progress
from medseg.metrics.overlap import contingency
from medseg.metrics.summary import nanmean
from medseg.postprocess.components import fill_holes, keep_largest, remove_small
from medseg.types import Array, FloatArray
from medseg.volume import Volume

Map = Array | Volume
Pair = tuple[Map, Map]
"""Prediction and reference of one case on one grid."""

_NNUNET_STEP = "remove_all_but_largest_component_from_segmentation"


class Step(Config):
    """One operation on a label map.

    Attributes
    ----------
    kind : what is done
    labels : the labels it is done to; ``keep_largest`` and ``remove_small`` join them to one object first,
        ``fill_holes`` takes one after the other
    min_mm3 : smallest volume that ``remove_small`` leaves
    """

    kind: Literal["keep_largest", "remove_small", "fill_holes"]
    labels: tuple[int, ...] = Field(min_length=1)
    min_mm3: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "remove_small") != (self.min_mm3 is not None):
            raise ValueError("'min_mm3' belongs to remove_small, which needs it")
        return self

    def apply(self, label_map: Array, voxel_mm3: float = math.nan) -> Array:
        """Return the changed copy; `voxel_mm3` is needed by ``remove_small`` only."""
        if self.kind == "keep_largest":
            return keep_largest(label_map, self.labels)
        if self.min_mm3 is not None:
            if not voxel_mm3 > 0:
                raise ConfigError("remove_small needs the volume of a voxel. Pass a Volume, or voxel_mm3.")
            return remove_small(label_map, self.labels, self.min_mm3, voxel_mm3)
        for label in self.labels:
            label_map = fill_holes(label_map, label)
        return label_map


class Postprocessing(Config):
    """Steps that are applied to a label map in order; none leave it as it is."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def from_nnunet(cls, content: Mapping[str, Any]) -> Self:
        """Build from nnU-Net's ``postprocessing.json``; its pickle is never read.

        Raises
        ------
        ConfigError
            A function is listed that nnU-Net 2.8.1 does not have.
        """
        steps = []
        names, arguments = content.get("postprocessing_fns", []), content.get("postprocessing_kwargs", [])
        for name, values in zip(names, arguments, strict=True):
            if name != _NNUNET_STEP:
                raise ConfigError(f"postprocessing.json: unknown function {name!r}; expected {_NNUNET_STEP}.")
            steps.append(Step(kind="keep_largest", labels=_flat(values["labels_or_regions"])))
        return cls(steps=tuple(steps))


@dataclass(frozen=True)
class Trial:
    """A step that was tried, and what it did to the mean Dice of each class.

    Attributes
    ----------
    step : what was tried, after the steps accepted before it
    target : the class it is for, or ``"foreground"``
    before, after : mean Dice by class name; NaN where a class never occurs
    accepted : whether it is kept
    """

    step: Step
    target: str
    before: dict[str, float]
    after: dict[str, float]
    accepted: bool

    @property
    def mean_before(self) -> float:
        """Mean over the classes that occur."""
        return _mean(self.before.values())

    @property
    def mean_after(self) -> float:
        """Mean over the classes that occur."""
        return _mean(self.after.values())

    def to_dict(self) -> dict[str, object]:
        """Return plain data for a report; a class that never occurs has None."""
        return {
            "step": self.step.to_dict(),
            "target": self.target,
            "accepted": self.accepted,
            "mean_before": _plain(self.mean_before),
            "mean_after": _plain(self.mean_after),
            "before": {name: _plain(value) for name, value in self.before.items()},
            "after": {name: _plain(value) for name, value in self.after.items()},
        }


def apply(label_map: Map, postprocessing: Postprocessing) -> Map:
    """Apply all steps to an array, or to a one-channel Volume (which knows the size of its voxels)."""
    if isinstance(label_map, Volume):
        scale = 1e-9 if label_map.geometry.unit == "micron" else 1.0
        array = _run(label_map.array[0], postprocessing.steps, label_map.geometry.voxel_volume * scale)
        return label_map.with_array(array[None])
    return _run(label_map, postprocessing.steps, math.nan)


def choose_postprocessing(
    pairs: Iterable[Pair], labels: LabelSet
) -> tuple[Postprocessing, tuple[Trial, ...]]:
    """Decide, on pooled cross-validation predictions, where keeping only the largest component helps.

    1. Largest component of all foreground together: kept if the mean Dice over classes rises strictly and
       the mean Dice of no class falls.
    2. With more than one class or region, for each in order: its largest component, on top of what was kept
       before; kept if the mean Dice of that class rises strictly and no other falls. Exclusive classes do not
       touch each other, so for them this is nnU-Net's choice; of overlapping regions it may refuse more.

    Parameters
    ----------
    pairs : iterable of (prediction, reference)
        Label maps (arrays or one-channel Volumes). It is walked once for each group of trials that do not
        touch each other: twice for classes, 1 + number of regions times for regions. A re-iterable that reads
        files as it goes keeps memory small; a generator is turned into a list.
    labels : LabelSet
        Classes or regions; the ignore label is respected.

    Returns
    -------
    Postprocessing, tuple of Trial
        What to do, and everything that was tried with its numbers.

    Raises
    ------
    DatasetError
        There is no pair.
    """
    pairs = list(pairs) if isinstance(pairs, Iterator) else pairs
    classes = labels.foreground
    everything = tuple(v for v in labels.values if v not in (0, labels.ignore))
    groups = [[("foreground", Step(kind="keep_largest", labels=everything))]]
    singles = [(name, Step(kind="keep_largest", labels=_flat(value))) for name, value in classes.items()]
    if len(singles) > 1:
        groups += [[single] for single in singles] if labels.has_regions else [singles]
    steps: list[Step] = []
    trials: list[Trial] = []
    for group in groups:
        before, after = _measure(pairs, labels, steps, [step for _, step in group])
        for (target, step), changed in zip(group, after, strict=True):
            if len(group) > 1:  # classes do not touch each other, so trials of one group add up
                changed = before | {target: changed[target]}
            accepted = _accepted(before, changed, target)
            trials.append(Trial(step, target, before, changed, accepted))
            if accepted:
                steps.append(step)
                before = changed
    return Postprocessing(steps=tuple(steps)), tuple(trials)


def choose_best(candidates: Mapping[str, float]) -> str:
    """Return the name with the highest mean foreground Dice; of equals the earlier (list singles first).

    Raises
    ------
    PlanError
        There is no candidate with a finite score.

    Examples
    --------
    >>> choose_best({"2d": 0.88, "3d_fullres": 0.91, "2d + 3d_fullres": 0.91})
    '3d_fullres'
    """
    finite = {name: score for name, score in candidates.items() if math.isfinite(score)}
    if not finite:
        raise PlanError(
            "no model has a mean Dice to choose by. Evaluate at least one on its validation cases."
        )
    return max(finite, key=lambda name: finite[name])


def singles_and_pairs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what nnU-Net compares: every model alone, then every pair.

    >>> singles_and_pairs(["2d", "3d_fullres"])
    [('2d',), ('3d_fullres',), ('2d', '3d_fullres')]
    """
    return [(name,) for name in names] + list(combinations(names, 2))


def _accepted(before: Mapping[str, float], after: Mapping[str, float], target: str) -> bool:
    if target == "foreground":
        rises = _mean(after.values()) > _mean(before.values())
    else:
        rises = after[target] > before[target]
    return rises and not any(after[name] < before[name] for name in before)


def _measure(
    pairs: Iterable[Pair], labels: LabelSet, accepted: Sequence[Step], trials: Sequence[Step]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return mean Dice by class with the accepted steps, and with each trial after them."""
    rows = []
    for prediction, reference in progress(pairs, "choose post-processing"):
        truth = _array(reference)
        base = _run(_array(prediction), accepted, math.nan)
        maps = [base, *(step.apply(base) for step in trials)]
        rows.append([_dice(truth, label_map, labels) for label_map in maps])
    if not rows:
        raise DatasetError(
            "post-processing needs at least one prediction with its reference; none was given."
        )
    means = nanmean(np.array(rows), axis=0)
    named = [dict(zip(labels.foreground, map(float, line), strict=True)) for line in means]
    return named[0], named[1:]


def _dice(reference: Array, prediction: Array, labels: LabelSet) -> list[float]:
    table = contingency(reference, prediction, labels.ignore)
    return [table.counts(label).dice for label in labels.foreground.values()]


def _run(label_map: Array, steps: Sequence[Step], voxel_mm3: float) -> Array:
    for step in steps:
        label_map = step.apply(label_map, voxel_mm3)
    return label_map


def _array(label_map: Map) -> Array:
    return label_map.array[0] if isinstance(label_map, Volume) else label_map


def _flat(label: LabelValue | Sequence[Any] | str) -> tuple[int, ...]:
    """Return labels as one tuple; nnU-Net writes 1, [1, 2], [[1, 2]] or "(1, 2)"."""
    if isinstance(label, str):
        label = ast.literal_eval(label)
    if isinstance(label, int):
        return (label,)
    return tuple(v for item in label for v in _flat(item))


def _mean(values: Iterable[float]) -> float:
    table: FloatArray = np.array([list(values)])
    return float(nanmean(table, axis=1)[0])


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
