"""Which channel of an image shows the objects: asked for, where colours cannot be told from stains."""

import numpy as np

from medseg.errors import ConfigError
from medseg.types import Array
from medseg.volume import Volume


def choose_channel(image: Volume, channel: int | None) -> Volume:
    """Return one channel of an image, counted from 0, or the image where None is asked for.

    Raises
    ------
    ConfigError
        There is no such channel.
    """
    if channel is None:
        return image
    if not 0 <= channel < image.channels:
        last = image.channels - 1
        raise ConfigError(f"channel {channel}: the image has channels 0 to {last}. Choose one of them.")
    return Volume(image.array[channel : channel + 1], image.geometry, image.notes)


def check_channels(image: Array, taken: int) -> None:
    """Refuse channels of which it cannot be told whether they are colours, stains or time points.

    A picture of three channels has colours. A further one of one value is an alpha channel, which shows
    nothing. A volume has no colours.

    Parameters
    ----------
    image : (channel, *shape)
    taken : channels that the model was trained on

    Raises
    ------
    ConfigError
        The image has others.
    """
    found = len(image)
    if found in (1, taken):
        return
    coloured = image.ndim == 3 and (found == 3 or (found in (2, 4) and np.ptp(image[-1]) == 0))
    if not coloured:
        raise ConfigError(
            f"image with {found} channels: colours, stains or time points? The model takes {taken}. Say "
            "which channel shows the objects, from 0 on: --channel 0."
        )
