"""Objects that other programs find: their label maps; Cellpose and StarDist where they are installed.

None of them is a dependency. Cellpose is version 3: version 4 needs torchvision, which does not import beside
the CPU build of torch (DECISIONS, 6); its label maps are read like any other's.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import BundleError, ConfigError, DataError, GeometryError
from medseg.instances.centre_model import Found
from medseg.instances.rescale import one_if_equal
from medseg.instances.sam import to_grey
from medseg.instances.schema import instances_of
from medseg.io import read
from medseg.types import Array, FloatArray, IntArray
from medseg.volume import Volume

# Percentiles of the images that StarDist's models are trained with (its README and examples).
_STARDIST = (1.0, 99.8)


@dataclass(frozen=True)
class LabelMap:
    """A file of objects, found elsewhere.

    Attributes
    ----------
    name : its path
    """

    name: str
    class_names: Mapping[int, str] = field(default_factory=dict)

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Return the objects of the file, numbered without gaps.

        Raises
        ------
        GeometryError
            It is of another shape than the image.
        LabelError
            It holds no labels.
        """
        labels = read(self.name)
        if labels.shape != image.shape:
            raise GeometryError(f"{self.name}: {labels.shape} labels of an image {image.shape}.")
        found = instances_of(labels)
        scores = np.full(len(found), np.nan, np.float32)
        return Found(found.labels, scores, diameter, 0, (), source_ids=found.source_ids)


@dataclass(frozen=True, eq=False)
class Cellpose:
    """A model file of Cellpose 3, for pictures.

    Attributes
    ----------
    name : ``cellpose:FILE``
    model : its ``CellposeModel``
    """

    name: str
    model: Any
    class_names: Mapping[int, str] = field(default_factory=dict)

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find the objects of a picture, in grey; without a diameter, objects are as in its training."""
        grey = to_grey(_picture(image, self.name))
        pixels = None if diameter is None else diameter / (1.0 if in_pixels else image.spacing[0])
        labels, *_ = self.model.eval(grey.astype(np.float32), diameter=pixels, channels=[0, 0])
        return _found(labels, diameter)


@dataclass(frozen=True, eq=False)
class StarDist:
    """A model folder of StarDist, for pictures.

    Attributes
    ----------
    name : ``stardist:FOLDER``
    model : its ``StarDist2D``
    """

    name: str
    model: Any
    class_names: Mapping[int, str] = field(default_factory=dict)

    def find(self, image: Volume, diameter: float | None = None, in_pixels: bool = False) -> Found:
        """Find the objects of a picture at its own pixels: the models do not ask for a size."""
        picture = one_if_equal(_picture(image, self.name)).astype(np.float32)
        wanted = self.model.config.n_channel_in
        if len(picture) != wanted:
            picture = to_grey(picture)[None]
        if len(picture) != wanted:
            raise ConfigError(f"{self.name}: takes {wanted} channels, and the image has {len(picture)}.")
        low, high = np.percentile(picture, _STARDIST, axis=(1, 2), keepdims=True)
        shown = np.moveaxis((picture - low) / np.maximum(high - low, 1e-20), 0, -1)
        shown = shown[..., 0] if wanted == 1 else shown
        axes = "YX" if wanted == 1 else "YXC"
        tiles = self.model._guess_n_tiles(shown)
        labels, details = self.model.predict_instances(shown, axes=axes, n_tiles=tiles, verbose=False)
        return _found(labels, diameter, np.asarray(details["prob"]))


def open_cellpose(path: str) -> Cellpose:
    """Open a model file of Cellpose 3; torch reads it as weights only, never as a pickle.

    Raises
    ------
    ConfigError
        Cellpose is not installed.
    BundleError
        There is no such file.
    """
    models = _require("cellpose", "cellpose.models")
    if not Path(path).is_file():
        raise BundleError(f"{path}: no such file of a Cellpose model.")
    return Cellpose(f"cellpose:{path}", models.CellposeModel(gpu=False, pretrained_model=path))


def open_stardist(path: str) -> StarDist:
    """Open a model folder of StarDist: ``config.json``, weights, ``thresholds.json``.

    Raises
    ------
    ConfigError
        StarDist is not installed.
    BundleError
        There is no such folder.
    """
    models = _require("stardist", "stardist.models")
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise BundleError(f"{path}: no folder of a StarDist model: it holds no config.json.")
    model = models.StarDist2D(None, name=folder.resolve().name, basedir=str(folder.resolve().parent))
    return StarDist(f"stardist:{path}", model)


def _require(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a broken torchvision raises RuntimeError
        raise ConfigError(
            f"{extra}: cannot be imported ({error}). Install it: pip install 'medseg[{extra}]'."
        ) from error


def _picture(image: Volume, name: str) -> Array:
    if image.shape[2] != 1:
        raise DataError(f"{name}: finds objects in pictures, and the image is a volume. Take one slice.")
    return np.asarray(image.array[..., 0])


def _found(labels: IntArray, diameter: float | None, scores: FloatArray | None = None) -> Found:
    """Return objects numbered without gaps; object n has the n-th score."""
    numbers, inverse = np.unique(labels, return_inverse=True)
    shift = 0 if len(numbers) and numbers[0] == 0 else 1
    ids = numbers[numbers > 0].astype(np.int64)
    values = np.full(len(ids), np.nan) if scores is None else scores[ids - 1]
    table = (inverse.reshape(labels.shape) + shift).astype(np.int32)
    return Found(table, values.astype(np.float32), diameter, 0, ())
