"""Which basins are one object: the saddles between them, and how a depth decides."""

from dataclasses import dataclass

import numpy as np

from medseg.errors import ConfigError
from medseg.instances.compiled import jit
from medseg.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Peaks of all basins and the saddles between them: small, and enough for every depth `h`.

    Attributes
    ----------
    roots : (k,) int64
        Linear index of the highest voxel of basins 1 to k, ascending.
    peaks : (k,) float32
        Height there.
    pairs : (n, 2) int64
        Basins a < b that touch, ascending.
    saddles : (n,) float32
        The highest way from one to the other: the maximum over touching voxels of the lower of the two.
    """

    roots: IntArray
    peaks: FloatArray
    pairs: IntArray
    saddles: FloatArray

    def merge(self, h: float = 0.0, rel: float = 0.0) -> IntArray:
        """Return the object of each basin, (k + 1,) int32; entry 0 is background.

        Two components join where the lower of their peaks is less than ``h + rel * peak`` above the saddle,
        or not above it at all. From the highest saddle downwards, so that what remains are exactly the maxima
        of dynamics `h` or more (Grimaud 1992); of equal saddles, the one of lower basins first.

        Parameters
        ----------
        h : float
            In the unit of the heights, at least 0.
        rel : float
            Part of the lower peak, from 0 to below 1. Needs heights that are not negative.

        Raises
        ------
        ConfigError
            A depth is out of range.
        """
        if not (h >= 0 and 0 <= rel < 1):
            raise ConfigError(f"h {h} and rel {rel}: expected h of at least 0 and rel from 0 to below 1.")
        if rel and self.peaks.size and self.peaks.min() < 0:
            raise ConfigError("rel needs heights of at least 0. Use h, or shift the height map.")
        saddles = self.saddles.astype(np.float64)
        order = np.lexsort((self.pairs[:, 1], self.pairs[:, 0], -saddles))
        first, second = self.pairs[order, 0] - 1, self.pairs[order, 1] - 1
        survivors = _unite(first, second, saddles[order], self.peaks.astype(np.float64), h, rel)
        numbers = np.unique(survivors, return_inverse=True)[1]
        table = np.zeros(len(self.peaks) + 1, dtype=np.int32)
        table[1:] = numbers.reshape(-1) + 1
        return table


@jit
def _unite(
    first: IntArray, second: IntArray, saddles: FloatArray, peaks: FloatArray, h: float, rel: float
) -> IntArray:
    """Return for each basin the one with the highest peak of its component, the lower number if equal."""
    parents = np.arange(len(peaks))
    for i in range(len(first)):
        a, b = _root(parents, first[i]), _root(parents, second[i])
        if a == b:
            continue
        if peaks[b] > peaks[a] or (peaks[b] == peaks[a] and b < a):
            a, b = b, a
        depth = peaks[b] - saddles[i]
        if depth < h + rel * peaks[b] or depth == 0:
            parents[b] = a
    for i in range(len(parents)):
        parents[i] = _root(parents, i)
    return parents


@jit
def _root(parents: IntArray, i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i
