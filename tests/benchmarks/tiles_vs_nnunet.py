"""The network alone: CPU seconds for one tile of the default 3D plan, beside nnU-Net's network, in turns.

nnU-Net's own module (from its own environment, float32, one thread) and each runtime of medseg get the same
random weights and the same tile of 128 x 128 x 128; preparing the network is not counted. What a runtime
does to labels is measured on trained models::

    python tests/benchmarks/tiles_vs_nnunet.py --peers PEERS/bin/python --data DATA

PEERS is an environment with nnunetv2 2.8.1; beside DATA lies ``golden/inference/MODEL``, as for `goldens.py`.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goldens import EQUAL_VOXELS, Agreement
from measure import ONE_THREAD, Row, parser, percent, python, save_result, seconds

from medseg.exchange import load_model
from medseg.infer import Predictor, choose_runtime
from medseg.io import list_cases, read, read_image
from medseg.nets import build_network
from medseg.plan.schema import Architecture

# The bar of the project: so many times nnU-Net's throughput.
TIMES = 1.8
LABELS = 5
PATCH = (128, 128, 128)
QUICK_PATCH = (64, 64, 64)
# nnU-Net's default 3D network for large images: what its planner makes for a patch of 128 x 128 x 128.
ARCHITECTURE = Architecture(
    network="unet",
    features_per_stage=(32, 64, 128, 256, 320, 320),
    kernel_sizes=((3, 3, 3),) * 6,
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
    blocks_per_stage=(2,) * 6,
    decoder_convs_per_stage=(2,) * 5,
)
RUNTIMES = (("openvino", "fp32"), ("torch", "fp32"), ("openvino", "bf16"), ("torch", "bf16"))

# Runs in the peers' environment: a line in, one tile, a line out.
PEER = """
import sys, time
import numpy as np, torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
folder, labels = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
network = PlainConvUNet(
    1, 6, (32, 64, 128, 256, 320, 320), torch.nn.Conv3d, ((3, 3, 3),) * 6, (1, 2, 2, 2, 2, 2), (2,) * 6,
    labels, (2,) * 5, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
    norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=torch.nn.LeakyReLU,
    nonlin_kwargs={"inplace": True}, deep_supervision=False)
weights = {name: torch.from_numpy(value) for name, value in np.load(folder + "/weights.npz").items()}
found = network.load_state_dict(weights, strict=False)
assert not found.unexpected_keys, found.unexpected_keys
network.eval()
tile = torch.from_numpy(np.load(folder + "/tile.npy"))
print("ready", flush=True)
for _ in sys.stdin:
    with torch.inference_mode():
        start = time.process_time()
        logits = network(tile)
        took = time.process_time() - start
    np.save(folder + "/labels.npy", logits.argmax(1).numpy())
    print(took, flush=True)
