"""AJI, SEG, DET, counts, mistakes, COCO AP, FROC: against peers, brute force and counting by hand."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

from medseg.errors import ConfigError, DatasetError, GeometryError, LabelError
from medseg.metrics.aggregated_jaccard import aggregated_jaccard, aggregated_jaccard_plus
from medseg.metrics.average_precision import cell_average_precision
from medseg.metrics.cell_tracking import TrackingCounts, tracking_counts
from medseg.metrics.coco import (
    LESION_THRESHOLDS,
    CocoPrecision,
    Detections,
    box_overlaps,
    coco_average_precision,
    detections_from_boxes,
    detections_from_table,
    mean_over_classes,
)
from medseg.metrics.counting import count_agreement
from medseg.metrics.froc import Scan, froc, hits_by_centre, hits_by_distance, hits_by_iou
from medseg.metrics.matching import EmptyPolicy, match_objects
from medseg.metrics.mistakes import KINDS, find_mistakes
from medseg.metrics.overlap_table import overlap_table
from medseg.metrics.panoptic import (
    PanopticClasses,
    PanopticQuality,
    panoptic_quality,
    panoptic_quality_by_class,
)
from tests.metrics.object_maps import scores_of
from tests.metrics.test_instance_goldens import NAMES, golden, images_of, maps, near, near_all, table
from tests.metrics.test_overlap_table import MAPS


def dense(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intersections and unions of all objects against all."""
    labels = [np.unique(m[m > 0]) for m in (a, b)]
    shape = tuple(map(len, labels))
    inside = np.array([((a == i) & (b == j)).sum() for i in labels[0] for j in labels[1]]).reshape(shape)
    union = np.array([((a == i) | (b == j)).sum() for i in labels[0] for j in labels[1]]).reshape(shape)
    return inside, union


def aji_by_hand(a: np.ndarray, b: np.ndarray, one_to_one: bool) -> float:
    inside, union = dense(a, b)
    iou = inside / np.maximum(union, 1)
    if one_to_one:
        taken = [(i, j) for i, j in zip(*linear_sum_assignment(-iou), strict=True) if iou[i, j] > 0]
    else:
        taken = [(i, int(row.argmax())) for i, row in enumerate(iou) if row.size and row.max() > 0]
    sizes = [np.unique(m[m > 0], return_counts=True)[1] for m in (a, b)]
    total = sum(union[i, j] for i, j in taken)
    total += sum(n for i, n in enumerate(sizes[0]) if i not in {i for i, _ in taken})
    total += sum(n for j, n in enumerate(sizes[1]) if j not in {j for _, j in taken})
    return sum(inside[i, j] for i, j in taken) / total if total else math.nan


@given(pair=MAPS)
@settings(max_examples=40, deadline=None)
def test_aggregated_jaccard_equals_brute_force(pair: tuple[np.ndarray, np.ndarray]) -> None:
    both = overlap_table(*pair)
    assert aggregated_jaccard(both) == near(aji_by_hand(*pair, one_to_one=False))
    assert aggregated_jaccard_plus(both) == near(aji_by_hand(*pair, one_to_one=True))


@pytest.mark.parametrize("name", ["crowded_3d", "halves_2d"])
def test_aggregated_jaccard_of_many_objects_equals_brute_force(name: str) -> None:
    assert aggregated_jaccard(table(name)) == near(aji_by_hand(*maps()[name], one_to_one=False))
    assert aggregated_jaccard_plus(table(name)) == near(aji_by_hand(*maps()[name], one_to_one=True))


@pytest.mark.parametrize("name", images_of("ctc"))
def test_seg_and_det_equal_py_ctcmetrics(name: str) -> None:
    expected, counts = golden("ctc")["images"][name], tracking_counts(table(name))
    assert (counts.splits, counts.fn, counts.fp) == (expected["ns"], expected["fn"], expected["fp"])
    assert (counts.seg, counts.det) == (near(expected["seg"]), near(expected["det"]))


def test_seg_and_det_of_empty_sides() -> None:
    nothing, missed, invented = (
        tracking_counts(table(f"{n}_empty_2d")) for n in ("both", "prediction", "reference")
    )
    assert math.isnan(nothing.seg) and math.isnan(nothing.det) and math.isnan(invented.det)
    assert (missed.seg, missed.det) == (0.0, 0.0)
    assert nothing + missed + invented == TrackingCounts(n_ref=40, fp=invented.fp)


