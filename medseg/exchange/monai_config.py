"""The configuration of a MONAI bundle, read as data: references are followed, nothing is ever run.

MONAI gives every string that starts with ``$`` to Python. Here such an expression is parsed, and worked out
only if it is made of the few forms that describe a value: literals, arithmetic, comparisons, choices, a
reference, and the names in ``_NAMES`` and ``_FUNCTIONS``. Any other one is an error where its value is
needed, and is not looked at elsewhere.

Source of the syntax: MONAI ``bundle/config_parser.py`` and ``bundle/reference_resolver.py``.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from medseg.errors import BundleError

# A reference is "@" and a path of names: @network_def::in_channels, with # in older bundles.
_REFERENCE = re.compile(r"@\w+(?:(?:::|#)\w+)*")
# Configurations of the Model Zoo have some hundred values, nested less than ten deep, and expressions of one
# line; more is an attack with references to references.
_MOST_VALUES = 20_000
_DEEPEST = 40
_LONGEST_EXPRESSION = 1_000
_LONGEST_VALUE = 10_000
_LARGEST_NUMBER = 2**53
_DTYPES = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")

Lookup = Callable[[str], Any]


@dataclass(frozen=True)
class Component:
    """An object that the configuration asks for: the class by name, and its arguments, not yet resolved."""

    key: str
    target: str
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the class without its module."""
        return self.target.rpartition(".")[2]


