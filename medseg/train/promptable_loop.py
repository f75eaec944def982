"""The steps of a fine-tuning, with checkpoints: killed and resumed, a run ends with the same weights."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from medseg import log
from medseg.errors import Cancelled, TrainingError
from medseg.files import write_text
from medseg.nets.lora import Adapter, add_lora
from medseg.nets.sam import Sam
from medseg.train import state
from medseg.train.loop import BAR_STEPS, COMPLETE, STATE_FILE, STOP_FILE
from medseg.train.promptable_config import PromptableConfig
from medseg.train.promptable_samples import Sample, Store
from medseg.train.promptable_steps import answer, loss_of, make_batch, targets

# Steps to a line of the log.
LOG_STEPS = 25


@dataclass(frozen=True)
class TuneJob:
    """What the steps need.

    Attributes
    ----------
    model : with its adapters; only what `trained` holds changes
    trained : the parts with parameters to train
    samples : (case, number) of every sample
    folder : where state and log are kept
    key : hash of everything that must agree on resume
    limit_seconds : end the schedule after this much time; None: after all steps
    """

    model: Sam
    trained: nn.Module
    store: Store
    samples: Sequence[tuple[str, int]]
    config: PromptableConfig
    folder: Path
    key: str
    limit_seconds: float | None = None


def make_trainable(model: Sam, config: PromptableConfig) -> nn.ModuleDict:
    """Freeze a network but for what is trained, and return that.

    Its batch norms keep their statistics: batches of a few slices have none.
    """
    model.requires_grad_(False).eval()
    parts: dict[str, nn.Module] = {"mask_decoder": model.mask_decoder}
    if config.prompt_encoder:
        parts["prompt_encoder"] = model.prompt_encoder
    for part in parts.values():
        part.requires_grad_(True)
    if config.lora.rank:
        parts["lora"] = _adapted(model, config)
    return nn.ModuleDict(parts)


def _adapted(model: Sam, config: PromptableConfig) -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(config.seed)
    lora = config.lora
    adapters: dict[str, Adapter] = add_lora(
        model.image_encoder, lora.rank, lora.alpha, lora.targets, generator
    )
    return nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in adapters.items()})


def run_steps(job: TuneJob, resume: bool = False) -> state.Progress:
    """Train until the schedule, the time limit or a STOP file ends it.

    Raises
    ------
    Cancelled
        The listener asked to stop; the state is saved, so that a resumed run goes on from here.
    TrainingError
        The loss is not finite, or the state on disk belongs to another run.
    """
    parameters = [p for p in job.trained.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=job.config.lr, weight_decay=job.config.weight_decay)
    progress = state.Progress()
    path = job.folder / STATE_FILE
    if resume and path.exists():
        progress = state.load_state(path, job.trained, None, optimizer, job.key)
    session = _Session(job, parameters, optimizer, progress)
    try:
        session.run()
    except (Cancelled, KeyboardInterrupt):
        session.save()
        raise
    return progress


class _Session:
    """The mutable part: optimiser, progress, losses since the last line of the log."""

    def __init__(
        self, job: TuneJob, parameters: list[nn.Parameter], optimizer: AdamW, progress: state.Progress
    ) -> None:
        self.job, self.parameters, self.optimizer, self.progress = job, parameters, optimizer, progress
        self.device = parameters[0].device
        self.losses: list[float] = []
        self.began, self.before = time.monotonic(), progress.elapsed_seconds
        self.saved = self.began

    def fraction(self) -> float:
        """Return the part of the schedule that is done, by steps or by time, whichever is further."""
        by_steps = self.progress.step / self.job.config.steps
        limit = self.job.limit_seconds
        elapsed = self.before + time.monotonic() - self.began
        return min(1.0, by_steps if limit is None else max(by_steps, elapsed / max(limit, 1e-9)))

    def run(self) -> None:
        shown = 0
        with log.task("Fine-tuning", BAR_STEPS) as task:
            while not self.progress.ended:
                if log.is_cancelled():
                    raise Cancelled(
                        f"{self.job.folder}: stopped at step {self.progress.step}, the state is saved. "
                        "Run the same command with --resume to go on."
                    )
                self.step(self.fraction())
                fraction = self.fraction()
                self._note(fraction)
                now = int(BAR_STEPS * fraction)
                task.advance(now - shown, f"loss {self.losses[-1]:.3f}" if self.losses else "", check=False)
                shown = now

    def step(self, fraction: float) -> None:
        """One step; all that is random in it follows from the seed and its number."""
        job, config = self.job, self.job.config
        generator = np.random.default_rng((config.seed, self.progress.step))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * schedule(fraction, config.warmup)
        batch = make_batch(job.model, self._draw(generator), config.size, self.device)
        logits, expected = answer(job.model, batch, config, generator)
        wanted, valid = (part.to(self.device) for part in targets(batch, logits.shape[-1]))
        loss = loss_of(logits, expected, wanted, valid, config.loss)
        self._check(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.progress.step += 1
        self.progress.elapsed_seconds = self.before + time.monotonic() - self.began

    def _draw(self, generator: np.random.Generator) -> list[Sample]:
        count = len(self.job.samples)
        size = self.job.config.batch_size
        chosen = generator.choice(count, size, replace=size > count)
        return [self.job.store.load(*self.job.samples[n]) for n in chosen]

    def _check(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"{self.job.folder}: the loss is {loss.item()} at step {self.progress.step}. Lower the "
                "learning rate (lr=...); the last good state is kept."
            )

    def _note(self, fraction: float) -> None:
        """Write the log and the state where it is time."""
        progress, config = self.progress, self.job.config
        if fraction >= 1.0:
            progress.ended = COMPLETE
        elif (self.job.folder / STOP_FILE).exists():
            progress.ended = "it was asked to stop (medseg stop)"
        if self.losses and (progress.ended or progress.step % LOG_STEPS == 0):
            row = {
                "step": progress.step,
                "loss": round(float(np.mean(self.losses)), 6),
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(progress.elapsed_seconds, 1),
            }
            progress.history.append(row)
            self.losses.clear()
        if progress.ended or time.monotonic() - self.saved > config.checkpoint_seconds:
            self.save()

    def save(self) -> None:
        """Write state and log."""
        self.saved = time.monotonic()
        path = self.job.folder / STATE_FILE
        state.save_state(path, self.job.trained, None, self.optimizer, self.progress, self.job.key)
        lines = [json.dumps(row) + "\n" for row in self.progress.history]
        write_text(self.job.folder / "log.jsonl", "".join(lines))


def schedule(fraction: float, warmup: float) -> float:
    """Return the part of the learning rate: a rise, then a cosine to zero.

    >>> [round(schedule(f, 0.1), 3) for f in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if fraction < warmup:
        return max(fraction, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
