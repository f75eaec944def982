"""From the network's output back to the source grid, slab by slab.

Source: nnU-Net v2 ``inference/export_prediction.py``. Its rules are kept (logits are resampled, rounded to
float16, then decided), its memory is not: one slab of one class at a time is held, never classes x volume.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medseg.errors import LabelError
from medseg.files import atomic_path
from medseg.geometry.resample import resample_rows, separate_axis
from medseg.labels import LabelSet
from medseg.log import check_cancelled
from medseg.plan.schema import Configuration
from medseg.preprocess.record import Record
from medseg.types import Array, BoolArray, FloatArray, IntArray, PathLike, Shape, Spacing
from medseg.volume import Volume

# Memory of one slab with its temporaries: little enough to stay near the cache.
SLAB_BYTES = 16 << 20
# float32 arrays of the slab's size that live at once while labels are decided.
SLAB_COPIES = 6
# The smallest logit whose float32 sigmoid exceeds one half.
SIGMOID_HALF = 1.2e-7


@dataclass(frozen=True)
class _Way:
    """How logits are brought to `shape`: nnU-Net's resampling_fn_probabilities."""

    shape: Shape
    order: int
    separate: int | None
    order_z: int

    @classmethod
    def plan(
        cls, shape: Shape, configuration: Configuration, spacing: Spacing, new_spacing: Spacing
    ) -> "_Way":
        separate = separate_axis(spacing, new_spacing)
        return cls(tuple(shape), configuration.order_probabilities, separate, configuration.order_z)

    @classmethod
    def back(cls, record: Record, configuration: Configuration) -> "_Way":
        return cls.plan(record.cropped_shape, configuration, record.new_spacing, record.spacing)

    def rows(self, channel: Array, rows: slice) -> FloatArray:
        """Return rows of one class as float32 that has been rounded to float16."""
        values = resample_rows(channel, self.shape, rows, self.order, self.separate, self.order_z)
        if values.dtype != np.float32 or not values.flags.writeable or np.shares_memory(values, channel):
            values = values.astype(np.float32)
        return round_to_half(values)

    def slabs(self, copies: int) -> Iterator[slice]:
        """Cut the first axis so that `copies` float32 arrays of a slab fit into SLAB_BYTES."""
        row_bytes = 4 * copies * self.shape[1] * self.shape[2]
        step = max(1, SLAB_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            check_cancelled()
            yield slice(start, min(start + step, self.shape[0]))


def round_to_half(values: FloatArray) -> FloatArray:
    """Round a contiguous float32 array to the 11 significant bits of float16, halves to even, in place.

    Equal to a cast to float16 and back, and four times as fast, for magnitudes from 6.2e-5 to 65504; smaller
    ones keep more digits than float16 would, larger ones stay finite.
    """
    bits = values.view(np.uint32)
    half = bits >> 13
    half &= 1
    half += 0x0FFF
    bits += half
    bits &= np.uint32(0xFFFFE000)
    return values


def restore_labels(logits: Array, record: Record, labels: LabelSet, configuration: Configuration) -> Volume:
    """Decide the label of every voxel of the source grid.

    Parameters
    ----------
    logits : (n_outputs, a0, a1, a2)
        float16 or float32, may be memory-mapped, of the record's `shape` (padding removed).
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
    _check(logits, record.shape, labels)
    result = _empty_source(record, labels)
    inner = record.to_network(result)[record.inner][0]
    for rows, decided in _decide(logits, _Way.back(record, configuration), labels):
        inner[rows] = decided
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
    _check(logits, logits.shape[1:], labels)
    spacing = (*(slice_spacing,) * (3 - len(configuration.spacing)), *configuration.spacing)
    result = np.zeros((1, *shape), dtype=labels.dtype)
    for rows, decided in _decide(logits, _Way.plan(shape, configuration, spacing, spacing), labels):
        result[0, rows] = decided
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
    way = _Way(record.cropped_shape, order, separate, order_z)
    for rows in way.slabs(SLAB_COPIES):
        for number, channel in enumerate(array):
            inner[number, rows] = resample_rows(channel, way.shape, rows, order, separate, order_z)
    return result


def probability_slabs(
    logits: Array, record: Record, labels: LabelSet, configuration: Configuration
) -> Iterator[tuple[slice, FloatArray]]:
    """Yield probabilities on the cropped source grid, a few rows of the first network axis at a time.

    Yields
    ------
    rows : slice of the first axis of ``record.cropped_shape``
    probabilities : (n_outputs, rows, m1, m2) float32, softmax over classes or sigmoid of regions
    """
    _check(logits, record.shape, labels)
    way = _Way.back(record, configuration)
    for rows in way.slabs(3 * len(logits)):
        values = np.stack([way.rows(channel, rows) for channel in logits])
        yield rows, _sigmoid(values) if labels.has_regions else _softmax(values)


def restore_probabilities(
    logits: Array, record: Record, labels: LabelSet, configuration: Configuration, path: PathLike
) -> Volume:
    """Write probabilities on the source grid and return the labels that follow from them.

    The file is nnU-Net's: ``probabilities`` (n_outputs, k, j, i) float32 in a compressed ``.npz``,
    background 1 outside the crop. It is filled through a temporary file, so memory holds one slab.

    Parameters
    ----------
    logits, record, labels, configuration : as for :func:`restore_labels`
    path : ends in ``.npz``

    Returns
    -------
    Volume
        As :func:`restore_labels`, but decided on the float32 probabilities, as nnU-Net does then.
    """
    slabs = probability_slabs(logits, record, labels, configuration)
    return decide_probabilities(slabs, len(logits), record, labels, path)


def decide_probabilities(
    slabs: Iterator[tuple[slice, FloatArray]],
    n_outputs: int,
    record: Record,
    labels: LabelSet,
    path: PathLike | None = None,
) -> Volume:
    """Decide labels on probabilities that come slab by slab; write these to `path` as well if given.

    Parameters
    ----------
    slabs : as from :func:`probability_slabs`, for instance the mean of several models
    n_outputs : maps in each slab
    record, labels, path : as for :func:`restore_probabilities`
    """
    result = _empty_source(record, labels)
    inner = record.to_network(result)[record.inner][0]
    if path is None:
        for rows, values in slabs:
            inner[rows] = _decide_slab(values, labels)
        return Volume(result, record.geometry)
    path = Path(path)
    shape = (n_outputs, *record.geometry.shape[::-1])
    with atomic_path(path) as archive, TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        raw = Path(folder) / "probabilities.npy"
        file = np.lib.format.open_memmap(raw, mode="w+", dtype=np.float32, shape=shape)
        if not labels.has_regions:
            file[0] = 1.0
        target = record.to_network(file.transpose(0, 3, 2, 1))[record.inner]
        for rows, values in slabs:
            target[:, rows] = values
            inner[rows] = _decide_slab(values, labels)
        file.flush()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(raw, raw.name)
    return Volume(result, record.geometry)


def _decide_slab(values: FloatArray, labels: LabelSet) -> IntArray:
    winner: IntArray = _paint(values > 0.5, labels) if labels.has_regions else values.argmax(axis=0)
    return winner


def _check(logits: Array, shape: Shape, labels: LabelSet) -> None:
    if logits.shape != (labels.n_outputs, *shape):
        raise LabelError(
            f"logits {logits.shape}: expected {(labels.n_outputs, *shape)}, one map for each output of the "
            "label set on the grid of the preprocessed case. Check that model and case use the same plan."
        )


def _empty_source(record: Record, labels: LabelSet) -> IntArray:
    # Fortran order: i runs fastest, as in a NIfTI file and in the network's own order.
    return np.zeros((1, *record.geometry.shape), dtype=labels.dtype, order="F")


def _decide(logits: Array, way: _Way, labels: LabelSet) -> Iterator[tuple[slice, IntArray]]:
    for rows in way.slabs(SLAB_COPIES):
        if labels.has_regions:
            regions = (way.rows(channel, rows) > SIGMOID_HALF for channel in logits)
            yield rows, _paint(regions, labels)
        else:
            yield rows, _argmax(logits, way, rows, labels)


def _argmax(logits: Array, way: _Way, rows: slice, labels: LabelSet) -> IntArray:
    best = way.rows(logits[0], rows)
    winner = np.zeros(best.shape, dtype=labels.dtype)
    for number, channel in enumerate(logits[1:], 1):
        score = way.rows(channel, rows)
        winner[score > best] = number
        np.maximum(best, score, out=best)
    return winner


def _paint(regions: "Iterator[BoolArray] | BoolArray", labels: LabelSet) -> IntArray:
    painted: IntArray | None = None
    for region, value in zip(regions, labels.regions_class_order or (), strict=True):
        if painted is None:
            painted = np.zeros(region.shape, dtype=labels.dtype)
        painted[region] = value
    assert painted is not None  # a label set with regions has at least one
    return painted


def _softmax(values: FloatArray) -> FloatArray:
    values = values - values.max(axis=0)
    np.exp(values, out=values)
    values /= values.sum(axis=0)
    return values


def _sigmoid(values: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        result: FloatArray = 1.0 / (1.0 + np.exp(-values))
    return result
