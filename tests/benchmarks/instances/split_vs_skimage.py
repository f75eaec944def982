"""From a mask with 4,913 touching ellipsoids to objects, table and score, beside scikit-image's pipeline.

Both start from one file with the mask, use one thread, and end with a table and F1 against the truth::

    python tests/benchmarks/instances/split_vs_skimage.py --out RESULT.json

The peer is what scikit-image's documentation shows: scipy's distance transform, ``peak_local_max``,
``watershed``, ``regionprops_table``. Compiling, which numba does once a machine, is not measured.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from medseg.instances.components import label_components
from tests.benchmarks.measure import (
    ONE_THREAD,
    Cost,
    Row,
    alternate,
    measure,
    medians,
    parser,
    percent,
    rounded,
    runs,
    save_result,
    seconds,
    took,
)
from tests.ellipsoids import touching_ellipsoids

CASE = Path(__file__).with_name("split_case.py")
# The project's bars on 512 x 512 x 512 voxels.
CPU_SECONDS, MEMORY_GB, F1 = 16.0, 2.0, 0.999
QUALITY = 0.002
THREADS = {**ONE_THREAD, "NUMBA_NUM_THREADS": "1"}


def main() -> None:
    """Measure every row."""
    options_of = parser(__doc__ or "", peers=False)
    options_of.add_argument("--size", type=int, default=512, help="voxels a side; the bars are for 512")
    options = options_of.parse_args()
    size = 120 if options.quick else options.size
    per_axis = int(size * 17 / 512 + 0.5)
    with tempfile.TemporaryDirectory(prefix="medseg-bench-") as name:
        folder = Path(name)
        make_phantom(folder / "small", 2, 60)
        measure(command("medseg", folder / "small"), THREADS)  # so that everything is compiled
        truth = make_phantom(folder / "whole", per_axis, size)
        programs = ("medseg", "scikit-image")
        costs = alternate(
            {program: command(program, folder / "whole") for program in programs},
            options.rounds or 1,
            THREADS,
        )
        measure(command("retune", folder / "whole"), THREADS)
        found = {
            program: json.loads((folder / "whole" / f"{program}.json").read_text())
            for program in (*programs, "retune")
        }
    middle = {program: medians(cost) for program, cost in costs.items()}
    evidence = {
        "phantom": {
            "objects": per_axis**3,
            "size": size,
            "foreground": round(float((truth > 0).mean()), 4),
            "components": {kind: int(label_components(truth > 0, kind).max()) for kind in (6, 26)},
        },
        "median": {program: rounded(asdict(cost)) for program, cost in middle.items()},
        "found": found,
        "ratio": {
            "cpu": round(middle["scikit-image"].cpu_seconds / middle["medseg"].cpu_seconds, 2),
            "memory": round(middle["scikit-image"].peak_pss_mb / middle["medseg"].peak_pss_mb, 2),
        },
        "runs": runs(costs),
    }
    save_result(options, rows_of(middle, found, per_axis**3), evidence)


def command(program: str, folder: Path) -> list[str]:
    """Return the words that run one program on the files of a folder."""
    return [sys.executable, str(CASE), program, str(folder)]


def make_phantom(folder: Path, per_axis: int, size: int) -> Any:
    """Write a phantom's mask and truth; return the truth."""
    folder.mkdir()
    truth = touching_ellipsoids(per_axis, size)
    np.save(folder / "truth.npy", truth)
    np.save(folder / "mask.npy", truth > 0)
    return truth


def rows_of(costs: dict[str, Cost], found: dict[str, Any], count: int) -> list[Row]:
    """Say what each took and found."""
    peer, ours = costs["scikit-image"], costs["medseg"]
    theirs, mine = found["scikit-image"], found["medseg"]
    again = max(value for name, value in found["retune"]["stages"].items() if name.startswith("h "))
    whole = count == 17**3  # smaller ones only inform
    cheap = ours.cpu_seconds <= CPU_SECONDS and ours.peak_pss_mb <= MEMORY_GB * 1024
    return [
        Row(
            f"{count:,} touching ellipsoids: mask to objects, table, score",
            took(peer),
            took(ours),
            f"≤ {CPU_SECONDS:g} s and {MEMORY_GB:g} GB" if whole else "",
            cheap if whole else None,
        ),
        Row("  F1 at IoU 0.5", percent(theirs["f1"]), percent(mine["f1"]), f"≥ {F1}", mine["f1"] >= F1),
        Row(
            "  PQ",
            f"{theirs['pq']:.4f}",
            f"{mine['pq']:.4f}",
            f"within {QUALITY} of the peer's",
            mine["pq"] >= theirs["pq"] - QUALITY,
        ),
        Row("  another depth h", "all again", seconds(again), "< 1 s", again < 1),
    ]


if __name__ == "__main__":
    main()
