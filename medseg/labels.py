"""What the integers of a label map mean: classes, overlapping regions, things and stuff, what to ignore."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from medseg.config import Config, read_mapping
from medseg.errors import ConfigError, LabelError
from medseg.types import Array, PathLike

LabelValue = int | tuple[int, ...]

# A lone letter with a digit is no side: vertebrae_L1 is lumbar.
_SIDE = re.compile(
    r"(?<![a-z])(left|right|links|rechts)(?![a-z])|(?<![a-z0-9])[lr](?![a-z0-9])", re.IGNORECASE
)


class LabelSet(Config):
    """Names and values of a dataset's labels, as in nnU-Net's ``dataset.json``.

    Attributes
    ----------
    entries : mapping of name to value or values
        ``background`` is 0. A list of several values makes a region; then every entry is one.
        An entry named ``ignore`` is the largest value plus one: voxels that were not annotated.
    regions_class_order : tuple of int, optional
        The label that is painted for each region, later ones over earlier ones.
    """

    entries: dict[str, LabelValue]
    regions_class_order: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, labels: Mapping[str, Any], regions_class_order: Any = None) -> Self:
        """Build from the ``labels`` of a ``dataset.json`` (either direction of the mapping).

        Raises
        ------
        LabelError
            Background is not 0, values are not consecutive, or regions and their order disagree.
        """
        if all(re.fullmatch(r"\d+", str(key)) for key in labels):  # MSD writes {"1": "liver"}
            labels = {str(name): int(value) for value, name in labels.items()}
        entries = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in labels.items()}
        order = None if regions_class_order is None else tuple(regions_class_order)
        try:
            return cls(entries=entries, regions_class_order=order)
        except ValueError as error:
            details: list[Any] = getattr(error, "errors", list)()
            reason = "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in details) or str(
                error
            )
            raise LabelError(f"labels: {reason}") from error

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.entries.get("background") != 0:
            raise ValueError("'background' must be present and 0. Add it to the labels.")
        if "ignore" in self.entries:
            others = [v for name, value in self.entries.items() if name != "ignore" for v in _flat(value)]
            if self.entries["ignore"] != max(others) + 1:
                raise ValueError(f"'ignore' must be the largest other label plus one ({max(others) + 1}).")
        values = self.values
        if values != tuple(range(len(values))):
            raise ValueError(f"label values must be consecutive from 0, found {list(values)}. Renumber them.")
        order = self.regions_class_order
        if self.has_regions and (order is None or len(order) != len(self.foreground)):
            raise ValueError(
                f"'regions_class_order' must list one label for each of the {len(self.foreground)} regions."
            )
        return self

    @property
    def values(self) -> tuple[int, ...]:
        """All integers that may occur in a label map, ascending (ignore included)."""
        return tuple(sorted({v for value in self.entries.values() for v in _flat(value)}))

    @property
    def has_regions(self) -> bool:
        """Whether any entry joins several values (outputs then overlap and use a sigmoid)."""
        return any(isinstance(value, tuple) and len(value) > 1 for value in self.entries.values())

    @property
    def ignore(self) -> int | None:
        """Value of the ignore label, or None."""
        value = self.entries.get("ignore")
        return value if isinstance(value, int) else None

    @property
    def foreground(self) -> dict[str, LabelValue]:
        """Entries without background and ignore, in file order."""
        return {n: v for n, v in self.entries.items() if n not in ("background", "ignore")}

    @property
    def foreground_values(self) -> tuple[int, ...]:
        """Integers of a label map without background and ignore; the one-hot channels of a cascade."""
        return tuple(value for value in self.values if value not in (0, self.ignore))

    @property
    def n_outputs(self) -> int:
        """Channels of the network: classes with background, or regions without."""
        return len(self.foreground) + (0 if self.has_regions else 1)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """uint8 for fewer than 255 foreground labels, else uint16."""
        return np.uint8 if max(self.values) < 255 else np.uint16

    @property
    def sided(self) -> tuple[str, ...]:
        """Names that say left or right, so that a mirrored image would be mislabelled."""
        return tuple(name for name in self.foreground if _SIDE.search(name.replace("_", " ")))

    def mask(self, label_map: Array, name: str) -> Array:
        """Return the boolean mask of one entry."""
        return np.isin(label_map, _flat(self.entries[name]))


def _flat(value: LabelValue) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


class PanopticLabels(Config):
    """Classes of a panoptic map, in which every voxel has a class, and voxels of things an object besides.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019 (arXiv 1801.00868), section 3.1.

    Attributes
    ----------
    labels : mapping of name to value
        Values above 0, with or without gaps. ``background``, if it is named, is 0. An entry named ``ignore``
        is void: voxels that were not annotated, in which nothing is judged.
    things : tuple of str
        Classes whose objects are told apart and counted, such as cells and lesions.
    stuff : tuple of str
        Classes that are areas, such as organs and tissue; all others, if not given.
    divisor : int
        A map of both in one number holds ``value * divisor + object``, with object 0 for stuff.

    Examples
    --------
    >>> classes = PanopticLabels(labels={"liver": 1, "lesion": 2}, things=("lesion",))
    >>> classes.stuff, classes.thing_values
    (('liver',), (2,))
    >>> classes.pack(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 2])).tolist()
    [0, 1000, 2001, 2002]
    """

    labels: dict[str, int]
    things: tuple[str, ...]
    stuff: tuple[str, ...] = ()
    divisor: int = Field(1000, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Turn ``{"1": "liver"}`` round, and take the classes that nobody names for stuff."""
        if not isinstance(values, Mapping) or not isinstance(values.get("labels"), Mapping):
            return values
        labels = values["labels"]
        if labels and all(re.fullmatch(r"\d+", str(key)) for key in labels):
            labels = {str(name): int(value) for value, name in labels.items()}
        if values.get("stuff") is None and isinstance(values.get("things"), list | tuple):
            named = {*values["things"], "background", "ignore"}
            values = {**values, "stuff": tuple(name for name in labels if name not in named)}
        return {**values, "labels": labels}

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        both = sorted(set(self.things) & set(self.stuff))
        if both:
            raise ValueError(f"{both[0]!r} is a thing and stuff. Name it in one of the two.")
        for kind, names in (("things", self.things), ("stuff", self.stuff)):
            odd = [name for name in names if name not in self.labels or name in ("background", "ignore")]
            if odd:
                known = ", ".join(name for name in self.labels if name not in ("background", "ignore"))
                raise ValueError(f"{kind} names {odd[0]!r}, which is no class of 'labels' ({known}).")
            if len(set(names)) < len(names):
                raise ValueError(f"{kind} names a class twice. Name it once.")
        for name, value in self.labels.items():
            if name == "background" and value != 0:
                raise ValueError(f"'background' is {value}; expected 0. Renumber the classes.")
            if name != "background" and value < 1:
                raise ValueError(f"{name!r} is {value}; expected 1 and above, 0 is background.")
            if name not in (*self.things, *self.stuff, "background", "ignore"):
                raise ValueError(f"{name!r} is neither thing nor stuff. Name it in one of the two.")
        if len(set(self.labels.values())) < len(self.labels):
            raise ValueError("two classes have one value. Give each a value of its own.")
        return self

    @property
    def names(self) -> dict[int, str]:
        """Names of things and stuff by value, ascending."""
        kept = {self.labels[name]: name for name in (*self.things, *self.stuff)}
        return dict(sorted(kept.items()))

    @property
    def thing_values(self) -> tuple[int, ...]:
        """Values of the things, ascending."""
        return tuple(sorted(self.labels[name] for name in self.things))

    @property
    def stuff_values(self) -> tuple[int, ...]:
        """Values of the stuff, ascending."""
        return tuple(sorted(self.labels[name] for name in self.stuff))

    @property
    def ignore(self) -> int | None:
        """Value of the voxels that were not annotated, or None."""
        return self.labels.get("ignore")

    def label_set(self) -> LabelSet:
        """Return the classes as a network learns them.

        Raises
        ------
        LabelError
            Values have gaps.
        """
        return LabelSet.parse({"background": 0, **dict(sorted(self.labels.items(), key=lambda e: e[1]))})

    def for_objects(self, count: int) -> Self:
        """Return the same classes with a divisor that leaves room for the numbers of so many objects.

        Raises
        ------
        LabelError
            The numbers do not fit in 32 bits.
        """
        divisor = self.divisor
        while count >= divisor:
            divisor *= 10
        highest = max(self.labels.values(), default=0)
        if highest * divisor + count > np.iinfo(np.int32).max:
            raise LabelError(
                f"classes up to {highest} and {count} objects do not fit in one map of 32 bits. Renumber the "
                "classes from 1."
            )
        return self if divisor == self.divisor else self.replace(divisor=divisor)

    def pack(self, semantic: Array, objects: Array) -> Array:
        """Return ``value * divisor + object``, int32, of a map of classes and one of objects (0 for none)."""
        return np.asarray(semantic.astype(np.int32) * self.divisor + objects.astype(np.int32))

    def unpack(self, packed: Array) -> tuple[Array, Array]:
        """Return the classes and the objects of a packed map, int32.

        Raises
        ------
        LabelError
            It holds a value that :meth:`pack` does not make of these classes.
        """
        wide = packed.astype(np.int64, copy=False)
        semantic, objects = (part.astype(np.int32) for part in np.divmod(wide, self.divisor))
        known = np.array(sorted({0, *self.labels.values()}))
        odd = ~np.isin(semantic, known)
        countable = np.isin(semantic, self.thing_values)
        odd |= countable != (objects > 0)
        if odd.any():
            raise LabelError(
                f"panoptic map holds {int(wide[odd][0])}, which with divisor {self.divisor} is no thing with "
                "its number and no stuff. Give the classes that belong to this map."
            )
        return semantic, objects


def read_panoptic_labels(path: PathLike) -> PanopticLabels:
    """Read classes from YAML or JSON: ``classes.json`` of ``medseg panoptic``, or a ``dataset.json``.

    Of a file called ``dataset`` only ``labels``, ``things``, ``stuff`` and ``divisor`` are read; in another
    one, a further key is an error.

    Raises
    ------
    ConfigError
        It does not say what is a thing, or contradicts itself.
    ReadError
        There is no such file.
    """
    content = read_mapping(path)
    if "things" not in content or "labels" not in content:
        missing = "things" if "labels" in content else "labels"
        raise ConfigError(
            f"{path}: no '{missing}'. Expected the value of each class, and which are counted, such as "
            "labels: {liver: 1, lesion: 2} and things: [lesion]."
        )
    if Path(path).stem == "dataset":
        content = {key: content[key] for key in PanopticLabels.model_fields if key in content}
    return PanopticLabels.from_dict(content, str(path))
