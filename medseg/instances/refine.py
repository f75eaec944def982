"""Each object of a label map drawn anew by a SAM that is shown its box, slice by slice.

1. On every slice, each object's section is shown as its box (and a click in its deepest pixel, to networks
   that understand clicks) in a field a few objects wide.
2. Of the answer, the part that shares most with the section is a candidate. It is accepted if it is still
   the same object (`least_overlap`), and a mask that the network is sure of (`least_stability`,
   `least_score`). Else the section stays as it was.
3. A pixel that two objects claim belongs to a section that stayed, else to the candidate of higher logit,
   else to the lower number. So the result does not depend on any order.

An object whose pixels have all gone to its neighbours is dropped, and listed.

It helps coarse objects and does nothing for good ones, so it is never done unasked. On 10 held-out images of
Data Science Bowl 2018 (405 nuclei; TP / (TP + FP + FN) at IoU 0.5 / 0.7):

=============================  ===========  ============================  ==============
objects                        as found     LiteMedSAM (margin 0.1)       MobileSAM
=============================  ===========  ============================  ==============
Otsu and watershed             .455 / .243  .474 / .263                   .515 / .310
``nuclei2d``                   .677 / .428  .649 / .382                   .677 / .443
=============================  ===========  ============================  ==============

(``python -m tests.benchmarks.instances.nuclei 2d DATA --first 10 --most-pixels 160000 --refine mobile-sam``)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy import ndimage

from medseg.config import Config
from medseg.errors import GeometryError
from medseg.geometry.orient import to_ras
from medseg.infer.runtime import count_threads, torch_threads
from medseg.instances.dropped import Dropped
from medseg.instances.sam import grey_scene
from medseg.log import progress
from medseg.prompt.automatic import restore_labels
from medseg.prompt.results import Networks
from medseg.prompt.scene import Rectangle
from medseg.prompt.segmenter import SliceSegmenter
from medseg.prompt.session import choose_axis
from medseg.types import BoolArray, FloatArray, IntArray, PathLike
from medseg.volume import Volume

NO_MASK = "the network draws nothing there"
COVERED = "all of it is their neighbours' after refinement"
_EIGHT = np.ones((3, 3), bool)


class RefineConfig(Config):
    """What is shown, and what is accepted.

    Attributes
    ----------
    least_overlap : IoU of a new section with the old one
    least_stability : IoU of the masks at thresholds one logit higher and lower
    least_score : IoU with the truth that the network itself expects
    margin : how much larger than the section the box is on each side, as a part of its side
    times : side of the field that is looked at, in sides of a usual object
    least_field : and at least so many voxels
    click : show a click, too, where the network understands it
    size : side of the network's input; None: its own
    batch : objects that are asked at once
    """

    least_overlap: float = Field(0.5, ge=0, le=1)
    least_stability: float = Field(0.8, ge=0, le=1)
    least_score: float = Field(0.5, ge=0, le=1)
    margin: float = Field(0.0, ge=0)
    times: float = Field(8.0, ge=1)
    least_field: int = Field(64, ge=16)
    click: bool = True
    size: int | None = Field(None, ge=32)
    batch: int = Field(32, ge=1)


class Section(NamedTuple):
    """An object on one slice: number, box (first row, first column, end row, end column), mask in its box."""

    label: int
    box: Rectangle
    mask: BoolArray


class Candidate(NamedTuple):
    """What a network draws for a section: where it begins in the slice, logits (outside: -inf), its score."""

    section: Section
    origin: tuple[int, int]
    logits: FloatArray
    score: float


@dataclass(frozen=True, eq=False)
class Refined:
    """A label map with its objects drawn anew.

    Attributes
    ----------
    labels : (i, j, k) int32
        With the numbers that the objects had.
    accepted : int
        Sections that were drawn anew; each object of a picture is one.
    stayed : tuple of Dropped
        Sections that stayed as they were, and why.
    dropped : tuple of Dropped
        Objects that are gone.
    """

    labels: IntArray
    accepted: int
    stayed: tuple[Dropped, ...]
    dropped: tuple[Dropped, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain data for the provenance of a result."""
        stayed = [{"rule": d.rule, "sections": d.count, "voxels": d.voxels} for d in self.stayed]
        return {"sections_accepted": self.accepted, "sections_as_before": stayed}


