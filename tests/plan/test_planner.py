"""Budgets, the cpu preset, and the parts of planning that the golden files do not show."""

import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medseg.errors import ConfigError, DatasetError, PlanError
from medseg.plan import (
    DatasetInfo,
    Fingerprint,
    Plan,
    PlanOptions,
    load_plan,
    make_plan,
    plan_dataset,
    presets,
    save_plan,
)
from medseg.plan.presets import PRESETS, Rules, read_preset
from medseg.plan.spacing import choose_spacing, choose_transpose, invert, median_shape
from medseg.plan.topology import architecture_elements

from .phantom_fingerprints import abdomen, fingerprint_of, heart, hippocampus, info_of, picture

CONFIGS = Path(__file__).parents[2] / "configs" / "plan"


def cpu(**options: object) -> Plan:
    return plan_dataset(hippocampus(), info_of(), "cpu", PlanOptions.from_dict(options))


def step_elements(plan: Plan, name: str = "3d_fullres") -> int:
    c = plan.configurations[name]
    return c.batch_size * architecture_elements(c.architecture, c.patch_size, len(plan.labels.entries))


def test_cpu_preset_covers_the_hippocampus_with_nnunets_patch() -> None:
    plan = cpu()
    configuration = plan.configurations["3d_fullres"]
    assert list(plan.configurations) == ["3d_fullres"]
    assert configuration.patch_size == (40, 56, 40)
    assert configuration.architecture.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert configuration.architecture.features_per_stage[0] == PRESETS["cpu"].base_features
    assert plan.recipe == "cpu"


def test_cpu_preset_coarsens_a_large_ct_until_a_patch_sees_enough() -> None:
    plan = plan_dataset(abdomen(), info_of(), "cpu")
    full = plan_dataset(abdomen(), info_of(), "nnunet").configurations["3d_fullres"]
    mine = plan.configurations["3d_fullres"]
    rules = PRESETS["cpu"]
    assert rules.max_patch_voxels_3d and rules.max_patches_per_case
    assert all(ours > theirs for ours, theirs in zip(mine.spacing, full.spacing, strict=True))
    assert math.prod(mine.patch_size) <= rules.max_patch_voxels_3d
    voxels = math.prod(mine.median_shape)
    assert 0.9 < voxels / (rules.max_patch_voxels_3d * rules.max_patches_per_case) < 1.01


def test_cpu_preset_keeps_the_spacing_of_small_data() -> None:
    assert cpu().configurations["3d_fullres"].spacing == (1.0, 1.0, 1.0)


def test_pictures_get_a_2d_plan_only() -> None:
    for preset in ("cpu", "nnunet"):
        plan = plan_dataset(picture(), info_of(), preset)
        assert list(plan.configurations) == ["2d"]
        assert plan.default_configuration == "2d"


def test_without_a_gpu_driver_the_cpu_preset_is_chosen_and_torch_stays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presets, "_has_gpu_driver", lambda: False)
    monkeypatch.setattr(presets, "_torch_sees_cuda", lambda: pytest.fail("torch was asked"))
    assert plan_dataset(hippocampus(), info_of()).preset == "cpu"


def test_with_a_cuda_device_the_nnunet_preset_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_has_gpu_driver", lambda: True)
    monkeypatch.setattr(presets, "_torch_sees_cuda", lambda: True)
    assert plan_dataset(hippocampus(), info_of()).preset == "nnunet"


def test_a_budget_brings_back_the_papers_cap_on_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    info = info_of(n_training=100)
    with caplog.at_level(logging.WARNING):
        free = plan_dataset(hippocampus(), info, "resenc-l")
    assert free.configurations["2d"].batch_size == 2734
    assert "2734" in caplog.text and "max_batch_size" in caplog.text
    capped = plan_dataset(hippocampus(), info, "resenc-l", PlanOptions(ram_gb=64))
    assert capped.configurations["2d"].batch_size == 137
    assert capped.configurations["3d_fullres"].batch_size == 3


def test_max_batch_size_is_obeyed_even_below_two() -> None:
    plan = plan_dataset(hippocampus(), info_of(), "resenc-l", PlanOptions(max_batch_size=1))
    assert {c.batch_size for c in plan.configurations.values()} == {1}


