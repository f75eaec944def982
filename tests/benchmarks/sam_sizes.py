"""Which input size of which SAM: Dice on single slices beside CPU-seconds, whole slices and zooms.

::

    python datasets/sts/convert.py ../shared/data/sts/STS_001 STS
    python tests/benchmarks/sam_sizes.py ../shared/data STS lite_medsam.pth mobile_sam.pt [--slices 3]

Soft-tissue sarcoma on CT and MR and a brain tumour, slices at even steps through the object. The prompts are
a box with sides moved by up to 5 %, that box and one corrective click in the middle of the largest error
(with the first answer's logits where the network understands masks), and a click in the middle alone. A zoom
is a square field of twice the box. Times are CPU-seconds of one thread.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from medseg.io import read
from medseg.nets.sam import Sam, load_sam
from medseg.prompt.scene import Rectangle, Scene
from medseg.prompt.segmenter import SliceMask, SlicePrompts, SliceSegmenter
from medseg.prompt.simulate import acquisition_axis, draw_box
from medseg.prompt.windows import choose_window
from medseg.types import BoolArray, FloatArray

SIZES = {"lite-medsam": (256,), "mobile-sam": (256, 384, 512, 768, 1024)}


@dataclass(frozen=True, eq=False)
class Slice:
    """One object on one slice."""

    scene: Scene
    axis: int
    index: int
    truth: BoolArray
    box: tuple[float, float, float, float]
    zoom: Rectangle


def slices(data: Path, sts: Path, count: int) -> Iterator[Slice]:
    """Yield `count` slices of each volume."""
    generator = np.random.default_rng(0)
    pairs = [
        (sts / "images" / f"{name}.nii.gz", sts / "labels" / f"{name}.nii.gz")
        for name in ("STS_001_CT", "STS_001_MR_T1")
    ]
    folder = data / "brain_tumour_mr"
    for image, label in [*pairs, (folder / "brain1_image.nrrd", folder / "brain1_label.nrrd")]:
        volume = read(image)
        scene = Scene.of(volume, choose_window(volume))
        mask = Scene.of(read(label), (0, 1)).array > 0
        axis = acquisition_axis(scene.spacing)
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        for part in np.linspace(0.2, 0.8, count):
            index = int(inside[int(part * (len(inside) - 1))])
            truth = _largest(mask.take(index, axis))
            box = draw_box(truth, 0.05, generator)
            yield Slice(scene, axis, index, truth, box, _around(box, truth.shape))


def measure(
    segmenter: SliceSegmenter, each: Slice, field: Rectangle | None, row: dict[str, list[float]]
) -> None:
    """Ask everything about one slice and append what came out to `row`."""
    start = time.process_time()
    segmenter.embed(each.axis, each.index, field)
    encoded = time.process_time()
    ask = SlicePrompts(box=each.box)
    first = segmenter.predict(each.axis, each.index, ask, field)
    row["encode CPU-s"].append(encoded - start)
    row["decode CPU-s"].append(time.process_time() - encoded)
    row["box"].append(dice(first, each.truth))
    point, positive = _error(first.mask(each.truth.shape), each.truth)
    fixed = replace(ask, points=point, positive=positive)
    if "mask" in segmenter.model.spec.understands:
        fixed = replace(fixed, mask=first.logits)
    again = segmenter.predict(each.axis, each.index, fixed, field)
    row["box, click"].append(dice(again, each.truth))
    middle = SlicePrompts(points=_deepest(each.truth), positive=np.array([True]))
    for name, multimask in (("click, 1 mask", False), ("click, best of 3", True)):
        answer = segmenter.predict(each.axis, each.index, middle, field, multimask=multimask)
        row[name].append(dice(answer, each.truth))


def dice(answer: SliceMask, truth: BoolArray) -> float:
    """Dice of the whole slice."""
    mask = answer.mask(truth.shape)
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def _largest(mask: BoolArray) -> BoolArray:
    labels, _ = ndimage.label(mask)
    return np.asarray(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))


def _deepest(mask: BoolArray) -> FloatArray:
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array([np.unravel_index(np.argmax(depth), mask.shape)], dtype=float)


def _error(mask: BoolArray, truth: BoolArray) -> tuple[FloatArray, BoolArray]:
    missed, extra = (_largest(part) if part.any() else part for part in (truth & ~mask, mask & ~truth))
    positive = missed.sum() >= extra.sum()
    return _deepest(missed if positive else extra), np.array([positive])


def _around(box: tuple[float, float, float, float], shape: tuple[int, ...]) -> Rectangle:
    side = max(32, int(2 * max(box[2] - box[0], box[3] - box[1])))
    first = [int((box[a] + box[a + 2]) / 2 - side / 2) for a in (0, 1)]
    first = [max(0, min(f, n - side)) for f, n in zip(first, shape, strict=True)]
    end = [min(f + side, n) for f, n in zip(first, shape, strict=True)]
    return (first[0], first[1], end[0], end[1])


def compare(sam: Sam, cases: list[Slice], table: dict[str, dict[str, float]]) -> None:
    """Measure a network at its sizes; rows go to `table` as they come."""
    for size in SIZES[sam.spec.name]:
        for view in ("whole", "zoom"):
            row: dict[str, list[float]] = defaultdict(list)
            for each in cases:
                segmenter = SliceSegmenter(sam, each.scene, size=size)
                measure(segmenter, each, None if view == "whole" else each.zoom, row)
            name = f"{sam.spec.name} {size} {view}"
            table[name] = {column: round(float(np.mean(values)), 3) for column, values in row.items()}
            print(f"{name:26}", *(f"{value:14.3f}" for value in table[name].values()), flush=True)


def halves(sam: Sam, cases: list[Slice]) -> None:
    """Compare masks of bf16 with those of fp32 on whole slices."""
    both: dict[str, list[BoolArray]] = {}
    for precision in ("fp32", "bf16"):
        both[precision] = [
            SliceSegmenter(sam, each.scene, precision=precision)  # type: ignore[arg-type]
            .predict(each.axis, each.index, SlicePrompts(box=each.box))
            .mask(each.truth.shape)
            for each in cases
        ]
    iou = [(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(both["fp32"], both["bf16"], strict=True)]
    scores = {
        name: np.mean(
            [2 * (m & c.truth).sum() / (m.sum() + c.truth.sum()) for m, c in zip(masks, cases, strict=True)]
        )
        for name, masks in both.items()
    }
    print(
        f"{sam.spec.name}: bf16 against fp32: IoU mean {np.mean(iou):.4f}, least {min(iou):.4f}; Dice", scores
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("sts", type=Path)
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(slices(options.data, options.sts, options.slices))
    table: dict[str, dict[str, float]] = {}
    for path in options.weights:
        sam = load_sam(path)
        compare(sam, cases, table)
        halves(sam, cases)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
