"""Training of the centre-offset network on small phantoms: all of it, in seconds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medseg.bundle import load_bundle
from medseg.cli import app
from medseg.errors import BundleError, ConfigError, DatasetError, TrainingError
from medseg.infer import Predictor
from medseg.instances.models import load_object_model
from medseg.io import open_dataset, write
from medseg.nets.centre_heads import CentreHeads
from medseg.train.centre import OBJECTS, decide_centre, describe_centre, hold_out, train_centre
from medseg.train.centre_config import CentreConfig, CentreLoss, SyntheticConfig, load_centre
from medseg.train.centre_losses import centre_loss, count_overlap, loss_terms
from medseg.train.centre_measure import count_matches
from medseg.train.centre_samples import CentreSampler, make_case, make_goal, median_diameter, read_patch
from medseg.train.synthetic_cells import SyntheticSampler, draw_cells, paint_cells
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

QUICK = [
    *("train.epochs=5", "train.steps_per_epoch=24", "train.batch_size=6", "train.val_samples=4"),
    *(
        "train.precision=fp32",
        "train.threads=1",
        "patch_size=[32,32]",
        "object_voxels=10",
        "train.ema_decay=0.8",
    ),
    *("train.optimizer.lr=0.01", "augment.zoom=1.1", "augment.invert=0", "augment.rotate=0"),
    *[f"augment.{look}.p=0" for look in ("gamma", "contrast", "brightness", "blur", "noise", "shade", "dim")],
    'architecture={"features_per_stage":[8,16,16],"strides":[[1,1],[2,2],[2,2]],'
    '"kernel_sizes":[[3,3],[3,3],[3,3]],"blocks_per_stage":[1,1,1],"decoder_convs_per_stage":[1,1]}',
]


def discs(seed: int, shape: tuple[int, int] = (60, 72)) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs, some of which touch, numbered with gaps."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    y, x = np.indices(shape)
    for number in range(1, 12):
        middle = rng.uniform(6, np.array(shape) - 6)
        inside = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < rng.uniform(4, 6) ** 2
        labels[inside & (labels == 0)] = 3 * number
    image = 40 + 100 * (labels > 0) + rng.normal(0, 8, shape)
    return labels, image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    for seed in range(6):
        labels, image = discs(seed)
        grid = Geometry((labels.shape[1], labels.shape[0], 1), affine("RAS", (1.0, 1.0, 1.0)))
        write(Volume(image.T[..., None], grid), root / "images" / f"case_{seed}.nii.gz")
        write(Volume(labels.T[..., None], grid), root / "labels" / f"case_{seed}.nii.gz")
    return root


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    train_centre(dataset, out, overrides=QUICK)
    return out


def test_a_training_learns_to_find_discs_and_writes_a_bundle(finished: Path, dataset: Path) -> None:
    rows = [json.loads(line) for line in (finished / "fold_0" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and rows[-1]["dice"]["object"] > 0.8
    result = json.loads((finished / "fold_0" / "result.json").read_text())
    assert result["accuracy"]["0.5"] > 0.5 and result["validation_cases"] == 2
    assert (finished / "fold_0" / "report.html").exists()
    bundle = load_bundle(finished)
    assert bundle.task == "centre-offset" and bundle.n_outputs == 5
    with pytest.raises(BundleError, match=rf"finds objects .* medseg count --model {finished}"):
        Predictor(bundle)
    with pytest.raises(TrainingError, match="already trained"):
        train_centre(dataset, finished, overrides=QUICK)


def test_the_bundle_finds_objects_of_any_scale_that_it_is_told(finished: Path) -> None:
    model = load_object_model(finished, threads=1)
    assert model.settings.diameter == pytest.approx(9.7, abs=1.5)
    labels, image = discs(90)
    found = model.segment(image, (1.0, 1.0))
    assert count_matches(labels, found.labels)[0.5][0] >= 6
    assert found.labels.dtype == np.int32 and found.labels.max() == len(found.scores)
    assert ((found.scores > 0.4) & (found.scores <= 1)).all()
    double = np.kron(image, np.ones((2, 2), image.dtype))
    again = model.segment(double, (0.5, 0.5))
    both = count_matches(np.kron(found.labels, np.ones((2, 2), int)), again.labels)[0.5]
    assert both[0] >= 0.8 * len(found.scores)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return PNGs of discs: they have no scale, and all but the two held out (hold_out=2) are RGB or grey."""
    root = tmp_path_factory.mktemp("pictures")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for seed in range(6):
        labels, image = discs(seed)
        Image.fromarray(labels.astype(np.uint8)).save(root / "labels" / f"case_{seed}.png")
        Image.fromarray(image).save(root / "images" / f"case_{seed}.png")
    for case in decide_centre(root, root, overrides=["hold_out=2"]).train[:2]:
        colour(case.images[0])
    return root


