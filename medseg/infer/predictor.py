"""Volume and bundles to a label map on the source grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medseg
from medseg.bundle import Bundle
from medseg.errors import BundleError, ConfigError
from medseg.geometry.orient import from_ras, reads_as_ras
from medseg.geometry.tiles import tile_starts
from medseg.infer.ensemble import Output, combine
from medseg.infer.runtime import Runtime, choose_runtime, count_threads
from medseg.infer.sliding import Room, Window, in_half_or_single
from medseg.labels import LabelSet
from medseg.preprocess import Preprocessed, Record, preprocess, preprocess_labels
from medseg.preprocess.bricks import Way
from medseg.preprocess.restore import restore_labels, restore_probabilities
from medseg.segmentation import Segmentation
from medseg.types import FloatArray, PathLike, Shape
from medseg.volume import Volume


@dataclass(frozen=True)
class Options:
    """How to predict; what is None follows the bundle's card.

    Attributes
    ----------
    mirror : average over flips of the axes that the bundle allows (card ``mirroring``, else yes)
    precision : auto, fp32, bf16 or fp16 (card ``precision``, else fp32)
    device : auto, cpu, cuda, cuda:N, mps
    runtime : torch, openvino, or auto: on a CPU the faster of both, where there is enough work to find out
    step : distance of tiles as a part of the patch
    compatible : float16 sums with nnU-Net's roundings, else float32
    threads : CPU threads; None uses every core that this process may use
    folds : of every bundle; None averages all
    skip_air : leave out tiles that hold only the image's minimum or padding, and call background what no
        other tile covers. Exact where a model finds nothing in air; off by default since a network may
        mark some there. (Tiles of one constant value are always computed once only, which changes nothing.)
    """

    mirror: bool | None = None
    precision: str | None = None
    device: str = "auto"
    step: float = 0.5
    compatible: bool = True
    threads: int | None = None
    folds: tuple[str, ...] | None = None
    skip_air: bool = False
    runtime: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ConfigError(f"step {self.step}: expected more than 0 and at most 1 patch.")


class Predictor:
    """One or several models, loaded once, used for any number of volumes.

    Parameters
    ----------
    bundles : one, or several whose probabilities are averaged; all with the same labels
    options : see :class:`Options`; keyword arguments make one

    Raises
    ------
    BundleError
        There is none, their labels differ, or weights do not fit.
    ConfigError
        An option is out of range or the device is not there.
    """

    def __init__(
        self, bundles: Sequence[Bundle] | Bundle, options: Options | None = None, **changes: Any
    ) -> None:
        self.bundles = _list_bundles(bundles)
        self.options = options or Options(**changes)
        _check(self.bundles)
        self.models = [Model(bundle, self.options) for bundle in self.bundles]

    @property
    def channels(self) -> tuple[str, ...]:
        """What each channel of an image must be."""
        return self.bundle.plan.channels

    @property
    def labels(self) -> LabelSet:
        """Meaning of the result's integers."""
        return self.bundle.labels

    @property
    def bundle(self) -> Bundle:
        """The first bundle: its plan names the channels and labels."""
        return self.bundles[0]

    def prepare(self, volume: Volume) -> list[Preprocessed]:
        """Return what each model needs of a volume; may run in another thread."""
        prepared: dict[str, Preprocessed] = {}
        for model in self.models:
            if model.key not in prepared:
                prepared[model.key] = preprocess(volume, model.bundle.plan, model.bundle.configuration)
        return [prepared[model.key] for model in self.models]

    def logits(self, data: FloatArray) -> FloatArray:
        """Return logits of the first model for a preprocessed (c, a0, a1, a2) array, mean over folds.

        Returns
        -------
        (n_outputs, a0, a1, a2) float16
        """
        return self.models[0].logits(data)

    def segment(
        self, volume: Volume, probabilities: PathLike | None = None, previous: Volume | None = None
    ) -> Segmentation:
        """Segment one volume.

        Parameters
        ----------
        volume : one channel for each of the plan's
        probabilities : ``.npz`` file to write class probabilities to
        previous : label map of a cascade's first stage on the grid of `volume`, instead of predicting it

        Returns
        -------
        Segmentation
            On the grid of `volume`.
        """
        return self.segment_prepared(volume, self.prepare(volume), probabilities, previous)

    def segment_prepared(
        self,
        volume: Volume,
        prepared: Sequence[Preprocessed],
        probabilities: PathLike | None = None,
        previous: Volume | None = None,
    ) -> Segmentation:
        """Like :meth:`segment`, with the result of :meth:`prepare`."""
        path = None if probabilities is None else Path(probabilities)
        result = self._finish(self._restore(volume, prepared, path, previous))
        if result.geometry != volume.geometry:  # the reader of nnU-Net's plan turns images to RAS
            result = from_ras(result, volume.geometry)
        return Segmentation(result, self.labels, self.provenance(), path)

    def _restore(
        self, volume: Volume, prepared: Sequence[Preprocessed], path: Path | None, previous: Volume | None
    ) -> Volume:
        """Return labels on the source grid: of one model in one stream, of several on their mean."""
        cases = list(zip(self.models, prepared, strict=True))
        if len(cases) == 1:
            model, case = cases[0]
            return model.restore(model.data(volume, case, previous), case.record, path)
        outputs = []
        for model, case in cases:
            logits = model.logits(model.data(volume, case, previous), case.record)
            outputs.append(Output(logits, case.record, model.bundle.settings))
        return combine(outputs, self.labels, path)

    def provenance(self) -> dict[str, Any]:
        """Return models, versions and settings as plain data."""
        return {
            "medseg": medseg.__version__,
            "torch": torch.__version__,
            "models": [model.provenance() for model in self.models],
            "device": str(self.models[0].runtime.device),
            "step": self.options.step,
            "compatible": self.options.compatible,
        }

    def _finish(self, result: Volume) -> Volume:
        """Apply the post-processing that was chosen for this model alone, or for these models together."""
        wanted = dict(self.bundle.postprocessing or {})
        together = bool(wanted.pop("ensemble", False))
        agreed = all(bundle.postprocessing == self.bundle.postprocessing for bundle in self.bundles)
        if not wanted or not agreed or together != (len(self.bundles) > 1):
            return result
        from medseg.postprocess import Postprocessing, apply

        done = apply(result, Postprocessing.from_dict(wanted, f"{self.bundle}: postprocessing"))
        assert isinstance(done, Volume)
        return done


