"""TP / (TP + FP + FN) of a Mask R-CNN on the held-out images of DSB2018, by kind of image.

medseg train DATA/nuclei2d_dsb2018 --task detection --recipe configs/train/detection-nuclei.yaml -o RUN
python -m tests.benchmarks.instances.detected_nuclei DATA RUN [--json FILE]

DATA is the folder with nuclei2d_dsb2018. Its images are those of tests.benchmarks.instances.nuclei: 60 that
the seed of configs/instances/nuclei2d.yaml draws. Neither training nor validation, which chooses the
least score, has seen them.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import load_bundle
from medseg.instances.detect import Detector
from medseg.train.centre_measure import count_matches
from medseg.volume import Geometry, Volume
from tests.benchmarks.instances.froc import dump
from tests.benchmarks.instances.nuclei import cases_2d

TAUS = (0.5, 0.7)


def measure(data: Path, run: Path) -> dict[str, Any]:
    """Return pooled accuracy by kind of image, and a line an image."""
    detector = Detector(load_bundle(run), device="cpu")
    pooled: dict[str, Any] = defaultdict(lambda: {tau: np.zeros(3, int) for tau in TAUS})
    lines = []
    for kind, name, image, labels, _ in cases_2d(data):
        pixels = image.transpose(0, 2, 1)[..., None]
        found = detector.find(Volume(pixels, Geometry(pixels.shape[1:], np.eye(4))))
        counts = count_matches(labels, found.volume.array[0, :, :, 0].T)
        for tau in TAUS:
            pooled[kind][tau] += counts[tau]
        line = {"kind": kind, "name": name, **{str(tau): [int(n) for n in counts[tau]] for tau in TAUS}}
        lines.append(line)
        print(json.dumps(line), flush=True)
    accuracy = {
        kind: {str(tau): round(float(counts[0] / max(1, counts.sum())), 4) for tau, counts in each.items()}
        for kind, each in pooled.items()
    }
    images = {kind: sum(line["kind"] == kind for line in lines) for kind in accuracy}
    chosen = {"score": detector.score, **dict(detector.bundle.card.get("find", {}))}
    return {"accuracy": accuracy, "images": images, "chosen in validation": chosen, "cases": lines}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = measure(given.data, given.run)
    print(json.dumps({name: value for name, value in result.items() if name != "cases"}, indent=1))
    if given.json:
        given.json.write_text(dump(result))


if __name__ == "__main__":
    main()
