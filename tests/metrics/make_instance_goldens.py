"""Write the numbers of other packages on the maps of ``object_maps``, so that tests need none of them.

One peer a run, because their pins clash; torch comes from the constraints of this project::

    pip install -c constraints.txt --no-deps stardist csbdeep numba cellpose torchmetrics pycocotools ...
    python -m tests.metrics.make_instance_goldens stardist cellpose torchmetrics coco ctc
    python -m tests.metrics.make_instance_goldens torchmetrics-panoptic
    pip install panoptica   # in an environment of its own
    python -m tests.metrics.make_instance_goldens panoptica
    pip download --no-deps --no-binary stardist --no-build-isolation stardist==0.9.2
    python -m tests.metrics.make_instance_goldens stardist-sample stardist-0.9.2.tar.gz
"""

import importlib.metadata
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from tests.metrics.object_maps import Maps, cases, digest, panoptic_classes, panoptic_images, scores_of

GOLDEN = Path(__file__).parent / "golden"
TAUS = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def stardist(maps: dict[str, Maps]) -> dict[str, Any]:
    """Every number of ``matching``, and the pooled ones of ``matching_dataset``."""
    from stardist.matching import matching, matching_dataset

    kept = ["thresh", "tp", "fp", "fn", "accuracy", "f1", "precision", "recall"]
    kept += ["mean_true_score", "mean_matched_score", "panoptic_quality"]
    images = {
        name: [{key: float(getattr(m, key)) for key in kept} for m in matching(*pair, thresh=TAUS)]
        for name, pair in maps.items()
    }
    truth, guess = zip(*maps.values(), strict=True)
    pooled = matching_dataset(truth, guess, thresh=TAUS, show_progress=False)
    return {"images": images, "pooled": [{key: float(getattr(m, key)) for key in kept} for m in pooled]}


def cellpose(maps: dict[str, Maps]) -> dict[str, Any]:
    """Return ``average_precision`` of each image that has background (without, it counts one object less)."""
    from cellpose.metrics import average_precision

    taus = [tau for tau in TAUS if tau >= 0.5]
    images = {}
    for name, (truth, guess) in maps.items():
        if 0 in truth and 0 in guess and (truth.any() or guess.any()):
            ap, tp, fp, fn = average_precision(truth, guess, threshold=taus)
            images[name] = {
                k: np.float64(v).tolist() for k, v in {"ap": ap, "tp": tp, "fp": fp, "fn": fn}.items()
            }
    return {"taus": taus, "images": images}


def panoptica(maps: dict[str, Maps]) -> dict[str, Any]:
    """PQ, SQ and RQ of the naive matcher at IoU .5, in its strict form and in its default (>=)."""
    from panoptica import InputType, NaiveThresholdMatching, Panoptica_Evaluator, disable_citation_reminder

    disable_citation_reminder()
    images: dict[str, Any] = {}
    for strict in (True, False):
        evaluator = Panoptica_Evaluator(
            expected_input=InputType.UNMATCHED_INSTANCE,
            instance_matcher=NaiveThresholdMatching(matching_threshold=0.5, strict_threshold=strict),
        )
        for name, (truth, guess) in maps.items():
            if truth.any() and guess.any():
                result = evaluator.evaluate(guess.astype(np.uint32), truth.astype(np.uint32))["ungrouped"]
                entry = {k: float(getattr(result, k)) for k in ("tp", "fp", "fn", "pq", "sq", "rq")}
                images.setdefault(name, {})["strict" if strict else "inclusive"] = entry
    return {"images": images}


