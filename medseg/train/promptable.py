"""``medseg train --task promptable``: a network that answers prompts, fine-tuned on a data set.

A run folder holds ``fold_K/`` (recipe, prepared samples, state, log, result, report) and ``bundle/``, which
``medseg prompt --weights mobile-sam=RUN`` and ``Models.open(given=...)`` take in the place of the published
weights.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import medseg
from medseg import assets, log
from medseg.errors import ConfigError, DatasetError, TrainingError
from medseg.files import check_writable, sha256_file, write_text
from medseg.infer import choose_device
from medseg.io import Case, Dataset, open_dataset
from medseg.metrics.report import HtmlReport, curves
from medseg.nets.lora import merge_lora
from medseg.nets.sam import Sam, load_sam
from medseg.nets.sam_bundle import Card, hash_card, is_tuned, read_card, save_tuned
from medseg.plan import choose_split
from medseg.prompt.embeddings import EmbeddingCache
from medseg.train.loop import STATE_FILE, STOP_FILE
from medseg.train.processes import claimed
from medseg.train.promptable_config import PromptableConfig, load_promptable
from medseg.train.promptable_loop import TuneJob, make_trainable, run_steps
from medseg.train.promptable_measure import Measured, measure
from medseg.train.promptable_samples import Store, list_samples, wanted_labels
from medseg.train.setup import Fold
from medseg.train.state import Progress
from medseg.types import PathLike

logger = logging.getLogger("medseg")

# Parts of what --max-minutes leaves: for measuring before training (as much is kept for after it), and, of
# the rest, for encoding slices.
MEASURE_PART, PREPARE_PART = 0.15, 0.5


@dataclass(frozen=True)
class TuneSetup:
    """Everything about a fold that is decided before the first step."""

    dataset: Dataset
    config: PromptableConfig
    fold: Fold
    train: tuple[Case, ...]
    held_out: tuple[Case, ...]
    run: Path
    weights: Path | None

    @property
    def folder(self) -> Path:
        """Folder of this fold."""
        return self.run / f"fold_{self.fold}"

    def facts(self) -> dict[str, Any]:
        """Return what will be trained, as plain data."""
        config = self.config
        return {
            "dataset": str(self.dataset.root),
            "run": str(self.run),
            "task": "promptable",
            "base": config.base,
            "weights": "published" if self.weights is None else str(self.weights),
            "size": config.size,
            "trains": list(trained_parts(config)),
            "labels": list(wanted_labels(self.dataset.labels, config)),
            "steps": config.steps,
            "batch": config.batch_size,
            "fold": self.fold,
            "train": len(self.train),
            "validation": len(self.held_out),
        }


def trained_parts(config: PromptableConfig) -> tuple[str, ...]:
    """Name what changes."""
    parts = ["mask decoder"]
    parts += ["prompt encoder"] if config.prompt_encoder else []
    parts += [f"image encoder (LoRA of rank {config.lora.rank})"] if config.lora.rank else []
    return tuple(parts)


def decide_tuning(
    dataset: Dataset | PathLike,
    out: PathLike,
    fold: Fold = 0,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    pretrained: PathLike | None = None,
    splits: PathLike | None = None,
) -> TuneSetup:
    """Settle everything about a run without touching the disk; parameters as in :func:`tune`."""
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset)
    config = load_promptable(recipe, tuple(overrides))
    wanted_labels(dataset.labels, config)
    by_name = {case.name: case for case in dataset.training if case.label is not None}
    if not by_name:
        raise DatasetError(f"{dataset.root}: no labelled cases to train on. Add labels or check the layout.")
    split = choose_split(tuple(by_name.values()), fold, splits)
    train, held_out = (tuple(by_name[name] for name in names) for names in (split.train, split.val))
    weights = None if pretrained is None else Path(pretrained)
    return TuneSetup(dataset, config, fold, train, held_out, Path(out), weights)


def describe_tuning(dataset: Dataset | PathLike, out: PathLike, **choices: Any) -> dict[str, Any]:
    """Return what :func:`tune` would train, as plain data; nothing is written."""
    return decide_tuning(dataset, out, **choices).facts()


def tune(
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
    """Fine-tune a promptable network and write its bundle, its figures on held-out cases and a report.

    Parameters
    ----------
    dataset : Dataset or folder
    out : run folder
    fold : 0 to 4, or "all"; the splits are those of ``medseg train``
    max_minutes : encoding, measuring and training end in this time, the learning rate annealed
    resume : go on with an unfinished run in `out`
    overrides : dotted settings such as ``lora.rank=4``
    recipe : YAML file of a :class:`PromptableConfig`
    pretrained : file of weights, or a bundle to go on from; by default the published weights of `base`
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
    AssetError, BundleError
        The weights cannot be had, or are those of another network.
    TrainingError
        The folder holds another or an unfinished run, or training diverged.
    """
    began = time.monotonic()
    check_writable(out, folder=True)
    setup = decide_tuning(dataset, out, fold, overrides, recipe, pretrained, splits)
    if max_minutes is not None and max_minutes <= 0:
        raise ConfigError(f"max_minutes {max_minutes}: expected more than 0.")
    if _check_folder(setup, resume):
        logger.info("%s: is already trained; nothing is left to do.", setup.folder)
        return setup.run / "bundle"
    if setup.config.threads:
        torch.set_num_threads(setup.config.threads)
    base = _Base.find(setup)
    model = base.load().to(choose_device(device))
    with claimed(setup.folder):
        _Run(setup, base, model, began, None if max_minutes is None else 60 * max_minutes).all(resume)
    return setup.run / "bundle"


@dataclass(frozen=True)
class _Base:
    """The weights that training starts from."""

    kind: str
    path: Path
    licence: str
    sha256: str

    @classmethod
    def find(cls, setup: TuneSetup) -> "_Base":
        kind, path = setup.config.base, setup.weights
        if path is not None and is_tuned(path):
            card = read_card(path)
            return cls(kind, path, card.licence, hash_card(path))
        published = kind in assets.ASSETS
        if path is None:
            path = assets.find(kind)
            known = assets.provenance(kind, path)
            return cls(kind, path, known["licence"], known["sha256"])
        sha256 = sha256_file(path) if path.is_file() else ""
        same = published and assets.ASSETS[kind].sha256 == sha256
        return cls(kind, path, assets.ASSETS[kind].licence if same else "unknown", sha256)

    def load(self) -> Sam:
        model = load_sam(self.path, self.kind)
        if "point" not in model.spec.understands:
            raise ConfigError(
                f"base {self.kind}: was made for boxes only, and is not fine-tuned to clicks here. "
                "Use base=mobile-sam."
            )
        return model


def _check_folder(setup: TuneSetup, resume: bool) -> bool:
    """Refuse a run folder that holds something else; return whether the fold is finished."""
    finished = (setup.folder / "report.html").exists()
    if finished and not resume:
        raise TrainingError(f"{setup.folder}: is already trained. Choose another fold or folder.")
    if (setup.folder / STATE_FILE).exists() and not resume:
        raise TrainingError(
            f"{setup.folder}: an unfinished run is here. Pass --resume to go on, or choose a new folder."
        )
    others = [p for p in setup.run.glob("fold_*") if p != setup.folder]
    if others or (setup.run / "plan.yaml").exists():
        raise TrainingError(f"{setup.run}: holds another training. Choose a folder for this one alone.")
    return finished


@dataclass(frozen=True, eq=False)
class _Run:
    """The composition of one run; the order of its methods is the order of events."""

    setup: TuneSetup
    base: _Base
    model: Sam
    began: float
    limit: float | None

    @property
    def left(self) -> float | None:
        """Seconds until the limit."""
        return None if self.limit is None else max(1.0, self.limit - (time.monotonic() - self.began))

    @property
    def key(self) -> str:
        """Hash of what must not change between a run and its resumption."""
        config = self.setup.config.model_dump(mode="json", exclude={"threads", "checkpoint_seconds"})
        cases = [[case.name for case in part] for part in (self.setup.train, self.setup.held_out)]
        facts = json.dumps([config, cases, self.base.sha256], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def all(self, resume: bool) -> None:
        folder, config = self.setup.folder, self.setup.config
        (folder / STOP_FILE).unlink(missing_ok=True)
        config.save(folder / "train.yaml")
        cache = EmbeddingCache(folder / "embeddings")
        before = self._before(cache)
        store = Store(folder / "samples")
        names = self._prepare(store)
        trained = make_trainable(self.model, config)
        self.model.to(next(self.model.mask_decoder.parameters()).device)
        limit = None if self.left is None else max(1.0, self.left - 1.2 * before.seconds)
        job = TuneJob(self.model, trained, store, list_samples(store, names), config, folder, self.key, limit)
        progress = run_steps(job, resume)
        merge_lora(self.model)
        after = measure(self.model, self._cases(before.cases), self.setup.dataset.labels, config, cache)
        self._finish(progress, before, after, len(names), len(job.samples))

    def _cases(self, names: Sequence[str]) -> list[Case]:
        return [case for case in self.setup.held_out if case.name in names]

    def _before(self, cache: EmbeddingCache) -> Measured:
        """Measure the network as it is; a resumed run reads what it measured then."""
        path = self.setup.folder / "before.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == self.key:
                rows = tuple((label, tuple(dice)) for label, dice in found["rows"])
                return Measured(tuple(found["cases"]), rows, found["seconds"])
        limit = None if self.left is None else MEASURE_PART * self.left
        labels, config = self.setup.dataset.labels, self.setup.config
        before = measure(self.model, self.setup.held_out, labels, config, cache, limit)
        write_text(path, json.dumps({"key": self.key, **vars(before)}))
        return before

    def _prepare(self, store: Store) -> list[str]:
        """Encode slices of training cases; under a time limit, of as many as fit. Return their names."""
        path = self.setup.folder / "prepared.json"
        cases, config = self.setup.train, self.setup.config
        if path.exists():  # the same cases after an interruption, however fast it goes now
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == self.key:
                cases = tuple(case for case in cases if case.name in found["cases"])
        limit = None if self.left is None or len(cases) < len(self.setup.train) else PREPARE_PART * self.left
        began = time.monotonic()
        store.folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(cases), generator=generator).tolist()
        names: list[str] = []
        for n in log.progress(order, "Encoding slices"):
            if names and limit is not None and time.monotonic() - began > limit:
                continue
            store.prepare(cases[n], self.setup.dataset.labels, self.model, config, self.base.sha256)
            names.append(cases[n].name)
        if len(names) < len(cases):
            logger.warning(
                "%d of %d training cases are used: more could not be encoded in the time given. Raise "
                "--max-minutes, or lower slices_per_case or size.",
                *(len(names), len(cases)),
            )
        write_text(path, json.dumps({"key": self.key, "cases": sorted(names)}))
        return sorted(names)

    def _finish(
        self, progress: Progress, before: Measured, after: Measured, cases: int, samples: int
    ) -> None:
        """Write the bundle, the result and the report; the report last, as the sign that all is done."""
        setup, config = self.setup, self.setup.config
        metrics = {"held_out": setup.fold != "all", "before": before.to_dict(), "after": after.to_dict()}
        card = Card(
            base=self.base.kind,
            base_sha256=self.base.sha256,
            licence=self.base.licence,
            size=config.size,
            dataset=setup.dataset.name,
            labels=tuple(wanted_labels(setup.dataset.labels, config)),
            trained=trained_parts(config),
            metrics=metrics,
            recipe=config.to_dict(),
            provenance={
                "torch": torch.__version__,
                "fold": setup.fold,
                "cases": cases,
                "samples": samples,
                "steps": progress.step,
                "ended": progress.ended,
            },
        )
        save_tuned(setup.run / "bundle", self.model, card)
        result = {
            **metrics,
            "fold": setup.fold,
            "cases": cases,
            "samples": samples,
            "validation_cases": len(before.cases),
            "steps": progress.step,
            "training_seconds": round(progress.elapsed_seconds, 1),
            "ended": progress.ended,
            "bundle": str(setup.run / "bundle"),
        }
        write_text(setup.folder / "result.json", json.dumps(result, indent=1))
        _draw(setup, progress, before, after).write(setup.folder / "report.html")


def _draw(setup: TuneSetup, progress: Progress, before: Measured, after: Measured) -> HtmlReport:
    """Lay out the page."""
    facts = {
        "steps": f"{progress.step:,}",
        "minutes": f"{progress.elapsed_seconds / 60:.1f}",
        "objects measured": str(len(before.rows)),
    }
    page = HtmlReport(f"Fine-tuning on {setup.dataset.name}, fold {setup.fold}", setup.config.base, facts)
    if setup.fold == "all":
        page.add_text("Not a validation", "This network was trained on every case that is measured here.")
    if before.rows:
        clicks = list(range(len(before.mean())))
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            name: (clicks, each.mean()) for name, each in (("before", before), ("after", after))
        }
        page.add_figure(
            "Dice on slices", curves(lines, "clicks after a jittered box", "Dice"), "Mean over objects."
        )
    steps = [row["step"] for row in progress.history]
    page.add_figure("Loss", curves({"loss": (steps, [r["loss"] for r in progress.history])}, "step", "loss"))
    page.add_facts("What was trained", {**setup.facts(), "medseg": medseg.__version__})
    recipe = {k: v for k, v in setup.config.to_dict().items() if not isinstance(v, dict)}
    return page.add_facts("Recipe", recipe)
