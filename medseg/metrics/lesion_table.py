"""Lesion-wise scores of several images: Dice and HD95 of BraTS 2023, false volumes of autoPET."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import ConfigError
from medseg.metrics.lesions import LESION_RULES, false_volumes, lesion_scores
from medseg.types import Array

LESION_METRICS: dict[str, str] = {
    "lesion Dice": "sum of the lesions' Dice / (lesions + false positives), BraTS 2023, rules {rules}",
    "lesion HD95 mm": "the same of HD95, {penalty:g} mm where a lesion is missed or invented",
    "false positive ml": "volume of 18-connected predicted parts that meet no lesion, autoPET",
    "false negative ml": "volume of 18-connected lesions that no prediction meets, autoPET",
}


@dataclass(frozen=True)
class LesionRow:
    """One image; `values` by name of LESION_METRICS."""

    case: str
    values: dict[str, float]


@dataclass(frozen=True)
class LesionTable:
    """All images by one set of rules."""

    rules: str
    rows: tuple[LesionRow, ...]

    @property
    def means(self) -> dict[str, float]:
        """Mean over images."""
        return {name: float(np.mean([row.values[name] for row in self.rows])) for name in LESION_METRICS}

    def formulas(self) -> dict[str, str]:
        """Return how each number is computed."""
        penalty = LESION_RULES[self.rules].penalty_mm
        return {name: text.format(rules=self.rules, penalty=penalty) for name, text in LESION_METRICS.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "rules": self.rules,
            "formulas": self.formulas(),
            "mean_over_images": self.means,
            "images": {row.case: row.values for row in self.rows},
        }


def check_rules(rules: str | None) -> None:
    """Refuse rules that there are not.

    Raises
    ------
    ConfigError
        There are none of this name.
    """
    if rules is not None and rules not in LESION_RULES:
        raise ConfigError(f"lesion rules {rules!r}: expected {', '.join(LESION_RULES)}.")


def lesion_row(
    case: str, reference: Array, prediction: Array, spacing: Sequence[float], rules: str
) -> LesionRow:
    """Score what is not 0 in two label maps (a0, a1, a2), whatever the objects' numbers."""
    scores = lesion_scores(reference > 0, prediction > 0, spacing, LESION_RULES[rules])
    volumes = false_volumes(reference > 0, prediction > 0, spacing)
    values = (scores.dice, scores.hd95, volumes.false_positive_ml, volumes.false_negative_ml)
    return LesionRow(case, dict(zip(LESION_METRICS, map(float, values), strict=True)))


def lesion_table(rules: str, rows: Sequence[LesionRow | None]) -> LesionTable:
    """Return the table of all images."""
    return LesionTable(rules, tuple(row for row in rows if row is not None))