"""


class Peer:
    """nnU-Net's network in a process of its own that waits between tiles."""

    def __init__(self, interpreter: Path, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [python(interpreter), "-c", PEER, str(folder), str(LABELS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
        )
        assert self._line() == "ready"

    def tile(self) -> tuple[float, np.ndarray]:
        """Return the CPU seconds of one tile and its labels."""
        assert self.process.stdin is not None
        self.process.stdin.write("tile\n")
        self.process.stdin.flush()
        return float(self._line()), np.load(self.folder / "labels.npy")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peers' process ended; see its error above.")
        return line.strip()


def main() -> None:
    """Measure tiles, then labels."""
    options = parser(__doc__ or "").parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        tiles = measure_tiles(options, Path(name), rounds)
    goldens = measure_labels(options)
    save_result(options, rows_of(tiles, goldens), {"tiles": tiles, "trained_models": goldens})


def measure_tiles(options: argparse.Namespace, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Run one tile in each program, in turns; the first round also allocates and is not counted."""
    network, tile = make_network(), make_tile(QUICK_PATCH if options.quick else PATCH)
    np.savez(folder / "weights.npz", **{name: v.numpy() for name, v in network.state_dict().items()})
    np.save(folder / "tile.npy", tile.numpy())
    peer = Peer(options.peers, folder) if options.peers else None
    calls: dict[str, Callable[[], tuple[float, np.ndarray]]] = {"nnunet": peer.tile} if peer else {}
    for backend, precision in RUNTIMES:
        ready = choose_runtime("cpu", precision, backend).prepare(network, tile.shape[2:], 1, threads=1)
        calls[f"{backend} {precision}"] = lambda ready=ready: timed(ready, tile)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    labels: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            spent, labels[name] = call()
            print(f"  {name:<14}{spent:7.2f} CPU-s a tile{'' if number else ' (not counted)'}", flush=True)
            taken[name] += [spent] if number else []
    if peer:
        peer.close()
    reference = labels.get("nnunet", labels["torch fp32"])
    return {
        name: {
            "cpu_seconds": float(np.median(values)),
            "runs": [round(value, 3) for value in values],
            "times_nnunet": float(np.median(np.divide(taken["nnunet"], values))) if peer else None,
            "equal_labels_random_weights": float((labels[name] == reference).mean()),
        }
        for name, values in taken.items()
    }


def make_network() -> torch.nn.Module:
    """Return the network with random weights, its head such that no class wins everywhere."""
    torch.manual_seed(0)
    network = build_network(ARCHITECTURE, 1, LABELS).eval()
    with torch.no_grad():
        head = network.get_parameter("decoder.seg_layers.4.weight")
        head -= head.mean(dim=1, keepdim=True)
    return network


def make_tile(patch: tuple[int, ...]) -> torch.Tensor:
    """Return noise, smooth and rough."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, 1, *(size // 8 for size in patch), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=patch, mode="trilinear")
    return smooth + 0.3 * torch.randn(1, 1, *patch, generator=generator)


def timed(call: Callable[[torch.Tensor], torch.Tensor], tile: torch.Tensor) -> tuple[float, np.ndarray]:
    """Return the CPU seconds of one tile and its labels."""
    with torch.inference_mode():
        start = time.process_time()
        logits = call(tile)
        spent = time.process_time() - start
    return spent, logits.argmax(1).numpy()


def measure_labels(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Predict the cases of trained models in every runtime; return how labels agree with nnU-Net's own."""
    folder = options.data.parent / "golden" / "inference" if options.data else Path("none")
    models = [path.parent for path in sorted(folder.glob("*/model")) if (path.parent / "imagesTs").is_dir()]
    models = [path for path in models if not (path / "model_lowres").is_dir()]
    found: dict[str, dict[str, Any]] = {}
    for backend, precision in RUNTIMES if models else ():
        every = Agreement()
        for model in models[:1] if options.quick else models:
            predictor = Predictor(
                load_model(model / "model"), runtime=backend, precision=precision, mirror=False, threads=1
            )
            for case in list_cases(model / "imagesTs", len(predictor.bundle.plan.channels)):
                theirs = read(model / "pred_nomirror" / f"{case.name}.nii.gz").array
                every.add(predictor.segment(read_image(case)).volume.array, theirs)
        found[f"{backend} {precision}"] = every.to_dict()
    return found


def rows_of(tiles: dict[str, dict[str, Any]], goldens: dict[str, dict[str, Any]]) -> list[Row]:
    """Say how fast each runtime is and what it does to labels; the bar is for the fastest exact one."""
    theirs = tiles.get("nnunet")
    exact = [name for name in tiles if name.endswith("fp32")]
    best = min(exact, key=lambda name: tiles[name]["cpu_seconds"])
    rows = []
    for name in (each for each in tiles if each != "nnunet"):
        tile, golden = tiles[name], goldens.get(name)
        equal = golden["equal_voxels_worst_case"] if golden else tile["equal_labels_random_weights"]
        ours = f"{seconds(tile['cpu_seconds'])}; labels {percent(equal)}"
        ours += f", Dice {np.floor(golden['dice_smallest'] * 1e4) / 1e4:.4f}" if golden else ""
        bar, met = "", None
        if theirs is not None:
            ours = f"{tile['times_nnunet']:.2f}x: {ours}"
            if name == best:
                bar = f"≥ {TIMES}x, labels ≥ {100 * EQUAL_VOXELS:g} %"
                met = tile["times_nnunet"] >= TIMES and equal >= EQUAL_VOXELS
        what = f"network, a tile of the default 3D plan, {name}; labels of trained models, worst case"
        rows.append(Row(what, seconds(theirs["cpu_seconds"]) if theirs else "-", ours, bar, met))
    return rows


if __name__ == "__main__":
    main()
