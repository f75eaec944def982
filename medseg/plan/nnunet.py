"""Plans of nnU-Net v2: read ``plans.json`` of any age, write what 2.8.1 would have written."""

from collections.abc import Mapping
from typing import Any

from medseg.errors import DatasetError, MedsegError, PlanError
from medseg.labels import LabelSet
from medseg.plan.presets import PRESETS, preset_of_planner
from medseg.plan.schema import Architecture, ChannelStats, Configuration, NetworkName, Normalization, Plan

NORMALIZATION_CLASSES: dict[Normalization, str] = {
    "ct": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "none": "NoNormalization",
    "rescale-0-1": "RescaleTo01Normalization",
    "rgb-0-1": "RGBTo01Normalization",
}
NETWORK_CLASSES: dict[NetworkName, str] = {
    "unet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "resenc-unet": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}
RESAMPLING = "resample_data_or_seg_to_shape"
# What nnU-Net's planners always write for a network and what medseg's networks are built with.
FIXED_ARCHITECTURE: dict[str, Any] = {
    "conv_bias": True,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}


def to_nnunet(plan: Plan) -> dict[str, Any]:
    """Return the content of nnU-Net's ``plans.json``, keys in nnU-Net's order.

    Budgets, recipe, channels and labels have no place there (nnU-Net keeps the latter two in
    ``dataset.json``).

    Raises
    ------
    PlanError
        The plan uses a network that nnU-Net does not have.
    """
    return {
        "dataset_name": plan.dataset_name,
        "plans_name": plan.plans_name,
        "original_median_spacing_after_transp": list(plan.original_median_spacing),
        "original_median_shape_after_transp": list(plan.original_median_shape),
        "image_reader_writer": plan.reader,
        "transpose_forward": list(plan.transpose_forward),
        "transpose_backward": list(plan.transpose_backward),
        "configurations": {name: _export_configuration(plan, name) for name in plan.configurations},
        "experiment_planner_used": plan.planner or PRESETS[plan.preset].planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            channel: stats.to_dict() for channel, stats in plan.intensity.items()
        },
    }


def _export_configuration(plan: Plan, name: str) -> dict[str, Any]:
    configuration = plan.configurations[name]
    if _is_cascade_of_fullres(plan, name):
        return {"inherits_from": "3d_fullres", "previous_stage": configuration.previous_stage}
    order_z = configuration.order_z
    result = {
        "data_identifier": f"{_data_owner(plan, name)}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.batch_size,
        "patch_size": list(configuration.patch_size),
        "median_image_size_in_voxels": _export_shape(configuration, name),
        "spacing": list(configuration.spacing),
        "normalization_schemes": [NORMALIZATION_CLASSES[scheme] for scheme in configuration.normalization],
        "use_mask_for_norm": list(configuration.use_mask_for_norm),
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_data_kwargs": _resampling(False, configuration.order_data, order_z),
        "resampling_fn_seg_kwargs": _resampling(True, configuration.order_seg, order_z),
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_probabilities_kwargs": _resampling(False, configuration.order_probabilities, order_z),
        "architecture": _export_architecture(configuration.architecture),
        "batch_dice": configuration.batch_dice,
    }
    stages = {"next_stage": configuration.next_stage, "previous_stage": configuration.previous_stage}
    return result | {key: stage for key, stage in stages.items() if stage is not None}


def _is_cascade_of_fullres(plan: Plan, name: str) -> bool:
    full = plan.configurations.get("3d_fullres")
    return (
        full is not None
        and name == "3d_cascade_fullres"
        and plan.configurations[name].replace(previous_stage=None) == full
    )


def _data_owner(plan: Plan, name: str) -> str:
    shared = PRESETS[plan.preset].shares_nnunet_data and name in ("2d", "3d_fullres")
    return PRESETS["nnunet"].plans_name if shared else plan.plans_name


def _export_shape(configuration: Configuration, name: str) -> list[float]:
    shape = configuration.median_shape
    return [int(n) for n in shape] if name == "3d_lowres" else list(shape)


def _resampling(is_seg: bool, order: int, order_z: int) -> dict[str, Any]:
    return {"is_seg": is_seg, "order": order, "order_z": order_z, "force_separate_z": None}


