"""Measure propagators with a simulated user: a box, then clicks where the mask is most wrong.

Every entrant is shown the same objects, the same jittered boxes and users with the same hand. Beside the
propagators of :mod:`medseg.prompt` there are baselines, and each may be told the true range of slices:

================== ======================================================================================
``NAME``           an entry of ``PROPAGATORS`` with its default settings
``NAME:key=value`` the same with settings changed, several with commas: ``box:stops.iou=0.4,stops.empty=2``
``NAME@z``         the same (or a baseline) with the true first and last slice given
``watershed``      a marker watershed from the same box and clicks; no network
``slice-boxes``    the network of boxes on every slice of the true range, with a jittered true box on each
``extruded``       the true mask of the prompted slice, the same on every slice ("previous mask unchanged")
================== ======================================================================================
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.errors import Cancelled, ConfigError
from medseg.log import Task, logger, task
from medseg.metrics.surface import surface_distances
from medseg.prompt.cases import (
    CaseEntry,
    CasesFile,
    PromptObject,
    case_folders,
    load_cases,
    open_entry,
    world_box,
    world_point,
)
from medseg.prompt.prompts import Prompt
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene, plane_size
from medseg.prompt.scores import Comparison, Group, Trace, compare, summarize
from medseg.prompt.simulate import (
    BOX_JITTER,
    CLICK_JITTER,
    Aim,
    BoxPrompt,
    Click,
    cut_pair,
    draw_box,
    draw_prompt,
    next_click,
)
from medseg.prompt.target import Propagation, Target
from medseg.prompt.watershed import WatershedConfig, guess_reach, watershed
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.prompt.embeddings import EmbeddingCache
    from medseg.prompt.slicewise import Models


class EvaluateConfig(Config):
    """The simulated user and what is measured.

    Attributes
    ----------
    seeds : several int
        One simulated user each.
    clicks : int
        Corrective clicks after the box.
    nsd_mm : float
        Tolerance of the surface Dice, in the unit of the image; 2 as in the CVPR 2025 challenge.
    box_jitter : float
        Part of the box's side by which sides are moved.
    click_jitter_mm : float
        Radius around the deepest voxel of the largest error in which clicks land.
    aim : "centre" or "random"
        Where in the largest error a click aims.
    share : bool
        Keep embeddings over all objects and seeds, as a session does over its objects. False: none is kept
        from one object to the next, so that the first mask of each costs what it costs alone.
    """

    seeds: tuple[int, ...] = Field((0,), min_length=1)
    clicks: int = Field(5, ge=0, le=100)
    nsd_mm: float = Field(2.0, ge=0)
    box_jitter: float = Field(BOX_JITTER, ge=0, le=0.5)
    click_jitter_mm: float = Field(CLICK_JITTER, ge=0)
    aim: Aim = "centre"
    share: bool = True


@dataclass(frozen=True, eq=False)
class Question:
    """What an entrant is asked: the target, and what only baselines may know."""

    models: "Models"
    target: Target
    prompt: BoxPrompt
    clicks: tuple[Click, ...]
    reference: Region
    seed: int

    @property
    def scene(self) -> Scene:
        """The image."""
        return self.models.scene


Answer = Callable[[Question], Region]
Propagator = Callable[["Models", Target], Propagation]


@dataclass(frozen=True)
class Failure:
    """What could not be measured; `entrant` and `name` are empty where a case could not be read."""

    dataset: str
    name: str
    entrant: str
    seed: int | None
    error: str


@dataclass(frozen=True, eq=False)
class PromptEvaluation:
    """Everything measured; see :mod:`medseg.prompt.evaluate_page` for tables, plots and files."""

    title: str
    config: EvaluateConfig
    entrants: tuple[str, ...]
    traces: tuple[Trace, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def groups(self) -> list[Group]:
        """Numbers of each entrant over all objects and over each data set."""
        return summarize(self.traces)

    @property
    def comparisons(self) -> list[Comparison]:
        """The first entrant against each other one."""
        return compare(self.traces)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that strict JSON can hold; what was not measured is None."""
        from medseg.prompt.evaluate_page import to_dict

        return to_dict(self)

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict`."""
        from medseg.prompt.evaluate_page import write_json

        write_json(self, path)

    def to_html(self, path: PathLike) -> None:
        """Write one self-contained page."""
        from medseg.prompt.evaluate_page import build_page

        build_page(self).write(path)

    def to_png(self, path: PathLike) -> None:
        """Write the curves of Dice and NSD over clicks."""
        from medseg.prompt.evaluate_page import write_plot

        write_plot(self, path)


def evaluate_prompts(
    cases: PathLike | CasesFile,
    propagator: str = "",
    compare: Sequence[str] = (),
    data: Sequence[PathLike] = (),
    config: EvaluateConfig | None = None,
    given: Mapping[str, PathLike] | None = None,
    cache: "EmbeddingCache | None" = None,
    extra: Mapping[str, Propagator] | None = None,
) -> PromptEvaluation:
    """Measure a propagator, and others beside it, on cases with reference labels.

    Parameters
    ----------
    cases : path or CasesFile
        See :mod:`medseg.prompt.cases`.
    propagator : str
        Entrant to measure, as named above; empty: the default propagator.
    compare : several str
        Other entrants.
    data : folders
        Where the paths of cases are searched, in order; by default beside the file.
    config : EvaluateConfig, optional
    given : mapping of asset name to path
        Weights to use instead of downloads.
    cache : EmbeddingCache, optional
        Embeddings to use and to keep, shared by all entrants. Seconds and encoder calls then depend on
        what it already holds.
    extra : mapping of name to function
        Propagators that are not in ``PROPAGATORS``.

    Returns
    -------
    PromptEvaluation
        What failed is in its `failures`: one bad case stops nothing.

    Raises
    ------
    ConfigError
        The file of cases is wrong, or an entrant is unknown.
    Cancelled
        The listener asked to stop.
    """
    config = config or EvaluateConfig()
    listed = cases if isinstance(cases, CasesFile) else load_cases(cases)
    folders = [Path(f) for f in data] if isinstance(cases, CasesFile) else case_folders(cases, data)
    names = tuple(dict.fromkeys([propagator or _default(), *compare]))
    answers = {name: answer_of(name, extra or {}) for name in names}
    batch = _Batch(config, answers, dict(given or {}), cache)
    with task("Evaluating", len(listed.cases)) as running:
        for entry in listed.cases:
            batch.run(entry, folders or [Path()], running)
            running.advance()
    title = listed.name or (Path(cases).stem if not isinstance(cases, CasesFile) else "Prompts")
    return PromptEvaluation(title, config, names, tuple(batch.traces), tuple(batch.failures))


def _default() -> str:
    from medseg import prompt

    return str(prompt.DEFAULT)


def answer_of(name: str, extra: Mapping[str, Propagator]) -> Answer:
    """Find what answers to the name of an entrant.

    Raises
    ------
    ConfigError
        There is no such propagator or baseline, or it has no such setting.
    """
    plain, _, changes = name.removesuffix("@z").partition(":")
    if plain in extra:
        function = extra[plain]
        return lambda asked: function(asked.models, asked.target).region
    if plain in BASELINES:
        return BASELINES[plain]
    from medseg.prompt import PROPAGATORS, propagate

    if plain not in PROPAGATORS:
        known = ", ".join((*PROPAGATORS, *BASELINES, *extra))
        raise ConfigError(f"propagator {plain!r}: unknown. Take one of {known}.")
    settings = PROPAGATORS[plain][0]()
    if changes:
        settings = settings.with_overrides(changes.split(","), f"propagator {name!r}")
    return lambda asked: propagate(asked.models, asked.target, plain, settings).region


def _watershed(asked: Question) -> Region:
    image = asked.scene.grey((slice(None),) * 3)
    return watershed(image, asked.scene.spacing, asked.prompt, asked.target.limits, asked.clicks)


def _slice_boxes(asked: Question) -> Region:
    """Ask the network of boxes on each slice of the true range; clicks change nothing."""
    from medseg.prompt.segmenter import SlicePrompts

    if asked.target.previous is not None:
        return asked.target.previous
    axis, reference, scene = asked.target.axis, asked.reference, asked.scene
    generator = np.random.default_rng([asked.seed, 2])
    mask = np.zeros(scene.shape, dtype=bool)
    for index in range(reference.start[axis], reference.stop[axis]):
        plane = reference.plane(axis, index)
        if not plane.any():
            continue
        drawn = asked.prompt.box if index == asked.prompt.index else draw_box(plane, BOX_JITTER, generator)
        answer = asked.models.box_segmenter.predict(axis, index, SlicePrompts(box=drawn))
        where: list[slice | int] = [slice(None), slice(None)]
        where.insert(axis, index)
        mask[tuple(where)] = answer.mask(plane_size(scene.shape, axis))
    return Region.of(mask)


def _extruded(asked: Question) -> Region:
    """Repeat the true mask of the prompted slice; clicks change nothing."""
    axis, scene = asked.target.axis, asked.scene
    low, high = guess_reach(scene.shape, scene.spacing, asked.prompt, asked.target.limits, WatershedConfig())
    plane = asked.reference.plane(axis, asked.prompt.index)
    start = [0, 0, 0]
    start[axis] = low
    block = np.repeat(np.expand_dims(plane, axis), high + 1 - low, axis)
    return Region.at(block, (start[0], start[1], start[2]), scene.shape)


BASELINES: dict[str, Callable[[Question], Region]] = {
    "watershed": _watershed,
    "slice-boxes": _slice_boxes,
    "extruded": _extruded,
}


@dataclass(eq=False)
class _Batch:
    """Runs entry after entry and keeps what comes out; networks and embeddings live as long as it does."""

    config: EvaluateConfig
    answers: Mapping[str, Answer]
    given: dict[str, PathLike]
    cache: "EmbeddingCache | None"
    traces: list[Trace] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    _caches: "dict[str, EmbeddingCache]" = field(default_factory=dict)
    _models: "Models | None" = None

    def run(self, entry: CaseEntry, folders: Sequence[Path], running: Task) -> None:
        """Measure every entrant on every object of an entry."""
        try:
            objects = list(open_entry(entry, folders))
        except Cancelled:
            raise
        except Exception as error:
            self._failed(entry.dataset, entry.name or entry.image, "", None, error)
            return
        for item, seed in ((item, seed) for item in objects for seed in self.config.seeds):
            running.advance(0, f"{item.dataset} {item.name}")
            self._measure(item, seed, running)

    def _measure(self, item: PromptObject, seed: int, running: Task) -> None:
        try:
            prompt = item.prompt or draw_prompt(
                item.reference.full(), item.axis, _hand(item, seed, 0), self.config.box_jitter
            )
            scene = item.scene(prompt)
        except Exception as error:
            self._failed(item.dataset, item.name, "", seed, error)
            return
        for name, answer in self.answers.items():
            running.advance(0, f"{item.name}: {name}")
            try:
                models = self._open(scene, name)
                user = _User(self.config, item, seed, prompt, item.limits if name.endswith("@z") else None)
                self.traces.append(user.work(name, answer, models))
            except Cancelled:
                raise
            except Exception as error:  # whatever a propagator does to one case, the others are measured
                self._failed(item.dataset, item.name, name, seed, error)

    def _failed(self, dataset: str, name: str, entrant: str, seed: int | None, error: Exception) -> None:
        text = str(error) or type(error).__name__
        logger.warning("%s %s%s: %s", dataset, name, f" ({entrant})" if entrant else "", text)
        self.failures.append(Failure(dataset, name, entrant, seed, text))

    def _open(self, scene: Scene, entrant: str) -> "Models":
        """Return networks for a scene; weights are shared by all, embeddings by what an entrant does."""
        from medseg.prompt.embeddings import EmbeddingCache
        from medseg.prompt.slicewise import Models

        if self._models is None:
            self._models = Models.open(scene, given=self.given)
        if not self.config.share:
            self._caches.pop(entrant, None)
        cache = self.cache or self._caches.setdefault(entrant, EmbeddingCache())
        return replace(self._models, scene=scene, cache=cache, ready={})


def _hand(item: PromptObject, seed: int, step: int) -> np.random.Generator:
    """Return the generator of one gesture: it hangs on the object and the seed, not on order or entrant."""
    return np.random.default_rng([seed, zlib.crc32(f"{item.dataset}/{item.name}".encode()), step])


@dataclass(frozen=True, eq=False)
class _User:
    """A simulated user at one object."""

    config: EvaluateConfig
    item: PromptObject
    seed: int
    prompt: BoxPrompt
    limits: tuple[int, int] | None

    def work(self, name: str, answer: Answer, models: "Models") -> Trace:
        """Give the box, then click until the clicks are spent or nothing is wrong."""
        steps = list(self._steps(answer, models))
        dice = [step.dice for step in steps]
        nsd = [step.nsd for step in steps]
        unused = self.config.clicks + 1 - len(steps)
        return Trace(
            self.item.dataset,
            self.item.name,
            name,
            self.seed,
            self.prompt,
            tuple(step.click for step in steps if step.click),
            tuple(dice + dice[-1:] * unused),
            tuple(nsd + nsd[-1:] * unused),
            tuple(step.seconds for step in steps),
            tuple(step.cpu for step in steps),
            tuple(step.encoded for step in steps),
            self.item.reference.voxels,
        )

    def _steps(self, answer: Answer, models: "Models") -> Iterator["_Step"]:
        prompts: tuple[Prompt, ...] = (world_box(models.scene, self.prompt),)
        clicks: tuple[Click, ...] = ()
        region: Region | None = None
        while True:
            target = Target(prompts, self.item.axis, self.limits, region, 0 if region is None else 1)
            asked = Question(models, target, self.prompt, clicks, self.item.reference, self.seed)
            step = _timed(answer, asked, clicks[-1] if clicks else None)
            region = step.region
            dice, nsd = self._score(region)
            yield replace(step, dice=dice, nsd=nsd)
            click = self._click(region, len(clicks)) if len(clicks) < self.config.clicks else None
            if click is None:
                return
            clicks = (*clicks, click)
            prompts = (*prompts, world_point(models.scene, click, self.item.axis))

    def _click(self, region: Region, number: int) -> Click | None:
        return next_click(
            self.item.reference,
            region,
            self.item.axis,
            _hand(self.item, self.seed, number + 1),
            self.config.click_jitter_mm,
            self.item.volume.spacing,
            self.config.aim,
        )

    def _score(self, region: Region) -> tuple[float, float]:
        pair = cut_pair(self.item.reference, region)
        assert pair is not None  # the reference has voxels
        both = np.count_nonzero(pair.reference & pair.prediction)
        dice = 2 * both / (np.count_nonzero(pair.reference) + np.count_nonzero(pair.prediction))
        distances = surface_distances(pair.reference, pair.prediction, self.item.volume.spacing)
        return float(dice), distances.nsd(self.config.nsd_mm)


@dataclass(frozen=True, eq=False)
class _Step:
    region: Region
    click: Click | None
    seconds: float
    cpu: float
    encoded: int
    dice: float = 0.0
    nsd: float = 0.0


def _timed(answer: Answer, asked: Question, click: Click | None) -> _Step:
    before = encoder_calls(asked.models)
    wall, cpu = time.perf_counter(), time.process_time()
    region = answer(asked)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return _Step(region, click, wall, cpu, encoder_calls(asked.models) - before)


def encoder_calls(models: "Models") -> int:
    """Return how many slices the networks of a scene have encoded so far."""
    return sum(int(getattr(predictor, "encoded", 0)) for predictor in models.ready.values())
