"""Case after case: what fails is told and left out, and what has no partner is named."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from medseg.errors import Cancelled, DatasetError, GeometryError, MedsegError
from medseg.log import logger, progress
from medseg.metrics.definitions import Failure
from medseg.metrics.pairing import NamedMaps, Pairing, pair_cases
from medseg.volume import Geometry

T = TypeVar("T")


class Named(Protocol):
    """What is measured: a case."""

    @property
    def name(self) -> str:
        """Of the case."""


P = TypeVar("P", bound=Named)


def pair_aloud(predictions: NamedMaps, references: NamedMaps) -> Pairing:
    """Match predictions with references as :func:`pair_cases` does, and warn of names without a partner."""
    pairing = pair_cases(predictions, references)
    warn_alone(pairing.predictions_alone, "predictions have no reference")
    warn_alone(pairing.references_alone, "references have no prediction")
    return pairing


def warn_alone(names: Sequence[str], what: str) -> None:
    """Say once who has no partner: measuring one fold against all labels is usual, a lost case is not."""
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        logger.warning("%d %s and are not in the means: %s", len(names), what, some)


def measure_cases(
    pairs: Sequence[P], title: str, measure: Callable[[P], T]
) -> tuple[list[T], tuple[Failure, ...]]:
    """Measure every pair; return what was measured, and the failures.

    Parameters
    ----------
    pairs : such as those of :func:`pair_aloud`
    title : of the progress
    measure : may raise what medseg raises

    Raises
    ------
    DatasetError
        Not one case could be measured.
    """
    measured, failures = [], []
    for pair in progress(pairs, title):
        try:
            measured.append(measure(pair))
        except Cancelled:
            raise
        except (MedsegError, MemoryError) as error:
            reason = str(error).removeprefix(f"{pair.name}: ") or "out of memory"
            failures.append(Failure(pair.name, reason))
            logger.error("%s: not measured. %s", pair.name, reason)
    if not measured:
        first = f"{failures[0].case}: {failures[0].error}"
        raise DatasetError(f"none of the {len(failures)} cases could be measured. First: {first}")
    return measured, tuple(failures)


def check_grids(name: str, prediction: Geometry, reference: Geometry) -> None:
    """Refuse two label maps that do not lie on one grid.

    Raises
    ------
    GeometryError
        They do not.
    """
    if prediction.matches(reference):
        return
    if prediction.shape != reference.shape:
        what = f"the prediction has shape {prediction.shape}, the reference {reference.shape}"
    else:
        shift = np.abs(prediction.affine - reference.affine).max()
        what = f"the affines differ by up to {shift:.4g} {reference.unit}"
    raise GeometryError(
        f"{name}: {what}; expected one grid. Resample the prediction onto the grid of the reference."
    )
