"""Response of a tumour by RECIST 1.1, from diameters of matched lesions.

Source: Eisenhauer et al. 2009, New response evaluation criteria in solid tumours: revised RECIST guideline
(version 1.1), Eur J Cancer 45:228-247; the sections are named beside each rule. What a program cannot decide
is left to the reader and said so in `notes`: whether a non-target lesion has *unequivocally* progressed, and
whether a new lesion is a metastasis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from medseg.config import Config

Category = Literal["CR", "PR", "SD", "PD", "non-CR/non-PD", "NE", "none"]


class RecistConfig(Config):
    """Thresholds of RECIST 1.1.

    Attributes
    ----------
    most_targets, most_per_organ : int
        Target lesions in all and in one organ (section 4.2).
    measurable : float
        Longest diameter of a measurable lesion, mm; in slices thicker than 5 mm twice the thickness (3.1.1).
    node_target, node_normal : float
        Short axis in mm from which a lymph node is a target (3.1.1), and below which it is normal (4.3.1).
    partial, progressive : float
        Change of the sum for a partial response (from baseline) and for progression (from the smallest sum).
    progressive_mm : float
        By how much the sum must have grown besides (4.3.1).
    new_mm : float
        Longest diameter (of a node: the short axis must reach `node_normal`) from which a new lesion counts.
        Our own: RECIST names no size, but calls lesions below 5 mm too small to measure (4.3.2).
    """

    most_targets: int = Field(5, ge=1)
    most_per_organ: int = Field(2, ge=1)
    measurable: float = Field(10.0, ge=0)
    node_target: float = Field(15.0, ge=0)
    node_normal: float = Field(10.0, ge=0)
    partial: float = Field(-0.30, lt=0)
    progressive: float = Field(0.20, gt=0)
    progressive_mm: float = Field(5.0, ge=0)
    new_mm: float = Field(5.0, ge=0)


@dataclass(frozen=True)
class Lesion:
    """What RECIST asks of a lesion at one time: its diameters in mm, and where it is.

    `organ` is empty where it is not known; the limit per organ then does not apply to it.
    """

    label: int
    longest: float
    short: float
    organ: str = ""
    node: bool = False

    @property
    def diameter(self) -> float:
        """What enters the sum: of a lymph node the short axis (4.3.1)."""
        return self.short if self.node else self.longest


@dataclass(frozen=True)
class Followed:
    """A baseline lesion and what is left of it: nothing, itself, its parts, or what it has merged into.

    `seen` is False where the later image does not show the place of the lesion, or only a part of it.
    """

    lesion: Lesion
    later: tuple[Lesion, ...] = ()
    seen: bool = True


@dataclass(frozen=True)
class Target:
    """A target lesion: diameters in mm at baseline and now; NaN where it is not seen now."""

    label: int
    organ: str
    node: bool
    baseline: float
    now: float


@dataclass(frozen=True)
class Response:
    """Response by RECIST 1.1.

    Attributes
    ----------
    targets : tuple of Target
    baseline_sum, smallest_sum, sum : float
        Sums of diameters in mm: at baseline, the smallest of all times before, and now; NaN where a target
        is not seen now.
    change, change_from_smallest : float
        Relative, NaN where a sum is 0 or not known.
    target, non_target, overall : Category
        "NE" is not evaluable (4.4.2).
    new_lesions : tuple of int
        Labels of new lesions that count.
    notes : tuple of str
    """

    targets: tuple[Target, ...]
    baseline_sum: float
    smallest_sum: float
    sum: float
    change: float
    change_from_smallest: float
    target: Category
    non_target: Category
    overall: Category
    new_lesions: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def sum_in_words(self) -> str:
        """Return the sum now with its unit, or that it is not known."""
        return "an unknown sum" if math.isnan(self.sum) else f"{self.sum:.1f} mm"


def choose_targets(
    lesions: Sequence[Lesion], thickness: float = 1.0, config: RecistConfig | None = None
) -> list[Lesion]:
    """Return the largest measurable lesions, at most five and two per organ (4.2), the largest first.

    Parameters
    ----------
    lesions : at baseline
    thickness : of a slice in mm
    config : RecistConfig, optional

    Examples
    --------
    >>> found = [Lesion(1, 30, 20, "liver"), Lesion(2, 25, 20, "liver"), Lesion(3, 24, 20, "liver")]
    >>> [lesion.label for lesion in choose_targets(found)]
    [1, 2]
    """
    config = config or RecistConfig()
    chosen: list[Lesion] = []
    for lesion in sorted(lesions, key=lambda each: (-each.diameter, each.label)):
        same = [other for other in chosen if lesion.organ and other.organ == lesion.organ]
        room = len(chosen) < config.most_targets and len(same) < config.most_per_organ
        if room and is_measurable(lesion, thickness, config):
            chosen.append(lesion)
    return chosen


def is_measurable(lesion: Lesion, thickness: float, config: RecistConfig) -> bool:
    """Return whether a lesion is large enough to be a target (3.1.1)."""
    if lesion.node:
        return lesion.short >= config.node_target
    return lesion.longest >= max(config.measurable, 2 * thickness if thickness > 5 else 0.0)


def assess_response(
    lesions: Sequence[Followed],
    new: Sequence[Lesion],
    thickness: float = 1.0,
    smallest_sum: float | None = None,
    config: RecistConfig | None = None,
    beyond: Sequence[Lesion] = (),
) -> Response:
    """Assess the response between two times.

    Parameters
    ----------
    lesions : baseline lesions, each with what became of it
    new : lesions that baseline does not have
    thickness : of a slice at baseline, mm
    smallest_sum : float, optional
        The smallest sum of diameters (nadir) of examinations in between, mm.
    config : RecistConfig, optional
    beyond : lesions where baseline shows nothing; a note says so, and they do not count as new
    """
    config = config or RecistConfig()
    labels = [lesion.label for lesion in choose_targets([e.lesion for e in lesions], thickness, config)]
    by_label = {each.lesion.label: each for each in lesions}
    targets, notes = _measure([by_label[label] for label in labels])
    first, now = sum(t.baseline for t in targets), sum(t.now for t in targets)
    nadir = first if smallest_sum is None else min(first, smallest_sum)
    target = _target_category(targets, first, nadir, now, config)
    notes += _unseen_notes(lesions, labels, beyond)
    rest = [each for each in lesions if each.lesion.label not in labels]
    non_target = _non_target_category(rest, config)
    counted = [each for each in new if _counts_as_new(each, config)]
    if len(counted) < len(new):
        notes.append(f"{len(new) - len(counted)} new objects are too small to count as new lesions")
    if any(not each.lesion.organ for each in lesions):
        notes.append("organs are not known: the limit of targets per organ was not applied to all")
    if rest:
        notes.append("whether non-target lesions progress unequivocally is for a reader to say")
    return Response(
        tuple(targets),
        first,
        nadir,
        now,
        (now - first) / first if first else math.nan,
        (now - nadir) / nadir if nadir else math.nan,
        target,
        non_target,
        "PD" if counted else _overall(target, non_target),
        tuple(each.label for each in counted),
        tuple(notes),
    )


def _measure(followed: Sequence[Followed]) -> tuple[list[Target], list[str]]:
    """Return targets with their diameters now.

    Parts of a lesion that fell apart are added up; of lesions that have merged the longest diameter of the
    whole counts, once (4.3.2).
    """
    counted: set[int] = set()
    targets, notes = [], []
    for each in followed:
        lesion = each.lesion
        if not each.seen:
            targets.append(Target(lesion.label, lesion.organ, lesion.node, lesion.diameter, math.nan))
            continue
        parts = [part for part in each.later if part.label not in counted]
        counted |= {part.label for part in parts}
        if len(parts) < len(each.later):
            notes.append(f"lesion {lesion.label} has merged into one that is counted with another target")
        now = sum(part.short if lesion.node else part.longest for part in parts)
        targets.append(Target(lesion.label, lesion.organ, lesion.node, lesion.diameter, now))
    return targets, notes


def _target_category(
    targets: Sequence[Target], first: float, nadir: float, now: float, config: RecistConfig
) -> Category:
    """Apply section 4.3.1; progression goes before a response from baseline.

    With a target that is not seen there is no response, unless the others alone are progression (4.4.2).
    """
    if not targets:
        return "none"
    if math.isnan(now):
        least = sum(t.now for t in targets if not math.isnan(t.now))
        return "PD" if _has_progressed(nadir, least, config) else "NE"
    if all(t.now < config.node_normal if t.node else t.now == 0 for t in targets):
        return "CR"
    if _has_progressed(nadir, now, config):
        return "PD"
    return "PR" if now <= first * (1 + config.partial) else "SD"


def _has_progressed(nadir: float, now: float, config: RecistConfig) -> bool:
    return now - nadir >= config.progressive_mm and now >= nadir * (1 + config.progressive)


def _unseen_notes(lesions: Sequence[Followed], targets: Sequence[int], beyond: Sequence[Lesion]) -> list[str]:
    """Say which lesions one of the images does not show, and what follows."""
    notes = []
    unseen = [each.lesion.label for each in lesions if not each.seen]
    main = [label for label in unseen if label in targets]
    rest = [label for label in unseen if label not in targets]
    if main:
        notes.append(
            f"most of target {_named(main)} lies outside of the follow-up: the target response is not "
            "evaluable (NE) unless the other targets alone are progression"
        )
    if rest:
        notes.append(f"most of non-target {_named(rest)} lies outside of the follow-up and is not evaluated")
    if beyond:
        notes.append(
            f"{_named([each.label for each in beyond])} of the follow-up: baseline does not show the place, "
            "so not counted as new here; RECIST 1.1 (4.3.5) calls that progression, for a reader to confirm"
        )
    return notes


def _named(labels: Sequence[int]) -> str:
    return f"lesion{'' if len(labels) == 1 else 's'} {', '.join(map(str, labels))}"


def _non_target_category(rest: Sequence[Followed], config: RecistConfig) -> Category:
    """Apply section 4.3.3, all but the judgement of unequivocal progression."""
    if not rest:
        return "none"
    for each in rest:
        if each.seen and any(not part.node or part.short >= config.node_normal for part in each.later):
            return "non-CR/non-PD"
    return "CR" if all(each.seen for each in rest) else "NE"


def _counts_as_new(lesion: Lesion, config: RecistConfig) -> bool:
    return lesion.short >= config.node_normal if lesion.node else lesion.longest >= config.new_mm


def _overall(target: Category, non_target: Category) -> Category:
    """Combine as in tables 1 and 2, where there is no new lesion."""
    if target == "none":
        return non_target
    if target == "CR" and non_target in ("non-CR/non-PD", "NE"):
        return "PR"
    return target
