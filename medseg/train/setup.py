"""Everything about a training run that is settled before its first step."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import medseg
from medseg.bundle import load_bundle
from medseg.errors import ConfigError, DatasetError, PlanError, TrainingError
from medseg.files import write_text
from medseg.io import Case, Dataset, open_dataset, with_channels
from medseg.plan import Configuration, Plan, choose_split, load_plan, make_plan
from medseg.plan.detection import DetectorChoices
from medseg.plan.detector import PLANNED
from medseg.plan.objects import name_objects
from medseg.train import loop
from medseg.train.config import TrainConfig
from medseg.train.recipes import DETECTION_RECIPES, load_recipe
from medseg.types import PathLike

logger = logging.getLogger("medseg")

Fold = int | Literal["all"]
Task = Literal["segment", "detection"]


@dataclass(frozen=True)
class Setup:
    """Everything about one fold that is decided before the first step."""

    dataset: Dataset
    plan: Plan
    configuration: str
    config: TrainConfig
    fold: Fold
    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    run: Path
    pretrained: Path | None = None
    previous: Path | None = None

    @property
    def settings(self) -> Configuration:
        """The planned configuration."""
        return self.plan.configuration(self.configuration)

    @property
    def folder(self) -> Path:
        """Folder of this fold."""
        return self.run / f"fold_{self.fold}"

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return self.config.batch_size or self.settings.batch_size

    @property
    def key(self) -> str:
        """Hash of what must not change between a run and its resumption."""
        config = self.config.model_dump(
            mode="json",
            # what a detector's choices decide is in the plan, and in the cases
            exclude={
                "detector",
                "threads",
                "loader_threads",
                "checkpoint_seconds",
                "tensorboard",
                "cache_gb",
            },
        )
        cases = [[case.name for case in part] for part in (self.train, self.validation)]
        plan = self.plan.to_dict()
        facts = json.dumps([plan, self.configuration, config, cases], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()


def decide(
    dataset: Dataset | PathLike,
    out: PathLike,
    plan: Plan | PathLike | None = None,
    preset: str | None = None,
    configuration: str | None = None,
    fold: Fold = 0,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    pretrained: PathLike | None = None,
    previous: PathLike | None = None,
    splits: PathLike | None = None,
    task: Task = "segment",
) -> Setup:
    """Settle everything about a run without touching the disk; parameters as in :func:`fit`."""
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset)
    choices = PLANNED
    if task == "detection":
        choices = load_recipe(recipe or DETECTION_RECIPES["cpu"], overrides).detector or PLANNED
        dataset = _choose_cases(name_objects(dataset), choices)
    chosen = _choose_plan(dataset, Path(out), plan, preset, task, configuration, choices)
    _check_plan(chosen, dataset)
    train, validation = _split(dataset, fold, splits)
    name = configuration or chosen.default_configuration
    _check_task(chosen, name, task)
    if chosen.configuration(name).previous_stage and previous is None:
        raise ConfigError(
            f"{name}: needs the results of {chosen.configuration(name).previous_stage}. "
            "Train that first and pass its run folder with --previous."
        )
    return Setup(
        dataset=dataset,
        plan=chosen,
        configuration=name,
        config=load_recipe(recipe or recipe_of(chosen, task), overrides),
        fold=fold,
        train=train,
        validation=validation,
        run=Path(out),
        pretrained=Path(pretrained) if pretrained else None,
        previous=Path(previous) if previous else None,
    )


def describe(dataset: Dataset | PathLike, out: PathLike, **choices: Any) -> dict[str, Any]:
    """Return what :func:`fit` would train, as plain data; nothing is written."""
    setup = decide(dataset, out, **choices)
    settings = setup.settings
    return {
        "dataset": str(setup.dataset.root),
        "run": str(setup.run),
        "preset": setup.plan.preset,
        "recipe": choices.get("recipe")
        or recipe_of(setup.plan, "segment" if settings.detection is None else "detection"),
        "configuration": setup.configuration,
        "network": settings.architecture.network,
        **_describe_detection(settings),
        "patch": list(settings.patch_size),
        "batch": setup.batch_size,
        "spacing": list(settings.spacing),
        "steps": setup.config.steps,
        "fold": setup.fold,
        "train": len(setup.train),
        "validation": len(setup.validation),
    }


def _describe_detection(settings: Configuration) -> dict[str, Any]:
    detection = settings.detection
    if detection is None:
        return {}
    fit = detection.anchor_fit
    return {
        "task": "detection",
        "objects": detection.objects,
        "anchors": [[round(side, 1) for side in size] for size in detection.anchors[0]],
        "anchor IoU": None if fit is None else fit.mean_iou,
    }


def recipe_of(plan: Plan, task: Task) -> str:
    """Return the name of the recipe that goes with a plan."""
    return plan.recipe if task == "segment" else DETECTION_RECIPES[plan.recipe]


def is_finished(setup: Setup) -> bool:
    """Return whether this fold is trained, validated and in the bundle."""
    return (setup.folder / "report.html").exists()


def check_folder(setup: Setup, resume: bool) -> None:
    """Refuse a run folder that holds something else, before anything is written."""
    if is_finished(setup) and not resume:
        raise TrainingError(f"{setup.folder}: is already trained. Choose another fold or folder.")
    begun = (setup.folder / loop.STATE_FILE).exists()
    if begun and not resume:
        raise TrainingError(
            f"{setup.folder}: an unfinished run is here. Pass --resume to go on, or choose a new folder."
        )
    if resume and not begun:
        logger.warning("%s: nothing is saved yet, so training starts anew.", setup.folder)
    existing = setup.run / "plan.yaml"
    if existing.exists() and load_plan(existing) != setup.plan:
        raise TrainingError(f"{setup.run}: was started with another plan. Choose a new folder for this one.")
    if (setup.run / "bundle").exists():
        held = load_bundle(setup.run).configuration
        if held != setup.configuration:
            raise TrainingError(
                f"{setup.run}: holds a {held} model. Train {setup.configuration} in a folder of its own."
            )


def previous_results(run: Path) -> dict[str, Path]:
    """Return the first stage's label map of every case, of the fold that did not see it if there is one."""
    paths = [*run.glob("fold_all/validation/*.nii.gz"), *sorted(run.glob("fold_[0-9]*/validation/*.nii.gz"))]
    return {path.name.removesuffix(".nii.gz"): path for path in paths}


