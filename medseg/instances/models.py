"""Models that find objects: those in the package, and bundles of ``medseg train --task centre-offset``.

>>> sorted(MODELS)
['nuclei2d', 'nuclei3d']
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from medseg.bundle import Bundle, load_bundle
from medseg.errors import BundleError, ConfigError, DataError
from medseg.infer.runtime import choose_runtime, count_threads
from medseg.instances.centre_model import (
    CentreNetwork,
    CentreSettings,
    Found,
    channels_first,
    prepare_image,
)
from medseg.instances.channels import check_channels
from medseg.instances.diameter import estimate_diameter
from medseg.instances.finders import FINDERS
from medseg.instances.scale import Scale, scale_of
from medseg.labels import PanopticLabels
from medseg.types import Array, PathLike
from medseg.volume import Volume

MODELS: dict[str, str] = {
    "nuclei2d": "Nuclei in 2D: fluorescence and H&E (trained on Data Science Bowl 2018, CC0).",
    "nuclei3d": "Nuclei in 3D fluorescence (trained on synthetic scenes only).",
}
"""Models in the package, and what each is for."""

# An image without anything like an object has no size of objects either.
UNKNOWN_DIAMETER = 24.0
# In voxels: larger objects are better seen on a smaller copy of the image.
LARGEST = 5000.0
# To which an image is enlarged at most, so that small objects have the size that the network knows.
MOST_VOXELS = 1 << 30
_IN_MM = {"mm": 1.0, "micron": 1e-3}


@dataclass(frozen=True, eq=False)
class ObjectModel:
    """A model that finds objects in images.

    Attributes
    ----------
    name : str
        Of the shipped model, or the path of the bundle.
    bundle : Bundle
        Where it came from.
    network : CentreNetwork
    """

    name: str
    bundle: Bundle
    network: CentreNetwork

    @property
    def settings(self) -> CentreSettings:
        """How its maps become objects."""
        return self.network.settings

    @property
    def classes(self) -> PanopticLabels:
        """The classes that it tells apart, things and stuff; one thing, where it finds objects alone."""
        if self.name in MODELS:
            return PanopticLabels(labels={"nucleus": 1}, things=("nucleus",))
        named = {name: v for name, v in self.bundle.labels.foreground.items() if isinstance(v, int)}
        things = tuple(name for name, value in named.items() if value in self.settings.things)
        return PanopticLabels.from_dict({"labels": named, "things": things}, self.name)

    def with_settings(self, **changes: object) -> "ObjectModel":
        """Return the same model that makes objects in another way, e.g. ``threshold=0.4``."""
        return replace(self, network=replace(self.network, settings=self.settings.replace(**changes)))

    @property
    def class_names(self) -> dict[int, str]:
        """What an object is called."""
        return {value: self.classes.names[value] for value in self.classes.thing_values}

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find the objects of a picture (2D models) or a volume (3D); see :meth:`segment`.

        Raises
        ------
        DataError
            A picture for a 3D model, a volume for a 2D one, or values that are not finite.
        """
        flat = image.shape[2] == 1
        if flat != (self.network.dimensions == 2):
            kind = "picture" if flat else f"volume of {image.shape[2]} slices"
            raise DataError(
                f"{self.name} finds objects in {self.network.dimensions}D, and the image is a {kind}. "
                "Take a model (--model) that was trained on such images."
            )
        array = image.array[..., 0] if flat else image.array
        spacing = None if in_pixels else image.spacing[: array.ndim - 1]
        return self.segment(array, spacing, diameter, channel_axis=0, unit=scale_of(image))

    def segment(
        self,
        image: Array,
        spacing: Sequence[float] | None = None,
        diameter: float | None = None,
        channel_axis: int | None = None,
        unit: Scale | None = None,
    ) -> Found:
        """Find the objects of an image.

        Parameters
        ----------
        image : (*shape), or with an axis of channels
            Grey or RGB, any real dtype; 2D or 3D as the model is.
        spacing : one number an axis
            Size of a voxel; 1 if not given. Only ratios matter to a model without a scale of its own.
        diameter : float, optional
            Of objects, in the unit of `spacing`. By default that of the model, or it is estimated from the
            image, which takes about as long again.
        channel_axis : int, optional
            Which axis holds channels, where that cannot be told.
        unit : "pixel", "mm" or "micron", optional
            Of `spacing`. If not given, that of the model's own diameter.

        Raises
        ------
        ConfigError
            The image has other axes or channels than the model takes; spacing or diameter is wrong.
        DataError
            The image holds values that are not finite.
        """
        n = self.network.dimensions
        array = channels_first(np.asarray(image), n, channel_axis)
        check_channels(array, self.network.channels)
        shown = prepare_image(array, self.network, channel_axis=0)
        size = (1.0,) * n if spacing is None else tuple(map(float, spacing))
        if len(size) != n or not all(np.isfinite(s) and s > 0 for s in size):
            raise ConfigError(f"spacing {size}: expected {n} numbers above 0, one an axis.")
        if not shown.size or shown.min() == shown.max():  # of one value: nothing is there to be seen
            return Found(np.zeros(shown.shape[1:], np.int32), np.zeros(0, np.float32), 0.0, 0, ())
        notes: tuple[str, ...] = ()
        if diameter is None:
            diameter, notes = own_diameter(self.settings, spacing, unit)
        # Offsets are kept in 16 bits, which hold no image in nanometres. In units of about a voxel they do; a
        # power of two changes nothing but exponents.
        power = 2.0 ** round(float(np.log2(min(size))))
        relative = tuple(s / power for s in size)
        if diameter is None:
            diameter = estimate_diameter(self.network, shown, relative) or UNKNOWN_DIAMETER * min(relative)
            diameter *= power
        _check_diameter(diameter, min(size))
        _check_enlarged(shown.shape[1:], size, diameter / self.settings.object_voxels)
        found = self.network.find(shown, relative, diameter / power)
        return replace(found, diameter=float(diameter), notes=(*found.notes, *notes))


