"""Where masks are made: from a state and its prompts through a propagator, and again when they are lost."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medseg import log
from medseg.config import Config
from medseg.errors import ReadError
from medseg.prompt.journal import MaskStore, key_of
from medseg.prompt.overlap import count_shared, subtract, union
from medseg.prompt.prompts import Mask, Prompt
from medseg.prompt.provenance import models_at_work
from medseg.prompt.regions import Region
from medseg.prompt.replay import Origin, Origins
from medseg.prompt.scene import Scene
from medseg.prompt.state import MaskOf, ObjectState, Resolve, Settings, State
from medseg.prompt.target import Propagation, Target
from medseg.prompt.windows import Window, find_window, prompted_region
from medseg.volume import Volume

Propagate = Callable[[Any, Target, str, Config | None], Propagation]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run gives: the new masks by object, what the propagator said, and its settings."""

    masks: Mapping[str, Region]
    said: Propagation
    config: Config | None


# Who loses this part of its voxels to another object is named.
_NOTABLE = 0.25


def _losses(before: Mapping[str, Region], after: Mapping[str, Region], winner: str) -> list[str]:
    """Return a sentence for each object that a new mask took much of."""
    lost = {name: 1 - after[name].voxels / before[name].voxels for name in before if name in after}
    return [
        f"{name} has lost {part:.0%} of its voxels to {winner}. Undo, or let earlier objects keep theirs "
        "(overlap: keep)."
        for name, part in lost.items()
        if part >= _NOTABLE
    ]


class Workbench:
    """The image, the networks, and the masks that were made so far.

    Attributes
    ----------
    origins : dict
        How each mask came to be, by its hash; the session writes it.
    notes : list of str
        What became of lost masks.

    Parameters
    ----------
    scene : Scene
    masks : MaskStore
    propagate : as :func:`medseg.prompt.propagate`
    models : makes what `propagate` takes first, for a scene
    configure : resolves the settings of the propagator
    """

    def __init__(
        self,
        scene: Scene,
        masks: MaskStore,
        propagate: Propagate,
        models: Callable[[Scene], Any],
        configure: Callable[[Settings], Config | None],
    ) -> None:
        self.scene, self.masks = scene, masks
        self.origins: Origins = {}
        self.configure = configure
        self.notes: list[str] = []
        self._propagate, self._make_models = propagate, models
        self._models: dict[tuple[float, float], Any] = {}
        self._lock = threading.RLock()

    def run(self, before: State, known: ObjectState, again: bool, window: Window) -> Outcome:
        """Propagate an object of the state before, and divide what it shares with others by the policy.

        Raises
        ------
        DataError
            A prompt cannot be meant.
        Cancelled
            The listener wants to stop.
        """
        settings = before.settings
        others = {each.name: self.mask_of(each) for each in before.objects if each is not known}
        keep = settings.overlap == "keep"
        kept = union(Region.empty(self.scene.shape), *others.values()) if keep else None
        target, config = self._target(known, again, kept), self.configure(settings)
        log.check_cancelled()
        said = self._propagate(self._models_for(window), target, settings.propagator, config)
        log.check_cancelled()
        assert said.region.shape == self.scene.shape
        region = said.region if kept is None else subtract(said.region, kept)
        masks = {known.name: region}
        if settings.overlap == "overwrite":
            masks |= {name: subtract(o, region) for name, o in others.items() if count_shared(o, region)}
        return Outcome(masks, replace(said, notes=(*said.notes, *_losses(others, masks, known.name))), config)

    def models_at(self, window: Window) -> tuple[dict[str, str], ...]:
        """Return name, licence and hash of the networks that have looked through a window."""
        return tuple(models_at_work(self._models.get(window.values)))

    def window(self, settings: Settings, known: ObjectState | None = None) -> Window:
        """Return the window for an object: the one that it was seen through before, or a new one."""
        if known is not None and known.window is not None:
            return known.window
        prompts = () if known is None else self.prompts(known)
        volume = Volume(self.scene.array, self.scene.geometry)
        pointed = prompted_region(self.scene, prompts)
        return find_window(volume, settings.window, settings.modality, pointed)

    def prompts(self, known: ObjectState) -> tuple[Prompt, ...]:
        """Return the prompts of an object, masks of others as they were."""
        return tuple(
            Mask.of(self.region(each.mask)) if isinstance(each, MaskOf) else each for each in known.prompts
        )

    def mask_of(self, known: ObjectState) -> Region:
        """Return the mask of an object."""
        return Region.empty(self.scene.shape) if known.mask is None else self.region(known.mask)

    def region(self, key: str) -> Region:
        """Return a mask by its hash; one that is lost is computed again."""
        found = self.masks.get(key)
        return self._recover(key) if found is None else found

    def _target(self, known: ObjectState, again: bool, kept: Region | None) -> Target:
        assert known.axis is not None
        previous = None if known.mask is None or again else self.mask_of(known)
        fresh = 0 if previous is None else known.pending
        return Target(self.prompts(known), known.axis, known.limits, previous, fresh, kept)

    def _models_for(self, window: Window) -> Any:
        """Return the networks for the image seen through a window."""
        if window.values not in self._models:
            scene = replace(self.scene, window=window.values)
            self._models[window.values] = self._make_models(scene)
        return self._models[window.values]

    def _recover(self, key: str) -> Region:
        """Compute a lost mask again, and before it those that it came from and that are lost as well."""
        with self._lock:
            waiting = [key]
            while waiting:
                origin = self.origins.get(waiting[-1])
                if origin is None:
                    raise ReadError("a saved mask is lost, and the journal does not say of what. Delete it.")
                lost = [each for each in origin.needs if self.masks.get(each) is None]
                if lost:
                    waiting.extend(lost)
                else:
                    self._repeat(origin)
                    waiting.pop()
            found = self.masks.get(key)
            assert found is not None
            return found

    def _repeat(self, origin: Origin) -> None:
        before, event = origin.before, origin.event
        if isinstance(event, Resolve):
            loser, winner = (self.mask_of(before.find(name)) for name in (event.loser, event.winner))
            masks: Mapping[str, Region] = {event.loser: subtract(loser, winner)}
            keys = {event.loser: event.mask}
        else:
            masks = self.run(before, before.find(event.object), event.again, event.window).masks
            keys = {event.object: event.mask, **event.taken}
        for name, key in keys.items():
            region = masks.get(name, Region.empty(self.scene.shape))
            if key_of(region) == key:
                self.masks.put(region)
            elif self.masks.get(key) is None:
                self.masks.replace(key, region)
                self.notes.append(
                    f"A saved mask of {name!r} was lost; computed again, it is not the same to the voxel."
                )
