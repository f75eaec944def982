"""Which of the trained configurations, or which pair, is best; and what post-processing helps it.

nnU-Net's ``find_best_configuration`` without saved probabilities: every case is judged by the fold that
did not train on it, pairs by averaging the two models' probabilities for that fold.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medseg import log
from medseg.bundle import Bundle, load_bundle, save_bundle
from medseg.errors import DatasetError, TrainingError
from medseg.files import atomic_folder, write_text
from medseg.infer import Predictor
from medseg.io import Case, Dataset, open_dataset, read, read_image, read_label, write
from medseg.metrics import evaluate
from medseg.postprocess import Trial, choose_best, choose_postprocessing, singles_and_pairs
from medseg.types import Array, PathLike

SEPARATOR = " + "


@dataclass(frozen=True)
class Selection:
    """The outcome of :func:`select`.

    Attributes
    ----------
    scores : mean foreground Dice on cross-validation, by run name or ``"A + B"``
    best : name of the winner
    runs : its run folders; pass the bundle of each to ``medseg predict -m``
    dice_after : mean Dice with the chosen post-processing
    postprocessing : what was chosen, as stored in the bundles
    trials : every step that was tried, with its numbers
    """

    scores: dict[str, float]
    best: str
    runs: tuple[str, ...]
    dice_after: float
    postprocessing: dict[str, Any]
    trials: tuple[dict[str, Any], ...]


class Maps:
    """Pairs of (prediction, reference), read from disk each time they are walked."""

    def __init__(self, predictions: dict[str, Path], cases: dict[str, Case]) -> None:
        self.predictions, self.cases = predictions, cases

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for name, path in self.predictions.items():
            yield read(path).array[0], read_label(self.cases[name]).array[0]


def select(runs: Sequence[PathLike], dataset: Dataset | PathLike, store: bool = True) -> Selection:
    """Compare trained runs and all pairs of them on cross-validation, and store post-processing.

    Parameters
    ----------
    runs : run folders of one dataset, each with the same validated folds
    dataset : with the reference labels
    store : write the choice to the winners' bundles, and ``selection.json`` to the first one's folder

    Raises
    ------
    TrainingError
        A run has no validated fold, or the runs were validated on different cases.
    DatasetError
        A validated case is not in the dataset.
    """
    folders = [Path(run) for run in runs]
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset)
    by_name = {case.name: case for case in dataset.training}
    found = {str(run): validated(run) for run in folders}
    _check(found, by_name)
    cases = {name: by_name[name] for name in next(iter(found.values()))}
    # what an earlier selection chose must not touch what is measured now
    bundles = {str(run): replace(load_bundle(run), postprocessing=None) for run in folders}
    labels = next(iter(bundles.values())).labels
    references = {name: case.label for name, case in cases.items() if case.label is not None}
    scores: dict[str, float] = {}
    maps: dict[str, dict[str, Path]] = {}
    for names in singles_and_pairs(list(found)):
        title = SEPARATOR.join(names)
        maps[title] = _predictions(names, found, bundles, cases)
        measured = evaluate(maps[title], references, labels=labels, metrics=("dice",))
        if measured.failures:
            raise TrainingError(
                f"{title}: {len(measured.failures)} cases not measured. {measured.failures[0].error}"
            )
        scores[title] = measured.mean("dice")
    best = choose_best(scores)
    chosen, trials = choose_postprocessing(Maps(maps[best], cases), labels)
    winners = tuple(best.split(SEPARATOR))
    stored = {**chosen.to_dict(), "ensemble": True} if len(winners) > 1 else chosen.to_dict()
    accepted = [trial.mean_after for trial in trials if trial.accepted]
    selection = Selection(
        scores, best, winners, accepted[-1] if accepted else scores[best], stored, _plain(trials)
    )
    if store:
        for run in winners:
            _store(bundles[run], stored)
        write_text(Path(winners[0]) / "selection.json", json.dumps(asdict(selection), indent=1))
    return selection


def validated(run: Path) -> dict[str, tuple[str, Path]]:
    """Return (fold, label map) of every case that a fold of a run was validated on; fold ``all`` is not."""
    found = {}
    for path in sorted(run.glob("fold_*/validation/*.nii.gz")):
        fold = path.parents[1].name.removeprefix("fold_")
        if fold != "all":
            found[path.name.removesuffix(".nii.gz")] = (fold, path)
    if not found:
        raise TrainingError(f"{run}: no validated fold here. Train at least one fold (not 'all') first.")
    return found


def _check(found: dict[str, dict[str, tuple[str, Path]]], cases: dict[str, Case]) -> None:
    first_run, first = next(iter(found.items()))
    for run, other in found.items():
        if other.keys() != first.keys():
            raise TrainingError(
                f"{run} and {first_run} were validated on different cases ({len(other)} and {len(first)}). "
                "Train the same folds of both."
            )
    missing = [name for name in first if name not in cases]
    if missing:
        raise DatasetError(f"{missing[0]}: validated, but not in the dataset. Pass the dataset of the runs.")


def _predictions(
    names: tuple[str, ...],
    found: dict[str, dict[str, tuple[str, Path]]],
    bundles: dict[str, Bundle],
    cases: dict[str, Case],
) -> dict[str, Path]:
    """Return label maps of one run, or make those of a pair (kept in the first run's folder)."""
    if len(names) == 1:
        return {name: path for name, (_, path) in found[names[0]].items()}
    facts = [bundles[name].digest for name in names] + sorted(cases)
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    folder = Path(names[0]) / "ensembles" / key
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            predictors: dict[str, Predictor] = {}
            for name in log.progress(list(cases), f"Averaging {SEPARATOR.join(names)}"):
                fold = found[names[0]][name][0]
                if fold not in predictors:
                    predictors[fold] = Predictor([bundles[run] for run in names], folds=(fold,))
                result = predictors[fold].segment(read_image(cases[name]))
                write(result.volume, temporary / f"{name}.nii.gz")
    return {name: folder / f"{name}.nii.gz" for name in cases}


def _store(bundle: Bundle, postprocessing: dict[str, Any]) -> None:
    assert bundle.path is not None  # it was loaded
    save_bundle(
        bundle.path,
        bundle.plan,
        bundle.configuration,
        {},
        bundle.mirror_axes,
        bundle.card,
        postprocessing=postprocessing,
    )


def _plain(trials: Sequence[Trial]) -> tuple[dict[str, Any], ...]:
    return tuple(trial.to_dict() for trial in trials)
