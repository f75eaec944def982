"""One program from a mask to objects, their table and their score; run by ``split_vs_skimage.py``::

    python tests/benchmarks/instances/split_case.py medseg|scikit-image|retune FOLDER

FOLDER holds ``mask.npy`` and ``truth.npy``; the program leaves ``PROGRAM.json``: CPU seconds of each stage,
and how good the objects are. What scikit-image's pipeline finds is scored by medseg, which is quicker.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of medseg, scipy and scikit-image only what is needed is imported, by the functions below.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

# What peak_local_max wants, in voxels; it happens to fit this phantom.
PEAK_DISTANCE = 5


class Stages(dict[str, float]):
    """CPU seconds by stage."""

    def run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function, and add what it took to a stage."""
        start = time.process_time()
        result = function(*arguments)
        self[name] = self.get(name, 0.0) + time.process_time() - start
        return result


def main() -> None:
    """Run one program; write what it took and found."""
    program, folder = sys.argv[1], Path(sys.argv[2])
    mask = np.load(folder / "mask.npy")
    stages = Stages()
    result = PROGRAMS[program](mask, folder, stages)
    stages["start, reading"] = time.process_time() - sum(stages.values())
    (folder / f"{program}.json").write_text(json.dumps({"stages": stages, **result}))


def medseg(mask: Any, folder: Path, stages: Stages) -> dict[str, Any]:
    """Split, measure and score with medseg."""
    from medseg.instances.schema import instances_of
    from medseg.instances.split import split
    from medseg.instances.table import BASIC, measure_objects
    from medseg.volume import Geometry, Volume

    labels = stages.run("split", split, mask, (1.0, 1.0, 1.0)).labels

    def measured() -> int:
        volume = Volume(labels, Geometry(labels.shape, np.eye(4)))
        return len(measure_objects(instances_of(volume), config=BASIC))

    rows = stages.run("table", measured)
    return {"rows": rows, **stages.run("evaluation", score, labels, folder)}


def scikit_image(mask: Any, folder: Path, stages: Stages) -> dict[str, Any]:
    """Do the same as scikit-image's own example: distances of scipy, peaks, watershed, table."""
    from scipy.ndimage import distance_transform_edt
    from skimage.feature import peak_local_max
    from skimage.measure import regionprops_table
    from skimage.segmentation import watershed

    def flooded(distances: Any) -> Any:
        found = stages.run("peaks", peak_local_max, distances, PEAK_DISTANCE)
        markers = np.zeros(mask.shape, dtype=np.int32)
        markers[tuple(found.T)] = np.arange(1, len(found) + 1)
        return stages.run("watershed", watershed, -distances, markers, 1, None, mask)

    labels = flooded(stages.run("distances", distance_transform_edt, mask))
    properties = ("label", "area", "bbox", "centroid", "axis_major_length", "axis_minor_length")
    table = stages.run("table", regionprops_table, labels, None, properties)
    return {"rows": len(table["label"]), **stages.run("evaluation", score, labels, folder)}


def retune(mask: Any, folder: Path, stages: Stages) -> dict[str, Any]:
    """Split, and then with other depths: the first label map also pays for fresh memory."""
    from medseg.instances.basins import find_basins
    from medseg.instances.distance import distance_map
    from medseg.instances.split import DEFAULT_DEPTH

    distances = stages.run("distances", distance_map, mask, (1.0, 1.0, 1.0))
    basins = stages.run("basins", find_basins, distances)
    stages.run("first labels", basins.labels, DEFAULT_DEPTH)
    counts = {f"{h:g}": int(stages.run(f"h {h:g}", basins.labels, h).max()) for h in (0.0, 0.5, 1.0, 2.0)}
    return {"basins": len(basins.hierarchy.roots), "objects_by_h": counts}


def score(labels: Any, folder: Path) -> dict[str, float]:
    """Return F1 and PQ at IoU above a half, from the table of overlaps."""
    from medseg.metrics.overlap_table import overlap_table

    table = overlap_table(np.load(folder / "truth.npy"), labels)
    matched = table.iou[table.iou > 0.5]
    both = table.n_ref + table.n_pred
    return {
        "objects": table.n_pred,
        "f1": 2 * len(matched) / both,
        "pq": 2 * float(matched.sum()) / both,
    }


PROGRAMS = {"medseg": medseg, "scikit-image": scikit_image, "retune": retune}

if __name__ == "__main__":
    main()
