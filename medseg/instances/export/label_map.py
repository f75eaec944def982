"""The label map of objects as NIfTI, TIFF, PNG or OME-Zarr, on the grid of the image."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import ConfigError, OutputError
from medseg.files import atomic_folder
from medseg.geometry.orient import direction_cosines
from medseg.instances.schema import Instances
from medseg.instances.table import Table
from medseg.io import write
from medseg.types import IntArray, PathLike

# Numbers of objects that fit in 16 bits, which every program reads.
_MOST_IN_16_BITS = np.iinfo(np.uint16).max
_CHUNK = 256
_UNITS = {"mm": "millimeter", "micron": "micrometer"}


def write_label_map(instances: Instances, path: PathLike, table: Table | None = None) -> None:
    """Write the label map; the suffix chooses the format.

    ``.zarr`` is OME-Zarr with the table as properties of the labels; other suffixes are those of
    :func:`medseg.io.write`. Labels are stored in 16 bits where they fit, else in 32.

    Raises
    ------
    OutputError
        PNG or BMP cannot hold that many objects.
    GeometryError
        The format cannot hold the grid.
    ConfigError
        The package zarr is not installed.
    """
    path = Path(path)
    labels = smallest(instances.volume.array, len(instances))
    if path.suffix.lower() == ".zarr":
        _write_zarr(instances, labels[0], path, table)
        return
    if path.suffix.lower() in (".png", ".bmp"):
        most = _MOST_IN_16_BITS if path.suffix.lower() == ".png" else 255
        if len(instances) > most:
            raise OutputError(f"{path}: holds {most} labels, not {len(instances)}. Write .tif or .nii.gz.")
        labels = labels if path.suffix.lower() == ".png" else labels.astype(np.uint8)
    write(instances.volume.with_array(labels), path)


def smallest(labels: IntArray, count: int) -> IntArray:
    """Return labels as uint16 where `count` of them fit, else as int32."""
    return labels.astype(np.uint16) if count <= _MOST_IN_16_BITS else labels


def _write_zarr(instances: Instances, labels: IntArray, path: Path, table: Table | None) -> None:
    """Write a label image of OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5): one level, axes z, y, x."""
    try:
        import zarr
    except ImportError as error:
        raise ConfigError(
            f"{path}: OME-Zarr needs the package zarr, which is not installed. "
            "Run pip install 'medseg[zarr]', or write .nii.gz or .tif."
        ) from error
    turned = labels[:, :, 0].T if instances.ndim == 2 else labels.T
    with atomic_folder(path) as folder:
        group = zarr.create_group(store=str(folder), zarr_format=3)
        group.attrs.update(_attributes(instances, path.stem, table))
        array = group.create_array(
            "0",
            shape=turned.shape,
            dtype=turned.dtype,
            chunks=tuple(min(_CHUNK, n) for n in turned.shape),
            dimension_names=tuple("zyx"[-turned.ndim :]),
        )
        array[...] = turned


def _attributes(instances: Instances, name: str, table: Table | None) -> dict[str, Any]:
    axes = "zyx"[-instances.ndim :]
    spacing = instances.geometry.spacing
    scale = [float(s) for s in spacing[: instances.ndim][::-1]]
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    affine = instances.geometry.affine
    if np.allclose(direction_cosines(affine), np.eye(3)):
        shift = [float(v) for v in affine[:3, 3][: instances.ndim][::-1]]
        transforms.append({"type": "translation", "translation": shift})
    unit = _UNITS[instances.unit]
    multiscale = {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": unit} for axis in axes],
        "datasets": [{"path": "0", "coordinateTransformations": transforms}],
    }
    described = {
        "version": "0.5",
        "multiscales": [multiscale],
        "image-label": {"properties": _properties(instances, table)},
    }
    # 0.5 has no rotations: the whole affine, of (i, j, k) to RAS, is kept beside.
    return {"ome": described, "medseg": {"affine": affine.tolist(), "unit": instances.unit}}


def _properties(instances: Instances, table: Table | None) -> list[dict[str, Any]]:
    if table is None:
        return [
            {"label-value": label, "class": int(value)} for label, value in enumerate(instances.classes, 1)
        ]
    return [
        {"label-value": row["label"], **{name: value for name, value in row.items() if _is_plain(value)}}
        for row in table.rows()
    ]


def _is_plain(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
