"""From a Volume on its source grid to the network's input, exactly as nnU-Net 2.8.1 does it.

Order (``DefaultPreprocessor.run_case_npy``): float32 copy, transpose, crop to nonzero, normalise, resample.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

from medseg.errors import DataError, GeometryError, PlanError
from medseg.geometry.crop import crop_to_nonzero, nonzero_box
from medseg.geometry.orient import reads_as_ras, to_ras
from medseg.geometry.resample import resample, resample_labels, separate_axis, target_shape
from medseg.plan.schema import Configuration, Plan
from medseg.preprocess.normalize import normalize, uses_mask
from medseg.preprocess.record import Record, Triple, network_axes
from medseg.types import BoolArray, FloatArray, IntArray
from medseg.volume import Volume

# Label of voxels inside the crop but outside the nonzero mask; never trained on as a class.
OUTSIDE = -1


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """A case ready for the network.

    Attributes
    ----------
    data : (c, a0, a1, a2) float32, network order
    seg : (1, a0, a1, a2) int16 or None
        Labels on the same grid; -1 outside the image's nonzero region.
    record : Record
        How it came about, for the way back.
    """

    data: FloatArray
    seg: IntArray | None
    record: Record


def preprocess(image: Volume, plan: Plan, configuration: str, label: Volume | None = None) -> Preprocessed:
    """Crop, normalise and resample one case.

    Parameters
    ----------
    image : Volume
        One channel for each of the plan's.
    plan, configuration : the plan and which of its configurations
    label : Volume, optional
        One channel of integers on the grid of `image`.

    Raises
    ------
    PlanError
        The number of channels is not the plan's, or the plan has no such configuration.
    DataError
        The image holds NaN or infinity.
    GeometryError
        The label map is not on the grid of the image.
    """
    settings = plan.configuration(configuration)
    _check(image, plan, label)
    if reads_as_ras(plan.reader):
        label = None if label is None else to_ras(Volume(label.array, image.geometry))
        image = to_ras(image)
    source = image.array.transpose(network_axes(plan.transpose_forward))
    record = _record(image, plan, settings, nonzero_box(source))
    seg, counts = None, None
    # Filling the holes of a large mask takes more time and memory than the rest: only where it is used.
    if label is not None or any(uses_mask(settings, number) for number in range(len(source))):
        counts = crop_to_nonzero(source)[1]
    if label is not None and counts is not None:
        seg = _cropped_labels(label, record, counts)
        counts = (
            seg[0] != OUTSIDE
        )  # nnU-Net's mask is "label >= 0": a labelled voxel counts though it be zero
    separate = separate_axis(record.spacing, record.new_spacing)
    channels = []
    for number in range(len(source)):  # one at a time is held as float32 on the source grid
        data = _reader_float(image, number, record)
        normalize(data[0], number, counts, settings, plan.intensity)
        channels.append(resample(data, record.shape, settings.order_data, separate, settings.order_z))
    if seg is not None:
        seg = np.ascontiguousarray(resample_labels(seg, record.shape, settings.order_seg, separate))
    data = channels[0] if len(channels) == 1 else np.concatenate(channels)
    return Preprocessed(np.ascontiguousarray(data), seg, record)


def _reader_float(image: Volume, number: int, record: Record) -> FloatArray:
    """Return the kept part of one channel in network order, (1, a0, a1, a2) float32, a copy.

    Its memory runs as the reader's (k, j, i) of the whole image: float32 sums then round as nnU-Net's do.
    """
    reader_order = np.array(image.array[number].transpose(2, 1, 0), dtype=np.float32, order="C")
    data: FloatArray = reader_order.transpose(record.transpose)[None][record.inner]
    return data


def preprocess_labels(
    label: Volume, record: Record, configuration: Configuration, image: Volume | None = None
) -> IntArray:
    """Bring a label map on the source grid of a case to the case's network grid.

    Used for the result of a previous stage.

    Parameters
    ----------
    label : on the grid of the case
    record, configuration : of the case
    image : the case itself, to mark background outside its nonzero region with -1 as nnU-Net does, which
        decides some voxels at the border of a label; without it nothing is marked

    Returns
    -------
    (1, a0, a1, a2) int16

    Raises
    ------
    GeometryError
        The label map is not on the case's grid.
    """
    label = _as_recorded(label, record)
    if label.shape != record.geometry.shape:
        raise GeometryError(
            f"label map {label.shape}: expected the grid {record.geometry.shape} of its case."
        )
    seg = record.to_network(label.array)[record.inner].astype(np.int16)
    if image is not None:
        inside = crop_to_nonzero(record.to_network(_as_recorded(image, record).array))[1]
        seg[0][(seg[0] == 0) & ~inside] = OUTSIDE
    separate = separate_axis(record.spacing, record.new_spacing)
    return np.ascontiguousarray(resample_labels(seg, record.shape, configuration.order_seg, separate))


def _as_recorded(volume: Volume, record: Record) -> Volume:
    """Turn a volume to RAS if that is how its case was read."""
    if volume.geometry.matches(record.geometry):
        return volume
    turned = to_ras(volume)
    return turned if turned.geometry.matches(record.geometry) else volume


def _check(image: Volume, plan: Plan, label: Volume | None) -> None:
    if image.channels != len(plan.channels):
        raise PlanError(
            f"image has {image.channels} channel{'s' * (image.channels != 1)}, "
            f"the plan of {plan.dataset_name} expects "
            f"{len(plan.channels)} ({', '.join(plan.channels)}). Give one file for each, in this order."
        )
    whole = image.array.dtype.kind in "uib"
    odd = 0 if whole else sum(int(each.size - np.isfinite(each).sum()) for each in image.array)
    if odd:
        raise DataError(f"image holds {odd} NaN or infinite voxels. Repair or re-export the image.")
    if label is not None and label.shape != image.shape:
        raise GeometryError(
            f"label map {label.shape} and image {image.shape} differ in size. "
            "Resample the label map to the image, or run `medseg check` on the dataset."
        )


def _record(image: Volume, plan: Plan, settings: Configuration, box: tuple[tuple[int, int], ...]) -> Record:
    spacing = tuple(image.spacing[2 - axis] for axis in plan.transpose_forward)
    # A 2D configuration keeps the distance of the slices.
    new_spacing = (*spacing[: 3 - len(settings.spacing)], *settings.spacing)
    shape = target_shape(tuple(stop - start for start, stop in box), spacing, new_spacing)
    return Record(
        geometry=image.geometry,
        transpose=plan.transpose_forward,
        crop=box,
        shape=cast(Triple, tuple(max(1, n) for n in shape)),
        spacing=cast(tuple[float, float, float], spacing),
        new_spacing=cast(tuple[float, float, float], new_spacing),
    )


def _cropped_labels(label: Volume, record: Record, inside: BoolArray) -> IntArray:
    view = label.array[:1].transpose(network_axes(record.transpose))
    seg: IntArray = view[record.inner].astype(np.int16)
    seg[0][(seg[0] == 0) & ~inside] = OUTSIDE
    return seg
