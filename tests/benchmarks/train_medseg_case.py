"""Iterations of ``medseg train --recipe nnunet``; started by ``train_vs_nnunet.py``."""

import json
import sys
import time
from pathlib import Path

import torch

from medseg.errors import Cancelled
from medseg.log import Listener, listening
from medseg.train import fit, loop


class Stamps(Listener):
    """Notes time, CPU time and loss after every step, and stops after `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rows: list[list[float]] = []

    def note(self, loss: float) -> None:
        """Take one row."""
        self.rows.append([time.perf_counter(), time.process_time(), loss])

    def cancelled(self) -> bool:
        """Ask to stop."""
        return len(self.rows) >= self.steps


def main() -> None:
    """Train `steps` iterations of the fold that the plan's store is for."""
    folder, out, steps, threads, precision = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:6]
    run = out.with_suffix("")
    run.mkdir()
    (run / "store").symlink_to(folder / "store")
    stamps = Stamps(int(steps))
    step = loop.Session.step

    def noted(session: loop.Session, *arguments: object) -> None:
        step(session, *arguments)  # type: ignore[arg-type]
        stamps.note(float(session.losses[-1]))

    loop.Session.step = noted  # type: ignore[method-assign,assignment]
    torch.set_num_threads(int(threads))
    overrides = [f"precision={precision}", "loader_threads=1"]
    root = folder / "raw" / "Dataset001_Bench"
    try:
        with listening(stamps):
            fit(root, run, plan=folder / "plan.yaml", recipe="nnunet", overrides=overrides, device="cpu")
    except Cancelled:
        out.write_text(json.dumps(stamps.rows))


if __name__ == "__main__":
    main()