def test_host_memory_limits_the_batch() -> None:
    sizes = [
        plan_dataset(picture(), info_of(n_training=5000), "resenc-xl", PlanOptions(ram_gb=gb))
        .configurations["2d"]
        .batch_size
        for gb in (0.7, 1.0, 16.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("options", [{"ram_gb": 1.0}, {"minutes": 2.0}])
def test_cpu_budgets_lower_the_cost_of_a_step(options: dict[str, float]) -> None:
    free = plan_dataset(abdomen(), info_of(), "cpu")
    tight = plan_dataset(abdomen(), info_of(), "cpu", PlanOptions.from_dict(options))
    assert step_elements(tight) < step_elements(free) / 1.5
    assert math.prod(tight.configurations["3d_fullres"].patch_size) >= 16**3


def test_a_budget_of_seconds_still_gives_a_plan() -> None:
    assert cpu(minutes=0.01).configurations["3d_fullres"].patch_size


def test_gpu_memory_too_small_for_any_patch_is_an_error() -> None:
    with pytest.raises(PlanError, match="memory budget"):
        plan_dataset(hippocampus(), info_of(), "nnunet", PlanOptions(gpu_memory_gb=1e-7))


def test_more_gpu_memory_never_gives_a_smaller_patch() -> None:
    voxels = [
        math.prod(
            plan_dataset(abdomen(), info_of(), "nnunet", PlanOptions(gpu_memory_gb=gb))
            .configurations["3d_fullres"]
            .patch_size
        )
        for gb in (4, 8, 16, 32)
    ]
    assert voxels == sorted(voxels) and voxels[0] < voxels[-1]


def test_coarse_axis_takes_the_tenth_percentile_but_not_below_the_plane() -> None:
    assert choose_spacing(heart()).spacing[0] == 5.0
    assert choose_spacing(heart()).rule == "percentile"
    spacings = [(5.0, 1.4, 1.4)] * 8 + [(1.0, 1.4, 1.4)] * 2
    thin = choose_spacing(fingerprint_of(spacings, [(10, 240, 220)] * 10))
    assert thin.rule == "in-plane" and thin.spacing[0] == 1.4 + 1e-5


def test_coarse_axis_comes_first_and_the_permutation_is_undone() -> None:
    assert choose_transpose((0.9, 4.0, 0.9)) == (1, 0, 2)
    assert choose_transpose((0.9, 4.0, 0.9), suppress=True) == (0, 1, 2)
    assert invert((1, 2, 0)) == (2, 0, 1)


def test_the_median_of_an_even_number_of_cases_may_end_in_a_half() -> None:
    seen = fingerprint_of([(1.0, 1.0, 1.0)] * 2, [(20, 30, 40), (21, 30, 40)])
    assert median_shape(seen, (1.0, 1.0, 1.0)) == (20.5, 30.0, 40.0)
    # The half is padded from: 20.5 with divisor 4 gives 24, where 20 would stay 20.
    plan = plan_dataset(seen, info_of(), "nnunet")
    assert plan.configurations["3d_fullres"].patch_size[0] == 24


def test_the_nonzero_mask_is_used_for_zscores_of_cropped_data_only() -> None:
    description = {
        "channel_names": {"0": "T1", "1": "ct", "2": "noNorm"},
        "labels": {"background": 0, "a": 1},
        "numTraining": 2,
        "file_ending": ".mha",
    }
    seen = fingerprint_of([(1.0, 1.0, 1.0)] * 2, [(40, 40, 40)] * 2, channels=3, cropped=0.7)
    configuration = plan_dataset(seen, info_of(description), "nnunet").configurations["3d_fullres"]
    assert configuration.normalization == ("zscore", "ct", "none")
    assert configuration.use_mask_for_norm == (True, False, False)


@pytest.mark.parametrize(
    ("ending", "shape", "reader"),
    [
        (".nii.gz", (9, 9, 9), "SimpleITKIO"),
        (".nii", (9, 9, 9), "NibabelIO"),
        (".png", (1, 9, 9), "NaturalImage2DIO"),
        (".tif", (1, 9, 9), "NaturalImage2DIO"),
        (".tif", (9, 9, 9), "Tiff3DIO"),
        (".TIFF", (9, 9, 9), "Tiff3DIO"),
    ],
)
def test_the_reader_follows_the_file_ending(ending: str, shape: tuple[int, ...], reader: str) -> None:
    description = {"channel_names": {"0": "a"}, "labels": {"background": 0, "b": 1}, "numTraining": 1}
    seen = fingerprint_of([(1.0, 1.0, 1.0)], [shape])
    assert DatasetInfo.from_json({**description, "file_ending": ending}, None, seen).reader == reader
    given = {**description, "file_ending": ending, "overwrite_image_reader_writer": "MyIO"}
    assert DatasetInfo.from_json(given).reader == "MyIO"


def test_an_incomplete_dataset_json_names_what_is_missing() -> None:
    with pytest.raises(DatasetError, match="numTraining, file_ending"):
        DatasetInfo.from_json({"channel_names": {"0": "CT"}, "labels": {"background": 0}})
    with pytest.raises(DatasetError, match=r"\.dcm"):
        info_of(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0},
                "numTraining": 1,
                "file_ending": ".dcm",
            }
        )


