"""``medseg train --task centre-offset``: a network that finds objects, from label maps of them.

A run folder holds ``fold_K/`` (recipe, state, log, best weights, result, report) and ``bundle/``, which
`medseg.instances.models` opens. Cases are held in memory at about the network's voxels.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import medseg
from medseg import log
from medseg.bundle import load_bundle, save_bundle
from medseg.errors import ConfigError, DatasetError, TrainingError
from medseg.files import check_writable, write_text
from medseg.instances.centre_model import CentreSettings
from medseg.instances.scale import Scale, scale_of
from medseg.io import Case, Dataset, open_dataset, read_image, read_label
from medseg.io.semantic import SemanticMaps, find_semantic_maps
from medseg.labels import LabelSet, PanopticLabels
from medseg.metrics.report import HtmlReport, curves
from medseg.nets.centre_heads import CentreHeads, build_centre_network
from medseg.plan import Architecture, Configuration, Plan, choose_split
from medseg.plan.presets import PRESETS, read_preset
from medseg.plan.topology import build_architecture, plan_topology
from medseg.train import loop, state
from medseg.train.centre_config import CentreConfig, load_centre
from medseg.train.centre_losses import centre_loss, count_overlap
from medseg.train.centre_measure import Measured, measure_objects
from medseg.train.centre_samples import (
    CentreCase,
    CentreSampler,
    count_channels,
    make_case,
    median_diameter,
)
from medseg.train.processes import claimed, launch
from medseg.train.samples import PatchSource
from medseg.train.setup import Fold
from medseg.train.setup import hold_out as draw_held_out
from medseg.train.synthetic_cells import SyntheticSampler
from medseg.types import Array, IntArray, PathLike

logger = logging.getLogger("medseg")

OBJECTS = LabelSet.parse({"background": 0, "object": 1})
PATCH = {2: 128, 3: 48}
# Part of --max-minutes that is kept for measuring: at least, at most, and seconds a case.
RESERVED, MOST_RESERVED, CASE_SECONDS = 0.06, 0.3, 1.0


@dataclass(frozen=True)
class CentreSetup:
    """Everything about a fold that is decided before the first step."""

    dataset: Dataset
    config: CentreConfig
    fold: Fold
    train: tuple[Case, ...]
    held_out: tuple[Case, ...]
    run: Path
    pretrained: Path | None
    semantic: SemanticMaps | None = None

    @property
    def labels(self) -> LabelSet:
        """What the network tells apart: objects alone, or the classes of a data set with things and stuff."""
        return OBJECTS if self.semantic is None else self.semantic.classes.label_set()

    @property
    def folder(self) -> Path:
        """Folder of this fold."""
        return self.run / f"fold_{self.fold}"

    @property
    def key(self) -> str:
        """Hash of what must not change between a run and its resumption."""
        excluded = {"threads", "loader_threads", "checkpoint_seconds", "tensorboard", "cache_gb"}
        config = self.config.model_dump(mode="json")
        config["train"] = {k: v for k, v in config["train"].items() if k not in excluded}
        cases = [[case.name for case in part] for part in (self.train, self.held_out)]
        decided: list[Any] = [config, cases]
        if self.semantic is not None:
            decided.append(self.semantic.classes.to_dict())
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what will be trained, as plain data."""
        return {
            "dataset": str(self.dataset.root),
            "run": str(self.run),
            "task": "centre-offset",
            **({} if self.semantic is None else _named(self.semantic.classes)),
            "scenes": "of the dataset" if self.config.synthetic is None else "synthetic",
            "object voxels": self.config.object_voxels,
            "steps": self.config.train.steps,
            "batch": self.config.train.batch_size,
            "fold": self.fold,
            "train": len(self.train),
            "validation": len(self.held_out),
        }


def _named(classes: PanopticLabels) -> dict[str, str]:
    return {"things": ", ".join(classes.things), "stuff": ", ".join(classes.stuff)}


