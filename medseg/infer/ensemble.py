"""Several models with different plans: the mean of their probabilities on the source grid.

Source: nnU-Net v2 ``ensembling/ensemble.py`` (float32 mean of softmax or sigmoid, then the usual decision).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from medseg.labels import LabelSet
from medseg.plan.schema import Configuration
from medseg.preprocess import Record
from medseg.preprocess.restore import Part, decide_probabilities, probability_parts
from medseg.types import FloatArray, PathLike
from medseg.volume import Volume

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Output:
    """What one model says about a case: logits (n_outputs, a0, a1, a2) and the way to the source grid."""

    logits: FloatArray
    record: Record
    configuration: Configuration


def combine(outputs: Sequence[Output], labels: LabelSet, path: PathLike | None = None) -> Volume:
    """Decide labels on the mean of the probabilities of several models.

    They are averaged a brick at a time on the cropped source grid, so nothing of the size classes x volume
    is held but the logits on the networks' grids (in a file where they are many).

    Parameters
    ----------
    outputs : of models of one label set, for one image
    path : ``.npz`` file to write the mean probabilities to
    """
    record = outputs[0].record
    aligned = [_reorder(output, record.transpose) for output in outputs]
    assert all(output.record.crop == record.crop for output in aligned)  # the crop is of the image
    streams = [probability_parts(o.logits, o.record, labels, o.configuration) for o in aligned]
    return decide_probabilities(_mean(streams), record, labels, path)


def _mean(streams: Sequence[Iterator[Part]]) -> Iterator[Part]:
    # Parts are cut by shape and number of classes, which all models share.
    for parts in zip(*streams, strict=True):
        region, total = parts[0]
        for other, values in parts[1:]:
            assert other == region
            total += values
        total /= len(parts)
        yield region, total


def _reorder(output: Output, transpose: tuple[int, int, int]) -> Output:
    """Return the same output with its axes in the order of another model."""
    record = output.record
    if record.transpose == transpose:
        return output
    axes = [record.transpose.index(axis) for axis in transpose]

    def permuted(values: tuple[T, ...]) -> tuple[T, T, T]:
        return cast(tuple[T, T, T], tuple(values[axis] for axis in axes))

    reordered = replace(
        record,
        transpose=transpose,
        crop=permuted(record.crop),
        shape=permuted(record.shape),
        spacing=permuted(record.spacing),
        new_spacing=permuted(record.new_spacing),
    )
    logits = output.logits.transpose(0, *(axis + 1 for axis in axes))
    return Output(logits, reordered, output.configuration)
