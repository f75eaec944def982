"""Fine-tuning on small phantoms, with a network of random weights at 64 pixels: all of it, in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from medseg import log
from medseg.cli import app
from medseg.errors import BundleError, Cancelled, ConfigError, DatasetError, MedsegError, TrainingError
from medseg.io import Case, open_dataset, read, write
from medseg.labels import LabelSet
from medseg.nets.sam import build_sam, load_sam
from medseg.nets.sam_bundle import read_card
from medseg.prompt.provenance import models_at_work
from medseg.prompt.scene import Scene
from medseg.prompt.segmenter import SlicePrompts, SliceSegmenter
from medseg.prompt.slicewise import Models
from medseg.train import promptable_loop
from medseg.train.promptable import describe_tuning, tune
from medseg.train.promptable_config import LossWeights, PromptableConfig, load_promptable
from medseg.train.promptable_samples import Sample, Store, open_case
from medseg.train.promptable_steps import answer, first_prompts, loss_of, make_batch, targets
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

GRID = Geometry((34, 30, 8), affine("LPS", (1.0, 1.0, 3.0)))
QUICK = [
    *("size=64", "steps=10", "batch_size=4", "slices_per_case=3", "val_slices=2", "val_clicks=1", "lr=0.001"),
    *("precision=fp32", "threads=1", "clicks=1", "warmup=0", "weight_decay=0"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases of a bright and a dark disc that move through the slices."""
    root = tmp_path_factory.mktemp("discs")
    for seed in range(6):
        label, image = phantom(seed)
        write(Volume(image, GRID), root / "images" / f"case_{seed}.nii.gz")
        write(Volume(label, GRID), root / "labels" / f"case_{seed}.nii.gz")
    return root


