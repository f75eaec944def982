"""Every value is told with its rule, its numbers and its source."""

import json
from pathlib import Path

import pytest

from medseg.plan import Explanation, PlanOptions, explain, from_nnunet, plan_dataset, to_nnunet
from medseg.plan.explain import REFERENCES

from .phantom_fingerprints import abdomen, heart, hippocampus, info_of

DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 20,
    "file_ending": ".nii.gz",
}


def find(reasons: list[Explanation], section: str, name: str) -> Explanation:
    (found,) = [reason for reason in reasons if (reason.section, reason.name) == (section, name)]
    return found


def test_every_explanation_has_value_rule_and_source() -> None:
    for preset in ("nnunet", "resenc-l", "cpu"):
        for reason in explain(plan_dataset(abdomen(), info_of(), preset), abdomen()):
            assert reason.value and reason.rule and reason.source, reason
            assert reason.source.split(",")[0].split(";")[0] in REFERENCES or "()" in reason.source, reason


def test_the_numbers_are_those_of_the_data() -> None:
    plan = plan_dataset(hippocampus(), info_of(n_training=100), "nnunet")
    reasons = explain(plan, hippocampus(), 100)
    patch = find(reasons, "3d_fullres", "patch size")
    assert patch.value == "40x56x40" and "560 million allowed for 8 GB" in patch.numbers
    batch = find(reasons, "3d_fullres", "batch size")
    assert batch.value == "3" and batch.numbers == "GPU memory: 58; coverage: 3"
    assert find(reasons, "dataset", "channel MRI").value == "zscore"


def test_the_coarse_axis_rule_tells_what_fired_it() -> None:
    reason = find(explain(plan_dataset(heart(), info_of(), "nnunet"), heart()), "dataset", "target spacing")
    assert reason.value == "5 x 1.4 x 1.4"
    assert "7.14 times" in reason.numbers and "10th percentile" in reason.rule


def test_a_value_changed_by_hand_is_said_to_be_so() -> None:
    plan = plan_dataset(hippocampus(), info_of(n_training=100), "nnunet")
    edited = plan.configurations["3d_fullres"].replace(batch_size=9)
    plan = plan.replace(configurations={**plan.configurations, "3d_fullres": edited})
    reasons = explain(plan, hippocampus())
    batch = find(reasons, "3d_fullres", "batch size")
    assert batch.value == "9" and "by hand" in batch.rule and "would give 3" in batch.numbers
    assert "by hand" not in find(reasons, "3d_fullres", "patch size").rule


def test_options_and_changed_rules_are_shown_and_taken_into_account() -> None:
    options = PlanOptions(gpu_memory_gb=16, rules={"base_features": 24})
    reasons = explain(plan_dataset(abdomen(), info_of(), "nnunet", options), abdomen())
    assert "gpu_memory_gb 16" in find(reasons, "dataset", "preset").numbers
    assert "16 GB" in find(reasons, "3d_fullres", "patch size").numbers
    assert not [reason for reason in reasons if "by hand" in reason.rule]


def test_an_imported_plan_is_explained_without_a_fingerprint() -> None:
    plan = plan_dataset(abdomen(), info_of(DATASET_JSON), "resenc-l")
    reasons = explain(from_nnunet(to_nnunet(plan), DATASET_JSON))
    assert {reason.section for reason in reasons} == {"dataset", *plan.configurations}
    assert find(reasons, "3d_cascade_fullres", "cascade").value == "after 3d_lowres"


def test_golden_plans_are_explained_by_their_rules(golden_dir: Path) -> None:
    from medseg.plan import Fingerprint

    for name in ("D02_abdomen_ct_mixed", "D04_cardiac_acdc", "D08_microscopy2d_rgb_png"):
        content = json.loads((golden_dir / "plans" / f"{name}.json").read_text())
        seen = Fingerprint.from_dict(content["fingerprint"])
        plan = from_nnunet(content["plans"]["ResEncL"], content["dataset_json"])
        reasons = explain(plan, seen, content["dataset_json"]["numTraining"])
        assert not [reason for reason in reasons if "by hand" in reason.rule]


@pytest.mark.parametrize("preset", ["nnunet", "cpu"])
def test_what_goes_into_an_explanation_fits_on_a_line_of_words(preset: str) -> None:
    for reason in explain(plan_dataset(abdomen(), info_of(), preset), abdomen()):
        assert len(reason.rule) < 300 and len(reason.numbers) < 250 and len(reason.value) < 60, reason
