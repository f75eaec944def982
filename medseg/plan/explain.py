"""Why is my patch 40x56x40? Every value of a plan with its rule, its numbers and its source."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from medseg.errors import PlanError
from medseg.plan import topology as topo
from medseg.plan.nnunet import RESAMPLING
from medseg.plan.planner import MASK_BELOW, PAPER_COVERAGE, DatasetInfo, Planner
from medseg.plan.presets import change_rules
from medseg.plan.schema import Configuration, Fingerprint, Plan
from medseg.plan.spacing import (
    ANISOTROPY,
    COARSE_PERCENTILE,
    LOWRES_MIN_REDUCTION,
    LOWRES_SHARE,
    SpacingChoice,
    choose_spacing,
    permute,
)

PAPER, RESENC_PAPER, MEDSEG = "Isensee 2021", "Isensee 2024", "medseg"

# What the short names in `Explanation.source` stand for.
REFERENCES = {
    PAPER: "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. "
    "Nature Methods 18, 203-211 (Methods, and Fig. 2 for the rules)",
    RESENC_PAPER: "nnU-Net Revisited: a call for rigorous validation in 3D medical image segmentation. "
    "arXiv 2404.09556",
    "names with ()": "functions of nnU-Net 2.8.1",
    MEDSEG: "not a rule of nnU-Net; see DECISIONS.md",
}


@dataclass(frozen=True)
class Explanation:
    """One value of a plan.

    Attributes
    ----------
    section : "dataset" or the name of a configuration
    name, value : what was decided
    rule : how, in one or two sentences
    numbers : what went in; empty without a fingerprint
    source : paper, and the function of nnU-Net 2.8.1 where there is one
    """

    section: str
    name: str
    value: str
    rule: str
    numbers: str
    source: str


def explain(
    plan: Plan, fingerprint: Fingerprint | None = None, n_training: int | None = None
) -> list[Explanation]:
    """Explain every value of a plan.

    Parameters
    ----------
    plan : of any preset, or imported from nnU-Net
    fingerprint : of its dataset; without it the rules are told, but not the numbers that went in
    n_training : training cases, if not those of the fingerprint

    Notes
    -----
    With a fingerprint the plan is made again. A value that the rules would not give (edited by hand, or
    by another planner) is said to be so.
    """
    again = None if fingerprint is None else _Again.make(plan, fingerprint, n_training)
    result = list(_dataset(plan, again))
    for name in plan.configurations:
        result += _configuration(plan, name, again)
    return result


@dataclass(frozen=True)
class _Again:
    """The same plan made a second time, with the numbers on the way."""

    planner: Planner
    plan: Plan
    choice: SpacingChoice

    @classmethod
    def make(cls, plan: Plan, fingerprint: Fingerprint, n_training: int | None) -> "_Again | None":
        info = DatasetInfo(
            name=plan.dataset_name,
            channels=plan.channels,
            labels=plan.labels,
            n_training=n_training or len(fingerprint.spacings),
            file_ending=plan.file_ending,
            reader=plan.reader,
        )
        planner = Planner(fingerprint, info, change_rules(plan.preset, plan.options.rules), plan.options)
        try:
            made = planner.plan(plan.preset)
        except PlanError:
            return None
        return cls(planner, made, choose_spacing(fingerprint, plan.options.target_spacing))

    def fit(self, configuration: Configuration) -> topo.Fit:
        spacing = configuration.spacing
        planner = self.planner
        return topo.fit_patch(
            spacing,
            configuration.median_shape,
            planner.rules,
            len(planner.info.labels.entries),
            planner.limits(len(spacing)),
        )

    def batch_numbers(self, name: str) -> str:
        """What each rule would allow as batch size."""
        configuration = self.plan.configurations.get(name)
        if configuration is None:
            return ""
        full = self.plan.configurations.get("3d_fullres", configuration)
        case = configuration if name == "3d_lowres" else full
        elements = topo.architecture_elements(
            configuration.architecture, configuration.patch_size, len(self.plan.labels.entries)
        )
        limits = self.planner.batch_limits(elements, configuration.patch_size, math.prod(case.median_shape))
        return "; ".join(f"{rule}: {size}" for rule, size in limits.items())


def _dataset(plan: Plan, again: _Again | None) -> Iterator[Explanation]:
    section = "dataset"
    yield Explanation(
        section, "preset", plan.preset, _PRESET_RULES[plan.preset], _options(plan), _preset_source(plan)
    )
    yield _axes(plan, again)
    yield _spacing_choice(plan, again)
    yield Explanation(
        section,
        "configurations",
        ", ".join(plan.configurations),
        _which_configurations(plan),
        _lowres_numbers(plan),
        f"{PAPER}, U-Net cascade; plan_experiment()" if plan.recipe == "nnunet" else MEDSEG,
    )
    yield from _channels(plan, again)
    yield Explanation(
        section,
        "resampling",
        "cubic data, linear labels",
        "Splines of order 3 for images and 1 for label indicators. An axis more than "
        f"{ANISOTROPY} times coarser than the others is resampled apart, with order 0.",
        "",
        f"{PAPER}, image resampling; {RESAMPLING}()",
    )


_PRESET_RULES = {
    "nnunet": "nnU-Net's default planner: plain U-Net, 8 GB of GPU memory.",
    "resenc": "nnU-Net's residual encoder U-Net, 8 GB of GPU memory.",
    "resenc-m": "nnU-Net's residual encoder preset M, 8 GB of GPU memory.",
    "resenc-l": "nnU-Net's residual encoder preset L, 24 GB of GPU memory.",
    "resenc-xl": "nnU-Net's residual encoder preset XL, 40 GB of GPU memory.",
    "cpu": "nnU-Net's rules with a smaller network, patch and batch: two CPU cores can train it. "
    "Chosen where there is no CUDA device.",
}


def _preset_source(plan: Plan) -> str:
    return {"nnunet": PAPER, "cpu": MEDSEG}.get(plan.preset, RESENC_PAPER)


def _options(plan: Plan) -> str:
    given = plan.options.model_dump(exclude_defaults=True)
    rules = given.pop("rules", {})
    return ", ".join(f"{key} {value}" for key, value in {**given, **rules}.items())


def _axes(plan: Plan, again: _Again | None) -> Explanation:
    names = permute(("k", "j", "i"), plan.transpose_forward)
    rule = "The coarsest axis of the target spacing comes first; 2d slices are cut across it."
    if plan.options.suppress_transpose:
        rule = "The order of the reader is kept, as asked (suppress_transpose)."
    numbers = "" if again is None else f"target in reader order (k, j, i): {_mm(again.choice.spacing)}"
    return Explanation(
        "dataset",
        "axes order",
        f"{', '.join(names)}  (transpose {list(plan.transpose_forward)})",
        rule,
        numbers,
        "determine_transpose()",
    )


_SPACING_RULES = {
    "median": "Median spacing of the training cases, axis by axis.",
    "percentile": f"Median spacing, but the {COARSE_PERCENTILE}th percentile on the coarse axis, so that "
    "cases with many slices are not blurred.",
    "in-plane": "Median spacing, but the coarse axis as fine as the others allow: its "
    f"{COARSE_PERCENTILE}th percentile would be finer than they are.",
    "given": "As asked (overwrite_target_spacing).",
}


def _spacing_choice(plan: Plan, again: _Again | None) -> Explanation:
    section, source = "dataset", f"{PAPER}, target spacing; determine_fullres_target_spacing()"
    if again is None:
        return Explanation(
            section, "median spacing", _mm(plan.original_median_spacing), _SPACING_RULES["median"], "", source
        )
    choice = again.choice
    forward = plan.transpose_forward
    others = [axis for axis in range(3) if axis != choice.axis]
    ratio = choice.median[choice.axis] / max(choice.median[axis] for axis in others)
    smallest = min(choice.size[axis] for axis in others)
    fires = choice.rule in ("percentile", "in-plane")
    numbers = (
        f"median {_mm(permute(choice.median, forward))}, median size "
        f"{_times(permute(choice.size, forward))}; coarsest axis {ratio:.2f} times the next "
        f"({ANISOTROPY} needed), {_number(choice.size[choice.axis])} voxels against {_number(smallest)}: "
        f"{'coarse-axis rule' if fires else 'median'}"
    )
    rule = _SPACING_RULES[choice.rule]
    return Explanation(
        section, "target spacing", _mm(permute(choice.spacing, forward)), rule, numbers, source
    )


def _which_configurations(plan: Plan) -> str:
    if "3d_fullres" not in plan.configurations:
        return "The median case has one slice after resampling, so only 2d is planned."
    if plan.recipe == "cpu" or len(plan.configurations) == 1:
        return "One configuration, 3d_fullres, so that the time goes into one model."
    share = f"{LOWRES_SHARE:.0%}"
    if "3d_lowres" in plan.configurations:
        return (
            f"2d and 3d_fullres always. A full-resolution patch sees less than {share} of the median case, "
            f"so 3d_lowres (at most 1/{LOWRES_MIN_REDUCTION} of the voxels) and the cascade are planned too."
        )
    return (
        f"2d and 3d_fullres always. 3d_lowres only if a patch sees less than {share} of the median case "
        f"and lowres would have at most 1/{LOWRES_MIN_REDUCTION} of its voxels; that is not so."
    )


def _lowres_numbers(plan: Plan) -> str:
    full = plan.configurations.get("3d_fullres")
    if full is None:
        return ""
    share = math.prod(full.patch_size) / math.prod(full.median_shape)
    text = f"patch {_times(full.patch_size)} / median {_times(full.median_shape)} = {share:.0%}"
    low = plan.configurations.get("3d_lowres")
    if low is None:
        return text
    fewer = math.prod(full.median_shape) / math.prod(low.median_shape)
    return f"{text}; lowres {_times(low.median_shape)} has {fewer:.1f} times fewer voxels"


_NORMALIZATION_RULES = {
    "ct": "The channel is named CT: clip to the foreground's 0.5 and 99.5 percentiles over all cases, "
    "subtract its mean, divide by its standard deviation.",
    "zscore": "Subtract mean, divide by standard deviation of each image.",
    "none": "The channel is named noNorm: values are used as they are.",
    "rescale-0-1": "The channel is named rescale_to_0_1: each image is stretched to 0..1.",
    "rgb-0-1": "The channel is named rgb_to_0_1: values are divided by 255.",
}


def _channels(plan: Plan, again: _Again | None) -> Iterator[Explanation]:
    configuration = plan.configurations[plan.default_configuration]
    cropped = None if again is None else again.planner.fingerprint.median_relative_size_after_cropping
    for index, (name, scheme) in enumerate(zip(plan.channels, configuration.normalization, strict=True)):
        rule, numbers = _NORMALIZATION_RULES[scheme], ""
        if scheme == "ct":
            stats = plan.intensity[str(index)]
            numbers = (
                f"clip {_number(stats.percentile_00_5)}..{_number(stats.percentile_99_5)}, "
                f"mean {_number(stats.mean)}, std {_number(stats.std)}"
            )
        elif scheme == "zscore":
            masked = configuration.use_mask_for_norm[index]
            rule += (
                f" Inside the nonzero mask only if cropping leaves less than {MASK_BELOW:.0%} of the median "
                f"case: {'yes' if masked else 'no'}."
            )
            numbers = "" if cropped is None else f"cropping leaves {cropped:.1%}"
        yield Explanation(
            "dataset",
            f"channel {name}",
            scheme,
            rule,
            numbers,
            f"{PAPER}, intensity normalization; get_normalization_scheme()",
        )


def _configuration(plan: Plan, name: str, again: _Again | None) -> list[Explanation]:
    configuration = plan.configurations[name]
    if configuration.previous_stage is not None:
        return [_cascade(name, configuration)]
    expected = None if again is None else again.plan.configurations.get(name)
    fit = None if again is None else again.fit(configuration)
    result = [
        _spacing(plan, name, configuration),
        _patch(plan, name, configuration, fit),
        _pooling(name, configuration),
        _features(plan, name, configuration),
        _batch(plan, name, configuration, again),
        _batch_dice(name, configuration),
    ]
    return [_mark_departure(item, configuration, expected) for item in result]


_FIELD_OF = {
    "spacing": "spacing",
    "patch size": "patch_size",
    "pooling": "architecture",
    "features": "architecture",
    "batch size": "batch_size",
    "batch dice": "batch_dice",
}


def _mark_departure(
    item: Explanation, configuration: Configuration, expected: Configuration | None
) -> Explanation:
    field = _FIELD_OF[item.name]
    if expected is None or getattr(expected, field) == getattr(configuration, field):
        return item
    value: Any = getattr(expected, field)
    if field == "architecture":
        value = value.strides if item.name == "pooling" else value.features_per_stage
    return Explanation(
        item.section,
        item.name,
        item.value,
        f"Set by hand or by another planner. The rule: {item.rule}",
        f"the rule would give {value}",
        item.source,
    )


def _cascade(name: str, configuration: Configuration) -> Explanation:
    return Explanation(
        name,
        "cascade",
        f"after {configuration.previous_stage}",
        "Same as 3d_fullres, with the result of the first stage as one more channel for each label.",
        "",
        f"{PAPER}, U-Net cascade",
    )


def _spacing(plan: Plan, name: str, configuration: Configuration) -> Explanation:
    full = plan.configurations.get("3d_fullres", configuration)
    rule, source = "The target spacing.", PAPER
    if name == "2d":
        rule = "The target spacing in the plane."
    elif name == "3d_lowres":
        rule = (
            "The target spacing, coarsened by 3 % a step (axes finer than half of the coarsest first) until "
            f"a patch sees {LOWRES_SHARE:.0%} of the median case."
        )
        source = f"{PAPER}, U-Net cascade; plan_experiment()"
    rules = change_rules(plan.preset, plan.options.rules)
    limit = rules.max_patch_voxels(configuration.dimensions)
    if rules.max_patches_per_case is not None and limit is not None:
        most = limit * rules.max_patches_per_case
        rule += (
            f" It is coarsened by 3 % a step while the median case exceeds {most / 1e6:.3g} million voxels "
            f"({_number(rules.max_patches_per_case)} patches), so that a patch sees enough of it."
        )
        source = f"{MEDSEG}, with the steps of nnU-Net's 3d_lowres"
    numbers = f"median case {_times(configuration.median_shape)} at this spacing"
    if name == "3d_lowres":
        numbers += f", {_times(full.median_shape)} at {_mm(full.spacing)}"
    elif rules.max_patches_per_case is not None:
        numbers += f", {math.prod(configuration.median_shape) / 1e6:.3g} million voxels"
    return Explanation(name, "spacing", _mm(configuration.spacing), rule, numbers, source)


def _patch(plan: Plan, name: str, configuration: Configuration, fit: topo.Fit | None) -> Explanation:
    rules = change_rules(plan.preset, plan.options.rules)
    rule = (
        "Start from the median case (at most an isotropic block of "
        f"{'256^3 voxels' if configuration.dimensions == 3 else '2048^2 pixels'}), pad to a multiple of the "
        "pooling, and shorten the relatively longest axis while "
    )
    memory = rules.reference(configuration.dimensions) is not None
    rule += "the network does not fit the GPU." if memory else "it has too many voxels to train on a CPU."
    numbers = ""
    if fit is not None:
        steps = len(fit.tried) - 1
        count = f"{steps} step" if steps == 1 else f"{steps} steps"
        numbers = f"start {_times(fit.tried[0])}, {count}; {_cost(plan, configuration)}"
    source = MEDSEG
    if memory:
        source = f"{PAPER}, network topology, patch size; get_plans_for_configuration()"
    return Explanation(name, "patch size", _times(configuration.patch_size), rule, numbers, source)


def _cost(plan: Plan, configuration: Configuration) -> str:
    rules = change_rules(plan.preset, plan.options.rules)
    elements = topo.architecture_elements(
        configuration.architecture, configuration.patch_size, len(plan.labels.entries)
    )
    text = f"{elements / 1e6:,.0f} million feature-map elements a sample"
    reference = rules.reference(configuration.dimensions)
    if reference is not None:
        gigabytes = plan.options.gpu_memory_gb or rules.memory_gb
        allowed = reference * gigabytes / rules.memory_gb
        if rules.shrink_at_min_batch:
            allowed *= topo.REFERENCE_BATCH[configuration.dimensions] / topo.MIN_BATCH
        return f"{text}, {allowed / 1e6:,.0f} million allowed for {_number(gigabytes)} GB"
    limit = rules.max_patch_voxels(configuration.dimensions)
    voxels = math.prod(configuration.patch_size)
    return f"{voxels:,} voxels" + (f" of {limit:,} allowed" if limit else "") + f", {text}"


def _pooling(name: str, configuration: Configuration) -> Explanation:
    architecture = configuration.architecture
    totals = [math.prod(column) for column in zip(*architecture.strides, strict=True)]
    coarsest = _times(p // t for p, t in zip(configuration.patch_size, totals, strict=True))
    kernels = " ".join("x".join(map(str, kernel)) for kernel in architecture.kernel_sizes)
    return Explanation(
        name,
        "pooling",
        " ".join("x".join(map(str, stride)) for stride in architecture.strides[1:]) or "none",
        "Halve every axis whose spacing is within a factor of 2 of the finest, while its feature map "
        f"stays at least {topo.MIN_EDGE} long. Kernels are 1 along an axis still coarser than that, else 3.",
        f"coarsest feature map {coarsest}; kernels {kernels}",
        f"{PAPER}, network topology; get_pool_and_conv_props()",
    )


def _features(plan: Plan, name: str, configuration: Configuration) -> Explanation:
    architecture = configuration.architecture
    rules = change_rules(plan.preset, plan.options.rules)
    cap = rules.max_features_3d if configuration.dimensions == 3 else rules.max_features_2d
    kind = "residual blocks" if architecture.network == "resenc-unet" else "convolutions"
    return Explanation(
        name,
        "features",
        " ".join(map(str, architecture.features_per_stage)),
        f"{rules.base_features} at full resolution, doubled with each pooling, at most {cap}.",
        f"{architecture.network}: {kind} {' '.join(map(str, architecture.blocks_per_stage))} down, "
        f"convolutions {' '.join(map(str, architecture.decoder_convs_per_stage)) or '-'} up",
        {"cpu": MEDSEG, "nnunet": PAPER}.get(plan.preset, RESENC_PAPER),
    )


def _batch(plan: Plan, name: str, configuration: Configuration, again: _Again | None) -> Explanation:
    rules = change_rules(plan.preset, plan.options.rules)
    fixed = rules.batch_size(configuration.dimensions)
    coverage = min(rules.coverage, PAPER_COVERAGE) if plan.options.departs_from_nnunet else rules.coverage
    start = "What the memory holds" if fixed is None else f"{fixed} in this preset"
    rule = f"{start}, at least {topo.MIN_BATCH}, at most {coverage:.0%} of the dataset's voxels."
    if plan.options.departs_from_nnunet:
        rule += " The budgets that were given (ram_gb, minutes, max_batch_size) lower it further."
    numbers = "" if again is None else again.batch_numbers(name)
    source = f"{PAPER}, batch size; get_plans_for_configuration()" if fixed is None else MEDSEG
    return Explanation(name, "batch size", str(configuration.batch_size), rule, numbers, source)


def _batch_dice(name: str, configuration: Configuration) -> Explanation:
    return Explanation(
        name,
        "batch dice",
        "yes" if configuration.batch_dice else "no",
        "Dice is pooled over the batch where a patch sees little of a case: in 2d, and in 3d_fullres where "
        "there is a 3d_lowres.",
        "",
        "plan_experiment()",
    )


def _mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing)


def _times(shape: Iterable[float]) -> str:
    return "x".join(_number(n) for n in shape)


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
