"""Pointing at objects of one image: prompts, corrections, undo, and everything still there tomorrow.

A :class:`PromptSession` is a thin holder. What it holds is an immutable
:class:`~medseg.prompt.state.History`; what changes it is an event, which is in the journal before it counts.
Each mask is kept, packed, under the hash of its voxels, so that undo is a look-up. A mask that is lost is
computed again from the prompts and the masks that it came from.

>>> from medseg.prompt.prompts import Point
>>> from medseg.volume import Geometry
>>> image = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
>>> volume = Volume(image, Geometry((8, 8, 8), np.eye(4)))
>>> def cube(models, target, propagator, config):  # stands in for the networks
...     mask = np.zeros((8, 8, 8), dtype=bool)
...     mask[2:5, 2:5, 2:5] = True
...     return Propagation(Region.of(mask))
>>> session = PromptSession.open(volume, propagate=cube, models=lambda scene: None)
>>> session.add("liver", Point(position_mm=(3, 3, 3))).names
('liver',)
>>> session.mask("liver").voxels, session.undo().names
(27, ())
"""

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from medseg import log
from medseg.config import Config
from medseg.errors import ConfigError, DataError, MedsegError, OutputError, ReadError
from medseg.files import check_writable
from medseg.geometry.orient import from_ras
from medseg.labels import LabelSet
from medseg.prompt.journal import JOURNAL, SNAPSHOTS, Journal, MaskStore
from medseg.prompt.overlap import count_shared, subtract
from medseg.prompt.prompts import PLANES, ObjectMask, Prompt
from medseg.prompt.provenance import describe_state
from medseg.prompt.regions import Region
from medseg.prompt.replay import remember, replay
from medseg.prompt.review import Suggestion, find_doubt, middle_of
from medseg.prompt.scene import Scene
from medseg.prompt.state import (
    Add,
    Change,
    Create,
    Delete,
    Edit,
    History,
    ObjectState,
    Opened,
    Redo,
    Rename,
    Resolve,
    Run,
    Settings,
    State,
    Undo,
    Withdraw,
    referenced,
)
from medseg.prompt.target import Propagation, Target
from medseg.prompt.workbench import Propagate, Workbench
from medseg.segmentation import Segmentation
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.slicewise import Models

# An axis along which voxels are this much longer than along the others is that of the scanner's slices.
_THICK = 1.5
_AXIAL = 2


@dataclass(frozen=True)
class Conflict:
    """Two objects that share voxels (overlap policy ``ask``)."""

    first: str
    second: str
    voxels: int


