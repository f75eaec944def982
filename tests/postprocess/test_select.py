"""The choice: equal to nnU-Net's on made-up predictions, plain data afterwards."""

import numpy as np
import pytest

from medseg.errors import ConfigError, DatasetError, PlanError
from medseg.labels import LabelSet
from medseg.postprocess import (
    Postprocessing,
    Step,
    apply,
    choose_best,
    choose_postprocessing,
    singles_and_pairs,
)
from medseg.volume import Geometry, Volume
from tests.postprocess.scattered import CLASSES, N_CASES, REGION_ORDER, REGIONS, scattered_case

# Printed by nnunetv2 2.8.1, `python tests/postprocess/scattered.py`: labels of the accepted steps, and the
# foreground mean Dice before and after.
NNUNET = [
    (CLASSES, None, True, [(1,), (3,)], 0.9337879593481581, 0.9450572834593118),
    (CLASSES, None, False, [(1, 2, 3)], 0.9330753477682406, 0.9443446718793944),
    (REGIONS, REGION_ORDER, True, [(3,)], 0.9325003585465644, 0.945182094003748),
    (REGIONS, REGION_ORDER, False, [(1, 2, 3)], 0.9313480939193101, 0.945476683115079),
]


@pytest.mark.parametrize(("entries", "order", "two_parts", "steps", "before", "after"), NNUNET)
def test_the_choice_and_its_numbers_are_nnunets(entries, order, two_parts, steps, before, after):
    labels = LabelSet.parse(entries, order)
    pairs = [scattered_case(seed, two_parts) for seed in range(N_CASES)]
    chosen, trials = choose_postprocessing(pairs, labels)
    assert [step.labels for step in chosen.steps] == steps
    assert len(trials) == 4 and [t.target for t in trials] == ["foreground", *labels.foreground]
    assert trials[0].mean_before == pytest.approx(before, abs=1e-12)
    accepted = [trial for trial in trials if trial.accepted]
    assert accepted[-1].mean_after == pytest.approx(after, abs=1e-12)
    changed = [(apply(prediction, chosen), reference) for prediction, reference in pairs]
    assert choose_postprocessing(changed, labels)[1][0].mean_before == pytest.approx(after, abs=1e-12)


def test_perfect_predictions_are_left_alone():
    pairs = [(reference, reference) for _, reference in (scattered_case(k, False) for k in range(2))]
    chosen, trials = choose_postprocessing(iter(pairs), LabelSet.parse(CLASSES))
    assert chosen.steps == ()
    assert not any(trial.accepted for trial in trials)


def test_a_single_class_is_tried_once():
    prediction, reference = ((array > 0).astype(np.uint8) for array in scattered_case(0, False))
    chosen, trials = choose_postprocessing(
        [(prediction, reference)], LabelSet.parse({"background": 0, "x": 1})
    )
    assert len(trials) == 1 and trials[0].accepted
    assert trials[0].to_dict()["mean_after"] > trials[0].to_dict()["mean_before"]
    assert (apply(prediction, chosen) <= prediction).all()


def test_a_class_that_never_occurs_does_not_block_the_choice():
    labels = LabelSet.parse({**CLASSES, "never": 4})
    chosen, trials = choose_postprocessing([scattered_case(0, False)], labels)
    assert [step.labels for step in chosen.steps] == [(1, 2, 3, 4)]
    assert trials[0].to_dict()["before"]["never"] is None


def test_a_region_is_not_helped_at_the_cost_of_another():
    labels = LabelSet.parse({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    reference = np.zeros((1, 1, 20), np.uint8)
    reference[..., :10], reference[..., 15] = 1, 2  # the core lies apart from the rest of the whole
    prediction = reference.copy()
    prediction[..., 13:15] = 1  # grows the small part, so that dropping it helps "whole"
    prediction[..., 17:20] = 1
    chosen, trials = choose_postprocessing([(prediction, reference)], labels)
    whole = next(trial for trial in trials if trial.target == "whole")
    assert whole.after["whole"] > whole.before["whole"]
    assert (whole.before["core"], whole.after["core"]) == (1.0, 0.0)
    assert not whole.accepted and chosen.steps == ()


def test_no_pairs_is_an_error():
    with pytest.raises(DatasetError, match="none was given"):
        choose_postprocessing([], LabelSet.parse(CLASSES))


def test_steps_are_plain_data_that_survive_the_disk(tmp_path):
    steps = (
        Step(kind="keep_largest", labels=(1, 2)),
        Step(kind="remove_small", labels=(2,), min_mm3=12.5),
        Step(kind="fill_holes", labels=(1,)),
    )
    Postprocessing(steps=steps).save(tmp_path / "p.yaml")
    assert Postprocessing.load(tmp_path / "p.yaml").steps == steps


@pytest.mark.parametrize(
    "values",
    [{"kind": "remove_small", "labels": [1]}, {"kind": "keep_largest", "labels": [1], "min_mm3": 3.0}],
)
def test_a_size_belongs_to_remove_small_and_only_there(values):
    with pytest.raises(ConfigError, match="min_mm3"):
        Step.from_dict(values)


def test_a_volume_brings_its_voxel_size_and_keeps_its_grid():
    array = np.zeros((6, 4, 4), np.uint8)
    array[0, 0, 0] = array[3:6, 0, 0] = 1
    small = Postprocessing(steps=(Step(kind="remove_small", labels=(1,), min_mm3=5.0),))
    for spacing, left in ((2.0, 4), (1.0, 0)):
        volume = Volume(array, Geometry((6, 4, 4), np.diag([spacing, spacing, spacing, 1.0])))
        result = apply(volume, small)
        assert isinstance(result, Volume) and result.geometry == volume.geometry
        assert int(result.array.sum()) == left
    with pytest.raises(ConfigError, match="voxel_mm3"):
        apply(array, small)


def test_nnunets_file_is_read_and_an_unknown_function_refused():
    name = "remove_all_but_largest_component_from_segmentation"
    content = {
        "postprocessing_fns": [name, name],
        "postprocessing_kwargs": [{"labels_or_regions": [1, 2, 3]}, {"labels_or_regions": 2}],
    }
    assert [s.labels for s in Postprocessing.from_nnunet(content).steps] == [(1, 2, 3), (2,)]
    with pytest.raises(ConfigError, match=r"os\.system"):
        Postprocessing.from_nnunet({**content, "postprocessing_fns": ["os.system", name]})


def test_the_best_is_the_first_of_the_highest():
    scores = {"2d": 0.91, "3d_fullres": 0.91, "2d + 3d_fullres": 0.905, "broken": float("nan")}
    assert choose_best(scores) == "2d"
    assert choose_best({**scores, "2d + 3d_fullres": 0.92}) == "2d + 3d_fullres"
    with pytest.raises(PlanError):
        choose_best({"broken": float("nan")})


def test_singles_come_before_pairs():
    assert singles_and_pairs(["a", "b", "c"]) == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
