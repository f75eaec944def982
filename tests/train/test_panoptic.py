"""Training of things and stuff in one network, on small phantoms: all of it, in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medseg.bundle import load_bundle
from medseg.cli import app
from medseg.errors import BundleError, DataError, DatasetError
from medseg.infer import Predictor
from medseg.instances.count import count_objects
from medseg.instances.models import load_object_model
from medseg.instances.panoptic import merge_found
from medseg.io import open_dataset, read, write
from medseg.io.semantic import find_semantic_maps
from medseg.metrics.panoptic_maps import evaluate_panoptic
from medseg.nets.centre_heads import CentreHeads
from medseg.train.centre import OBJECTS, decide_centre, open_objects, train_centre
from medseg.train.centre_config import CentreConfig, CentreLoss
from medseg.train.centre_losses import count_overlap, loss_terms
from medseg.train.centre_samples import CentreSampler, make_case, make_goal
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

CLASSES = {
    2: {"labels": {"organ": 1, "lesion": 2, "cyst": 3}, "things": ["lesion", "cyst"]},
    3: {"labels": {"organ": 1, "lesion": 2}, "things": ["lesion"], "stuff": ["organ"]},
}
QUICK = [
    *("train.val_samples=4", "train.precision=fp32", "train.threads=1"),
    *("object_voxels=8", "train.ema_decay=0.8", "train.optimizer.lr=0.02", "hold_out=1"),
    "train.optimizer.weight_decay=0",
    *("augment.zoom=1.1", "augment.stretch=1", "augment.invert=0", "augment.rotate=0"),
    *[f"augment.{look}.p=0" for look in ("gamma", "contrast", "brightness", "blur", "noise", "shade", "dim")],
    "augment.speckle.p=0",
]
SIZES = {2: (64, 72), 3: (22, 26, 28)}
STEPS = {2: ("train.epochs=6", "train.steps_per_epoch=40"), 3: ("train.epochs=4", "train.steps_per_epoch=36")}


def network(n: int) -> list[str]:
    """Return the settings of a small network, and its patch."""
    widths = [16 if n == 2 else 12, 24, 32]
    stages = len(widths)
    architecture = {
        "features_per_stage": widths,
        "strides": [[1] * n, *[[2] * n] * (stages - 1)],
        "kernel_sizes": [[3] * n] * stages,
        "blocks_per_stage": [1] * stages,
        "decoder_convs_per_stage": [1] * (stages - 1),
    }
    size = [f"patch_size={[32 if n == 2 else 20] * n}", f"train.batch_size={4 if n == 2 else 2}"]
    return [f"architecture={json.dumps(architecture)}", *size]


def scene(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, objects and classes: an organ with bright lesions, and in 2D dark cysts."""
    rng = np.random.default_rng(seed)
    shape = SIZES[n]
    places = np.indices(shape, dtype=float)
    middle = np.array(shape) / 2
    half, spread, tries = (0.42, 0.28, 9) if n == 2 else (0.56, 0.4, 30)
    away = sum(((p - m) / (half * s)) ** 2 for p, m, s in zip(places, middle, shape, strict=True))
    classes = (away < 1).astype(np.uint8)
    objects = np.zeros(shape, np.uint16)
    for number in range(1, tries + 1):
        centre = middle + rng.uniform(-spread, spread, n) * shape
        radius = rng.uniform(3.5, 4.5)
        inside = sum((p - c) ** 2 for p, c in zip(places, centre, strict=True)) < radius**2
        if np.count_nonzero(inside & (objects == 0)) < 0.8 * np.count_nonzero(inside):
            continue
        inside &= objects == 0
        objects[inside] = 5 * number
        classes[inside] = 2 + (number % 2 if n == 2 else 0)
    grey = np.array([20.0, 90.0, 190.0, 45.0])[classes]
    return (grey + rng.normal(0, 5, shape)).clip(0, 255).astype(np.uint8), objects, classes