class PromptSession:
    """One image, and the objects that a user points at in it. Make one with :meth:`open`.

    Every method that changes something returns the new :class:`~medseg.prompt.state.State`. Either it
    succeeds, or it raises and leaves everything as it was. Methods may be called from several threads; those
    that change something wait for each other.
    """

    def __init__(self, journal: Journal, history: History, bench: Workbench) -> None:
        self._journal, self._history, self._bench = journal, history, bench
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        volume: Volume | PathLike,
        folder: PathLike | None = None,
        *,
        window: str | tuple[float, float] | None = None,
        modality: str | None = None,
        overlap: str | None = None,
        propagator: str | None = None,
        config: Config | Mapping[str, Any] | None = None,
        models: "Models | Callable[[Scene], Any] | None" = None,
        propagate: Propagate | None = None,
        channel: int | None = None,
        repair: bool = False,
    ) -> Self:
        """Begin a session, or go on with the one in `folder`.

        Parameters
        ----------
        volume : the image, or its file
        folder : where every step is saved at once; None: nowhere, until :meth:`save`
        window, modality, overlap, propagator, config : see :class:`~medseg.prompt.state.Settings`; None: as
            it was, or the default
        models : the networks to use, or what makes them for a scene
        propagate : stands in for :func:`medseg.prompt.propagate`
        channel : which channel or time point of the image to take (from 0)
        repair : give up what follows a damaged line of the journal

        Raises
        ------
        DataError
            The image has several channels or no finite voxel, or is not the one of the folder.
        ReadError
            A file cannot be read, or the journal is damaged.
        OutputError
            The folder cannot be written, or the session is open elsewhere.
        ConfigError
            A setting is wrong.
        """
        scene = _make_scene(volume, channel)
        named = {"window": window, "modality": modality, "overlap": overlap, "propagator": propagator}
        changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if config is not None:
            changes["config"] = config.to_dict() if isinstance(config, Config) else dict(config)
        place = None if folder is None else Path(folder)
        journal, events = Journal.open(place, repair)
        try:
            masks = MaskStore(None if place is None else place / SNAPSHOTS, scene.shape)
            configure = resolve_config if propagate is None else _no_config
            bench = Workbench(scene, masks, propagate or _propagate, _maker(models, place), configure)
            if not events:
                events = [_begin(journal, scene, _checked(bench, _defaults(propagate is not None) | changes))]
            _check_image(journal.folder, events[0], scene)
            history, bench.origins = replay(events, journal.folder)
            masks.keep_only(referenced(history.states))
            session = cls(journal, history, bench)
            session._settle(changes)
            return session
        except BaseException:
            journal.close()
            raise

    @classmethod
    def reopen(cls, volume: Volume | PathLike, folder: PathLike, **options: Any) -> Self:
        """Go on with a saved session; like :meth:`open`, but a folder without one is an error."""
        if not (Path(folder) / JOURNAL).is_file():
            raise ReadError(f"{folder}: holds no session ({JOURNAL} is missing). Check the path.")
        return cls.open(volume, folder, **options)

    # What is known.

    @property
    def scene(self) -> Scene:
        """The image; its window is the session's, without regard to what an object is seen through."""
        return replace(self._bench.scene, window=self._bench.window(self.state.settings).values)

    @property
    def state(self) -> State:
        """The objects as they are now."""
        return self._history.current

    @property
    def history(self) -> History:
        """All states that undo and redo lead to."""
        return self._history

    @property
    def folder(self) -> Path | None:
        """Where the session is saved."""
        return self._journal.folder

    @property
    def objects(self) -> tuple[str, ...]:
        """Names, in the order of their creation (their labels are 1, 2, ...)."""
        return self.state.names

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the session as a whole, e.g. what was repaired."""
        return (*self._journal.notes, *self._bench.notes)

    def mask(self, object: str) -> Region:
        """Return the mask of an object, on the turned grid of the scene; empty before its first run."""
        return self._bench.mask_of(self.state.find(object))

    def confidence(self, object: str) -> dict[int, float]:
        """Return slice -> 0..1, of those slices across the object's axis that were looked at."""
        return dict(self.state.find(object).confidence)

    def suggest(self, object: str) -> Suggestion | None:
        """Return where to look next: the slice that is most likely wrong; None without a mask."""
        from medseg.prompt.rasterise import anchors

        known = self.state.find(object)
        region = self._bench.mask_of(known)
        axis = _AXIAL if known.axis is None else known.axis
        prompted = anchors(self._bench.scene, Target(self._bench.prompts(known), axis))
        found = find_doubt(region, dict(known.confidence), axis, prompted)
        if found is None:
            return None
        index, reason, doubt = found
        x, y, z = self._bench.scene.to_world(np.array(middle_of(region, axis, index)))
        return Suggestion(axis, index, reason, doubt, (float(x), float(y), float(z)))

    def conflicts(self) -> tuple[Conflict, ...]:
        """Return pairs of objects that share voxels; under policy ``ask`` they wait for :meth:`resolve`."""
        state = self.state
        pairs = [(a, b) for n, a in enumerate(state.objects) for b in state.objects[n + 1 :]]
        shared = [Conflict(a.name, b.name, self._shared(a, b)) for a, b in pairs]
        return tuple(conflict for conflict in shared if conflict.voxels)

    def outdated(self) -> tuple[str, ...]:
        """Return objects whose masks were found with other settings; ``run(again=True)`` finds them anew."""
        settings = self.state.settings
        config = self._bench.configure(settings)
        now = (settings.propagator, {} if config is None else config.to_dict())
        found = (each for each in self.state.objects if each.mask is not None)
        return tuple(o.name for o in found if o.window is None or (o.propagator, dict(o.config)) != now)

    def segmentation(self) -> Segmentation:
        """Return all objects as one label map on the grid of the source.

        Raises
        ------
        DataError
            Objects share voxels, and nobody has said whose they are.
        """
        state = self.state
        for conflict in self.conflicts():
            raise DataError(
                f"objects {conflict.first!r} and {conflict.second!r} share {conflict.voxels} voxels. "
                "Say whose they are: session.resolve(winner, loser)."
            )
        labels = LabelSet(entries={"background": 0, **{n: v for v, n in enumerate(state.names, 1)}})
        painted = np.zeros(self._bench.scene.shape, labels.dtype)
        for value, each in enumerate(state.objects, 1):
            region = self._bench.mask_of(each)
            painted[region.slices][region.array] = value
        return Segmentation(self._to_source(painted), labels, self.provenance())

    def provenance(self) -> dict[str, Any]:
        """Return how the objects came to be, as plain data: prompts, windows, models, versions."""
        voxels = {each.name: self._bench.mask_of(each).voxels for each in self.state.objects}
        return describe_state(self._bench.scene, self.state, voxels)

    # What changes something.

    def add(
        self,
        object: str,
        *prompts: Prompt,
        run: bool = True,
        axis: int | None = None,
        limits: tuple[int, int] | None = None,
    ) -> State:
        """Point at an object, which is created if there is none of that name.

        Parameters
        ----------
        object : its name
        prompts : at least one
        run : compute its mask at once; False: wait for :meth:`run`, so that several prompts cost one run
        axis : across which slices are taken (0 sagittal, 1 coronal, 2 axial); None: as it was, or that of
            the first prompt with a plane, or the one with thick slices, or axial
        limits : first and last slice across `axis` that the object may reach

        Raises
        ------
        DataError
            A prompt cannot be meant (outside the volume, no area), or names an object that is not there.
        Cancelled
            The listener asked to stop (:mod:`medseg.log`).
        """
        with self._step():
            self._commit(self._adding(object, prompts, axis, limits))
            if run:
                self._run(object, again=False, joined=True)
        return self.state

    def run(self, *objects: str, again: bool = False) -> State:
        """Compute the masks of objects whose prompts wait, or of those named.

        Parameters
        ----------
        objects : names; none: all
        again : from all prompts anew, for example after a change of the window

        Raises
        ------
        DataError
            There is no such object, or it has no prompt that says where it is.
        Cancelled
            The listener asked to stop; all masks are as they were.
        """
        with self._step():
            known = [self.state.find(name) for name in objects] or list(self.state.objects)
            waiting = [each.name for each in known if each.pending or (again and each.prompts)]
            for position, name in enumerate(dict.fromkeys(waiting)):
                self._run(name, again, joined=position > 0)
        return self.state

    def create(self, object: str) -> State:
        """Name a new object, without a prompt yet."""
        return self._edit(Create.from_dict({"object": object}, "session"))

    def rename(self, object: str, to: str) -> State:
        """Give an object another name."""
        return self._edit(Rename.from_dict({"object": object, "to": to}, "session"))

    def delete(self, object: str) -> State:
        """Remove an object with its mask."""
        return self._edit(Delete(object=object))

    def change(self, **settings: Any) -> State:
        """Change settings (window, modality, overlap, propagator, config) for what comes.

        Masks stay as they are until their objects run again.
        """
        wanted = _checked(self._bench, {**self.state.settings.to_dict(), **settings})
        return self._edit(Change(settings=wanted))

    def resolve(self, winner: str, loser: str) -> State:
        """Give the voxels that two objects share to one of them."""
        with self._step():
            state = self.state
            first, second = state.find(winner), state.find(loser)
            if not self._shared(first, second) or winner == loser:
                raise DataError(f"objects {winner!r} and {loser!r} share no voxels: nothing to resolve.")
            left = subtract(self._bench.mask_of(second), self._bench.mask_of(first))
            self._commit(Resolve(winner=winner, loser=loser, mask=self._bench.masks.put(left)))
        return self.state

    def undo(self, steps: int = 1) -> State:
        """Take back the last steps; an :meth:`add` with its run is one step.

        Raises
        ------
        DataError
            There are not so many.
        """
        return self._move(Undo(), steps, self._history.undoable, "undo")

    def redo(self, steps: int = 1) -> State:
        """Take the last steps again that were taken back; see :meth:`undo`."""
        return self._move(Redo(), steps, self._history.redoable, "redo")

    def save(self, folder: PathLike) -> None:
        """Write the session to a folder and go on there: from now on, each step is saved at once.

        Raises
        ------
        OutputError
            The folder holds a session already, or cannot be written.
        """
        place = Path(folder)
        with self._lock:
            if self.folder is not None and self.folder.resolve() == place.resolve():
                return
            if (place / JOURNAL).exists():
                raise OutputError(f"{place}: holds a session already. Choose another folder.")
            check_writable(place, folder=True)
            masks = MaskStore(place / SNAPSHOTS, self._bench.scene.shape)
            for key in sorted(referenced(self._history.states)):
                masks.put(self._bench.region(key))
            self._journal.copy(place)
            journal, _ = Journal.open(place)
            self._journal.close()
            self._journal, self._bench.masks = journal, masks

    def close(self) -> None:
        """Let go of the folder. Everything is saved already; what is known stays readable."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Events.

    def _commit(self, event: Edit | Undo | Redo | Withdraw) -> None:
        """Make an event count: valid first, then on the disk, then here."""
        history = self._history.after(event)
        self._journal.append(event)
        remember(self._bench.origins, self.state, event)
        self._history = history

    def _edit(self, event: Edit) -> State:
        with self._lock:
            self._commit(event)
            return self.state

    def _move(self, event: Undo | Redo, steps: int, possible: int, verb: str) -> State:
        with self._lock:
            if not 0 < steps <= possible:
                raise DataError(f"{verb} {steps}: there are {possible} steps to {verb}.")
            for _ in range(steps):
                self._commit(event)
            return self.state

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Make the events of the block one step, which is taken back if the block fails."""
        with self._lock:
            before = self._history
            try:
                yield
            except BaseException:
                if self._history is not before:
                    self._withdraw()
                raise

    def _withdraw(self) -> None:
        try:
            self._commit(Withdraw())
        except MedsegError as error:  # the disk: what the journal says counts, so the prompts stay and wait
            log.logger.warning("the last step could not be taken back: %s", error)

    def _settle(self, changes: Mapping[str, Any]) -> None:
        """Make the settings that were asked for hold; refuse them before the first prompt."""
        now = self.state.settings
        wanted = _checked(self._bench, {**now.to_dict(), **changes})
        if wanted != now:
            self._edit(Change(settings=wanted))

    def _adding(
        self, name: str, prompts: Sequence[Prompt], axis: int | None, limits: tuple[int, int] | None
    ) -> Add:
        from medseg.prompt.rasterise import beyond, check_prompts

        state = self.state
        known = state.find(name) if name in state.names else ObjectState(name)
        if axis is None:
            axis = choose_axis(self._bench.scene, prompts) if known.axis is None else known.axis
        values = {"object": name, "prompts": prompts, "axis": axis, "limits": limits}
        event = Add.from_dict(values, "session")
        check_prompts(self._bench.scene, [each for each in event.prompts if not isinstance(each, ObjectMask)])
        for each in event.prompts:
            if isinstance(each, ObjectMask) and not self.mask(each.object).array.size:
                raise DataError(f"object {each.object!r} has no mask to point with. Run it first.")
        size = self._bench.scene.shape[axis]
        if limits is not None and not 0 <= limits[0] <= limits[1] < size:
            raise DataError(
                f"limits {limits}: expected first and last slice, from 0 to {size - 1} across axis {axis}."
            )
        reach = known.limits if limits is None else limits
        if reach is not None:
            lost = beyond(self._bench.scene, (*self._bench.prompts(known), *event.prompts), axis, reach)
            if lost is not None:
                raise DataError(
                    f"limits {reach}: a {lost[0].kind} of object {name!r} lies on slice {lost[1]} across "
                    f"axis {axis}, outside of them. Give limits that hold every prompt, or move the prompt."
                )
        return event

    def _run(self, name: str, again: bool, joined: bool) -> None:
        state, bench = self.state, self._bench
        known = state.find(name)
        if known.mask is None and not any(getattr(each, "positive", True) for each in known.prompts):
            near = difflib.get_close_matches(name, [each for each in state.names if each != name], n=1)
            hint = f"Did you mean object {near[0]!r}? Else add" if near else "Add"
            raise DataError(
                f"object {name!r}: its prompts say only where it is not. {hint} a click, a box or a line "
                "inside."
            )
        window = bench.window(state.settings, known)
        outcome = bench.run(state, known, again, window)
        keys = {each: bench.masks.put(region) for each, region in outcome.masks.items()}
        # What a correction did not look at is as sure as it was.
        before = {} if again else _slices_of(known, outcome.masks[name])
        self._commit(
            Run(
                object=name,
                mask=keys.pop(name),
                taken=keys,
                window=window,
                propagator=state.settings.propagator,
                config={} if outcome.config is None else outcome.config.to_dict(),
                confidence=_plain_confidence(before | dict(outcome.said.confidence)),
                notes=outcome.said.notes,
                models=bench.models_at(window),
                again=again,
                joined=joined,
            )
        )

    def _shared(self, a: ObjectState, b: ObjectState) -> int:
        return count_shared(self._bench.mask_of(a), self._bench.mask_of(b)) if a.mask and b.mask else 0

    def _to_source(self, painted: Any) -> Volume:
        scene = self._bench.scene
        return from_ras(Volume(painted, scene.geometry), scene.source)


