"""What is wrong, or worth knowing, about a dataset: one line each, with the remedy."""

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One observation.

    Attributes
    ----------
    severity : "error", "warning" or "info"
        Training refuses an error; a warning may cost accuracy; an info is a decision taken for you.
    case : str
        Name of the case; empty for the dataset as a whole.
    code : str
        Stable short name, such as ``missing_label``.
    message, remedy : str
        What is wrong, and what to do about it.
    """

    severity: Severity
    case: str
    code: str
    message: str
    remedy: str

    def to_dict(self) -> dict[str, str]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"{self.case}: " if self.case else ""
        return f"{where}{self.message}. {self.remedy}"
