"""Intensity normalisation, one function a scheme, in one table.

Source: nnU-Net v2 ``preprocessing/normalization/default_normalization_schemes.py``. Everything is done in
place in float32, with statistics in float32 over the voxels in memory order, so that results are equal to
the last digit.
"""

from collections.abc import Callable

import numpy as np

from medseg.errors import DataError, PlanError
from medseg.plan.schema import ChannelStats, Configuration, Normalization
from medseg.types import BoolArray, FloatArray

# Smallest divisor; nnU-Net's value for float32.
EPSILON = 1e-8

Normalizer = Callable[[FloatArray, BoolArray | None, ChannelStats | None], None]


def ct(image: FloatArray, mask: BoolArray | None, stats: ChannelStats | None) -> None:
    """Clip to the foreground percentiles 0.5 and 99.5 of the training set, then use its mean and std."""
    if stats is None:
        raise PlanError("CT normalisation needs foreground statistics, but the plan has none. Plan again.")
    np.clip(image, stats.percentile_00_5, stats.percentile_99_5, out=image)
    image -= stats.mean
    image /= max(stats.std, EPSILON)


def zscore(image: FloatArray, mask: BoolArray | None, stats: ChannelStats | None) -> None:
    """Subtract the mean and divide by the deviation of this image, within the mask if there is one."""
    if mask is None:
        mean, deviation = image.mean(), image.std()
        image -= mean
        image /= max(deviation, EPSILON)
    elif mask.any():
        inside = image[mask]
        image[mask] = (inside - inside.mean()) / max(inside.std(), EPSILON)


def none(image: FloatArray, mask: BoolArray | None, stats: ChannelStats | None) -> None:
    """Leave the values as they are."""


def rescale(image: FloatArray, mask: BoolArray | None, stats: ChannelStats | None) -> None:
    """Map the range of this image to 0..1."""
    image -= image.min()
    image /= max(image.max(), EPSILON)


def rgb(image: FloatArray, mask: BoolArray | None, stats: ChannelStats | None) -> None:
    """Map 0..255 to 0..1.

    Raises
    ------
    DataError
        A value is outside 0..255.
    """
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        raise DataError(
            f"RGB channel: expected values in 0..255, found {low:g}..{high:g}. "
            "Rename the channel in dataset.json if the image is not 8-bit colour."
        )
    image /= 255.0


NORMALIZERS: dict[Normalization, Normalizer] = {
    "ct": ct,
    "zscore": zscore,
    "none": none,
    "rescale-0-1": rescale,
    "rgb-0-1": rgb,
}


def normalize(
    channel: FloatArray,
    number: int,
    inside: BoolArray | None,
    configuration: Configuration,
    intensity: dict[str, ChannelStats],
) -> None:
    """Normalise one channel of a case in place, before resampling.

    Parameters
    ----------
    channel : (a0, a1, a2) float32, changed
    number : which of the case's channels it is
    inside : (a0, a1, a2)
        Voxels that count where :func:`uses_mask` says so; others keep their value.
    configuration : schemes and mask flags, one a channel
    intensity : statistics by channel number ("0", "1", ...)
    """
    mask = inside if uses_mask(configuration, number) else None
    NORMALIZERS[configuration.normalization[number]](channel, mask, intensity.get(str(number)))


def uses_mask(configuration: Configuration, number: int) -> bool:
    """Return whether a channel is normalised by the voxels inside the mask only."""
    return configuration.use_mask_for_norm[number] and configuration.normalization[number] == "zscore"
