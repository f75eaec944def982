"""Anchors that fit, objects as they are read, and the plan of a detector."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import LabelError, PlanError, ReadError
from medseg.io import Case, Dataset
from medseg.labels import LabelSet
from medseg.plan import Architecture, Configuration
from medseg.plan.anchors import FEWEST_BOXES, best_overlap, expand, plan_anchors
from medseg.plan.detection import AnchorFit, Detection
from medseg.plan.detector import make_detector
from medseg.plan.objects import check_labels, class_table, name_objects, number_objects
from medseg.types import FloatArray

CELLS = LabelSet.parse({"background": 0, "cell": 1})
TWO = LabelSet.parse({"background": 0, "cell": 1, "debris": 2})


def configuration(dims: int, side: int = 64) -> Configuration:
    return Configuration(
        spacing=(1.0,) * dims,
        patch_size=(side,) * dims,
        batch_size=12,
        median_shape=(100.0,) * dims,
        normalization=("zscore",),
        use_mask_for_norm=(False,),
        batch_dice=False,
        architecture=Architecture(
            features_per_stage=(8, 16, 32, 64, 64),
            strides=((1,) * dims, *((2,) * dims,) * 4),
            kernel_sizes=((3,) * dims,) * 5,
            blocks_per_stage=(2,) * 5,
            decoder_convs_per_stage=(2,) * 4,
        ),
    )


def sizes(count: int, dims: int, middle: float = 14.0) -> FloatArray:
    rng = np.random.default_rng(1)
    drawn: FloatArray = np.exp(rng.normal(np.log(middle), 0.3, (count, dims))).round() + 1
    return drawn


def test_overlap_with_anchors_of_the_same_centre_is_the_ratio_of_sides() -> None:
    best = best_overlap(np.array([[4.0, 4], [2, 8]]), np.array([[4.0, 4], [4, 8]]))
    assert best.tolist() == [1.0, 0.5]


def test_anchors_grow_with_the_strides_of_their_level_an_axis() -> None:
    levels = expand([(1, 2), (4,), (5,)], np.array([[1, 1, 1], [1, 2, 2], [2, 4, 4]], float))
    assert np.array(levels)[1:].tolist() == [[[1, 8, 10], [2, 8, 10]], [[2, 16, 20], [4, 16, 20]]]


def test_planned_anchors_cover_the_objects_better_than_the_first_guess_and_are_always_the_same() -> None:
    objects, strides = sizes(60, 2), [(4, 4), (8, 8), (16, 16)]
    anchors, fit = plan_anchors(objects, strides)
    assert [len(level) for level in anchors] == [9, 9, 9]
    assert fit.mean_iou is not None and fit.iou_percentile_5 is not None
    start = expand([(4, 8, 16)] * 2, np.array(strides, float) / 4)
    guess = best_overlap(objects, np.array([size for level in start for size in level])).mean()
    assert fit.mean_iou > max(0.7, guess)
    assert fit.iou_percentile_5 < fit.mean_iou
    assert plan_anchors(objects, strides) == (anchors, fit)


def test_with_too_few_objects_defaults_are_used_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    anchors, fit = plan_anchors(sizes(FEWEST_BOXES - 1, 3), [(1, 4, 4), (2, 8, 8)])
    assert np.array(anchors).shape == (2, 27, 3)
    assert list(anchors[1][0]) == [8, 8, 8]
    assert fit.mean_iou is None and "only 19 objects" in fit.note
    assert "only 19 objects" in caplog.text


def test_components_and_values_are_numbered_with_their_class_inside() -> None:
    array = np.zeros((1, 6, 8), np.uint8)
    array[0, 0, 0:2], array[0, 1, 2], array[0, 4, 4:6], array[0, 0, 7] = 1, 1, 1, 2
    found = number_objects(array, TWO, "components")
    # corners touch: one component; the class is (value - 1) % 2
    assert found[0, 0, 0] == found[0, 1, 2] == 1
    assert (found[0, 4, 4], found[0, 0, 7]) == (3, 2)
    values = np.array([[[0, 7, 9, 300, 300]]])
    assert number_objects(values, CELLS, "values").tolist() == [[[0, 1, 2, 3, 3]]]
    assert number_objects(values, TWO, "values", {7: 1, 9: 0, 300: 1}).tolist() == [[[0, 2, 1, 4, 4]]]
    assert number_objects(values * 0, CELLS, "values").max() == 0
    assert number_objects(values * 0, TWO, "components").max() == 0


def test_objects_without_a_class_and_too_many_of_them_are_refused() -> None:
    values = np.array([[[0, 7, 9]]])
    with pytest.raises(LabelError, match="nothing says which object is of which"):
        number_objects(values, TWO, "values", where="case")
    with pytest.raises(LabelError, match="object 9 has no class of 0 to 1"):
        number_objects(values, TWO, "values", {7: 0})
    with pytest.raises(LabelError, match="more than a case may"):
        number_objects(np.arange(40_000).reshape(1, 200, 200), CELLS, "values", where="slide")


def test_regions_and_voxels_that_nobody_annotated_are_refused() -> None:
    with pytest.raises(PlanError, match="do not overlap"):
        check_labels(LabelSet.parse({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2]))
    with pytest.raises(PlanError, match="ignore"):
        check_labels(LabelSet.parse({"background": 0, "cell": 1, "ignore": 2}))


def test_numbers_that_nothing_names_are_objects_of_one_class(caplog: pytest.LogCaptureFixture) -> None:
    unnamed = LabelSet.parse({"background": 0, "label_1": 1, "label_2": 2})
    dataset = Dataset("d", Path("d"), ("x",), unnamed, (), (), ".png", "NaturalImage2DIO")
    assert list(name_objects(dataset).labels.foreground) == ["object"]
    assert "numbers of objects" in caplog.text
    for labels in (TWO, CELLS, LabelSet.parse({"background": 0, "label_1": 1})):
        named = replace(dataset, labels=labels)
        assert name_objects(named) is named


def test_a_file_of_classes_beside_the_label_map_is_read(tmp_path: Path) -> None:
    case = Case("a", (), tmp_path / "a.nii.gz", "a")
    assert class_table(case) is None
    (tmp_path / "a.json").write_text(json.dumps({"instances": {"1": 0, "5": 1}}))
    assert class_table(case) == {1: 0, 5: 1}
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ReadError, match="a class for every value"):
        class_table(case)


@pytest.mark.parametrize(("dims", "middle", "finest"), [(2, 9.0, 1), (2, 20.0, 2), (3, 14.0, 2)])
def test_the_finest_level_suits_the_smaller_objects(dims: int, middle: float, finest: int) -> None:
    planned = make_detector(configuration(dims), sizes(FEWEST_BOXES - 1, dims, middle), 2, "values", "cpu")
    assert planned.detection is not None
    assert planned.detection.finest_stage == finest
    assert planned.architecture.n_stages <= finest + 4
    assert len(planned.detection.anchors) == planned.architecture.n_stages - finest + 1
    assert planned.detection.n_classes == 2 and planned.order_seg == 0
    assert Configuration.from_dict(planned.to_dict()) == planned


def test_flat_objects_have_flat_masks() -> None:
    objects = sizes(FEWEST_BOXES - 1, 3) * np.array([0.2, 1, 1])
    planned = make_detector(configuration(3), objects, 1, "values", "nnunet")
    assert planned.detection is not None
    assert planned.detection.heads.mask_cells == (5, 14, 14)
    assert planned.detection.mask_shape == (10, 28, 28)
    thick = make_detector(configuration(3), sizes(FEWEST_BOXES - 1, 3), 1, "values", "nnunet").detection
    assert thick is not None and thick.mask_shape == (28, 28, 28)


def test_a_plan_without_a_detector_does_not_mention_one() -> None:
    assert "detection" not in configuration(2).to_dict()


def test_a_detector_that_does_not_fit_its_encoder_is_refused() -> None:
    planned = configuration(2)
    detection = Detection(anchors=(((8.0, 8.0),),), anchor_fit=AnchorFit(boxes=0)).to_dict()
    with pytest.raises(PlanError, match="has 1 levels of 2 axes; the encoder has 4"):
        planned.replace(detection=detection)
    with pytest.raises(PlanError, match="same number of anchors"):
        Detection.from_dict({"anchors": [[[8, 8]], [[8, 8], [9, 9]]]})
