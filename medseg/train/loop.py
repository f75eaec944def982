"""The one training loop: steps, validation, checkpoints, and every way it may end."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from medseg import log
from medseg.errors import Cancelled, ConfigError, ResourceError, TrainingError
from medseg.files import write_text
from medseg.labels import LabelSet
from medseg.train import losses, state
from medseg.train.config import OptimizerConfig, TrainConfig
from medseg.train.parallel import SplitBatch, is_per_sample
from medseg.train.samples import PatchSource, batches, to_target, validation_batches

COMPLETE = "the schedule is complete"
BAR_STEPS = 1000  # of the progress bar: a run may be limited by steps or by time
STOP_FILE = "STOP"
STATE_FILE = "state.safetensors"
BEST_FILE = "best.safetensors"

LossOf = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
Counts = Callable[[Tensor, Tensor, LabelSet], Tensor]
"""From a network, images, their label maps and the number of the step to the loss."""


@dataclass(frozen=True)
class Job:
    """What one fold's training needs, besides the processes it runs in.

    Attributes
    ----------
    train, validation : where patches come from; None trains without validation
    batch_size : samples a step, over all processes
    folder : where state, log and best weights are kept
    key : hash of everything that must agree on resume
    limit_seconds : end the schedule after this much time; None runs all steps
    loss : of networks that are no segmentations: of network, images, targets and step
    counts : the counterpart of :func:`overlap_counts` for them; without it, they are validated after training
    """

    network: nn.Module
    labels: LabelSet
    config: TrainConfig
    batch_size: int
    batch_dice: bool
    train: PatchSource
    validation: PatchSource | None
    folder: Path
    key: str
    title: str
    limit_seconds: float | None = None
    resume: bool = False
    loss: LossOf | None = None
    counts: Counts | None = None


@dataclass(frozen=True)
class Outcome:
    """Trained weights (the averaged ones where the recipe averages) and how the run went."""

    network: nn.Module
    progress: state.Progress
    ended: str


class Clock:
    """Fraction of the schedule that is done, by steps or by time, whichever is further."""

    def __init__(self, job: Job, progress: state.Progress) -> None:
        self.job, self.progress = job, progress
        self.started = time.monotonic()
        self.before = progress.elapsed_seconds

    def elapsed(self) -> float:
        """Seconds spent training, earlier sessions included."""
        return self.before + time.monotonic() - self.started

    def fraction(self) -> float:
        """0 at the start, 1 at the end."""
        by_steps = self.progress.step / self.job.config.steps
        limit = self.job.limit_seconds
        return min(1.0, by_steps if limit is None else max(by_steps, self.elapsed() / max(limit, 1e-9)))


def run(job: Job, fabric: Any) -> Outcome:
    """Train until the schedule, the time limit, patience or a STOP file ends it.

    Parameters
    ----------
    fabric : lightning_fabric.Fabric
        Launched; decides device, precision and processes.

    Raises
    ------
    Cancelled
        The listener asked to stop; the state is saved, so that a resumed run goes on from here.
    TrainingError
        The loss is not finite, or the state on disk belongs to another run.
    ResourceError
        Memory ran out.
    """
    average = copy.deepcopy(job.network) if job.config.ema_decay else None
    if average is not None:
        state.frozen(average.parameters())
        average.to(fabric.device)
    raw = job.network
    optimizer = make_optimizer(raw, job.config.optimizer, fused=fabric.device.type == "cpu")
    network, optimizer = fabric.setup(made_fast(job, fabric), optimizer)
    progress = state.Progress()
    path = job.folder / STATE_FILE
    if job.resume and path.exists():
        progress = state.load_state(path, raw, average, optimizer, job.key)
        restore_scaler(fabric, progress.scaler)
    session = Session(job, fabric, network, raw, average, optimizer, progress)
    try:
        ended = session.run()
    except (Cancelled, KeyboardInterrupt):
        session.save()
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{job.title}: memory ran out at batch size {job.batch_size}. "
            f"Start anew with batch_size={max(1, job.batch_size // 2)}, or plan with a smaller budget."
        ) from error
    return Outcome(average if average is not None else raw, progress, ended)


class Session:
    """One process's part of a run; the order of its methods is the order of events."""

    def __init__(
        self,
        job: Job,
        fabric: Any,
        network: nn.Module,
        raw: nn.Module,
        average: nn.Module | None,
        optimizer: Optimizer,
        progress: state.Progress,
    ) -> None:
        self.job, self.fabric, self.network, self.raw = job, fabric, network, raw
        self.average, self.optimizer, self.progress = average, optimizer, progress
        self.clock = Clock(job, progress)
        self.losses: list[Tensor] = []
        self.saved = time.monotonic()
        self.board = open_board(job) if job.config.tensorboard and fabric.is_global_zero else None

    def run(self) -> str:
        """Do the steps; return why it ended."""
        progress, per_epoch = self.progress, self.job.config.steps_per_epoch
        stream = self._stream()
        with log.task(self.job.title, BAR_STEPS) as task:
            shown = 0
            fraction, cancelled = self.agree()
            while not progress.ended:
                if cancelled:  # after the end of an epoch, never instead of it
                    raise Cancelled(
                        f"{self.job.title}: stopped at step {progress.step}, the state is saved. "
                        "Run the same command with --resume to go on."
                    )
                self.step(fraction, *next(stream))
                fraction, cancelled = self.agree()
                ends = fraction >= 1.0 or progress.step % per_epoch == 0
                note = self.end_epoch(fraction) if ends else ""
                now = int(BAR_STEPS * fraction)
                task.advance(now - shown, note, check=False)
                shown = now
                self._save_sometimes()
        return progress.ended

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        job, fabric = self.job, self.fabric
        shares = (fabric.global_rank, fabric.world_size)
        return batches(job.train, self.progress.step, job.batch_size, *shares, job.config.loader_threads)

    def agree(self) -> tuple[float, bool]:
        """Return the fraction of the schedule that is done, and whether any process was asked to stop.

        Clocks differ and each process gets its own Ctrl-C, so they settle both together at every step.
        """
        fraction, cancelled = self.clock.fraction(), float(log.is_cancelled())
        if self.fabric.world_size > 1:
            mine = torch.tensor([fraction, cancelled], dtype=torch.float64, device=self.fabric.device)
            fraction, cancelled = self.fabric.all_reduce(mine, reduce_op="max").tolist()
        return fraction, bool(cancelled)

    def step(self, fraction: float, images: Tensor, segs: Tensor) -> None:
        """One optimiser step on this process's share of a batch."""
        config = self.job.config
        set_learning_rate(self.optimizer, config, fraction)
        images = images.to(self.fabric.device, non_blocking=True)
        segs = segs.to(self.fabric.device)
        if self.job.loss is not None:
            loss = self.job.loss(self.network, images, segs, self.progress.step)
        else:
            loss = total_loss(self.network(images), segs, self.job, self.fabric.world_size > 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=config.optimizer.clip_norm, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.losses.append(loss.detach())
        if self.average is not None:
            state.update_average(self.average, self.raw, config.ema_decay, self.progress.step)
        self.progress.step += 1
        self.progress.elapsed_seconds = self.clock.elapsed()

    def end_epoch(self, fraction: float) -> str:
        """Validate, log, keep the best, see whether to go on, checkpoint; return a short status text."""
        job, progress, loss = self.job, self.progress, self._take_mean_loss()
        epoch = -(-progress.step // job.config.steps_per_epoch)
        row: dict[str, Any] = {"epoch": epoch, "step": progress.step, "loss": round(loss, 6)}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["seconds"] = round(progress.elapsed_seconds, 1)
        note = f"loss {loss:.2f}"
        # where the clock cut an epoch short, the validation of whole cases follows at once
        cut_short = job.limit_seconds is not None and progress.step % job.config.steps_per_epoch != 0
        if job.validation is not None and job.config.val_samples and not cut_short:
            dice = self.validate(job.validation)
            row["dice"] = {name: None if math.isnan(d) else round(d, 5) for name, d in dice.items()}
            note += "  Dice " + " ".join(f"{name} {d:.2f}" for name, d in dice.items())
            self._keep_best(float(np.nanmean([*dice.values()])) if not _all_nan(dice) else 0.0, epoch)
        progress.history.append(row)
        if self.board is not None:
            write_scalars(self.board, row)
        progress.ended = COMPLETE if fraction >= 1.0 else self._reason_to_stop(epoch)
        self.save()
        return note

    def _take_mean_loss(self) -> float:
        loss = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        self.losses.clear()
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.job.title}: the loss is {loss} at step {self.progress.step}. Lower the learning rate "
                "(optimizer.lr=...), or set precision=fp32; the last good state is kept."
            )
        return loss

    def validate(self, sampler: PatchSource) -> dict[str, float]:
        """Return Dice per foreground entry, pooled over the validation patches."""
        network = self.average if self.average is not None else self.raw
        network.eval()
        counts = torch.zeros(3, len(self.job.labels.foreground), device=self.fabric.device)
        shares = (self.fabric.global_rank, self.fabric.world_size)
        size = -(-self.job.batch_size // self.fabric.world_size)
        with torch.inference_mode(), self.fabric.autocast():
            stream = validation_batches(sampler, self.job.config.val_samples, size, *shares)
            for images, segs in stream:
                outputs = network(images.to(self.fabric.device, non_blocking=True))
                logits = outputs[0] if isinstance(outputs, list | tuple) else outputs
                count = self.job.counts or overlap_counts
                counts += count(logits, segs.to(logits.device), self.job.labels)
        network.train()
        counts = self.fabric.all_reduce(counts, reduce_op="sum")
        both, predicted, reference = counts.double().cpu().numpy()
        with np.errstate(invalid="ignore"):
            dice = 2 * both / (predicted + reference)
        return dict(zip(self.job.labels.foreground, dice.tolist(), strict=True))

    def save(self) -> None:
        """Write the state (first process only)."""
        self.saved = time.monotonic()
        if self.fabric.is_global_zero:
            self.progress.scaler = scaler_state(self.fabric)
            path = self.job.folder / STATE_FILE
            state.save_state(path, self.raw, self.average, self.optimizer, self.progress, self.job.key)
            lines = [json.dumps(row) + "\n" for row in self.progress.history]
            write_text(self.job.folder / "log.jsonl", "".join(lines))
        self.fabric.barrier()

    def _save_sometimes(self) -> None:
        due = time.monotonic() - self.saved > self.job.config.checkpoint_seconds
        if self.fabric.world_size > 1:
            due = self.progress.step % self.job.config.steps_per_epoch == 0  # clocks differ, steps do not
        if due and bool(torch.isfinite(torch.stack(self.losses)).all() if self.losses else True):
            self.save()

    def _keep_best(self, dice: float, epoch: int) -> None:
        progress = self.progress
        progress.score = dice if progress.score is None else 0.9 * progress.score + 0.1 * dice
        if progress.score > progress.best_score:
            progress.best_score, progress.best_epoch = progress.score, epoch
            if self.fabric.is_global_zero:
                best = self.average if self.average is not None else self.raw
                state.save_weights(self.job.folder / BEST_FILE, best)

    def _reason_to_stop(self, epoch: int) -> str:
        patience = self.job.config.patience_epochs
        if patience and self.progress.best_epoch >= 0 and epoch - self.progress.best_epoch >= patience:
            return f"no better score for {patience} epochs"
        stop = (self.job.folder / STOP_FILE).exists()
        return "it was asked to stop (medseg stop)" if self.fabric.broadcast(stop) else ""


def scaler_state(fabric: Any) -> dict[str, Any] | None:
    """Return the state of Fabric's gradient scaler; None where the precision needs none."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return None if scaler is None else dict(scaler.state_dict())


def restore_scaler(fabric: Any, stored: dict[str, Any] | None) -> None:
    """Put back what :func:`scaler_state` returned."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None and stored:
        scaler.load_state_dict(stored)


def open_board(job: Job) -> Any:
    """Return a TensorBoard writer for this fold.

    Raises
    ------
    ConfigError
        The package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=true: the package is not installed. Run pip install 'medseg[tensorboard]'."
        ) from error
    return SummaryWriter(str(job.folder / "tensorboard"))


def write_scalars(board: Any, row: dict[str, Any]) -> None:
    """Write one row of the log: loss, learning rate, and Dice per class."""
    board.add_scalar("loss", row["loss"], row["step"])
    board.add_scalar("lr", row["lr"], row["step"])
    for name, dice in row.get("dice", {}).items():
        if dice is not None:
            board.add_scalar(f"dice/{name}", dice, row["step"])
    board.flush()


def make_optimizer(network: nn.Module, config: OptimizerConfig, fused: bool = False) -> Optimizer:
    """Return SGD with Nesterov momentum, or AdamW; `fused` updates a tensor in one pass."""
    if config.name == "sgd":
        return SGD(
            network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def set_learning_rate(optimizer: Optimizer, config: TrainConfig, fraction: float) -> None:
    """Set the rate for this point of the schedule; ``poly`` changes at epoch starts, as nnU-Net's does."""
    schedule, lr = config.schedule, config.optimizer.lr
    if schedule.name == "poly":
        epoch = math.floor(fraction * config.epochs + 1e-9)  # a product like 28.999999999999996 is epoch 29
        lr *= (1 - epoch / config.epochs) ** schedule.power if epoch < config.epochs else 0.0
    else:
        lr *= 0.5 * (1 + math.cos(math.pi * fraction))
    if schedule.warmup:
        lr *= min(1.0, (fraction + 1e-4) / schedule.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr


def total_loss(outputs: Tensor | Sequence[Tensor], segs: Tensor, job: Job, shared: bool) -> Tensor:
    """Return the deep-supervision sum of the losses.

    ``shared``: other processes train on parts of the batch. Outputs of weight 0 then stay in the graph,
    because DDP waits for every parameter's gradient.
    """
    if isinstance(outputs, Tensor):
        outputs = [outputs]
    target, valid = to_target(segs, job.labels)
    terms = []
    for logits, weight in zip(outputs, losses.deep_supervision_weights(len(outputs)), strict=True):
        if weight == 0.0:
            terms += [logits.sum() * 0.0] if shared else []
            continue
        size = logits.shape[2:]
        goal = losses.downsample_target(target, size)
        if job.labels.has_regions:
            mask = None if valid is None else losses.downsample_target(valid.to(torch.uint8), size).bool()
            term = losses.region_loss(logits, goal, mask, job.batch_dice, job.config.loss, shared)
        else:
            ignore = job.labels.ignore
            term = losses.class_loss(logits, goal, ignore, job.batch_dice, job.config.loss, shared)
        terms.append(weight * term)
    return torch.stack(terms).sum()


def overlap_counts(logits: Tensor, segs: Tensor, labels: LabelSet) -> Tensor:
    """Return (3, foreground): voxels in both, predicted, and in the reference; ignored ones left out."""
    target, valid = to_target(segs, labels)
    if labels.has_regions:
        predicted, reference = logits > 0, target.bool()
    else:
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (segs.ndim - 1))
        predicted, reference = logits.argmax(1, keepdim=True) == classes, target[:, None] == classes
    if valid is not None:
        predicted, reference = predicted & valid[:, None], reference & valid[:, None]
    axes = [0, *range(2, logits.ndim)]
    return torch.stack([m.sum(axes).float() for m in (predicted & reference, predicted, reference)])


def made_fast(job: Job, fabric: Any) -> nn.Module:
    """Return the network compiled, or with the batch split among the cores of a CPU, or as it is."""
    network, mode, device = job.network, job.config.compile, fabric.device.type
    if (
        job.loss is not None and job.counts is None
    ):  # a detector: its work depends on what is found: nothing to compile, or to split by sample
        return network
    if mode == "on" or (mode == "auto" and device == "cuda"):
        return cast(nn.Module, torch.compile(network))
    threads = torch.get_num_threads()
    alone = device == "cpu" and fabric.world_size == 1
    if alone and min(threads, job.batch_size) > 1 and is_per_sample(network):
        return SplitBatch(network, job.batch_size, threads)
    return network


def _all_nan(dice: dict[str, float]) -> bool:
    return all(math.isnan(d) for d in dice.values())
