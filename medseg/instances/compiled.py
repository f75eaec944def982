"""Loops over voxels, compiled by numba where it is installed.

A compiled function holds no lock of the interpreter, so that threads may share the slabs of a volume. It is
compiled once a machine: numba keeps it on disk. Without numba, :data:`COMPILED` is False and loops over
voxels are replaced by numpy (`basins_numpy`); short loops run as they are written.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

try:
    import numba

    COMPILED = True
except ImportError:
    COMPILED = False


def jit(function: F) -> F:
    """Compile a function of arrays and numbers, or leave it as it is where numba is missing."""
    if not COMPILED:
        return function
    try:
        compiled: F = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep it in: neither the package nor the user's cache can be written
        compiled = numba.njit(nogil=True)(function)
    return compiled


def each_slab(work: Callable[[int, int], Any], depth: int, threads: int) -> Sequence[Any]:
    """Call ``work(start, stop)`` for slabs that cover ``range(depth)``; return the results in order."""
    parts = max(1, min(threads, depth))
    edges = [depth * part // parts for part in range(parts + 1)]
    if parts == 1:
        return [work(0, depth)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))
