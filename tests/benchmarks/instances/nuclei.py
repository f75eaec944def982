"""TP / (TP + FP + FN) of ``nuclei2d`` and ``nuclei3d`` on held-out and never-seen images, beside Otsu.

python -m tests.benchmarks.instances.nuclei 2d|3d DATA [--model BUNDLE] [--diameter true] [--instanseg]
    [--refine NETWORK [--margin M]] [--weights NAME=FILE] [--most-pixels N] [--first N] [--json FILE]

DATA is the folder with nuclei2d_dsb2018, nuclei3d_ovules and nuclei3d_stardist. Of the first, the images that
the recipe holds out are measured, by kind: fluorescence (bright nuclei), dark (on bright ground), colour.

``--instanseg`` measures InstanSeg's nets too (2D): that of fluorescence on bright nuclei, else that of
brightfield. The images do not tell their scale, so once a pixel is taken for the net's own 0.5 micrometres,
and once the size of nuclei is the one that ``nuclei2d`` estimates or is told. Its authors list Data Science
Bowl 2018 among their sources (``create_bioimageio_model.py``): its nets may have seen these images.

``--refine`` measures the objects of the model and of Otsu again, each drawn anew by a promptable network.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from medseg.cli.prompt_words import read_weights
from medseg.instances.finders import REFINERS
from medseg.instances.instanseg import USUAL_UM, InstanSeg, load_instanseg
from medseg.instances.models import ObjectModel, load_object_model
from medseg.instances.refine import RefineConfig, Refiner
from medseg.io import open_dataset
from medseg.io.grids import FLAT_FACTOR
from medseg.train.centre import OBJECTS, hold_out, open_objects
from medseg.train.centre_config import CentreConfig
from medseg.train.centre_measure import count_matches
from medseg.train.centre_samples import median_diameter
from medseg.volume import Geometry, Volume

RECIPE = Path(__file__).parents[3] / "configs" / "instances" / "nuclei2d.yaml"
Row = tuple[str, str, Any, Any, tuple[float, ...]]  # kind, name, image (channel, ...), labels, spacing


def cases_2d(data: Path) -> list[Row]:
    """Return the held-out images of the recipe."""
    training = open_dataset(data / "nuclei2d_dsb2018", OBJECTS).training
    _, held = hold_out(training, CentreConfig.load(RECIPE))
    rows = []
    for case in held:
        image, labels, spacing = open_objects(case)
        grey = image.mean(axis=0)
        bright = grey[labels > 0].mean() > grey[labels == 0].mean()
        kind = (
            "colour"
            if len(image) > 1 and (image[0] != image[1]).any()
            else "fluorescence"
            if bright
            else "dark"
        )
        rows.append((kind, case.name, image, labels, spacing))
    return rows


def cases_3d(data: Path) -> list[Row]:
    """Return all volumes; none was trained on."""
    rows = []
    for case in open_dataset(data / "nuclei3d_ovules", OBJECTS).training:
        image, labels, spacing = open_objects(case)
        rows.append(("ovules", case.name, image, labels, spacing))
    folder = data / "nuclei3d_stardist"
    image, labels = (tifffile.imread(folder / name) for name in ("img3d.tif", "mask3d.tif"))
    rows.append(("stardist", "img3d", image[None], labels, (1.0, 1.0, 1.0)))
    return rows


def otsu_and_splitting(image: Any, spacing: tuple[float, ...], footprint: int = 5) -> Any:
    """Return Otsu's foreground, split by a watershed from peaks of its distance map, untuned."""
    grey = ndimage.gaussian_filter(image.mean(axis=0).astype(np.float32), 1.0)
    inside = grey > threshold_otsu(grey)
    depth = ndimage.distance_transform_edt(inside, sampling=np.asarray(spacing) / min(spacing))
    peaks = peak_local_max(depth, min_distance=footprint, labels=inside.astype(int), exclude_border=False)
    seeds = np.zeros(inside.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-depth, seeds, mask=inside)