def colour(path: Path) -> None:
    grey = np.asarray(Image.open(path))
    Image.fromarray(np.stack([grey, grey // 2, 255 - grey], -1)).save(path)


@pytest.fixture(scope="module")
def mixed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed")
    train_centre(pictures, out, overrides=[*QUICK, "hold_out=2"])
    return out


def test_colour_pictures_train_and_grey_ones_are_held_out(mixed: Path) -> None:
    result = json.loads((mixed / "fold_0" / "result.json").read_text())
    assert result["cases"] == 4 and result["validation_cases"] == 2
    assert load_bundle(mixed).in_channels == 3


def test_grey_pictures_train_and_colour_ones_are_held_out(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    setup = decide_centre(root, tmp_path, overrides=["hold_out=2"])
    for case in setup.train[:2]:
        Image.open(case.images[0]).convert("L").save(case.images[0])
    colour(setup.held_out[0].images[0])
    for channels, expected in ((), 3), (("channels=1",), 1):
        quick = [*QUICK, "hold_out=2", "train.epochs=1", "train.steps_per_epoch=2", *channels]
        train_centre(root, tmp_path / str(expected), overrides=quick)
        assert load_bundle(tmp_path / str(expected)).in_channels == expected


def test_pictures_without_a_scale_are_counted_with_the_diameter_in_pixels(
    mixed: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = load_object_model(mixed, threads=1).settings
    assert settings.diameter is not None and settings.diameter_unit == "pixel"
    assert settings.diameter == pytest.approx(9.7, abs=1.5)

    def count(size: str) -> dict[str, Any]:
        words = ["count", pictures / "images" / "case_0.png", "--model", mixed, "--json", "-o", tmp_path]
        shown = CliRunner().invoke(app, [*map(str, words), "--pixel-size", size])
        assert shown.exit_code == 0, shown.output
        row: dict[str, Any] = json.loads(shown.stdout)["images"][0]
        return row

    plain, scaled = count("pixel"), count("0.5 micron")
    assert plain["diameter"] == pytest.approx(settings.diameter, abs=1e-3) and plain["notes"] == []
    assert scaled["diameter"] == pytest.approx(settings.diameter / 2, abs=1e-3)
    assert plain["objects"] == scaled["objects"] > 0 and "pixels" in scaled["notes"][0]


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.train import loop

    step = loop.Session.step

    def dies(self: loop.Session, *given: object) -> None:
        if self.progress.step == 20:
            raise KeyboardInterrupt
        step(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Session, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_centre(dataset, tmp_path, overrides=QUICK)
    monkeypatch.setattr(loop.Session, "step", step)
    with pytest.raises(TrainingError, match="unfinished"):
        train_centre(dataset, tmp_path, overrides=QUICK)
    train_centre(dataset, tmp_path, overrides=QUICK, resume=True)
    a, b = (load_bundle(run).state_dict("0") for run in (tmp_path, finished))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_line_says_what_it_would_train_and_refuses_what_has_no_sense(
    dataset: Path, tmp_path: Path
) -> None:
    words = ["train", str(dataset), "-o", str(tmp_path), "--task", "centre-offset"]
    shown = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    facts = json.loads(shown.stdout)
    assert facts["train"] == 4 and facts["validation"] == 2 and facts["task"] == "centre-offset"
    assert isinstance(CliRunner().invoke(app, [*words, "--preset", "cpu"]).exception, ConfigError)
    assert isinstance(CliRunner().invoke(app, [*words, "objects=3"]).exception, ConfigError)


def test_cases_that_a_recipe_holds_out_are_never_trained_on(dataset: Path, tmp_path: Path) -> None:
    setup = decide_centre(dataset, tmp_path, overrides=["hold_out=2", "hold_out_seed=3"])
    assert len(setup.held_out) == 2 and len(setup.train) == 4
    assert not {c.name for c in setup.train} & {c.name for c in setup.held_out}
    again = hold_out(open_dataset(dataset, OBJECTS).training, setup.config)
    assert again == (setup.train, setup.held_out)
    with pytest.raises(DatasetError, match="Hold fewer out"):
        decide_centre(dataset, tmp_path, overrides=["hold_out=6"])


def test_synthetic_scenes_train_a_network_on_no_image_at_all(dataset: Path, tmp_path: Path) -> None:
    scenes = ["synthetic={diameter: [8, 12], noise: [0.02, 0.1]}", "hold_out=-1", "train.epochs=1"]
    assert describe_centre(dataset, tmp_path, overrides=[*QUICK, *scenes])["train"] == 0
    train_centre(dataset, tmp_path, overrides=[*QUICK, *scenes])
    result = json.loads((tmp_path / "fold_0" / "result.json").read_text())
    assert result["cases"] == 0 and result["validation_cases"] == 6 and result["steps"] == 24


@pytest.mark.parametrize("n", [2, 3])
def test_one_code_plans_and_steps_in_2d_and_3d(n: int, tmp_path: Path) -> None:
    config = CentreConfig(
        patch_size=(16,) * n, object_voxels=8, synthetic=SyntheticConfig(diameter=(5, 9)), channels=1
    ).with_overrides(["train.epochs=1", "train.steps_per_epoch=2", "train.batch_size=2"])
    sampler = SyntheticSampler((16,) * n, config)
    samples = [sampler.sample(k, forced=True) for k in range(2)]
    goal = torch.from_numpy(np.stack([s.seg for s in samples]))
    assert goal.shape == (2, 2 + n, *(16,) * n) and samples[0].image.shape == (1, *(16,) * n)
    from medseg.nets.centre_heads import build_centre_network
    from medseg.train.centre import plan_network

    architecture, patch = plan_network(config, n)
    network = build_centre_network(architecture, 1, 2)
    assert patch == (16,) * n
    outputs = network(torch.from_numpy(np.stack([s.image for s in samples])))
    heads = CentreHeads(2, n)
    assert outputs.shape[1] == heads.channels == 3 + n
    centre_loss(outputs, goal, heads, config.loss).backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("n", [2, 3])
def test_the_terms_of_the_loss_begin_at_equal_size_and_end_at_nothing(n: int) -> None:
    heads, weights = CentreHeads(2, n), CentreLoss()
    scene = SyntheticConfig(diameter=(11, 13), crowd=(0.5, 0.6))
    labels = np.stack([draw_cells((40,) * n, scene, np.random.default_rng(seed)) for seed in range(3)])
    goal = torch.from_numpy(np.stack([make_goal(each, 12.0) for each in labels]))
    terms = loss_terms(torch.zeros(3, heads.channels, *(40,) * n), goal, heads, weights)
    sizes = [
        float(w * t) for w, t in zip((weights.semantic, weights.distance, weights.offset), terms, strict=True)
    ]
    assert max(sizes) < 2 * min(sizes)
    perfect = torch.cat([20 - 40 * goal[:, :1], 40 * goal[:, :1] - 20, goal[:, 1:]], 1)
    assert float(centre_loss(perfect, goal, heads, weights)) < 0.01
    both, found, true = count_overlap(perfect, goal, heads)[:, 0]
    assert both == found == true > 0
    hard = weights.replace(hard_share=0.2)
    assert float(loss_terms(perfect, goal, heads, hard)[0]) < 0.01
    empty = torch.zeros_like(goal)
    assert torch.isfinite(centre_loss(torch.zeros(3, heads.channels, *(40,) * n), empty, heads, weights))


def test_a_patch_of_an_untouched_case_is_the_image_itself() -> None:
    labels, image = discs(1)
    config = CentreConfig(object_voxels=10.0)
    case = make_case("a", image[None], labels.astype(np.int32), (1.0, 1.0), 10.0, config)
    assert case.step == pytest.approx([1, 1]) and len(case.middles) == len(np.unique(labels)) - 1
    middle = np.array([29.5, 31.5])
    shown, objects, _ = read_patch(case, middle, np.diag(case.step), (20, 24))
    assert shown[0] == pytest.approx(case.image[0, 20:40, 20:44], abs=1e-5)
    assert (objects == case.labels[20:40, 20:44]).all()


def test_beyond_the_border_is_a_mirror_whose_objects_are_others() -> None:
    labels, image = discs(2)
    case = make_case(
        "a", image[None], labels.astype(np.int32), (1.0, 1.0), 10.0, CentreConfig(object_voxels=10.0)
    )
    shown, objects, _ = read_patch(case, np.array([-0.5, 35.5]), np.eye(2), (40, 72))
    assert shown[0, :20] == pytest.approx(shown[0, :19:-1], abs=1e-5)
    assert ((objects[:20] > 0) == (objects[:19:-1] > 0)).all()
    assert not set(np.unique(objects[:20])[1:]) & set(np.unique(objects[20:])[1:])


def test_objects_come_to_the_size_that_was_asked() -> None:
    labels, image = discs(3, (120, 130))
    for factor in (1, 4):
        big = np.kron(labels, np.ones((factor, factor), labels.dtype)).astype(np.int32)
        shown = np.kron(image, np.ones((factor, factor), image.dtype))
        size = median_diameter(big, (0.5, 0.5))
        assert size == pytest.approx(0.5 * factor * 10, rel=0.2)
        config = CentreConfig(object_voxels=8.0, patch_size=(64, 64))
        case = make_case("a", shown[None], big, (0.5, 0.5), size, config)
        sampler = CentreSampler([case], (64, 64), config, train=False)
        found = sampler.sample(0, forced=True)
        inside = found.seg[0] > 0
        radii = np.hypot(*found.seg[2:])[inside].max()
        assert 0.8 < radii < 1.6


def test_a_sample_is_a_function_of_its_number() -> None:
    labels, image = discs(4)
    colour = np.stack([image, 255 - image, image // 2])
    config = CentreConfig(object_voxels=10.0, patch_size=(32, 32), channels=3)
    cases = [
        make_case("a", part, labels.astype(np.int32), (1.0, 1.0), 10.0, config)
        for part in (image[None], colour)
    ]
    sampler = CentreSampler(cases, (32, 32), config)
    for number in range(12):
        a, b = sampler.sample(number, True), sampler.sample(number, True)
        assert (a.image == b.image).all() and (a.seg == b.seg).all()
        assert a.image.shape == (3, 32, 32) and np.isfinite(a.image).all() and a.image.dtype == np.float32
    only = CentreSampler(cases, (32, 32), config.replace(groups={"grey": 1.0, "colour": 0.0}))
    assert only.weights.tolist() == [1, 0]


def test_synthetic_cells_touch_and_no_crumbs_are_left() -> None:
    config = SyntheticConfig(diameter=(10, 11), crowd=(0.8, 0.9), elongation=1.2)
    labels = draw_cells((40, 40, 40), config, np.random.default_rng(0))
    sizes = np.bincount(labels.ravel())[1:]
    assert np.count_nonzero(sizes) > 20
    touching = (labels[1:] != labels[:-1]) & (labels[1:] > 0) & (labels[:-1] > 0)
    assert touching.sum() > 50
    image = paint_cells(labels, config, np.random.default_rng(1))
    assert image.shape == labels.shape and image.dtype == np.float32 and np.isfinite(image).all()


def test_settings_that_do_not_exist_are_named() -> None:
    assert load_centre(None) == CentreConfig()
    with pytest.raises(ConfigError, match="did you mean 'object_voxels'"):
        load_centre(None, ("object_voxel=3",))
    with pytest.raises(ConfigError, match="YAML"):
        load_centre("nothing.yaml")


def test_matching_counts_true_invented_and_missed() -> None:
    reference = np.zeros((10, 10), int)
    reference[:4, :4], reference[6:, 6:], reference[0, 9] = 1, 5, 9
    found = np.zeros_like(reference)
    found[:4, :4], found[6:, 6:9], found[5, 0] = 7, 2, 3
    assert count_matches(reference, found) == {0.5: (2, 1, 1), 0.7: (2, 1, 1)}
    assert count_matches(reference, np.ones_like(reference), [0.5])[0.5] == (0, 1, 3)
    assert count_matches(reference * 0, found * 0)[0.5] == (0, 0, 0)
    half = np.array([[1, 1, 2, 2]]), np.array([[1, 2, 2, 2]])
    assert count_matches(*half, [0.5])[0.5] == (2, 0, 0)
