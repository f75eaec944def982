"""Train the refiner of the ``volume`` propagator, on shapes and contrasts that are drawn as it learns.

``python -m medseg.train.refiner RECIPE.yaml -o FOLDER`` continues where it stopped. The recipe of the weights
in the package is ``configs/prompt/refiner.yaml``.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from medseg.config import Config
from medseg.files import atomic_path
from medseg.io import read
from medseg.log import logger, task
from medseg.nets.refiner import GRID, Refiner, channels_last
from medseg.prompt.windows import choose_window
from medseg.train.refiner_samples import DRY, Sample, Source, draw_sample, make_source, mark_click, shown
from medseg.train.shapes import draw_label_map, draw_regions
from medseg.types import PathLike

# How often the user of a sample clicks once, twice, ...: each further click costs training time.
ROUNDS = (0.5, 0.25, 0.15, 0.1)


class Scan(Config):
    """A real image with a label map."""

    image: str
    labels: str | None = None


class Recipe(Config):
    """How the refiner is trained.

    Attributes
    ----------
    scans : tuple of Scan
        Real images with label maps; paths relative to the folder that is given beside the recipe.
    scan_share : float
        Share of samples drawn from them; the rest comes from synthetic label maps.
    label_maps : int
        How many synthetic label maps are drawn.
    regions : int
        How many label maps of regions are drawn for each real image: what its own edges enclose.
    start : str, optional
        Weights to begin from; channels that they do not know begin at zero.
    steps, batch, learning_rate, weight_decay, click_share, seed
        As usual; `click_share` of the samples are corrected by clicks on the network's own mistakes, one
        after the other.
    """

    scans: tuple[Scan, ...] = ()
    scan_share: float = 0.5
    label_maps: int = 160
    regions: int = 4
    steps: int = 4000
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    click_share: float = 0.5
    seed: int = 0
    start: str | None = None
    workers: int = 1


class _Stream(IterableDataset[tuple[Sample, Tensor]]):
    """An endless stream of samples and what is shown of them; every worker draws its own."""

    def __init__(self, real: list[Source], synthetic: list[Source], share: float, seed: int) -> None:
        self.real, self.synthetic, self.share, self.seed = real, synthetic, share, seed

    def __iter__(self) -> Iterator[tuple[Sample, Tensor]]:
        info = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        rng = np.random.default_rng((self.seed, 0 if info is None else info.id))
        while True:
            pool = self.real if self.real and rng.random() < self.share else self.synthetic
            sample = draw_sample(pool, rng)
            yield sample, shown(sample, flooding=rng.random() > DRY)


def load_sources(recipe: Recipe, data: Path) -> tuple[list[Source], list[Source]]:
    """Read the scans and draw the synthetic label maps."""
    real = []
    rng = np.random.default_rng(recipe.seed)
    for scan in recipe.scans:
        image = read(data / scan.image)
        low, high = choose_window(image, "auto")
        if low < -100:  # CT: its windows differ by target; all that is soft tissue or bone
            low, high = -300.0, 500.0
        clipped = image.array[0].astype(np.float32).clip(low, high)
        if scan.labels is not None:
            labels = read(data / scan.labels).array[0].astype(np.uint8)
            real += [make_source(labels, clipped, image.spacing)] * (1 + recipe.regions)
        for _ in range(recipe.regions):
            real.append(make_source(draw_regions(clipped, rng), clipped, image.spacing))
    with task("label maps", recipe.label_maps) as running:
        synthetic = []
        for _ in range(recipe.label_maps):
            synthetic.append(make_source(draw_label_map(rng)))
            running.advance()
    return real, synthetic


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice of each cube and cross entropy, both averaged; (n, a, b, c) each."""
    probability = logits.sigmoid()
    axes = (1, 2, 3)
    both = (probability * target).sum(axes)
    dice = (2 * both + 1) / (probability.sum(axes) + target.sum(axes) + 1)
    return 1 - dice.mean() + functional.binary_cross_entropy_with_logits(logits, target)


