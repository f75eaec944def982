"""A slice as a promptable network wants to see it, and the way of prompts there and of masks back.

Each network gets what it was trained with, step for step:

========== ============================================ ===============================================
spec       resize                                       normalise, then pad at the bottom and right
========== ============================================ ===============================================
area       LiteMedSAM: longest side, OpenCV's area mean least to 0, most to 1; zeros (black)
longest    SAM, MobileSAM: longest side, Pillow's       colour mean and deviation of ImageNet; zeros
           bilinear with antialiasing                   (the mean colour)
squash     MedSAM: both sides, cubic spline after a     least to 0, most to 1; nothing to pad
           Gaussian (scikit-image's ``resize``)
========== ============================================ ===============================================

Grey values are cut to whole numbers first, as the reference scripts do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from medseg.nets.sam import SamSpec
from medseg.types import Array, FloatArray

# ImageNet's, on 0..255 (segment-anything, build_sam.py).
_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
_DEVIATION = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
# Logits that stand for "certainly not" (and, with the other sign, for "certainly"): logit(0.999), as
# micro-sam writes binary masks.
CERTAIN = 6.907


@dataclass(frozen=True)
class Frame:
    """How `shape` rows and columns lie in a square of `size` model pixels.

    Attributes
    ----------
    shape : (rows, columns) of the field
    new : (rows, columns) that they become; the rest of the square is padding
    size : side of the square
    whole : whether box corners are cut to whole model pixels, as LiteMedSAM's script does
    probabilities : whether masks are interpolated as probabilities, as MedSAM's script does
    """

    shape: tuple[int, int]
    new: tuple[int, int]
    size: int
    whole: bool = False
    probabilities: bool = False

    @classmethod
    def of(cls, spec: SamSpec, shape: tuple[int, int], size: int) -> "Frame":
        """Lay out a field of `shape` for a network."""
        if spec.resize == "squash":
            return cls(shape, (size, size), size, probabilities=True)
        scale = size / max(shape)
        rows, columns = (max(1, int(side * scale + 0.5)) for side in shape)
        return cls(shape, (rows, columns), size, whole=spec.resize == "area")

    @property
    def scale(self) -> FloatArray:
        """Model pixels to a voxel, along x and y."""
        if self.whole:
            return np.full(2, self.size / max(self.shape))
        return np.array([self.new[1] / self.shape[1], self.new[0] / self.shape[0]])

    def points(self, points: FloatArray) -> FloatArray:
        """(n, 2) row, column of voxel centres in the field to x, y in model pixels.

        The reference multiplies by the scale and no more. That is the first of the pixels that a voxel
        becomes where fields are enlarged, so there its middle is taken.
        """
        turned = np.asarray(points, dtype=np.float64).reshape(-1, 2)[:, ::-1]
        return np.asarray(turned * self.scale + self._spread / 2)

    def box(self, box: tuple[float, float, float, float]) -> FloatArray:
        """First row, first column, end row, end column as voxel edges to (4,) x, y, x, y in model pixels.

        The corners of the reference are the middles of the outermost voxels, times the scale; where fields
        are enlarged, of the outermost model pixels.
        """
        limit = np.array(self.shape) - 0.5
        first = np.clip(np.array(box[:2]), -0.5, limit)[::-1] + 0.5
        last = np.clip(np.array(box[2:]), -0.5, limit)[::-1] - 0.5
        last = np.maximum(last, first)
        corners = np.concatenate([first * self.scale, last * self.scale + self._spread])
        return np.trunc(corners) if self.whole else corners

    def mask(self, logits: FloatArray, side: int) -> Tensor:
        """Logits of the field to what the prompt encoder reads, (1, 1, side, side)."""
        rows, columns = (max(1, round(n * side / self.size)) for n in self.new)
        low = torch.full((1, 1, side, side), -CERTAIN)
        given = torch.as_tensor(np.ascontiguousarray(logits), dtype=torch.float32)[None, None]
        low[..., :rows, :columns] = F.interpolate(
            given, (rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        return low

    def logits(self, low: Tensor) -> FloatArray:
        """(masks, side, side) of the decoder to (masks, rows, columns) of the field."""
        found = low[None].float()
        if self.probabilities:
            found = F.interpolate(found.sigmoid(), self.shape, mode="bilinear", align_corners=False)
            return np.asarray(torch.logit(found[0], eps=1e-6).numpy())
        if found.shape[-1] != self.size:
            found = F.interpolate(found, (self.size, self.size), mode="bilinear", align_corners=False)
        found = found[..., : self.new[0], : self.new[1]]
        return np.asarray(F.interpolate(found, self.shape, mode="bilinear", align_corners=False)[0].numpy())

    @property
    def _spread(self) -> FloatArray:
        """Model pixels by which an enlarged voxel is wider than one."""
        return np.maximum(self.scale - 1, 0)


def prepare(grey: FloatArray, spec: SamSpec, frame: Frame) -> Tensor:
    """Return what the encoder reads, (1, 3, size, size) float32, of a field (rows, columns) in 0..255."""
    levels = np.asarray(grey).astype(np.uint8)
    if spec.resize == "area":
        small = resize_area(levels, frame.new)
    elif spec.resize == "longest":
        small = np.asarray(
            Image.fromarray(levels).resize((frame.new[1], frame.new[0]), Image.Resampling.BILINEAR)
        )
    else:
        small = resize_cubic(levels, frame.new)
    image = torch.from_numpy(small.astype(np.float32))
    if spec.normalise == "imagenet":
        image = (image - _MEAN) / _DEVIATION
    else:
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)
        image = image.expand(3, *frame.new)
    rows, columns = frame.new
    return F.pad(image, (0, frame.size - columns, 0, frame.size - rows))[None]


def resize_area(levels: Array, new: tuple[int, int]) -> Array:
    """Resize (rows, columns) uint8 as OpenCV's ``INTER_AREA``: the mean of what a new pixel covers.

    Where sides grow, OpenCV interpolates between neighbours at the seams of the old pixels only.
    """
    rows, columns = (_area_weights(old, side) for old, side in zip(levels.shape, new, strict=True))
    small = rows @ levels.astype(np.float64) @ columns.T
    halved = levels.shape == (2 * new[0], 2 * new[1])  # the one factor at which OpenCV rounds halves up
    return np.asarray((np.floor(small + 0.5) if halved else np.rint(small)).astype(np.uint8))


def _area_weights(old: int, new: int) -> FloatArray:
    """(new, old) weights along one side."""
    edges = np.arange(new + 1) * (old / new)
    if new > old:
        return _seam_weights(old, new)
    cells = np.arange(old)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    overlap = np.clip(overlap, 0, None)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True))


def _seam_weights(old: int, new: int) -> FloatArray:
    """OpenCV's, resize.cpp: the share of the next pixel, where a new pixel reaches into it."""
    step = np.arange(new)
    first = np.floor(step * (old / new)).astype(int)
    share = (step + 1) - (first + 1) * (new / old)
    share = np.where(share <= 0, 0, share - np.floor(share))
    weights = np.zeros((new, old))
    np.add.at(weights, (step, np.clip(first, 0, old - 1)), 1 - share)
    np.add.at(weights, (step, np.clip(first + 1, 0, old - 1)), share)
    return weights


def resize_cubic(levels: Array, new: tuple[int, int]) -> Array:
    """Resize (rows, columns) uint8 as scikit-image's ``resize`` of order 3 with antialiasing."""
    from scipy import ndimage

    factors = np.divide(levels.shape, new)
    smooth = ndimage.gaussian_filter(
        levels.astype(np.float64), np.maximum(0, (factors - 1) / 2), mode="mirror"
    )
    small = ndimage.zoom(smooth, 1 / factors, order=3, mode="mirror", grid_mode=True)
    return np.asarray(np.clip(small, levels.min(), levels.max()).astype(np.uint8))