def choose_axis(scene: Scene, prompts: Iterable[Prompt]) -> int:
    """Return the axis of the turned grid across which slices are taken where nobody says it.

    It is that of the first prompt with a plane; else the one with thick slices (1.5 times the others), in
    whose planes the image is sharp; else axial.
    """
    for prompt in prompts:
        plane = getattr(prompt, "plane", None)
        if plane is not None:
            return PLANES.index(plane)
    order = np.argsort(scene.spacing)
    thickest, second = int(order[-1]), int(order[-2])
    return thickest if scene.spacing[thickest] >= _THICK * scene.spacing[second] else _AXIAL


def _make_scene(volume: Volume | PathLike, channel: int | None) -> Scene:
    if not isinstance(volume, Volume):
        from medseg.io import read

        volume = read(volume)
    if channel is not None:
        if not 0 <= channel < volume.channels:
            raise DataError(f"channel {channel}: the image has {volume.channels} (from 0). Choose another.")
        volume = volume.with_array(volume.array[channel])
    scene = Scene.of(volume, (0.0, 1.0))
    if scene.array.size > 1 and scene.array.min() == scene.array.max():
        raise DataError("all voxels have the same value: there is nothing to see. Is it the right file?")
    return scene


def _defaults(custom: bool) -> dict[str, Any]:
    """Return what a new session takes where nothing is said."""
    if custom:
        return {"propagator": "custom"}
    from medseg.prompt import DEFAULT

    return {"propagator": DEFAULT}