def write_inputs(setup: Setup) -> None:
    """Write what was decided next to the result, before the first step."""
    setup.folder.mkdir(parents=True, exist_ok=True)
    (setup.folder / loop.STOP_FILE).unlink(missing_ok=True)
    if not (setup.run / "plan.yaml").exists():
        setup.plan.save(setup.run / "plan.yaml")
    setup.config.save(setup.folder / "train.yaml")
    facts = {
        "medseg": medseg.__version__,
        "torch": torch.__version__,
        "configuration": setup.configuration,
        "fold": setup.fold,
        "train": [case.name for case in setup.train],
        "val": [case.name for case in setup.validation],
    }
    write_text(setup.folder / "run.json", json.dumps(facts, indent=1))


def _choose_plan(
    dataset: Dataset,
    run: Path,
    plan: Plan | PathLike | None,
    preset: str | None,
    task: Task,
    configuration: str | None,
    choices: DetectorChoices,
) -> Plan:
    existing = run / "plan.yaml"
    if plan is not None and preset is not None:
        raise ConfigError(f"a plan and the preset {preset!r} are both given. Leave one out.")
    if isinstance(plan, Plan):
        return plan
    if plan is not None:
        return load_plan(plan)
    if existing.exists() and preset is None:
        logger.info("Using the plan that is in the run folder, %s.", existing)
        return load_plan(existing)
    if task == "detection":
        from medseg.plan.detector import plan_detection

        return plan_detection(dataset, preset, configuration, choices=choices)
    return make_plan(dataset, preset)


def _choose_cases(dataset: Dataset, choices: DetectorChoices) -> Dataset:
    """Return a dataset without the cases that are held out, its images with the channels that are wanted."""
    if choices.channels is not None:
        dataset = with_channels(dataset, choices.channels)
    if not choices.hold_out:
        return dataset
    labelled = [case for case in dataset.training if case.label is not None]
    kept, _ = hold_out(labelled, choices.hold_out, choices.hold_out_seed)
    return replace(dataset, training=kept)


def hold_out(cases: Sequence[Case], count: int, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return cases to train on, and `count` that a seed draws to be measured, both sorted by name.

    Raises
    ------
    DatasetError
        Nothing is left to train on.
    """
    ordered = sorted(cases, key=lambda case: case.name)
    if count >= len(ordered):
        raise DatasetError(f"hold_out {count}: there are {len(ordered)} cases. Hold fewer out.")
    chosen = set(np.random.default_rng(seed).permutation(len(ordered))[:count].tolist())
    held = tuple(case for n, case in enumerate(ordered) if n in chosen)
    return tuple(case for n, case in enumerate(ordered) if n not in chosen), held


def _check_task(plan: Plan, configuration: str, task: Task) -> None:
    """Refuse a plan of the other task."""
    detects = plan.configuration(configuration).detection is not None
    if detects and task == "segment":
        raise PlanError(f"the plan of {plan.dataset_name} is that of a detector. Pass --task detection.")
    if task == "detection" and not detects:
        raise PlanError(
            f"the plan of {plan.dataset_name} has no detector for {configuration}. Leave --plan out to have "
            "one made, in a new folder."
        )


def _check_plan(plan: Plan, dataset: Dataset) -> None:
    """Refuse a plan that was made for other data."""
    if len(plan.channels) != len(dataset.channels):
        raise PlanError(
            f"the plan of {plan.dataset_name} is for {len(plan.channels)} channels "
            f"({', '.join(plan.channels)}), {dataset.root} has {len(dataset.channels)}. Plan this dataset."
        )
    unknown = sorted(set(dataset.labels.values) - set(plan.labels.values))
    if unknown:
        raise PlanError(
            f"the plan of {plan.dataset_name} does not know the labels {unknown} of {dataset.root}. "
            "Plan this dataset."
        )


def _split(
    dataset: Dataset, fold: Fold, splits: PathLike | None
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    by_name = {case.name: case for case in dataset.training if case.label is not None}
    if not by_name:
        raise DatasetError(f"{dataset.root}: no labelled cases to train on. Add labels or check the layout.")
    split = choose_split(tuple(by_name.values()), fold, splits)
    missing = [name for name in (*split.train, *split.val) if name not in by_name]
    if missing:
        raise DatasetError(
            f"{splits}: {len(missing)} of its cases are not in {dataset.root}, the first {missing[0]!r}."
        )
    return tuple(by_name[n] for n in split.train), tuple(by_name[n] for n in split.val)