def _export_architecture(architecture: Architecture) -> dict[str, Any]:
    if architecture.network not in NETWORK_CLASSES:
        raise PlanError(
            f"network {architecture.network!r} does not exist in nnU-Net. "
            f"Plan with one of {', '.join(NETWORK_CLASSES)} to export."
        )
    dimensions = architecture.dimensions
    blocks = "n_conv_per_stage" if architecture.network == "unet" else "n_blocks_per_stage"
    return {
        "network_class_name": NETWORK_CLASSES[architecture.network],
        "arch_kwargs": {
            "n_stages": architecture.n_stages,
            "features_per_stage": list(architecture.features_per_stage),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in architecture.kernel_sizes],
            "strides": [list(stride) for stride in architecture.strides],
            blocks: list(architecture.blocks_per_stage),
            "n_conv_per_stage_decoder": list(architecture.decoder_convs_per_stage),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def from_nnunet(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], needed: str | None = None) -> Plan:
    """Return the plan that nnU-Net's ``plans.json`` and ``dataset.json`` describe.

    Inheritance between configurations is resolved; plans from before nnU-Net 2.3, which name the network
    by ``UNet_class_name``, are understood.

    Parameters
    ----------
    needed : a configuration; others that medseg cannot do are then left out instead of being an error

    Raises
    ------
    PlanError
        A key is missing, or asks for something that medseg's networks and preprocessing do not do.
    """
    try:
        _check_classes(plans)
        configurations = _import_configurations(plans["configurations"], needed)
        planner = str(plans.get("experiment_planner_used", ""))
        first = next(iter(configurations.values()))
        preset = preset_of_planner(planner, first.architecture.network)
        return Plan.from_dict(
            {
                "dataset_name": plans["dataset_name"],
                "plans_name": plans["plans_name"],
                "preset": preset,
                "planner": None if planner in ("", PRESETS[preset].planner) else planner,
                "recipe": PRESETS[preset].recipe,
                "channels": _channels(dataset_json),
                "labels": LabelSet.parse(dataset_json["labels"], dataset_json.get("regions_class_order")),
                "file_ending": dataset_json["file_ending"],
                "reader": plans["image_reader_writer"],
                "transpose_forward": plans["transpose_forward"],
                "transpose_backward": plans["transpose_backward"],
                "original_median_spacing": plans["original_median_spacing_after_transp"],
                "original_median_shape": plans["original_median_shape_after_transp"],
                "intensity": _import_intensity(plans),
                "configurations": configurations,
            },
            "plans.json",
        )
    except MedsegError:
        raise
    except KeyError as error:
        raise PlanError(
            f"plans.json: key {error} is missing in it or in its dataset.json. "
            "Pass files that nnU-Net v2 wrote."
        ) from error
    except (AttributeError, StopIteration, TypeError, ValueError) as error:
        raise PlanError(
            f"plans.json: not of nnU-Net's layout ({error}). Pass files that nnU-Net v2 wrote."
        ) from error


def _check_classes(plans: Mapping[str, Any]) -> None:
    """Refuse what changes the meaning of the outputs in a way that only nnU-Net's own code knows."""
    labels = plans.get("label_manager", "LabelManager")
    if labels != "LabelManager":
        raise PlanError(f"plans.json: label manager {labels!r} is not supported, only LabelManager.")


def _import_configurations(values: Mapping[str, Any], needed: str | None) -> dict[str, Configuration]:
    result = {}
    for name in values:
        try:
            result[name] = _import_configuration(name, _resolve(name, values))
        except (MedsegError, KeyError, AttributeError, TypeError, ValueError):
            if needed is None or name == needed:
                raise
    return result


def _import_intensity(plans: Mapping[str, Any]) -> dict[str, ChannelStats]:
    """Return statistics by channel; nnU-Net 2.0 called it a modality."""
    found = plans.get("foreground_intensity_properties_by_modality", {})
    found = plans.get("foreground_intensity_properties_per_channel", found)
    names = ChannelStats.model_fields
    return {
        channel: ChannelStats.from_dict(
            {name: stats[name] for name in names}, f"intensities of channel {channel}"
        )
        for channel, stats in found.items()
    }


def _channels(dataset_json: Mapping[str, Any]) -> tuple[str, ...]:
    channels = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(channels, Mapping):
        raise DatasetError('dataset.json: "channel_names" is missing. Add it, for example {"0": "CT"}.')
    return tuple(str(name) for name in channels.values())


