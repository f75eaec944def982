"""Point at an object in a volume and get it whole: prompts, slices, propagation, sessions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.prompt.propagators import DEFAULT, PROPAGATORS, propagate

__all__ = ["DEFAULT", "PROPAGATORS", "propagate"]


def __getattr__(name: str) -> Any:
    # The table needs every propagator, and these need torch; prompts, windows and cases do not.
    if name in __all__:
        from medseg.prompt import propagators

        return getattr(propagators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