def phantom(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    i, j, k = np.indices(GRID.shape)
    label = np.zeros(GRID.shape, np.uint8)
    row, column = generator.uniform(8, 12, 2)
    label[(i - row) ** 2 + (j - column - 0.3 * k) ** 2 < 30] = 1
    label[(i - row - 13) ** 2 + (j - column - 8) ** 2 < 20] = 2
    image = generator.normal(100, 5, GRID.shape) + 60 * (label == 1) - 60 * (label == 2)
    return label, image.astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileSAM that has learned nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(build_sam("mobile-sam").state_dict(), path)
    return path


def run(dataset: Path, out: Path, weights: Path, *more: str, **choices: Any) -> Path:
    return tune(dataset, out, overrides=[*QUICK, *more], pretrained=weights, **choices)


@pytest.fixture(scope="module")
def finished(dataset: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run(dataset, out, weights, "steps=50")
    return out


def content(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "bundle" / "weights.safetensors")


def test_training_the_decoder_lowers_the_loss_and_raises_dice(finished: Path) -> None:
    lines = (finished / "fold_0" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 2 and losses[-1] < 0.8 * losses[0]
    result = json.loads((finished / "fold_0" / "result.json").read_text())
    assert result["after"]["dice"][0] > result["before"]["dice"][0] + 0.1
    assert result["steps"] == 50 and result["validation_cases"] == 2 and result["held_out"]


def test_only_the_decoder_changes(finished: Path, weights: Path) -> None:
    before, after = load_file(weights), content(finished)
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mask_decoder"}


def test_the_bundle_says_where_it_comes_from_and_takes_the_place_of_the_published_weights(
    finished: Path, dataset: Path
) -> None:
    card = read_card(finished)
    assert (card.base, card.licence, card.size) == ("mobile-sam", "unknown", 64)
    assert card.labels == ("label_1", "label_2") and card.trained == ("mask decoder",)
    assert card.provenance["samples"] == 24 and card.recipe["steps"] == 50
    scene = Scene.of(read(next((dataset / "images").iterdir())), (0.0, 200.0))
    models = Models.open(scene, given={"mobile-sam": finished / "bundle"})
    assert models.click_segmenter.size == card.size  # type: ignore[attr-defined]
    found = models.click_segmenter.predict(2, 4, SlicePrompts(box=(2.5, 2.5, 18.5, 18.5)))
    assert np.isfinite(found.logits).all()
    (known,) = models_at_work(models)
    assert known["name"].startswith("mobile-sam fine-tuned on discs") and known["licence"] == "unknown"
    with pytest.raises(BundleError, match="holds mobile-sam, not lite-medsam"):
        Models.open(scene, given={"lite-medsam": finished / "bundle"}).weights("lite-medsam")
    assert "Loss" in (finished / "fold_0" / "report.html").read_text()


def test_killed_at_a_step_and_resumed_it_ends_with_the_same_weights(
    dataset: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = "checkpoint_seconds=0.0001"
    run(dataset, tmp_path / "whole", weights)
    step = promptable_loop._Session.step

    def dies(session: Any, fraction: float) -> None:
        if session.progress.step == 6:
            raise RuntimeError("killed")
        step(session, fraction)

    with monkeypatch.context() as patched:
        patched.setattr(promptable_loop._Session, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(dataset, tmp_path / "parts", weights, often)
    with pytest.raises(TrainingError, match="--resume"):
        run(dataset, tmp_path / "parts", weights, often)
    with pytest.raises(TrainingError, match="belongs to a run with another"):
        run(dataset, tmp_path / "parts", weights, often, "lr=0.01", resume=True)
    run(dataset, tmp_path / "parts", weights, often, resume=True)
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    results = [
        json.loads((tmp_path / part / "fold_0" / "result.json").read_text()) for part in ("whole", "parts")
    ]
    assert results[0]["after"] == results[1]["after"] and results[0]["before"] == results[1]["before"]


def test_the_encoder_learns_by_adapters_that_are_merged_in_the_bundle(
    dataset: Path, weights: Path, tmp_path: Path
) -> None:
    run(dataset, tmp_path, weights, "steps=2", "batch_size=2", "lora.rank=2", "prompt_encoder=true")
    before, after = load_file(weights), content(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name in changed if name.startswith("image_encoder.")}
    assert encoder and all(name.endswith(("qkv.weight", "proj.weight")) for name in encoder)
    assert any(name.startswith("prompt_encoder.") for name in changed)
    assert "image encoder (LoRA of rank 2)" in read_card(tmp_path).trained
    assert load_sam(tmp_path).spec.name == "mobile-sam"


def test_it_ends_in_the_time_given_and_says_what_it_left_out(
    dataset: Path,
    weights: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for part in ("PREPARE_PART", "MEASURE_PART"):  # however fast the machine, there is time for one case only
        monkeypatch.setattr(f"medseg.train.promptable.{part}", 0.0)
    run(dataset, tmp_path, weights, "steps=100000", max_minutes=0.0002)
    result = json.loads((tmp_path / "fold_0" / "result.json").read_text())
    assert result["steps"] < 100000 and result["cases"] < 4 and result["validation_cases"] == 1
    assert "training cases are used" in caplog.text


def test_cancelled_it_saves_its_state(dataset: Path, weights: Path, tmp_path: Path) -> None:
    class Stop(log.Listener):
        training: int | None = None

        def started(self, key: int, label: str, total: int | None) -> None:
            self.training = key if label == "Fine-tuning" else self.training

        def cancelled(self) -> bool:
            return self.training is not None

    with log.listening(Stop()), pytest.raises(Cancelled, match="--resume"):
        run(dataset, tmp_path, weights)
    assert (tmp_path / "fold_0" / "state.safetensors").exists()


def test_a_finished_fold_is_left_alone(finished: Path, dataset: Path, weights: Path) -> None:
    assert run(dataset, finished, weights, "steps=50", resume=True) == finished / "bundle"
    with pytest.raises(TrainingError, match="already trained"):
        run(dataset, finished, weights)
    with pytest.raises(TrainingError, match="folder for this one alone"):
        run(dataset, finished, weights, fold=1)


def test_a_tuned_bundle_can_be_tuned_further(
    finished: Path, dataset: Path, weights: Path, tmp_path: Path
) -> None:
    run(dataset, tmp_path, finished / "bundle", "steps=1", "labels=[label_1]")
    assert read_card(tmp_path).labels == ("label_1",)
    with pytest.raises(BundleError, match="holds mobile-sam, not sam-vit-b"):
        run(dataset, tmp_path / "other", finished / "bundle", "base=sam-vit-b")


@pytest.mark.parametrize(
    ("more", "error", "word"),
    [
        (("labels=[liver]",), ConfigError, "labels 'liver': the dataset has label_1, label_2"),
        (("lora.ranks=2",), ConfigError, "did you mean 'rank'"),
        (("size=50",), ConfigError, "multiple of 16"),
        (("start.box=0", "start.click=0", "start.neighbour=0"), ConfigError, "all ways to begin"),
        (("least_voxels=5000",), DatasetError, "no slice of the training cases"),
        (("base=lite-medsam",), BundleError, "holds mobile-sam, not lite-medsam"),
    ],
)
def test_what_does_not_fit_is_refused(
    dataset: Path, weights: Path, tmp_path: Path, more: tuple[str, ...], error: type[MedsegError], word: str
) -> None:
    with pytest.raises(error, match=word):
        run(dataset, tmp_path, weights, *more)


def test_a_network_of_boxes_is_not_tuned_to_clicks(dataset: Path, tmp_path: Path) -> None:
    save_file(build_sam("lite-medsam").state_dict(), tmp_path / "lite.safetensors")
    with pytest.raises(ConfigError, match="boxes only"):
        run(dataset, tmp_path / "run", tmp_path / "lite.safetensors", "base=lite-medsam")


def test_images_of_several_channels_need_a_choice(tmp_path: Path) -> None:
    label, image = phantom(0)
    write(Volume(label, GRID), tmp_path / "label.nii.gz")
    write(Volume(np.stack([image, image + 9]), GRID), tmp_path / "image.nii.gz")
    case = Case("two", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz", "two")
    labels = LabelSet.parse({"background": 0, "a": 1, "b": 2})
    with pytest.raises(ConfigError, match="Set channel=N"):
        open_case(case, labels, PromptableConfig())
    opened = open_case(case, labels, PromptableConfig(channel=1))
    assert opened.axis == 2 and opened.scene.array.mean() == pytest.approx(image.mean() + 9, abs=0.1)


def test_voxels_beside_what_nobody_annotated_are_not_pointed_at(tmp_path: Path) -> None:
    label, image = phantom(0)
    label[(label == 0) & (np.indices(GRID.shape)[0] > 19)] = 3
    write(Volume(label, GRID), tmp_path / "label.nii.gz")
    write(Volume(image, GRID), tmp_path / "image.nii.gz")
    case = Case("one", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz", "one")
    labels = LabelSet.parse({"background": 0, "a": 1, "b": 2, "ignore": 3})
    config = PromptableConfig()
    assert {found.label for found in open_case(case, labels, config).objects(4, config)} == {"a"}


def test_islands_of_a_label_are_objects_if_wished(dataset: Path) -> None:
    opened = open_dataset(dataset)
    merged = LabelSet.parse({"background": 0, "disc": [1, 2]}, (1,))
    for objects, count in (("labels", 1), ("components", 2)):
        config = PromptableConfig(objects=objects)
        case = open_case(opened.training[0], merged, config)
        assert len(list(case.objects(4, config))) == count


def sample(shape: tuple[int, int] = (30, 24)) -> Sample:
    rows, columns = np.indices(shape)
    mask = (rows - 14) ** 2 + (columns - 11) ** 2 < 40
    near = (rows - 15) ** 2 + (columns - 11) ** 2 < 36
    return Sample(torch.randn(256, 4, 4), mask, near, (1.0, 1.0))


@pytest.mark.parametrize("way", ["box", "click", "neighbour"])
def test_each_way_to_begin_gives_an_answer_that_can_be_learned_from(way: str) -> None:
    start = {"box": 0.0, "click": 0.0, "neighbour": 0.0, way: 1.0}
    config = PromptableConfig(size=64, start=start, clicks=2, click_share=1.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_sam("mobile-sam")
    samples = [sample(), sample((24, 30))]
    prompts = first_prompts(samples, config, np.random.default_rng(0))
    if way == "click":
        assert all(
            each.mask[tuple(p.points[0].astype(int))] for each, p in zip(samples, prompts, strict=True)
        )
    if way == "neighbour":
        assert np.array_equal(prompts[0].mask > 0, samples[0].near)  # type: ignore[operator]
    batch = make_batch(model, samples, 64, torch.device("cpu"))
    logits, expected = answer(model, batch, config, np.random.default_rng(1))
    wanted, valid = targets(batch, logits.shape[-1])
    loss_of(logits, expected, wanted, valid, LossWeights()).backward()
    assert logits.shape == (2, 1, 16, 16)
    alone = config.replace(clicks=0)
    counts = {answer(model, batch, alone, np.random.default_rng(n))[0].shape[1] for n in range(6)}
    assert counts == ({1, 3} if way == "click" else {1})


def test_the_loss_is_least_for_the_right_mask_and_ignores_what_is_padding() -> None:
    model = build_sam("mobile-sam")
    batch = make_batch(model, [sample()], 64, torch.device("cpu"))
    wanted, valid = targets(batch, 16)
    assert valid[0, :, 13:].sum() == 0 and valid[0, :, :13].all()
    right = torch.where(wanted > 0.5, 9.0, -9.0)[:, None]
    weights = LossWeights(focal_gamma=2.0)

    def loss(logits: torch.Tensor, iou: float) -> float:
        return float(loss_of(logits, torch.full(logits.shape[:2], iou), wanted, valid, weights))

    assert loss(right, 1.0) < 0.25 < loss(-right, 0.0)
    assert loss(right, 0.5) == pytest.approx(loss(right, 1.0) + 0.25, abs=1e-5)
    noisy = right.clone()
    noisy[..., 13:] = 9.0
    assert loss(noisy, 1.0) == loss(right, 1.0)
    both = torch.cat([-right, right], dim=1)
    assert loss(both, 1.0) == pytest.approx(loss(right, 1.0) + 0.5, abs=1e-3)  # the best counts, IoU of both


def test_an_embedding_that_is_stored_is_the_one_that_is_asked(dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_sam("mobile-sam")
    opened = open_dataset(dataset)
    config = PromptableConfig(size=64, slices_per_case=1, precision="fp32")
    store = Store(tmp_path)
    case = opened.training[0]
    assert store.prepare(case, opened.labels, model, config, "weights") == 2
    found = store.load(case.name, 0)
    tuned = open_case(case, opened.labels, config)
    segmenter = SliceSegmenter(model, tuned.scene, size=64, precision="fp32")
    near = [
        float((segmenter.embed(2, index)[0] - found.features.float()).abs().max())
        for index in range(GRID.shape[2])
    ]
    assert min(near) < 2e-3
    assert found.spacing == (1.0, 1.0) and found.mask.shape == (34, 30)
    stamp = store.path(case.name).stat().st_mtime_ns
    store.prepare(case, opened.labels, model, config, "weights")
    assert store.path(case.name).stat().st_mtime_ns == stamp
    store.path(case.name).write_bytes(b"cut off")
    assert store.prepare(case, opened.labels, model, config, "weights") == 2


def test_the_recipe_and_its_description(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected promptable or a YAML file"):
        load_promptable("nnunet")
    facts = describe_tuning(dataset, tmp_path, overrides=["lora.rank=4"])
    assert facts["trains"] == ["mask decoder", "image encoder (LoRA of rank 4)"]
    assert facts["train"] == 4 and facts["validation"] == 2 and not list(tmp_path.iterdir())


def test_the_command_trains_and_says_how_much_better_it_is(
    dataset: Path, weights: Path, tmp_path: Path
) -> None:
    words = ["train", str(dataset), *QUICK, "steps=2", "-o", str(tmp_path / "run"), "--task", "promptable"]
    done = CliRunner().invoke(app, [*words, "--pretrained", str(weights)])
    assert done.exit_code == 0, done.output
    assert "before" in done.output and "after" in done.output
    refused = CliRunner().invoke(app, [*words, "--preset", "cpu"])
    assert isinstance(refused.exception, ConfigError) or "has no plan" in refused.output
    wrong = CliRunner().invoke(app, ["train", str(dataset), "--task", "prompt"])
    assert isinstance(wrong.exception, ConfigError) or "segment or promptable" in wrong.output
