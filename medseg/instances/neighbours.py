"""Which voxels are neighbours: faces only, or faces, edges and corners; and how a step is written in a byte.

Everything works on three axes; an image of two axes is one slice, where 26 neighbours are 8 and 6 are 4.
A step (dz, dy, dx) of -1, 0 or 1 is the number ``(1-dz)*16 + (1-dy)*4 + (1-dx)``: the neighbour of the
lowest linear index has the highest number, so that the larger number wins a tie.
"""

import itertools

import numpy as np

from medseg.errors import ConfigError, GeometryError
from medseg.types import Array, IntArray, Shape

# The step to itself, and "no object here".
STAY, BACKGROUND = 21, 255
FACES, ALL = 6, 26


def steps_of(connectivity: int) -> list[tuple[int, int, int]]:
    """Return the steps to every neighbour in ascending linear index, the step to itself among them."""
    near = (-1, 0, 1)
    steps = itertools.product(near, near, near)
    return [step for step in steps if connectivity == ALL or sum(map(abs, step)) <= 1]


def forward_steps(connectivity: int) -> list[tuple[int, int, int]]:
    """Return the steps to neighbours of higher linear index: each pair of neighbours once."""
    steps = steps_of(connectivity)
    return steps[len(steps) // 2 + 1 :]


def code_of(step: tuple[int, int, int]) -> int:
    """Return the number of a step.

    >>> code_of((0, 0, 0)), code_of((-1, -1, -1))
    (21, 42)
    """
    dz, dy, dx = step
    return (1 - dz) * 16 + (1 - dy) * 4 + (1 - dx)


def offsets(shape: Shape) -> IntArray:
    """Return, by the number of a step, how far it goes in linear indices of a volume of three axes."""
    table = np.zeros(64, dtype=np.int64)
    for step in steps_of(ALL):
        dz, dy, dx = step
        table[code_of(step)] = (dz * shape[1] + dy) * shape[2] + dx
    return table


def neighbourhood(connectivity: int, ndim: int) -> int:
    """Return 6 or 26, which 4 and 8 stand for in images of two axes.

    Raises
    ------
    ConfigError
        It is none of these.
    """
    known = {6: FACES, 26: ALL} | ({4: FACES, 8: ALL} if ndim == 2 else {})
    if connectivity not in known:
        raise ConfigError(
            f"connectivity {connectivity} in {ndim} dimensions: expected {', '.join(map(str, known))}. "
            "Take the largest for objects that touch over corners too."
        )
    return known[connectivity]


def as_volume(array: Array) -> Array:
    """Return an image of two axes as one slice, contiguous in memory.

    Raises
    ------
    GeometryError
        It has neither two nor three axes.
    """
    if array.ndim not in (2, 3):
        raise GeometryError(f"array with {array.ndim} axes: expected 2 or 3. Take one channel.")
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array)
