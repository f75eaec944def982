"""What finds objects in an image, by name: models of the package, InstanSeg's nets, SAM, and bundles.

Importing this costs nothing, so that the command line can list the names.

>>> sorted(FINDERS)[:3]
['instanseg-brightfield', 'instanseg-cells', 'instanseg-fluorescence']
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from medseg.errors import ConfigError
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.instances.centre_model import Found
    from medseg.instances.refine import Refiner
    from medseg.volume import Volume

_INSTANSEG = "InstanSeg's net (16 to 21 MB, fetched), by the size of a pixel"
_SAM = "Everything that a SAM of clicks finds without a prompt (fetched)"
FINDERS: dict[str, str] = {
    "nuclei2d": "Nuclei in pictures: fluorescence and H&E (in the package).",
    "nuclei3d": "Nuclei in 3D fluorescence (in the package).",
    "instanseg-fluorescence": f"Nuclei in fluorescence: {_INSTANSEG}.",
    "instanseg-cells": f"Whole cells in fluorescence: {_INSTANSEG}.",
    "instanseg-brightfield": f"Nuclei in H&E: {_INSTANSEG}.",
    "mobile-sam": f"{_SAM}; slices of a volume are linked.",
    "sam-vit-b": f"{_SAM}.",
    "sam-vit-l": f"{_SAM}.",
    "sam-vit-h": f"{_SAM}.",
}
"""Names that ``medseg count --model`` knows beside paths of bundles, and what each is for."""

FILES: dict[str, str] = {
    "labels:FILE": "A label map that another program has made.",
    "cellpose:FILE": "A model of Cellpose 3, where medseg[cellpose] is installed.",
    "stardist:FOLDER": "A model of StarDist, where medseg[stardist] is installed.",
}
"""What a path with a word before it stands for."""


REFINERS = ("lite-medsam", "mobile-sam", "medsam-vit-b", "sam-vit-b", "sam-vit-l", "sam-vit-h")
"""Networks that draw an object anew when they are shown its box."""


class Finder(Protocol):
    """Finds the objects of an image.

    Attributes
    ----------
    name : str
    class_names : mapping of class to name
        What its objects are called; empty where it does not know.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def class_names(self) -> Mapping[int, str]: ...  # noqa: D102

    def find(self, image: "Volume", diameter: float | None = None, in_pixels: bool = False) -> "Found":
        """Find the objects of a picture (one voxel along k) or of a volume.

        Parameters
        ----------
        image : Volume
        diameter : float, optional
            Of a usual object, in the unit of the image.
        in_pixels : bool
            The image has no scale.

        Returns
        -------
        Found
            Its labels are (i, j) for a picture, else (i, j, k).
        """
        ...


def open_finder(
    name: PathLike, threads: int | None = None, weights: Mapping[str, PathLike] | None = None
) -> Finder:
    """Open what a name, or the path of a bundle, stands for.

    Parameters
    ----------
    name : of :data:`FINDERS`, a path of a bundle, or a word of :data:`FILES` with a path
    threads : CPU threads; None uses every core that this process may use
    weights : files to use instead of downloads, by asset

    Raises
    ------
    BundleError
        There is no such model, or it does not find objects.
    AssetError
        Weights cannot be had.
    ConfigError
        It is a network that cannot find objects by itself, or needs a package that is not installed.
    """
    text, given = str(name), dict(weights or {})
    kind, colon, path = text.partition(":")
    if colon and kind in ("labels", "cellpose", "stardist"):
        return _open_file(kind, path)
    if text.startswith("instanseg-") and text in FINDERS:
        from medseg.instances.instanseg import KINDS, load_instanseg

        return load_instanseg(text, threads=threads, given=given.get(KINDS[text].asset))
    if text in FINDERS and not text.startswith("nuclei"):
        from medseg.instances.sam import SamFinder

        return SamFinder(text, given, threads)
    if text in ("lite-medsam", "medsam-vit-b") and not Path(text).exists():
        raise ConfigError(
            f"{text}: answers boxes, and finds nothing by itself. Use it to --refine what a model finds."
        )
    return _open_bundle(text, threads)


def _open_bundle(name: str, threads: int | None) -> Finder:
    from medseg.bundle import load_bundle
    from medseg.instances.models import find_model, open_object_model

    bundle = load_bundle(find_model(name, (*FINDERS, *FILES)))
    if bundle.settings.detection is None:
        return open_object_model(bundle, name, threads=threads)
    import torch

    from medseg.infer.runtime import count_threads
    from medseg.instances.detect import Detector
    from medseg.instances.detector_finder import DetectorFinder

    torch.set_num_threads(count_threads(threads))
    return DetectorFinder(name, Detector(bundle))


def open_refiner(
    name: str, threads: int | None = None, weights: Mapping[str, PathLike] | None = None
) -> "Refiner":
    """Open a network of :data:`REFINERS`; its weights are loaded when they are first needed.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    if name not in REFINERS:
        raise ConfigError(f"{name}: does not refine objects. Use one of {', '.join(REFINERS)}.")
    from medseg.instances.refine import Refiner

    return Refiner(name, dict(weights or {}), threads)


def _open_file(kind: str, path: str) -> Finder:
    from medseg.instances import foreign

    if kind == "labels":
        return foreign.LabelMap(path)
    return foreign.open_cellpose(path) if kind == "cellpose" else foreign.open_stardist(path)
