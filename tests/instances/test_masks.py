"""What a detector finds as masks on the image's grid; an untrained one finds enough to compare."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medseg.bundle import Bundle, load_bundle, save_bundle
from medseg.cli import app
from medseg.errors import BundleError, ConfigError
from medseg.instances.detect import Detector
from medseg.instances.masks import find_masks
from medseg.instances.panoptic import merge_masks
from medseg.io import read, write
from medseg.labels import PanopticLabels
from medseg.nets.maskrcnn import MaskRCNN
from medseg.volume import Volume
from tests.train.test_detection import make_dataset, small_plan


@pytest.fixture(scope="module", params=[2, 3])
def untrained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path]:
    """Return a detector that was never trained, and an image; its axes are left, back and up."""
    root = tmp_path_factory.mktemp(f"detector{request.param}")
    plan = small_plan(make_dataset(root / "data", request.param), request.param)
    (name,) = plan.configurations
    settings = plan.configuration(name)
    assert settings.detection is not None
    torch.manual_seed(0)
    weights = MaskRCNN(settings.architecture, settings.detection, 1).state_dict()
    save_bundle(root / "bundle", plan, name, {"0": weights}, (), {"task": "detection", "score": 0.0})
    return load_bundle(root / "bundle"), root / "data" / "imagesTr" / "case_0_0000.nii.gz"


def test_masks_drawn_one_over_the_other_are_the_map_of_the_detector(untrained: tuple[Bundle, Path]) -> None:
    bundle, path = untrained
    image = read(path)
    # slices as they lie, and a volume turned by the reader
    reader = "SimpleITKIO" if image.shape[2] == 1 else "NibabelIOWithReorient"
    detector = Detector(replace(bundle, plan=bundle.plan.replace(reader=reader)))
    found = detector.find(image)
    masks = find_masks(detector, image)
    assert len(masks) >= len(found.scores) > 0 and {mask.value for mask in masks} == {1}
    blobs = PanopticLabels(labels={"blob": 1}, things=("blob",))
    nothing = np.zeros(image.shape, np.uint8)
    merged = merge_masks(masks, nothing, blobs, least_score=0.0, most_hidden=1.0)
    drawn = found.volume.array[0]
    assert ((merged.labels > 0) == (drawn > 0)).all()
    pairs = np.unique(np.stack([merged.labels.ravel(), drawn.ravel()]), axis=1)
    assert len(pairs[0]) == len(set(pairs[0])) == len(set(pairs[1])), "the same objects"
    if image.shape[2] == 1:
        unsure = find_masks(detector, image, score=1.1)
        assert len(unsure) == len(masks) and not any(mask.mask.any() for mask in unsure)


def test_the_command_merges_what_a_detector_finds_with_stuff(
    untrained: tuple[Bundle, Path], tmp_path: Path
) -> None:
    bundle, path = untrained
    source = read(path)
    semantic = np.zeros(source.shape, np.uint8)
    semantic[: source.shape[0] // 2] = 1
    write(Volume(semantic, source.geometry), tmp_path / "semantic.nii.gz")
    classes = tmp_path / "classes.yaml"
    classes.write_text("labels: {half: 1, blob: 7}\nthings: [blob]\n")
    words = ["panoptic", path, "--model", bundle.path, "--semantic", tmp_path / "semantic.nii.gz"]
    words += ["--classes", classes, "--json", "-o"]
    shown = CliRunner().invoke(app, [*map(str, [*words, tmp_path / "out"])])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    packed = read(facts["files"]["panoptic"])
    assert packed.geometry.matches(source.geometry)
    values = {int(value) for value in np.unique(packed.array)}
    assert values - {0, 1000} == {7001 + n for n in range(facts["things"]["blob"])} and values - {0, 1000}
    assert "mostly hidden by objects of higher score" in {entry["rule"] for entry in facts["dropped"]}
    classes.write_text("labels: {half: 1, cell: 7}\nthings: [cell]\n")
    error = CliRunner().invoke(app, [*map(str, [*words, tmp_path / "no"])]).exception
    assert isinstance(error, ConfigError) and "finds 'blob', which is no thing (cell)" in str(error)
    alone = ["panoptic", path, "--model", bundle.path, "-o", tmp_path / "no"]
    error = CliRunner().invoke(app, [*map(str, alone)]).exception
    assert isinstance(error, BundleError) and "is a detector" in str(error)
    assert not (tmp_path / "no").exists()
