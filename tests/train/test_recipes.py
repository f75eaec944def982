from pathlib import Path

import pytest

from medseg.errors import ConfigError
from medseg.train.config import TrainConfig
from medseg.train.recipes import RECIPES, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "train"


def test_the_nnunet_recipe_is_nnunets() -> None:
    recipe = RECIPES["nnunet"]
    assert (recipe.epochs, recipe.steps_per_epoch, recipe.oversample_foreground) == (1000, 250, 0.33)
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.01, 0.99)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (3e-5, 12.0)
    assert (recipe.schedule.name, recipe.schedule.power) == ("poly", 0.9)
    chances = recipe.augment.to_dict()
    expected = {
        "rotation": 0.2,
        "scaling": 0.2,
        "elastic": 0.0,
        "noise": 0.1,
        "blur": 0.2,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution": 0.25,
        "gamma_inverted": 0.1,
        "gamma": 0.3,
    }
    assert {name: chances[name]["p"] for name in expected} == expected


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_shipped_yaml_says_what_the_recipe_is(name: str) -> None:
    assert TrainConfig.load(CONFIGS / f"{name}.yaml") == RECIPES[name]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_the_disk(name: str, tmp_path: Path) -> None:
    for suffix in ("yaml", "json"):
        RECIPES[name].save(tmp_path / f"r.{suffix}")
        assert TrainConfig.load(tmp_path / f"r.{suffix}") == RECIPES[name]


def test_overrides_reach_nested_settings() -> None:
    recipe = load_recipe("cpu", ["optimizer.lr=0.5", "augment.mirror=[0, 2]", "epochs=3"])
    assert (recipe.optimizer.lr, recipe.augment.mirror, recipe.epochs) == (0.5, (0, 2), 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs=-1", "epochs"),
        ("epochs", "key=value"),
        ("epochs.many=3", "not a group"),
        ("augment.mirror=[-1]", "mirror"),
        ("augment.gamma.low=3", "above high"),
    ],
)
def test_a_wrong_override_names_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("cpu", [override])


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="nnunet, cpu"):
        load_recipe("fast")
