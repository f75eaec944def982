"""What went wrong with each object that was not matched: missed, invented, merged, split, or inexact.

========== =========================================================================================
merged     one prediction holds more than half of each of two or more references
split      one reference holds more than half of each of two or more predictions
inexact    one of a pair holds more than half of the other, but their IoU is below the threshold
missed     a reference that is nothing of the above and not matched
invented   a prediction that is nothing of the above and not matched
========== =========================================================================================

Every object that is not matched is in one event at least. A matched object may be in a merge or split too:
a large cell that swallows a small neighbour is still found.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.metrics.matching import Matching
from medseg.metrics.overlap_table import OverlapTable
from medseg.types import BoolArray, IntArray

Kind = Literal["missed", "invented", "merged", "split", "inexact"]

KINDS: dict[Kind, str] = {
    "missed": "reference objects that no prediction stands for",
    "invented": "predicted objects that stand for no reference",
    "merged": "predictions that hold more than half of each of two or more references",
    "split": "references that hold more than half of each of two or more predictions",
    "inexact": "pairs of which one holds more than half of the other, with an IoU below the threshold",
}
"""What each kind of mistake is."""


@dataclass(frozen=True)
class Mistake:
    """One event: the labels that take part on either side, and the voxels of its larger side."""

    kind: Kind
    references: tuple[int, ...]
    predictions: tuple[int, ...]
    voxels: int


def find_mistakes(table: OverlapTable, match: Matching) -> tuple[Mistake, ...]:
    """Sort everything that `match` leaves over into events.

    Parameters
    ----------
    table : OverlapTable
    match : Matching
        Of this table, from :func:`medseg.metrics.matching.match_objects`.

    Returns
    -------
    tuple of Mistake
        Merged, split, inexact, missed, invented; each by the lowest position of its first object.

    Examples
    --------
    >>> from medseg.metrics.matching import match_objects
    >>> from medseg.metrics.overlap_table import overlap_table
    >>> table = overlap_table(np.array([1, 1, 2, 2, 0, 0, 3]), np.array([4, 4, 4, 4, 0, 9, 0]))
    >>> [(m.kind, m.references, m.predictions) for m in find_mistakes(table, match_objects(table, 0.7))]
    [('merged', (1, 2), (4,)), ('missed', (3,), ()), ('invented', (), (9,))]
    """
    a, b = table.pairs.T
    in_prediction = 2 * table.pair_voxels > table.reference_voxels[a]
    in_reference = 2 * table.pair_voxels > table.prediction_voxels[b]
    left_a, left_b = ~match.found(), ~match.true()
    events = []
    for holder, members in _groups(b[in_prediction], a[in_prediction]):
        left_a[members] = left_b[holder] = False
        events.append(_event("merged", table, members, np.array([holder])))
    for holder, members in _groups(a[in_reference], b[in_reference]):
        left_b[members] = left_a[holder] = False
        events.append(_event("split", table, np.array([holder]), members))
    for i, j in _linked(table, in_prediction | in_reference, left_a, left_b):
        left_a[i] = left_b[j] = False
        events.append(_event("inexact", table, np.array([i]), np.array([j])))
    none = np.zeros(0, np.int64)
    events += [_event("missed", table, np.array([i]), none) for i in np.flatnonzero(left_a)]
    events += [_event("invented", table, none, np.array([j])) for j in np.flatnonzero(left_b)]
    return tuple(events)


def _groups(holders: IntArray, members: IntArray) -> list[tuple[int, IntArray]]:
    """Return who holds two or more, and what."""
    order = np.lexsort((members, holders))
    names, starts, times = np.unique(holders[order], return_index=True, return_counts=True)
    return [
        (int(name), members[order[start : start + n]])
        for name, start, n in zip(names, starts, times, strict=True)
        if n > 1
    ]


def _linked(
    table: OverlapTable, link: BoolArray, left_a: BoolArray, left_b: BoolArray
) -> list[tuple[int, int]]:
    """Return linked pairs of which one object at least is still left over, best IoU first."""
    rows = np.flatnonzero(link & (left_a[table.pairs[:, 0]] | left_b[table.pairs[:, 1]]))
    rows = rows[np.argsort(-table.iou[rows], kind="stable")]
    left_a, left_b = left_a.copy(), left_b.copy()
    chosen = []
    for i, j in table.pairs[rows].tolist():
        if left_a[i] or left_b[j]:
            left_a[i] = left_b[j] = False
            chosen.append((i, j))
    return sorted(chosen)


def _event(kind: Kind, table: OverlapTable, references: IntArray, predictions: IntArray) -> Mistake:
    sizes = table.reference_voxels[references].sum(), table.prediction_voxels[predictions].sum()
    return Mistake(
        kind,
        tuple(table.references[references].tolist()),
        tuple(table.predictions[predictions].tolist()),
        int(max(sizes)),
    )
