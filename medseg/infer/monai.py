"""A MONAI bundle over a volume: MONAI's own transforms and inferer, and labels on the source grid.

The transforms, the sliding window and their inversion are MONAI's classes, so numbers are MONAI's. What is
ours is the order of the work: outputs go back to the source grid a few classes at a time, so that memory
holds two volumes and not one for each of a hundred classes.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import medseg
from medseg import log
from medseg.errors import BundleError, ConfigError, DataError, MedsegError
from medseg.exchange.monai_in import MonaiModel, build_inferer, build_network, build_transform
from medseg.files import atomic_path, scratch_folder
from medseg.infer.predictor import Options
from medseg.infer.runtime import Runtime, choose_runtime, count_threads, torch_threads
from medseg.labels import LabelSet
from medseg.postprocess import keep_largest
from medseg.segmentation import Segmentation
from medseg.types import FloatArray, IntArray, PathLike
from medseg.volume import Geometry, Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

# Classes on their way back at once, with the float64 copy that MONAI's resampling makes of them.
CHUNK_BYTES = 1 << 30
BYTES_PER_VALUE = 16
# What preprocessing may make of an image: 16 GB of float32.
MOST_VOXELS = 1 << 32
# Part of a voxel size: reading turns a column by less than 1e-12; float32 numbers that are not its own miss
# it by about 1e-9 or more.
HEADER_TOLERANCE = 1e-11
MILLIMETRES = {"mm": 1.0, "micron": 1e-3}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A preprocessed image, which remembers what was done to it, and the transforms that can undo that."""

    image: "MetaTensor"
    transform: Any