@given(pair=MAPS)
@settings(max_examples=40, deadline=None)
def test_matching_is_the_best_assignment_there_is(pair: tuple[np.ndarray, np.ndarray]) -> None:
    inside, union = dense(*pair)
    iou = inside / np.maximum(union, 1)
    for tau in (0.1, 0.34, 0.5, 0.7):
        match = match_objects(overlap_table(*pair), tau)
        rows, columns = linear_sum_assignment(-((iou >= tau) + iou / (2 * max(1, min(iou.shape)))))
        best = iou[rows, columns][iou[rows, columns] >= tau]
        assert match.tp == best.size
        assert len(np.unique(match.pairs[:, 0])) == len(np.unique(match.pairs[:, 1])) == match.tp
        assert (match.iou >= tau).all()
        assert match.found().sum() == match.true().sum() == match.tp


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.1, math.nan])
def test_a_threshold_that_matches_nothing_or_everything_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match="expected a threshold"):
        match_objects(table("halves_2d"), tau)


def test_policies_for_empty_images_decide_what_enters_the_mean() -> None:
    tables = [table(f"{name}_empty_2d") for name in ("both", "reference", "prediction")]
    usual = cell_average_precision(tables, [0.5])
    assert usual.per_image[:, 0].tolist() == pytest.approx([math.nan, 0.0, 0.0], nan_ok=True)
    assert (usual.mean_over_images[0], usual.pooled[0], usual.msa_per_image) == (0.0, 0.0, 0.0)
    kind = cell_average_precision(tables, [0.5], EmptyPolicy(both=1.0, reference=None, prediction=0.0))
    assert kind.per_image[:, 0].tolist() == pytest.approx([1.0, math.nan, 0.0], nan_ok=True)
    assert kind.mean_over_images[0] == 0.5
    with pytest.raises(DatasetError, match="at least one"):
        cell_average_precision([])


def test_panoptic_quality_adds_up_over_images() -> None:
    one = panoptic_quality(table("touching_2d"))
    assert one + PanopticQuality() == one
    assert (one + one).pq == near(one.pq)
    assert one.pq == near(one.sq * one.rq)
    assert math.isnan(PanopticQuality().pq)


def test_void_takes_part_in_nothing() -> None:
    reference = np.array([1, 1, 1, 9, 9, 9, 2, 0])
    prediction = np.array([5, 5, 5, 5, 6, 6, 0, 7])
    quality = panoptic_quality(overlap_table(reference, prediction), void_references=[9])
    assert (quality.tp, quality.fp, quality.fn, quality.iou_sum) == (1, 1, 1, 1.0)
    all_void = panoptic_quality(overlap_table(reference, prediction), void_references=[9, 0])
    assert (all_void.tp, all_void.fp, all_void.fn) == (1, 0, 1)
    plain = panoptic_quality(overlap_table(reference, prediction))
    assert (plain.tp, plain.fp, plain.fn) == (2, 1, 1)


def test_panoptic_classes_are_averaged_where_present() -> None:
    both = overlap_table(np.array([1, 1, 2, 3]), np.array([1, 1, 4, 4]))
    names = {1: "cell", 2: "sky", 3: "sea", 4: "sky"}
    result = panoptic_quality_by_class(both, names, names, things=["cell", "lesion"], stuff=["sky", "sea"])
    assert (result.overall_things.pq, result.overall_things.classes) == (1.0, 1)
    assert result.overall_stuff.classes == 2 and result.overall.classes == 3
    twice = PanopticClasses.merged([result, result])
    assert twice.counts["cell"].tp == 2 and twice.overall == result.overall
    with pytest.raises(LabelError, match="no class"):
        panoptic_quality_by_class(both, {1: "cell"}, names, things=["cell"])
    with pytest.raises(ConfigError, match="same things"):
        PanopticClasses.merged([])


