"""How a MONAI bundle's postprocessing turns the network's outputs into one label map.

MONAI runs these steps on tensors of all classes. Here they are read once into a :class:`Decision`, which
`medseg.infer.monai` carries out without ever holding all classes on the source grid.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medseg.exchange.monai_config import Component, MonaiConfig, read_painting
from medseg.labels import LabelSet

_SAVING = ("SaveImaged", "EnsureTyped", "ToTensord", "CastToTyped", "DeleteItemsd", "SelectItemsd")
"""What happens to a prediction that medseg writes itself."""
# Where data is and what is written down about it: medseg decides that.
_IGNORED = {
    *("allow_missing_keys", "device", "meta_key_postfix", "meta_keys", "orig_meta_keys", "to_tensor"),
}


@dataclass(frozen=True)
class Decision:
    """How the network's output becomes labels on the source grid.

    Attributes
    ----------
    activation : of the outputs, or None where they are used as they are
    activate_last : after the way back to the source grid, not before it
    decide_first : on the network's grid, so that labels travel back (nearest); else numbers do
    nearest : numbers travel back by nearest neighbour; else as the bundle's transforms interpolate
    threshold : of each output; None where the largest output wins
    painting : (output, label) in the order they are painted, later over earlier; empty without `threshold`
    largest_before, largest_after : groups of labels of which only the largest component stays, on the
        network's grid and on the source grid
    """

    activation: Literal["softmax", "sigmoid"] | None = None
    activate_last: bool = False
    decide_first: bool = True
    nearest: bool = False
    threshold: float | None = None
    painting: tuple[tuple[int, int], ...] = ()
    largest_before: tuple[tuple[int, ...], ...] = ()
    largest_after: tuple[tuple[int, ...], ...] = ()

    @property
    def of_logits(self) -> bool:
        """Whether the largest output wins where it was computed: an activation changes nothing about it."""
        return self.decide_first and self.threshold is None

    @property
    def probable(self) -> Literal["softmax", "sigmoid"] | None:
        """What makes probabilities of the outputs, also where the bundle decides without."""
        return self.activation or ("softmax" if self.threshold is None else None)


@dataclass(frozen=True)
class _Largest:
    """One cleaning step: labels (none: all), each by itself or as one object, and when."""

    labels: tuple[int, ...]
    independent: bool
    after: bool

    def groups(self, known: LabelSet) -> list[tuple[int, ...]]:
        """Return the objects of which one component stays."""
        labels = self.labels or known.foreground_values
        return [(label,) for label in labels] if self.independent else [labels]


class _Reader:
    """Walks through the postprocessing and notes what each step means for the label map."""

    def __init__(self, config: MonaiConfig) -> None:
        self.config = config
        self.activation: Literal["softmax", "sigmoid"] | None = None
        self.activate_last = self.inverted = self.decided = self.nearest = self.decide_first = False
        self.threshold: float | None = None
        self.painted: tuple[tuple[int, int], ...] | None = None
        self.largest: list[_Largest] = []
        self.steps: dict[str, Callable[[Component, int], None]] = {
            "Activationsd": self.activate,
            "Invertd": self.invert,
            "AsDiscreted": self.decide,
            "KeepLargestConnectedComponentd": self.keep_largest,
            "Lambdad": self.paint,
        }

    def walk(self, components: Iterable[Component]) -> None:
        """Understand the steps for ``pred``; those for other keys do not touch the label map."""
        for component in components:
            name = self.config.known(component, (*self.steps, *_SAVING), "postprocessing")
            keys = self.config.keys(component)
            if name in self.steps and "pred" in keys:
                self.steps[name](component, keys.index("pred"))

    def argument(self, component: Component, name: str, index: int, default: Any = None) -> Any:
        """Return an argument; where there is one for each key, that of ``pred``."""
        value = self.config.value(component.arguments.get(name, default), f"{component.key}::{name}")
        return value[index] if isinstance(value, list) and index < len(value) else value

    def only(self, component: Component, *names: str) -> None:
        """Refuse arguments that change the result in a way that is not understood."""
        known = {"keys", *names, *_IGNORED}
        for name in component.arguments:
            if name not in known and component.arguments[name] is not None:
                self.refuse(component, f"has {name!r}, which medseg does not follow. Remove it")

    def refuse(self, component: Component, reason: str) -> None:
        """Raise the error for a step."""
        raise self.config.fault(f"{component.key} ({component.name}) {reason}.")

    def activate(self, component: Component, index: int) -> None:
        self.only(component, "softmax", "sigmoid")
        names: tuple[Literal["softmax"], Literal["sigmoid"]] = ("softmax", "sigmoid")
        wanted = [name for name in names if self.argument(component, name, index, False)]
        if self.decided or len(wanted) > 1 or (wanted and self.activation):
            self.refuse(component, "comes after the decision, or twice. Mend the order")
        if wanted:
            self.activation, self.activate_last = wanted[0], self.inverted

    def invert(self, component: Component, index: int) -> None:
        self.only(component, "transform", "orig_keys", "nearest_interp")
        node = self.config.named(component.arguments.get("transform"), f"{component.key}::transform")
        if node is not self.config.outline("preprocessing"):
            self.refuse(component, "does not undo @preprocessing. Mend its transform")
        if self.inverted:
            self.refuse(component, "undoes the preprocessing a second time. Remove it")
        self.inverted = True
        self.nearest = self.argument(component, "nearest_interp", index, True) is True

    def decide(self, component: Component, index: int) -> None:
        self.only(component, "argmax", "threshold", "to_onehot")
        argmax = bool(self.argument(component, "argmax", index, False))
        threshold = self.argument(component, "threshold", index)
        if self.decided or argmax == (threshold is not None):
            self.refuse(component, "needs either argmax or a threshold, once. Mend it")
        if threshold is not None and type(threshold) not in (int, float):
            self.refuse(component, "has a threshold that is no number. Mend it")
        self.threshold = None if argmax else float(threshold)
        self.decided, self.decide_first = True, not self.inverted

    def keep_largest(self, component: Component, index: int) -> None:
        self.only(component, "applied_labels", "is_onehot", "independent", "connectivity", "num_components")
        place = f"{component.key}::applied_labels"
        labels = self.config.value(component.arguments.get("applied_labels"), place)
        labels = labels or [] if isinstance(labels, list | None) else [labels]
        if not self.decided or not all(type(label) is int for label in labels):
            self.refuse(component, "needs a decision before it, and labels that are numbers. Mend it")
        components = self.argument(component, "num_components", index, 1)
        if components != 1 or self.argument(component, "connectivity", index) not in (None, 3):
            self.refuse(component, "is not one component of 26 neighbours, as medseg has it. Mend it")
        independent = self.argument(component, "independent", index, True) is True
        self.largest.append(_Largest(tuple(labels), independent, self.inverted))

    def paint(self, component: Component, index: int) -> None:
        func = component.arguments.get("func")
        self.painted = read_painting(func) if isinstance(func, str) else None
        if self.painted is None:
            raise self.config.refused(f"{component.key}::func", str(func))
        if self.threshold is None:
            self.refuse(component, "paints what no threshold has decided. Mend the order")


def read_decision(config: MonaiConfig, names: list[str]) -> tuple[Decision, LabelSet]:
    """Return how outputs, which are named, become labels, and what these mean.

    Raises
    ------
    BundleError
        A step is not known, is code, or stands where it has no meaning.
    """
    steps = _Reader(config)
    steps.walk(config.chain("postprocessing"))
    if not steps.decided:  # as a reader of the saved probabilities would decide
        steps.threshold = 0.5 if steps.activation == "sigmoid" else None
        steps.decide_first = not steps.inverted
    _check_order(config, steps, len(names))
    if steps.threshold is None:
        painting: tuple[tuple[int, int], ...] = ()
        labels = LabelSet.parse({"background": 0, **{name: k for k, name in enumerate(names[1:], 1)}})
    else:
        painting = _painting(names, steps.painted, config)
        labels = _labels(names, painting)
    if any(label not in labels.values for step in steps.largest for label in step.labels):
        raise config.fault("postprocessing cleans a label that there is not. Mend it.")
    groups = [(group, step.after) for step in steps.largest for group in step.groups(labels)]
    decision = Decision(
        activation=steps.activation,
        activate_last=steps.activate_last,
        decide_first=steps.decide_first,
        nearest=steps.nearest,
        threshold=steps.threshold,
        painting=painting,
        largest_before=tuple(group for group, after in groups if not after),
        largest_after=tuple(group for group, after in groups if after),
    )
    return decision, labels


def _check_order(config: MonaiConfig, steps: _Reader, outputs: int) -> None:
    """Refuse what would give no label map, or another one than MONAI's."""
    if steps.threshold is None and outputs == 1:
        raise config.fault(
            "the network has one output, and postprocessing no AsDiscreted with a threshold, so every voxel "
            "would be background. Mend it."
        )
    if steps.threshold is not None and steps.activation == "softmax" and steps.activate_last:
        raise config.fault("postprocessing thresholds a softmax on the source grid. Use argmax.")
    if steps.threshold is not None and outputs > 1 and steps.largest:
        raise config.fault(
            "postprocessing keeps components of overlapping outputs, which have no numbers in one label map. "
            "Remove that step."
        )


