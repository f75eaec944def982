"""From the events of a journal to the history that they led to, and to where each mask came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import DataError, ReadError
from medseg.prompt.prompts import Mask
from medseg.prompt.regions import Triple
from medseg.prompt.state import Add, History, MaskOf, Opened, Resolve, Run, State


@dataclass(frozen=True)
class Origin:
    """How a mask came to be: the state before, and the event."""

    before: State
    event: Run | Resolve

    @property
    def needs(self) -> tuple[str, ...]:
        """Hashes of the masks from which this one can be computed again."""
        masks, event = self.before.masks, self.event
        if isinstance(event, Resolve):
            return (masks[event.winner], masks[event.loser])
        pointed = (each.mask for each in self.before.find(event.object).prompts if isinstance(each, MaskOf))
        return (*masks.values(), *pointed)


Origins = dict[str, Origin]  # by hash of the mask


def replay(events: Sequence[Any], folder: Path | None) -> tuple[History, Origins]:
    """Return the history and the origins of masks that events lead to; nothing is computed.

    Parameters
    ----------
    events : the first is an Opened
    folder : of the journal, for errors

    Raises
    ------
    ReadError
        An event does not follow from those before, so the journal is not of one session.
    """
    history, origins = History((State(events[0].settings),)), Origins()
    for line, event in enumerate(events[1:], 2):
        try:
            if isinstance(event, Opened):
                raise DataError("a second image.")
            _check_masks(event, events[0].shape)
            remember(origins, history.current, event)
            history = history.after(event)
        except DataError as error:
            raise ReadError(
                f"{folder}: line {line} of the journal does not follow from those before: {error} "
                "Restore the folder from a backup."
            ) from error
    return history, origins


def _check_masks(event: Any, shape: Triple) -> None:
    """Refuse a mask of another grid before it is unpacked: it could be larger than the memory."""
    for prompt in event.prompts if isinstance(event, Add) else ():
        if isinstance(prompt, Mask) and prompt.shape != shape:
            raise DataError(f"a mask on a grid of {prompt.shape}, in an image of {shape}.")


def remember(origins: Origins, before: State, event: Any) -> None:
    """Note where the masks of an event come from."""
    if isinstance(event, Run | Resolve):
        taken = event.taken.values() if isinstance(event, Run) else ()
        for key in (event.mask, *taken):
            origins.setdefault(key, Origin(before, event))  # the first: what it needs is older than it
