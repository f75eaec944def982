"""What a simulated user's clicks are worth: from Dice and NSD after every click to the numbers of a table.

The measures are those of the CVPR 2025 challenge of interactive 3D segmentation (areas under the curves of
five clicks) and of interactive segmentation in general (clicks until a Dice is reached).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.prompt.simulate import BoxPrompt, Click

# Clicks after which Dice and NSD are told, where so many were made.
TOLD = (1, 3, 5, 10)
GOALS = (0.8, 0.9)
# The challenge's area under a curve: the trapezoids between the values after clicks 1 to 5. Five points, so
# a perfect result has 4. With the value after the box there are six points, and it has 5.
AUC_CLICKS = 5
ALL = "all"

DEFINITIONS: Mapping[str, str] = {
    "dice_box, dice_1, ...": "Dice after the box, after 1, 3, 5, 10 corrective clicks",
    "nsd_box, nsd_1, ...": "surface Dice (DeepMind's definition) at the tolerance nsd_mm",
    "gain": "Dice after the last click minus Dice after the box; 0 is the previous mask unchanged",
    "noc_80, noc_90": "clicks after the box until Dice 0.8 / 0.9; the most clicks where it was not reached",
    "failed_80, failed_90": "part that did not reach Dice 0.8 / 0.9 with all clicks",
    "dsc_auc, nsd_auc": "trapezoidal area under Dice / NSD over clicks 1 to 5: 5 points, at most 4",
    "dsc_auc_box, nsd_auc_box": "the same from the box on: 6 points (0 to 5 clicks), at most 5",
    "seconds_box, seconds_click": "median wall seconds until the mask, after the box / after a click",
    "cpu_box, cpu_click": "the same in CPU seconds of all threads",
    "encoded_box, encoded_click": "slices encoded by an image encoder, after the box / after a click",
}


@dataclass(frozen=True)
class Trace:
    """One object, one way of propagating, one simulated user.

    Attributes
    ----------
    dataset, name, entrant : str
    seed : int
    prompt : BoxPrompt
    clicks : tuple of Click
        Made; fewer than asked for where the mask had no error left.
    dice, nsd : tuple of float
        After the box, then after each click that was asked for.
    seconds, cpu, encoded : tuples
        Wall seconds, CPU seconds and encoder calls of the box, then of each click that was made.
    voxels : int
        Size of the reference.
    """

    dataset: str
    name: str
    entrant: str
    seed: int
    prompt: BoxPrompt
    clicks: tuple[Click, ...]
    dice: tuple[float, ...]
    nsd: tuple[float, ...]
    seconds: tuple[float, ...]
    cpu: tuple[float, ...]
    encoded: tuple[int, ...]
    voxels: int

    @property
    def object(self) -> tuple[str, str]:
        """Data set and name: what identifies the object."""
        return self.dataset, self.name


@dataclass(frozen=True)
class Group:
    """Numbers of one entrant over some objects.

    Attributes
    ----------
    entrant, dataset : str
        ``all`` for every object of every data set.
    objects : int
    means : mapping of measure to float
        Over objects, each the mean of its seeds; medians for seconds. NaN where not measured.
    spread : mapping of measure to float
        Standard deviation, over seeds, of that mean; NaN for a single seed.
    """

    entrant: str
    dataset: str
    objects: int
    means: Mapping[str, float]
    spread: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The first entrant minus another one, over the objects that both have done.

    `box` and `final` are mean differences of Dice; `worst` is the most negative difference of an object after
    the box, at `worst_object`; `worse` lists how many objects lose more than 0.03.
    """

    entrant: str
    other: str
    objects: int
    box: float
    final: float
    worst: float
    worst_object: tuple[str, str]
    worse: int


# An object that loses more than this to the other one is counted (the bar of issue 4).
NOTABLE_LOSS = 0.03