def _inputs(
    network: Refiner, drawn: list[tuple[Sample, Tensor]], recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return what is shown and the answers; part of the samples is shown again with clicks."""
    samples = [sample for sample, _ in drawn]
    shows = torch.stack([given for _, given in drawn])
    chosen = [n for n, each in enumerate(samples) if each.cut or rng.random() < recipe.click_share]
    left = {n: 1 + int(rng.choice(len(ROUNDS), p=ROUNDS)) for n in chosen}
    clicks = {n: torch.zeros_like(samples[n].box) for n in left}
    while left:
        with torch.no_grad():
            found = _forward(network, shows[list(left)]) > 0
        for n, mask in zip(list(left), found, strict=True):
            left[n] -= 1
            if mark_click(clicks[n], mask.numpy(), samples[n].target.numpy(), rng):
                shows[n] = shown(samples[n], clicks[n], mask.float() * 2 - 1, rng.random() > DRY)
            else:
                left[n] = 0
        left = {n: count for n, count in left.items() if count}
    return shows, torch.stack([sample.target for sample in samples]).float()


def _forward(network: Refiner, shows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = network(shows.contiguous(memory_format=torch.channels_last_3d))[:, 0]
    return logits.float()


def _begin(recipe: Recipe) -> Refiner:
    """Return the network to train, new or with the weights of an earlier one."""
    network = Refiner()
    if recipe.start is not None:
        weights = {name: value.float() for name, value in load_file(recipe.start).items()}
        first = "down.0.0.weight"
        known = weights[first]
        weights[first] = torch.zeros_like(network.state_dict()[first])
        weights[first][:, : known.shape[1]] = known
        network.load_state_dict(weights)
    return network


@dataclass(eq=False)
class _Training:
    """What changes in training, and is saved."""

    network: Refiner
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "_Training":
        torch.manual_seed(recipe.seed)
        network = channels_last(_begin(recipe))
        ema = get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.03
        )
        return cls(network, AveragedModel(network, multi_avg_fn=ema), optimizer, schedule)

    def update(self, shows: Tensor, target: Tensor) -> float:
        """Take one step; return its loss."""
        loss = loss_of(_forward(self.network, shows), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        self.step += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write ``state.pt`` and ``refiner.safetensors``, the averaged weights in half precision."""
        with atomic_path(folder / "state.pt") as path:
            torch.save({"step": self.step, **{k: p.state_dict() for k, p in self._parts().items()}}, path)
        weights = {k: v.half().contiguous() for k, v in self.average.module.state_dict().items()}
        with atomic_path(folder / "refiner.safetensors") as path:
            save_file(weights, path, metadata={"grid": str(GRID)})

    def load(self, folder: Path) -> None:
        """Continue from ``state.pt``, if there is one."""
        if (folder / "state.pt").exists():
            saved = torch.load(folder / "state.pt", weights_only=True)
            self.step = saved["step"]
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


def train(recipe: Recipe, data: PathLike, out: PathLike) -> Path:
    """Train, saving the state every minute; return the file of the averaged weights."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training.of(recipe)
    training.load(folder)
    rng = np.random.default_rng((recipe.seed, 1, training.step))
    # A stream that was stopped does not begin again with the samples that it has shown.
    stream = _Stream(*load_sources(recipe, Path(data)), recipe.scan_share, recipe.seed + 1000 * training.step)
    loader = DataLoader(
        stream,
        batch_size=recipe.batch,
        num_workers=recipe.workers,
        collate_fn=list,
        prefetch_factor=4 if recipe.workers else None,
    )
    losses: list[float] = []
    saved_at = time.monotonic()
    with task("steps", recipe.steps - training.step) as running:
        for drawn in loader:
            losses.append(training.update(*_inputs(training.network, drawn, recipe, rng)))
            running.advance(note=f"loss {np.mean(losses[-100:]):.3f}")
            done = training.step >= recipe.steps
            if done or time.monotonic() - saved_at > 60:
                logger.info("step %d: loss %.4f", training.step, np.mean(losses[-200:]))
                training.save(folder)
                saved_at = time.monotonic()
            if done:
                break
    return folder / "refiner.safetensors"


def main() -> None:
    """Run the recipe that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--data", default=".", help="folder that the paths of scans start from")
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    train(Recipe.load(given.recipe), given.data, given.output)


if __name__ == "__main__":
    main()