def _checked(bench: Workbench, values: Mapping[str, Any]) -> Settings:
    """Return settings that will work for this image."""
    settings = Settings.from_dict(values, "session")
    bench.configure(settings)
    bench.window(settings)
    return settings


def resolve_config(settings: Settings) -> Config:
    """Return the settings of the propagator, checked and complete.

    Raises
    ------
    ConfigError
        The propagator is unknown, or one of its settings is wrong.
    """
    from medseg.prompt import PROPAGATORS

    name = settings.propagator
    if name not in PROPAGATORS:
        near = difflib.get_close_matches(name, PROPAGATORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PROPAGATORS)}."
        raise ConfigError(f"propagator {name!r}: unknown; {hint}")
    return PROPAGATORS[name][0].from_dict(settings.config, f"propagator {name}")


def _no_config(settings: Settings) -> Config | None:
    """Return None: a propagator of the caller's own has no settings here."""
    if settings.config:
        raise ConfigError("config: a propagator of your own takes none. Put its settings into the function.")
    return None


def _propagate(models: Any, target: Target, propagator: str, config: Config | None) -> Propagation:
    from medseg.prompt import propagate

    return propagate(models, target, propagator, config)


def _maker(models: "Models | Callable[[Scene], Any] | None", folder: Path | None) -> Callable[[Scene], Any]:
    """Return what makes the networks for a scene; the weights are shared by all scenes."""
    if callable(models):
        return models
    made = [] if models is None else [models]

    def make(scene: Scene) -> Any:
        if not made:
            made.append(_open_models(scene, folder))
        return made[0].of(scene)

    return make


