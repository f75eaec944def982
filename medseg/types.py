"""Names for the array and number types that signatures use."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
PathLike = str | Path
Shape = tuple[int, ...]
Spacing = tuple[float, ...]
