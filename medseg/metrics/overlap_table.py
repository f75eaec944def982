"""How many voxels each object of a reference shares with each object of a prediction, in one sparse table.

Two label maps with thousands of objects overlap in few pairs: 4,913 cells against 4,515 predictions give
20,692 pairs and not 22 million. Along the fastest axis voxels repeat their pair, so whole runs are counted
at once and the table is touched once a run. Every metric of objects is computed from this table without a
further look at the voxels; only surface distances need them.

Two engines give equal tables. ``numpy`` finds the ends of runs with whole-array comparisons; ``numba`` walks
once through memory with a hash table, which pays for large volumes (its compiler starts in a second).
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medseg.errors import ConfigError, GeometryError, LabelError
from medseg.types import Array, BoolArray, FloatArray, IntArray

Engine = Literal["auto", "numpy", "numba"]

# Voxels that are looked at together: the temporary arrays of one chunk stay near the processor's cache.
_CHUNK = 1 << 20
# Below this many voxels, loading (the first time compiling) numba takes longer than it saves.
_FOR_NUMBA = 1 << 24
# Slots of the hash table, at the start and at most. A full table is set aside and a larger one begun.
_FIRST_SLOTS, _MOST_SLOTS = 1 << 12, 1 << 22
_LOAD = 0.6
# Pairs that are held unmerged: what many chunks or full tables repeat is summed up from time to time.
_MOST_UNMERGED = 1 << 22
# A pair is packed into 64 bits, 32 for each side, of which the sign bit stays free.
_HALF = 32
_HIGHEST = (1 << 31) - 1

Partial = tuple[IntArray, IntArray]


@dataclass(frozen=True, eq=False)
class OverlapTable:
    """Voxels of every object and of every pair of objects that meet; the background is not an object.

    Attributes
    ----------
    references, predictions : (n,), (m,) int64
        Labels that occur, ascending, without 0. Gaps are kept: they are names, not positions.
    reference_voxels, prediction_voxels : (n,), (m,) int64
        Sizes in the order of the labels.
    pairs : (p, 2) int64
        Positions (not labels) in `references` and `predictions` of objects that share a voxel, in
        lexicographic order.
    pair_voxels : (p,) int64
        Voxels that each pair shares.
    voxels : int
        Size of the image.
    """

    references: IntArray
    predictions: IntArray
    reference_voxels: IntArray
    prediction_voxels: IntArray
    pairs: IntArray
    pair_voxels: IntArray
    voxels: int

    @property
    def n_ref(self) -> int:
        """Objects of the reference."""
        return len(self.references)

    @property
    def n_pred(self) -> int:
        """Objects of the prediction."""
        return len(self.predictions)

    @property
    def iou(self) -> FloatArray:
        """Intersection over union of every pair, (p,) float64: n / (N_a + N_b - n)."""
        a, b = self.pairs.T
        union = self.reference_voxels[a] + self.prediction_voxels[b] - self.pair_voxels
        iou: FloatArray = self.pair_voxels / union
        return iou

    @property
    def dice(self) -> FloatArray:
        """Dice of every pair, (p,) float64: 2 n / (N_a + N_b)."""
        a, b = self.pairs.T
        dice: FloatArray = 2 * self.pair_voxels / (self.reference_voxels[a] + self.prediction_voxels[b])
        return dice

    def swapped(self) -> "OverlapTable":
        """Return the table with the two sides exchanged."""
        order = np.lexsort((self.pairs[:, 0], self.pairs[:, 1]))
        return OverlapTable(
            self.predictions,
            self.references,
            self.prediction_voxels,
            self.reference_voxels,
            self.pairs[order][:, ::-1],
            self.pair_voxels[order],
            self.voxels,
        )

    def joined(self, owners: IntArray) -> "OverlapTable":
        """Return the table where predictions that have one owner are one object.

        Parameters
        ----------
        owners : (m,) int, positive
            The new label of each prediction.

        Examples
        --------
        >>> table = overlap_table(np.array([1, 1, 1, 2]), np.array([4, 5, 6, 6]))
        >>> table.joined(np.array([1, 1, 2])).iou.tolist()
        [0.6666666666666666, 0.25, 0.5]
        """
        labels, places = np.unique(owners, return_inverse=True)
        keys = self.pairs[:, 0] * max(1, len(labels)) + places[self.pairs[:, 1]]
        pairs, rows = np.unique(keys, return_inverse=True)
        sizes, shared = np.zeros(len(labels), np.int64), np.zeros(len(pairs), np.int64)
        np.add.at(sizes, places, self.prediction_voxels)
        np.add.at(shared, rows, self.pair_voxels)
        return OverlapTable(
            self.references,
            labels.astype(np.int64),
            self.reference_voxels,
            sizes,
            np.stack(np.divmod(pairs, max(1, len(labels))), axis=1),
            shared,
            self.voxels,
        )

    def subset(self, references: BoolArray, predictions: BoolArray) -> "OverlapTable":
        """Return the table of some objects only, such as those of one class.

        Parameters
        ----------
        references, predictions : (n,), (m,) bool
            Which objects to keep. The others turn into background.
        """
        keep = references[self.pairs[:, 0]] & predictions[self.pairs[:, 1]]
        place = [np.cumsum(chosen) - 1 for chosen in (references, predictions)]
        kept = self.pairs[keep]
        return OverlapTable(
            self.references[references],
            self.predictions[predictions],
            self.reference_voxels[references],
            self.prediction_voxels[predictions],
            np.stack([place[0][kept[:, 0]], place[1][kept[:, 1]]], axis=1),
            self.pair_voxels[keep],
            self.voxels,
        )


def overlap_table(reference: Array, prediction: Array, *, engine: Engine = "auto") -> OverlapTable:
    """Count the voxels of all pairs of objects of two label maps.

    Parameters
    ----------
    reference, prediction : arrays of one shape, any number of axes and any axis order
        Label maps: 0 is background, every other value one object. Integers or booleans, or floats that
        hold whole numbers. Labels may have gaps.
    engine : "auto", "numpy" or "numba"
        Auto: numba for volumes of 2^24 voxels and more, where it is installed.

    Returns
    -------
    OverlapTable
        Memory beside the inputs grows with the number of pairs, not with that of voxels. (Arrays that are
        not contiguous, and labels above 2^31 - 1, are copied.)

    Raises
    ------
    GeometryError
        The shapes differ.
    LabelError
        A value is negative or no whole number.
    ConfigError
        The engine is not known, or numba is asked for and not installed.

    Examples
    --------
    >>> import numpy as np
    >>> table = overlap_table(np.array([0, 1, 1, 1, 7]), np.array([2, 2, 2, 0, 0]))
    >>> table.references, table.pairs.tolist(), table.iou.tolist()
    (array([1, 7]), [[0, 0]], [0.5])
    """
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    if reference.shape != prediction.shape:
        raise GeometryError(
            f"reference of shape {reference.shape} and prediction of shape {prediction.shape}: expected "
            "one shape. Resample one onto the grid of the other first."
        )
    if reference.flags.f_contiguous and prediction.flags.f_contiguous:  # walk memory in order
        reference, prediction = reference.T, prediction.T
    names_a, flat_a = _packable(reference.reshape(-1), "reference")
    names_b, flat_b = _packable(prediction.reshape(-1), "prediction")
    count = _count_numba if _use_numba(engine, flat_a.size) else _count_numpy
    keys, counts = _merged(count(_chunks(flat_a, flat_b)))
    return _table(keys, counts, names_a, names_b)


def check_labels(label_map: Array, side: str) -> int:
    """Return the highest label, after a look at every value (in chunks).

    Raises
    ------
    LabelError
        A value is negative, no whole number, or no number at all.
    """
    highest = 0
    if label_map.dtype.kind not in "buif":
        raise LabelError(
            f"the {side} holds {label_map.dtype} where a label map has whole numbers. Pass a label map."
        )
    flat = label_map.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if part.dtype.kind == "f" and not (np.isfinite(part).all() and np.array_equal(np.rint(part), part)):
            raise LabelError(
                f"the {side} holds values that are not whole numbers, so it is no label map. Pass a label "
                "map, not an image or probabilities."
            )
        if part.dtype.kind in "if" and part.min() < 0:
            raise LabelError(
                f"the {side} holds negative labels, such as {part.min():g}. Background is 0 and objects are "
                "positive: set what is to be ignored to 0, or renumber it."
            )
        highest = max(highest, int(part.max()))
    return highest


def _packable(flat: Array, side: str) -> tuple[IntArray | None, Array]:
    """Return labels that fit 31 bits, and the names of them if they had to be renumbered."""
    if check_labels(flat, side) <= _HIGHEST:
        return None, flat
    names, places = np.unique(flat, return_inverse=True)
    if names[0] != 0:  # keep 0 for the background
        names, places = np.concatenate([[0], names]), places + 1
    if int(names[-1]) > np.iinfo(np.int64).max:
        raise LabelError(f"the {side} holds label {int(names[-1])}, above 2^63 - 1. Renumber the objects.")
    return names.astype(np.int64), places


def _use_numba(engine: Engine, voxels: int) -> bool:
    if engine not in ("auto", "numpy", "numba"):
        raise ConfigError(f"engine {engine!r}: not known. Choose from auto, numpy, numba.")
    installed = importlib.util.find_spec("numba") is not None
    if engine == "numba" and not installed:
        raise ConfigError("engine 'numba': numba is not installed. Install it, or choose engine 'numpy'.")
    return installed and (engine == "numba" or (engine == "auto" and voxels >= _FOR_NUMBA))


def _chunks(a: Array, b: Array) -> Iterator[tuple[IntArray, IntArray]]:
    for start in range(0, a.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        yield a[part].astype(np.int32, copy=False), b[part].astype(np.int32, copy=False)


def _count_numpy(chunks: Iterable[tuple[IntArray, IntArray]]) -> Iterator[Partial]:
    for a, b in chunks:
        ends = np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1])) + 1
        starts = np.concatenate([[0], ends])
        lengths = np.diff(np.append(starts, a.size))
        yield (a[starts].astype(np.int64) << _HALF) | b[starts], lengths


def _count_numba(chunks: Iterable[tuple[IntArray, IntArray]]) -> Iterator[Partial]:
    add_runs = _compiled()
    keys, counts = _hash_table(_FIRST_SLOTS)
    used = 0
    for a, b in chunks:
        done = 0
        while done < a.size:
            done, used = add_runs(
                np.ascontiguousarray(a),
                np.ascontiguousarray(b),
                done,
                keys,
                counts,
                used,
                int(_LOAD * keys.size),
            )
            if done < a.size:
                yield keys[keys >= 0], counts[keys >= 0]
                keys, counts = _hash_table(min(2 * keys.size, _MOST_SLOTS))
                used = 0
    yield keys[keys >= 0], counts[keys >= 0]


def _hash_table(slots: int) -> Partial:
    return np.full(slots, -1, np.int64), np.zeros(slots, np.int64)


def _add_runs(
    a: IntArray, b: IntArray, start: int, keys: IntArray, counts: IntArray, used: int, most: int
) -> tuple[int, int]:
    """Add the runs from `start` on to an open-addressing hash table; stop before it holds more than `most`.

    Returns where it stopped and how many slots are used. Written for numba; a prime to the power of two is
    not needed because both multipliers are odd, and the upper bits are folded in for labels with large gaps.
    """
    mask = keys.size - 1
    n = a.size
    i = start
    while i < n:
        label_a, label_b = np.int64(a[i]), np.int64(b[i])
        j = i + 1
        while j < n and a[j] == label_a and b[j] == label_b:
            j += 1
        key = (label_a << 32) | label_b
        mixed = (label_a * 2654435769) ^ (label_b * 2246822519)
        slot = (mixed ^ (mixed >> 29)) & mask
        while keys[slot] != key and keys[slot] >= 0:
            slot = (slot + 1) & mask
        if keys[slot] < 0:
            if used == most:
                return i, used
            keys[slot] = key
            used += 1
        counts[slot] += j - i
        i = j
    return n, used


@functools.cache
def _compiled() -> Callable[..., tuple[int, int]]:
    import numba

    try:
        compiled: Any = numba.njit(cache=True, nogil=True)(_add_runs)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(nogil=True)(_add_runs)
    return compiled  # type: ignore[no-any-return]


def _merged(partials: Iterable[Partial]) -> Partial:
    held: list[Partial] = []
    waiting = 0
    for keys, counts in partials:
        held.append((keys, counts))
        waiting += keys.size
        if waiting > _MOST_UNMERGED:
            held = [_sum_up(held)]
            waiting = 0
    return _sum_up(held)


def _sum_up(partials: list[Partial]) -> Partial:
    if not partials:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    keys = np.concatenate([keys for keys, _ in partials])
    counts = np.concatenate([counts for _, counts in partials])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, keys.size), bool), keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts[order], starts) if starts.size else counts


def _table(
    keys: IntArray, counts: IntArray, names_a: IntArray | None, names_b: IntArray | None
) -> OverlapTable:
    a, b = keys >> _HALF, keys & _HIGHEST
    references, places_a = np.unique(a, return_inverse=True)
    predictions, places_b = np.unique(b, return_inverse=True)
    sizes_a, sizes_b = (np.zeros(len(labels), np.int64) for labels in (references, predictions))
    np.add.at(sizes_a, places_a, counts)
    np.add.at(sizes_b, places_b, counts)
    both = (a > 0) & (b > 0)
    skip_a, skip_b = (int(labels.size > 0 and labels[0] == 0) for labels in (references, predictions))
    return OverlapTable(
        _names(references[skip_a:], names_a),
        _names(predictions[skip_b:], names_b),
        sizes_a[skip_a:],
        sizes_b[skip_b:],
        np.stack([places_a[both] - skip_a, places_b[both] - skip_b], axis=1),
        counts[both],
        int(counts.sum()),
    )


def _names(labels: IntArray, names: IntArray | None) -> IntArray:
    return labels if names is None else names[labels]
