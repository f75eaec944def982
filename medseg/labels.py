"""What the integers of a label map mean: classes, or overlapping regions, and the ignore label."""

import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from medseg.config import Config
from medseg.errors import LabelError
from medseg.types import Array

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
