"""One slice, or a rectangle of one, at a time: what is asked of a promptable network and what it answers.

Clicks for networks that know boxes only
----------------------------------------
LiteMedSAM and MedSAM were trained with boxes. A click alone gives them an empty mask, and a click beside a
box shrinks the mask whatever its sign. So :class:`SliceSegmenter` never shows them a click. What it knows
becomes a box and a mask, in this order:

1. No box: that of the mask, if there is one. No mask either: squares of several sizes around the positive
   clicks are asked together; the best answer that holds every positive and no negative click gives the box.
   Only negative clicks: an empty mask.
2. A positive click outside the box widens the box to hold it.
3. If there are clicks, the mask so far (given, or the answer to the box alone) is painted at them with discs
   of certain logits, and the network is asked with box and mask, which it does understand.
4. Its answer is corrected at the clicks it still gets wrong, within a disc of the same size.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medseg.errors import ConfigError, DataError
from medseg.infer.runtime import Precision, choose_runtime
from medseg.nets.sam import Sam
from medseg.nets.tinyvit import fold
from medseg.prompt.embeddings import EmbeddingCache, embedding_key
from medseg.prompt.frame import CERTAIN, Frame, prepare
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.types import BoolArray, FloatArray

Edges = tuple[float, float, float, float]  # first row, first column, end row, end column; voxel edges

# Side of the input in pixels where it is not the one of training.
DEFAULT_SIZES = {"mobile-sam": 512}
# Goes into the keys of embeddings: to be raised when the same slice gives another embedding.
_VERSION = 1
# For clicks shown to a network of boxes: sides of the squares that are tried, and the radius of a disc, in
# parts of the side of the input.
_SQUARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_DISC = 1 / 64


@dataclass(frozen=True, eq=False)
class SlicePrompts:
    """What is known on one slice.

    Attributes
    ----------
    points : (n, 2) float
        Clicks as (row, column); voxel centres are whole numbers.
    positive : (n,) bool
        Whether each lies inside the object.
    box : (float, float, float, float), optional
        First row, first column, end row, end column, as voxel edges: voxel r covers r - 0.5 to r + 0.5.
    mask : (rows, columns) float, optional
        Logits of the whole slice, or of the field that is asked about.
    """

    points: FloatArray = field(default_factory=lambda: np.zeros((0, 2)))
    positive: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    box: Edges | None = None
    mask: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class SliceMask:
    """The answer.

    Attributes
    ----------
    logits : (rows, columns) float32
        Of `field`; above 0 is inside.
    field : Rectangle
        The part of the slice that was looked at.
    score : float
        IoU with the truth that the network itself expects, 0 to 1.
    """

    logits: FloatArray
    field: Rectangle
    score: float

    def mask(self, shape: tuple[int, int]) -> BoolArray:
        """Return the mask of the whole slice of `shape`."""
        mask = np.zeros(shape, dtype=bool)
        mask[self.field[0] : self.field[2], self.field[1] : self.field[3]] = self.logits > 0
        return mask


class SliceSegmenter:
    """A promptable network in front of one image; embeddings are computed once a slice and field.

    Parameters
    ----------
    model : in evaluation; not changed
    scene : the image
    cache : of embeddings, which may be shared by segmenters; by default one of its own, in memory
    size : side of the network's input in pixels; by default what `DEFAULT_SIZES` or the network says
    precision : of the encoder; auto is bf16 where the processor has it. The decoder is always fp32.

    Attributes
    ----------
    encoded : int
        How often the encoder ran.

    Raises
    ------
    ConfigError
        `size` is not a multiple of 4 strides of the network, or the precision is unknown.
    """

    def __init__(
        self,
        model: Sam,
        scene: Scene,
        cache: EmbeddingCache | None = None,
        size: int | None = None,
        precision: Precision = "auto",
    ) -> None:
        self.model = model
        self.scene = scene
        self.cache = EmbeddingCache() if cache is None else cache
        self.size = size or DEFAULT_SIZES.get(model.spec.name, model.spec.size)
        if self.size % model.stride or self.size < 4 * model.stride:
            raise ConfigError(
                f"size {self.size} of {model.spec.name}: expected a multiple of {model.stride}, at least "
                f"{4 * model.stride}. It was trained at {model.spec.size}."
            )
        self.device = next(model.parameters()).device
        self.autocast = choose_runtime(self.device.type, precision).autocast
        self.encoded = 0
        self._encoder: nn.Module | None = None
        self._digest = _digest(model.image_encoder)

    def predict(
        self,
        axis: int,
        index: int,
        prompts: SlicePrompts,
        field: Rectangle | None = None,
        multimask: bool | None = None,
    ) -> SliceMask:
        """Answer prompts on slice `index` across `axis`.

        Parameters
        ----------
        field : part of the slice that is looked at; a small one is a zoom. Points outside it are left out,
            boxes are cut to it.
        multimask : take the best-scored of the three masks for ambiguous prompts instead of the one mask. By
            default not: SAM's authors advise it for a single click, but on medical slices the score picks
            the wrong one (Dice of a click 0.37 to 0.48 instead of 0.50 to 0.61 in MobileSAM's five sizes,
            `tests/benchmarks/sam_sizes.py`).

        Raises
        ------
        DataError
            The slice or the field does not exist, or nothing is asked.
        """
        field = self.field(axis, index, field)
        frame = self.frame(field)
        asked = _cut(prompts, field, plane_size(self.scene.shape, axis))
        if asked.box is None and asked.mask is None and not len(asked.points):
            raise DataError(
                f"slice {index} across axis {axis}: nothing is asked. Give a click, a box or a mask."
            )
        embedding = self.embed(axis, index, field)
        if "point" in self.model.spec.understands:
            logits, scores = self._ask(embedding, frame, asked, bool(multimask))
        else:
            logits, scores = self._ask_boxes(embedding, frame, asked)
        best = int(np.argmax(scores))
        return SliceMask(logits[best], field, float(np.clip(scores[best], 0, 1)))

    def embed(self, axis: int, index: int, field: Rectangle | None = None) -> Tensor:
        """Return the embedding of a slice or field, (1, 256, h, w) float32, computed if it is not cached."""
        field = self.field(axis, index, field)
        key = embedding_key(
            version=_VERSION,
            scene=self.scene.digest,
            window=self.scene.window,
            axis=axis,
            index=index,
            field=field,
            model=self._digest,
            size=self.size,
            precision=str(self.autocast),
        )
        found = self.cache.get(key)
        if found is None:
            found = self._encode(axis, index, field)
            self.cache.put(key, found)
        return found.to(self.device, torch.float32)

    def frame(self, field: Rectangle) -> Frame:
        """Return how a field lies in the input of the network."""
        shape = (field[2] - field[0], field[3] - field[1])
        return Frame.of(self.model.spec, shape, self.size)

    def field(self, axis: int, index: int, field: Rectangle | None = None) -> Rectangle:
        """Return `field`, or the whole slice, after a check that it exists."""
        rows, columns = plane_size(self.scene.shape, axis)
        slices = self.scene.shape[axis]
        if not 0 <= index < slices:
            raise DataError(
                f"slice {index} across axis {axis}: the volume has slices 0 to {slices - 1} there."
            )
        if field is None:
            return (0, 0, rows, columns)
        if not (0 <= field[0] < field[2] <= rows and 0 <= field[1] < field[3] <= columns):
            raise DataError(f"field {field}: does not lie in a slice of {rows} rows and {columns} columns.")
        return field

    def _encode(self, axis: int, index: int, field: Rectangle) -> Tensor:
        image = prepare(self.scene.slice(axis, index, field), self.model.spec, self.frame(field))
        if self._encoder is None:
            self._encoder = fold(self.model.image_encoder)
        self.encoded += 1
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
            ),
        ):
            found: Tensor = self._encoder(image.to(self.device))
        return found.contiguous().cpu()

    def _ask(
        self, embedding: Tensor, frame: Frame, asked: SlicePrompts, multimask: bool = False
    ) -> tuple[FloatArray, FloatArray]:
        """Return logits (masks, rows, columns) and scores (masks,)."""
        points = signs = box = mask = None
        if len(asked.points):
            points = self._tensor(frame.points(asked.points))
            signs = self._tensor(asked.positive)
        if asked.box is not None:
            box = self._tensor(frame.box(asked.box))
        if asked.mask is not None:
            mask = frame.mask(asked.mask, 4 * embedding.shape[-1]).to(self.device)
        with torch.no_grad():
            low, scores = self.model.decode(
                embedding, points=points, signs=signs, box=box, mask=mask, multimask=multimask
            )
        return frame.logits(low[0].cpu()), scores[0].cpu().numpy()

    def _ask_boxes(
        self, embedding: Tensor, frame: Frame, asked: SlicePrompts
    ) -> tuple[FloatArray, FloatArray]:
        """Ask a network that knows boxes only; the steps are those of this module's text."""
        box = asked.box
        if box is None and asked.mask is not None and (asked.mask > 0).any():
            box = _box_of(asked.mask > 0)
        if box is None and asked.positive.any():
            box = self._box_at_clicks(embedding, frame, asked)
        if box is None:
            return np.full((1, *frame.shape), -CERTAIN, dtype=np.float32), np.zeros(1)
        box = _widened(box, asked.points[asked.positive])
        if not len(asked.points):
            return self._ask(embedding, frame, SlicePrompts(box=box, mask=asked.mask))
        mask = asked.mask
        if mask is None:
            mask = self._ask(embedding, frame, SlicePrompts(box=box))[0][0]
        radius = max(1.0, _DISC * max(frame.shape))
        painted = _painted(mask, asked, radius)
        logits, scores = self._ask(embedding, frame, SlicePrompts(box=box, mask=painted))
        return _corrected(logits[0], asked, radius)[None], scores

    def _box_at_clicks(self, embedding: Tensor, frame: Frame, asked: SlicePrompts) -> Edges | None:
        """Return the box of the best answer to squares around the positive clicks."""
        clicks = asked.points[asked.positive]
        squares = [_square(clicks, side * max(frame.shape), frame.shape) for side in _SQUARES]
        boxes = self._tensor(np.concatenate([frame.box(square) for square in squares])).view(-1, 4)
        with torch.no_grad():
            low, scores = self.model.decode(embedding, box=boxes)
        best: tuple[float, Edges] | None = None
        for square, each, score in zip(squares, low[:, :1].cpu(), scores[:, 0].tolist(), strict=True):
            mask = frame.logits(each)[0] > 0
            wrong = int((_at(mask, asked.points) != asked.positive).sum())
            found = (score - wrong, _box_of(mask) if mask.any() else square)
            if best is None or found[0] > best[0]:
                best = found
        return None if best is None else best[1]

    def _tensor(self, values: FloatArray | BoolArray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values)[None], dtype=torch.float32, device=self.device)