def torchmetrics(maps: dict[str, Maps]) -> dict[str, Any]:
    """PQ of each class, with the background as stuff and as void, and a third of the objects void."""
    import torch
    from torchmetrics.functional.detection import panoptic_quality

    images: dict[str, Any] = {}
    for ground in ("stuff", "void"):
        for name, pair in maps.items():
            coloured = [np.stack([panoptic_classes(m, ground), m], -1)[None] for m in pair]
            truth, guess = (torch.from_numpy(c.astype(np.int64)) for c in coloured)
            keys = {"things": {1, 2}, "stuffs": {3}, "allow_unknown_preds_category": True}
            classes = panoptic_quality(guess, truth, **keys, return_sq_and_rq=True, return_per_class=True)
            overall = panoptic_quality(guess, truth, **keys, return_sq_and_rq=True)
            entry = {"classes": classes.squeeze(0).tolist(), "overall": overall.tolist()}
            images.setdefault(name, {})[ground] = entry
    return {"images": images}


def torchmetrics_panoptic(maps: dict[str, Maps]) -> dict[str, Any]:
    """PQ, SQ and RQ of panoptic maps over several images, the background as a class or as void."""
    import torch
    from torchmetrics.detection import PanopticQuality

    sets: dict[str, Any] = {}
    for name, images in panoptic_images().items():
        for ground, stuff in (("class", {0, 1, 2}), ("void", {1, 2})):
            keys = {"things": {3, 4}, "stuffs": stuff, "allow_unknown_preds_category": True}
            metrics = [
                PanopticQuality(**keys, return_sq_and_rq=True, return_per_class=each)
                for each in (True, False)
            ]
            for reference, prediction in images:
                truth, guess = (
                    torch.from_numpy(np.stack(side, -1)[None].astype(np.int64))
                    for side in (reference, prediction)
                )
                for metric in metrics:
                    metric.update(guess, truth)
            classes, overall = (metric.compute().squeeze(0).tolist() for metric in metrics)
            sets.setdefault(name, {})[ground] = {"classes": classes, "overall": overall}
        sets[name]["digests"] = [digest((*reference, *prediction)) for reference, prediction in images]
    return {"sets": sets}


