"""Shapes, samples and training of the refiner."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.nets.refiner import CHANNELS, GRID, Refiner, ball, show
from medseg.train.refiner import Recipe, loss_of, train
from medseg.train.refiner_samples import draw_sample, make_source, mark_click, shown
from medseg.train.shapes import draw_label_map, draw_regions, smooth_noise

RECIPE = Path("configs/prompt/refiner.yaml")


def source(seed: int = 0):  # type: ignore[no-untyped-def]
    return make_source(draw_label_map(np.random.default_rng(seed), 56))


def test_noise_has_the_deviation_and_the_length_that_were_asked() -> None:
    field = smooth_noise((40, 40, 40), 5.0, np.random.default_rng(0))
    assert field.std() == pytest.approx(1, abs=1e-3)
    assert np.corrcoef(field[:-1].ravel(), field[1:].ravel())[0, 1] > 0.95


def test_the_same_seed_draws_the_same_label_map_and_sample() -> None:
    assert (source().objects == source().objects).all()
    a, b = (draw_sample([source()], np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(a.image, b.image) and torch.equal(a.target, b.target)


def test_a_sample_shows_marks_and_never_the_answer() -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        sample = draw_sample([source()], rng)
        assert sample.target.any() and sample.target.shape == (GRID,) * 3
        marked = (sample.slice_mask != 0).flatten(0, 1).any(dim=0)
        assert marked.sum() <= 12  # one slice, which may be thick
        given = shown(sample)
        assert given.shape == (len(CHANNELS), *(GRID,) * 3) and torch.isfinite(given).all()


def test_clicks_fall_into_errors_with_their_sign() -> None:
    truth = np.zeros((GRID,) * 3, bool)
    truth[10:20, 10:20, 10:20] = True
    wrong = np.roll(truth, 12, axis=0)
    clicks = torch.zeros(GRID, GRID, GRID)
    assert mark_click(clicks, wrong, truth, np.random.default_rng(0))
    assert mark_click(clicks, wrong & ~(clicks < 0).numpy(), truth, np.random.default_rng(0))
    marked = clicks.numpy()
    assert (marked != 0).any() and (truth[marked > 0]).all() and (wrong[marked < 0]).all()
    assert not mark_click(clicks, truth, truth, np.random.default_rng(0))


def test_regions_follow_the_edges_of_an_image() -> None:
    truth = np.zeros((40, 40, 40), bool)
    truth[10:30, 12:28, 10:30] = True
    image = np.where(truth, 1.0, 0.2) + np.random.default_rng(0).normal(0, 0.01, truth.shape)
    found = draw_regions(image.astype(np.float32), np.random.default_rng(1))
    inside = found[truth]
    main = np.bincount(inside[inside > 0]).argmax()
    assert (found[truth] == main).mean() > 0.8 and (found[~truth] == main).mean() < 0.1


def test_the_floods_agree_on_a_ball_and_differ_along_a_rod() -> None:
    at = np.indices((GRID,) * 3) - 19.5
    for name, depth in (("ball", 8 - np.sqrt((at**2).sum(0))), ("rod", 8 - np.hypot(at[0], at[1]))):
        image = torch.from_numpy((depth > 0).astype(np.float32))
        mask, box, none = torch.zeros(3, GRID, GRID, GRID)
        mask[:, :, 20] = box[:, :, 20] = image[:, :, 20] * 2 - 1
        shown_flood = show(image, mask, box, none, none)[-1].numpy()
        inside = shown_flood[depth > 1]
        assert (inside > 0.9).all() if name == "ball" else 0.1 < (inside < 0.9).mean() < 0.9


def test_a_ball_at_the_border_is_cut() -> None:
    cube = torch.zeros(GRID, GRID, GRID)
    ball(cube, (-1.0, 5.0, 5.0), 1.0)
    ball(cube, (-9.0, 5.0, 5.0), 1.0)
    assert 0 < cube.sum() < 33


def test_what_is_shown_does_not_depend_on_the_scale_of_the_image() -> None:
    image = torch.rand(GRID, GRID, GRID)
    none = torch.zeros_like(image)
    mask = torch.zeros_like(image)
    mask[10:20, 10:20, 20] = 1
    a, b = show(image, mask, none, none, none), show(image * 900 - 50, mask, none, none, none)
    assert torch.allclose(a, b, atol=1e-3)


def test_training_lowers_the_loss_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Refiner((8, 8, 16, 16))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    sample = draw_sample([source()], np.random.default_rng(1))
    losses = []
    for _ in range(12):
        loss = loss_of(network(shown(sample)[None])[:, 0], sample.target[None].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for steps in (1, 2):
        recipe = Recipe(label_maps=1, steps=steps, batch=1, workers=0)
        train(recipe, ".", tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def test_the_recipe_of_the_package_is_valid() -> None:
    assert Recipe.load(RECIPE).steps > 1000