@dataclass
class MonaiConfig:
    """One configuration; keys are paths such as ``network_def::channels::0``.

    Attributes
    ----------
    data : the parsed file
    where : names it in errors
    values : how many values may still be resolved
    """

    data: Mapping[str, Any]
    where: str
    values: int = field(default=_MOST_VALUES)

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def value(self, node: Any, key: str) -> Any:
        """Return `node`, which stands at `key`, with everything in it resolved to plain data.

        Raises
        ------
        BundleError
            It needs code to be run, refers to nothing or to itself, or is too large.
        """
        return self._resolve(node, key, (key,), deep=True)

    def outline(self, key: str) -> Any:
        """Return what stands at `key`; a reference or expression becomes what it names, contents stay raw."""
        return self._resolve(self._find(key, key), key, (key,), deep=False)

    def named(self, node: Any, key: str) -> Any:
        """Return what a reference names, contents raw."""
        return self._resolve(node, key, (key,), deep=False)

    def component(self, node: Any, key: str) -> Component | None:
        """Return the object that `node` describes, or None where it is disabled.

        Raises
        ------
        BundleError
            It describes none, or in a way that runs code.
        """
        if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
            raise self.fault(f"{key} names no class to build (_target_). Mend it.")
        if self.value(node.get("_disabled_", False), f"{key}::_disabled_") in (True, "true", "True"):
            return None
        hidden = {name for name in node if str(name).startswith("_")} - {"_target_", "_disabled_", "_desc_"}
        if node.get("_mode_") == "default":
            hidden.discard("_mode_")
        if hidden:
            raise self.fault(
                f"{key} has {min(hidden)!r}, which makes MONAI run more than the class. medseg "
                "does not run code from bundles. Remove it."
            )
        target = str(self.value(node["_target_"], f"{key}::_target_"))
        arguments = {name: value for name, value in node.items() if not str(name).startswith("_")}
        return Component(key, target, arguments)

    def known(self, component: Component, names: Iterable[str], kind: str) -> str:
        """Return the name of a component's class if it is on the list and MONAI's own.

        Raises
        ------
        BundleError
            It is another class, or code of the bundle.
        """
        names = sorted(names)
        if component.name in names and component.target.startswith((component.name, "monai.")):
            return component.name
        own = " It is code of the bundle, which medseg does not run." if "scripts" in component.target else ""
        raise self.fault(
            f"{component.key} asks for the {kind} {component.target[:100]!r}, which medseg does not know."
            f"{own} It knows {', '.join(names)}."
        )

    def chain(self, key: str) -> list[Component]:
        """Return the components of a Compose, or of a plain list; without `key` there are none."""
        node, where = (self.outline(key), key) if key in self else ([], key)
        if isinstance(node, Mapping):
            compose = self.component(node, key)
            if compose is None:
                return []
            self.known(compose, ("Compose",), "chain of transforms")
            if self.value(compose.arguments.get("lazy", False), f"{key}::lazy"):
                raise self.fault(f"{key} is lazy, which medseg does not follow. Set it to false.")
            where = f"{key}::transforms"
            node = self.named(compose.arguments.get("transforms", []), where)
        if not isinstance(node, list):
            raise self.fault(f"{where} is no list of transforms. Mend it.")
        items = [(item, f"{where}::{number}") for number, item in enumerate(node)]
        found = [self.component(self.named(item, place), place) for item, place in items]
        return [component for component in found if component is not None]

    def keys(self, component: Component) -> list[str]:
        """Return the keys that a transform works on."""
        keys = self.value(component.arguments.get("keys"), f"{component.key}::keys")
        return [str(key) for key in keys] if isinstance(keys, list) else [str(keys)]

    def fault(self, text: str) -> BundleError:
        """Return the error for something that is wrong in this configuration."""
        return BundleError(f"{self.where}: {text}")

    def refused(self, key: str, text: str, reason: str = "") -> BundleError:
        """Return the error for an expression that is not only data."""
        shown = text if len(text) <= 100 else text[:97] + "..."
        why = f" ({reason})" if reason else ""
        return self.fault(
            f"{key} is the expression {shown!r}{why}, and medseg does not run code from "
            "bundles. If you trust it, replace it by its value."
        )

    def _resolve(self, node: Any, key: str, trail: tuple[str, ...], deep: bool) -> Any:
        self.values -= 1
        if self.values < 0 or len(trail) > _DEEPEST or key.count("::") > _DEEPEST:
            raise self.fault(f"{key[:80]} is nested too deeply, or too large. Do not trust it.")
        if isinstance(node, str):
            return self._resolve_text(node, key, trail, deep)
        if deep and isinstance(node, Mapping):
            return {name: self._resolve(item, f"{key}::{name}", trail, deep) for name, item in node.items()}
        if deep and isinstance(node, list | tuple):
            return [self._resolve(item, f"{key}::{n}", trail, deep) for n, item in enumerate(node)]
        return node

    def _resolve_text(self, text: str, key: str, trail: tuple[str, ...], deep: bool) -> Any:
        if text.startswith("$"):
            return self._work_out(text, key, lambda reference: self._follow(reference, key, trail, deep))
        if _REFERENCE.fullmatch(text):
            return self._follow(text, key, trail, deep)
        if text.startswith(("@", "%")):
            raise self.fault(
                f"{key} is {text[:80]!r}, a reference to another file or place that medseg "
                "does not follow. Replace it by its value."
            )
        return text

    def _follow(self, reference: str, key: str, trail: tuple[str, ...], deep: bool) -> Any:
        target = reference.removeprefix("@").replace("#", "::")
        if target in trail:
            raise self.fault(f"{key} refers to itself, through {reference}. Mend it.")
        return self._resolve(self._find(target, key), target, (*trail, target), deep)

    def _find(self, target: str, key: str) -> Any:
        node: Any = self.data
        for part in target.split("::"):
            if isinstance(node, Mapping) and part in node:
                node = node[part]
            elif isinstance(node, list) and re.fullmatch(r"\d{1,6}", part) and int(part) < len(node):
                node = node[int(part)]
            else:
                raise self.fault(f"{key} needs {target!r}, which is not there. Add it.")
        return node

    def _work_out(self, text: str, key: str, lookup: Lookup) -> Any:
        references: list[str] = []

        def stand_in(match: re.Match[str]) -> str:
            references.append(match[0])
            return f"_ref_{len(references) - 1}_"

        if len(text) > _LONGEST_EXPRESSION:
            raise self.refused(key, text, "it is too long")
        try:
            tree = ast.parse(_REFERENCE.sub(stand_in, text[1:].strip()), mode="eval")
            return _Evaluation(lookup, references)(tree.body)
        except _RefusedError as error:
            raise self.refused(key, text, str(error)) from error
        except BundleError:
            raise
        except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise self.refused(key, text, f"{type(error).__name__}: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise self.refused(key, text, "it is nested too deeply") from error


class _RefusedError(Exception):
    """An expression has a form that is not on the list."""


def _join(*parts: str) -> str:
    return str(PurePosixPath(*parts))


# Text of a dotted name -> its value. Types of numbers are named as in NumPy.
_NAMES: dict[str, str] = {
    **{f"{module}.{name}": name for module in ("torch", "numpy", "np") for name in _DTYPES},
    "torch.float": "float32",
    "monai.utils.CommonKeys.IMAGE": "image",
    "monai.utils.CommonKeys.LABEL": "label",
    "monai.utils.CommonKeys.PRED": "pred",
}
_FUNCTIONS: dict[str, Any] = {
    **{f.__name__: f for f in (len, int, float, bool, list, tuple, abs, min, max)},
    "os.path.join": _join,
}
_BINARY: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Any] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Evaluation:
    """The value of a parsed expression; each form that is understood has a method of its name."""

    def __init__(self, lookup: Lookup, references: list[str]) -> None:
        self.lookup, self.references = lookup, references

    def __call__(self, node: ast.expr) -> Any:
        form = getattr(self, f"_{type(node).__name__.lower()}", None)
        if form is None:
            raise _RefusedError(f"{type(node).__name__} is not understood")
        value = form(node)
        if isinstance(value, str | list | tuple | dict) and len(value) > _LONGEST_VALUE:
            raise _RefusedError("its value is too long")
        if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            raise _RefusedError("its value is too large")
        return value

    def _constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, str) and "_ref_" in node.value:
            raise _RefusedError("a reference in quotes")
        if not isinstance(node.value, str | int | float | None):
            raise _RefusedError(f"{type(node.value).__name__} is not understood")
        return node.value

    def _name(self, node: ast.Name) -> Any:
        stand_in = re.fullmatch(r"_ref_(\d{1,3})_", node.id)
        if stand_in is None or int(stand_in[1]) >= len(self.references):
            raise _RefusedError(f"{node.id} is not understood")
        return self.lookup(self.references[int(stand_in[1])])

    def _attribute(self, node: ast.Attribute) -> Any:
        name = ast.unparse(node)
        if name not in _NAMES:
            raise _RefusedError(f"{name} is not understood")
        return _NAMES[name]

    def _list(self, node: ast.List | ast.Tuple) -> Any:
        return [self(item) for item in node.elts]

    _tuple = _list

    def _dict(self, node: ast.Dict) -> Any:
        if any(key is None for key in node.keys):
            raise _RefusedError("** is not understood")
        pairs = zip(node.keys, node.values, strict=True)
        return {self(key): self(value) for key, value in pairs if key is not None}

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        return self._operator(_UNARY, node.op)(self(node.operand))

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self(node.left), self(node.right)
        texts = isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)
        if texts and not isinstance(node.op, ast.Add):
            raise _RefusedError("only numbers are calculated with")  # "%99999999d" and [0] * 10**9 are not
        return self._operator(_BINARY, node.op)(left, right)

    def _boolop(self, node: ast.BoolOp) -> Any:
        value: Any = None
        for part in node.values:
            value = self(part)
            if bool(value) != isinstance(node.op, ast.And):
                break
        return value

    def _compare(self, node: ast.Compare) -> Any:
        if len(node.ops) != 1:
            raise _RefusedError("a chain of comparisons")
        return self._operator(_COMPARE, node.ops[0])(self(node.left), self(node.comparators[0]))

    def _ifexp(self, node: ast.IfExp) -> Any:
        return self(node.body) if self(node.test) else self(node.orelse)

    def _subscript(self, node: ast.Subscript) -> Any:
        return self(node.value)[self(node.slice)]

    def _call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name not in _FUNCTIONS or node.keywords:
            raise _RefusedError(f"{name}(...) is not understood")
        return _FUNCTIONS[name](*(self(argument) for argument in node.args))

    def _operator(self, known: Mapping[Any, Any], wanted: Any) -> Any:
        if type(wanted) not in known:
            raise _RefusedError(f"{type(wanted).__name__} is not understood")
        return known[type(wanted)]


def read_painting(text: str) -> tuple[tuple[int, int], ...] | None:
    """Return what a lambda of nested ``torch.where`` paints, first choice first, or None where it is another.

    >>> read_painting("$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, 0))")
    ((2, 4), (0, 1))
    """
    try:
        node: ast.expr = ast.parse(text.removeprefix("$").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(node, ast.Lambda) or len(node.args.args) != 1:
        return None
    tensor = node.args.args[0].arg
    test = re.compile(rf"{re.escape(tensor)}\[\[?(\d{{1,3}})\]?\] > 0")
    painted = []
    node = node.body
    while isinstance(node, ast.Call):
        match = test.fullmatch(ast.unparse(node.args[0])) if len(node.args) == 3 else None
        value = node.args[1] if match else None
        if ast.unparse(node.func) != "torch.where" or match is None or not isinstance(value, ast.Constant):
            return None
        if type(value.value) is not int or not 0 < value.value < 256:
            return None
        painted.append((int(match[1]), value.value))
        node = node.args[2]
    ends = isinstance(node, ast.Constant) and node.value == 0
    return tuple(painted) if painted and ends else None
