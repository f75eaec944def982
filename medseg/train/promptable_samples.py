"""What a promptable network is fine-tuned on: slices with an object, encoded once, one file a case.

A case's file holds, for each sample n, ``mask/n`` and ``near/n``: the object on this slice and on a
neighbouring one, in the sample's field. For each field e it holds ``features/e``: its embedding, or its grey
values where the encoder is trained too. Nothing else of an image is needed any more, so data sets of any size
fit.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor

from medseg import log
from medseg.errors import ConfigError, DatasetError
from medseg.files import atomic_path
from medseg.geometry.orient import to_ras
from medseg.io import Case, read_image, read_label
from medseg.labels import LabelSet, LabelValue
from medseg.metrics.overlap import mask_of
from medseg.nets.sam import Sam
from medseg.prompt.embeddings import EmbeddingCache
from medseg.prompt.rasterise import mask_box
from medseg.prompt.regions import Region
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.prompt.segmenter import SliceSegmenter
from medseg.prompt.simulate import acquisition_axis
from medseg.prompt.slicewise import Zoom, crop_around
from medseg.prompt.windows import choose_window
from medseg.train.promptable_config import PromptableConfig
from medseg.types import Array, BoolArray


@dataclass(frozen=True, eq=False)
class ObjectOnSlice:
    """An object on one slice: its mask (rows, columns) of the whole slice."""

    label: str
    index: int
    mask: BoolArray


@dataclass(frozen=True, eq=False)
class TuneCase:
    """An image with its reference labels, both turned to RAS.

    Attributes
    ----------
    labels : (i, j, k) integers
    values : label value or values by the name of the label
    ignore : label value of voxels that nobody annotated
    axis : across which slices are taken
    """

    name: str
    scene: Scene
    labels: Array
    values: dict[str, LabelValue]
    ignore: int | None
    axis: int

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a slice."""
        return plane_size(self.scene.shape, self.axis)

    @property
    def spacing(self) -> tuple[float, float]:
        """Of rows and columns."""
        rows, columns = (size for a, size in enumerate(self.scene.spacing) if a != self.axis)
        return rows, columns

    def slice_labels(self, index: int) -> Array:
        """Return the labels of a slice, (rows, columns)."""
        return np.asarray(self.labels.take(index, self.axis))

    def mask(self, index: int, label: str) -> BoolArray:
        """Return one label on a slice."""
        return mask_of(self.slice_labels(index), self.values[label])

    def slices(self, least: int) -> list[int]:
        """Return the slices on which a label has `least` voxels."""
        others = tuple(a for a in range(3) if a != self.axis)
        counts = [
            np.count_nonzero(mask_of(self.labels, value), axis=others) for value in self.values.values()
        ]
        return np.flatnonzero(np.max(counts, axis=0) >= least).tolist()

    def objects(self, index: int, config: PromptableConfig) -> Iterator[ObjectOnSlice]:
        """Yield what a user could point at on a slice."""
        for label in self.values:
            mask = self.mask(index, label)
            if config.objects == "components":
                parts, count = ndimage.label(mask, np.ones((3, 3)))
                masks = [parts == part for part in range(1, count + 1)]
            else:
                masks = [mask]
            for each in masks:
                if np.count_nonzero(each) >= config.least_voxels and not self._is_unsure(index, each):
                    yield ObjectOnSlice(label, index, each)

    def _is_unsure(self, index: int, mask: BoolArray) -> bool:
        """Return whether voxels beside an object are not annotated, so that its border is not known."""
        if self.ignore is None:
            return False
        return bool((self.slice_labels(index) == self.ignore)[ndimage.binary_dilation(mask)].any())


def wanted_labels(labels: LabelSet, config: PromptableConfig) -> dict[str, LabelValue]:
    """Return the labels to point at.

    Raises
    ------
    ConfigError
        The data set has no such label.
    """
    known = labels.foreground
    for name in config.labels:
        if name not in known:
            raise ConfigError(f"labels {name!r}: the dataset has {', '.join(known)}.")
    return {name: value for name, value in known.items() if not config.labels or name in config.labels}


def open_case(case: Case, labels: LabelSet, config: PromptableConfig) -> TuneCase:
    """Read a case, and look at it through the window that shows its objects.

    Raises
    ------
    ConfigError
        The image has several channels and none was chosen.
    DatasetError
        Image and labels differ in shape.
    """
    image, reference = read_image(case), read_label(case)
    if image.channels > 1 and (config.channel is None or config.channel >= image.channels):
        raise ConfigError(
            f"{case.name}: the image has {image.channels} channels, prompting takes one. "
            f"Set channel=N, from 0 to {image.channels - 1}."
        )
    if image.channels > 1:
        image = image.with_array(image.array[config.channel])
    if image.shape != reference.shape:
        raise DatasetError(
            f"{case.name}: image {image.shape} and labels {reference.shape} differ. Check both."
        )
    turned = to_ras(image)
    array = to_ras(reference).array[0]
    values = wanted_labels(labels, config)
    region = Region.of(np.isin(array, [v for value in values.values() for v in np.atleast_1d(value)]))
    scene = Scene.of(turned, choose_window(turned, config.window, region=region))
    axis = acquisition_axis(scene.spacing) if config.axis == "auto" else config.axis
    return TuneCase(case.name, scene, array, values, labels.ignore, axis)


def drawn_for(name: str, config: PromptableConfig, *more: int) -> np.random.Generator:
    """Return a generator that depends on the seed and a case only."""
    return np.random.default_rng((config.seed, zlib.crc32(name.encode()), *more))


