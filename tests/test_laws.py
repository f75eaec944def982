"""Settings survive the disk: what is written as YAML or JSON is read back equal, whatever the numbers."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from medseg.config import Config, dump_yaml, parse_mapping
from medseg.labels import LabelSet
from medseg.plan.schema import ChannelStats, Plan
from medseg.train import TrainConfig
from medseg.train.config import AugmentConfig, LossConfig, OptimizerConfig
from tests.infer.models import tiny_plan

WRITERS = {"yaml": dump_yaml, "json": lambda data: json.dumps(data, indent=2)}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.floats(1e-12, 1.0, exclude_min=True)
# YAML must not take these for numbers, booleans, dates or nothing.
WORDS = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["1e-05", "1e5", "0x1", "no", "null", "~", "1:30", "2024-01-01", "{", "- a", "a: b", "1_000", " "]
)
WORDS = WORDS.filter(lambda word: word.isprintable())


class Inner(Config):
    value: float | None = None
    pair: tuple[float, ...] = ()


class Sample(Config):
    number: float = 0.0
    whole: int = 0
    word: str = ""
    flag: bool = False
    nothing: float | None = None
    triples: tuple[tuple[float, float, float], ...] = ()
    named: dict[str, float | None] = Field(default_factory=dict)
    inner: Inner = Inner()


SAMPLES = st.builds(
    Sample,
    number=NUMBERS,
    whole=st.integers(-(10**12), 10**12),
    word=WORDS,
    flag=st.booleans(),
    nothing=st.none() | NUMBERS,
    triples=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=3).map(tuple),
    named=st.dictionaries(WORDS, st.none() | NUMBERS, max_size=3),
    inner=st.builds(Inner, value=st.none() | NUMBERS, pair=st.lists(NUMBERS, max_size=3).map(tuple)),
)
RECIPES = st.builds(
    TrainConfig,
    batch_size=st.none() | st.integers(1, 64),
    optimizer=st.builds(OptimizerConfig, lr=SMALL, weight_decay=SMALL, clip_norm=SMALL),
    loss=st.builds(LossConfig, smooth=SMALL),
    augment=st.builds(
        AugmentConfig,
        mirror=st.sampled_from(["auto", "off"]) | st.sets(st.integers(0, 2)).map(lambda s: tuple(sorted(s))),
        p_mirror=st.floats(0, 1),
    ),
)
STATS = st.builds(
    ChannelStats,
    **dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5"), NUMBERS),
    std=st.floats(0, 1e300),
)
SPACING = st.floats(1e-6, 1e6)
PLANS = st.builds(
    lambda stats, spacing, name: tiny_plan(
        spacing=spacing, labels=LabelSet(entries={"background": 0, name: 1})
    ).replace(intensity={"0": stats.to_dict()}),
    STATS,
    st.tuples(SPACING, SPACING, SPACING),
    WORDS.filter(lambda word: word not in ("background", "ignore")),
)


def survives(config: Config, kind: str) -> None:
    text = WRITERS[kind](config.to_dict())
    back = type(config).from_dict(parse_mapping(text, kind))
    assert back == config, text
    assert WRITERS[kind](back.to_dict()) == text


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=60, deadline=None)
@example(Sample(number=1e-05, nothing=1e16, word="1e-05", triples=((1e-05, -0.0, 5e-324),)))
@given(config=SAMPLES)
def test_any_settings_survive_the_disk(kind: str, config: Sample) -> None:
    survives(config, kind)


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=40, deadline=None)
@example(TrainConfig(optimizer=OptimizerConfig(lr=1e-05, weight_decay=3e-05)))
@given(config=RECIPES)
def test_any_recipe_survives_the_disk(kind: str, config: TrainConfig) -> None:
    survives(config, kind)


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=40, deadline=None)
@given(config=PLANS)
def test_any_plan_survives_the_disk(kind: str, config: Plan) -> None:
    survives(config, kind)


@pytest.mark.parametrize("kind", WRITERS)
def test_small_floats_are_numbers_for_every_reader(kind: str) -> None:
    import yaml

    text = WRITERS[kind]({"lr": 1e-05})
    read: Any = yaml.safe_load(text) if kind == "yaml" else json.loads(text)
    assert read == {"lr": 1e-05}
