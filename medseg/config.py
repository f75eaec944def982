"""Settings: frozen pydantic models that refuse unknown keys, YAML or JSON on disk, dotted overrides."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ConfigError, ReadError
from medseg.files import write_text
from medseg.types import PathLike

# A fingerprint of 10,000 cases has 2 MB; what is larger than this is not a file of settings.
LARGEST_FILE = 64 * 2**20
# How much of a wrong value, and how many wrong values, an error shows.
SHOWN_CHARACTERS = 60
SHOWN_PROBLEMS = 3


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which pydantic does not name in public


class _Spoken(ModelMetaclass):
    """Makes ``Settings(...)`` fail as `Config.from_dict` does, in words and not in pydantic's.

    An ``__init__`` of `Config` would also be called for every model inside another, and lose the place.
    """

    if not TYPE_CHECKING:

        def __call__(self, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise self.error(_explain(error, self, self.__name__)) from error


class Config(BaseModel, metaclass=_Spoken):
    """Base of all settings: immutable, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    error: ClassVar[type[ConfigError]] = ConfigError

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Validate plain data.

        Raises
        ------
        ConfigError
            A key is unknown or a value is wrong; the message names the first few.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise cls.error(_explain(error, cls, where or cls.__name__)) from error

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

    def with_overrides(self, overrides: Sequence[str], where: str = "") -> Self:
        """Return a validated copy with dotted overrides applied; a group that does not exist is an error."""
        values = self.to_dict()
        for text in overrides:
            _check_groups(values, text)
        return self.from_dict(override(values, overrides), where)


def read_mapping(path: PathLike) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises
    ------
    ReadError
        The file is missing, unreadable, or far too large.
    ConfigError
        It does not parse, has YAML anchors, or holds something else.
    """
    return parse_mapping(read_text(path), str(path))


def read_text(path: PathLike) -> str:
    """Read a small UTF-8 text file from outside, such as settings.

    Raises
    ------
    ReadError
        The file is missing, unreadable, not text, or larger than 64 MB.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ReadError(f"{path}: is a folder; expected a file. Give the path of a file.")
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)  # bounded: a device has no size and no end
        if len(content) > LARGEST_FILE:
            limit = LARGEST_FILE // 2**20
            raise ReadError(f"{path}: is larger than {limit} MB, so it holds no settings. Check the path.")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ReadError(f"{path}: no such file. Check the path.") from error
    except PermissionError as error:
        raise ReadError(f"{path}: may not be read. Change its permissions.") from error
    except UnicodeDecodeError as error:
        raise ReadError(f"{path}: is not UTF-8 text. Check that it is the right file.") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """Parse YAML or JSON whose top level is a mapping; `where` names it in errors.

    Raises
    ------
    ConfigError
        The text does not parse, has YAML anchors, or holds something else.
    """
    try:
        data = _parse(text)
    except RecursionError as error:
        raise ConfigError(f"{where}: is nested too deeply. Mend the file.") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = _short(" ".join(str(error).split()), 3 * SHOWN_CHARACTERS)
        raise ConfigError(f"{where}: not readable as YAML or JSON ({reason}). Mend the file.") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: expected a mapping at the top level, found {_kind(data)}. "
            "Check that it is the right file."
        )
    return data


def _kind(data: Any) -> str:
    """Return what YAML calls a value that is no mapping."""
    if data is None:
        return "nothing"
    if isinstance(data, list):
        return "a list"
    return "text" if isinstance(data, str) else f"one value ({_shown(data)})"


def _parse(text: str) -> Any:
    # JSON by a JSON parser: YAML takes its 1e-05 for a string.
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_once)
        except ValueError:
            pass  # YAML in flow style, or wrong: the YAML parser says where
    _refuse_anchors(text)
    return yaml.load(text, Loader=_FastSafeLoader)


def _refuse_anchors(text: str) -> None:
    """Refuse ``&name``: ten lines of aliases to aliases stand for more than any memory holds."""
    if "&" not in text:
        return
    for event in yaml.parse(text, Loader=_FastSafeLoader):
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            raise ValueError(f"YAML anchors and aliases such as &{_short(anchor)} are not accepted")


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
        node[last] = _parse_value(text, value)
    return dict(result)