def _open_models(scene: Scene, folder: Path | None) -> "Models":
    from medseg.prompt.embeddings import EmbeddingCache, default_folder
    from medseg.prompt.slicewise import Models

    return Models.open(scene, EmbeddingCache(None if folder is None else default_folder()))


def _begin(journal: Journal, scene: Scene, settings: Settings) -> Opened:
    """Write the first event of a journal."""
    opened = Opened(
        medseg=metadata.version("medseg"),
        image=scene.digest,
        shape=scene.shape,
        spacing=scene.spacing,
        settings=settings,
    )
    journal.append(opened)
    return opened


def _check_image(folder: Path | None, opened: Any, scene: Scene) -> None:
    if not isinstance(opened, Opened):
        raise ReadError(f"{folder}: the journal does not begin with an image. Restore a backup.")
    if opened.image != scene.digest:
        there, here = _size(opened.shape, opened.spacing), _size(scene.shape, scene.spacing)
        why = f"{there}; the one given: {here}"
        if there == here:
            why = f"both have {here}, but the values or the position of the voxels differ"
        raise DataError(
            f"{folder}: this session is about another image ({why}). Open that image, or choose another "
            "folder."
        )


def _size(shape: Sequence[int], spacing: Sequence[float]) -> str:
    return f"{' x '.join(map(str, shape))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)}"


def _slices_of(known: ObjectState, region: Region) -> dict[int, float]:
    """Return the confidence so far of the slices that a mask still has."""
    axis = _AXIAL if known.axis is None else known.axis
    inside = range(region.start[axis], region.stop[axis])
    return {index: value for index, value in known.confidence if index in inside}


def _plain_confidence(confidence: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Return sorted pairs; a network's score may be above 1, and what is not a number is no confidence."""
    finite = ((int(k), float(v)) for k, v in sorted(confidence.items()) if np.isfinite(v))
    return tuple((index, min(1.0, max(0.0, value))) for index, value in finite)
