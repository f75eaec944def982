"""Settings: what is wrong with them is one short sentence."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from medseg.config import Config, dump_yaml, override, read_mapping
from medseg.errors import ConfigError, ReadError


class Optimizer(Config):
    lr: float = 0.1
    momentum: float = 0.9


class Stage(Config):
    width: int = 8


class Settings(Config):
    names: dict[str, Optimizer] = Field(default={"fast": Optimizer()})
    second: Optimizer | None = None
    stages: tuple[Stage, ...] = ()


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"names": {"fast": {"lrr": 1}}}, "unknown key 'names.fast.lrr'; did you mean 'lr'?"),
        ({"second": {"momentums": 1}}, "unknown key 'second.momentums'; did you mean 'momentum'?"),
        ({"stages": [{}, {"widht": 1}]}, "unknown key 'stages.1.widht'; did you mean 'width'?"),
        ({"secnd": 1}, "did you mean 'second'?"),
    ],
)
def test_a_typo_is_corrected_at_any_depth(values: dict, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        Settings.from_dict(values)
    assert hint in str(caught.value)


def test_an_override_of_a_group_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        Settings().with_overrides(["names.fst.lr=1"])
    assert Settings().with_overrides(["names.fast.lr=1"]).names["fast"].lr == 1


def test_wrong_values_are_cut_and_counted() -> None:
    wrong = {"stages": [{"width": "x" * 5000} for _ in range(9)]}
    with pytest.raises(ConfigError, match="and 6 more") as caught:
        Settings.from_dict(wrong)
    assert len(str(caught.value)) < 600


class Plain(Config):
    unit: Literal["mm", "voxel"] = "mm"
    place: tuple[float, float] = (0, 0)
    size: int = Field(1, ge=1)
    cases: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"unit": "cm"}, "Plain: unit: expected 'mm' or 'voxel' (got 'cm')"),
        ({"place": (1, "x")}, "Plain: place.1: expected a number (got 'x')"),
        ({"place": (1, float("nan"))}, "Plain: place.1: expected a finite number (got nan)"),
        ({"place": (1,)}, "Plain: place.1 is missing"),
        ({"size": 0}, "Plain: size: expected at least 1 (got 0)"),
        ({"size": 1.5}, "Plain: size: expected a whole number (got 1.5)"),
        ({"size": None}, "Plain: size: expected a whole number (got nothing)"),
        ({"cases": []}, "Plain: cases: expected at least 1 in this list (got [])"),
    ],
)
def test_wrong_values_are_said_in_plain_words_however_settings_are_made(values: dict, said: str) -> None:
    for make in (Plain.from_dict, lambda given: Plain(**given)):
        with pytest.raises(ConfigError) as caught:
            make(values)
        assert str(caught.value) == said


def test_a_wrong_value_inside_another_model_keeps_its_place() -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.width: expected a whole number"):
        Settings(stages=({"width": "x"},))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- a", "a list"), ("a", "text"), ("3", "(3)")])
def test_a_file_that_is_no_mapping_says_what_it_holds(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(found)):
        read_mapping(tmp_path / "x.yaml")


def test_yaml_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="anchors and aliases"):
        read_mapping(file)
    with pytest.raises(ConfigError, match="not valid YAML"):
        override({}, ["a=[&x 1, *x]"])


def test_an_ampersand_in_text_is_no_anchor(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: liver & spleen\n")
    assert read_mapping(tmp_path / "a.yaml") == {"name": "liver & spleen"}


def test_what_is_written_has_no_aliases() -> None:
    shared = {"a": [1]}
    assert "&" not in dump_yaml({"x": shared, "y": shared})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "a: 2026-99-99", "a: [1", "- 1"])
def test_hostile_text_is_a_config_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_mapping(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 500


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(65 * 2**20)
    with pytest.raises(ReadError, match="larger than 64 MB"):
        read_mapping(tmp_path / "a.json")


def test_missing_files_folders_and_binary_files_are_read_errors(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, match in (("none.yaml", "no such file"), ("", "is a folder"), ("b.yaml", "not UTF-8")):
        with pytest.raises(ReadError, match=match):
            read_mapping(tmp_path / name)


def test_a_file_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text(json.dumps({}))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ReadError, match="Change its permissions"):
        read_mapping(tmp_path / "a.json")