def test_a_fingerprint_of_another_dataset_is_refused() -> None:
    two_channels = fingerprint_of([(1.0, 1.0, 1.0)], [(9, 9, 9)], channels=2)
    with pytest.raises(PlanError, match="2 channels"):
        plan_dataset(two_channels, info_of(), "nnunet")


def test_an_unknown_preset_or_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resenc-xxl"):
        read_preset("resenc-xxl")
    path = tmp_path / "mine.yaml"
    path.write_text("extends: cpu\nbase_feature: 8\n")
    with pytest.raises(ConfigError, match="base_features"):
        read_preset(path)
    path.write_text("base_features: 8\n")
    with pytest.raises(ConfigError, match="extends"):
        read_preset(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_plans(path: Path) -> None:
    name, changes = read_preset(path)
    assert changes
    plan = plan_dataset(abdomen(), info_of(), path)
    assert plan.preset == name
    assert plan.plans_name == changes["plans_name"]
    assert set(changes) <= set(Rules.model_fields)


def test_there_are_shipped_configs() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) >= 3


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_plan_is_read_back_as_written(tmp_path: Path, suffix: str) -> None:
    plan = plan_dataset(abdomen(), info_of(), "resenc-m", PlanOptions(ram_gb=20, target_spacing=(2, 1, 1)))
    save_plan(plan, tmp_path / f"plan{suffix}")
    assert load_plan(tmp_path / f"plan{suffix}") == plan


def test_the_yaml_says_its_axis_order(tmp_path: Path) -> None:
    plan = plan_dataset(heart(), info_of(), "nnunet")
    save_plan(plan, tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("#") and "(k, j, i)" in text
    assert "patch_size: [" in text
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_planning_takes_milliseconds() -> None:
    seen, info = abdomen(), info_of()
    began = time.process_time()
    plan_dataset(seen, info, "nnunet")
    assert time.process_time() - began < 0.5  # measured 0.02 s; nnU-Net 3.5 s


def test_planning_imports_no_heavy_package() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from plan.phantom_fingerprints import abdomen, info_of\n"
        "from medseg.plan import plan_dataset, explain, to_nnunet\n"
        "plan = plan_dataset(abdomen(), info_of(), 'resenc-l'); to_nnunet(plan); explain(plan, abdomen())\n"
        "heavy = {'torch', 'monai', 'scipy', 'nibabel', 'SimpleITK', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_plan_looks_at_a_dataset_and_takes_budgets_by_name(golden_dir: Path) -> None:
    folder = golden_dir / "preprocess" / "aniso_ct"
    golden = load_plan_of(folder)
    plan = make_plan(folder, "nnunet", exact=False)
    assert plan.configurations == golden.configurations
    assert plan.dataset_name == "aniso_ct"
    assert make_plan(folder, "nnunet", exact=False, max_batch_size=1).configurations["2d"].batch_size == 1
    with pytest.raises(ConfigError, match="max_batch_size"):
        make_plan(folder, "nnunet", exact=False, max_batchsize=1)


def load_plan_of(folder: Path) -> Plan:
    return load_plan(folder / "nnUNetPlans.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"spacings": []}, "at least one case"),
        ({"spacings": [[1.0, 1.0]]}, "three numbers"),
        ({"spacings": [[0.0, 1.0, 1.0]]}, "above 0"),
        ({"shapes_after_crop": [[9, 9, 9], [9, 9, 9]]}, "one shape a case"),
        ({"shape": []}, "shapes_after_crop"),
    ],
)
def test_a_malformed_fingerprint_is_one_clear_error(change: dict[str, object], match: str) -> None:
    good = fingerprint_of([(1.0, 1.0, 1.0)], [(9, 9, 9)]).to_dict()
    with pytest.raises(ConfigError, match=match):
        Fingerprint.from_dict({**good, **change})