def write_scenes(root: Path, n: int, count: int = 4) -> Path:
    for seed in range(count):
        for folder, array in zip(("images", "labels", "semantic"), scene(n, seed), strict=True):
            turned = array.T[..., None] if n == 2 else array.transpose(2, 1, 0)
            grid = Geometry(turned.shape, affine("RAS", (1.0, 1.0, 1.0)))
            write(Volume(turned, grid), root / folder / f"case_{seed}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(CLASSES[n]))
    return root


@pytest.fixture(scope="module", params=[2, 3])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Path]:
    n = int(request.param)
    dataset = write_scenes(tmp_path_factory.mktemp(f"scenes{n}"), n)
    run = tmp_path_factory.mktemp(f"run{n}")
    train_centre(dataset, run, overrides=[*QUICK, *network(n), *STEPS[n]])
    return n, dataset, run


def test_one_network_learns_things_and_stuff(trained: tuple[int, Path, Path]) -> None:
    n, _, run = trained
    result = json.loads((run / "fold_0" / "result.json").read_text())
    things = CLASSES[n]["things"]
    assert result["panoptic"]["things"]["pq"] > 0.6
    assert result["panoptic"]["things"]["classes"] == len(things)
    assert result["panoptic"]["stuff"]["pq"] > 0.8
    bundle = load_bundle(run)
    assert bundle.task == "centre-offset" and bundle.n_outputs == 2 + len(things) + 1 + n
    assert list(bundle.labels.foreground) == ["organ", *things]
    assert "PQ of things" in (run / "fold_0" / "report.html").read_text()


def test_the_command_makes_a_panoptic_map_of_an_image(
    trained: tuple[int, Path, Path], tmp_path: Path
) -> None:
    n, _, run = trained
    image, objects, classes = scene(n, 9)  # of which it has seen nothing
    turned = image.T[..., None] if n == 2 else image.transpose(2, 1, 0)
    grid = Geometry(turned.shape, affine("RAS", (1.0, 1.0, 1.0)))
    write(Volume(turned, grid), tmp_path / "image.nii.gz")
    words = ["panoptic", tmp_path / "image.nii.gz", "--model", run, "-o", tmp_path / "out", "--json"]
    shown = CliRunner().invoke(app, [*map(str, words)])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert list(facts["things"]) == CLASSES[n]["things"] and list(facts["stuff"]) == ["organ"]
    assert facts["objects"] == sum(facts["things"].values())
    truth = tmp_path / "truth"
    for folder, array in (("semantic", classes), ("labels", objects)):
        volume = array.T[..., None] if n == 2 else array.transpose(2, 1, 0)
        write(Volume(volume, grid), truth / folder / "image.nii.gz")
    (truth / "dataset.json").write_text(json.dumps(CLASSES[n]))
    quality = evaluate_panoptic(tmp_path / "out", truth).total
    assert quality.overall_things.pq > 0.6 and quality.overall_stuff.pq > 0.8
    packed = read(tmp_path / "out" / "image_panoptic.nii.gz")
    assert packed.geometry.matches(grid)
    few = CliRunner().invoke(app, [*map(str, words), "--min-stuff-mm3", "1e6"])
    assert json.loads(few.stdout)["stuff"] == {}
    over = ["--semantic", truth / "semantic" / "image.nii.gz", "--classes", truth / "dataset.json"]
    both = CliRunner().invoke(app, [*map(str, [*words, *over])])
    assert json.loads(both.stdout)["things"] == facts["things"], "its things over the stuff of another map"