def measures(trace: Trace) -> dict[str, float]:
    """Return every number of one trace; NaN where it has none."""
    last = len(trace.dice) - 1
    result: dict[str, float] = {}
    for name, values in (("dice", trace.dice), ("nsd", trace.nsd)):
        result[f"{name}_box"] = values[0]
        result |= {f"{name}_{n}": values[n] for n in TOLD if n <= last}
    result["gain"] = trace.dice[-1] - trace.dice[0]
    for goal in GOALS:
        needed = clicks_to(trace.dice, goal)
        result[f"noc_{goal * 100:.0f}"] = float(last if needed is None else needed)
        result[f"failed_{goal * 100:.0f}"] = float(needed is None)
    for name, values in (("dsc", trace.dice), ("nsd", trace.nsd)):
        result[f"{name}_auc"] = area(values[1 : AUC_CLICKS + 1], AUC_CLICKS)
        result[f"{name}_auc_box"] = area(values[: AUC_CLICKS + 1], AUC_CLICKS + 1)
    for name, costs in (("seconds", trace.seconds), ("cpu", trace.cpu), ("encoded", trace.encoded)):
        result[f"{name}_box"] = float(costs[0])
        result[f"{name}_click"] = float(np.mean(costs[1:])) if len(costs) > 1 else math.nan
    return result


def clicks_to(dice: Sequence[float], goal: float) -> int | None:
    """Return after how many clicks a Dice is reached first (0: after the box), or None.

    >>> clicks_to((0.5, 0.79, 0.83), 0.8)
    2
    """
    return next((n for n, value in enumerate(dice) if value >= goal), None)


def area(values: Sequence[float], points: int) -> float:
    """Return the trapezoidal area under `points` values one click apart; NaN if there are fewer.

    >>> area((1.0, 1.0, 1.0, 1.0, 1.0), 5)
    4.0
    """
    if len(values) < points:
        return math.nan
    return float(np.trapezoid(values[:points]))


def summarize(traces: Sequence[Trace]) -> list[Group]:
    """Return the numbers of each entrant: all objects, then each data set, in the order of the cases."""
    entrants = list(dict.fromkeys(trace.entrant for trace in traces))
    groups = []
    for entrant in entrants:
        mine = [trace for trace in traces if trace.entrant == entrant]
        datasets = list(dict.fromkeys(trace.dataset for trace in mine))
        groups.append(group(entrant, ALL, mine))
        groups += [group(entrant, name, [t for t in mine if t.dataset == name]) for name in datasets]
    return groups


def group(entrant: str, dataset: str, traces: Sequence[Trace]) -> Group:
    """Return the numbers of some traces of one entrant."""
    by_object = per_object(traces)
    seeds = sorted({trace.seed for trace in traces})
    names = list(measures(traces[0]))
    means = {name: _middle(name)([values[name] for values in by_object.values()]) for name in names}
    by_seed = [per_object([t for t in traces if t.seed == seed]).values() for seed in seeds]
    spread = {
        name: _deviation([_middle(name)([v[name] for v in objects]) for objects in by_seed]) for name in names
    }
    return Group(entrant, dataset, len(by_object), means, spread)


def per_object(traces: Iterable[Trace]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the measures of each object, means (seconds: medians) over its seeds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for trace in traces:
        found.setdefault(trace.object, []).append(measures(trace))
    return {
        key: {name: _middle(name)([row[name] for row in rows]) for name in rows[0]}
        for key, rows in found.items()
    }


def compare(traces: Sequence[Trace]) -> list[Comparison]:
    """Set the first entrant against every other one."""
    entrants = list(dict.fromkeys(trace.entrant for trace in traces))
    tables = {name: per_object(t for t in traces if t.entrant == name) for name in entrants}
    result = []
    for other in entrants[1:]:
        mine, theirs = tables[entrants[0]], tables[other]
        common = [key for key in mine if key in theirs]
        if not common:
            continue
        box = [mine[key]["dice_box"] - theirs[key]["dice_box"] for key in common]
        final = [_final(mine[key]) - _final(theirs[key]) for key in common]
        lowest = int(np.argmin(box))
        result.append(
            Comparison(
                entrants[0],
                other,
                len(common),
                float(np.mean(box)),
                float(np.mean(final)),
                box[lowest],
                common[lowest],
                sum(difference < -NOTABLE_LOSS for difference in box),
            )
        )
    return result


def _final(values: Mapping[str, float]) -> float:
    return values["dice_box"] + values["gain"]


def _middle(name: str) -> Callable[[Sequence[float]], float]:
    """Return how a measure is averaged: the first mask of all loads the networks, which a mean would show."""
    return _median if name.startswith(("seconds", "cpu")) else _mean


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _deviation(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
