"""Preprocessing and the way back, against arrays that nnU-Net 2.8.1 wrote (golden/README.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from medseg.io import open_dataset, read, read_image, read_label
from medseg.io.dataset import list_cases
from medseg.plan import Plan, from_nnunet
from medseg.preprocess import class_locations, preprocess
from medseg.preprocess.restore import restore_labels, restore_probabilities

CASES = [
    ("hippocampus", "3d_fullres", "hippocampus_001"),
    ("hippocampus", "3d_fullres", "hippocampus_003"),
    ("hippocampus", "3d_fullres", "hippocampus_006"),
    ("aniso_ct", "3d_fullres", "ct_000"),
    ("aniso_ct", "3d_fullres", "ct_001"),
    ("aniso_ct", "3d_fullres", "ct_003"),
    ("aniso_ct", "2d", "ct_001"),
    ("sagittal_ct", "3d_fullres", "ct_000"),
    ("sagittal_ct", "3d_fullres", "ct_001"),
    ("sagittal_ct", "3d_fullres", "ct_003"),
    ("two_channel_mr", "3d_fullres", "mr_000"),
    ("two_channel_mr", "3d_fullres", "mr_001"),
    ("two_channel_mr", "3d_fullres", "mr_002"),
]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def load_plan(folder: Path, plans: str = "nnUNetPlans.json") -> Plan:
    return from_nnunet(read_json(folder / plans), read_json(folder / "dataset.json"))


@pytest.mark.parametrize(("name", "configuration", "case"), CASES)
def test_a_case_is_preprocessed_as_by_the_peer(
    golden_dir: Path, name: str, configuration: str, case: str
) -> None:
    folder = golden_dir / "preprocess" / name
    plan = load_plan(folder)
    source = next(c for c in open_dataset(folder).training if c.name == case)
    got = preprocess(read_image(source), plan, configuration, read_label(source))
    expected = np.load(folder / "preprocessed" / configuration / f"{case}.npz")
    facts = read_json(folder / "preprocessed" / configuration / f"{case}.json")
    assert got.data.dtype == np.float32
    assert_allclose(got.data, expected["data"], atol=1e-5, rtol=0)
    assert got.seg is not None
    assert_array_equal(got.seg, expected["seg"])
    assert [list(pair) for pair in got.record.crop] == facts["properties"]["bbox_used_for_cropping"]
    assert (
        tuple(facts["properties"]["shape_before_cropping"])
        == got.record.to_network(source_array(got.record.geometry.shape)).shape[1:]
    )
    locations = list(class_locations(got.seg, plan.labels).values())
    assert len(locations) == len(facts["class_locations"])
    for places, entry in zip(locations, facts["class_locations"], strict=True):
        assert_array_equal(places, expected[entry["array"]].reshape(-1, 4)[:, 1:])


def source_array(shape: tuple[int, int, int]) -> np.ndarray:
    return np.empty((1, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("model", "case"),
    [("a_hippocampus", "hippocampus_044"), ("g_region_ignore_two_channel_mr", "mr_004")],
)
def test_logits_become_the_peers_label_map_and_probabilities(
    golden_dir: Path, tmp_path: Path, model: str, case: str
) -> None:
    folder = golden_dir / "inference" / model
    plan = load_plan(folder / "model", "plans.json")
    golden = np.load(folder / "logits" / f"{case}_mirror.npz")
    image = read_image(next(c for c in list_cases(folder / "imagesTs", len(plan.channels)) if c.name == case))
    got = preprocess(image, plan, "3d_fullres")
    assert_allclose(got.data, golden["network_input"], atol=1e-5, rtol=0)
    settings = plan.configuration("3d_fullres")
    expected = read(folder / "pred_mirror" / f"{case}.nii.gz")
    labels = restore_labels(golden["logits"], got.record, plan.labels, settings)
    assert labels.geometry == image.geometry
    assert labels.array.dtype == np.uint8
    differing = np.mean(labels.array != expected.array)
    saved = restore_probabilities(golden["logits"], got.record, plan.labels, settings, tmp_path / "p.npz")
    assert_array_equal(saved.array, expected.array)  # the peer saved probabilities, so this is its path
    assert differing < 1e-3
    probabilities = np.load(tmp_path / "p.npz")["probabilities"]
    peer = np.load(folder / "pred_mirror" / f"{case}.npz")["probabilities"]
    assert probabilities.shape == peer.shape
    assert_allclose(probabilities, peer, atol=5e-4)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.npz"]