# A tumour's parts in one another, from the outside to the inside (BraTS).
_NESTED = (r"\bwhole|^wt$", r"\bcore|^tc$", r"\benhanc|^et$")


def _depths(names: Sequence[str]) -> list[int] | None:
    """Return how deep each output lies in the others where all are BraTS regions, else None."""
    found = [[bool(re.search(p, name, re.IGNORECASE)) for p in _NESTED] for name in names]
    depths = [row.index(True) if sum(row) == 1 else -1 for row in found]
    return depths if -1 not in depths and len(set(depths)) == len(depths) > 1 else None


def _painting(
    names: list[str], chosen: tuple[tuple[int, int], ...] | None, config: MonaiConfig
) -> tuple[tuple[int, int], ...]:
    """Return (output, label), later over earlier.

    The bundle's own order counts where it has one; its labels are renumbered without gaps (BraTS 1, 2, 4
    become 1, 2, 3). Else the inner of nested regions is painted over the outer, and other outputs in their
    order. An output that is named background is not painted.
    """
    if chosen is not None:
        if len({output for output, _ in chosen}) < len(chosen) or max(chosen)[0] >= len(names):
            raise config.fault("postprocessing paints outputs that there are not. Mend it.")
        values = sorted({value for _, value in chosen})
        return tuple((output, values.index(value) + 1) for output, value in reversed(chosen))
    first = 1 if len(names) > 1 and names[0].lower() == "background" else 0
    order = list(range(first, len(names)))
    depths = _depths(names[first:])
    if depths is not None:
        order.sort(key=lambda output: depths[output - first])
    return tuple((output, label) for label, output in enumerate(order, 1))


def _labels(names: list[str], painting: tuple[tuple[int, int], ...]) -> LabelSet:
    """Return the label set of painted outputs; nested ones are regions."""
    painted = [names[output] if names[output] != "background" else "foreground" for output, _ in painting]
    values = [value for _, value in painting]
    depths = _depths(painted)
    if depths is None or depths != sorted(depths):
        return LabelSet.parse({"background": 0, **dict(zip(painted, values, strict=True))})
    regions = {name: values[number:] for number, name in enumerate(painted)}
    entries = {name: inner if len(inner) > 1 else inner[0] for name, inner in regions.items()}
    return LabelSet.parse({"background": 0, **entries}, values)
