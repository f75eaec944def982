"""As many channels as a network takes: grey is repeated, colour becomes grey."""

import numpy as np

from medseg.errors import ConfigError
from medseg.types import Array


def set_channels(image: Array, channels: int) -> Array:
    """Return an image with as many channels as a network has: grey is repeated, colour becomes grey.

    Raises
    ------
    ConfigError
        It has another number of channels.
    """
    found = len(image)
    if found == channels:
        return image
    if found == 1:
        return np.repeat(image, channels, axis=0)
    if found in (2, 4) and channels in (1, 3):  # an alpha channel shows nothing
        return set_channels(image[:-1], channels)
    if found == 3 and channels == 1:
        return np.asarray(image.mean(axis=0, keepdims=True))
    raise ConfigError(f"image with {found} channels: the model takes {channels}. Choose a channel.")