def test_grey_and_colour_pictures_train_together_and_grey_ones_are_held_out(tmp_path: Path) -> None:
    data, run = tmp_path / "pictures", tmp_path / "run"
    for seed in range(4):
        for folder, array in zip(("images", "labels", "semantic"), scene(2, seed), strict=True):
            (data / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(data / folder / f"case_{seed}.png")
    (data / "dataset.json").write_text(json.dumps(CLASSES[2]))
    first = decide_centre(data, run, overrides=["hold_out=1"]).train[0].images[0]
    Image.open(first).convert("RGB").save(first)
    Image.fromarray(np.asarray(Image.open(first)) // np.array([1, 2, 3], np.uint8)).save(first)
    quick = [*QUICK, *network(2), "train.epochs=1", "train.steps_per_epoch=2"]
    words = ["train", str(data), "-o", str(run), "--task", "panoptic", *quick]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert load_bundle(run).in_channels == 3


def test_labelling_voxels_with_such_a_network_points_to_the_command(trained: tuple[int, Path, Path]) -> None:
    with pytest.raises(BundleError, match=f"medseg panoptic --model {trained[2]}"):
        Predictor(load_bundle(trained[2]))


def test_counting_with_such_a_network_names_the_classes(trained: tuple[int, Path, Path]) -> None:
    n, _, run = trained
    image, objects, _ = scene(n, 9)
    turned = image.T[..., None] if n == 2 else image.transpose(2, 1, 0)
    model = load_object_model(run, threads=1)
    found = count_objects(Volume(turned, Geometry(turned.shape, affine())), model)
    assert set(found.table.columns["class_name"]) == set(CLASSES[n]["things"])
    assert abs(len(found.instances) - len(np.unique(objects)[1:])) <= 2
    nothing = model.segment(np.zeros(SIZES[n], np.uint8), (1.0,) * n)
    assert not nothing.labels.any() and not len(nothing.classes)
    assert not merge_found(nothing, model.classes).semantic.any()


def test_a_network_that_was_stopped_goes_on_only_with_the_same_classes(
    trained: tuple[int, Path, Path], tmp_path: Path
) -> None:
    n, dataset, _ = trained
    one = decide_centre(dataset, tmp_path, overrides=[*QUICK, *network(n)])
    assert one.facts()["things"] == ", ".join(CLASSES[n]["things"]) and one.facts()["stuff"] == "organ"
    (tmp_path / "other").mkdir()
    for name in ("images", "labels", "semantic"):
        (tmp_path / "other" / name).symlink_to(dataset / name)
    turned = {"labels": CLASSES[n]["labels"] | {"ignore": 4 if n == 2 else 3}, "things": CLASSES[n]["things"]}
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(turned))
    other = decide_centre(tmp_path / "other", tmp_path, overrides=[*QUICK, *network(n)])
    assert other.key != one.key and other.labels.ignore == (4 if n == 2 else 3)
    assert other.labels.n_outputs == one.labels.n_outputs


def test_the_task_panoptic_needs_maps_of_classes(tmp_path: Path) -> None:
    dataset = write_scenes(tmp_path / "d", 2, 2)
    words = ["train", str(dataset), "-o", str(tmp_path / "run"), "--task", "panoptic", "hold_out=1"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert shown.exit_code == 0 and "lesion, cyst" in shown.stdout
    (dataset / "semantic").rename(dataset / "other")
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, DatasetError) and "for objects alone, --task centre-offset" in str(error)
    assert decide_centre(dataset, tmp_path / "run", overrides=["hold_out=1"]).labels == OBJECTS


def test_maps_that_contradict_the_objects_are_named(tmp_path: Path) -> None:
    dataset = write_scenes(tmp_path / "d", 2, 2)
    semantic = read(dataset / "semantic" / "case_0.nii.gz")

    def refused(array: np.ndarray, message: str) -> None:
        write(semantic.with_array(array), dataset / "semantic" / "case_0.nii.gz")
        maps = find_semantic_maps(dataset)
        assert maps is not None
        case = open_dataset(dataset, OBJECTS).training[0]
        with pytest.raises(DatasetError, match=message):
            maps.read(case, open_objects(case)[1])

    refused(np.ones_like(semantic.array), r"voxels of objects have no class of a thing")
    refused(np.where(semantic.array == 0, 2, semantic.array), "voxels of things have no object")
    refused(np.where(semantic.array == 0, 8, semantic.array), "holds 8, which is no class")
    (dataset / "semantic" / "case_0.nii.gz").unlink()
    maps = find_semantic_maps(dataset)
    assert maps is not None
    case = open_dataset(dataset, OBJECTS).training[0]
    with pytest.raises(DatasetError, match="has no map in semantic/"):
        maps.read(case, open_objects(case)[1])


def test_a_description_without_things_is_refused(tmp_path: Path) -> None:
    dataset = write_scenes(tmp_path / "d", 2, 2)
    file = dataset / "dataset.json"
    for text, message in (
        ({"labels": {"organ": 1}}, "no 'things'"),
        ({"labels": {"organ": 1}, "things": []}, "names no thing"),
        ({"labels": {"organ": 1, "lesion": 5}, "things": ["lesion"]}, "consecutive"),
    ):
        file.write_text(json.dumps(text))
        with pytest.raises(DataError, match=message):
            find_semantic_maps(dataset)
    file.unlink()
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        find_semantic_maps(dataset)


@pytest.mark.parametrize("hard_share", [1.0, 0.2])
def test_voxels_to_be_ignored_move_no_term_of_the_loss(hard_share: float) -> None:
    _, objects, classes = scene(2, 3)
    weights = CentreLoss(hard_share=hard_share)
    left_out = classes.copy()
    left_out[:, :30] = np.where(objects[:, :30] == 0, 4, left_out[:, :30])
    heads = CentreHeads(4, 2)
    goal = torch.from_numpy(make_goal(objects, 8.0, left_out))[None]
    torch.manual_seed(0)
    outputs = torch.randn(1, heads.channels, *objects.shape)
    changed = torch.where(goal[:, :1] == 4, outputs + 3 * torch.randn_like(outputs), outputs)
    one, other = (loss_terms(each, goal, heads, weights, 4) for each in (outputs, changed))
    if hard_share == 1:
        assert [float(t) for t in one] == pytest.approx([float(t) for t in other])
    assert [float(t) for t in one[1:]] == pytest.approx([float(t) for t in other[1:]])
    assert torch.equal(count_overlap(outputs, goal, heads, 4), count_overlap(changed, goal, heads, 4))


def test_a_patch_shows_the_classes_where_its_objects_are() -> None:
    image, objects, classes = scene(2, 4)
    config = CentreConfig(object_voxels=10.0, patch_size=(48, 48))
    case = make_case("a", image[None], objects.astype(np.int32), (1.0, 1.0), 8.0, config, classes)
    sampler = CentreSampler([case], (48, 48), config)
    for number in range(6):
        goal = sampler.sample(number, forced=True).seg
        assert ((goal[1] > 0) == np.isin(goal[0], (2, 3))).all(), "a distance in things and nowhere else"
        assert set(np.unique(goal[0])) <= {0, 1, 2, 3} and (goal[0] == 1).any()
    plain = make_case("a", image[None], objects.astype(np.int32), (1.0, 1.0), 8.0, config)
    assert (plain.classes == (plain.labels > 0)).all()


def test_patches_are_drawn_around_rare_stuff_too() -> None:
    labels, classes = np.zeros((200, 200), np.int32), np.zeros((200, 200), np.uint8)
    for number in range(1, 7):
        labels[10:16, 8 * number : 8 * number + 6] = number
    classes[labels > 0], classes[170:180, 170:180] = 2, 1
    image = np.random.default_rng(0).random((1, 200, 200)).astype(np.float32)
    config = CentreConfig(object_voxels=10.0, patch_size=(32, 32))
    case = make_case("a", image, labels, (1.0, 1.0), 10.0, config, classes)
    sampler = CentreSampler([case], (32, 32), config)
    seen = [bool((sampler.sample(number, forced=True).seg[0] == 1).any()) for number in range(60)]
    assert 12 < sum(seen) < 40, "4 of 10 places are in the small area"
    alone = make_case("b", image, labels, (1.0, 1.0), 10.0, config, np.ones_like(classes))
    assert len(alone.middles) == 6 + 4, "stuff that fills the image is seen as well"