def decide_centre(
    dataset: Dataset | PathLike,
    out: PathLike,
    fold: Fold = 0,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    pretrained: PathLike | None = None,
    splits: PathLike | None = None,
) -> CentreSetup:
    """Settle everything about a run without touching the disk; parameters as in :func:`train_centre`."""
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset, OBJECTS)
    config = load_centre(recipe, tuple(overrides))
    labelled = tuple(case for case in dataset.training if case.label is not None)
    if not labelled:
        raise DatasetError(f"{dataset.root}: no labelled cases to train on. Add labels or check the layout.")
    if config.hold_out:
        train, held_out = hold_out(labelled, config)
    else:
        by_name = {case.name: case for case in labelled}
        split = choose_split(labelled, fold, splits)
        train, held_out = (tuple(by_name[name] for name in names) for names in (split.train, split.val))
    semantic = None
    if config.synthetic is not None:
        train = ()
    else:
        semantic = find_semantic_maps(dataset.root)
    given = None if pretrained is None else Path(pretrained)
    return CentreSetup(dataset, config, fold, train, held_out, Path(out), given, semantic)


def hold_out(cases: Sequence[Case], config: CentreConfig) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return cases to train on, and those that the recipe's seed draws to be measured, both sorted by name.

    Raises
    ------
    DatasetError
        Nothing is left to train on.
    """
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    if config.synthetic is not None and not 0 <= config.hold_out < len(ordered):
        return (), ordered
    return draw_held_out(ordered, config.hold_out, config.hold_out_seed)


def describe_centre(dataset: Dataset | PathLike, out: PathLike, **choices: Any) -> dict[str, Any]:
    """Return what :func:`train_centre` would train, as plain data; nothing is written."""
    return decide_centre(dataset, out, **choices).facts()


def train_centre(
    dataset: Dataset | PathLike,
    out: PathLike,
    fold: Fold = 0,
    max_minutes: float | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    pretrained: PathLike | None = None,
    splits: PathLike | None = None,
    device: str = "auto",
) -> Path:
    """Train a network that finds objects and write its bundle, its figures on held-out cases and a report.

    Parameters
    ----------
    dataset : Dataset or folder
        Label maps hold the number of each object, 0 = background. Where there are maps of classes besides
        (:mod:`medseg.io.semantic`), the network learns things and stuff.
    out : run folder
    fold : 0 to 4, or "all"; the splits are those of ``medseg train``, unless the recipe holds cases out
    max_minutes : training and measuring end in about this time, the learning rate annealed
    resume : go on with an unfinished run in `out`
    overrides : dotted settings such as ``train.epochs=40``
    recipe : YAML file of a :class:`CentreConfig`
    pretrained : bundle whose weights are the start
    splits : ``splits_final.json`` with custom folds
    device : auto, cpu, cuda or mps

    Returns
    -------
    Path
        The bundle folder, ``out/bundle``.

    Raises
    ------
    DatasetError, ConfigError
        Something does not fit, found before the first step.
    TrainingError
        The folder holds another or an unfinished run, or training diverged.
    """
    started = time.monotonic()
    check_writable(out, folder=True)
    setup = decide_centre(dataset, out, fold, overrides, recipe, pretrained, splits)
    if max_minutes is not None and max_minutes <= 0:
        raise ConfigError(f"max_minutes {max_minutes}: expected more than 0.")
    if _check_folder(setup, resume):
        logger.info("%s: is already trained; nothing is left to do.", setup.folder)
        return setup.run / "bundle"
    fabric = launch(setup.config.train, _batch_size(setup.config), device)
    with claimed(setup.folder):
        (setup.folder / loop.STOP_FILE).unlink(missing_ok=True)
        setup.config.save(setup.folder / "train.yaml")
        prepared = prepare(setup)
        job = make_job(setup, prepared, resume)
        if max_minutes is not None:
            total = 60 * max_minutes
            kept = min(MOST_RESERVED * total, max(RESERVED * total, CASE_SECONDS * len(setup.held_out)))
            job = replace(job, limit_seconds=max(1.0, total - kept - (time.monotonic() - started)))
        _finish(setup, prepared, loop.run(job, fabric))
    return setup.run / "bundle"


def _batch_size(config: CentreConfig) -> int:
    return config.train.batch_size or 8


def _check_folder(setup: CentreSetup, resume: bool) -> bool:
    """Refuse a run folder that holds something else; return whether the fold is finished."""
    finished = (setup.folder / "report.html").exists()
    if finished and not resume:
        raise TrainingError(f"{setup.folder}: is already trained. Choose another fold or folder.")
    if (setup.folder / loop.STATE_FILE).exists() and not resume:
        raise TrainingError(
            f"{setup.folder}: an unfinished run is here. Pass --resume to go on, or choose a new folder."
        )
    if (setup.run / "plan.yaml").exists():
        raise TrainingError(f"{setup.run}: holds another training. Choose a folder for this one alone.")
    return finished


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the cases have decided: the network, and where patches come from."""

    architecture: Architecture
    patch: tuple[int, ...]
    channels: int
    diameter: float | None
    train: PatchSource
    validation: PatchSource | None
    unit: Scale | None = None


