"""What a session knows, as immutable values: each event leads from one state to the next.

States hold prompts and the names of masks (hashes of their voxels), no voxels: a history of thousands of
them is small, and undo is a step back in it. Everything here is pure; files are in
:mod:`medseg.prompt.journal`, work is in :mod:`medseg.prompt.session`.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from medseg.config import Config
from medseg.errors import DataError
from medseg.prompt.prompts import ObjectMask, Prompt
from medseg.prompt.windows import Window

Overlap = Literal["overwrite", "keep", "ask"]

# Of a journal; a reader refuses what is newer than itself.
FORMAT = 1
# A name is shown in lists and goes into files of results.
LONGEST_NAME = 64
# Names with a meaning of their own in a LabelSet.
RESERVED = ("background", "ignore")
# Labels are at most 16 bits, and 0 is the background.
MOST_OBJECTS = 65_534


def check_name(name: str) -> str:
    """Return the name of an object, or refuse it (ValueError)."""
    if not name.strip() or name != name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"object {name[:LONGEST_NAME]!r}: expected a name of 1 to {LONGEST_NAME} printable characters "
            "without spaces around it. Choose another name."
        )
    if name.lower() in RESERVED:
        raise ValueError(f"object {name!r}: this name has a meaning in label maps. Choose another name.")
    return name


Name = Annotated[str, AfterValidator(check_name)]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Settings(Config):
    """What holds for the whole session until it is changed.

    Attributes
    ----------
    window : a preset, ``LEVEL/WIDTH``, the two values, or ``auto`` (see :mod:`medseg.prompt.windows`)
    modality : ``CT``, ``MR``, ``PET``, ``other``; None: seen from the values
    overlap : who gets a voxel that two objects want: the newest mask (``overwrite``), the older one
        (``keep``), or the user says it (``ask``)
    propagator : name in :data:`medseg.prompt.PROPAGATORS`
    config : its settings, as plain data
    """

    window: str | tuple[float, float] = "auto"
    modality: str | None = None
    overlap: Overlap = "overwrite"
    propagator: str
    config: dict[str, Any] = Field(default_factory=dict)


class Opened(Config):
    """The first event: on which image, known by its digest alone."""

    kind: Literal["opened"] = "opened"
    format: int = FORMAT
    medseg: str
    image: Key
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    settings: Settings


class Change(Config):
    """Other settings from now on."""

    kind: Literal["change"] = "change"
    settings: Settings


class Create(Config):
    """A new object without a prompt."""

    kind: Literal["create"] = "create"
    object: Name


class Rename(Config):
    """Another name for an object."""

    kind: Literal["rename"] = "rename"
    object: str
    to: Name


class Delete(Config):
    """An object is gone, with its mask."""

    kind: Literal["delete"] = "delete"
    object: str


class Add(Config):
    """Prompts for an object, which is created if there is none of that name."""

    kind: Literal["add"] = "add"
    object: Name
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    axis: Literal[0, 1, 2]
    limits: tuple[int, int] | None = None


class Run(Config):
    """An object's mask was computed from all prompts that it has.

    Attributes
    ----------
    mask, taken : the new masks: of the object, and of those that lost voxels to it
    propagator, config : its name and all its settings
    confidence : slice, 0..1
    again : the mask that it had before did not count
    joined : part of the step of the event before, so that one undo takes both back
    models : name, hash and licence of each model that was at work
    """

    kind: Literal["run"] = "run"
    object: str
    mask: Key
    taken: dict[str, Key] = Field(default_factory=dict)
    window: Window
    propagator: str
    config: dict[str, Any] = Field(default_factory=dict)
    confidence: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    models: tuple[dict[str, str], ...] = ()
    again: bool = False
    joined: bool = False


class Resolve(Config):
    """The user has said who gets the voxels that two objects share."""

    kind: Literal["resolve"] = "resolve"
    winner: str
    loser: str
    mask: Key  # of the loser


class Undo(Config):
    """One step back."""

    kind: Literal["undo"] = "undo"


class Redo(Config):
    """One step forward again."""

    kind: Literal["redo"] = "redo"


class Withdraw(Config):
    """The last step has failed or was cancelled: as if it had never been."""

    kind: Literal["withdraw"] = "withdraw"


Edit = Change | Create | Rename | Delete | Add | Run | Resolve
Event = Annotated[Opened | Edit | Undo | Redo | Withdraw, Field(discriminator="kind")]


class MaskOf(Config):
    """A prompt inside a state: the mask that another object had when it was named."""

    kind: Literal["mask of"] = "mask of"
    object: str
    mask: Key


Given = Prompt | MaskOf


@dataclass(frozen=True)
class ObjectState:
    """One object.

    Attributes
    ----------
    prompts : in the order in which they were given
    axis : across which slices are taken, of the turned grid
    limits : first and last slice that it may reach
    mask : hash of its mask; None before the first run
    seen : how many of the prompts the mask has seen
    confidence : slice, 0..1
    window : the one through which it was looked at, chosen at its first run
    notes, models, propagator, config : of its last run
    """

    name: str
    prompts: tuple[Given, ...] = ()
    axis: int | None = None
    limits: tuple[int, int] | None = None
    mask: str | None = None
    seen: int = 0
    confidence: tuple[tuple[int, float], ...] = ()
    window: Window | None = None
    notes: tuple[str, ...] = ()
    models: tuple[Mapping[str, str], ...] = ()
    propagator: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """How many prompts wait for a run."""
        return len(self.prompts) - self.seen


@dataclass(frozen=True)
class State:
    """All objects at one moment, in the order in which they were created."""

    settings: Settings
    objects: tuple[ObjectState, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objects."""
        return tuple(each.name for each in self.objects)

    @property
    def masks(self) -> Mapping[str, str]:
        """Hash of the mask of each object that has one."""
        return MappingProxyType({each.name: each.mask for each in self.objects if each.mask is not None})

    def find(self, name: str) -> ObjectState:
        """Return an object.

        Raises
        ------
        DataError
            There is none of that name.
        """
        for each in self.objects:
            if each.name == name:
                return each
        near = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names) or 'none yet'}."
        raise DataError(f"object {name!r}: the session has none of that name; {hint}")

    def after(self, event: Edit) -> "State":
        """Return the state that the event leads to.

        Raises
        ------
        DataError
            It names an object that is not there, or one that is there already.
        """
        match event:
            case Change():
                return self._change(event)
            case Create():
                self._check_new(event.object)
                return replace(self, objects=(*self.objects, ObjectState(event.object)))
            case Rename():
                self._check_new(event.to)
                return self._with(replace(self.find(event.object), name=event.to), event.object)
            case Delete():
                gone = self.find(event.object)
                return replace(self, objects=tuple(each for each in self.objects if each is not gone))
            case Add():
                return self._add(event)
            case Run():
                return self._run(event)
            case Resolve():
                self.find(event.winner)
                return self._with(replace(self.find(event.loser), mask=event.mask))

    def _with(self, changed: ObjectState, name: str | None = None) -> "State":
        name = changed.name if name is None else name
        return replace(self, objects=tuple(changed if o.name == name else o for o in self.objects))

    def _check_new(self, name: str) -> None:
        if name in self.names:
            raise DataError(f"object {name!r}: the session has one of that name. Choose another name.")
        if len(self.objects) >= MOST_OBJECTS:
            raise DataError(f"the session has {MOST_OBJECTS} objects, the most that a label map can hold.")

    def _change(self, event: Change) -> "State":
        old, new = self.settings, event.settings
        objects = self.objects
        if (old.window, old.modality) != (new.window, new.modality):
            objects = tuple(replace(each, window=None) for each in objects)
        return State(new, objects)

    def _add(self, event: Add) -> "State":
        before = self if event.object in self.names else self.after(Create(object=event.object))
        old = before.find(event.object)
        prompts = (*old.prompts, *(self._given(prompt) for prompt in event.prompts))
        limits = old.limits if event.limits is None else event.limits
        return before._with(replace(old, prompts=prompts, axis=event.axis, limits=limits))

    def _given(self, prompt: Prompt) -> Given:
        if not isinstance(prompt, ObjectMask):
            return prompt
        mask = self.find(prompt.object).mask
        if mask is None:
            raise DataError(f"object {prompt.object!r} has no mask yet. Run it first, then point with it.")
        return MaskOf(object=prompt.object, mask=mask)

    def _run(self, event: Run) -> "State":
        old = self.find(event.object)
        state = self._with(
            replace(
                old,
                mask=event.mask,
                seen=len(old.prompts),
                confidence=event.confidence,
                window=event.window,
                notes=event.notes,
                models=event.models,
                propagator=event.propagator,
                config=event.config,
            )
        )
        for name, mask in event.taken.items():
            state = state._with(replace(state.find(name), mask=mask))
        return state