def test_count_agreement_is_that_of_the_formulas() -> None:
    truth, guess = np.array([10, 20, 0, 40]), np.array([12, 15, 3, 40])
    agreement = count_agreement(truth.tolist(), guess.tolist())
    error = guess - truth
    assert agreement.error == near(error.mean()) and agreement.absolute_error == near(np.abs(error).mean())
    assert agreement.relative_error == near(np.mean([0.2, 0.25, 0.0])) and agreement.relative_images == 3
    assert agreement.relative_total == 0.0
    assert agreement.r2 == near(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert agreement.high - agreement.low == near(2 * 1.96 * error.std(ddof=1))


def test_counts_that_define_nothing_give_no_number() -> None:
    one = count_agreement([0], [3])
    assert all(math.isnan(v) for v in (one.relative_error, one.relative_total, one.r2, one.low))
    for wrong in (([], []), ([1], [1, 2])):
        with pytest.raises(DatasetError, match="at least one"):
            count_agreement(*wrong)


@given(pair=MAPS)
@settings(max_examples=40, deadline=None)
def test_every_object_that_is_not_matched_is_in_a_mistake(pair: tuple[np.ndarray, np.ndarray]) -> None:
    both = overlap_table(*pair)
    match = match_objects(both, 0.6)
    mistakes = find_mistakes(both, match)
    seen = [{label for m in mistakes for label in getattr(m, side)} for side in ("references", "predictions")]
    assert set(both.references[~match.found()].tolist()) <= seen[0]
    assert set(both.predictions[~match.true()].tolist()) <= seen[1]
    alone = {m.references + m.predictions for m in mistakes if m.kind in ("missed", "invented")}
    assert all(len(labels) == 1 for labels in alone)
    assert all(len(m.references) >= 2 for m in mistakes if m.kind == "merged")
    assert all(len(m.predictions) >= 2 for m in mistakes if m.kind == "split")
    assert {m.kind for m in mistakes} <= set(KINDS)


def test_each_kind_of_mistake_is_recognised() -> None:
    reference = np.repeat([1, 2, 0, 3, 0, 4, 0, 5, 0], [4, 4, 2, 6, 2, 5, 2, 6, 2])
    prediction = np.repeat([11, 0, 13, 14, 0, 0, 15, 0, 16, 0], [8, 2, 3, 3, 2, 7, 2, 4, 2, 0])
    prediction = np.pad(prediction, (0, reference.size - prediction.size))
    both = overlap_table(reference, prediction)
    found = {(m.kind, m.references, m.predictions) for m in find_mistakes(both, match_objects(both, 0.7))}
    assert found == {
        ("merged", (1, 2), (11,)),
        ("split", (3,), (13, 14)),
        ("missed", (4,), ()),
        ("inexact", (5,), (15,)),
        ("invented", (), (16,)),
    }


def coco_images(kind: str) -> dict[int, list[Detections]]:
    """Return the detections of each class of all 2D maps, with their boxes or masks."""
    classes: dict[int, list[Detections]] = {0: [], 1: []}
    for reference, prediction in maps().values():
        if reference.ndim == 2:
            both, scores = overlap_table(reference, prediction), scores_of(prediction)
            for parity, found in classes.items():
                keep = [labels % 2 == parity for labels in (both.references, both.predictions)]
                part = both.subset(*keep)
                if kind == "segm":
                    found.append(detections_from_table(part, scores[keep[1]]))
                else:
                    a, b = boxes(reference, part.references), boxes(prediction, part.predictions)
                    found.append(detections_from_boxes(a, b, scores[keep[1]]))
    return classes


def boxes(labels: np.ndarray, names: np.ndarray) -> np.ndarray:
    rows = [np.argwhere(labels == name) for name in names]
    return np.array([[*r.min(axis=0), *(r.max(axis=0) + 1)] for r in rows]).reshape(-1, 2 * labels.ndim)


@pytest.mark.parametrize("most", [100, 1000])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_of_detections_equals_pycocotools(kind: str, most: int) -> None:
    expected = golden("coco")
    classes: dict[str, CocoPrecision] = {
        str(k): coco_average_precision(images, expected["taus"], most)
        for k, images in coco_images(kind).items()
    }
    assert mean_over_classes(classes).tolist() == near_all(expected[f"{kind}_{most}"])
    assert [entry.mean for entry in classes.values()] == near_all(expected[f"{kind}_{most}_by_class"])
    recall = np.mean([entry.recall for entry in classes.values()], axis=0)
    assert recall.tolist() == near_all(expected[f"{kind}_{most}_recall"])
    if most == 1000:
        unlimited = coco_average_precision(coco_images(kind)[0], expected["taus"])
        assert unlimited.ap.tolist() == classes["0"].ap.tolist() and unlimited.dropped == 0


@pytest.mark.filterwarnings("ignore")
def test_average_precision_of_3d_boxes_equals_monai_at_the_thresholds_of_lesions() -> None:
    from monai.apps.detection.metrics.coco import COCOMetric
    from monai.apps.detection.metrics.matching import matching_batch
    from monai.data.box_utils import box_iou

    rng = np.random.default_rng(7)
    truth, guess, scores = [], [], []
    for _ in range(6):
        low = rng.uniform(0, 20, (9, 3))
        truth.append(np.concatenate([low, low + rng.uniform(3, 9, (9, 3))], axis=1))
        guess.append(np.concatenate([truth[-1] + rng.normal(0, 1, (9, 6)), truth[-1][:3] + 0.3]))
        scores.append(rng.random(12))
    metric = COCOMetric(
        ["lesion"], iou_list=(0.1,), iou_range=(0.1, 0.5, 0.05), max_detection=(100,), verbose=False
    )
    zeros = [np.zeros(len(boxes), int) for boxes in (*guess, *truth)]
    matched = matching_batch(box_iou, metric.iou_thresholds, guess, zeros[:6], scores, truth, zeros[6:])
    expected = metric(matched)[0]
    images = [detections_from_boxes(*image) for image in zip(truth, guess, scores, strict=True)]
    measured = coco_average_precision(images, LESION_THRESHOLDS, 100)
    assert measured.ap[0] == near(expected["AP_IoU_0.10_MaxDet_100"])
    assert measured.mean == near(expected["mAP_IoU_0.10_0.50_0.05_MaxDet_100"])


def test_detections_that_a_limit_drops_are_told() -> None:
    image = Detections(2, np.array([0.2, 0.9, 0.5]), np.array([[0, 0], [1, 1]]), np.array([0.8, 0.8]))
    assert coco_average_precision([image], [0.5]).ap[0] > coco_average_precision([image], [0.5], 2).ap[0]
    assert coco_average_precision([image], [0.5], 2).dropped == 1


def test_nothing_to_detect_has_no_precision_and_nothing_detected_has_none() -> None:
    none = np.zeros((0, 2), int)
    invented = Detections(0, np.array([0.5]), none, np.zeros(0))
    missed = Detections(3, np.zeros(0), none, np.zeros(0))
    assert math.isnan(coco_average_precision([invented], [0.5]).mean)
    assert coco_average_precision([missed], [0.5]).mean == 0.0
    with pytest.raises(DatasetError):
        coco_average_precision([])


def test_boxes_overlap_in_three_dimensions_as_their_masks_do() -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 8, (2, 12, 3))
    both = np.concatenate([low, low + rng.integers(1, 6, (2, 12, 3))], axis=2)
    pairs, iou = box_overlaps(*both)
    masks = np.zeros((2, 12, 16, 16, 16), bool)
    for side in range(2):
        for k, row in enumerate(both[side]):
            masks[side, k, row[0] : row[3], row[1] : row[4], row[2] : row[5]] = True
    expected = {
        (i, j): (a & b).sum() / (a | b).sum()
        for i, a in enumerate(masks[0])
        for j, b in enumerate(masks[1])
        if (a & b).any()
    }
    assert {(int(i), int(j)): v for (i, j), v in zip(pairs, iou, strict=True)} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b"),
    [([[0, 0, 1]], [[0, 0, 1, 1]]), ([[0, 0, 1, 1]], [[0, 0, 0, 1, 1, 1]]), ([[2, 0, 1, 1]], [[0, 0, 1, 1]])],
)
def test_what_are_no_boxes_is_refused(a: list[list[int]], b: list[list[int]]) -> None:
    with pytest.raises(GeometryError):
        box_overlaps(np.array(a), np.array(b))