def ctc(maps: dict[str, Maps]) -> dict[str, Any]:
    """SEG and DET of each image that has a reference and background."""
    import tifffile
    from ctc_metrics.metrics import det, seg
    from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations, match

    images = {}
    for name, (truth, guess) in maps.items():
        if not (truth.any() and guess.any() and (truth == 0).any() and (guess == 0).any()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{side}.tif") for side in ("truth", "guess")]
            for path, side in zip(paths, (truth, guess), strict=True):
                tifffile.imwrite(path, side.astype(np.int32))
            found = [[part, part] for part in match(*paths)]  # it wants tracks: the image is two frames
        tracks = [np.array([[label, 0, 1, 0] for label in labels[0]]) for labels in found[:2]]
        operations = count_acyclic_graph_correction_operations(*tracks, *found[:4])
        images[name] = {"seg": float(seg(found[0], found[4])), "det": float(det(**operations))}
        images[name] |= {key.lower(): int(operations[key]) // 2 for key in ("NS", "FN", "FP")}
    return {"images": images}


def coco(maps: dict[str, Maps]) -> dict[str, Any]:
    """AP at each threshold over all 2D images, for boxes and masks, at 100 detections and at 1000."""
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    flat = [pair for pair in maps.values() if pair[0].ndim == 2]

    def annotations(k: int, labels: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        for label in np.unique(labels[labels > 0]):
            mask = labels == label
            code = masks.encode(np.asfortranarray(mask, np.uint8))
            y, x = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = [int(x[0]), int(y[0]), int(x[-1] - x[0]) + 1, int(y[-1] - y[0]) + 1]
            row = {"image_id": k, "category_id": int(label % 2), "segmentation": code, "bbox": box}
            rows.append(row | {"area": int(mask.sum()), "iscrowd": 0, "label": int(label)})
        return rows

    truth, guess = COCO(), []
    truth.dataset = {
        "images": [{"id": k, "height": a.shape[0], "width": a.shape[1]} for k, (a, _) in enumerate(flat)],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [row for k, (a, _) in enumerate(flat) for row in annotations(k, a)],
    }
    for k, row in enumerate(truth.dataset["annotations"]):
        row["id"] = k + 1
    truth.createIndex()
    for k, (_, b) in enumerate(flat):
        rows = annotations(k, b)
        for row, score in zip(rows, scores_of(b), strict=True):
            guess.append(
                {key: row[key] for key in ("image_id", "category_id")}
                | {"score": float(score)}
                | {"segmentation": row["segmentation"], "bbox": row["bbox"]}
            )
    results: dict[str, Any] = {}
    for kind in ("bbox", "segm"):
        rows = [
            {k: v for k, v in row.items() if k != ("bbox" if kind == "segm" else "segmentation")}
            for row in guess
        ]
        run = COCOeval(truth, truth.loadRes(rows), kind)
        run.params.maxDets = [1, 100, 1000]
        run.evaluate()
        run.accumulate()
        for place, most in ((1, 100), (2, 1000)):
            precision = run.eval["precision"][:, :, :, 0, place]  # thresholds, recalls, categories
            results[f"{kind}_{most}"] = precision.mean(axis=(1, 2)).tolist()
            results[f"{kind}_{most}_by_class"] = precision.mean(axis=(0, 1)).tolist()
            results[f"{kind}_{most}_recall"] = run.eval["recall"][:, :, 0, place].mean(axis=1).tolist()
    return {"taus": run.params.iouThrs.tolist(), **results}


def stardist_sample(archive: Path) -> dict[str, Any]:
    """The sample mask in StarDist's source archive against itself turned by two degrees, as in its README."""
    import tifffile
    from scipy.ndimage import rotate
    from stardist.matching import matching

    with tarfile.open(archive) as tar:
        name = next(n for n in tar.getnames() if n.endswith("data/images/mask2d.tif"))
        mask = tifffile.imread(BytesIO(tar.extractfile(name).read()))  # type: ignore[union-attr]
    turned = rotate(mask, 2, order=0, reshape=False)
    pairs, voxels = np.unique(np.stack([mask.ravel(), turned.ravel()]), axis=1, return_counts=True)
    counted = [[int(a), int(b), int(n)] for (a, b), n in zip(pairs.T, voxels, strict=True)]
    return {"file": name, **matching(mask, turned)._asdict(), "pairs": counted}


PEERS: dict[str, tuple[Callable[[dict[str, Maps]], dict[str, Any]], tuple[str, ...]]] = {
    "stardist": (stardist, ("stardist", "numpy", "scipy")),
    "cellpose": (cellpose, ("cellpose", "numpy", "scipy")),
    "panoptica": (panoptica, ("panoptica", "numpy")),
    "torchmetrics": (torchmetrics, ("torchmetrics", "torch", "numpy")),
    "torchmetrics-panoptic": (torchmetrics_panoptic, ("torchmetrics", "torch", "numpy")),
    "coco": (coco, ("pycocotools", "numpy")),
    "ctc": (ctc, ("py-ctcmetrics", "numpy")),
}


def main() -> None:
    """Write a file for each peer that is named."""
    if sys.argv[1] == "stardist-sample":
        write("stardist-sample", ("stardist", "scipy"), stardist_sample(Path(sys.argv[2])))
        return
    for peer in sys.argv[1:]:
        function, packages = PEERS[peer]
        if function is torchmetrics_panoptic:  # which has maps of its own
            write(peer, packages, function({}))
            continue
        maps = cases()
        digests = {name: digest(pair) for name, pair in maps.items()}
        write(peer, packages, {"digests": digests, **function(maps)})


def write(peer: str, packages: tuple[str, ...], content: dict[str, Any]) -> None:
    """Write a file, with the command and the versions that made it."""
    made = {
        "command": f"python -m tests.metrics.make_instance_goldens {peer}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    text = json.dumps(rounded(made | content), indent=1)
    text = re.sub(r"\n\s+(?=[\d\-\]]|null)", " ", text)  # numbers of a list on one line
    (GOLDEN / f"{peer}.json").write_text(text + "\n", "utf-8")


def rounded(value: Any) -> Any:
    """Shorten floats to nine digits: a thousandth of what the tests ask for."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else float(f"{value:.9g}")
    return int(value) if isinstance(value, np.integer) else value


if __name__ == "__main__":
    main()