@dataclass(eq=False)
class MonaiPredictor:
    """One bundle, loaded once, used for any number of volumes.

    Parameters
    ----------
    model : from `medseg.exchange.monai_in.load_monai_bundle`
    options : device, precision and threads count. Tiles overlap as the bundle says, and nothing is mirrored

    Raises
    ------
    ConfigError
        Folds or mirroring are asked for, which a MONAI bundle does not have, or the device is not there.
    """

    model: MonaiModel
    options: Options = field(default_factory=Options)
    runtime: Runtime = field(init=False)
    threads: int = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        if options.folds:
            raise ConfigError(f"{self.model}: a MONAI bundle has one network and no folds. Leave --fold out.")
        if options.mirror:
            raise ConfigError(f"{self.model}: a MONAI bundle does not say which axes may be mirrored.")
        if options.step != Options().step:
            log.logger.warning("%s: tiles overlap as the bundle says; --step is ignored.", self.model)
        if getattr(options, "runtime", "torch") == "openvino":
            log.logger.warning("%s: MONAI bundles run on torch; --runtime is ignored.", self.model)
        self.runtime = choose_runtime(options.device, options.precision or "fp32")
        if options.precision is None and self.model.amp and self.runtime.device.type == "cuda":
            self.runtime = choose_runtime(options.device, "fp16")  # as MONAI's evaluator would
        self.threads = count_threads(options.threads)
        self._network: nn.Module | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that an image must have."""
        return self.model.channels

    @property
    def labels(self) -> LabelSet:
        """Meaning of the label maps."""
        return self.model.labels

    def provenance(self) -> dict[str, Any]:
        """Return model, versions and settings as plain data."""
        import monai

        autocast = self.runtime.autocast
        entry = {
            "bundle": str(self.model),
            "sha256": self.model.digest,
            "network": self.model.network.name,
            "precision": "fp32" if autocast is None else str(autocast).removeprefix("torch."),
        }
        return {
            "medseg": medseg.__version__,
            "torch": torch.__version__,
            "monai": monai.__version__,
            "models": [entry],
            "device": str(self.runtime.device),
            "step": None,
            "compatible": False,
        }

    def prepare(self, volume: Volume) -> Prepared:
        """Apply the bundle's preprocessing; may run in another thread.

        Raises
        ------
        DataError
            The image has other channels than the bundle, or would become too large.
        """
        from monai.transforms import Compose

        if volume.channels != len(self.channels):
            raise DataError(
                f"image has {volume.channels} channel{'s' * (volume.channels != 1)}, "
                f"{self.model} expects {len(self.channels)} "
                f"({', '.join(self.channels)}). Give one file for each, in this order."
            )
        self._check_size(volume)
        # Made anew for each image: while one is undone in another thread, a transform records nothing.
        transform = Compose([build_transform(call) for call in self.model.preprocessing])
        try:
            return Prepared(transform({"image": _to_metatensor(volume)})["image"], transform)
        except (MedsegError, MemoryError):
            raise
        except Exception as error:  # of MONAI's code, for arguments from outside
            raise DataError(
                f"{self.model}: its preprocessing does not take this image of {volume.shape} voxels "
                f"({_first_line(error)}). Check that it is of the kind the bundle is for."
            ) from error

    def segment(
        self, volume: Volume, probabilities: PathLike | None = None, previous: Volume | None = None
    ) -> Segmentation:
        """Segment one volume; `probabilities` is an ``.npz`` file to write to.

        Returns
        -------
        Segmentation
            On the grid of `volume`.
        """
        return self.segment_prepared(volume, self.prepare(volume), probabilities, previous)

    def segment_prepared(
        self,
        volume: Volume,
        prepared: Prepared,
        probabilities: PathLike | None = None,
        previous: Volume | None = None,
    ) -> Segmentation:
        """Like :meth:`segment`, with the result of :meth:`prepare`."""
        if previous is not None:
            raise ConfigError(f"{self.model}: a MONAI bundle has no first stage. Leave --previous out.")
        with torch.inference_mode(), torch_threads(self.threads):
            outputs = self._outputs(prepared)
            way = _WayBack(prepared, volume, self.model)
            decision, path = self.model.decision, None if probabilities is None else Path(probabilities)
            early = not (decision.activate_last or decision.of_logits)
            if early:
                _activate(outputs, decision.activation)
            array = self._labels(outputs, way)
            if path is not None:
                if not early or decision.activation is None:
                    _activate(outputs, decision.probable)
                self._write_probabilities(outputs, way, path)
        return Segmentation(volume.with_array(array), self.labels, self.provenance(), path)

    def _check_size(self, volume: Volume) -> None:
        for call in self.model.preprocessing:
            if call.name == "Spacingd":
                sizes = np.resize(np.atleast_1d(np.asarray(call.arguments["pixdim"], dtype=float)), 3)
                millimetres = volume.geometry.voxel_volume * MILLIMETRES[volume.geometry.unit] ** 3
                voxels = prod(volume.shape) * millimetres / prod(sizes)
                if voxels > MOST_VOXELS:
                    raise DataError(
                        f"{self.model}: at its voxel size this image would have {voxels:.2g} voxels. Crop it."
                    )

    # --- the network

    def _outputs(self, prepared: Prepared) -> Tensor:
        """Return the network's outputs (n, a0, a1, a2) float32 on the CPU.

        Where the device has no room for them, they are put together on the CPU, one tile at a time.
        """
        image = prepared.image.as_tensor().float()[None]
        device = self.runtime.device
        try:
            outputs = self._run(image.to(device), {"sw_device": device, "device": device})
        except torch.OutOfMemoryError:
            log.logger.warning("Memory of %s ran out: tiles are put together on the CPU.", device)
            outputs = self._run(image, {"sw_device": device, "device": "cpu", "sw_batch_size": 1})
        expected = (self.model.outputs, *image.shape[2:])
        if tuple(outputs.shape[1:]) != expected:
            raise BundleError(
                f"{self.model}: the network returned {tuple(outputs.shape[1:])} instead of {expected}. Its "
                "inferer or its network_def does not fit."
            )
        if not bool(torch.isfinite(outputs).all()):
            raise BundleError(
                f"{self.model}: the network returned numbers that are not finite. Predict with precision "
                "fp32; if that fails too, the weights are damaged."
            )
        return outputs[0].float().cpu()

    def _run(self, image: Tensor, places: dict[str, Any]) -> Tensor:
        inferer = build_inferer(self.model.inferer, **places)
        network = self._load()
        with log.task("Predict tiles", _count_tiles(inferer, image)) as task:

            def call(batch: Tensor) -> Tensor:
                with self.runtime.context():
                    result = network(batch)
                task.advance()
                logits: Tensor = result[0] if isinstance(result, list | tuple) else result
                return logits.float()

            try:
                outputs: Tensor = inferer(image, call)
            except (torch.OutOfMemoryError, MedsegError):
                raise
            except (RuntimeError, ValueError) as error:
                raise BundleError(
                    f"{self.model}: the network cannot take an image of {tuple(image.shape[2:])} voxels "
                    f"({_first_line(error)}). Its inferer or its network_def does not fit."
                ) from error
        return outputs

    def _load(self) -> nn.Module:
        """Return the network with its weights; they are read once."""
        if self._network is None:
            call = self.model.network
            weights = self.model.weights()
            try:
                network = build_network(call)
                network.load_state_dict(weights)
            except Exception as error:  # of MONAI's or an optional package's code, for arguments from outside
                lines = str(error).strip().split("\n")
                raise BundleError(
                    f"{self.model}: the weights do not fit the {call.name} of its network_def "
                    f"({lines[1 if len(lines) > 1 else 0].strip()[:200]}). Get the bundle's own weights."
                ) from error
            self._network = network.eval().to(self.runtime.device)
        return self._network

    # --- the way back

    def _labels(self, outputs: Tensor, way: "_WayBack") -> IntArray:
        """Return (1, i, j, k) labels on the source grid."""
        decision = self.model.decision
        if decision.decide_first:
            inner = self._decide(iter([(slice(0, len(outputs)), outputs)]), outputs.shape[1:])
            for group in decision.largest_before:
                inner = keep_largest(inner, group)
            labels = way(torch.from_numpy(inner[None].astype(np.float32)), nearest=True)
            array: IntArray = labels[0].round().numpy().astype(self.labels.dtype)
        else:
            array = self._decide(way.chunks(outputs, decision.nearest), way.shape)
        for group in decision.largest_after:
            array = keep_largest(array, group)
        return array[None]

    def _decide(self, chunks: Iterator[tuple[slice, Tensor]], shape: tuple[int, ...]) -> IntArray:
        """Decide on outputs that come a few at a time."""
        decision = self.model.decision
        if decision.threshold is None:
            return self._decide_largest(chunks, shape)
        masks = {}
        for part, values in chunks:
            if decision.activate_last:
                _activate(values, decision.activation)
            hits = values >= decision.threshold
            masks.update({part.start + number: mask.numpy() for number, mask in enumerate(hits)})
        painted = np.zeros(tuple(shape), self.labels.dtype)
        for output, label in decision.painting:
            painted[masks[output]] = label
        return painted

    def _decide_largest(self, chunks: Iterator[tuple[slice, Tensor]], shape: tuple[int, ...]) -> IntArray:
        """Return the number of the largest output; softmax and sigmoid change nothing about it."""
        best = torch.full(tuple(shape), -torch.inf)
        winner = torch.zeros(tuple(shape), dtype=torch.int32)
        for part, values in chunks:
            most, which = values.max(dim=0)
            better = most > best
            winner[better] = (which[better] + part.start).int()
            torch.maximum(best, most, out=best)
        result: IntArray = winner.numpy().astype(self.labels.dtype)
        return result

    def _write_probabilities(self, outputs: Tensor, way: "_WayBack", path: Path) -> None:
        """Write what nnU-Net writes: ``probabilities`` (n_outputs, k, j, i) float32.

        They are the activated outputs, interpolated to the source grid. Outputs of a sigmoid that are no
        regions get a background that is what the largest of them leaves.
        """
        order = [output for output, _ in self.model.decision.painting]
        shape = (self.labels.n_outputs, *way.shape[::-1])
        maps = outputs[order] if self.model.decision.painting else outputs
        with atomic_path(path) as archive, scratch_folder(path) as folder:
            raw = folder / "probabilities.npy"
            file = np.lib.format.open_memmap(raw, mode="w+", dtype=np.float32, shape=shape)
            extra = shape[0] - len(maps)
            target = file.transpose(0, 3, 2, 1)
            for part, values in way.chunks(maps, nearest=False):
                target[part.start + extra : part.stop + extra] = values.clip(0, 1).numpy()
            if extra:
                target[0] = 1 - target[1:].max(axis=0)
            file.flush()
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
                packed.write(raw, raw.name)


@dataclass(frozen=True, eq=False)
class _WayBack:
    """From the network's grid to the source grid, by undoing the transforms."""

    prepared: Prepared
    volume: Volume
    model: MonaiModel

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the source grid."""
        return self.volume.shape

    def chunks(self, outputs: Tensor, nearest: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield outputs on the source grid, as many at a time as CHUNK_BYTES hold."""
        voxels = max(prod(self.shape), prod(outputs.shape[1:]))
        size = max(1, CHUNK_BYTES // (BYTES_PER_VALUE * voxels))
        for start in range(0, len(outputs), size):
            log.check_cancelled()
            part = slice(start, min(start + size, len(outputs)))
            yield part, self(outputs[part], nearest)

    def __call__(self, values: Tensor, nearest: bool) -> Tensor:
        """Return (c, i, j, k) for values (c, a0, a1, a2).

        Raises
        ------
        BundleError
            The transforms do not lead back to the grid that the image came on.
        """
        from monai.data import MetaTensor
        from monai.transforms import Invertd

        image = self.prepared.image
        if image.applied_operations:
            undo = Invertd("pred", self.prepared.transform, orig_keys="image", nearest_interp=nearest)
            data = undo({"image": image, "pred": MetaTensor(values)})["pred"]
        else:
            data = MetaTensor(values, affine=image.affine)
        scale = MILLIMETRES[self.volume.geometry.unit]
        affine = np.asarray(data.affine, dtype=np.float64) / np.array([scale, scale, scale, 1.0])[:, None]
        there = Geometry(tuple(data.shape[1:]), affine, self.volume.geometry.unit)
        if not there.matches(self.volume.geometry):
            raise BundleError(
                f"{self.model}: undoing its preprocessing leads to a grid of {there.shape}, not to that of "
                f"the image ({self.shape}). Remove the transforms that cannot be undone."
            )
        result: Tensor = data.as_tensor()
        return result


def _to_metatensor(volume: Volume) -> "MetaTensor":
    """Return float32 values with an affine in mm, as MONAI's LoadImage would."""
    tensor = volume.with_array(volume.array.astype(np.float32)).to_metatensor()
    tensor.affine[:3, :] = torch.from_numpy(_as_in_header(volume.geometry.affine)[:3])
    tensor.affine[:3] *= MILLIMETRES[volume.geometry.unit]
    return tensor


def _as_in_header(affine: FloatArray) -> FloatArray:
    """Return the float32 numbers of the NIfTI header that an affine comes from, where it comes from one.

    medseg scales each column of a header's affine to the voxel size in the same header, which changes about
    the eighth digit. MONAI does not, and the ninth digit of an oblique affine decides whether its Spacing
    puts the corners or the centres of two grids on each other (``compute_shape_offset``, an ``allclose``).
    """
    result = affine.copy()
    for axis, column in enumerate(affine[:3, :3].T):
        near = column.astype(np.float32)
        steps = [(x, np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))) for x in near]
        candidates = np.array(list(product(*steps)), dtype=np.float64)
        scaled = candidates * (np.linalg.norm(column) / np.linalg.norm(candidates, axis=1, keepdims=True))
        misses = np.abs(scaled - column).max(axis=1)
        if misses.min() <= HEADER_TOLERANCE * np.linalg.norm(column):
            result[:3, axis] = candidates[misses.argmin()]
    return result


