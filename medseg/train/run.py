"""From a dataset and a plan to a bundle: the composition of one training run.

A run folder holds ``plan.yaml``, ``store/`` (preprocessed cases), ``fold_K/`` (recipe, state, log, best
weights, validation, report) and ``bundle/`` (what `medseg predict` needs, with every finished fold).
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import medseg
from medseg.bundle import load_bundle, save_bundle
from medseg.errors import ConfigError, DatasetError, TrainingError
from medseg.files import write_text
from medseg.io import Case, Dataset, open_dataset
from medseg.nets import build_network
from medseg.plan import Configuration, Plan, choose_split, load_plan, make_plan
from medseg.preprocess import Store, build_store
from medseg.train import loop, report
from medseg.train.config import TrainConfig
from medseg.train.recipes import load_recipe
from medseg.train.samples import CaseArrays, Sampler
from medseg.types import PathLike

logger = logging.getLogger("medseg")

Fold = int | Literal["all"]

# Part of --max-minutes that is kept for the final validation and the report.
RESERVED_FRACTION = 0.06


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
            exclude={"threads", "loader_threads", "checkpoint_seconds", "tensorboard", "cache_gb"},
        )
        cases = [[case.name for case in part] for part in (self.train, self.validation)]
        plan = self.plan.to_dict()
        facts = json.dumps([plan, self.configuration, config, cases], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()


def fit(
    dataset: Dataset | PathLike,
    out: PathLike,
    plan: Plan | PathLike | None = None,
    preset: str | None = None,
    configuration: str | None = None,
    fold: Fold = 0,
    max_minutes: float | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    pretrained: PathLike | None = None,
    previous: PathLike | None = None,
    splits: PathLike | None = None,
    device: str = "auto",
) -> Path:
    """Train one fold and write its bundle, validation and report.

    Parameters
    ----------
    dataset : Dataset or folder
    out : run folder; several folds and resumed sessions share it
    plan : plan or file; by default the run's own, else one is made with `preset`
    configuration : 3d_fullres where planned, else 2d
    fold : 0 to 4, or "all" to train (and validate) on everything
    max_minutes : the learning rate is annealed to end in this time, everything included
    resume : go on with an unfinished run in `out`
    overrides : dotted recipe settings such as ``optimizer.lr=0.01``
    recipe : recipe name or YAML file; by default the plan's
    pretrained : bundle whose weights are the start (where names and shapes agree)
    previous : run folder of the first stage, for 3d_cascade_fullres
    splits : ``splits_final.json`` with custom folds
    device : auto, cpu, cuda or mps

    Returns
    -------
    Path
        The bundle folder, ``out/bundle``.

    Raises
    ------
    DatasetError, PlanError, ConfigError
        Something does not fit, found before the first step.
    TrainingError
        The folder holds another or an unfinished run, or training diverged.
    """
    started = time.monotonic()
    setup = decide(
        dataset, out, plan, preset, configuration, fold, overrides, recipe, pretrained, previous, splits
    )
    _check_folder(setup, resume)
    fabric = _launch(setup, device)
    if fabric.is_global_zero:
        _write_inputs(setup)
    store = _prepare(setup, fabric)
    limit = None
    if max_minutes is not None:
        limit = max(1.0, max_minutes * 60 * (1 - RESERVED_FRACTION) - (time.monotonic() - started))
    outcome = loop.run(make_job(setup, store, limit, resume), fabric)
    bundle = setup.run / "bundle"
    if fabric.is_global_zero:
        _finish(setup, outcome, store, bundle)
    fabric.barrier()
    return bundle


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
) -> Setup:
    """Settle everything about a run without touching the disk; parameters as in :func:`fit`."""
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset)
    chosen = _choose_plan(dataset, Path(out), plan, preset)
    train, validation = _split(dataset, fold, splits)
    name = configuration or chosen.default_configuration
    chosen.configuration(name)
    return Setup(
        dataset=dataset,
        plan=chosen,
        configuration=name,
        config=load_recipe(recipe or chosen.recipe, overrides),
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
        "recipe": setup.plan.recipe,
        "configuration": setup.configuration,
        "network": settings.architecture.network,
        "patch": list(settings.patch_size),
        "batch": setup.batch_size,
        "spacing": list(settings.spacing),
        "steps": setup.config.steps,
        "fold": setup.fold,
        "train": len(setup.train),
        "validation": len(setup.validation),
    }


def make_job(setup: Setup, store: Store, limit_seconds: float | None, resume: bool) -> loop.Job:
    """Build network and samplers."""
    torch.manual_seed(setup.config.seed)
    network = _build(setup)
    if setup.pretrained is not None and not (resume and (setup.folder / loop.STATE_FILE).exists()):
        _start_from(network, setup.pretrained)
    arrays = _open_cases(store, setup)
    axes = mirror_axes(setup, store)
    masked = tuple(k for k, masked in enumerate(setup.settings.use_mask_for_norm) if masked)
    patch, labels = setup.settings.patch_size, setup.plan.labels
    seen = [arrays[case.name] for case in setup.train]
    held = [arrays[case.name] for case in setup.validation]
    return loop.Job(
        network=network,
        labels=labels,
        config=setup.config,
        batch_size=setup.batch_size,
        batch_dice=setup.settings.batch_dice,
        train=Sampler(seen, patch, labels, setup.config, axes, masked),
        validation=Sampler(held, patch, labels, setup.config, (), masked, train=False) if held else None,
        folder=setup.folder,
        key=setup.key,
        title=f"Training fold {setup.fold}",
        limit_seconds=limit_seconds,
        resume=resume,
    )


def mirror_axes(setup: Setup, store: Store) -> tuple[int, ...]:
    """Return the patch axes that may be flipped; never the left-right one if labels have sides."""
    wanted = setup.config.augment.mirror
    dims = setup.settings.dimensions
    if wanted == "off":
        return ()
    axes = tuple(range(dims)) if wanted == "auto" else tuple(a for a in wanted if a < dims)
    sided = setup.plan.labels.sided
    if not sided:
        return axes
    forbidden = {
        left_right_axis(setup.plan, store.open(case.name).record) - (3 - dims) for case in setup.train
    }
    kept = tuple(a for a in axes if a not in forbidden)
    logger.warning(
        "Labels %s have sides, so images are not mirrored left-right (network axis %s).",
        ", ".join(sided),
        ", ".join(str(a) for a in sorted(forbidden)),
    )
    return kept


def left_right_axis(plan: Plan, record: Any) -> int:
    """Return the network axis that runs most nearly left-right in the world."""
    source_axis = int(np.argmax(np.abs(record.geometry.affine[0, :3] / record.geometry.spacing)))
    return plan.transpose_forward.index(2 - source_axis)


def _choose_plan(dataset: Dataset, run: Path, plan: Plan | PathLike | None, preset: str | None) -> Plan:
    existing = run / "plan.yaml"
    if isinstance(plan, Plan):
        return plan
    if plan is not None:
        return load_plan(plan)
    return load_plan(existing) if existing.exists() and preset is None else make_plan(dataset, preset)


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


def _check_folder(setup: Setup, resume: bool) -> None:
    state = setup.folder / loop.STATE_FILE
    if (setup.folder / "report.html").exists():
        raise TrainingError(f"{setup.folder}: is already trained. Choose another fold or folder.")
    if state.exists() and not resume:
        raise TrainingError(
            f"{setup.folder}: an unfinished run is here. Pass --resume to go on, or choose a new folder."
        )
    existing = setup.run / "plan.yaml"
    if existing.exists() and load_plan(existing) != setup.plan:
        raise TrainingError(f"{setup.run}: was started with another plan. Choose a new folder for this one.")


def _launch(setup: Setup, device: str) -> Any:
    from lightning_fabric import Fabric

    if setup.config.threads:
        torch.set_num_threads(setup.config.threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun, and by nothing else here
    if setup.batch_size % world:
        raise ConfigError(
            f"batch_size {setup.batch_size} cannot be shared by {world} processes. "
            f"Set batch_size={-(-setup.batch_size // world) * world}."
        )
    accelerator = {"auto": "auto"}.get(device, device)
    if device == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(1, world // local),
        strategy="ddp" if world > 1 else "auto",
        precision=_precision(setup.config.precision, accelerator),
    )
    fabric.launch()
    return fabric


def _precision(wanted: str, accelerator: str) -> Any:
    if wanted == "auto":
        if accelerator == "cuda":
            wanted = "fp16"
        else:
            wanted = "bf16" if accelerator == "cpu" and cpu_has_bf16() else "fp32"
    return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[wanted]


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return bool(flags or tiles)


def _write_inputs(setup: Setup) -> None:
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


def _prepare(setup: Setup, fabric: Any) -> Store:
    """Preprocess what is not in the store yet; one process builds, the others wait."""
    cases = tuple({case.name: case for case in (*setup.train, *setup.validation)}.values())
    with fabric.rank_zero_first():
        store = build_store(
            setup.dataset, setup.plan, setup.configuration, setup.run / "store", cases=cases, threads=2
        )
        if setup.settings.previous_stage and fabric.is_global_zero:
            _add_previous(setup, store, cases)
    return store


def _add_previous(setup: Setup, store: Store, cases: Sequence[Case]) -> None:
    from medseg.io import read
    from medseg.preprocess import preprocess_labels

    if setup.previous is None:
        raise ConfigError(
            f"{setup.configuration}: needs the results of {setup.settings.previous_stage}. "
            "Train that first and pass its run folder with --previous."
        )
    found = {p.name.removesuffix(".nii.gz"): p for p in setup.previous.glob("fold_*/validation/*.nii.gz")}
    missing = [case.name for case in cases if case.name not in found]
    if missing:
        raise DatasetError(
            f"{setup.previous}: no validation result for {len(missing)} cases, the first {missing[0]!r}. "
            "Train every fold of the first stage (or --fold all) before the cascade."
        )
    for case in cases:
        record = store.open(case.name).record
        labels = preprocess_labels(read(found[case.name]), record, setup.settings)
        store.add_previous(case.name, labels)


def _open_cases(store: Store, setup: Setup) -> dict[str, CaseArrays]:
    names = {case.name for case in (*setup.train, *setup.validation)}
    opened = {name: store.open(name) for name in sorted(names)}
    size = sum(np.prod(c.data.shape) * 4 + np.prod(c.seg.shape) * 2 for c in opened.values())
    if size <= setup.config.cache_gb * 1e9:
        return {name: case.in_memory() for name, case in opened.items()}
    return dict(opened)


def _build(setup: Setup) -> torch.nn.Module:
    labels = setup.plan.labels
    channels = len(setup.plan.channels)
    if setup.settings.previous_stage:
        channels += len(labels.foreground_values)
    network = build_network(
        setup.settings.architecture, channels, labels.n_outputs, setup.config.loss.deep_supervision
    )
    if setup.settings.dimensions == 3:
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network


def _start_from(network: torch.nn.Module, path: Path) -> None:
    """Copy the weights whose names and shapes agree (fine-tuning)."""
    bundle = load_bundle(path)
    weights = bundle.state_dict(next(iter(bundle.folds)))
    own = network.state_dict()
    fitting = {
        name: value for name, value in weights.items() if name in own and own[name].shape == value.shape
    }
    if not fitting:
        raise ConfigError(
            f"{path}: none of its weights fit the planned network. Train with that bundle's plan."
        )
    network.load_state_dict(fitting, strict=False)
    logger.info("Fine-tuning: %d of %d tensors come from %s.", len(fitting), len(own), path)


def _finish(setup: Setup, outcome: loop.Outcome, store: Store, bundle: Path) -> None:
    """Choose the weights, write the bundle, validate whole cases, write the report."""
    weights = outcome.network.state_dict()
    best = setup.folder / loop.BEST_FILE
    if outcome.ended != "the schedule is complete" and best.exists():
        from safetensors.torch import load_file

        weights = load_file(best)
    card = {
        "dataset": setup.plan.dataset_name,
        "cases": len(setup.train),
        "steps": outcome.progress.step,
        "ended": outcome.ended,
        "recipe": setup.config.to_dict(),
        "precision": setup.config.precision,
        "mirroring": setup.config.final_mirroring,
    }
    save_bundle(
        bundle,
        setup.plan,
        setup.configuration,
        {str(setup.fold): weights},
        mirror_axes(setup, store),
        card,
        previous=None if setup.previous is None else load_bundle(setup.previous),
    )
    report.finish(setup, outcome, bundle)
