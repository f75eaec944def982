"""Surface distances: against surface-distance 0.1, and the laws that any distance obeys."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg.errors import GeometryError
from medseg.metrics import SurfaceDistances, evaluate, surface_distances
from medseg.metrics.surface import element_sizes

MASKS = hnp.arrays(bool, (5, 6, 4))
SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.5])] * 3)
PEER = {
    "hd95": "hd95",
    "hd": "hd100",
    "nsd": "nsd_1mm",
    "assd": "assd_area_weighted",
    "asd_prediction_to_reference": "asd_pred_to_ref",
    "asd_reference_to_prediction": "asd_ref_to_pred",
}


def numbers(d: SurfaceDistances) -> list[float]:
    return [d.hausdorff(95), d.hausdorff(100), d.assd, d.nsd(1.0), d.nsd(2.0)]


def ball(shape, centre, radius, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    grid = np.indices(shape)
    return sum(((x - c) * s) ** 2 for x, c, s in zip(grid, centre, spacing, strict=True)) <= radius**2


PAIRS = [
    "ball_shift_aniso",
    "ball_identical_aniso",
    "ball_dilated_iso",
    "ball_plus_outlier_iso",
    "empty_pred",
    "empty_ref",
    "both_empty",
    "single_voxels",
    "touching_border",
    "thin_plane_one_slice",
    "full_volume_vs_half",
    "random_blobs_aniso",
    "random_blobs_iso",
    "hole_iso",
    "disk_2d",
    "blobs_2d",
]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("reversed_axes", [False, True])
def test_every_golden_pair_equals_surface_distance(golden_dir: Path, name: str, reversed_axes: bool):
    pairs = json.loads((golden_dir / "metrics" / "metric_pairs.json").read_text())["pairs"]
    assert sorted(p["name"] for p in pairs) == sorted(PAIRS)
    pair = next(p for p in pairs if p["name"] == name)
    spacing = pair["spacing"]
    with np.load(golden_dir / "metrics" / "metric_pairs.npz") as arrays:
        reference, prediction = (arrays[f"{name}__{side}"].astype(bool) for side in ("ref", "pred"))
    if reversed_axes:
        reference, prediction, spacing = reference.T, prediction.T, spacing[::-1]
    d = surface_distances(reference, prediction, spacing)
    ours = {
        "hd95": d.hausdorff(95),
        "hd100": d.hausdorff(100),
        "nsd_1mm": d.nsd(1.0),
        "nsd_2mm": d.nsd(2.0),
        "asd_ref_to_pred": d.asd_reference_to_prediction,
        "asd_pred_to_ref": d.asd_prediction_to_reference,
        "assd_area_weighted": d.assd,
        "surface_area_ref_mm2": d.reference_areas.sum(),
        "surface_area_pred_mm2": d.prediction_areas.sum(),
    }
    theirs = pair["metrics"]["surface_distance"]
    if name == "both_empty":  # our one departure: nothing measured is NaN, theirs is infinity
        theirs = {**theirs, "hd95": "nan", "hd100": "nan"}
    if "assd_area_weighted" not in theirs:
        theirs = {**theirs, "assd_area_weighted": "nan" if name == "both_empty" else "inf"}
    for key, value in ours.items():
        assert value == pytest.approx(float(theirs[key]), abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize(
    "model", ["a_hippocampus", "b_aniso_ct", "g_region_ignore_two_channel_mr", "h_2d_aniso_ct"]
)
def test_real_predictions_equal_surface_distance(golden_dir: Path, model: str):
    folder = golden_dir / "inference" / model
    peers = json.loads((folder / "peer_metrics.json").read_text())["pairs"]
    labels = folder / "model" / "dataset.json"
    compared = 0
    for run in ("pred_mirror", "pred_nomirror"):
        result = evaluate(folder / run, folder / "labelsTs", labels=labels)
        rows = {(row.case, str(np.atleast_1d(result.labels[row.label]))): row for row in result.rows}
        for peer in (p for p in peers if p["prediction"].startswith(run)):
            case = Path(peer["prediction"]).name.removesuffix(".nii.gz")
            row = rows[case, str(np.atleast_1d(peer["labels"]))]
            for ours, theirs in PEER.items():
                expected = float(peer["metrics"]["surface_distance"][theirs])
                assert row.values[ours] == pytest.approx(expected, abs=1e-6, nan_ok=True), (case, ours)
                compared += 1
    assert compared >= 72


def test_the_area_table_has_the_cubes_symmetry_and_known_areas():
    areas = element_sizes((1.0, 1.0, 1.0))
    assert areas[0] == areas[255] == 0.0
    np.testing.assert_allclose(areas, areas[::-1])
    assert areas[0b00000001] == pytest.approx(math.sqrt(3) / 8)
    assert areas[0b00001111] == pytest.approx(1.0)
    permuted = element_sizes((2.0, 1.0, 1.0))
    assert sorted(permuted) == pytest.approx(sorted(element_sizes((1.0, 1.0, 2.0))))


@given(MASKS, MASKS, SPACINGS)
@settings(max_examples=40, deadline=None)
def test_metrics_are_symmetric(a, b, spacing):
    assert numbers(surface_distances(a, b, spacing)) == pytest.approx(
        numbers(surface_distances(b, a, spacing)), nan_ok=True
    )


@given(MASKS, SPACINGS)
@settings(max_examples=25, deadline=None)
def test_a_mask_against_itself_is_perfect(a, spacing):
    assume(a.any())
    assert numbers(surface_distances(a, a, spacing)) == pytest.approx([0.0, 0.0, 0.0, 1.0, 1.0])


@given(MASKS, MASKS, SPACINGS)
@settings(max_examples=25, deadline=None)
def test_distances_grow_with_the_spacing(a, b, spacing):
    assume(a.any() and b.any())
    small = surface_distances(a, b, spacing)
    large = surface_distances(a, b, [2 * s for s in spacing])
    assert large.hausdorff(95) == pytest.approx(2 * small.hausdorff(95))
    assert large.assd == pytest.approx(2 * small.assd)
    assert large.nsd(2.0) == pytest.approx(small.nsd(1.0))


@given(MASKS, MASKS, st.tuples(*[st.integers(0, 3)] * 3), SPACINGS)
@settings(max_examples=25, deadline=None)
def test_moving_both_masks_changes_nothing(a, b, shift, spacing):
    placed = []
    for mask in (a, b):
        room = np.zeros((8, 9, 7), bool)
        room[tuple(slice(s, s + n) for s, n in zip(shift, mask.shape, strict=True))] = mask
        placed.append(room)
    assert numbers(surface_distances(*placed, spacing)) == pytest.approx(
        numbers(surface_distances(a, b, spacing)), nan_ok=True
    )


@given(MASKS, MASKS, SPACINGS)
@settings(max_examples=25, deadline=None)
def test_the_nearest_point_is_found_exactly(a, b, spacing):
    from scipy.ndimage import distance_transform_edt

    assume(a.any() and b.any())
    d = surface_distances(a, b, spacing)
    border = [corner_points(mask) for mask in (a, b)]
    to_b = distance_transform_edt(~border[1], sampling=spacing)[border[0]]
    np.testing.assert_allclose(np.sort(to_b), d.reference_to_prediction, atol=1e-12)


def corner_points(mask: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2)).reshape(*(6, 7, 5), 8)
    return windows.any(axis=-1) & ~windows.all(axis=-1)


def test_a_tolerance_of_whole_voxels_includes_them_wherever_they_lie():
    spacing = (0.7, 0.7, 0.7)
    for start in range(1, 12):
        a = np.zeros((40, 5, 5), bool)
        a[start : start + 20, 1:4, 1:4] = True
        assert surface_distances(a, np.roll(a, 3, axis=0), spacing).nsd(3 * 0.7) == 1.0


def test_one_empty_mask_is_infinitely_far_and_two_are_undefined():
    nothing = np.zeros((6, 6, 6), bool)
    something = ball((6, 6, 6), (3, 3, 3), 2)
    for d in (
        surface_distances(something, nothing, (1, 1, 1)),
        surface_distances(nothing, something, (1, 1, 1)),
    ):
        assert numbers(d) == [math.inf, math.inf, math.inf, 0.0, 0.0]
    assert all(math.isnan(x) for x in numbers(surface_distances(nothing, nothing, (1, 1, 1))))


def test_a_far_speck_moves_hd_but_not_hd95():
    a = ball((40, 30, 30), (12, 15, 15), 8)
    b = a.copy()
    b[36, 15, 15] = True
    d = surface_distances(a, b, (1, 1, 1))
    assert d.hausdorff(95) == 0.0
    assert d.hausdorff(100) == pytest.approx(16.0, abs=0.1)


def test_shapes_and_spacings_that_do_not_fit_are_refused():
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(GeometryError, match="spacing for each"):
        surface_distances(mask, mask, (1.0, 1.0))
    with pytest.raises(GeometryError):
        surface_distances(mask, mask[:2], (1.0, 1.0, 1.0))


def test_a_large_pair_is_measured_in_seconds():
    import time

    shape, spacing = (512, 512, 100), (0.8, 0.8, 2.5)
    reference, prediction = np.zeros(shape, bool), np.zeros(shape, bool)
    box = (slice(100, 412), slice(100, 412), slice(5, 95))
    reference[box] = ball((312, 312, 90), (156, 156, 45), 110, spacing)
    prediction[box] = ball((312, 312, 90), (160, 153, 46), 107, spacing)
    start = time.process_time()
    surface_distances(reference, prediction, spacing)
    assert time.process_time() - start < 6.0  # 0.7 s alone on a core; surface-distance 0.1 takes 3.4 s


def test_metrics_load_neither_torch_nor_monai():
    heavy = "('torch', 'monai', 'matplotlib')"
    code = f"import medseg.metrics, sys; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
