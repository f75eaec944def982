"""Asking slice after slice: by LiteMedSAM's boxes, and by masks or points in a crop that follows the object.

Sources: ``CVPR24_LiteMedSAM_infer.py`` (bowang-lab/MedSAM, branch LiteMedSAM) for `box`; the projections of
``segment_mask_in_volume`` of micro-sam (Archit et al., Nature Methods 2025) for `mask` and `points`.
The walk is that of :mod:`medseg.prompt.travel`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from pydantic import Field

from medseg.config import Config
from medseg.prompt import rasterise
from medseg.prompt.rasterise import SURE, SliceBox, mask_box
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.prompt.segmenter import SliceMask, SlicePrompts
from medseg.prompt.target import Propagation, Target
from medseg.prompt.travel import Ask, Seen, Stops, Travel, components, travel
from medseg.types import BoolArray, FloatArray, PathLike

if TYPE_CHECKING:
    from medseg.nets.sam import Sam
    from medseg.prompt.embeddings import EmbeddingCache


# Side of the input of published weights, for the crop of a slice: a quarter of that of their training.
CLICK_SIZE = 256


class Predictor(Protocol):
    """What a slice is asked of: :class:`medseg.prompt.segmenter.SliceSegmenter`, or a stand-in."""

    def predict(
        self,
        axis: int,
        index: int,
        prompts: SlicePrompts,
        field: Rectangle | None = None,
        multimask: bool | None = None,
    ) -> SliceMask:
        """Answer prompts on one slice."""
        ...


@dataclass(eq=False)
class Models:
    """The networks that look at one scene, each loaded when it is first asked.

    Attributes
    ----------
    scene : Scene
    cache : EmbeddingCache, optional
        Shared by all networks; None: each slice is encoded at each question.
    lite, clicks : str
        Assets that answer boxes, and clicks.
    given : mapping of asset name to path
        Files to use instead of downloads.
    click_size : int, optional
        Side of the input of the network of clicks, which looks at a crop around the object. None: that of
        its fine-tuning, or 256.
    ready : dict
        Predictors by (asset, size), as they are made; tests put theirs here.
    used : set of str
        Assets whose networks have looked at the scene.
    """

    scene: Scene
    cache: "EmbeddingCache | None" = None
    lite: str = "lite-medsam"
    clicks: str = "mobile-sam"
    given: Mapping[str, PathLike] = field(default_factory=dict)
    click_size: int | None = None
    ready: dict[tuple[str, int | None], Predictor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    _weights: "dict[str, Sam]" = field(default_factory=dict)
    _sizes: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        scene: Scene,
        cache: "EmbeddingCache | None" = None,
        lite: str = "lite-medsam",
        clicks: str = "mobile-sam",
        given: Mapping[str, PathLike] | None = None,
    ) -> "Models":
        """Name the networks for a scene; nothing is loaded yet. `given` are files by asset name."""
        return cls(scene, cache, lite, clicks, given or {})

    def of(self, scene: Scene) -> "Models":
        """Return the same networks for another scene; what is loaded is shared."""
        return replace(self, scene=scene, ready={}, used=set())

    @property
    def box_segmenter(self) -> Predictor:
        """The network of boxes, at its own input size."""
        return self.segmenter(self.lite)

    @property
    def click_segmenter(self) -> Predictor:
        """The network that understands clicks and masks too."""
        return self.segmenter(self.clicks, self.click_size, CLICK_SIZE)

    def segmenter(self, asset: str, size: int | None = None, published: int | None = None) -> Predictor:
        """Return the network of an asset for this scene.

        Parameters
        ----------
        asset : name
        size : side of its input; None: that at which it was fine-tuned
        published : side of the input of weights that are as published; None: the network's own

        Raises
        ------
        AssetError
            Its weights cannot be had.
        BundleError
            The file holds something else.
        """
        size = size or self.tuned_size(asset) or published
        self.used.add(asset)
        if (asset, size) not in self.ready:
            from medseg.prompt.segmenter import SliceSegmenter

            self.ready[asset, size] = SliceSegmenter(self.weights(asset), self.scene, self.cache, size)
        return self.ready[asset, size]

    def tuned_size(self, asset: str) -> int | None:
        """Return the side of the input that the weights given for an asset were fine-tuned at; else None.

        Raises
        ------
        BundleError
            They are a damaged bundle.
        """
        if asset not in self._sizes:
            from medseg.nets.sam_bundle import is_tuned, read_card

            given = self.given.get(asset)
            self._sizes[asset] = read_card(given).size if given is not None and is_tuned(given) else None
        return self._sizes[asset]

    def weights(self, asset: str) -> "Sam":
        """Return the network of an asset, loaded once."""
        if asset not in self._weights:
            from medseg import assets
            from medseg.nets.sam import load_sam

            self._weights[asset] = load_sam(self.path(asset), asset if asset in assets.ASSETS else None)
        return self._weights[asset]

    def path(self, asset: str) -> Path:
        """Return the verified file of an asset, or the one that was given in its place."""
        from medseg import assets

        self.used.add(asset)
        given = self.given.get(asset)
        return Path(given) if given is not None else assets.find(asset)


# Chosen by a grid over six rules on five expert-labelled objects (sarcoma in CT and MR, brain tumour, both
# parts of a hippocampus), one drawn box each, and quoted on these same objects, so optimistic. Mean 3D Dice
# of `box` without a range: 0.42 where only an empty slice ends it; with one rule more at its best: IoU 0.45,
# growth 0.43, score 0.43, swell and contrast 0.42, drift 0.47; no mix was better. With the true range: 0.51.
BOX_STOPS = Stops(iou=0.4, drift=2.0)
# The same grid for `mask`, walked at most four slices beyond the object, which flatters rules that stop late:
# 0.47 empty slices only, 0.57 drift alone, 0.59 these. This lead over `box` did NOT hold on ten objects that
# had no part in the choice: 0.41 to 0.51 of `box` (hippocampus 0.45 both, MS lesions 0.39 to 0.55).
ZOOM_STOPS = Stops(iou=0.5, growth=2.0, swell=1.5, drift=1.0)
# Logits of the mask that is shown beside a click. The best of five ways to ask a clicked slice, on the same
# five objects, where it differs little: mean Dice after five clicks 0.61, with certain logits 0.60.
DOUBT = 1.0


class BoxConfig(Travel):
    """Settings of `box`, LiteMedSAM's own algorithm.

    Attributes
    ----------
    grow : int
        Pixels of the input that the box around the last mask grows on each side.
    size : int
        Side of the input.
    """

    stops: Stops = BOX_STOPS
    trust_limits: bool = True
    restart: bool = True
    grow: int = Field(3, ge=0)
    size: int = Field(256, ge=32)


def propagate_box(models: Models, target: Target, config: BoxConfig) -> Propagation:
    """Follow an object by boxes: that of each slice is the one around the last mask, 3 pixels larger.

    With a range of slices (limits, or a box in 3D) this is LiteMedSAM's script: from the middle to both ends,
    and after an empty slice the first box again. Without one it is the same until a stop rule ends it.
    """
    segmenter = models.segmenter(models.lite, config.size)
    scene, axis = models.scene, target.axis
    shape = plane_size(scene.shape, axis)
    boxes = rasterise.boxes(scene, target)

    def ask(index: int, given: SlicePrompts | None, expected: Seen | None) -> Seen:
        prompts = given or SlicePrompts()
        if prompts.box is None and expected is not None:
            box = grown(expected.mask, config) if expected.mask.any() else expected.box
            prompts = replace(prompts, box=box)
        if _says_nothing(prompts):
            return Seen(np.zeros(shape, dtype=bool), 0.0)
        parts = boxes.get(index, ())
        asked = [replace(prompts, box=box) for box in parts] if len(parts) > 1 else [prompts]
        return merged([segmenter.predict(axis, index, each) for each in asked], shape, prompts.box)

    return travel(scene, target, ask, config)


def grown(mask: BoolArray, config: BoxConfig) -> SliceBox:
    """Return the box around a mask as the network's input shows it, grown by some pixels of that.

    ``get_bbox256``: the mask is resized as the image is, and the box lies on whole pixels, between the first
    and the last one that is set.
    """
    from medseg.nets.sam import SPECS
    from medseg.prompt.frame import Frame, resize_area

    frame = Frame.of(SPECS["lite-medsam"], (mask.shape[0], mask.shape[1]), config.size)
    small = resize_area(mask.astype(np.uint8), frame.new) > 0
    if not small.any():
        return mask_box(mask)  # thinner than a pixel of the input; the script starts anew there
    top, left, bottom, right = mask_box(small)
    scale = config.size / max(mask.shape)
    # From pixels back to edges of voxels, a little inside of the pixel meant: its position will be cut.
    wide = max(scale - 1, 0.0)
    first = [max(0.0, edge + 0.5 - config.grow) / scale - 0.5 + 1e-6 for edge in (top, left)]
    last = [
        (min(float(config.size), edge - 0.5 + config.grow) - wide) / scale + 0.5 + 1e-6
        for edge in (bottom, right)
    ]
    return first[0], first[1], last[0], last[1]


def merged(answers: Sequence[SliceMask], shape: tuple[int, int], box: SliceBox | None) -> Seen:
    """Return the union of answers about parts of one slice, in whole-slice arrays."""
    logits = np.full(shape, -SURE, dtype=np.float32)
    scores, areas = [], []
    for answer in answers:
        part = logits[answer.field[0] : answer.field[2], answer.field[1] : answer.field[3]]
        np.maximum(part, np.clip(answer.logits, -SURE, SURE), out=part)
        scores.append(answer.score)
        areas.append(max(1, int(np.count_nonzero(answer.logits > 0))))
    return Seen(logits > 0, float(np.average(scores, weights=areas)), logits, box)


def _says_nothing(prompts: SlicePrompts) -> bool:
    return prompts.box is None and prompts.mask is None and not prompts.positive.any()


class Zoom(Config):
    """The crop that follows the object.

    Attributes
    ----------
    times : float
        Its side, as a multiple of the longer side of the object.
    least : int
        Least side in voxels.
    parts : int
        Most islands of the object on a slice that are asked about one by one.
    grow : float
        How much larger the box that is shown is than the last mask, as a part of its sides on each side; at
        least one voxel.
    """

    times: float = Field(2.0, ge=1)
    least: int = Field(48, ge=8)
    parts: int = Field(3, ge=1)
    grow: float = Field(0.05, ge=0)


class MaskConfig(Travel):
    """Settings of `mask`.

    Attributes
    ----------
    zoom : Zoom
    """

    stops: Stops = ZOOM_STOPS
    zoom: Zoom = Zoom()


class PointsConfig(Travel):
    """Settings of `points`.

    Attributes
    ----------
    zoom : Zoom
    inside, outside : int
        Most points in the last mask, and around it.
    box : bool
        Show the box too.
    """

    stops: Stops = ZOOM_STOPS
    zoom: Zoom = Zoom()
    inside: int = Field(6, ge=1)
    outside: int = Field(6, ge=0)
    box: bool = True


def propagate_mask(models: Models, target: Target, config: MaskConfig) -> Propagation:
    """Follow an object by the box around the last mask and its logits, in a crop that follows it."""
    ask = zoomed(models, target, config.zoom, lambda part: shown_mask(part, config.zoom))
    return travel(models.scene, target, ask, config)


def shown_mask(part: Seen, zoom: Zoom) -> SlicePrompts:
    """Return what is expected as a box with a margin and the logits."""
    return SlicePrompts(box=enlarged(part.mask, zoom), mask=part.logits)


def propagate_points(models: Models, target: Target, config: PointsConfig) -> Propagation:
    """Follow an object by points: the deepest of the last mask, and those around it."""

    def shown(part: Seen) -> SlicePrompts:
        box = enlarged(part.mask, config.zoom)
        inside = rasterise.deepest(part.mask, config.inside)
        outside = rasterise.deepest(_rest(part.mask, box), config.outside)
        signs = np.array([True] * len(inside) + [False] * len(outside), dtype=bool)
        return SlicePrompts(np.concatenate((inside, outside)), signs, box if config.box else None)

    return travel(models.scene, target, zoomed(models, target, config.zoom, shown), config)


def zoomed(models: Models, target: Target, zoom: Zoom, shown: Callable[[Seen], SlicePrompts]) -> Ask:
    """Return what answers a slice in a crop around the object; `shown` makes prompts of what is expected."""
    segmenter, scene, axis = models.click_segmenter, models.scene, target.axis
    shape = plane_size(scene.shape, axis)
    boxes = rasterise.boxes(scene, target)

    def ask(index: int, given: SlicePrompts | None, expected: Seen | None) -> Seen:
        if expected is not None and not expected.mask.any():
            expected = None
        if expected is None and (given is None or _says_nothing(given)):
            return Seen(np.zeros(shape, dtype=bool), 0.0)
        asked = _questions(given, expected, boxes.get(index, ()), zoom, shown)
        seen = _answers(segmenter, axis, index, asked, shape, zoom)
        return obeying(seen, given)

    return ask


def _questions(
    given: SlicePrompts | None,
    expected: Seen | None,
    boxes: Sequence[SliceBox],
    zoom: Zoom,
    shown: Callable[[Seen], SlicePrompts],
) -> list[SlicePrompts]:
    """Return what to ask of a slice; the union of the answers is the object."""
    if given is not None and (given.box is not None or given.mask is not None or expected is None):
        alone = len(boxes) > 1 and given.mask is None and not len(given.points)
        return [SlicePrompts(box=box) for box in boxes] if alone else [given]
    if expected is None:
        return []
    expected = replace(expected, logits=_logits(expected))
    clicks = [each for each in (given, expected.hints) if each is not None and len(each.points)]
    if not clicks:
        return [shown(part) for part in islands(expected, zoom.parts)]
    # Clicks on a slice where the object is known: one question, for a click may join two islands. What was
    # found before is in doubt then: its logits are shown small, so that clicks are heard.
    base = shown(expected)
    points = np.concatenate([base.points, *(each.points for each in clicks)])
    positive = np.concatenate([base.positive, *(each.positive for each in clicks)])
    box = None if base.box is None else widened(base.box, points[positive])
    mask = base.mask
    if mask is not None and given is not None and len(given.points):
        mask = np.clip(mask, -DOUBT, DOUBT)
    return [SlicePrompts(points, positive, box, mask)]


def _answers(
    segmenter: Predictor,
    axis: int,
    index: int,
    asked: Sequence[SlicePrompts],
    shape: tuple[int, int],
    zoom: Zoom,
) -> Seen:
    """Ask in one crop around everything; clicks alone first on the whole slice, to find how large to look."""
    only_clicks = len(asked) == 1 and asked[0].box is None and asked[0].mask is None
    if only_clicks:
        first = merged([segmenter.predict(axis, index, asked[0])], shape, None)
        if not first.mask.any():
            return first
        box = widened(enlarged(first.mask, zoom), asked[0].points[asked[0].positive])
        asked = [replace(asked[0], box=box, mask=first.logits)]
    field = crop_around([_extent(each) for each in asked], shape, zoom)
    boxes = [each.box for each in asked if each.box is not None]
    answers = [segmenter.predict(axis, index, each, field) for each in asked]
    return merged(answers, shape, boxes[0] if boxes else None)


def _logits(seen: Seen) -> FloatArray:
    if seen.logits is not None and np.array_equal(seen.logits > 0, seen.mask):
        return seen.logits
    return np.where(seen.mask, SURE, -SURE).astype(np.float32)


def islands(seen: Seen, most: int) -> Iterator[Seen]:
    """Split a mask into its components, the largest first; smaller ones beyond `most` go with the last."""
    parts = components(seen.mask)
    order = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable") + 1
    if len(order) < 2 or most < 2:
        yield seen
        return
    for n, label in enumerate(order[:most]):
        mine = parts == label if n < most - 1 else np.isin(parts, order[n:])
        logits = None if seen.logits is None else np.where(mine, seen.logits, -SURE).astype(np.float32)
        yield replace(seen, mask=mine, logits=logits)


def enlarged(mask: BoolArray, zoom: Zoom) -> SliceBox:
    """Return the box around a mask with a margin, within the slice."""
    top, left, bottom, right = mask_box(mask)
    rows = max(1.0, zoom.grow * (bottom - top))
    columns = max(1.0, zoom.grow * (right - left))
    return (
        max(-0.5, top - rows),
        max(-0.5, left - columns),
        min(mask.shape[0] - 0.5, bottom + rows),
        min(mask.shape[1] - 0.5, right + columns),
    )


def widened(box: SliceBox, points: FloatArray) -> SliceBox:
    """Return a box grown to hold the voxels of (n, 2) points."""
    if not len(points):
        return box
    low, high = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
    return (
        min(box[0], float(low[0])),
        min(box[1], float(low[1])),
        max(box[2], float(high[0])),
        max(box[3], float(high[1])),
    )


def _rest(mask: BoolArray, box: SliceBox) -> BoolArray:
    """Return what of a box, enlarged by half its sides, is not in the mask nor beside it."""
    from scipy.ndimage import binary_dilation

    rows, columns = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    rest = np.zeros_like(mask)
    top, left = max(0, round(box[0] - rows)), max(0, round(box[1] - columns))
    part = (slice(top, round(box[2] + rows)), slice(left, round(box[3] + columns)))
    rest[part] = ~binary_dilation(mask[part], iterations=2)
    return rest


def _extent(asked: SlicePrompts) -> SliceBox:
    """Return the box around everything that is asked."""
    box = asked.box
    if asked.mask is not None and (asked.mask > 0).any():
        found = mask_box(asked.mask > 0)
        box = found if box is None else _around([box, found])
    if len(asked.points) and (box is None or asked.positive.any()):
        inside = asked.points[asked.positive] if asked.positive.any() else asked.points
        box = widened(box or (*(inside[0] - 0.5), *(inside[0] + 0.5)), inside)
    assert box is not None, "a question without prompts"
    return box


def _around(boxes: Sequence[SliceBox]) -> SliceBox:
    low, high = np.array(boxes)[:, :2].min(axis=0), np.array(boxes)[:, 2:].max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def crop_around(boxes: Sequence[SliceBox], shape: tuple[int, int], zoom: Zoom) -> Rectangle:
    """Return the square crop to look at, within the slice.

    Its side is one of a ladder of sizes and its corner on a coarse lattice, so that an object that changes
    little is seen through the same crop, whose embedding is cached, after the next click.

    Examples
    --------
    >>> crop_around([(10.5, 20.5, 40.5, 44.5)], (100, 90), Zoom(times=2, least=48))
    (0, 0, 60, 60)
    """
    top, left, bottom, right = _around(boxes)
    wanted = max(zoom.times * max(bottom - top, right - left), zoom.least)
    # 1.25: six rungs to four times the size
    side = round(zoom.least * 1.25 ** np.ceil(np.log(wanted / zoom.least) / np.log(1.25) - 1e-9))
    lattice = max(1, side // 8)
    found = []
    for low, high, length in ((top, bottom, shape[0]), (left, right, shape[1])):
        start = int((low + high + 1) / 2 - side / 2) // lattice * lattice
        found.append(max(0, min(start, length - side)))
    return (
        found[0],
        found[1],
        min(shape[0], found[0] + side),
        min(shape[1], found[1] + side),
    )


def obeying(seen: Seen, given: SlicePrompts | None) -> Seen:
    """Return what was seen with the clicks that it does not obey painted in, as small discs."""
    if given is None or not len(given.points):
        return seen
    mask = seen.mask.copy()
    radius = max(1.0, 0.1 * float(np.sqrt(seen.area / np.pi)))
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for (row, column), positive in zip(rasterise.nearest(given.points), given.positive, strict=True):
        if mask[int(row), int(column)] != positive:
            mask[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = positive
    return seen if (mask == seen.mask).all() else replace(seen, mask=mask)