def _digest(encoder: nn.Module) -> str:
    """Return a hash of the weights that an embedding depends on."""
    found = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _cut(prompts: SlicePrompts, field: Rectangle, shape: tuple[int, int]) -> SlicePrompts:
    """Move prompts into a field of a slice of `shape`."""
    origin = np.array(field[:2])
    size = np.array(field[2:]) - origin
    points = np.asarray(prompts.points, dtype=np.float64).reshape(-1, 2) - origin
    inside = ((points >= -0.5) & (points < size - 0.5)).all(axis=1)
    box = None
    if prompts.box is not None:
        edges = np.array(prompts.box) - np.tile(origin, 2)
        limits = np.tile(size - 0.5, 2)
        first_row, first_column, end_row, end_column = np.clip(edges, -0.5, limits).tolist()
        box = (first_row, first_column, end_row, end_column)
        if first_row >= end_row or first_column >= end_column:
            raise DataError(f"box {prompts.box}: has no area within the field {field}. Draw it again.")
    mask = prompts.mask
    if mask is not None and mask.shape == shape:
        mask = mask[field[0] : field[2], field[1] : field[3]]
    if mask is not None and mask.shape != tuple(size):
        raise DataError(
            f"mask of shape {mask.shape}: expected {shape} (the slice) or {tuple(size)} (the field)."
        )
    return SlicePrompts(points[inside], np.asarray(prompts.positive, dtype=bool)[inside], box, mask)