def open_objects(case: Case) -> tuple[Array, IntArray, tuple[float, ...]]:
    """Return image (channel, *shape), label map and spacing, axes in reader order, (y, x) or (z, y, x).

    Where the image has no scale, `spacing` is in its finest voxels.

    Raises
    ------
    DatasetError
        Image and label map have different shapes.
    """
    return open_scaled(case)[0]


def open_scaled(case: Case) -> tuple[tuple[Array, IntArray, tuple[float, ...]], Scale]:
    """Return the parts of :func:`open_objects`, and the unit of the spacing."""
    image, labels = read_image(case), read_label(case)
    if image.shape != labels.shape:
        raise DatasetError(
            f"{case.name}: image {image.shape} and label map {labels.shape} differ. Export them again."
        )
    pixels, objects = image.array.transpose(0, 3, 2, 1), labels.array[0].transpose(2, 1, 0)
    spacing, unit = image.spacing[::-1], scale_of(image)
    flat = pixels.shape[1] == 1
    sizes: tuple[float, ...] = spacing[1:] if flat else spacing
    if unit == "pixel":
        sizes = tuple(size / min(sizes) for size in sizes)
    return ((pixels[:, 0], objects[0], sizes) if flat else (pixels, objects, sizes)), unit


def prepare(setup: CentreSetup) -> Prepared:
    """Read the cases, find the size of their objects, and plan the network."""
    if setup.config.synthetic is not None:
        return _prepare_synthetic(setup)
    scaled = [open_scaled(case) for case in log.progress(setup.train, "Reading cases")]
    opened, units = [each for each, _ in scaled], {unit for _, unit in scaled}
    kinds = {labels.ndim for _, labels, _ in opened}
    if len(kinds) > 1:
        raise DatasetError(f"{setup.dataset.root}: holds 2D and 3D images. Train on one kind.")
    sizes = [median_diameter(labels, spacing) for _, labels, spacing in opened]
    if not any(sizes):
        raise DatasetError(f"{setup.dataset.root}: no label map holds an object. Check the labels.")
    usual = float(np.median([size for size in sizes if size]))
    config = setup.config
    per_case = config.size_of == "case"

    def bring(case: Case, found: tuple[Array, IntArray, tuple[float, ...]], size: float) -> CentreCase:
        classes = None if setup.semantic is None else setup.semantic.read(case, found[1])
        return make_case(case.name, *found, (size or usual) if per_case else usual, config, classes)

    cases = [bring(*each) for each in zip(setup.train, opened, sizes, strict=True)]
    del opened, scaled
    held = []
    for case in log.progress(setup.held_out, "Reading cases"):
        one = open_objects(case)
        held.append(bring(case, one, median_diameter(one[1], one[2])))
    architecture, patch = plan_network(config, kinds.pop())
    channels = count_channels([*cases, *held], config)
    train = CentreSampler(cases, patch, config, channels=channels)
    validation = CentreSampler(held, patch, config, train=False, channels=channels) if held else None
    diameter, unit = (None, None) if per_case else (usual, units.pop() if len(units) == 1 else None)
    return Prepared(architecture, patch, channels, diameter, train, validation, unit)


