"""Import of nnU-Net plans of any age, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import DatasetError, PlanError
from medseg.plan import from_nnunet, load_plan, save_nnunet_plan, to_nnunet
from medseg.plan.planner import plan_dataset

from .phantom_fingerprints import abdomen, info_of

DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": 20,
    "file_ending": ".nii.gz",
}


def exported(preset: str = "nnunet") -> dict[str, Any]:
    return to_nnunet(plan_dataset(abdomen(), info_of(DATASET_JSON), preset))


def as_old_format(plans: dict[str, Any]) -> dict[str, Any]:
    """Rewrite as nnU-Net before 2.3 did: the network by class name, base and cap of its features."""
    old = copy.deepcopy(plans)
    for configuration in old["configurations"].values():
        if "architecture" not in configuration:
            continue
        architecture = configuration.pop("architecture")
        settings = architecture["arch_kwargs"]
        class_name = architecture["network_class_name"].rsplit(".", 1)[-1]
        blocks = "n_conv_per_stage" if class_name == "PlainConvUNet" else "n_blocks_per_stage"
        configuration.update(
            UNet_class_name=class_name,
            UNet_base_num_features=settings["features_per_stage"][0],
            unet_max_num_features=320 if len(configuration["patch_size"]) == 3 else 512,
            n_conv_per_stage_encoder=settings[blocks],
            n_conv_per_stage_decoder=settings["n_conv_per_stage_decoder"],
            num_pool_per_axis=[5] * len(configuration["patch_size"]),
            pool_op_kernel_sizes=settings["strides"],
            conv_kernel_sizes=settings["kernel_sizes"],
        )
    return old


@pytest.mark.parametrize("preset", ["nnunet", "resenc-l"])
def test_old_plans_without_architecture_load_the_same(preset: str) -> None:
    plans = exported(preset)
    assert from_nnunet(as_old_format(plans), DATASET_JSON) == from_nnunet(plans, DATASET_JSON)


def test_cascade_inherits_and_is_written_short_again() -> None:
    plans = exported()
    plan = from_nnunet(plans, DATASET_JSON)
    cascade = plan.configurations["3d_cascade_fullres"]
    assert cascade.previous_stage == "3d_lowres"
    assert cascade.patch_size == plan.configurations["3d_fullres"].patch_size
    assert to_nnunet(plan)["configurations"]["3d_cascade_fullres"] == {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }


def test_inherited_keys_are_overridden_through_several_generations() -> None:
    plans = exported()
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    plans["configurations"]["grandchild"] = {"inherits_from": "child", "patch_size": [32, 32, 32]}
    plan = from_nnunet(plans, DATASET_JSON)
    assert plan.configurations["grandchild"].batch_size == 7
    assert plan.configurations["grandchild"].patch_size == (32, 32, 32)


def test_circular_inheritance_is_refused() -> None:
    plans = exported()
    plans["configurations"]["a"] = {"inherits_from": "b"}
    plans["configurations"]["b"] = {"inherits_from": "a"}
    with pytest.raises(PlanError, match="a -> b -> a"):
        from_nnunet(plans, DATASET_JSON)


def test_an_unknown_planner_is_kept_for_export() -> None:
    plans = exported() | {"experiment_planner_used": "MyPlanner"}
    plan = from_nnunet(plans, DATASET_JSON)
    assert plan.preset == "nnunet"
    assert to_nnunet(plan)["experiment_planner_used"] == "MyPlanner"


def refuse(change: Any, match: str) -> None:
    plans = exported()
    change(plans["configurations"]["3d_fullres"])
    with pytest.raises(PlanError, match=match):
        from_nnunet(plans, DATASET_JSON)


def test_what_medseg_cannot_build_is_refused_by_name() -> None:
    def batch_norm(c: dict[str, Any]) -> None:
        c["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"

    def dropout(c: dict[str, Any]) -> None:
        c["architecture"]["arch_kwargs"]["dropout_op"] = "torch.nn.Dropout3d"

    def other_network(c: dict[str, Any]) -> None:
        c["architecture"]["network_class_name"] = "somewhere.MedNeXt"

    def other_resampling(c: dict[str, Any]) -> None:
        c["resampling_fn_data"] = "resample_torch_fornnunet"

    def other_normalization(c: dict[str, Any]) -> None:
        c["normalization_schemes"] = ["MyNormalization"]

    def no_patch(c: dict[str, Any]) -> None:
        del c["patch_size"]

    refuse(batch_norm, "BatchNorm3d")
    refuse(dropout, "Dropout3d")
    refuse(other_network, "MedNeXt")
    refuse(other_resampling, "resample_torch_fornnunet")
    refuse(other_normalization, "MyNormalization")
    refuse(no_patch, "patch_size")


def test_a_trained_model_folder_loads(golden_dir: Path) -> None:
    for model in ("a_hippocampus", "i_resenc_hippocampus", "h_2d_aniso_ct", "g_region_ignore_two_channel_mr"):
        plan = load_plan(golden_dir / "inference" / model / "model" / "plans.json")
        theirs = json.loads((golden_dir / "inference" / model / "model" / "plans.json").read_text())
        ours = to_nnunet(plan)
        for configuration in (*ours["configurations"].values(), *theirs["configurations"].values()):
            configuration.pop("data_identifier", None)  # follows the plans name, which was edited
        assert ours == theirs


def test_an_nnunet_plan_needs_its_dataset_json_beside_it(tmp_path: Path) -> None:
    plan = plan_dataset(abdomen(), info_of(DATASET_JSON), "nnunet")
    save_nnunet_plan(plan, tmp_path / "plans.json")
    with pytest.raises(PlanError, match=r"dataset\.json"):
        load_plan(tmp_path / "plans.json")
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET_JSON))
    assert load_plan(tmp_path / "plans.json") == plan


def test_a_dataset_json_without_channels_is_refused() -> None:
    with pytest.raises(DatasetError, match="channel_names"):
        from_nnunet(exported(), {key: v for key, v in DATASET_JSON.items() if key != "channel_names"})


def test_networks_that_nnunet_lacks_are_not_exported() -> None:
    plan = plan_dataset(abdomen(), info_of(DATASET_JSON), "cpu")
    configuration = plan.configurations["3d_fullres"]
    other = configuration.replace(architecture=configuration.architecture.replace(network="segresnet"))
    with pytest.raises(PlanError, match="segresnet"):
        to_nnunet(plan.replace(configurations={"3d_fullres": other}))


@pytest.mark.parametrize(
    "broken", [{"configurations": []}, {"configurations": {}}, {"configurations": {"2d": 3}}]
)
def test_a_file_of_another_layout_is_one_clear_error(broken: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="nnU-Net"):
        from_nnunet(exported() | broken, DATASET_JSON)