def ask_instanseg(nets: dict[str, InstanSeg], kind: str, image: Any, diameter: float) -> dict[str, Any]:
    """Return the label maps of InstanSeg at both scales."""
    net = nets["instanseg-fluorescence" if kind == "fluorescence" else "instanseg-brightfield"]
    scales = {"instanseg at 0.5 um": net.pixel_um, "instanseg sized": USUAL_UM / diameter}
    return {name: net.segment(image, (pixel, pixel)).labels for name, pixel in scales.items()}


def draw_anew(refiner: Refiner, results: dict[str, Any], image: Any) -> dict[str, Any]:
    """Return the label maps with each object drawn anew."""
    flat = image.ndim == 3
    shown = image[..., None] if flat else image
    affine = np.diag([1.0, 1.0, FLAT_FACTOR if flat else 1.0, 1.0])
    volume = Volume(np.ascontiguousarray(shown), Geometry(shown.shape[1:], affine))
    return {
        f"{method}, {refiner.name}": refiner.refine(volume, np.asarray(labels, np.int32)).labels
        for method, labels in results.items()
    }


def measure(
    rows: list[Row],
    model: ObjectModel,
    knows_diameter: bool,
    nets: dict[str, InstanSeg],
    refiners: list[Refiner],
) -> dict[str, Any]:
    """Return counts by method and kind, and a line a case."""
    pooled: dict[str, Any] = defaultdict(lambda: {t: np.zeros(3, int) for t in (0.5, 0.7)})
    lines = []
    for kind, name, image, labels, spacing in rows:
        diameter = median_diameter(labels, spacing) if knows_diameter else None
        found = model.segment(image, spacing, diameter=diameter, channel_axis=0)
        size = found.diameter or 1.0
        line: dict[str, Any] = {"kind": kind, "name": name, "diameter": round(size, 3)}
        line["true diameter"] = round(median_diameter(labels, spacing), 3)
        results = {"model": found.labels, "otsu": otsu_and_splitting(image, spacing)}
        drawn = [draw_anew(refiner, results, image) for refiner in refiners]
        results |= ask_instanseg(nets, kind, image, size) if nets else {}
        results |= {name: labels for each in drawn for name, labels in each.items()}
        for method, result in results.items():
            counts = count_matches(labels, result)
            line[method] = {str(t): [int(c) for c in counts[t]] for t in counts}
            for t in counts:
                pooled[f"{method} {kind}"][t] += counts[t]
        lines.append(line)
        print(json.dumps(line), flush=True)
    accuracy = {
        key: {str(t): round(float(c[0] / max(1, c.sum())), 4) for t, c in each.items()}
        for key, each in pooled.items()
    }
    return {"accuracy": accuracy, "cases": lines}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["2d", "3d"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--diameter", choices=["true"], help="tell the model the true size of objects")
    parser.add_argument("--instanseg", action="store_true", help="measure InstanSeg's nets too (2d)")
    parser.add_argument("--refine", action="append", default=[], choices=REFINERS)
    parser.add_argument("--margin", type=float, default=0.0, help="of the box that is shown to --refine")
    parser.add_argument("--weights", action="append", default=[], help="NAME=FILE, in place of a download")
    parser.add_argument("--first", type=int, help="only so many images")
    parser.add_argument("--most-pixels", type=int, default=1 << 62, help="leave out larger images")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = cases_2d(given.data) if given.kind == "2d" else cases_3d(given.data)
    rows = [row for row in rows if row[3].size <= given.most_pixels][: given.first]
    config = RefineConfig(margin=given.margin)
    refiners = [Refiner(name, read_weights(given.weights), 1, config) for name in given.refine]
    names = ("instanseg-fluorescence", "instanseg-brightfield") if given.instanseg else ()
    nets = {name: load_instanseg(name, threads=1) for name in names}
    model = load_object_model(given.model or f"nuclei{given.kind}", threads=1)
    result = measure(rows, model, given.diameter == "true", nets, refiners)
    print(json.dumps(result["accuracy"], indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