def _box_of(mask: BoolArray) -> Edges:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (rows[0] - 0.5, columns[0] - 0.5, rows[-1] + 0.5, columns[-1] + 0.5)


def _widened(box: Edges, clicks: FloatArray) -> Edges:
    """Return the box grown to hold the voxels of clicks."""
    if not len(clicks):
        return box
    first = np.minimum(box[:2], clicks.min(axis=0) - 0.5)
    last = np.maximum(box[2:], clicks.max(axis=0) + 0.5)
    return (float(first[0]), float(first[1]), float(last[0]), float(last[1]))


def _square(clicks: FloatArray, side: float, shape: tuple[int, int]) -> Edges:
    """Return a square of `side` around the middle of clicks that holds them all, cut to the field."""
    middle = (clicks.min(axis=0) + clicks.max(axis=0)) / 2
    half = max(side / 2, 1.0)
    edges = _widened((middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half), clicks)
    limits = np.array([*shape, *shape]) - 0.5
    first_row, first_column, end_row, end_column = np.clip(edges, -0.5, limits).tolist()
    return (first_row, first_column, end_row, end_column)


def _at(mask: BoolArray, points: FloatArray) -> BoolArray:
    """Return the mask at the voxels in which points lie."""
    places = np.clip(np.rint(points).astype(int), 0, np.array(mask.shape) - 1)
    return np.asarray(mask[places[:, 0], places[:, 1]])


def _disc(shape: tuple[int, ...], point: FloatArray, radius: float) -> BoolArray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - point[0]) ** 2 + (columns - point[1]) ** 2 <= radius**2)


def _painted(logits: FloatArray, asked: SlicePrompts, radius: float) -> FloatArray:
    """Return logits that are certain around each click; a later click is painted over an earlier one."""
    painted = np.array(logits, dtype=np.float32)
    for point, positive in zip(asked.points, asked.positive, strict=True):
        painted[_disc(painted.shape, point, radius)] = CERTAIN if positive else -CERTAIN
    return painted


def _corrected(logits: FloatArray, asked: SlicePrompts, radius: float) -> FloatArray:
    """Return logits that are right at each click: around those that are not, they are painted."""
    wrong = _at(logits > 0, asked.points) != asked.positive
    return _painted(logits, SlicePrompts(asked.points[wrong], asked.positive[wrong]), radius)
