"""Overlap: against a plain count, against nnU-Net's files, and where masks are empty."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg.errors import GeometryError
from medseg.metrics import Counts, contingency, evaluate
from medseg.metrics.overlap import mask_of

MODELS = (
    "a_hippocampus",
    "b_aniso_ct",
    "g_region_ignore_two_channel_mr",
    "h_2d_aniso_ct",
    "i_resenc_hippocampus",
)
MAPS = hnp.arrays(np.uint8, (4, 5, 3), elements=st.integers(0, 4))


def plain_counts(reference: np.ndarray, prediction: np.ndarray, label, ignore) -> Counts:
    use = reference != ignore
    truth, guess = np.isin(reference, label), np.isin(prediction, label)
    return Counts(
        int((truth & guess & use).sum()),
        int((~truth & guess & use).sum()),
        int((truth & ~guess & use).sum()),
        int((~truth & ~guess & use).sum()),
    )


@given(MAPS, MAPS, st.sampled_from([1, 4, (1, 2), (2,), (1, 2, 3)]), st.sampled_from([None, 4]))
@settings(max_examples=60, deadline=None)
def test_counts_of_any_class_region_and_ignore_label_equal_a_plain_count(
    reference, prediction, label, ignore
):
    assert contingency(reference, prediction, ignore).counts(label) == plain_counts(
        reference, prediction, label, ignore
    )


@pytest.mark.parametrize("dtype", [bool, np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_and_negative_values_any_dtype_and_memory_order_are_counted(dtype, order):
    rng = np.random.default_rng(3)
    values = np.array([0, 1] if dtype is bool else [0, 1, 300, 40000 if dtype != np.int16 else -7], dtype)
    reference, prediction = (np.array(rng.choice(values, (9, 8, 7)), order=order) for _ in range(2))
    table = contingency(reference, prediction.copy(order="C"))
    for value in values[1:]:
        assert table.counts(int(value)) == plain_counts(reference, prediction, int(value), None)


@given(MAPS, MAPS)
@settings(max_examples=30, deadline=None)
def test_dice_is_symmetric_and_perfect_against_itself(a, b):
    forth, back = contingency(a, b).counts(1), contingency(b, a).counts(1)
    assert (forth.fp, forth.fn) == (back.fn, back.fp)
    assert forth.dice == back.dice or (math.isnan(forth.dice) and math.isnan(back.dice))
    same = contingency(a, a).counts(1)
    assert same.dice == 1.0 if (a == 1).any() else math.isnan(same.dice)


def test_a_map_larger_than_one_chunk_is_counted_whole():
    reference = np.zeros((130, 100, 100), np.uint8)
    reference[-1, -1, -1] = 1
    assert contingency(reference, reference).counts(1) == Counts(1, 0, 0, reference.size - 1)


def test_empty_masks_give_nan_and_infinity_not_a_score():
    both = Counts(0, 0, 0, 9)
    assert math.isnan(both.dice) and math.isnan(both.iou) and math.isnan(both.volume_error_relative)
    assert both.volume_error_ml(0.5) == 0.0
    only_predicted = Counts(0, 3, 0, 6)
    assert only_predicted.dice == 0.0
    assert only_predicted.volume_error_relative == math.inf
    assert only_predicted.volume_error_ml(0.5) == 1.5
    assert Counts(0, 0, 4, 6).volume_error_relative == -1.0


def test_different_shapes_are_refused_with_a_remedy():
    with pytest.raises(GeometryError, match="Resample"):
        contingency(np.zeros((2, 2), int), np.zeros((2, 3), int))


def test_a_region_mask_is_the_union_of_its_labels():
    assert mask_of(np.arange(4), (1, 3)).tolist() == [False, True, False, True]


def same(ours: object, theirs: object) -> int:
    """Compare nested values to 1e-12, null meaning NaN; return how many numbers agreed."""
    if isinstance(theirs, dict):
        return sum(same(ours[key], value) for key, value in theirs.items() if not key.endswith("_file"))
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        return sum(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if math.isnan(theirs):
        assert ours is None
    else:
        assert ours == pytest.approx(theirs, abs=1e-12, rel=1e-12)
    return 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("run", ["pred_mirror", "pred_nomirror"])
def test_the_json_equals_nnunets_summary(golden_dir: Path, model: str, run: str):
    folder = golden_dir / "inference" / model
    result = evaluate(
        folder / run, folder / "labelsTs", labels=folder / "model" / "dataset.json", metrics=("dice", "iou")
    )
    summary = json.loads((folder / run / "summary.json").read_text())
    assert same(result.to_dict(), summary) >= 72
    assert result.mean("dice") == pytest.approx(summary["foreground_mean"]["Dice"], abs=1e-12)
