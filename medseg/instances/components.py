"""Connected components of a mask or of every label of a label map."""

import cc3d
import numpy as np

from medseg.errors import ConfigError
from medseg.instances.neighbours import as_volume
from medseg.types import Array, IntArray


def label_components(label_map: Array, connectivity: int = 26) -> IntArray:
    """Number connected voxels of equal value, 1, 2, ... by the linear index of their first voxel.

    Parameters
    ----------
    label_map : (z, y, x) or (y, x) bool or int
        0 is background. Voxels of different values are never joined.
    connectivity : 6, 18 or 26; 4 or 8 in two dimensions
        Over faces, edges too, corners too. Benchmarks differ: take the one of yours.

    Returns
    -------
    int32, as `label_map`

    Raises
    ------
    ConfigError
        The connectivity is none of these.

    Examples
    --------
    >>> label_components(np.array([[1, 1, 0, 7], [2, 0, 7, 0]]))
    array([[1, 1, 0, 2],
           [3, 0, 2, 0]], dtype=int32)
    """
    kind = check_connectivity(connectivity, label_map.ndim)
    volume = as_volume(label_map)
    # cc3d 4.1 raises on grids of one slice that hold many single voxels; one empty layer more avoids it.
    padded = np.pad(volume, [(0, 1)] * 3) if min(volume.shape) <= 1 else volume
    # It numbers by the first voxel; a law of the tests.
    found: IntArray = cc3d.connected_components(padded, connectivity=kind)
    found = found[tuple(slice(n) for n in volume.shape)]
    # The same bytes where they suffice: as int32, uint32 is only looked at differently.
    labels = found.view(np.int32) if found.dtype == np.uint32 else found.astype(np.int32)
    return np.ascontiguousarray(labels).reshape(label_map.shape)


def check_connectivity(connectivity: int, ndim: int) -> int:
    """Return 6, 18 or 26 for 4 or 8 too; raise ConfigError if it is none of these."""
    known = {6: 6, 18: 18, 26: 26} | ({4: 6, 8: 26} if ndim == 2 else {})
    if connectivity not in known:
        raise ConfigError(
            f"connectivity {connectivity} in {ndim} dimensions: expected one of {', '.join(map(str, known))}."
        )
    return known[connectivity]