@dataclass
class Model:
    """One bundle in use: its networks are loaded when first needed and kept."""

    bundle: Bundle
    options: Options
    networks: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    work_voxels: int | None = None
    room: Room = field(default_factory=Room)

    def __post_init__(self) -> None:
        card = self.bundle.card
        precision = self.options.precision or str(card.get("precision", "fp32"))
        self.runtime: Runtime = choose_runtime(self.options.device, precision, self.options.runtime)
        wanted = self.options.mirror if self.options.mirror is not None else card.get("mirroring", True)
        self.mirror_axes = self.bundle.mirror_axes if wanted else ()
        self.threads = count_threads(self.options.threads)
        self.folds = self.options.folds or self.bundle.folds
        previous = self.bundle.previous
        first_stage = replace(self.options, folds=None)  # its folds are not this model's
        self.previous = None if previous is None else Predictor(previous, first_stage)
        _check_model(self)

    @property
    def key(self) -> str:
        """Equal for models that want the same preprocessing."""
        plan, settings = self.bundle.plan, self.bundle.settings
        parts = (settings.spacing, settings.normalization, settings.use_mask_for_norm, settings.order_data)
        turned = reads_as_ras(plan.reader)
        return repr((parts, plan.transpose_forward, plan.intensity, settings.order_z, turned))

    def window(self, record: Record | None = None) -> Window:
        """Return how the networks go over a case; without a record every axis of the bundle is flipped."""
        settings = self.bundle.settings
        return Window(
            [self._callable(fold) for fold in self.folds],
            settings.patch_size,
            self.bundle.labels.n_outputs,
            self.mirror_axes if record is None else self.mirrored(record),
            self.options.step,
            self.runtime.device,
            self.threads,
            self.options.skip_air,
            room=self.room,
        )

    def data(self, volume: Volume, case: Preprocessed, previous: Volume | None = None) -> FloatArray:
        """Return what the networks see; a cascade takes `previous`, or predicts its first stage."""
        if not self.bundle.settings.previous_stage:
            return case.data
        first = self._first_stage(volume) if previous is None else previous
        return self._cascade_input(volume, case, first)

    def logits(self, data: FloatArray, record: Record | None = None) -> FloatArray:
        """Return the mean logits of all folds at once: their float16 sum, divided as nnU-Net does.

        Without `record` the bundle's mirror axes are flipped, which suits labels without sides.
        """
        self._expect(data.shape[1:])
        window = self.window(record)
        return in_half_or_single(lambda dtype: window.whole(data, dtype), self.options.compatible)

    def restore(self, data: FloatArray, record: Record, path: Path | None) -> Volume:
        """Return labels on the source grid; logits stream through and are never held as a whole."""
        self._expect(data.shape[1:])
        window, labels, settings = self.window(record), self.bundle.labels, self.bundle.settings
        cut = Way.back(record, settings).streams

        def once(dtype: torch.dtype) -> Volume:
            blocks = window.blocks(data, dtype, cut)
            if path is None:
                return restore_labels(blocks, record, labels, settings)
            return restore_probabilities(blocks, record, labels, settings, path)

        return in_half_or_single(once, self.options.compatible)

    def _cascade_input(self, volume: Volume, case: Preprocessed, first: Volume) -> FloatArray:
        """Return the image's channels and one a label of the first stage, as nnU-Net feeds them.

        nnU-Net preprocesses the first stage's labels as if they were the reference segmentation, so where
        statistics leave out the outside of the image, what is labelled there counts as inside.
        """
        settings, data = self.bundle.settings, case.data
        if any(settings.use_mask_for_norm):
            again = preprocess(volume, self.bundle.plan, self.bundle.configuration, first)
            assert again.seg is not None  # a label map was given
            data, labels = again.data, again.seg
        else:
            labels = preprocess_labels(first, case.record, settings, volume)
        values = self.bundle.labels.foreground_values
        channels = [(labels[0] == value).astype(np.float32) for value in values]
        return np.concatenate([data, np.stack(channels)])

    def _first_stage(self, volume: Volume) -> Volume:
        if self.previous is None:
            name = self.bundle.settings.previous_stage
            raise BundleError(
                f"{self.bundle}: {self.bundle.configuration} needs its first stage {name}, which is not "
                "with it. Give the model with --previous MODEL, or label maps with --previous-labels FOLDER."
            )
        return self.previous.segment(volume).volume

    def mirrored(self, record: Record) -> tuple[int, ...]:
        """Return the patch axes to flip for a case: with sided labels never its own left-right axis.

        The bundle knows how the training images lay; this case may lie otherwise.
        """
        if not self.bundle.keeps_sides:
            return self.mirror_axes
        left_right = record.left_right_axis - (3 - self.bundle.settings.dimensions)
        return tuple(axis for axis in self.mirror_axes if axis != left_right)

    def _expect(self, shape: Shape) -> None:
        """Note how much work a case is: it decides whether measuring runtimes is worth it."""
        voxels = _tiled_voxels(shape, self.bundle.settings.patch_size, self.options.step)
        self.work_voxels = voxels * 2 ** len(self.mirror_axes) * len(self.folds)

    def _callable(self, fold: str) -> Callable[[Tensor], Any]:
        if fold not in self.networks:
            bundle = self.bundle
            ready = self.runtime.prepare(
                bundle.network(fold).to(self.runtime.device),
                bundle.settings.patch_size,
                bundle.in_channels,
                self.threads,
                n_outputs=bundle.labels.n_outputs,
                work_voxels=self.work_voxels,
            )
            self.runtime = ready.runtime  # all folds run in the same one
            self.networks[fold] = ready
        return self.networks[fold]

    def provenance(self) -> dict[str, Any]:
        """Return what this model is and how it runs, as plain data."""
        return {
            "bundle": str(self.bundle),
            "sha256": self.bundle.digest,
            "configuration": self.bundle.configuration,
            "folds": list(self.folds),
            "mirror_axes": list(self.mirror_axes),
            "precision": self.runtime.precision,
            "runtime": self.runtime.backend,
        }


