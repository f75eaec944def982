import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from medseg.errors import Cancelled, ConfigError, TrainingError
from medseg.labels import LabelSet
from medseg.log import Listener, listening
from medseg.train import loop
from medseg.train.config import LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from medseg.train.parallel import SplitBatch
from medseg.train.samples import Sampler
from tests.train.test_samples import Arrays

LABELS = LabelSet(entries={"background": 0, "ball": 1})
CONFIG = TrainConfig(
    epochs=4,
    steps_per_epoch=5,
    val_samples=4,
    optimizer=OptimizerConfig(name="adamw", lr=0.01),
    schedule=ScheduleConfig(name="cosine", warmup=0.1),
    loss=LossConfig(deep_supervision=False),
    ema_decay=0.9,
    precision="fp32",
)


class TinyNet(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, outputs, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def ball(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    grid = np.indices((16, 16, 16)) - rng.uniform(5, 10, (3, 1, 1, 1))
    seg = ((grid**2).sum(0) < 16)[None].astype(np.int16)
    data = (seg * 2 + rng.normal(0, 0.3, seg.shape)).astype(np.float32)
    return Arrays(data, seg, {"ball": np.argwhere(seg[0])})


def job(folder: Path, **changes: Any) -> loop.Job:
    torch.manual_seed(0)
    config = changes.pop("config", CONFIG)
    cases = [ball(seed) for seed in range(4)]
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "network": TinyNet(),
        "labels": LABELS,
        "config": config,
        "batch_size": 2,
        "batch_dice": False,
        "train": Sampler(cases[:3], (12, 12, 12), LABELS, config),
        "validation": Sampler(cases[3:], (12, 12, 12), LABELS, config, train=False),
        "folder": folder,
        "key": "this run",
        "title": "test",
    }
    return loop.Job(**(values | changes))


def fabric() -> Fabric:
    launched = Fabric(accelerator="cpu", devices=1, precision="32-true")
    launched.launch()
    return launched


class StopAfter(Listener):
    """Asks to stop at the n-th report."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def advanced(self, key: int, steps: int, note: str) -> None:
        self.left -= 1

    def cancelled(self) -> bool:
        return self.left <= 0


def weights(outcome: loop.Outcome) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in outcome.network.parameters()])


def test_it_learns(tmp_path: Path) -> None:
    outcome = loop.run(job(tmp_path), fabric())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["dice"]["ball"] > 0.8
    assert outcome.ended == "the schedule is complete"


@pytest.mark.parametrize("reports", [2, 5, 9])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path: Path, reports: int) -> None:
    whole = loop.run(job(tmp_path / "whole"), fabric())
    with pytest.raises(Cancelled), listening(StopAfter(reports)):
        loop.run(job(tmp_path / "parts"), fabric())
    resumed = loop.run(job(tmp_path / "parts", resume=True), fabric())
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.progress.step == resumed.progress.step == 20
    assert [row["dice"] for row in whole.progress.history] == [r["dice"] for r in resumed.progress.history]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Cancelled), listening(StopAfter(3)):
        loop.run(job(tmp_path), fabric())
    with pytest.raises(TrainingError, match="another plan, recipe or split"):
        loop.run(job(tmp_path, resume=True, key="that run"), fabric())


def test_a_damaged_state_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / loop.STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(TrainingError, match="damaged"):
        loop.run(job(tmp_path, resume=True), fabric())


def test_a_stop_file_ends_it_at_the_next_epoch_with_the_best_kept(tmp_path: Path) -> None:
    (tmp_path / loop.STOP_FILE).touch()
    outcome = loop.run(job(tmp_path), fabric())
    assert outcome.progress.step == 5
    assert "asked to stop" in outcome.ended
    assert (tmp_path / loop.BEST_FILE).exists()


def test_patience_ends_it(tmp_path: Path) -> None:
    still = CONFIG.replace(patience_epochs=1, optimizer={"name": "sgd", "lr": 1e-12})
    outcome = loop.run(job(tmp_path, config=still), fabric())
    assert "no better score" in outcome.ended and outcome.progress.step < 20


def test_a_time_limit_anneals_the_rate_and_ends(tmp_path: Path) -> None:
    endless = CONFIG.replace(epochs=100000)
    outcome = loop.run(job(tmp_path, config=endless, limit_seconds=2.0), fabric())
    assert 1 <= outcome.progress.step < 500000
    assert outcome.progress.history[-1]["lr"] < 0.003


def test_a_loss_that_is_not_finite_is_one_clear_error(tmp_path: Path) -> None:
    broken = job(tmp_path)
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="learning rate"):
        loop.run(broken, fabric())


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_loss_of_a_step_is_nnunets_formula(tmp_path: Path, batch_dice: bool) -> None:
    """Spec 1.12 written out: weights 4/7, 2/7, 1/7, 0; nearest-exact targets; CE + Dice of the foreground."""
    torch.manual_seed(1)
    outputs = [torch.randn(3, 3, *size) for size in ((8, 8, 12), (4, 4, 6), (2, 4, 3), (1, 2, 3))]
    segs = torch.randint(0, 3, (3, 8, 8, 12), dtype=torch.int16)
    expected = 0.0
    for logits, weight in zip(outputs[:3], (4 / 7, 2 / 7, 1 / 7), strict=True):
        sizes = zip(logits.shape[2:], segs.shape[1:], strict=True)
        pick = [((torch.arange(n) + 0.5) * (m / n)).long() for n, m in sizes]
        target = segs[:, pick[0]][:, :, pick[1]][:, :, :, pick[2]]
        p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
        truth = torch.stack([target == k for k in range(3)], 1).double()
        ce = -(truth * p.log()).sum(1).mean()
        axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
        both, size = (p * truth)[:, 1:].sum(axes), (p + truth)[:, 1:].sum(axes)
        expected += weight * float(ce - ((2 * both + 1e-5) / (size + 1e-5)).mean())
    labels = LabelSet(entries={"background": 0, "a": 1, "b": 2})
    given = job(tmp_path, labels=labels, batch_dice=batch_dice, config=TrainConfig())
    assert float(loop.total_loss(outputs, segs, given, shared=False)) == pytest.approx(expected, rel=1e-5)


def test_splitting_the_batch_among_threads_changes_nothing_but_rounding(tmp_path: Path) -> None:
    config = CONFIG.replace(epochs=1, optimizer={"name": "sgd", "lr": 0.01})
    whole, split = job(tmp_path / "whole", config=config), job(tmp_path / "split", config=config)
    whole.network.add_module("unused", nn.Dropout(0.5))  # networks with random numbers are not split
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not isinstance(loop.made_fast(whole, fabric()), SplitBatch)
        assert isinstance(loop.made_fast(split, fabric()), SplitBatch)
        ended = [weights(loop.run(each, fabric())) for each in (whole, split)]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*ended, rtol=1e-4, atol=1e-5)


def test_poly_changes_at_epoch_starts_as_nnunet_does() -> None:
    optimizer = torch.optim.SGD(TinyNet().parameters(), lr=1.0)
    config = TrainConfig()
    for fraction, epoch in ((0.0, 0), (0.0009, 0), (0.5, 500), (0.9999, 999)):
        loop.set_learning_rate(optimizer, config, fraction)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - epoch / 1000) ** 0.9)
    for epochs in (50, 100, 300):
        config = TrainConfig(epochs=epochs)
        for epoch in range(epochs):
            loop.set_learning_rate(optimizer, config, epoch * 250 / config.steps)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - epoch / epochs) ** 0.9)


def test_the_gradient_scaler_survives_a_resume() -> None:
    class Strategy:
        class precision:  # noqa: N801
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    class Fake:
        strategy = Strategy

    stored = loop.scaler_state(Fake())
    assert stored is not None and stored["scale"] == 64.0
    Strategy.precision.scaler = torch.amp.GradScaler("cpu")
    loop.restore_scaler(Fake(), json.loads(json.dumps(stored)))
    assert Strategy.precision.scaler.get_scale() == 64.0
    assert loop.scaler_state(fabric()) is None


def test_a_run_that_ended_stays_ended_when_resumed(tmp_path: Path) -> None:
    (tmp_path / loop.STOP_FILE).touch()
    first = loop.run(job(tmp_path), fabric())
    (tmp_path / loop.STOP_FILE).unlink()
    again = loop.run(job(tmp_path, resume=True), fabric())
    assert again.progress.step == first.progress.step == 5
    assert torch.equal(weights(first), weights(again))


def test_tensorboard_is_optional_and_its_absence_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"medseg\[tensorboard\]"):
        loop.run(job(tmp_path, config=CONFIG.replace(tensorboard=True)), fabric())


def test_what_is_logged_reaches_the_board() -> None:
    class Board:
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen[name] = value

        def flush(self) -> None: ...

    board = Board()
    loop.write_scalars(board, {"loss": 1.5, "lr": 0.1, "step": 3, "dice": {"a": 0.5, "b": None}})
    assert board.seen == {"loss": 1.5, "lr": 0.1, "dice/a": 0.5}