def field_of(mask: BoolArray, plane: tuple[int, int], view: str) -> Rectangle:
    """Return what the network sees: the crop in which an object is followed, or the slice."""
    return crop_around([mask_box(mask)], plane, Zoom()) if view == "crop" else (0, 0, *plane)


@dataclass(frozen=True, eq=False)
class Sample:
    """One object on one slice, as the network sees it.

    Attributes
    ----------
    features : (256, h, w) embedding, or (rows, columns) grey values where the encoder is trained
    mask, near : (rows, columns) of the field: the object here, and on a neighbouring slice
    spacing : of rows and columns in mm
    """

    features: Tensor
    mask: BoolArray
    near: BoolArray
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Store:
    """Files of prepared cases."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return the file of a case."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def prepare(self, case: Case, labels: LabelSet, model: Sam, config: PromptableConfig, key: str) -> int:
        """Write the file of a case, unless it is there; return how many samples it holds.

        Parameters
        ----------
        key : what the file depends on besides the case and the settings, that is the weights
        """
        images = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in (*case.images, case.label) if p]
        parts = [images, key, _settings(config)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        known = self._notes(case.name)
        if known is None or known["key"] != key:
            opened = open_case(case, labels, config)
            known = _write(self.path(case.name), opened, model, config, key)
        return len(known["samples"])

    def count(self, name: str) -> int:
        """Return how many samples the file of a case holds; 0 without one."""
        notes = self._notes(name)
        return 0 if notes is None else len(notes["samples"])

    def load(self, name: str, number: int) -> Sample:
        """Return a sample of a case."""
        with safe_open(self.path(name), "pt") as file:
            notes = json.loads(file.metadata()["notes"])
            features = file.get_tensor(f"features/{notes['samples'][number]['features']}")
            mask, near = (file.get_tensor(f"{part}/{number}").numpy() > 0 for part in ("mask", "near"))
        rows, columns = notes["spacing"]
        return Sample(features, mask, near, (rows, columns))

    def _notes(self, name: str) -> dict[str, Any] | None:
        try:
            with safe_open(self.path(name), "pt") as file:
                found: dict[str, Any] = json.loads(file.metadata()["notes"])
                return found
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None  # missing, or damaged: it is made again


def _settings(config: PromptableConfig) -> dict[str, Any]:
    """Return the settings that samples depend on."""
    return config.model_dump(
        mode="json",
        include={
            *("base", "size", "precision", "labels", "objects", "axis", "window", "channel"),
            *("slices_per_case", "views", "least_voxels", "seed"),
        },
    ) | {"encoder": config.lora.rank > 0}


def _write(path: Path, case: TuneCase, model: Sam, config: PromptableConfig, key: str) -> dict[str, Any]:
    generator = drawn_for(case.name, config)
    possible = case.slices(config.least_voxels)
    count = min(config.slices_per_case, len(possible))
    chosen = sorted(generator.choice(possible, count, replace=False).tolist()) if possible else []
    segmenter = SliceSegmenter(model, case.scene, EmbeddingCache(), config.size, config.precision)
    tensors: dict[str, Tensor] = {}
    samples: list[dict[str, Any]] = []
    fields: dict[tuple[int, Rectangle], int] = {}
    for index in chosen:
        log.check_cancelled()
        for found in case.objects(index, config):
            near = _near(case, found, generator)
            for field in dict.fromkeys(field_of(found.mask, case.plane, view) for view in config.views):
                if (index, field) not in fields:
                    fields[index, field] = len(fields)
                    features = _features(segmenter, case, index, field, config)
                    tensors[f"features/{fields[index, field]}"] = features
                cut = (slice(field[0], field[2]), slice(field[1], field[3]))
                for part, mask in (("mask", found.mask), ("near", near)):
                    tensors[f"{part}/{len(samples)}"] = torch.from_numpy(mask[cut].astype(np.uint8))
                known = {"features": fields[index, field], "label": found.label, "index": index}
                samples.append(known)
    notes = {"key": key, "samples": samples, "spacing": list(case.spacing)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"notes": json.dumps(notes)})
    return notes


def _features(
    segmenter: SliceSegmenter, case: TuneCase, index: int, field: Rectangle, config: PromptableConfig
) -> Tensor:
    if config.lora.rank:
        return torch.from_numpy(case.scene.slice(case.axis, index, field).astype(np.uint8))
    # half is more exact than the bf16 in which the encoder ran
    return segmenter.embed(case.axis, index, field)[0].half().cpu()


def _near(case: TuneCase, found: ObjectOnSlice, generator: np.random.Generator) -> BoolArray:
    """Return the object on the slice before or after, or it somewhat grown where it is on neither."""
    step = 1 if generator.random() < 0.5 else -1
    for index in (found.index + step, found.index - step):
        if 0 <= index < case.scene.shape[case.axis]:
            near = case.mask(index, found.label) & ndimage.binary_dilation(found.mask, iterations=3)
            if np.count_nonzero(near) * 4 > np.count_nonzero(found.mask):
                return np.asarray(near)
    return np.asarray(ndimage.binary_dilation(found.mask))


def list_samples(store: Store, names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the samples of prepared cases as (case, number).

    Raises
    ------
    DatasetError
        There is none.
    """
    found = [(name, number) for name in names for number in range(store.count(name))]
    if not found:
        raise DatasetError(
            "no slice of the training cases holds an object that is large enough. Check `labels`, or lower "
            "least_voxels."
        )
    return found
