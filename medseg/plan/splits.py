"""Which cases train and which validate: nnU-Net's five folds, grouped by patient where patients repeat."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from medseg.config import read_text
from medseg.errors import DatasetError
from medseg.types import PathLike

logger = logging.getLogger("medseg")

# nnU-Net `generate_crossval_split`: KFold(5, shuffle=True, random_state=12345).
SEED = 12345
N_FOLDS = 5
# Share of training cases when a fold beyond the splits is asked for (nnU-Net `do_split`).
TRAIN_SHARE = 0.8


class NamedCase(Protocol):
    """What a split needs to know of a case; :class:`medseg.io.Case` has it."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def patient(self) -> str:
        """Patient that the case shows."""


@dataclass(frozen=True)
class Split:
    """Names of the cases of one fold, each list ascending."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def make_splits(cases: Sequence[NamedCase], n: int = N_FOLDS) -> list[Split]:
    """Return seeded cross-validation splits; no patient is on both sides of one.

    Where every case is its own patient they equal nnU-Net's (scikit-learn's shuffled KFold over the sorted
    names). Otherwise the same is done to the sorted patients.

    Parameters
    ----------
    cases : with `name` and `patient`
    n : number of folds; fewer patients than folds leave one patient out at a time. A single patient
        trains and validates on all cases, with a warning.

    Raises
    ------
    DatasetError
        There are no cases.
    """
    if not cases:
        raise DatasetError("splits: no training cases. Add some to the dataset.")
    patients: dict[str, list[str]] = {}
    for case in cases:
        patients.setdefault(case.patient, []).append(case.name)
    groups = [sorted(names) for names in patients.values()]
    if len(groups) == len(cases):
        groups.sort()  # by case name, nnU-Net's order
    else:
        groups = [sorted(patients[patient]) for patient in sorted(patients)]
    if len(groups) == 1:
        logger.warning("splits: all cases show one patient, so validation uses the training cases.")
        return [Split(tuple(groups[0]), tuple(groups[0]))]
    return [_split(groups, fold) for fold in _shuffled_folds(len(groups), min(n, len(groups)))]


def _shuffled_folds(n: int, n_folds: int) -> list[set[int]]:
    """Return the validation indices of each fold, as scikit-learn's shuffled KFold draws them."""
    order = np.arange(n)
    np.random.RandomState(SEED).shuffle(order)
    return [set(fold.tolist()) for fold in np.array_split(order, n_folds)]


def _split(groups: Sequence[Sequence[str]], validation: set[int]) -> Split:
    sides: dict[bool, list[str]] = {True: [], False: []}
    for index, names in enumerate(groups):
        sides[index in validation].extend(names)
    return Split(tuple(sorted(sides[False])), tuple(sorted(sides[True])))


def choose_split(
    cases: Sequence[NamedCase], fold: int | Literal["all"], splits_file: PathLike | None = None
) -> Split:
    """Return the cases of one fold.

    Parameters
    ----------
    cases : training cases
    fold : index, or "all" to train and validate on every case. An index beyond the splits gives a
        random 80:20 split of its own, seeded by the index, like nnU-Net.
    splits_file : nnU-Net's ``splits_final.json``, which replaces :func:`make_splits`

    Raises
    ------
    DatasetError
        The file is not a list of splits, names unknown cases, or leaves a side empty.
    """
    names = tuple(sorted(case.name for case in cases))
    if fold == "all":
        return Split(names, names)
    splits = make_splits(cases) if splits_file is None else read_splits(splits_file, names)
    if fold < 0:
        raise DatasetError(f"fold {fold}: expected 'all' or a number from 0 to {len(splits) - 1}.")
    if fold < len(splits):
        return splits[fold]
    if len({case.patient for case in cases}) < 2:
        return splits[0]
    logger.warning(
        "fold %d: there are only folds 0 to %d, so as in nnU-Net a random 80:20 split of its own is used.",
        fold,
        len(splits) - 1,
    )
    return _random_split(cases, fold)


def _random_split(cases: Sequence[NamedCase], fold: int) -> Split:
    patients: dict[str, list[str]] = {}
    for case in sorted(cases, key=lambda case: case.name):
        patients.setdefault(case.patient, []).append(case.name)
    groups = list(patients.values())
    n_train = max(1, int(len(groups) * TRAIN_SHARE))
    train = np.random.RandomState(SEED + fold).choice(len(groups), n_train, replace=False)
    return _split(groups, set(range(len(groups))) - set(train.tolist()))


def read_splits(path: PathLike, names: Sequence[str]) -> list[Split]:
    """Read nnU-Net's ``splits_final.json``: a list of ``{"train": [...], "val": [...]}``.

    Raises
    ------
    DatasetError
        It does not parse, names cases that are not in `names`, or leaves a side empty.
    ReadError
        The file is missing or unreadable.
    """
    text = read_text(path)
    try:
        content: Any = json.loads(text)
        splits = [Split(tuple(map(str, item["train"])), tuple(map(str, item["val"]))) for item in content]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DatasetError(
            f'{path}: expected JSON of the form [{{"train": [...], "val": [...]}}, ...]. Pass nnU-Net\'s '
            "splits_final.json or write one like it."
        ) from error
    for index, split in enumerate(splits):
        _check_split(f"{path}, split {index}", split, set(names))
    if not splits:
        raise DatasetError(f"{path}: holds no split. Add one or leave the file out.")
    return splits


def _check_split(where: str, split: Split, names: set[str]) -> None:
    unknown = sorted({*split.train, *split.val} - names)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DatasetError(f"{where}: no training case named {', '.join(unknown[:3])}{more}. Mend the names.")
    if not split.train or not split.val:
        raise DatasetError(f"{where}: 'train' and 'val' both need at least one case.")
    both = sorted(set(split.train) & set(split.val))
    if both:
        logger.warning("%s: %s and others are in 'train' and in 'val'.", where, both[0])
