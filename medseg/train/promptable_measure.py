"""How well a network answers a simulated user on slices of held-out cases: a jittered box, then clicks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medseg import log
from medseg.io import Case
from medseg.labels import LabelSet
from medseg.nets.sam import Sam
from medseg.prompt.embeddings import EmbeddingCache
from medseg.prompt.segmenter import SlicePrompts, SliceSegmenter
from medseg.prompt.simulate import draw_box, next_click
from medseg.train.promptable_config import PromptableConfig
from medseg.train.promptable_samples import ObjectOnSlice, TuneCase, drawn_for, field_of, open_case
from medseg.types import BoolArray


@dataclass(frozen=True)
class Measured:
    """Dice on slices.

    Attributes
    ----------
    cases : names of the cases that were measured
    rows : (label, Dice after the box, after 1, 2, ... clicks) of each object on a slice
    seconds : that it took
    """

    cases: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    seconds: float

    def mean(self, label: str | None = None) -> list[float]:
        """Return the mean Dice after the box and after each click, over all objects or those of a label."""
        chosen = [dice for name, dice in self.rows if label in (None, name)]
        return [round(float(value), 5) for value in np.mean(chosen, axis=0)] if chosen else []

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        names = sorted({label for label, _ in self.rows})
        return {
            "objects": len(self.rows),
            "dice": self.mean(),
            "labels": {name: self.mean(name) for name in names},
        }


def measure(
    model: Sam,
    cases: Sequence[Case],
    labels: LabelSet,
    config: PromptableConfig,
    cache: EmbeddingCache,
    limit_seconds: float | None = None,
) -> Measured:
    """Point at objects on slices of `cases`, and click into errors.

    Boxes and the places at which clicks miss are drawn from the seed and the case, so two networks meet the
    same user.

    Parameters
    ----------
    limit_seconds : after so much time the remaining cases are left out; at least one is measured
    """
    began = time.monotonic()
    rows: list[tuple[str, tuple[float, ...]]] = []
    done: list[str] = []
    for case in log.progress(cases, "Measuring prompts on held-out cases"):
        if done and limit_seconds is not None and time.monotonic() - began > limit_seconds:
            continue
        opened = open_case(case, labels, config)
        segmenter = SliceSegmenter(model, opened.scene, cache, config.size, config.precision)
        for index in _spread(opened.slices(config.least_voxels), config.val_slices):
            for number, found in enumerate(opened.objects(index, config)):
                log.check_cancelled()
                generator = drawn_for(case.name, config, index, number)
                rows.append((found.label, _ask(segmenter, opened, found, config, generator)))
        done.append(case.name)
    return Measured(tuple(done), tuple(rows), time.monotonic() - began)


def _spread(slices: Sequence[int], count: int) -> list[int]:
    """Return `count` slices in even steps, none at the very ends."""
    places = (np.arange(count) + 0.5) * len(slices) / count
    return sorted({slices[int(place)] for place in places}) if slices else []


def _ask(
    segmenter: SliceSegmenter,
    case: TuneCase,
    found: ObjectOnSlice,
    config: PromptableConfig,
    generator: np.random.Generator,
) -> tuple[float, ...]:
    """Return Dice after the box and after each click."""
    box = draw_box(found.mask, config.box_jitter, generator)
    field = field_of(found.mask, case.plane, config.views[0])
    prompts = SlicePrompts(box=box)
    scores = []
    for clicks in range(config.val_clicks + 1):
        answer = segmenter.predict(case.axis, found.index, prompts, field)
        mask = answer.mask(case.plane)
        scores.append(dice(mask, found.mask))
        if clicks == config.val_clicks:
            break
        click = next_click(
            found.mask[..., None],
            mask[..., None],
            generator=generator,
            jitter=config.click_jitter_mm,
            spacing=(*case.spacing, 1.0),
        )
        if click is not None:  # else it is perfect, and stays so
            points = np.concatenate([prompts.points, [click.voxel[:2]]])
            positive = np.append(prompts.positive, click.positive)
            prompts = replace(prompts, points=points, positive=positive, mask=answer.logits)
    return tuple(scores)


def dice(found: BoolArray, reference: BoolArray) -> float:
    """Return 2 |A and B| / (|A| + |B|) of a reference that is not empty."""
    both = np.count_nonzero(found & reference)
    return float(2 * both / (np.count_nonzero(found) + np.count_nonzero(reference)))