def _parse_value(text: str, value: str) -> Any:
    try:
        _refuse_anchors(value)
        return yaml.load(value, Loader=_FastSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {_short(text)!r}: its value is not valid YAML. Mend it.") from error


def _check_groups(values: Mapping[str, Any], text: str) -> None:
    """Refuse an override whose groups do not all exist in complete `values`."""
    node: Any = values
    for group in text.partition("=")[0].split(".")[:-1]:
        if not isinstance(node, Mapping):
            return  # `override` says that this is a value
        if group not in node:
            raise ConfigError(f"override {text!r}: there is no {group!r}; {_nearest(group, list(node))}")
        node = node[group]


def dump_yaml(data: Any) -> str:
    """Return YAML with short lists on one line and keys in their given order."""
    return yaml.dump(data, Dumper=_ReadableDumper, sort_keys=False, width=100, allow_unicode=True)


_AnyLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _FastSafeLoader(_AnyLoader):  # type: ignore[misc]
    """A loader that refuses a key that is there twice: YAML's own keeps the last and drops the others."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: the key {_short(key.value)!r} is there twice")
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")  # the YAML parser says which
    return found


class _ReadableDumper(yaml.SafeDumper):
    """Block style for mappings, flow style for lists of plain values."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = all(not isinstance(item, dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    found = error.errors()
    # A list whose items are wrong is too short besides: that is no news.
    items = [
        item
        for item in found
        if item["type"] != "too_short"
        or not any(len(o["loc"]) > len(item["loc"]) == len(_common(o["loc"], item["loc"])) for o in found)
    ]
    missing = [str(item["loc"][0]) for item in items if item["type"] == "missing" and len(item["loc"]) == 1]
    strange = any(item["type"] == "extra_forbidden" and len(item["loc"]) == 1 for item in items)
    if strange and len(missing) > 1:  # another file altogether: its other keys are of no interest
        return f"{where} is not {_noun(model)}: {_and_more(missing, ', ')} missing. Check the path."
    return f"{where}: {_and_more([_explain_one(item, model) for item in items], '; ')}"


def _common(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Return what two places begin with."""
    return [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]


def _and_more(texts: Sequence[str], separator: str) -> str:
    """Join the first few and count the rest; lists of names get their verb."""
    shown, rest = separator.join(texts[:SHOWN_PROBLEMS]), len(texts) - SHOWN_PROBLEMS
    joined = f"{shown} and {rest} more" if rest > 0 else shown
    return f"{joined} are" if separator == ", " else joined


def _noun(model: type[BaseModel]) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__).lower()
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# In the words of YAML instead of Python's.
_EXPECTED = {
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "too_short": "expected at least {min_length} in this list",
    "too_long": "expected at most {max_length} in this list",
    "literal_error": "expected {expected}",
    "finite_number": "expected a finite number",
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    "string_type": "expected text",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
}


def _expected(item: Any) -> str:
    known = _EXPECTED.get(item["type"])
    if known is None:
        return str(item["msg"]).replace("Input should be", "expected")
    return known.format(**item.get("ctx", {}))


def _shown(value: Any) -> str:
    """Return a value as YAML writes those that Python writes otherwise."""
    words = {None: "nothing", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else _short(repr(value))


def _explain_one(item: Any, model: type[BaseModel]) -> str:
    dotted = _short(".".join(str(part) for part in item["loc"]), 2 * SHOWN_CHARACTERS)
    if item["type"] == "extra_forbidden":
        known = list(_fields_at(model, item["loc"][:-1]))
        return f"unknown key {dotted!r}; {_nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{dotted} is missing"
    if item["type"] == "value_error":  # a validator of ours: it names the value itself
        text = str(item["msg"]).removeprefix("Value error, ")
    else:
        text = f"{_expected(item)} (got {_shown(item['input'])})"
    return f"{dotted}: {text}" if dotted else text


def _short(text: str, most: int = SHOWN_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> dict[str, Any]:
    """Return the fields of the model at a place inside `model`, through mappings, lists and options."""
    annotation: Any = model
    for part in location:
        annotation = _step(_bare(annotation), part)
    return dict(getattr(_bare(annotation), "model_fields", {}))


def _step(annotation: Any, part: Any) -> Any:
    """Return the type one key or index further in."""
    fields = getattr(annotation, "model_fields", None)
    if fields is not None:
        return fields[part].annotation if part in fields else annotation
    inside = get_args(annotation)
    return inside[1 if get_origin(annotation) is dict else 0] if inside else annotation


def _bare(annotation: Any) -> Any:
    """Remove ``Annotated`` and ``| None``."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _bare(options[0])
    return annotation
