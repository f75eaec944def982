"""SAM as a finder of objects: everything on a slice, slices linked to objects in 3D.

The work is :mod:`medseg.prompt.automatic`'s; here are the settings that cells want, the way from a picture to
the grey slice that the networks look at, and the list of what was left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medseg.errors import ConfigError
from medseg.infer.runtime import count_threads, torch_threads
from medseg.instances.centre_model import Found, usual_content
from medseg.instances.channels import check_channels
from medseg.instances.dropped import Dropped
from medseg.instances.rescale import one_if_equal
from medseg.prompt.automatic import AutomaticConfig, restore_labels, segment_everything
from medseg.prompt.results import Networks, Options, open_image
from medseg.prompt.scene import Scene
from medseg.prompt.session import choose_axis
from medseg.types import Array, PathLike
from medseg.volume import Volume

# What Segment Anything's authors use for photographs (``SamAutomaticMaskGenerator``): cells have clear edges.
# It is slow: MobileSAM takes 92 CPU seconds for 256 x 256 pixels with 65 nuclei, and finds 43 of them and 10
# that are none; with an input of 512 pixels it takes 26 seconds, and finds 33 and 29.
PICTURE = AutomaticConfig(
    points=32, batch=64, least_iou=0.88, least_stability=0.95, least_slices=1, most=1_000_000, size=1024
)
# Slices are many, and their objects large.
STACK = AutomaticConfig(most=1_000_000)
# Of a usual object: smaller masks are specks. Without a diameter, so many pixels are.
_LEAST_PART, _LEAST_PIXELS = 0.1, 20
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True, eq=False)
class SamFinder:
    """A promptable network that is asked everywhere.

    Attributes
    ----------
    name : of an asset that understands clicks
    weights : files to use instead of downloads, by asset
    threads : CPU threads
    config : of what is asked and kept; None: :data:`PICTURE` for a picture, :data:`STACK` for a volume. Its
        areas and distances are in the unit of the image
    """

    name: str
    weights: Mapping[str, PathLike] = field(default_factory=dict)
    threads: int | None = None
    config: AutomaticConfig | None = None
    _networks: Networks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_networks", Networks(self.weights))

    @property
    def class_names(self) -> dict[int, str]:
        """It does not know what it finds."""
        return {}

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find everything in a picture or volume.

        Parameters
        ----------
        image : Volume
            Grey, or colour, which is looked at in grey.
        diameter : float, optional
            Of a usual object: masks of less than a tenth of its area are specks.
        in_pixels : bool
            Does not matter.

        Raises
        ------
        ConfigError
            The network understands boxes only, the diameter is no length, or there are several channels that
            are not those of a colour picture.
        DataError
            The image has no finite voxel.
        """
        scene = grey_scene(image)
        axis = choose_axis(scene, ())
        config = self._settings(scene, axis, image.shape[2] == 1, diameter)
        with torch_threads(count_threads(self.threads)):
            found = segment_everything(self._networks(scene), config, axis)
        labels = restore_labels(scene, found.labels.astype(np.int32)).array[0]
        scores = np.array([each.iou for each in found.objects], np.float32)
        dropped = tuple(Dropped(each.rule, each.count, each.voxels) for each in found.left_out)
        return Found(labels[..., 0] if image.shape[2] == 1 else labels, scores, diameter, 0, dropped)

    def _settings(self, scene: Scene, axis: int, flat: bool, diameter: float | None) -> AutomaticConfig:
        config = (self.config or (PICTURE if flat else STACK)).replace(asset=self.name)
        if diameter is not None:
            if not np.isfinite(diameter) or diameter <= 0:
                raise ConfigError(f"diameter {diameter}: expected more than 0.")
            return config.replace(least_area_mm2=_LEAST_PART * usual_content(diameter, 2))
        if self.config is not None:
            return config
        pixel = float(np.prod([size for a, size in enumerate(scene.spacing) if a != axis]))
        return config.replace(least_area_mm2=_LEAST_PIXELS * pixel)


def grey_scene(image: Volume) -> Scene:
    """Return an image as the networks look at it: one channel, through the window that suits it.

    Raises
    ------
    ConfigError
        It has several channels that are not those of a colour picture.
    DataError
        It has no finite voxel.
    """
    with open_image(image.with_array(_flat_grey(image)[None]), Options()) as session:
        return session.scene


def _flat_grey(image: Volume) -> Array:
    """Return (i, j, k)."""
    if image.shape[2] != 1:
        check_channels(image.array, 1)
        return np.asarray(image.array[0])
    return to_grey(image.array[..., 0])[..., None]


def to_grey(array: Array) -> Array:
    """Return one channel of (channel, i, j); an alpha channel shows nothing.

    Raises
    ------
    ConfigError
        The channels are not those of a colour picture.
    """
    array = one_if_equal(array)
    check_channels(array, 1)
    if len(array) in (2, 4):
        array = array[:-1]
    if len(array) == 1:
        return np.asarray(array[0])
    return np.asarray(np.tensordot(_GREY, array.astype(np.float32), 1), np.float32)
