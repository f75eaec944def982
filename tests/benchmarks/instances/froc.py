"""FROC of a 3D Mask R-CNN on phantom lesions that were neither trained on nor validated with.

python datasets/phantom/convert.py LESIONS --only lesion --cases 60 --test-cases 40
medseg train LESIONS --task detection --recipe configs/train/detection-phantom.yaml -o RUN
python -m tests.benchmarks.instances.froc LESIONS RUN [--json FILE]

Scans are those of imagesTs. Detections of whatever score are ranked; a lesion is found by a mask that
overlaps it by IoU 0.1 (nnDetection's rule for small lesions), by IoU 0.5, or by a box whose centre is in it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import load_bundle
from medseg.geometry.boxes import label_boxes
from medseg.instances.detect import Detector
from medseg.io import open_dataset, read
from medseg.metrics.froc import RATES, Scan, froc, hits_by_centre, hits_by_iou
from medseg.metrics.overlap_table import overlap_table
from medseg.plan.objects import number_objects

RULES = ("IoU 0.1", "IoU 0.5", "centre inside")


def measure(dataset: Path, run: Path) -> dict[str, Any]:
    """Return sensitivities by rule and rate, and a line a scan."""
    opened, detector = open_dataset(dataset), Detector(load_bundle(run), device="cpu")
    scans: dict[str, list[Scan]] = {rule: [] for rule in RULES}
    lines = []
    for case in opened.test:
        image = read(case.images[0])
        truth = read(dataset / "labelsTs" / f"{case.name}.nii.gz").array[0]
        reference = number_objects(truth, opened.labels, "components")
        found = detector.find(image, score=0.0)
        table = overlap_table(reference, found.volume.array[0])
        scores = found.scores[table.predictions - 1]
        n = reference.ndim
        boxes = label_boxes(found.volume.array[0])[1]
        hits = {
            "IoU 0.1": hits_by_iou(table, 0.1),
            "IoU 0.5": hits_by_iou(table, 0.5),
            "centre inside": hits_by_centre(reference, table.references, (boxes[:, :n] + boxes[:, n:]) / 2),
        }
        for rule in RULES:
            scans[rule].append(Scan(table.n_ref, scores, hits[rule]))
        best = np.zeros(table.n_ref)
        np.maximum.at(best, hits["IoU 0.1"][:, 0], scores[hits["IoU 0.1"][:, 1]])
        false = np.delete(scores, hits["IoU 0.1"][:, 1])
        line = {
            "name": case.name,
            "voxels": table.reference_voxels.tolist(),
            "found at score": [round(float(score), 3) for score in best],
            "false above 0.1": sorted((round(float(s), 3) for s in false if s >= 0.1), reverse=True),
        }
        lines.append(line)
        print(json.dumps(line), flush=True)
    curves = {rule: froc(scans[rule]) for rule in RULES}
    return {
        "scans": len(lines),
        "lesions": curves[RULES[0]].n_ref,
        "sensitivity": {
            rule: {f"{rate:g} FP a scan": round(curve.sensitivity_at(rate), 4) for rate in RATES}
            for rule, curve in curves.items()
        },
        "cpm": {rule: round(curve.cpm, 4) for rule, curve in curves.items()},
        "cases": lines,
    }


def dump(result: dict[str, Any]) -> str:
    """Return JSON with a line a case."""
    cases = ",\n  ".join(json.dumps(case) for case in result["cases"])
    facts = json.dumps({name: value for name, value in result.items() if name != "cases"}, indent=1)
    return f'{facts[:-2]},\n "cases": [\n  {cases}\n ]\n}}\n'


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = measure(given.dataset, given.run)
    print(json.dumps({name: value for name, value in result.items() if name != "cases"}, indent=1))
    if given.json:
        given.json.write_text(dump(result))


if __name__ == "__main__":
    main()
