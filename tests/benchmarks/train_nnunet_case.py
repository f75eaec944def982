"""Iterations of nnU-Net's own trainer; runs in the peers' environment, started by ``train_vs_nnunet.py``.

Nothing of it is changed: its data loader in worker processes, its ``train_step``. Only the initial weights
are given, so that both programs start from the same ones.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Train `steps` iterations; write a time stamp, the CPU seconds so far and the loss after each."""
    folder, out, steps, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.environ |= {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(out.with_suffix("")),
        "nnUNet_n_proc_DA": "1",
    }
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(threads)
    base = folder / "preprocessed" / "Dataset001_Bench"
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    dataset = json.loads((base / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.plot_network_architecture = lambda: None
    trainer.on_train_start()
    weights = {name: torch.from_numpy(w) for name, w in np.load(folder / "weights.npz").items()}
    _, unexpected = trainer.network.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    trainer.on_train_epoch_start()
    rows = []
    for _ in range(steps):
        loss = float(trainer.train_step(next(trainer.dataloader_train))["loss"])
        rows.append([time.perf_counter(), cpu_seconds(), loss])
    out.write_text(json.dumps(rows))
    trainer.dataloader_train._finish()
    trainer.dataloader_val._finish()


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all below it, its augmentation workers, so far."""
    ticks, processes = 0, [os.getpid()]
    for pid in processes:  # grows while it runs
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            processes += [int(child) for child in children.read_text().split()]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])  # utime, stime, and those of ended children
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