@dataclass(frozen=True)
class History:
    """All states up to the newest, and where among them the session is.

    Attributes
    ----------
    states : the first is that of the opened session
    position : of the current state; those after it can be redone
    before : the history before the last step, which may still be withdrawn
    """

    states: tuple[State, ...]
    position: int = 0
    before: "History | None" = field(default=None, repr=False, compare=False)

    @property
    def current(self) -> State:
        """The state of now."""
        return self.states[self.position]

    @property
    def undoable(self) -> int:
        """How many steps can be taken back."""
        return self.position

    @property
    def redoable(self) -> int:
        """How many steps can be taken again."""
        return len(self.states) - 1 - self.position

    def after(self, event: Edit | Undo | Redo | Withdraw) -> "History":
        """Return the history with one more event.

        Raises
        ------
        DataError
            There is nothing to undo, redo or withdraw, or the event does not fit the state.
        """
        match event:
            case Undo():
                return self._move(-1, self.undoable, "undo")
            case Redo():
                return self._move(1, self.redoable, "redo")
            case Withdraw():
                if self.before is None:
                    raise DataError("there is nothing to withdraw.")
                return self.before
        state = self.current.after(event)
        if isinstance(event, Run) and event.joined:
            return replace(self, states=(*self.states[: self.position], state))
        before = replace(self, before=None)
        return History((*self.states[: self.position + 1], state), self.position + 1, before)

    def _move(self, step: int, possible: int, verb: str) -> "History":
        if not possible:
            raise DataError(f"there is nothing to {verb}.")
        return History(self.states, self.position + step)


def referenced(states: Iterable[State]) -> set[str]:
    """Return the hashes of all masks that states name."""
    found: set[str] = set()
    for state in states:
        found.update(state.masks.values())
        for each in state.objects:
            found.update(prompt.mask for prompt in each.prompts if isinstance(prompt, MaskOf))
    return found
