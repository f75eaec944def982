"""A stand-in for SAM 2: the bright component that a prompt or the last memory touches."""

import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from medseg.nets.sam2 import ABSENT, MEAN, STD, Answer, Features, Memory, Recall
from medseg.types import FloatArray

BRIGHT = 110


class BrightMemory:
    """Answers with what is bright, in a box where there is one.

    Attributes
    ----------
    calls : list of str
    alive : set of references to what :meth:`encode` has returned
    recalls : what each tracked slice was shown
    points : what each prompted slice was shown, in pixels of the network
    gone : that many tracked slices from the first are there, then the object score says absent
    """

    def __init__(self, gone: int | None = None) -> None:
        self.calls: list[str] = []
        self.alive: weakref.WeakSet[Features] = weakref.WeakSet()
        self.most_alive = 0
        self.recalls: list[Recall] = []
        self.points: list[tuple[FloatArray, list[int]]] = []
        self.gone = gone

    def encode(self, image: Tensor) -> Features:
        self.calls.append("encode")
        grey = (image[:, :1] * STD[0] + MEAN[0]) * 255
        size = image.shape[-1]
        fine = torch.nn.functional.avg_pool2d(grey, 4)
        coarse = torch.zeros(1, 256, size // 16, size // 16)
        features = Features(coarse, torch.zeros(1, 64, size // 8, size // 8), fine.expand(1, 32, -1, -1))
        self.alive.add(features)
        self.most_alive = max(self.most_alive, len(self.alive))
        return features

    def prompted(
        self, features: Features, points: FloatArray, labels: Iterable[int], logits: Tensor | None = None
    ) -> Answer:
        self.calls.append("prompted")
        self.points.append((points, list(labels)))
        return self._answer(features, True)

    def given(self, features: Features, mask: Tensor) -> Answer:
        self.calls.append("given")
        return self._answer(features, bool(mask.any()))

    def tracked(self, features: Features, recall: Recall) -> Answer:
        self.calls.append("tracked")
        self.recalls.append(recall)
        there = self.gone is None or self.calls.count("tracked") <= self.gone
        return self._answer(features, there)

    def remember(self, features: Features, answer: Answer, prompted: bool) -> Memory:
        self.calls.append("remember")
        return Memory(torch.zeros(4, 1, 64), torch.zeros(1, 256))

    def _answer(self, features: Features, there: bool) -> Answer:
        logits = (features.fine[0, 0] - BRIGHT) / 10
        score = 4.0 if there and bool((logits > 0).any()) else -4.0
        if score < 0:
            logits = torch.full_like(logits, ABSENT)
        return Answer(logits, 0.9, score, logits[None, None], torch.zeros(1, 256))


def ages(recall: Recall) -> tuple[list[int], list[int]]:
    """How long ago the memories and the pointers of a tracked slice were."""
    return [n for n, _ in recall.memories], [n for n, _ in recall.pointers]


def pixel(points: FloatArray) -> list[list[float]]:
    return np.round(points, 3).tolist()