def _prepare_synthetic(setup: CentreSetup) -> Prepared:
    config = setup.config
    first = setup.held_out[0] if setup.held_out else setup.dataset.training[0]
    dimensions = len(config.patch_size) if config.patch_size else open_objects(first)[1].ndim
    architecture, patch = plan_network(config, dimensions)
    sources = (SyntheticSampler(patch, config), SyntheticSampler(patch, config, train=False))
    return Prepared(architecture, patch, config.channels or 1, None, *sources)


def plan_network(config: CentreConfig, dimensions: int) -> tuple[Architecture, tuple[int, ...]]:
    """Return the recipe's network, or the one that the planner makes of its patch, and the patch.

    Raises
    ------
    ConfigError
        The patch does not fit.
    """
    patch = config.patch_size or (PATCH[dimensions],) * dimensions
    if len(patch) != dimensions:
        raise ConfigError(f"patch_size {patch}: the images have {dimensions} axes. Give one number an axis.")
    architecture = config.architecture
    if architecture is None:
        name, changes = read_preset(config.preset)
        rules = PRESETS[name].replace(**changes)
        topology = plan_topology((1.0,) * dimensions, tuple(map(float, patch)), rules.max_stages)
        architecture, patch = build_architecture(topology, rules), topology.patch
    if architecture.dimensions != dimensions or any(
        p % d for p, d in zip(patch, architecture.divisor, strict=True)
    ):
        raise ConfigError(
            f"patch_size {patch}: the network needs {dimensions} multiples of {architecture.divisor}."
        )
    return architecture, patch


def make_job(setup: CentreSetup, prepared: Prepared, resume: bool) -> loop.Job:
    """Build the network and what the loop needs."""
    config = setup.config
    torch.manual_seed(config.train.seed)
    labels, ignore = setup.labels, setup.labels.ignore
    network = build_centre_network(prepared.architecture, prepared.channels, labels.n_outputs)
    if setup.pretrained is not None and not (resume and (setup.folder / loop.STATE_FILE).exists()):
        bundle = load_bundle(setup.pretrained)
        weights = {name: value.float() for name, value in bundle.state_dict(bundle.folds[0]).items()}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(
                f"{setup.pretrained}: its weights do not fit. Train with its recipe."
            ) from error
    heads = CentreHeads(labels.n_outputs, prepared.architecture.dimensions)
    return loop.Job(
        network=network,
        labels=labels,
        config=config.train,
        batch_size=_batch_size(config),
        batch_dice=True,
        train=prepared.train,
        validation=prepared.validation,
        folder=setup.folder,
        key=setup.key,
        title=f"Training fold {setup.fold}",
        resume=resume,
        loss=lambda net, images, goal, step: centre_loss(net(images), goal, heads, config.loss, ignore),
        counts=lambda outputs, goal, _: count_overlap(outputs, goal, heads, ignore),
    )


