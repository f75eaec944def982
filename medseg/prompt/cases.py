"""Files that list what an evaluation of prompting points at: images, reference labels, prompts.

::

    # cases.yaml
    name: what this is
    cases:
      - {image: images/a.nii.gz, labels: labels/a.nii.gz, value: 1, name: liver, dataset: ct, window: liver}
      - {image: images/b.nii.gz, labels: labels/b.nii.gz, value: 1, components_mm3: 50}
      - image: images/c.nii.gz
        labels: labels/c.nii.gz
        value: [1, 2]
        prompt: {kind: box2d, axis: 2, slice: 41, box: [60, 52, 97, 90]}

A plain list of cases is accepted too. Paths are relative to the folders that are given, else to the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from medseg.config import Config, parse_mapping, read_text
from medseg.errors import DataError, GeometryError, ReadError
from medseg.geometry.orient import to_ras
from medseg.metrics.overlap import mask_of
from medseg.prompt.prompts import PLANES, Box, Plane, Point
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.simulate import BoxPrompt, Click, acquisition_axis
from medseg.prompt.windows import choose_window, prompted_region
from medseg.types import Array, FloatArray, PathLike
from medseg.volume import Geometry, Volume


class BoxOnSlice(Config):
    """A box on a slice of the image as it is stored.

    Attributes
    ----------
    axis : 0, 1, 2 or a plane
        Voxel axis of the file across which the slice is taken.
    slice : int
        Index along it, from 0.
    box : four floats
        First row, first column, end row, end column, half open like an index: rows and columns are the two
        other voxel axes of the file, in their order.
    """

    kind: Literal["box2d"] = "box2d"
    axis: Annotated[int, Field(ge=0, le=2)] | Plane
    slice: int = Field(ge=0)
    box: tuple[float, float, float, float]


class CaseEntry(Config):
    """One line of the file.

    Attributes
    ----------
    image, labels : paths
    value : int or several
        Label values that make up the object.
    name, dataset : str
        By default the name of the image, and the folder of the file.
    prompt : BoxOnSlice, optional
        Without it a box is drawn with jitter on the largest slice.
    axis : 0, 1, 2 or a plane, optional
        Voxel axis of the file across which slices are taken; by default that of the thickest slices.
    window : name, LEVEL/WIDTH or [black, white]
    channel : int
        Of an image with several.
    components_mm3 : float, optional
        Take every component (26 neighbours) of at least this volume as an object of its own.
    hint : str
        How to get the files; it is said when one is missing.
    """

    image: str
    labels: str
    value: int | Annotated[tuple[int, ...], Field(min_length=1)] = 1
    name: str = ""
    dataset: str = ""
    prompt: BoxOnSlice | None = None
    axis: Annotated[int, Field(ge=0, le=2)] | Plane | None = None
    window: str | tuple[float, float] = "auto"
    channel: int | None = Field(None, ge=0)
    components_mm3: float | None = Field(None, gt=0)
    hint: str = ""


class CasesFile(Config):
    """All cases of a file."""

    name: str = ""
    cases: Annotated[tuple[CaseEntry, ...], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class PromptObject:
    """One object to point at.

    Attributes
    ----------
    dataset, name : str
    volume : Volume
        One channel, turned to RAS.
    reference : Region
        On the grid of `volume`.
    axis : int
        Axis of that grid across which slices are taken.
    prompt : BoxPrompt, optional
        Where the case gives one.
    window : name, LEVEL/WIDTH or (black, white)
    """

    dataset: str
    name: str
    volume: Volume
    reference: Region
    axis: int
    prompt: BoxPrompt | None = None
    window: str | tuple[float, float] = "auto"

    @property
    def limits(self) -> tuple[int, int]:
        """First and last slice that the object truly reaches."""
        return self.reference.start[self.axis], self.reference.stop[self.axis] - 1

    def scene(self, prompt: BoxPrompt) -> Scene:
        """Return the image through the window that shows what `prompt` points at."""
        rough = Scene(self.volume.array[0], self.volume.geometry, self.volume.geometry, (0.0, 1.0))
        region = prompted_region(rough, [world_box(rough, prompt)])
        return Scene.of(self.volume, choose_window(self.volume, self.window, region=region))


def load_cases(path: PathLike) -> CasesFile:
    """Read a file of cases, YAML or JSON; a plain list is accepted.

    Raises
    ------
    ReadError
        The file cannot be read.
    ConfigError
        It does not parse, or an entry is wrong.
    """
    text = read_text(path)
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and line != "---" and not line.startswith("#")), "")
    if first.startswith("- ") or first == "-":
        text = "cases:\n" + text.replace("---\n", "", 1)
    elif first.startswith("["):
        text = f'{{"cases": {text}}}'
    return CasesFile.from_dict(parse_mapping(text, str(path)), str(path))


def open_entry(entry: CaseEntry, folders: Sequence[Path]) -> Iterator[PromptObject]:
    """Read the files of one entry, which are searched in `folders` in order.

    Raises
    ------
    ReadError, GeometryError, DataError
        A file cannot be read, image and labels lie on different grids, or there is no such object.
    """
    from medseg.io import read

    image = _one_channel(read(_find(entry.image, folders, entry.hint)), entry)
    labels = read(_find(entry.labels, folders, entry.hint))
    if not image.geometry.matches(labels.geometry):
        raise GeometryError(
            f"{entry.labels}: shape {labels.shape} and affine are not those of {entry.image} "
            f"({image.shape}). Give labels on the grid of the image."
        )
    turned = to_ras(image)
    masks = list(_masks(to_ras(labels).array[0], entry, turned.geometry))
    prompt = None if entry.prompt is None else _on_grid(entry.prompt, image.geometry, turned.geometry)
    axis = prompt.axis if prompt else _axis(entry.axis, image.geometry, turned.geometry)
    name = entry.name or Path(entry.image).name.split(".")[0]
    for suffix, region in masks:
        if prompt is not None:
            _check_prompt(prompt, region, f"{name}{suffix}")
        yield PromptObject(
            entry.dataset or "cases", f"{name}{suffix}", turned, region, axis, prompt, entry.window
        )


def world_box(scene: Scene, prompt: BoxPrompt) -> Box:
    """Return the box of a slice as a prompt in the world."""
    corners = np.full((2, 3), float(prompt.index))
    rows, columns = (a for a in range(3) if a != prompt.axis)
    corners[:, rows] = prompt.box[0], prompt.box[2]
    corners[:, columns] = prompt.box[1], prompt.box[3]
    first, last = scene.to_world(corners).tolist()
    return Box(corner_mm=tuple(first), opposite_mm=tuple(last), plane=PLANES[prompt.axis])


def world_point(scene: Scene, click: Click, axis: int) -> Point:
    """Return a click as a prompt in the world, made on a slice across `axis`."""
    position = scene.to_world(np.array(click.voxel, dtype=np.float64)).tolist()
    return Point(position_mm=tuple(position), positive=click.positive, plane=PLANES[axis])


def _find(name: str, folders: Sequence[Path], hint: str) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    searched = ", ".join(map(str, folders))
    raise ReadError(f"{name}: no such file in {searched}. {hint or 'Check the path, or give --data FOLDER.'}")


def _one_channel(image: Volume, entry: CaseEntry) -> Volume:
    if entry.channel is None:
        return image  # Scene refuses several, with the remedy
    if entry.channel >= image.channels:
        raise DataError(f"{entry.image}: has {image.channels} channels, no channel {entry.channel}.")
    return image.with_array(image.array[entry.channel])


def _masks(labels: Array, entry: CaseEntry, geometry: Geometry) -> Iterator[tuple[str, Region]]:
    mask = mask_of(labels, entry.value)
    if not mask.any():
        raise DataError(f"{entry.labels}: has no voxel of value {entry.value}. Check `value` of the case.")
    if entry.components_mm3 is None:
        yield "", Region.of(mask)
        return
    import cc3d

    components = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    sizes = np.bincount(components.ravel()) * geometry.voxel_volume
    sizes[0] = 0
    kept = [c for c in np.argsort(-sizes, kind="stable").tolist() if sizes[c] >= entry.components_mm3]
    if not kept:
        raise DataError(
            f"{entry.labels}: no component has {entry.components_mm3:g} mm3; the largest has "
            f"{sizes.max():g}. Lower `components_mm3`."
        )
    for number, component in enumerate(kept, 1):
        yield f"_{number:02d}", Region.of(components == component)


def _axis(wanted: int | Plane | None, source: Geometry, turned: Geometry) -> int:
    """Return the axis of the turned grid that runs along an axis of the file."""
    if wanted is None:
        return acquisition_axis(turned.spacing)
    if isinstance(wanted, str):
        return PLANES.index(wanted)
    return int(np.argmax(np.abs(_between(source, turned)[:3, wanted])))


def _between(source: Geometry, turned: Geometry) -> FloatArray:
    """Return the matrix from voxels of the file to voxels of the turned grid."""
    return np.asarray(np.linalg.solve(turned.affine, source.affine))


def _on_grid(prompt: BoxOnSlice, source: Geometry, turned: Geometry) -> BoxPrompt:
    axis = _axis(prompt.axis, source, turned)
    matrix = _between(source, turned)
    across = int(np.argmax(np.abs(matrix[axis, :3])))
    rows, columns = (a for a in range(3) if a != across)
    corners = np.full((2, 3), float(prompt.slice))
    corners[:, rows] = prompt.box[0] - 0.5, prompt.box[2] - 0.5
    corners[:, columns] = prompt.box[1] - 0.5, prompt.box[3] - 0.5
    moved = np.sort(corners @ matrix[:3, :3].T + matrix[:3, 3], axis=0)
    down, right = (a for a in range(3) if a != axis)
    box = (moved[0, down], moved[0, right], moved[1, down], moved[1, right])
    top, left, bottom, last = (round(float(edge), 6) for edge in box)
    return BoxPrompt(axis, round(float(moved[0, axis])), (top, left, bottom, last))


def _check_prompt(prompt: BoxPrompt, region: Region, name: str) -> None:
    """Refuse a box that does not touch its object: most often rows and columns, or the axis, are swapped."""
    if not 0 <= prompt.index < region.shape[prompt.axis]:
        raise DataError(f"{name}: slice {prompt.index} of the prompt lies outside the image. Correct it.")
    plane = region.plane(prompt.axis, prompt.index)
    top, left, bottom, right = (max(0, round(edge + 0.5)) for edge in prompt.box)
    if not plane[top:bottom, left:right].any():
        raise DataError(
            f"{name}: the box of the prompt does not touch the object. It is [first row, first column, "
            "end row, end column] on slice `slice` across voxel axis `axis` of the file; rows and "
            "columns are the two other axes in their order. Correct it."
        )


def case_folders(path: PathLike, data: Sequence[PathLike] = ()) -> list[Path]:
    """Return the folders in which the files of cases are searched."""
    return [Path(folder) for folder in data] or [Path(path).resolve().parent]
