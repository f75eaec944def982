"""From a dataset and a plan to a bundle: the composition of one training run.

A run folder holds ``plan.yaml``, ``store/`` (preprocessed cases), ``fold_K/`` (recipe, state, log, best
weights, validation, report) and ``bundle/`` (what `medseg predict` needs, with every finished fold).
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.bundle import Bundle, load_bundle, save_bundle
from medseg.errors import ConfigError, DatasetError
from medseg.files import check_writable
from medseg.geometry.tiles import tile_slices
from medseg.instances.scale import knows_spacing
from medseg.io import Case, Dataset, read, read_image
from medseg.nets import build_network
from medseg.plan import Plan
from medseg.preprocess import Store, build_store, preprocess_labels
from medseg.train import detection_report, loop, report
from medseg.train.processes import claimed, launch
from medseg.train.samples import CaseArrays, Sampler
from medseg.train.setup import (
    Fold,
    Setup,
    Task,
    check_folder,
    decide,
    is_finished,
    previous_results,
    write_inputs,
)
from medseg.types import PathLike

logger = logging.getLogger("medseg")

# Parts of --max-minutes that are kept for the final validation and the report, at least and at most.
MIN_RESERVED, MAX_RESERVED = 0.06, 0.5
# Reading, restoring, measuring and drawing one case; 24 hippocampus crops took 0.3 s each on a busy core.
CASE_SECONDS = 0.5


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
    task: Task = "segment",
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
    task : segment, or detection: a Mask R-CNN that finds objects

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
    check_writable(out, folder=True)
    setup = decide(
        dataset, out, plan, preset, configuration, fold, overrides, recipe, pretrained, previous, splits, task
    )
    check_folder(setup, resume)
    if is_finished(setup):
        logger.info("%s: is already trained; nothing is left to do.", setup.folder)
        return setup.run / "bundle"
    if max_minutes is not None and max_minutes <= 0:
        raise ConfigError(f"max_minutes {max_minutes}: expected more than 0.")
    fabric = launch(setup.config, setup.batch_size, device)
    with claimed(setup.folder) if fabric.is_global_zero else nullcontext():
        return _train(setup, fabric, resume, started, max_minutes)


def _train(setup: Setup, fabric: Any, resume: bool, started: float, max_minutes: float | None) -> Path:
    """Prepare, train and finish, in every process."""
    store = _prepare(setup, fabric)
    if fabric.is_global_zero:
        write_inputs(setup)
    job = make_job(setup, store, resume)
    if max_minutes is not None:
        total = max_minutes * 60
        reserved = validation_seconds(setup, store, job.network) if fabric.device.type == "cpu" else 0.0
        reserved = min(MAX_RESERVED * total, max(MIN_RESERVED * total, reserved))
        limit = max(1.0, total - reserved - (time.monotonic() - started))
        job = replace(job, limit_seconds=limit)
    outcome = loop.run(job, fabric)
    bundle = setup.run / "bundle"
    if fabric.is_global_zero:
        _finish(setup, outcome, store, bundle)
    fabric.barrier()
    return bundle


def validation_seconds(setup: Setup, store: Store, network: torch.nn.Module) -> float:
    """Estimate how long the final validation will take: one tile is timed, the others are counted."""
    settings = setup.settings
    patch = torch.zeros(1, _in_channels(setup), *settings.patch_size)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):  # the first is slower
            began = time.monotonic()
            network(patch)
            seconds.append(time.monotonic() - began)
    tiles = 0
    for case in setup.validation:
        shape = store.open(case.name).data.shape[1:]
        padded = tuple(
            max(n, p) for n, p in zip(shape[-len(settings.patch_size) :], settings.patch_size, strict=True)
        )
        tiles += len(tile_slices((*shape[: 3 - settings.dimensions], *padded), settings.patch_size))
    flips = 2 ** len(mirror_axes(setup, store)) if setup.config.final_mirroring else 1
    return len(setup.validation) * CASE_SECONDS + tiles * flips * seconds[-1]


def make_job(setup: Setup, store: Store, resume: bool) -> loop.Job:
    """Build network and samplers."""
    torch.manual_seed(setup.config.seed)
    network = _build(setup)
    if setup.pretrained is not None and not (resume and (setup.folder / loop.STATE_FILE).exists()):
        _start_from(network, setup.pretrained)
    arrays = _open_cases(store, setup)
    axes = mirror_axes(setup, store)
    if setup.plan.labels.sided and setup.config.augment.mirror != "off":
        logger.warning(
            "Labels %s have sides, so images are not mirrored left-right (flipped are network axes %s).",
            ", ".join(setup.plan.labels.sided),
            list(axes),
        )
    masked = tuple(k for k, masked in enumerate(setup.settings.use_mask_for_norm) if masked)
    patch, labels, detects = setup.settings.patch_size, setup.plan.labels, setup.settings.detection
    seen = [arrays[case.name] for case in setup.train]
    held = [] if detects else [arrays[case.name] for case in setup.validation]
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
        resume=resume,
        loss=None if detects is None else partial(detection_loss, seed=setup.config.seed),
    )


def detection_loss(network: torch.nn.Module, images: Tensor, segs: Tensor, step: int, seed: int) -> Tensor:
    """Return the sum of a detector's losses; which regions it learns from follows from seed and step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    losses: dict[str, Tensor] = network(images, segs, generator)
    return torch.stack([*losses.values()]).sum()


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
    forbidden = {store.open(case.name).record.left_right_axis - (3 - dims) for case in setup.train}
    return tuple(a for a in axes if a not in forbidden)


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
    assert setup.previous is not None  # decide() refuses a cascade without it
    found = previous_results(setup.previous)
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


def _in_channels(setup: Setup) -> int:
    return Bundle(setup.plan, setup.configuration, {}).in_channels


def _build(setup: Setup) -> torch.nn.Module:
    if setup.settings.detection is not None:
        from medseg.nets.maskrcnn import MaskRCNN

        return MaskRCNN(setup.settings.architecture, setup.settings.detection, _in_channels(setup))
    return build_network(
        setup.settings.architecture,
        _in_channels(setup),
        setup.plan.labels.n_outputs,
        setup.config.loss.deep_supervision,
    )


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
    if outcome.ended != loop.COMPLETE and best.exists():
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
    if setup.config.detector is not None and setup.config.detector.channels is not None:
        card["channels"] = setup.config.detector.channels
    if setup.settings.detection is not None:
        card["pixels"] = not knows_spacing(read_image(setup.train[0]))
    save_bundle(
        bundle,
        setup.plan,
        setup.configuration,
        {str(setup.fold): weights},
        mirror_axes(setup, store),
        card,
        previous=None if setup.previous is None else load_bundle(setup.previous),
    )
    if setup.settings.detection is not None:
        detection_report.finish(setup, outcome, bundle)
        return
    report.finish(setup, outcome, bundle)