@dataclass(frozen=True, eq=False)
class Refiner:
    """A promptable network that draws objects anew.

    Attributes
    ----------
    name : of an asset
    weights : files to use instead of downloads, by asset
    threads : CPU threads
    config : RefineConfig
    """

    name: str
    weights: Mapping[str, PathLike] = field(default_factory=dict)
    threads: int | None = None
    config: RefineConfig = field(default_factory=RefineConfig)
    _networks: Networks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_networks", Networks(self.weights))

    def refine(self, image: Volume, labels: IntArray) -> Refined:
        """Draw each object of a label map anew.

        Parameters
        ----------
        image : Volume
            Grey or colour; a picture has one voxel along k.
        labels : (i, j, k) or, of a picture, (i, j)
            Any integers; 0 is background.

        Raises
        ------
        GeometryError
            They are of another shape than the image.
        AssetError
            The weights cannot be had.
        """
        given = labels.reshape(*labels.shape[:2], -1)
        if given.shape != image.shape:
            raise GeometryError(f"labels {labels.shape} of an image {image.shape}: resample them first.")
        scene = grey_scene(image)
        axis = choose_axis(scene, ())
        segmenter = self._networks(scene).segmenter(self.name, self.config.size)
        assert isinstance(segmenter, SliceSegmenter)
        turned = to_ras(image.with_array(given[None].astype(np.int32))).array[0]
        found = turned.copy()
        notes = Notes()
        with torch_threads(count_threads(self.threads)):
            for index in progress(range(scene.shape[axis]), "Refining"):
                flat = np.take(turned, index, axis)
                answers = ask_sections(segmenter, axis, index, sections_of(flat), self.config)
                where = tuple(index if a == axis else slice(None) for a in range(3))
                found[where] = settle(flat, answers, self.config, notes)
        result = restore_labels(scene, found).array[0].reshape(labels.shape)
        return Refined(result, notes.accepted, notes.listed(), list_gone(labels, result))


@dataclass(eq=False)
class Notes:
    """Counts while slices are refined: sections accepted, and sizes of those that stayed by their rule."""

    accepted: int = 0
    stayed: dict[str, list[int]] = field(default_factory=dict)

    def listed(self) -> tuple[Dropped, ...]:
        """Return what stayed."""
        return tuple(Dropped(rule, len(sizes), sum(sizes)) for rule, sizes in sorted(self.stayed.items()))


def sections_of(flat: IntArray) -> list[Section]:
    """Return the objects of a slice, ascending."""
    found = []
    for label, box in enumerate(ndimage.find_objects(flat), 1):
        if box is not None:
            rows, columns = box
            edges = (rows.start, columns.start, rows.stop, columns.stop)
            found.append(Section(label, edges, flat[box] == label))
    return found


def ask_sections(
    segmenter: SliceSegmenter, axis: int, index: int, sections: list[Section], config: RefineConfig
) -> Iterator[Candidate]:
    """Yield what the network draws for each section, field by field."""
    rows, columns = (n for a, n in enumerate(segmenter.scene.shape) if a != axis)
    for area, group in fields_of(sections, (rows, columns), config).items():
        embedding = segmenter.embed(axis, index, area)
        for start in range(0, len(group), config.batch):
            some = group[start : start + config.batch]
            yield from _draw(segmenter, embedding, area, some, config)


