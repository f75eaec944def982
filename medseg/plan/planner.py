"""From a fingerprint to a plan: nnU-Net's decisions, and the budgets that it lacks."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from medseg.config import Config
from medseg.errors import DatasetError, PlanError
from medseg.labels import LabelSet
from medseg.plan import topology as topo
from medseg.plan.presets import Rules, change_rules, default_preset, read_preset
from medseg.plan.schema import (
    Configuration,
    Fingerprint,
    Normalization,
    Plan,
    PlanOptions,
    Preset,
)
from medseg.plan.spacing import (
    LOWRES_MIN_REDUCTION,
    LOWRES_SHARE,
    choose_spacing,
    choose_transpose,
    coarsen,
    coarsen_to,
    invert,
    median_shape,
    permute,
    rescale_shape,
)
from medseg.types import PathLike, Spacing

if TYPE_CHECKING:
    from medseg.io import Dataset

logger = logging.getLogger("medseg")

# Channel names (casefolded) that choose their normalisation; every other one is z-scored
# (nnU-Net `channel_name_to_normalization_mapping`).
NORMALIZATION_OF_CHANNEL: dict[str, Normalization] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale-0-1",
    "rgb_to_0_1": "rgb-0-1",
}
# z-scores are taken inside the nonzero mask when cropping removes more than a quarter of the median case.
MASK_BELOW = 0.75
# nnU-Net's readers by file ending, first match wins (`reader_writer_registry.LIST_OF_IO_CLASSES`).
READERS: dict[str, tuple[str, ...]] = {
    "NaturalImage2DIO": (".png", ".bmp", ".tif"),
    "SimpleITKIO": (".nii.gz", ".nrrd", ".mha", ".gipl"),
    "Tiff3DIO": (".tif", ".tiff"),
    "NibabelIO": (".nii", ".nii.gz"),
}
# No batch covers more of the dataset's voxels (Isensee et al. 2021); the ResEnc planners M, L and XL lift
# it to 1, so that small images get batches of thousands.
PAPER_COVERAGE = 0.05
LARGE_BATCH = 256
# Host memory: the process with torch (measured, 0.5 GB) and three batches of enlarged float32 patches
# (nnU-Net cuts patches 1/0.85 longer per axis and rotates them) in flight.
PROCESS_GB = 0.6
BATCHES_IN_FLIGHT = 3
ENLARGED = (1 / 0.85) ** 3


class DatasetInfo(Config):
    """What the planner needs to know of a dataset beside its fingerprint.

    Attributes
    ----------
    name : of the dataset
    channels : names in order
    labels : label set
    n_training : number of training cases
    file_ending : with the leading dot
    reader : nnU-Net's reader class name
    """

    name: str
    channels: tuple[str, ...] = Field(min_length=1)
    labels: LabelSet
    n_training: int = Field(ge=1)
    file_ending: str
    reader: str

    @classmethod
    def from_json(
        cls, dataset_json: Mapping[str, Any], name: str | None = None, fingerprint: Fingerprint | None = None
    ) -> Self:
        """Read nnU-Net's ``dataset.json``; the legacy key ``modality`` is understood.

        Parameters
        ----------
        dataset_json : parsed file
        name : of the dataset; else its key ``name``, else "Dataset"
        fingerprint : tells 2D from 3D TIFF, which have different readers

        Raises
        ------
        DatasetError
            A key is missing or the file ending has no reader.
        """
        channels = dataset_json.get("channel_names", dataset_json.get("modality"))
        missing = [key for key in ("labels", "numTraining", "file_ending") if key not in dataset_json]
        if not channels:
            missing.append("channel_names")
        if missing:
            raise DatasetError(f"dataset.json: {', '.join(missing)} missing. Add what nnU-Net v2 requires.")
        if not isinstance(channels, Mapping) or not isinstance(dataset_json["labels"], Mapping):
            raise DatasetError(
                'dataset.json: channel_names and labels must be mappings, such as {"0": "CT"} and '
                '{"background": 0, "liver": 1}. Rewrite them.'
            )
        return cls.from_dict(
            {
                "name": name or str(dataset_json.get("name") or "Dataset"),
                "channels": tuple(str(channel) for channel in channels.values()),
                "labels": LabelSet.parse(dataset_json["labels"], dataset_json.get("regions_class_order")),
                "n_training": dataset_json["numTraining"],
                "file_ending": dataset_json["file_ending"],
                "reader": _choose_reader(dataset_json, fingerprint),
            },
            "dataset.json",
        )

    @classmethod
    def from_dataset(cls, dataset: "Dataset") -> Self:
        """Read an opened dataset."""
        return cls(
            name=dataset.name,
            channels=tuple(dataset.channels),
            labels=dataset.labels,
            n_training=len(dataset.training),
            file_ending=dataset.file_ending,
            reader=dataset.reader,
        )


def _choose_reader(dataset_json: Mapping[str, Any], fingerprint: Fingerprint | None) -> str:
    given = dataset_json.get("overwrite_image_reader_writer")
    if given not in (None, "None"):
        return str(given)
    ending = str(dataset_json["file_ending"]).lower()
    names = [name for name, endings in READERS.items() if ending in endings]
    if not names:
        known = sorted({known for endings in READERS.values() for known in endings})
        raise DatasetError(
            f"dataset.json: file_ending {ending!r} has no reader. Use one of {', '.join(known)}."
        )
    volumes = fingerprint is not None and any(shape[0] > 1 for shape in fingerprint.shapes_after_crop)
    return "Tiff3DIO" if ending == ".tif" and volumes else names[0]


def plan_dataset(
    fingerprint: Fingerprint,
    info: DatasetInfo,
    preset: PathLike | None = None,
    options: PlanOptions | None = None,
    plans_name: str | None = None,
) -> Plan:
    """Decide everything about training on a dataset, in milliseconds and without torch.

    Parameters
    ----------
    fingerprint : of the training cases
    info : the dataset's description
    preset : a name of :data:`~medseg.plan.presets.PRESETS`, a YAML file that extends one, or None for
        ``cpu`` without and ``nnunet`` with a CUDA device
    options : budgets and overrides
    plans_name : replaces the preset's plans name

    Notes
    -----
    The ``nnunet`` and ``resenc`` presets equal nnU-Net 2.8.1, `gpu_memory_gb`, `target_spacing` and
    `suppress_transpose` included. `ram_gb`, `minutes` and `max_batch_size` are medseg's. With any of
    them no batch covers more than 5 % of the dataset's voxels (the cap of Isensee et al. 2021, which
    nnU-Net's ResEnc M, L and XL planners lift).

    Raises
    ------
    PlanError
        The memory budget is too small for any patch, or fingerprint and description do not fit.
    """
    name, changes = read_preset(preset or default_preset())
    if plans_name is not None:
        changes["plans_name"] = plans_name
    options = options or PlanOptions()
    if changes:
        options = options.replace(rules={**changes, **options.rules})
    _check_fit(fingerprint, info)
    plan = Planner(fingerprint, info, change_rules(name, options.rules), options).plan(name)
    _warn_of_large_batches(plan)
    return plan


def _warn_of_large_batches(plan: Plan) -> None:
    for name, configuration in plan.configurations.items():
        if configuration.batch_size > LARGE_BATCH:
            logger.warning(
                "%s: batch size %d, as nnU-Net's %s decides for small images. Limit it by max_batch_size.",
                name,
                configuration.batch_size,
                plan.preset,
            )


def _check_fit(fingerprint: Fingerprint, info: DatasetInfo) -> None:
    channels = len(fingerprint.foreground_intensity_properties_per_channel)
    if channels != len(info.channels):
        raise PlanError(
            f"{info.name}: the fingerprint has {channels} channels, the dataset description "
            f"{len(info.channels)}. Use files of the same dataset."
        )


@dataclass(frozen=True)
class Planner:
    """The decisions, in the order in which they depend on each other; :func:`plan_dataset` runs it."""

    fingerprint: Fingerprint
    info: DatasetInfo
    rules: Rules
    options: PlanOptions

    def plan(self, preset: Preset) -> Plan:
        """Return the whole plan."""
        choice = choose_spacing(self.fingerprint, self.options.target_spacing)
        forward = choose_transpose(choice.spacing, self.options.suppress_transpose)
        return Plan(
            dataset_name=self.info.name,
            plans_name=self.rules.plans_name,
            preset=preset,
            options=self.options,
            recipe=self.rules.recipe,
            channels=self.info.channels,
            labels=self.info.labels,
            file_ending=self.info.file_ending,
            reader=self.info.reader,
            transpose_forward=forward,
            transpose_backward=invert(forward),
            original_median_spacing=permute(choice.median, forward),
            original_median_shape=tuple(round(n) for n in permute(choice.size, forward)),
            intensity=self.fingerprint.foreground_intensity_properties_per_channel,
            configurations=self._configurations(choice.spacing, forward),
        )

    def _configurations(self, target: Spacing, forward: tuple[int, int, int]) -> dict[str, Configuration]:
        shape = permute(median_shape(self.fingerprint, target), forward)
        spacing = permute(target, forward)
        is_3d = shape[0] != 1
        result: dict[str, Configuration] = {}
        if not (is_3d and self.rules.only_default):
            result["2d"] = self._configuration(*self._coarsen(spacing[1:], shape[1:]), math.prod(shape))
        if is_3d:
            spacing, shape = self._coarsen(spacing, shape)
            result |= self._volumetric(spacing, shape)
        return result

    def _coarsen(self, spacing: Spacing, shape: tuple[float, ...]) -> tuple[Spacing, tuple[float, ...]]:
        """Apply the preset's limit on patches per case, if it has one."""
        patch = self.rules.max_patch_voxels(len(spacing))
        if self.rules.max_patches_per_case is None or patch is None:
            return spacing, shape
        coarse = coarsen_to(spacing, shape, patch * self.rules.max_patches_per_case)
        if coarse == spacing:
            return spacing, shape
        return coarse, tuple(float(round(n)) for n in rescale_shape(shape, spacing, coarse))

    def _volumetric(self, spacing: Spacing, shape: tuple[float, ...]) -> dict[str, Configuration]:
        full = self._configuration(spacing, shape, math.prod(shape))
        low = None if self.rules.only_default else self._lowres(full)
        if low is None:
            return {"3d_fullres": full}
        full = full.replace(batch_dice=True)
        return {
            "3d_lowres": low,
            "3d_fullres": full,
            "3d_cascade_fullres": full.replace(previous_stage="3d_lowres"),
        }

    def _lowres(self, full: Configuration) -> Configuration | None:
        """Coarsen until a patch sees a quarter of the median case; None if `full` nearly does."""
        spacing, voxels = full.spacing, math.prod(full.median_shape)
        low, low_voxels = full, voxels
        while math.prod(low.patch_size) / low_voxels < LOWRES_SHARE:
            spacing = coarsen(spacing)
            shape = rescale_shape(full.median_shape, full.spacing, spacing)
            low_voxels = math.prod(shape)
            rounded = tuple(float(round(n)) for n in shape)
            low = self._configuration(spacing, rounded, low_voxels)
        if low is full or voxels / low_voxels < LOWRES_MIN_REDUCTION:
            return None
        return low.replace(next_stage="3d_cascade_fullres")

    def _configuration(self, spacing: Spacing, shape: tuple[float, ...], case_voxels: float) -> Configuration:
        fit = topo.fit_patch(spacing, shape, self.rules, self._n_labels, self.limits(len(spacing)))
        return Configuration(
            spacing=spacing,
            patch_size=fit.topology.patch,
            batch_size=self._batch_size(fit, case_voxels),
            median_shape=shape,
            normalization=self.normalization,
            use_mask_for_norm=self._use_mask,
            batch_dice=len(spacing) == 2,
            architecture=topo.build_architecture(fit.topology, self.rules),
        )

    @property
    def _n_labels(self) -> int:
        return len(self.info.labels.entries)

    @property
    def normalization(self) -> tuple[Normalization, ...]:
        """Scheme of each channel, by its name."""
        names = (channel.casefold() for channel in self.info.channels)
        return tuple(NORMALIZATION_OF_CHANNEL.get(name, "zscore") for name in names)

    @property
    def _use_mask(self) -> tuple[bool, ...]:
        cropped = self.fingerprint.median_relative_size_after_cropping < MASK_BELOW
        return tuple(cropped and scheme == "zscore" for scheme in self.normalization)

    def limits(self, dimensions: int) -> topo.Limits:
        """What the patch of a configuration must respect."""
        elements = self._memory_elements(dimensions)
        if self.rules.shrink_at_min_batch:
            elements *= topo.REFERENCE_BATCH[dimensions] / topo.MIN_BATCH
        voxels = self.rules.max_patch_voxels(dimensions)
        return topo.Limits(
            elements=elements,
            voxels=math.inf if voxels is None else voxels,
            soft_elements=self._step_elements() / topo.MIN_BATCH,
        )

    def _memory_elements(self, dimensions: int) -> float:
        """Feature-map elements of one sample that fill the GPU at the reference batch size."""
        reference = self.rules.reference(dimensions)
        if reference is None:
            return math.inf
        return reference * ((self.options.gpu_memory_gb or self.rules.memory_gb) / self.rules.memory_gb)

    def _step_elements(self) -> float:
        """Feature-map elements of one training step that the time and host memory budgets leave."""
        elements = math.inf
        if self.options.minutes is not None:
            elements = self.options.minutes * 60 * self.rules.elements_per_second / self.rules.min_steps
        if self.options.ram_gb is not None and self.rules.recipe == "cpu":
            elements = min(elements, self._free_ram() / self.rules.bytes_per_element)
        return elements

    def _batch_size(self, fit: topo.Fit, case_voxels: float) -> int:
        limits = self.batch_limits(fit.elements, fit.topology.patch, case_voxels)
        size = max(min(limits.values()), topo.MIN_BATCH)
        return size if self.options.max_batch_size is None else min(size, self.options.max_batch_size)

    def batch_limits(self, elements: int, patch: tuple[int, ...], case_voxels: float) -> dict[str, int]:
        """Return the largest batch size that each rule allows, by name of the rule.

        Parameters
        ----------
        elements : feature-map elements of one sample
        patch : voxels
        case_voxels : of the median case
        """
        dimensions = len(patch)
        limits = {}
        fixed = self.rules.batch_size(dimensions)
        if fixed is None:
            reference = self._memory_elements(dimensions)
            limits["GPU memory"] = round(reference / elements * topo.REFERENCE_BATCH[dimensions])
        else:
            limits["preset"] = fixed
        dataset_voxels = float(case_voxels * self.info.n_training)
        limits["coverage"] = round(dataset_voxels * self.coverage / math.prod(patch))
        step = self._step_elements()
        if math.isfinite(step):
            limits["time and memory budget"] = int(step / elements)
        if self.options.ram_gb is not None:
            sample = 4 * (len(self.info.channels) + 1) * math.prod(patch) * ENLARGED
            limits["patches in host memory"] = int(self._free_ram() / 2 / (BATCHES_IN_FLIGHT * sample))
        if self.options.max_batch_size is not None:
            limits["asked"] = self.options.max_batch_size
        return limits

    @property
    def coverage(self) -> float:
        """Largest share of the dataset's voxels in one batch."""
        if self.options.departs_from_nnunet:
            return min(self.rules.coverage, PAPER_COVERAGE)
        return self.rules.coverage

    def _free_ram(self) -> float:
        return max((self.options.ram_gb or 0.0) - PROCESS_GB, 0.1) * 1e9


def make_plan(
    dataset: "PathLike | Dataset",
    preset: PathLike | None = None,
    *,
    options: PlanOptions | None = None,
    fingerprint: Fingerprint | None = None,
    exact: bool = True,
    **budgets: Any,
) -> Plan:
    """Look at a dataset and plan everything.

    Parameters
    ----------
    dataset : path or Dataset
    preset : name, YAML file, or None for what this machine can train (see :func:`plan_dataset`)
    options, budgets : budgets and overrides, as :class:`PlanOptions` or as its fields by name
    fingerprint : of the dataset, if it exists already
    exact : draw the intensity statistics exactly as nnU-Net does

    Examples
    --------
    >>> plan = make_plan("Dataset004_Hippocampus", preset="resenc-l", ram_gb=16)  # doctest: +SKIP
    """
    from medseg.io import Dataset, open_dataset
    from medseg.plan.fingerprint import extract_fingerprint

    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    if options is None:
        options = PlanOptions.from_dict(budgets, "plan options")
    elif budgets:
        options = options.replace(**budgets)
    fingerprint = fingerprint or extract_fingerprint(opened, exact)
    return plan_dataset(fingerprint, DatasetInfo.from_dataset(opened), preset, options)