def test_scores_and_objects_must_be_as_many() -> None:
    with pytest.raises(DatasetError, match="one for each"):
        detections_from_table(table("halves_2d"), np.zeros(2))
    with pytest.raises(DatasetError, match="one for each"):
        detections_from_boxes(np.zeros((1, 4)), np.zeros((1, 4)), np.zeros(3))


def froc_by_hand(scans: list[Scan], rate: float) -> float:
    """Return the sensitivity at a rate, from one threshold after the other."""
    points = [(0.0, 0.0)]
    for threshold in sorted({float(s) for scan in scans for s in scan.scores}, reverse=True):
        false = found = 0
        for scan in scans:
            on = scan.scores >= threshold
            irrelevant = scan.irrelevant if scan.irrelevant is not None else np.zeros(scan.n_ref, bool)
            found += len({int(i) for i, j in scan.hits if on[j] and not irrelevant[i]})
            false += sum(on[j] and j not in {int(h) for _, h in scan.hits} for j in range(len(scan.scores)))
        points.append((false / len(scans), found))
    total = sum(s.n_ref - (0 if s.irrelevant is None else s.irrelevant.sum()) for s in scans)
    rates, found_at = zip(*points, strict=True)
    return float(np.interp(rate, rates, np.array(found_at) / total))


