"""``qc.json``: everything that was dropped and why, what failed, and which objects deserve a look."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg.files import write_text
from medseg.instances.schema import Instances
from medseg.instances.sums import sum_objects
from medseg.types import PathLike


def write_qc(
    instances: Instances, path: PathLike, failures: Sequence[str] = (), in_pixels: bool = False
) -> None:
    """Write :func:`describe_qc`."""
    found = describe_qc(instances, failures, in_pixels)
    write_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")


def describe_qc(
    instances: Instances, failures: Sequence[str] = (), in_pixels: bool = False
) -> dict[str, Any]:
    """Return what happened to objects, as plain data.

    Parameters
    ----------
    instances : Instances
    failures : sentences
        Tiles that failed and limits that were reached.
    in_pixels : bool
        The image has no scale: sizes are in pixels.

    Returns
    -------
    dict
        ``objects`` + ``dropped_objects`` is ``found_objects``. Sizes are volumes, of a picture areas.
    """
    unit = "px" if in_pixels else "um" if instances.unit == "micron" else "mm"
    power = instances.ndim
    steps = instances.geometry.affine[:3, :power]
    voxel = float(np.sqrt(np.linalg.det(steps.T @ steps)))
    size = f"{'area' if power == 2 else 'volume'}_{unit}{power}"
    sums = sum_objects(instances.labels, len(instances))
    border = ((sums.low == 0) | (sums.high == np.array(instances.labels.shape))).any(axis=1)
    dropped = sum(each.count for each in instances.dropped)
    return {
        "found_objects": len(instances) + dropped,
        "objects": len(instances),
        "dropped_objects": dropped,
        "dropped": [
            {"rule": each.rule, "count": each.count, "voxels": each.voxels, size: each.voxels * voxel}
            for each in instances.dropped
        ],
        "failures": list(failures),
        "touch_border": (np.flatnonzero(border) + 1).tolist(),
        "one_voxel": (np.flatnonzero(instances.voxels == 1) + 1).tolist(),
        "provenance": instances.provenance,
    }