def fields_of(
    sections: list[Section], shape: tuple[int, int], config: RefineConfig
) -> dict[Rectangle, list[Section]]:
    """Return the fields to look at and what is in each: the one in whose middle a section lies.

    They are squares on a lattice of half their side, cut to the slice. What is larger than half a field is
    looked at in the whole slice.
    """
    if not sections:
        return {}
    longest = [max(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in sections]
    side = max(config.least_field, round(config.times * float(np.median(longest))))
    half = side // 2
    found: dict[Rectangle, list[Section]] = {}
    for section, length in zip(sections, longest, strict=True):
        area = (0, 0, *shape)
        if length <= half:
            middle = ((section.box[0] + section.box[2]) / 2, (section.box[1] + section.box[3]) / 2)
            top, left = (
                max(0, min(round((m - half) / half) * half, n - side))
                for m, n in zip(middle, shape, strict=True)
            )
            area = (top, left, min(top + side, shape[0]), min(left + side, shape[1]))
        found.setdefault(area, []).append(section)
    return found


def _draw(
    segmenter: SliceSegmenter,
    embedding: torch.Tensor,
    area: Rectangle,
    sections: list[Section],
    config: RefineConfig,
) -> Iterator[Candidate]:
    frame = segmenter.frame(area)
    clicks = config.click and "point" in segmenter.model.spec.understands
    boxes = np.stack([frame.box(_shown_box(s, area, config.margin)) for s in sections])
    points = np.stack([frame.points(_deepest(s) - np.array(area[:2])) for s in sections])
    with torch.no_grad():
        low, scores = segmenter.model.decode(
            embedding,
            points=torch.as_tensor(points, dtype=torch.float32, device=segmenter.device) if clicks else None,
            signs=torch.ones(len(sections), 1, device=segmenter.device) if clicks else None,
            box=torch.as_tensor(boxes, dtype=torch.float32, device=segmenter.device),
        )
    logits = frame.logits(low[:, 0].cpu())
    for section, drawn, score in zip(sections, logits, scores[:, 0].tolist(), strict=True):
        yield _candidate(section, drawn, area, float(score))


def _candidate(section: Section, drawn: FloatArray, area: Rectangle, score: float) -> Candidate:
    """Cut the drawing to the section's surroundings: nothing of the object is further than its own side."""
    top, left, bottom, right = section.box
    rows, columns = bottom - top, right - left
    first = (max(area[0], top - rows), max(area[1], left - columns))
    last = (min(area[2], bottom + rows), min(area[3], right + columns))
    part = drawn[first[0] - area[0] : last[0] - area[0], first[1] - area[1] : last[1] - area[1]]
    return Candidate(section, first, part.copy(), score)


def _shown_box(section: Section, area: Rectangle, margin: float) -> tuple[float, float, float, float]:
    top, left, bottom, right = section.box
    rows, columns = margin * (bottom - top), margin * (right - left)
    first, second = area[0] + 0.5, area[1] + 0.5
    return (top - rows - first, left - columns - second, bottom + rows - first, right + columns - second)


def _deepest(section: Section) -> FloatArray:
    """Return the pixel (row, column) that is furthest from the edge of a section; the first of equal ones."""
    depth = ndimage.distance_transform_edt(np.pad(section.mask, 1))[1:-1, 1:-1]
    place = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return np.array([[section.box[0] + place[0], section.box[1] + place[1]]], np.float64)


def settle(flat: IntArray, answers: Iterator[Candidate], config: RefineConfig, notes: Notes) -> IntArray:
    """Return a slice on which each section is its candidate, if that is accepted, else as it was."""
    owner = np.zeros_like(flat)
    best = np.full(flat.shape, -np.inf, np.float32)
    accepted = []
    for answer in answers:
        mask = _part_of(answer)
        rule = _refusal(answer, mask, config)
        if rule is None:
            accepted.append((answer, mask))
            continue
        section = answer.section
        notes.stayed.setdefault(rule, []).append(int(section.mask.sum()))
        here = (slice(section.box[0], section.box[2]), slice(section.box[1], section.box[3]))
        owner[here][section.mask] = section.label
        best[here][section.mask] = np.inf
    notes.accepted += len(accepted)
    for answer, mask in sorted(accepted, key=lambda pair: pair[0].section.label):
        top, left = answer.origin
        here = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        better = mask & (answer.logits > best[here])
        owner[here][better] = answer.section.label
        best[here][better] = answer.logits[better]
    return owner


def _old_mask(answer: Candidate) -> BoolArray:
    """Return the section on the pixels of its candidate."""
    old = np.zeros(answer.logits.shape, bool)
    top, left = answer.section.box[0] - answer.origin[0], answer.section.box[1] - answer.origin[1]
    rows, columns = answer.section.mask.shape
    old[top : top + rows, left : left + columns] = answer.section.mask
    return old


def _part_of(answer: Candidate) -> BoolArray:
    """Return the connected part of a drawing that shares most with the section, its holes filled."""
    parts, count = ndimage.label(answer.logits > 0, _EIGHT)
    shared = np.bincount(parts[_old_mask(answer)], minlength=count + 1)
    shared[0] = 0
    if not shared.any():
        return np.zeros(parts.shape, bool)
    return np.asarray(ndimage.binary_fill_holes(parts == int(np.argmax(shared))))


def _refusal(answer: Candidate, mask: BoolArray, config: RefineConfig) -> str | None:
    """Return why a candidate is not accepted; None: it is."""
    if not mask.any():
        return NO_MASK
    old = _old_mask(answer)
    if np.count_nonzero(mask & old) < config.least_overlap * np.count_nonzero(mask | old):
        return f"IoU with the old section below {config.least_overlap:g}"
    surely = np.count_nonzero(answer.logits > 1)
    if surely < config.least_stability * np.count_nonzero(answer.logits > -1):
        return f"stability below {config.least_stability:g}"
    if answer.score < config.least_score:
        return f"expected IoU below {config.least_score:g}"
    return None


def list_gone(before: IntArray, after: IntArray) -> tuple[Dropped, ...]:
    """Return the objects that are in one label map and not in the other."""
    lost = np.setdiff1d(np.unique(before), np.unique(after))
    if not lost.size:
        return ()
    return (Dropped(COVERED, len(lost), int(np.isin(before, lost).sum())),)
