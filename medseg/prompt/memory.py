"""SAM 2 and MedSAM2: an object is followed by what the network remembers of it, not by boxes or clicks.

Each slice is looked at with the memories of the prompted slices, of the last ones in the direction of
travel, and with the object's pointers; where the network's object score is not above 0, the object is absent.
Memories lie in a ring of fixed length and no slice is kept, so a long volume needs no more memory than a
short one. The walk, its stops and what a correction changes are :mod:`medseg.prompt.travel`'s: from every
prompted slice in both directions, with a ring of its own for each, as MedSAM2 resets its state between its
two passes (``medsam2_infer_3D_CT.py``).

The network sees a crop around the object. A crop that follows is moved only when the object nears its edge:
to the memory that is a moving camera, which SAM 2 was trained on. Clicks and boxes go to the pixels that hold
them, ``(x + 0.5) S / width - 0.5``; the reference scales ``x S / width``, half a voxel off where it enlarges.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medseg.infer.runtime import Precision, choose_runtime
from medseg.nets.sam2 import BOTTOM_RIGHT, TOP_LEFT, Answer, Features, Memory, Recall, prepare
from medseg.prompt import rasterise
from medseg.prompt.embeddings import EmbeddingCache, embedding_key
from medseg.prompt.rasterise import SURE, mask_box
from medseg.prompt.scene import Rectangle, Scene, plane_size
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.slicewise import Models, Zoom, crop_around, obeying, widened
from medseg.prompt.target import Propagation, Target
from medseg.prompt.travel import Seen, Stops, Travel, travel
from medseg.types import BoolArray, FloatArray

if TYPE_CHECKING:
    from medseg.nets.sam2 import Sam2

# A crop is moved when the object comes nearer to its edge than this part of its side,
_NEAR = 1 / 12
# or is smaller than this part of what the crop was made for.
_SHRUNK = 0.5


class MemoryConfig(Travel):
    """Settings of `memory`.

    Attributes
    ----------
    weights : str
        Asset, or a name under which a file was given: sam2.1-tiny, -small, -base-plus, -large, or medsam2.
    size : int
        Side of the network's input: SAM 2 was trained at 1024, MedSAM2 at 512; 256 suits a CPU.
    zoom : Zoom
        The crop around the object.
    follow : bool
        Move the crop with the object; else one crop around all prompts serves every slice.
    recent : int
        Slices of the direction of travel that are remembered; SAM 2 was trained with 6.
    prompted : int
        Prompted slices that are remembered: the next one on each side, then the nearest.
    pointers : int
        Slices whose object pointers are remembered; SAM 2 was trained with 16.
    precision : str
        Of the image encoder and the memory.
    """

    stops: Stops = Stops(empty=2)
    zoom: Zoom = Zoom()
    weights: str = "sam2.1-tiny"
    size: int = Field(256, ge=32, multiple_of=32)
    follow: bool = True
    recent: int = Field(6, ge=0, le=6)
    prompted: int = Field(4, ge=1)
    pointers: int = Field(16, ge=1, le=16)
    precision: Precision = "auto"


class MemoryNetwork(Protocol):
    """What slices are asked of: :class:`medseg.nets.sam2.Sam2`, or a stand-in."""

    def encode(self, image: Tensor) -> Features:
        """Look at one image."""
        ...

    def prompted(
        self, features: Features, points: FloatArray, labels: Iterable[int], logits: Tensor | None = None
    ) -> Answer:
        """Answer prompts."""
        ...

    def given(self, features: Features, mask: Tensor) -> Answer:
        """Take a mask for the answer."""
        ...

    def tracked(self, features: Features, recall: Recall) -> Answer:
        """Find the object by memories."""
        ...

    def remember(self, features: Features, answer: Answer, prompted: bool) -> Memory:
        """Make a memory."""
        ...


class Ring:
    """Memories of the last slices in one direction; older ones are let go."""

    def __init__(self, recent: int, pointers: int) -> None:
        self.memories: deque[tuple[int, Tensor]] = deque(maxlen=recent)
        self.pointers: deque[tuple[int, Tensor]] = deque(maxlen=pointers)

    def add(self, index: int, memory: Memory) -> None:
        """Remember a slice."""
        self.memories.append((index, memory.features))
        self.pointers.append((index, memory.pointer))


def propagate_memory(models: Models, target: Target, config: MemoryConfig) -> Propagation:
    """Follow an object through the volume by the memory of SAM 2.

    Raises
    ------
    AssetError
        The weights cannot be had.
    BundleError
        The file holds another model, or transformers is not installed.
    DataError
        No prompt says where the object is.
    Cancelled
        The listener wants to stop.
    """
    model = network(models, config)
    follower = Follower(model, models.scene, target, config, models.cache, _digests.get(model, ""))
    return travel(models.scene, target, follower.ask, config)


_loaded: "WeakKeyDictionary[Models, dict[tuple[str, int, bool], Sam2]]" = WeakKeyDictionary()
_digests: "WeakKeyDictionary[MemoryNetwork, str]" = WeakKeyDictionary()


def network(models: Models, config: MemoryConfig) -> "MemoryNetwork":
    """Return the network of the settings, loaded once for all scenes.

    Raises
    ------
    AssetError
        The weights cannot be had.
    BundleError
        The file holds another model, or transformers is not installed.
    """
    bf16 = choose_runtime("cpu", config.precision).autocast is not None
    held = _loaded.setdefault(models, {})
    key = (config.weights, config.size, bf16)
    if key not in held:
        held[key] = _load(models.path(config.weights), config.size, bf16)
    return held[key]


@lru_cache(maxsize=2)
def _load(path: Path, size: int, bf16: bool) -> "Sam2":
    from medseg.nets.sam2 import load_sam2

    model = load_sam2(path, size, bf16)
    found = hashlib.sha256(f"{size}{bf16}".encode())
    for name, value in model.network.vision_encoder.state_dict().items():
        found.update(name.encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    _digests[model] = found.hexdigest()
    return model


class _Look(NamedTuple):
    """What the network said of a slice, and through which crop."""

    field: Rectangle
    features: Features
    answer: Answer


class Follower:
    """Answers slice after slice for :func:`medseg.prompt.travel.travel`, remembering the ones before.

    Attributes
    ----------
    asked : dict of int to Memory
        Of slices that the user has prompted.
    ring : Ring
        Of slices in the direction of travel.
    encoded : int
        How often the image encoder ran.
    """

    def __init__(
        self,
        model: MemoryNetwork,
        scene: Scene,
        target: Target,
        config: MemoryConfig,
        cache: EmbeddingCache | None = None,
        digest: str = "",
    ) -> None:
        self.model = model
        self.scene = scene
        self.target = target
        self.config = config
        self.cache = cache if digest else None
        self.digest = digest
        self.shape = plane_size(scene.shape, target.axis)
        self.given = rasterise.anchors(scene, target)
        self.fixed = None if config.follow else self._around_all()
        self.asked: dict[int, Memory] = {}
        self.fields: dict[int, Rectangle] = {}
        self.encoded = 0
        self._lent: OrderedDict[int, Memory] = OrderedDict()
        self.ring = Ring(config.recent, config.pointers - 1)
        self.last: int = -2  # no slice is next to it
        self.step: int = 1
        self.field: Rectangle | None = None

    def ask(self, index: int, given: SlicePrompts | None, expected: Seen | None) -> Seen:
        """Return the object on a slice; see :data:`medseg.prompt.travel.Ask`."""
        if expected is not None and not expected.mask.any():
            expected = None
        if index not in self.given:  # hints of a correction nearby are in the memory already
            return self._track(index, expected)
        prompts = self.given[index]
        if expected is None and not _says_where(prompts):
            return Seen(np.zeros(self.shape, dtype=bool), 0.0)
        look = self._answer(index, prompts, expected)
        self.asked[index] = self.model.remember(look.features, look.answer, True)
        self.fields[index] = look.field
        if index == self.last + self.step:
            self.last = index
        return obeying(self._seen(look), prompts)

    # A slice that the user has prompted

    def _answer(self, index: int, prompts: SlicePrompts, expected: Seen | None) -> _Look:
        mask = prompts.mask
        if mask is None and expected is not None and prompts.box is None:
            mask = np.where(expected.mask, SURE, -SURE).astype(np.float32)
        if mask is not None and not len(prompts.points):
            return self._take(index, mask > 0)
        box = prompts.box
        if box is None and mask is not None and (mask > 0).any():
            box = mask_box(mask > 0)
        if box is None and self.fixed is None:  # clicks alone: how large the object is, says a first look
            first = self._look(index, prompts, (0, 0, *self.shape), None)
            found = self._seen(first).mask
            if not found.any():
                return first
            box = mask_box(found)
        if self.fixed is not None or box is None:
            return self._look(index, prompts, self.fixed or (0, 0, *self.shape), mask)
        field = self._crop(widened(box, prompts.points[prompts.positive]))
        return self._look(index, prompts, field, mask)

    def _look(self, index: int, prompts: SlicePrompts, field: Rectangle, mask: FloatArray | None) -> _Look:
        features = self.features(index, field)
        points, labels = self._pixels(prompts, field)
        logits = None
        if mask is not None:
            part = torch.from_numpy(np.ascontiguousarray(_cut(mask, field), dtype=np.float32))[None, None]
            logits = functional.interpolate(
                part, [self.config.size // 4] * 2, mode="bilinear", antialias=True
            )[0, 0]
        return _Look(field, features, self.model.prompted(features, points, labels, logits))

    def _take(self, index: int, mask: BoolArray, field: Rectangle | None = None) -> _Look:
        field = field or self.fixed or self._crop(mask_box(mask))
        features = self.features(index, field)
        return _Look(field, features, self.model.given(features, torch.from_numpy(_cut(mask, field).copy())))

    def _pixels(self, prompts: SlicePrompts, field: Rectangle) -> tuple[FloatArray, list[int]]:
        """Return (n, 2) points (x, y) in pixels of the network and their labels, those of the box first."""
        points = [] if prompts.box is None else [prompts.box[:2], prompts.box[2:]]
        labels = [] if prompts.box is None else [TOP_LEFT, BOTTOM_RIGHT]
        inside = np.concatenate((np.array(points).reshape(-1, 2), np.reshape(prompts.points, (-1, 2))))
        scale = self.config.size / np.array((field[2] - field[0], field[3] - field[1]))
        pixels = (inside + 0.5 - np.array(field[:2])) * scale - 0.5
        return pixels[:, ::-1], [*labels, *(int(sign) for sign in prompts.positive)]

    # A slice between them

    def _track(self, index: int, expected: Seen | None) -> Seen:
        if index != self.last + self.step:
            near = min(self._known(), key=lambda other: (abs(other - index), other), default=index)
            self._start(near, 1 if index > near else -1)
        recall = self._recall(index)
        self.last = index
        if not recall.memories:
            return Seen(np.zeros(self.shape, dtype=bool), 0.0)
        field = self.field = self._follow(expected)
        features = self.features(index, field)
        answer = self.model.tracked(features, recall)
        self.ring.add(index, self.model.remember(features, answer, False))
        return self._seen(_Look(field, features, answer))

    def _start(self, near: int, step: int) -> None:
        """Walk away from a prompted slice with an empty ring."""
        self.ring = Ring(self.config.recent, self.config.pointers - 1)
        self.last, self.step = near, step
        self.field = self.fields.get(near)

    def _known(self) -> set[int]:
        """Return the slices whose mask is known: asked, drawn, or left by an earlier run."""
        drawn = {i for i, known in self.given.items() if known.mask is not None and not len(known.points)}
        previous = self.target.previous
        earlier = set()
        if previous is not None and previous.voxels:
            low, high = previous.start[self.target.axis], previous.stop[self.target.axis]
            earlier = {i for i, known in self.given.items() if low <= i < high and _says_where(known)}
        return set(self.asked) | drawn | earlier

    def _recall(self, index: int) -> Recall:
        nearest = closest(index, self._known(), self.config.prompted)
        prompted = [(other, self._prompted(other)) for other in nearest]
        memories = [(0, memory.features) for _, memory in prompted if memory is not None]
        memories += [((index - other) * self.step, each) for other, each in self.ring.memories]
        pointers = [
            ((index - other) * self.step, memory.pointer)
            for other, memory in prompted
            if memory is not None and (index - other) * self.step >= 0
        ]
        pointers += [((index - other) * self.step, each) for other, each in reversed(self.ring.pointers)]
        slices = self.scene.shape[self.target.axis]
        return Recall(tuple(memories), tuple(pointers), min(slices, self.config.pointers))

    def _prompted(self, index: int) -> Memory | None:
        """Return the memory of a slice whose mask is known, made when it is first needed."""
        if index in self.asked:
            return self.asked[index]
        if index not in self._lent:
            mask = self._mask(index)
            if not mask.any():
                return None
            look = self._take(index, mask)
            self.fields[index] = look.field
            self._lent[index] = self.model.remember(look.features, look.answer, True)
            while len(self._lent) > 2 * self.config.prompted:
                self._lent.popitem(last=False)
        self._lent.move_to_end(index)
        return self._lent[index]

    def _mask(self, index: int) -> BoolArray:
        known = self.given[index]
        if known.mask is not None and not len(known.points):
            return np.asarray(known.mask > 0)
        assert self.target.previous is not None
        return self.target.previous.plane(self.target.axis, index)

    # Crops

    def _around_all(self) -> Rectangle:
        boxes = []
        for prompts in self.given.values():
            inside = prompts.points[prompts.positive]
            if prompts.box is not None:
                boxes.append(widened(prompts.box, inside))
        return crop_around(boxes, self.shape, self.config.zoom) if boxes else (0, 0, *self.shape)

    def _crop(self, box: tuple[float, float, float, float]) -> Rectangle:
        return crop_around([box], self.shape, self.config.zoom)

    def _follow(self, expected: Seen | None) -> Rectangle:
        """Return the crop for a slice where the object is expected; the last one, while it still serves."""
        if self.fixed is not None:
            return self.fixed
        if expected is None:
            return self.field or (0, 0, *self.shape)
        box = mask_box(expected.mask)
        if self.field is not None and serves(self.field, box, self.shape, self.config.zoom):
            return self.field
        return self._crop(box)

    # Images

    def features(self, index: int, field: Rectangle) -> Features:
        """Return what the image encoder says of a crop of a slice, from the cache if it is there."""
        key = embedding_key(
            scene=self.scene.digest,
            window=self.scene.window,
            axis=self.target.axis,
            index=index,
            field=field,
            model=self.digest,
        )
        found = None if self.cache is None else self.cache.get(key)
        if found is not None:
            return unpack(found, self.config.size)
        self.encoded += 1
        features = self.model.encode(
            prepare(self.scene.slice(self.target.axis, index, field), self.config.size)
        )
        if self.cache is not None:
            self.cache.put(key, pack(features))
        return features

    def _seen(self, look: _Look) -> Seen:
        logits = np.full(self.shape, -SURE, dtype=np.float32)
        if look.answer.score > 0:
            top, left, bottom, right = look.field
            part = functional.interpolate(
                look.answer.logits[None, None].float().cpu(),
                (bottom - top, right - left),
                mode="bilinear",
                align_corners=False,
            )
            logits[top:bottom, left:right] = part[0, 0].clamp(-SURE, SURE).numpy()
        return Seen(logits > 0, float(np.clip(look.answer.iou, 0, 1)), logits)


def closest(index: int, known: Iterable[int], most: int) -> list[int]:
    """Return the known slices to remember: the next one on each side, then the nearest, in order.

    ``select_closest_cond_frames`` of SAM 2.

    >>> closest(10, [1, 2, 8, 30, 9], 3)
    [8, 9, 30]
    """
    known = sorted(known)
    below, above = [i for i in known if i < index][-1:], [i for i in known if i >= index][:1]
    chosen = [*below, *above][:most]
    rest = sorted((i for i in known if i not in chosen), key=lambda i: (abs(i - index), i))
    return sorted(chosen + rest[: most - len(chosen)])


def serves(
    field: Rectangle, box: tuple[float, float, float, float], shape: tuple[int, int], zoom: Zoom
) -> bool:
    """Return whether a crop still shows an object well: neither at its edge nor lost in it.

    An edge of the slice is no edge of the crop.
    """
    for axis in (0, 1):
        low, high = field[axis], field[axis + 2]
        near = _NEAR * (high - low)
        if low > 0 and box[axis] + 0.5 < low + near:
            return False
        if high < shape[axis] and box[axis + 2] + 0.5 > high - near:
            return False
    side = max(box[2] - box[0], box[3] - box[1])
    return max(zoom.times * side, zoom.least) >= _SHRUNK * max(field[2] - field[0], field[3] - field[1])


def pack(features: Features) -> Tensor:
    """Return features as one vector, for the cache."""
    return torch.cat([level.flatten().cpu() for level in (features.coarse, features.middle, features.fine)])


def unpack(vector: Tensor, size: int) -> Features:
    """Undo :func:`pack` for images of side `size`."""
    parts, start = [], 0
    for channels, stride in ((256, 16), (64, 8), (32, 4)):
        shape = (1, channels, size // stride, size // stride)
        count = channels * (size // stride) ** 2
        parts.append(vector[start : start + count].reshape(shape))
        start += count
    return Features(*parts)


def _cut(image: FloatArray | BoolArray, field: Rectangle) -> FloatArray | BoolArray:
    return image[field[0] : field[2], field[1] : field[3]]


def _says_where(prompts: SlicePrompts) -> bool:
    return prompts.box is not None or prompts.mask is not None or bool(prompts.positive.any())
