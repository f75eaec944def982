"""From the network's output back to the source grid, part by part.

Source: nnU-Net v2 ``inference/export_prediction.py``. Its rules are kept (logits are resampled, rounded to
float16, then decided), its memory is not: a part of one class at a time is held, never classes x volume, and
the logits themselves may come in blocks that are gone once they are used.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from medseg.errors import LabelError
from medseg.files import atomic_path, scratch_folder
from medseg.geometry.resample import resample_rows, separate_axis
from medseg.labels import LabelSet
from medseg.log import check_cancelled
from medseg.plan.schema import Configuration
from medseg.preprocess.bricks import Block, Brick, Region, Way, slab_rows
from medseg.preprocess.record import Record
from medseg.types import Array, FloatArray, IntArray, PathLike, Shape
from medseg.volume import Volume

# The smallest logit whose float32 sigmoid exceeds one half.
SIGMOID_HALF = 1.2e-7
# Relative distance from which two float32 logits differ after interpolation and rounding to float16 (2^-11).
CLEAR = 2.0**-9

Logits = Array | Iterable[Block]
"""Of a whole volume, (n_outputs, a0, a1, a2) float16 or float32, may be mapped; or its blocks in order."""
Part = tuple[Region, FloatArray]
"""A place in the cropped source grid, and (n_outputs, ...) probabilities there."""


def restore_labels(logits: Logits, record: Record, labels: LabelSet, configuration: Configuration) -> Volume:
    """Decide the label of every voxel of the source grid.

    Parameters
    ----------
    logits : of the record's `shape` (padding removed), at once or in blocks
    record : how the case was preprocessed
    labels : classes (largest logit wins, the lowest label among equals) or regions (sigmoid > 0.5, painted
        in ``regions_class_order``)
    configuration : its resampling orders

    Returns
    -------
    Volume
        One channel of ``labels.dtype`` on the source grid, 0 outside the crop.

    Raises
    ------
    LabelError
        The number of logits or their shape does not fit.
    """
    way = Way.back(record, configuration)
    result, inner = _empty_source(record, labels)
    _decide(_blocks(logits, way, labels), way, labels, inner)
    return Volume(result, record.geometry)


def labels_at_shape(
    logits: Array, shape: Shape, labels: LabelSet, configuration: Configuration, slice_spacing: float = 1.0
) -> IntArray:
    """Decide labels on another network grid: the first stage of a cascade on the grid of the second.

    Parameters
    ----------
    logits : (n_outputs, a0, a1, a2)
    shape : (m0, m1, m2) of the wanted grid
    labels : classes or regions
    configuration : that of the logits
    slice_spacing : distance of the slices, for a 2D configuration

    Returns
    -------
    (1, m0, m1, m2) of ``labels.dtype``
    """
    spacing = (*(slice_spacing,) * (3 - len(configuration.spacing)), *configuration.spacing)
    way = Way.plan(logits.shape[1:], shape, configuration, spacing, spacing)
    result = np.zeros((1, *shape), dtype=labels.dtype)
    _decide(_blocks(logits, way, labels), way, labels, result[0])
    return result


def restore_array(
    array: FloatArray, record: Record, order: int = 1, order_z: int = 0, outside: float = 0.0
) -> FloatArray:
    """Bring maps of numbers (uncertainty, distance, attention) to the source grid.

    Parameters
    ----------
    array : (c, a0, a1, a2) of the record's `shape`
    order, order_z : spline orders
    outside : value outside the crop

    Returns
    -------
    (c, i, j, k) of the input's dtype
    """
    result = np.full((array.shape[0], *record.geometry.shape), outside, dtype=array.dtype, order="F")
    inner = record.to_network(result)[record.inner]
    separate = separate_axis(record.new_spacing, record.spacing)
    shape = record.cropped_shape
    for start in range(0, shape[0], slab_rows(shape)):
        check_cancelled()
        rows = slice(start, min(start + slab_rows(shape), shape[0]))
        for number, channel in enumerate(array):
            inner[number, rows] = resample_rows(channel, shape, rows, order, separate, order_z)
    return result


def probability_parts(
    logits: Logits, record: Record, labels: LabelSet, configuration: Configuration
) -> Iterator[Part]:
    """Yield probabilities on the cropped source grid, a brick at a time.

    Logits at once are cut into bricks by the source grid and the number of maps alone, so those of several
    models for one image come in step.

    Yields
    ------
    region : (slice, slice, slice) of ``record.cropped_shape``
    probabilities : (n_outputs, *region) float32, softmax over classes or sigmoid of regions
    """
    way = Way.back(record, configuration)
    for block in _blocks(logits, way, labels):
        yield from _block_probabilities(block, way, labels)
        del block  # so that its memory is free while the next one comes about


def restore_probabilities(
    logits: Logits, record: Record, labels: LabelSet, configuration: Configuration, path: PathLike
) -> Volume:
    """Write probabilities on the source grid and return the labels that follow from them.

    The file is nnU-Net's: ``probabilities`` (n_outputs, k, j, i) float32 in a compressed ``.npz``,
    background 1 outside the crop. It is filled through a temporary file, so memory holds one brick.

    Parameters
    ----------
    logits, record, labels, configuration : as for :func:`restore_labels`
    path : ends in ``.npz``

    Returns
    -------
    Volume
        As :func:`restore_labels`, but decided on the float32 probabilities, as nnU-Net does then.
    """
    return decide_probabilities(
        probability_parts(logits, record, labels, configuration), record, labels, path
    )


def decide_probabilities(
    parts: Iterable[Part], record: Record, labels: LabelSet, path: PathLike | None = None
) -> Volume:
    """Decide labels on probabilities that come part by part; write these to `path` as well if given.

    Parameters
    ----------
    parts : as from :func:`probability_parts`, for instance the mean of several models
    record, labels, path : as for :func:`restore_probabilities`
    """
    result, inner = _empty_source(record, labels)
    if path is None:
        for region, values in parts:
            inner[region] = _decide_values(values, labels)
        return Volume(result, record.geometry)
    path = Path(path)
    shape = (labels.n_outputs, *record.geometry.shape[::-1])
    with atomic_path(path) as archive, scratch_folder(path) as folder:
        raw = folder / "probabilities.npy"
        file = np.lib.format.open_memmap(raw, mode="w+", dtype=np.float32, shape=shape)
        if not labels.has_regions:
            file[0] = 1.0
        target = record.to_network(file.transpose(0, 3, 2, 1))[record.inner]
        for region, values in parts:
            target[(slice(None), *region)] = values
            inner[region] = _decide_values(values, labels)
        file.flush()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(raw, raw.name)
    return Volume(result, record.geometry)


def _blocks(logits: Logits, way: Way, labels: LabelSet) -> Iterable[Block]:
    if not isinstance(logits, np.ndarray):
        return logits
    if logits.shape != (labels.n_outputs, *way.shape):
        raise LabelError(
            f"logits {logits.shape}: expected {(labels.n_outputs, *way.shape)}, one map for each output of "
            "the label set on the grid of the preprocessed case. Check that model and case use the same plan."
        )
    kept = logits.dtype in (np.float16, np.float32) and logits.flags.writeable
    return [Block.whole(torch.from_numpy(logits if kept else logits.astype(np.float32)))]


def _empty_source(record: Record, labels: LabelSet) -> tuple[IntArray, IntArray]:
    """Return zeros on the source grid, and their cropped part in network order."""
    # Fortran order: i runs fastest, as in a NIfTI file and in the network's own order.
    result: IntArray = np.zeros((1, *record.geometry.shape), dtype=labels.dtype, order="F")
    return result, record.to_network(result)[record.inner][0]


def _decide(blocks: Iterable[Block], way: Way, labels: LabelSet, target: IntArray) -> None:
    """Write the labels of all bricks into `target`."""
    for block in blocks:
        _decide_block(block, way, labels, target)
        del block  # so that its memory is free while the next one comes about


def _decide_block(block: Block, way: Way, labels: LabelSet, target: IntArray) -> None:
    margin = 0.0 if block.values.dtype == torch.float16 else CLEAR
    for brick in way.bricks(block):
        target[brick.region] = _paint(brick, labels) if labels.has_regions else _elect(brick, margin)


def _block_probabilities(block: Block, way: Way, labels: LabelSet) -> Iterator[Part]:
    maps = range(len(block.values))
    for brick in way.bricks(block, maps=len(maps)):
        values = np.stack([brick.sample(number).numpy() for number in maps])
        yield brick.region, _sigmoid(values) if labels.has_regions else _softmax(values)


def _elect(brick: Brick, margin: float) -> Array | int:
    """Return the label of the largest logit, the lowest among equals.

    Weights are positive and roundings monotone, so where the largest logit of a class is below the smallest
    of another in all that a brick reads, it is below it in the whole brick and need not be resampled.
    float16 logits that differ still do so after interpolation and rounding; for float32 the margin does it.
    """
    bar = float(brick.low.max())
    high = brick.high + margin * np.maximum(np.abs(brick.high), abs(bar)) if margin else brick.high
    able = np.flatnonzero(high >= bar)
    if len(able) == 1:
        return int(able[0])
    best: FloatArray = brick.sample(int(able[0])).numpy()
    winner: IntArray = np.full(best.shape, able[0], dtype=np.uint8 if able[-1] < 256 else np.uint16)
    for number in able[1:]:
        score = brick.sample(int(number)).numpy()
        # Numbers ascend: where this one is better, it is also larger than the winner so far.
        np.maximum(winner, (score > best).astype(winner.dtype) * winner.dtype.type(number), out=winner)
        np.maximum(best, score, out=best)
    return winner


def _paint(brick: Brick, labels: LabelSet) -> Array | int:
    """Return the label of the last region whose sigmoid is above one half; sure regions are not resampled."""
    painted: IntArray | int = 0
    for number, value in enumerate(labels.regions_class_order or ()):
        if brick.high[number] <= 0.0:
            continue
        if brick.low[number] > 8 * SIGMOID_HALF:
            painted = value
            continue
        inside = brick.sample(number).numpy() > SIGMOID_HALF
        if isinstance(painted, int):
            painted = np.full(inside.shape, painted, dtype=labels.dtype)
        painted[inside] = value
    return painted


def _decide_values(values: FloatArray, labels: LabelSet) -> IntArray:
    if not labels.has_regions:
        winner: IntArray = values.argmax(axis=0)
        return winner
    painted = np.zeros(values.shape[1:], dtype=labels.dtype)
    for region, value in zip(values > 0.5, labels.regions_class_order or (), strict=True):
        painted[region] = value
    return painted


def _softmax(values: FloatArray) -> FloatArray:
    values = values - values.max(axis=0)
    np.exp(values, out=values)
    total = values[0].copy()
    for each in values[1:]:  # sum() would add in another order where a brick is one voxel
        total += each
    values /= total
    return values


def _sigmoid(values: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        result: FloatArray = 1.0 / (1.0 + np.exp(-values))
    return result