def make_plan_of(setup: CentreSetup, prepared: Prepared) -> tuple[Plan, str]:
    """Return the plan that a bundle of this network holds, and the name of its configuration."""
    n = prepared.architecture.dimensions
    name = "2d" if n == 2 else "3d_fullres"
    names = ("red", "green", "blue") if prepared.channels == 3 else ("image",) * prepared.channels
    voxel = (prepared.diameter or setup.config.object_voxels) / setup.config.object_voxels
    configuration = Configuration(
        spacing=(voxel,) * n,
        patch_size=prepared.patch,
        batch_size=_batch_size(setup.config),
        median_shape=tuple(map(float, prepared.patch)),
        normalization=("none",) * prepared.channels,
        use_mask_for_norm=(False,) * prepared.channels,
        batch_dice=True,
        architecture=prepared.architecture,
    )
    plan = Plan(
        dataset_name=setup.dataset.name,
        plans_name="medsegCentreOffset",
        preset="cpu",
        recipe="cpu",
        channels=names,
        labels=setup.labels,
        file_ending=setup.dataset.file_ending,
        reader=setup.dataset.reader,
        transpose_forward=(0, 1, 2),
        transpose_backward=(0, 1, 2),
        original_median_spacing=(voxel,) * n,
        original_median_shape=prepared.patch,
        intensity={},
        configurations={name: configuration},
    )
    return plan, name


def _finish(setup: CentreSetup, prepared: Prepared, outcome: loop.Outcome) -> None:
    """Write the bundle, measure the cases held out, and last, as the sign that all is done, the report."""
    weights = outcome.network.state_dict()
    best = setup.folder / loop.BEST_FILE
    if outcome.ended != loop.COMPLETE and best.exists():
        from safetensors.torch import load_file

        weights = load_file(best)
    config = setup.config
    settings = CentreSettings(
        object_voxels=config.object_voxels,
        diameter=prepared.diameter,
        diameter_unit=prepared.unit,
        percentiles=config.percentiles,
        classes=setup.labels.n_outputs,
        things=(1,) if setup.semantic is None else setup.semantic.classes.thing_values,
    )
    card = {
        "task": "centre-offset",
        "settings": settings.to_dict(),
        "dataset": setup.dataset.name,
        "cases": len(setup.train),
        "steps": outcome.progress.step,
        "ended": outcome.ended,
        "recipe": config.to_dict(),
        "precision": config.train.precision,
        "mirroring": False,
    }
    plan, name = make_plan_of(setup, prepared)
    save_bundle(setup.run / "bundle", plan, name, {str(setup.fold): weights}, (), card)
    measured = measure_objects(load_bundle(setup.run), setup.held_out, str(setup.fold), setup.semantic)
    result = {
        "fold": setup.fold,
        "held_out": setup.fold != "all" or bool(config.hold_out),
        "cases": len(setup.train),
        "validation_cases": len(setup.held_out),
        **measured.to_dict(),
        "steps": outcome.progress.step,
        "training_seconds": round(outcome.progress.elapsed_seconds, 1),
        "ended": outcome.ended,
        "bundle": str(setup.run / "bundle"),
    }
    write_text(setup.folder / "result.json", json.dumps(result, indent=1))
    _draw(setup, outcome.progress, measured).write(setup.folder / "report.html")


def _draw(setup: CentreSetup, progress: state.Progress, measured: Measured) -> HtmlReport:
    """Lay out the page."""
    pooled = measured.pooled()
    facts = {
        **{f"TP/(TP+FP+FN) at IoU {t:g}": f"{value:.3f}" for t, value in pooled.items()},
        **measured.panoptic_facts(),
        "steps": f"{progress.step:,}",
        "minutes": f"{progress.elapsed_seconds / 60:.1f}",
    }
    page = HtmlReport(f"Objects of {setup.dataset.name}, fold {setup.fold}", "centre-offset", facts)
    if setup.fold == "all" and not setup.config.hold_out:
        page.add_text("Not a validation", "This network was trained on every case that is measured here.")
    epochs = [row["epoch"] for row in progress.history]
    page.add_figure(
        "Loss", curves({"loss": (epochs, [r["loss"] for r in progress.history])}, "epoch", "loss")
    )
    page.add_facts("Objects, case by case", measured.table())
    page.add_facts("What was trained", {**setup.facts(), "medseg": medseg.__version__})
    recipe = {k: v for k, v in setup.config.to_dict().items() if not isinstance(v, dict)}
    return page.add_facts("Recipe", recipe)
