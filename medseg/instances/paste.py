"""Masks of boxes drawn into one label map."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.instances.dropped import Dropped
from medseg.nets.roi_align import roi_align
from medseg.types import IntArray, Shape


@dataclass(frozen=True, eq=False)
class Pasted:
    """Objects in a label map.

    Attributes
    ----------
    labels : (*shape) int32, 0 is background; object k has the value k + 1
    order : (k,) int64
        Which of the masks given is object k: best first, without what is hidden.
    dropped : several Dropped
        Objects of which no voxel is left.
    """

    labels: IntArray
    order: IntArray
    dropped: tuple[Dropped, ...]


def paste_masks(boxes: Tensor, masks: Tensor, scores: Tensor, shape: Shape, threshold: float = 0.5) -> Pasted:
    """Draw masks into one label map, worst first, so that a better object hides a worse one.

    Parameters
    ----------
    boxes : (k, 2d) in voxels of the label map, edge coordinates
    masks : (k, *cells) probabilities of the cells of each box
    scores : (k,); of equal ones the first counts as the better
    shape : of the label map
    threshold : a voxel is object where the mask, interpolated at its centre, is at least this

    Notes
    -----
    Outside of its box a mask falls to 0 within a cell. One box's window is all that is ever held besides
    the label map.
    """
    ranked = torch.argsort(scores.cpu(), descending=True, stable=True).tolist()
    labels = np.zeros(shape, np.int32)
    drawn = np.zeros(len(ranked), np.int64)
    for rank in reversed(range(len(ranked))):
        window, inside = mask_window(boxes[ranked[rank]], masks[ranked[rank]], shape, threshold)
        part = labels[window]
        drawn[rank] = np.count_nonzero(inside)
        part[inside] = rank + 1
    left = np.bincount(labels.ravel(), minlength=len(ranked) + 1)[1:]
    new = np.zeros(len(ranked) + 1, np.int32)
    kept = np.flatnonzero(left)
    new[kept + 1] = np.arange(1, len(kept) + 1)
    order = np.array(ranked, np.int64)[kept]
    return Pasted(new[labels], order, _dropped(left, drawn))


def _dropped(left: IntArray, drawn: IntArray) -> tuple[Dropped, ...]:
    hidden, empty = (left == 0) & (drawn > 0), drawn == 0
    rules = (("hidden by objects of higher score", hidden), ("mask without a voxel", empty))
    return tuple(
        Dropped(rule, int(np.count_nonzero(which)), int(drawn[which].sum()))
        for rule, which in rules
        if which.any()
    )


def mask_window(
    box: Tensor, mask: Tensor, shape: Shape, threshold: float = 0.5
) -> tuple[tuple[slice, ...], IntArray]:
    """Return where one object lies in an image of `shape`, and which voxels of that window it has.

    Parameters
    ----------
    box : (2d,)
    mask : (*cells) probabilities
    """
    n = mask.ndim
    low, high = box.double().cpu().chunk(2)
    cells = torch.tensor(mask.shape, dtype=torch.float64)
    cell = ((high - low) / cells).clamp(min=1e-9)
    start = torch.floor(low - cell / 2).clamp(min=0)
    stop = torch.minimum(torch.ceil(high + cell / 2), torch.tensor(shape, dtype=torch.float64))
    sizes = (stop - start).clamp(min=0)
    window = tuple(slice(int(a), int(a + s)) for a, s in zip(start.tolist(), sizes.tolist(), strict=True))
    if (sizes == 0).any():
        return window, np.zeros([int(s) for s in sizes], np.int64).astype(bool)
    padded = F.pad(mask.float().cpu(), [1] * (2 * n))[None]
    places = torch.cat(((start - low) / cell + 1, (start + sizes - low) / cell + 1))
    read = roi_align(padded, places[None].float(), (1.0,) * n, tuple(int(s) for s in sizes), samples=1)
    return window, (read[0, 0] >= threshold).numpy()