def own_diameter(
    settings: CentreSettings, spacing: Sequence[float] | None, unit: Scale | None
) -> tuple[float | None, tuple[str, ...]]:
    """Return the diameter of a model's objects in an image, and what a reader of the result should know.

    Parameters
    ----------
    spacing : of the image; None where it has no scale
    unit : of `spacing`; None: that of the model's diameter

    Returns
    -------
    diameter : float or None
        In the unit of `spacing`, or in pixels without one. None: the model has none that fits the image.
    notes : tuple of str

    Examples
    --------
    >>> own_diameter(CentreSettings(diameter=0.01, diameter_unit="mm"), (0.5, 0.5), "micron")
    (10.0, ())
    """
    stored, kept = settings.diameter, settings.diameter_unit
    if stored is None or (kept is None and spacing is None):
        return None, ()
    if kept is None or (unit is None and spacing is not None):
        return stored, ()
    scaled = spacing is not None and unit != "pixel"
    if kept == "pixel":
        note = (
            f"the model's objects measure {stored:.4g} pixels, and those of this image are taken to as well"
        )
        return stored * (1.0 if spacing is None else min(spacing)), (note,) if scaled else ()
    if not scaled:
        known = f"the model's objects measure {stored:.4g} {kept}, and the image has no scale"
        return None, (f"{known}: their size was estimated. Give the size of a pixel, or --diameter.",)
    assert unit is not None
    return stored * _IN_MM[kept] / _IN_MM[unit], ()


def _check_diameter(diameter: float, voxel: float) -> None:
    if not voxel <= diameter <= LARGEST * voxel:
        raise ConfigError(
            f"diameter {diameter:g}: expected 1 to {LARGEST:g} pixels, and one measures {voxel:g}. Give it "
            "in the unit of the image."
        )


def _check_enlarged(shape: Sequence[int], spacing: Sequence[float], voxel: float) -> None:
    """Refuse to enlarge an image so much that memory would not hold it."""
    enlarged = prod(max(1.0, n * s / voxel) for n, s in zip(shape, spacing, strict=True))
    if enlarged > max(MOST_VOXELS, prod(shape)):
        raise ConfigError(
            f"objects so small would be looked at in {enlarged:.3g} voxels, which memory does not hold. Cut "
            "the image, or check the diameter."
        )


def load_object_model(
    name: PathLike, device: str = "auto", precision: str = "auto", threads: int | None = None
) -> ObjectModel:
    """Open a shipped model by its name, or a bundle by its path.

    Parameters
    ----------
    name : one of :data:`MODELS`, or a bundle or run folder of ``medseg train --task centre-offset``
    device, precision : as for ``medseg predict``
    threads : CPU threads; None uses every core that this process may use

    Raises
    ------
    BundleError
        There is none, or it does not find objects.
    ConfigError
        The device or precision is not there.
    """
    path = find_model(name)
    return open_object_model(load_bundle(path), str(name), device, precision, threads)


def find_model(name: PathLike, known: Iterable[str] = FINDERS) -> Path:
    """Return the path of a shipped model, or the path that was given; an error lists what is `known`.

    Raises
    ------
    BundleError
        There is neither.
    """
    if str(name) in MODELS:
        return Path(__file__).parent / "weights" / f"{name}.medseg"
    if not Path(name).exists():
        raise BundleError(f"{name}: no such model. Use {', '.join(known)}, or the path of a bundle.")
    return Path(name)


def open_object_model(
    bundle: Bundle,
    name: str,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    fold: str | None = None,
) -> ObjectModel:
    """Make a bundle ready to find objects; parameters as for :func:`load_object_model`.

    Parameters
    ----------
    fold : whose weights are used; the first if not given

    Raises
    ------
    BundleError
        It does not find objects.
    """
    if bundle.settings.detection is not None:
        raise BundleError(f"{name}: is a detector. Use it with medseg panoptic and --semantic.")
    if bundle.task != "centre-offset":
        raise BundleError(f"{name}: labels voxels, and does not find objects. Use medseg predict.")
    settings = CentreSettings.from_dict(dict(bundle.card["settings"]), f"{name}, settings")
    runtime = choose_runtime(device, precision)
    cores = count_threads(threads)
    patch = bundle.settings.patch_size
    network = bundle.network(fold or bundle.folds[0]).to(runtime.device)
    ready = runtime.prepare(network, patch, bundle.in_channels, cores, work_voxels=prod(patch))
    tile = CentreNetwork(ready, bundle.in_channels, patch, settings, runtime.device, cores)
    return ObjectModel(name, bundle, tile)