def _resolve(name: str, configurations: Mapping[str, Any], heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration with what it inherits; its own keys win."""
    if name not in configurations or name in heirs:
        chain = " -> ".join((*heirs, name))
        raise PlanError(
            f"plans.json: inheritance {chain} is circular or leads nowhere. Mend 'inherits_from'."
        )
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    return own if parent is None else _resolve(parent, configurations, (*heirs, name)) | own


def _import_configuration(name: str, values: Mapping[str, Any]) -> Configuration:
    preprocessor = values.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise PlanError(
            f"plans.json, configuration {name}: preprocessor {preprocessor!r} is not supported. "
            "medseg does what DefaultPreprocessor does."
        )
    orders = {role: _import_resampling(name, values, role) for role in ("data", "seg", "probabilities")}
    return Configuration.from_dict(
        {
            "spacing": values["spacing"],
            "patch_size": values["patch_size"],
            "batch_size": values["batch_size"],
            "median_shape": values["median_image_size_in_voxels"],
            "normalization": [_import_normalization(scheme) for scheme in values["normalization_schemes"]],
            "use_mask_for_norm": values["use_mask_for_norm"],
            "batch_dice": values.get("batch_dice", name == "2d"),
            "architecture": _import_architecture(name, values),
            "order_data": orders["data"][0],
            "order_seg": orders["seg"][0],
            "order_probabilities": orders["probabilities"][0],
            "order_z": orders["data"][1],
            "previous_stage": values.get("previous_stage"),
            "next_stage": values.get("next_stage"),
        },
        f"plans.json, configuration {name}",
    )


def _import_normalization(class_name: str) -> Normalization:
    for scheme, known in NORMALIZATION_CLASSES.items():
        if known == class_name:
            return scheme
    known_names = ", ".join(NORMALIZATION_CLASSES.values())
    raise PlanError(f"plans.json: normalization {class_name!r} is unknown. medseg does {known_names}.")


def _import_resampling(name: str, values: Mapping[str, Any], role: str) -> tuple[int, int]:
    """Return order and order along a coarse axis."""
    function, settings = values[f"resampling_fn_{role}"], values[f"resampling_fn_{role}_kwargs"]
    if function != RESAMPLING or settings.get("force_separate_z") is not None:
        raise PlanError(
            f"plans.json, configuration {name}: resampling of {role} by {function} "
            f"(force_separate_z {settings.get('force_separate_z')}) is not supported. "
            f"medseg does nnU-Net's default, {RESAMPLING} with force_separate_z null."
        )
    return settings["order"], settings.get("order_z", 0)


def _import_architecture(name: str, values: Mapping[str, Any]) -> Architecture:
    if "architecture" not in values:
        return _import_old_architecture(name, values)
    network = _network_of(name, values["architecture"]["network_class_name"])
    settings = values["architecture"]["arch_kwargs"]
    _check_fixed(name, settings)
    return _architecture(
        name,
        network,
        settings["features_per_stage"],
        settings["strides"],
        settings["kernel_sizes"],
        settings["n_conv_per_stage" if network == "unet" else "n_blocks_per_stage"],
        settings["n_conv_per_stage_decoder"],
    )


def _import_old_architecture(name: str, values: Mapping[str, Any]) -> Architecture:
    blocks = values["n_conv_per_stage_encoder"]
    base, cap = values["UNet_base_num_features"], values["unet_max_num_features"]
    return _architecture(
        name,
        _network_of(name, values["UNet_class_name"]),
        [min(base * 2**stage, cap) for stage in range(len(blocks))],
        values["pool_op_kernel_sizes"],
        values["conv_kernel_sizes"],
        blocks,
        values["n_conv_per_stage_decoder"],
    )


def _architecture(
    name: str, network: NetworkName, features: Any, strides: Any, kernels: Any, blocks: Any, decoder: Any
) -> Architecture:
    return Architecture.from_dict(
        {
            "network": network,
            "features_per_stage": features,
            "strides": strides,
            "kernel_sizes": kernels,
            "blocks_per_stage": blocks,
            "decoder_convs_per_stage": decoder,
        },
        f"plans.json, architecture of {name}",
    )


def _network_of(name: str, class_name: str) -> NetworkName:
    last = class_name.rsplit(".", 1)[-1]
    for network, known in NETWORK_CLASSES.items():
        if known.endswith("." + last):
            return network
    raise PlanError(
        f"plans.json, configuration {name}: network {class_name} is unknown. "
        "medseg loads PlainConvUNet and ResidualEncoderUNet."
    )


def _check_fixed(name: str, settings: Mapping[str, Any]) -> None:
    wrong = [key for key, value in FIXED_ARCHITECTURE.items() if settings.get(key, value) != value]
    if not str(settings.get("norm_op", "InstanceNorm")).rsplit(".", 1)[-1].startswith("InstanceNorm"):
        wrong.append("norm_op")
    if wrong:
        found = ", ".join(f"{key}={settings[key]!r}" for key in wrong)
        raise PlanError(
            f"plans.json, configuration {name}: {found} is not supported. "
            "medseg builds nnU-Net's networks with instance norm, LeakyReLU, bias, and no dropout."
        )
