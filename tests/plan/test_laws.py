"""Laws that hold for every dataset."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.plan import Fingerprint, Plan, PlanOptions, from_nnunet, plan_dataset, to_nnunet
from medseg.plan.explain import explain
from medseg.plan.presets import PRESETS
from medseg.plan.topology import REFERENCE_BATCH, architecture_elements

from .phantom_fingerprints import fingerprint_of, info_of

SPACING = st.tuples(*[st.floats(0.3, 6.0)] * 3)
SHAPE = st.tuples(*[st.integers(5, 260)] * 3)
LABELS = {"background": 0, "a": 1, "b": 2}


@st.composite
def fingerprints(draw: Any) -> Fingerprint:
    n = draw(st.integers(1, 6))
    spacings = draw(st.lists(SPACING, min_size=n, max_size=n))
    shapes = draw(st.lists(SHAPE, min_size=n, max_size=n))
    return fingerprint_of(spacings, shapes, cropped=draw(st.floats(0.3, 1.0)))


def description(n_training: int) -> dict[str, Any]:
    return {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": n_training,
        "file_ending": ".nii.gz",
    }


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=12, deadline=None)
@given(seen=fingerprints(), n=st.integers(1, 500))
def test_every_plan_fits_its_network_and_its_memory(seen: Fingerprint, preset: str, n: int) -> None:
    plan = plan_dataset(seen, info_of(description(n)), preset)
    rules = PRESETS[plan.preset]
    for configuration in plan.configurations.values():
        architecture = configuration.architecture
        divisor = [math.prod(column) for column in zip(*architecture.strides, strict=True)]
        assert all(p % d == 0 for p, d in zip(configuration.patch_size, divisor, strict=True))
        assert all(p // d >= 1 for p, d in zip(configuration.patch_size, divisor, strict=True))
        assert configuration.batch_size >= 2
        elements = architecture_elements(architecture, configuration.patch_size, len(LABELS))
        reference = rules.reference(configuration.dimensions)
        if reference is not None:
            assert elements * 2 <= reference * REFERENCE_BATCH[configuration.dimensions]
        limit = rules.max_patch_voxels(configuration.dimensions)
        assert limit is None or math.prod(configuration.patch_size) <= limit


@settings(max_examples=40, deadline=None)
@given(seen=fingerprints(), preset=st.sampled_from(list(PRESETS)))
def test_plans_survive_export_to_nnunet_and_back(seen: Fingerprint, preset: str) -> None:
    plan = plan_dataset(seen, info_of(description(9)), preset)
    assert from_nnunet(to_nnunet(plan), description(9)) == plan


@settings(max_examples=30, deadline=None)
@given(
    seen=fingerprints(),
    preset=st.sampled_from(list(PRESETS)),
    ram=st.none() | st.floats(0.5, 64),
    minutes=st.none() | st.floats(0.1, 1000),
    batch=st.none() | st.integers(1, 40),
)
def test_budgets_keep_plans_valid_and_survive_the_disk(
    seen: Fingerprint, preset: str, ram: float | None, minutes: float | None, batch: int | None
) -> None:
    options = PlanOptions(ram_gb=ram, minutes=minutes, max_batch_size=batch)
    plan = plan_dataset(seen, info_of(description(30)), preset, options)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert batch is None or all(c.batch_size <= batch for c in plan.configurations.values())


@settings(max_examples=30, deadline=None)
@given(seen=fingerprints(), preset=st.sampled_from(list(PRESETS)))
def test_the_transpose_and_its_inverse_cancel(seen: Fingerprint, preset: str) -> None:
    plan = plan_dataset(seen, info_of(description(3)), preset)
    axes = [plan.transpose_forward[axis] for axis in plan.transpose_backward]
    assert axes == [0, 1, 2]
    assert (
        plan.configurations[plan.default_configuration].spacing[0]
        == max(plan.configurations[plan.default_configuration].spacing)
        or plan.preset == "cpu"
    )


@settings(max_examples=30, deadline=None)
@given(seen=fingerprints(), preset=st.sampled_from(list(PRESETS)))
def test_an_untouched_plan_is_explained_by_its_rules(seen: Fingerprint, preset: str) -> None:
    plan = plan_dataset(seen, info_of(description(len(seen.spacings))), preset)
    reasons = explain(plan, seen)
    assert not [reason for reason in reasons if "by hand" in reason.rule]
    sections = {reason.section for reason in reasons}
    assert sections == {"dataset", *plan.configurations}