def _tiled_voxels(shape: Shape, patch_size: Shape, step: float) -> int:
    """Return the voxels of all tiles of a volume together."""
    slices = prod(shape[: len(shape) - len(patch_size)])
    axes = zip(shape[len(shape) - len(patch_size) :], patch_size, strict=True)
    return slices * prod(len(tile_starts(max(size, patch), patch, step)) * patch for size, patch in axes)


def _list_bundles(given: Any) -> tuple[Bundle, ...]:
    """Return one bundle or several as a tuple; refuse paths, and models of MONAI, which have no plan."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    bundles = tuple(given) if several else (given,)
    for each in bundles:
        if not isinstance(each, Bundle):
            raise BundleError(
                f"{each}: expected a bundle. Open a path with medseg.load_model first; a model of MONAI is "
                "for medseg.infer.make_predictor([model])."
            )
        if each.task != "segment":
            raise BundleError(
                f"{each}: finds objects ({each.task}), not labels. "
                f"Use medseg {_command(each)} --model {each}."
            )
    return bundles


def _command(bundle: Bundle) -> str:
    """Return the command for a network of objects: panoptic, where it knows stuff as well."""
    settings = bundle.card.get("settings", {})
    stuff = settings.get("classes", 2) - 1 > len(settings.get("things", (1,)))
    return "panoptic" if stuff else "count"


def _check(bundles: Sequence[Bundle]) -> None:
    if not bundles:
        raise BundleError("no bundle was given. Pass at least one with -m.")
    first = bundles[0]
    for other in bundles[1:]:
        if other.labels != first.labels:
            raise BundleError(
                f"{other}: its labels are not those of {first}. Average models of one label set."
            )
        if len(other.plan.channels) != len(first.plan.channels):
            raise BundleError(f"{other}: takes other channels than {first}. Average models of one dataset.")
        if reads_as_ras(other.plan.reader) != reads_as_ras(first.plan.reader):
            raise BundleError(f"{other}: turns images to RAS, or {first} does, and the other does not.")


def _check_model(model: Model) -> None:
    bundle = model.bundle
    if bundle.settings.detection is not None:
        raise BundleError(
            f"{bundle}: finds objects, and does not segment. Open it with medseg.instances.detect.Detector."
        )
    if not model.folds:
        raise BundleError(f"{bundle}: has no weights yet. Train at least one fold.")
    for fold in model.folds:
        if fold not in bundle.weights:
            raise BundleError(f"{bundle}: no fold {fold!r}. It has {', '.join(bundle.folds)}.")