def _activate(outputs: Tensor, kind: str | None) -> None:
    """Apply softmax or sigmoid in place, a row at a time: a second tensor of all classes may not fit."""
    for row in outputs.unbind(dim=1) if kind else ():
        row.copy_(row.softmax(dim=0) if kind == "softmax" else row.sigmoid())


def _count_tiles(inferer: Any, image: Tensor) -> int | None:
    """Return how many batches MONAI's sliding window will send, or None where it is not one.

    Source: MONAI ``inferers/utils.py``, ``_get_scan_interval`` and ``dense_patch_slices``.
    """
    roi = getattr(inferer, "roi_size", None)
    size = tuple(image.shape[2:])
    if roi is None:
        return None
    if hasattr(inferer, "spatial_dim"):
        roi = [*np.atleast_1d(roi)]
        roi.insert(inferer.spatial_dim, 1)
    patch = [int(p) if p and p > 0 else n for p, n in zip(np.resize(roi, 3), size, strict=True)]
    tiles = 1
    for n, p, overlap in zip(size, patch, np.resize(inferer.overlap, 3), strict=True):
        tiles *= 1 if n <= p else ceil((n - p) / max(1, int(p * (1 - overlap)))) + 1
    return ceil(tiles / int(inferer.sw_batch_size))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
