"""Settings: frozen pydantic models that refuse unknown keys, YAML or JSON on disk, dotted overrides."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ConfigError
from medseg.files import write_text
from medseg.types import PathLike


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Validate plain data.

        Raises
        ------
        ConfigError
            A key is unknown or a value is wrong; the message names all of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            name = where or cls.__name__
            raise ConfigError(f"{name}: {_explain(error, cls)}") from error

    @classmethod
    def load(cls, path: PathLike, overrides: Sequence[str] = ()) -> Self:
        """Read YAML or JSON and apply dotted overrides such as ``optimizer.lr=0.01``."""
        return cls.from_dict(override(read_mapping(path), overrides), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON and YAML can hold."""
        return self.model_dump(mode="json")

    def save(self, path: PathLike) -> None:
        """Write YAML (or JSON if `path` ends so), atomically."""
        data = self.to_dict()
        text = json.dumps(data, indent=2) if str(path).endswith(".json") else dump_yaml(data)
        write_text(path, text)

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **changes})


def read_mapping(path: PathLike) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises
    ------
    ConfigError
        The file is missing, does not parse, or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Check the path.") from error
    except (UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML or JSON ({reason}). Mend the file.") from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """Parse YAML or JSON whose top level is a mapping; `where` names it in errors.

    Raises
    ------
    ConfigError
        The text does not parse, or holds something else.
    """
    try:
        data = _parse(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML or JSON ({reason}). Mend the file.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping at the top level, found {type(data).__name__}.")
    return data


def _parse(text: str) -> Any:
    # JSON by a JSON parser: YAML takes its 1e-05 for a string.
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            pass  # YAML in flow style, or broken: the YAML parser says where
    return yaml.load(text, Loader=_FastSafeLoader)


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` strings to nested plain data; values are parsed as YAML.

    >>> override({"optimizer": {"lr": 0.1}}, ["optimizer.lr=0.01"])
    {'optimizer': {'lr': 0.01}}
    """
    result = json.loads(json.dumps(values))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}: expected key=value, for example optimizer.lr=0.01.")
        node = result
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {parent!r} is a value, not a group of settings.")
        node[last] = yaml.safe_load(value)
    return dict(result)


def dump_yaml(data: Any) -> str:
    """Return YAML with short lists on one line and keys in their given order."""
    return yaml.dump(data, Dumper=_ReadableDumper, sort_keys=False, width=100, allow_unicode=True)


_FastSafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _ReadableDumper(yaml.SafeDumper):
    """Block style for mappings, flow style for lists of plain values."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = all(not isinstance(item, dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    return "; ".join(_explain_one(item, model) for item in error.errors())


def _explain_one(item: Any, model: type[BaseModel]) -> str:
    dotted = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{dotted}: {item['msg']} (got {item['input']!r})" if dotted else str(item["msg"])
    known = list(_fields_at(model, item["loc"][:-1]))
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {dotted!r}; {hint}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> dict[str, Any]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            model = field.annotation
    return dict(model.model_fields)