def test_froc_equals_one_threshold_after_the_other() -> None:
    rng = np.random.default_rng(4)
    scans = []
    for k in range(6):
        n, m = int(rng.integers(1, 6)), int(rng.integers(0, 20))
        hits = np.argwhere(rng.random((n, m)) < 0.06)
        scans.append(Scan(n, np.round(rng.random(m), 2), hits, rng.random(n) < 0.2 if k % 2 else None))
    curve = froc(scans)
    for rate in (0.125, 0.5, 1.0, 3.0, 8.0, 100.0):
        assert curve.sensitivity_at(rate) == near(froc_by_hand(scans, rate))
    assert curve.cpm == near(np.mean([froc_by_hand(scans, r) for r in (0.125, 0.25, 0.5, 1, 2, 4, 8)]))


def test_froc_of_nothing() -> None:
    empty = Scan(0, np.zeros(0), np.zeros((0, 2), int))
    assert math.isnan(froc([empty]).cpm)
    assert froc([Scan(2, np.zeros(0), np.zeros((0, 2), int))]).cpm == 0.0
    with pytest.raises(DatasetError):
        froc([])


def test_rules_of_a_hit() -> None:
    reference = np.zeros((10, 10), np.int32)
    reference[1:5, 1:5], reference[6:9, 6:9] = 3, 8
    prediction = np.roll(reference, 1, axis=0)
    both = overlap_table(reference, prediction)
    assert hits_by_iou(both, 0.5).tolist() == [[0, 0], [1, 1]]
    assert hits_by_iou(both, 0.55).tolist() == [[0, 0]]
    centres = np.array([[3.0, 3.0], [7.5, 7.5], [-1.0, 2.0], [0.5, 0.5]])
    assert hits_by_centre(reference, both.references, centres).tolist() == [[0, 0], [1, 1]]
    near_centres = hits_by_distance(centres[:2], centres, np.array([3.0, 1.0]))
    assert near_centres.tolist() == [[0, 0], [1, 1]], "exactly the radius away is no hit"
    assert hits_by_distance(np.zeros((0, 2)), centres, np.zeros(0)).shape == (0, 2)
    with pytest.raises(GeometryError, match="radius"):
        hits_by_distance(centres, centres, np.zeros(1))


def test_results_do_not_depend_on_the_order_of_labels() -> None:
    reference, prediction = maps()["crowded_2d"]
    names = np.random.default_rng(0).permutation(prediction.max() + 1)
    names[names == 0] = names[0]
    names[0] = 0
    both: Any = overlap_table(reference, prediction), overlap_table(reference, names[prediction])
    for measure in (
        aggregated_jaccard_plus,
        lambda t: tracking_counts(t).det,
        lambda t: match_objects(t, 0.3).tp,
    ):
        assert measure(both[0]) == near(measure(both[1]))


def test_all_names_have_maps() -> None:
    assert set(images_of("ctc")) < set(NAMES)
