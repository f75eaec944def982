"""How a detector's boxes become objects: chosen on held-out cases, kept in the bundle.

Boxes of all tiles are kept, so that each choice costs no further look at an image (Baumgartner et al.,
nnDetection, MICCAI 2021, section 2: empirical parameters).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg import log
from medseg.instances.detect import Candidates, Detector, Found, ObjectMap
from medseg.io import Case
from medseg.metrics.coco import Detections, detections_from_table, rank_hits
from medseg.metrics.overlap_table import overlap_table
from medseg.metrics.ranking import Ranking, join_classes, join_detections, rank_objects, score_objects
from medseg.plan.detection import FindSettings
from medseg.preprocess.record import Record
from medseg.types import Array, FloatArray
from medseg.volume import Geometry

# IoU from which boxes are one object, and shortest sides in voxels of the network.
CLUSTERS = {2: (0.2, 0.3, 0.4, 0.5), 3: (1e-5, 0.1, 0.2, 0.3, 0.5)}
SIDES = {2: (0.0, 3.0, 5.0), 3: (0.0, 2.0, 3.0, 4.0)}
# IoU at which found objects are counted; in volumes small lesions may lie a little beside (nnDetection: 0.1).
TAUS = {2: (0.5, 0.7), 3: (0.1, 0.3, 0.5)}


@dataclass(frozen=True, eq=False)
class Seen:
    """A held-out case with what was found in it, of whatever score.

    Attributes
    ----------
    reference : (a0, a1, a2) objects, numbered as `medseg.plan.objects` has them
    """

    case: Case
    grid: Geometry
    reference: Array
    candidates: list[Candidates]
    record: Record

    def draw(self, detector: Detector, score: float) -> ObjectMap:
        """Return the objects of at least this score."""
        found = detector.join(self.candidates, self.record)
        return detector.draw(self.grid, found, self.record, score)


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen.

    Attributes
    ----------
    settings : FindSettings
    score : least score of an object
    f1 : mean over :data:`TAUS` at that score
    curve : scores and the mean F1 at each, of the chosen settings
    trials : every pair of settings with its best F1
    """

    settings: FindSettings
    score: float
    f1: float
    curve: tuple[FloatArray, FloatArray]
    trials: tuple[dict[str, float], ...]


def sweep(seen: Sequence[Seen], detector: Detector, n_classes: int) -> Choice:
    """Choose the settings and the score of the largest mean F1; of equals the first."""
    n = detector.settings.dimensions
    trials, best = [], None
    for cluster in log.progress(CLUSTERS[n], "Choosing settings"):
        settings = detector.settings.find.replace(cluster=cluster, least_side=0.0)
        joined = [[part.join(settings) for part in case.candidates] for case in seen]
        before: object = None
        for side in SIDES[n]:
            found = [[part.at_least(side) for part in parts] for parts in joined]
            left = [len(part.scores) for parts in found for part in parts]
            if left == before:  # nothing more is left out, so nothing changes
                continue
            before = left
            images = [
                by_class(case, parts, detector, n_classes) for case, parts in zip(seen, found, strict=True)
            ]
            scores, f1 = f1_by_score(images, TAUS[n])
            place = int(np.argmax(f1))
            trials.append({"cluster": cluster, "least_side": side, "f1": round(float(f1[place]), 5)})
            if best is None or f1[place] > best.f1:
                chosen = settings.replace(least_side=side)
                best = Choice(chosen, _below(scores, place), float(f1[place]), (scores, f1), ())
    assert best is not None  # there are settings to try
    return Choice(best.settings, best.score, best.f1, best.curve, tuple(trials))


def _below(scores: FloatArray, place: int) -> float:
    """Return a round number between the score at `place`, which is kept, and the next lower one."""
    low = scores[place + 1] if place + 1 < len(scores) else 0.0
    middle = float(low + scores[place]) / 2
    for digits in range(2, 7):
        if low < round(middle, digits) <= scores[place]:
            return round(middle, digits)
    return float(scores[place])


def by_class(seen: Seen, parts: Sequence[Found], detector: Detector, n_classes: int) -> Detections:
    """Return what was found of all classes of a case, of whatever score.

    A better object hides a worse one and never the other way round, so one map holds the maps of all least
    scores.
    """
    shape = seen.record.cropped_shape[3 - detector.settings.dimensions :]
    drawn = detector.draw(seen.grid, [part.on(shape) for part in parts], seen.record, 0.0)
    maps = class_maps(seen, drawn, detector, n_classes)
    return join_detections([detections_from_table(overlap_table(a, b), scores) for a, b, scores in maps])


def class_maps(
    seen: Seen, drawn: ObjectMap, detector: Detector, n_classes: int
) -> list[tuple[Array, Array, FloatArray]]:
    """Return for each class the reference, what was found, and the scores of it by ascending label."""
    array, values = drawn.volume.array[0], detector.bundle.labels.foreground_values
    result = []
    for number in range(n_classes):
        own = drawn.classes == values[number]
        wanted = (seen.reference > 0) & ((seen.reference - 1) % n_classes == number)
        found = array * np.concatenate([[False], own])[array]
        result.append((seen.reference * wanted, found, drawn.scores[own]))
    return result


def f1_by_score(images: Sequence[Detections], taus: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """Return scores, descending, and the mean F1 over `taus` of all objects of at least each."""
    n_ref = sum(image.n_ref for image in images)
    f1 = []
    scores: FloatArray = np.zeros(0)
    for tau in taus:
        scores, hits = rank_hits(images, tau)
        f1.append(2 * np.cumsum(hits) / (np.arange(1, len(hits) + 1) + n_ref))
    if not len(scores):
        return np.ones(1), np.array([0.0 if n_ref else 1.0])
    last = np.append(scores[1:] != scores[:-1], True)  # objects of one score come together
    mean: FloatArray = np.mean(f1, axis=0)
    return scores[last], mean[last]


def rank(seen: Sequence[Seen], detector: Detector, n_classes: int) -> Ranking:
    """Measure all objects found, of whatever score: AP, and FROC at the lowest of :data:`TAUS`."""
    taus = TAUS[detector.settings.dimensions]
    images = []
    for case in seen:
        maps = class_maps(case, case.draw(detector, 0.0), detector, n_classes)
        images.append(join_classes([score_objects(*each, overlap_table(*each[:2])) for each in maps]))
    return rank_objects(images, taus[0])
