"""The table of objects: a row each, with size, place, shape and intensity in physical units.

Columns
-------
``..._mm``, ``..._mm2``, ``..._mm3`` are lengths, areas and volumes in millimetres; on a grid in micrometres
they are ``..._um`` and so on. ``..._vox`` are indices of the array (voxel i is at i), ``..._edge`` edges of
boxes (voxel i covers i to i + 1, upper edges are exclusive). ``x_ras``, ``y_ras``, ``z_ras`` are world
coordinates that grow to the patient's right, front and head; on a grid in micrometres they are ``x``, ``y``,
``z``, from the image's origin. Objects of a single slice have areas instead of volumes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.config import Config
from medseg.errors import GeometryError
from medseg.instances.contacts import find_contacts, nearest_neighbours
from medseg.instances.recist import acquisition_axis, measure_diameters
from medseg.instances.regions import RegionCounts, find_parents, region_names
from medseg.instances.schema import Instances, whole_labels
from medseg.instances.shape import convex_hulls, crop_of, equivalent_diameter, principal_axes, surface_sizes
from medseg.instances.shape import sphericity as roundness
from medseg.instances.sums import Sums, sum_intensities, sum_objects
from medseg.io.grids import grid_difference
from medseg.log import check_cancelled
from medseg.types import Array, FloatArray, IntArray
from medseg.volume import Geometry, Volume

Columns = dict[str, Array]


class MeasureConfig(Config):
    """What is measured beyond size, place, axes and intensity.

    Attributes
    ----------
    surface : bool
        Surface and sphericity (2D: perimeter and circularity).
    diameters : bool
        RECIST diameters.
    contacts : bool
        Neighbours and the nearest other object.
    hull : bool
        Longest diameter in 3D, solidity and extent; milliseconds per object.
    percentiles : tuple of float
        Of intensities, in 0..100.
    voxel_extent : bool
        Axes with the extent of a voxel itself (:func:`medseg.instances.shape.principal_axes`).
    slice_axis : 0, 1, 2 or None
        Across which diameters are measured; None: the axis nearest to feet-head.
    centres, inside : bool
        Of diameters (:func:`medseg.instances.recist.measure_diameters`).
    """

    surface: bool = True
    diameters: bool = True
    contacts: bool = True
    hull: bool = False
    percentiles: tuple[float, ...] = ()
    voxel_extent: bool = True
    slice_axis: int | None = None
    centres: bool = False
    inside: bool = False


BASIC = MeasureConfig(surface=False, diameters=False, contacts=False)


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length.

    Attributes
    ----------
    columns : dict of str to array
    """

    columns: Columns = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows as plain Python values."""
        names = list(self.columns)
        for values in zip(*(column.tolist() for column in self.columns.values()), strict=True):
            yield dict(zip(names, values, strict=True))


def measure_objects(
    instances: Instances,
    image: Volume | None = None,
    regions: Volume | None = None,
    region_titles: Mapping[int, str] | None = None,
    config: MeasureConfig | None = None,
) -> Table:
    """Measure every object of an image.

    Parameters
    ----------
    instances : Instances
    image : Volume, optional
        For intensities; columns of further channels are named ``intensity_1_...``.
    regions : Volume, optional
        A label map (organs, layers); the object's parent is the region with most of its voxels.
    region_titles : mapping, optional
        Names of regions.
    config : MeasureConfig, optional

    Returns
    -------
    Table
        A row for each object, in ascending order of labels.

    Raises
    ------
    GeometryError
        The image or the regions are on another grid.
    """
    config = config or MeasureConfig()
    labels = instances.labels
    sums = sum_objects(labels, len(instances))
    table = Table({**_identity(instances), **_size(instances, sums), **_place(instances, sums)})
    columns = table.columns
    columns.update(_axes(instances, sums, config))
    if config.surface:
        columns.update(_surface(instances, sums))
    if config.diameters:
        columns.update(_diameters(instances, sums, config))
    if config.hull:
        columns.update(_hulls(instances, sums))
    if image is not None:
        columns.update(_intensity(instances, sums, image, config))
    if config.contacts:
        columns.update(_neighbours(instances, sums))
    if regions is not None:
        parents, _ = find_parents(labels, _regions(regions, instances), sums.voxels)
        columns["parent"] = parents.region
        titles = {0: "", **dict(region_titles or {})}
        columns["parent_name"] = np.array(region_names(parents.region, titles), dtype=object)
        columns["parent_fraction"] = parents.fraction
    return table


def measure_regions(
    instances: Instances, regions: Volume, region_titles: Mapping[int, str] | None = None
) -> Table:
    """Count objects inside each region, with densities.

    A region that holds nothing has its row, too. Objects are counted where most of their voxels lie; the part
    that is covered counts voxels of any object.

    Raises
    ------
    GeometryError
        The regions are on another grid.
    """
    _, counts = find_parents(instances.labels, _regions(regions, instances), instances.voxels)
    return Table(_region_columns(instances, counts, region_titles))


def check_regions(regions: Volume, image: Volume) -> None:
    """Refuse regions of another image before anything is looked for in it.

    Raises
    ------
    GeometryError
        They are on another grid.
    LabelError
        They are no label map.
    """
    whole_labels(_fitting(regions, image.geometry, "regions", 3)[0])


def _region_columns(instances: Instances, counts: RegionCounts, titles: Mapping[int, str] | None) -> Columns:
    unit, noun, power = _unit(instances), _noun(instances), instances.ndim
    voxel = _voxel_size(instances)
    size = counts.voxels * voxel
    columns: Columns = {
        "region": counts.region,
        "region_name": np.array(region_names(counts.region, titles), dtype=object),
        f"region_{noun}_{unit}{power}": size,
        "object_count": counts.count,
        f"density_per_{unit}{power}": counts.count / size,
    }
    if power == 3:
        per_ml = 1e3 if unit == "mm" else 1e12
        columns["density_per_ml"] = counts.count / size * per_ml
    columns[f"object_{noun}_{unit}{power}"] = counts.object_voxels * voxel
    columns["covered_fraction"] = counts.object_voxels / counts.voxels
    return columns


def _identity(instances: Instances) -> Columns:
    assert instances.source_ids is not None
    names = np.array([instances.class_name(value) for value in instances.classes], dtype=object)
    return {
        "label": np.arange(1, len(instances) + 1),
        "source_id": instances.source_ids,
        "class": instances.classes,
        "class_name": names,
        "score": instances.scores,
    }


def _size(instances: Instances, sums: Sums) -> Columns:
    unit, power = _unit(instances), instances.ndim
    volume = sums.voxels * _voxel_size(instances)
    columns: Columns = {"voxel_count": sums.voxels, f"{_noun(instances)}_{unit}{power}": volume}
    if power == 3:
        columns["volume_ml"] = volume * (1e-3 if unit == "mm" else 1e-12)
    columns[f"equivalent_diameter_{unit}"] = equivalent_diameter(volume, power)
    return columns


def _place(instances: Instances, sums: Sums) -> Columns:
    letters = "ijk"[: instances.ndim]
    columns: Columns = {f"centroid_{a}_vox": sums.centroid[:, n] for n, a in enumerate(letters)}
    columns.update(_world_columns(instances, "centroid", sums.centroid))
    columns.update({f"box_{a}_low_edge": sums.low[:, n] for n, a in enumerate(letters)})
    columns.update({f"box_{a}_high_edge": sums.high[:, n] for n, a in enumerate(letters)})
    shape = np.array(instances.labels.shape)
    columns["touches_border"] = ((sums.low == 0) | (sums.high == shape)).any(axis=1)
    return columns


def _axes(instances: Instances, sums: Sums, config: MeasureConfig) -> Columns:
    unit, n = _unit(instances), instances.ndim
    axes = principal_axes(sums, _steps(instances), config.voxel_extent)
    names = ("major", "minor") if n == 2 else ("major", "mid", "minor")
    columns: Columns = {f"axis_{name}_{unit}": axes.lengths[:, a] for a, name in enumerate(names)}
    with np.errstate(invalid="ignore", divide="ignore"):
        columns["elongation"] = axes.lengths[:, 0] / axes.lengths[:, -1]
    if n == 2:
        along = axes.directions[:, 0]
        # In (-90, 90]: the axis has no head.
        angle = np.degrees(np.arctan2(along[:, 1], along[:, 0]))
        columns["orientation_deg"] = np.where(
            angle > 90, angle - 180, np.where(angle <= -90, angle + 180, angle)
        )
    else:
        letters = _world_letters(instances)
        columns.update({f"axis_major_{w}": axes.directions[:, 0, a] for a, w in enumerate(letters)})
    return columns


def _surface(instances: Instances, sums: Sums) -> Columns:
    unit, n = _unit(instances), instances.ndim
    surface = surface_sizes(instances.labels, sums, _spacing(instances))
    volume = sums.voxels * _voxel_size(instances)
    round_ = roundness(volume, surface, n)
    if n == 2:
        return {f"perimeter_{unit}": surface, "circularity": round_}
    return {f"surface_{unit}2": surface, "sphericity": round_}


def _diameters(instances: Instances, sums: Sums, config: MeasureConfig) -> Columns:
    unit, geometry = _unit(instances), instances.geometry
    axis = acquisition_axis(geometry.affine) if config.slice_axis is None else config.slice_axis
    if not 0 <= axis <= 2:
        raise GeometryError(f"slice axis {axis}: expected 0, 1 or 2, an axis of the array.")
    found = measure_diameters(instances.labels, sums, _steps(instances), axis, config.centres, config.inside)
    columns: Columns = {
        f"recist_longest_{unit}": found.longest,
        f"recist_perp_{unit}": found.across,
        "recist_slice_vox": found.slice_index,
    }
    for n, end in enumerate(("longest_a", "longest_b", "perp_a", "perp_b")):
        columns.update(_world_columns(instances, f"recist_{end}", found.ends[:, n]))
    return columns


def _hulls(instances: Instances, sums: Sums) -> Columns:
    unit, n = _unit(instances), instances.ndim
    hulls = convex_hulls(instances.labels, sums, _steps(instances))
    volume = sums.voxels * _voxel_size(instances)
    return {
        f"max_feret_{n}d_{unit}": hulls.feret,
        "solidity": volume / hulls.volume,
        "extent": sums.voxels / np.prod(sums.high - sums.low, axis=1),
    }


def _intensity(instances: Instances, sums: Sums, image: Volume, config: MeasureConfig) -> Columns:
    channels = _fitting(image, instances.geometry, "image", instances.ndim)
    columns: Columns = {}
    for channel, values in enumerate(channels):
        name = "intensity" if channel == 0 else f"intensity_{channel}"
        found = sum_intensities(instances.labels, values, len(instances))
        columns[f"{name}_mean"] = found.mean
        columns[f"{name}_std"] = found.std
        columns[f"{name}_min"] = found.minimum
        columns[f"{name}_max"] = found.maximum
        columns[f"{name}_sum"] = found.total
        columns[f"{name}_missing_voxels"] = found.missing
        if config.percentiles:
            table = _percentiles(instances.labels, values, sums, config.percentiles)
            columns.update({f"{name}_p{p:g}": table[:, n] for n, p in enumerate(config.percentiles)})
    return columns


def _percentiles(labels: Array, image: Array, sums: Sums, wanted: tuple[float, ...]) -> FloatArray:
    table = np.full((len(sums.voxels), len(wanted)), np.nan)
    for row in range(len(table)):
        check_cancelled()
        box = tuple(slice(int(a), int(b)) for a, b in zip(sums.low[row], sums.high[row], strict=True))
        values = image[box][crop_of(labels, sums, row)].astype(np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            table[row] = np.percentile(values, wanted)
    return table


def _neighbours(instances: Instances, sums: Sums) -> Columns:
    contacts = find_contacts(instances.labels, len(instances))
    distance, nearest = nearest_neighbours(sums.centroid @ _steps(instances).T)
    return {
        "neighbours": contacts.degree(len(instances)),
        f"nearest_neighbour_{_unit(instances)}": distance,
        "nearest_neighbour_label": nearest,
    }


def _fitting(volume: Volume, geometry: Geometry, name: str, ndim: int) -> Array:
    """Return (channel, i, j, k), or (channel, i, j) in 2D, of a volume on the same grid."""
    if not geometry.matches(volume.geometry):
        difference = grid_difference(geometry, volume.geometry, "the objects") or "its place differs"
        raise GeometryError(f"{name}: {difference}. Resample it onto the grid of the objects.")
    return volume.array[..., 0] if ndim == 2 else volume.array


def _regions(regions: Volume, instances: Instances) -> IntArray:
    return whole_labels(_fitting(regions, instances.geometry, "regions", instances.ndim)[0])


def _unit(instances: Instances) -> str:
    return "um" if instances.unit == "micron" else "mm"


def _noun(instances: Instances) -> str:
    return "area" if instances.ndim == 2 else "volume"


def _world_letters(instances: Instances) -> tuple[str, ...]:
    return tuple("xyz") if instances.unit == "micron" else ("x_ras", "y_ras", "z_ras")


def _spacing(instances: Instances) -> tuple[float, ...]:
    return instances.geometry.spacing[: instances.ndim]


def _steps(instances: Instances) -> FloatArray:
    """Return the steps of a voxel: columns of the affine, in 2D within the plane of the picture."""
    steps = instances.geometry.affine[:3, : instances.ndim]
    if instances.ndim == 3:
        return np.asarray(steps)
    first, second = steps.T
    long, other = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    along = float(first @ second / long)
    return np.array([[long, along], [0.0, np.sqrt(max(other**2 - along**2, 0.0))]])


def _voxel_size(instances: Instances) -> float:
    """Return the volume of a voxel, in 2D the area of a pixel."""
    if instances.ndim == 3:
        return instances.geometry.voxel_volume
    return float(abs(np.linalg.det(_steps(instances))))


def _world_columns(instances: Instances, stem: str, points: FloatArray) -> Columns:
    """Return world coordinates of indices (K, n)."""
    affine, n = instances.geometry.affine, points.shape[1]
    world = points @ affine[:3, :n].T + affine[:3, 3]
    suffix = _unit(instances)
    letters = _world_letters(instances)
    shown = 3 if instances.ndim == 3 or instances.unit == "mm" else 2
    return {f"{stem}_{letters[a]}_{suffix}": world[:, a] for a in range(shown)}
