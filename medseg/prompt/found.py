"""Everything in an image, found without a prompt and written like what was pointed at."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.files import atomic_path, write_text
from medseg.io import write
from medseg.labels import LabelSet
from medseg.prompt.entries import Axis, Grid
from medseg.prompt.prompts import PLANES
from medseg.prompt.provenance import models_at_work
from medseg.prompt.regions import Region
from medseg.prompt.results import Networks, Options, open_image, report_path
from medseg.prompt.session import choose_axis
from medseg.prompt.sheet import Shown, draw_sheet
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.automatic import Everything
    from medseg.prompt.scene import Scene


def find_everything(
    image: PathLike | Volume,
    options: Options,
    overrides: Sequence[str] = (),
    axis: Axis | None = None,
    reach: tuple[float, float] | None = None,
    networks: Networks | None = None,
) -> "Found":
    """Segment everything in an image, without a prompt (:mod:`medseg.prompt.automatic`).

    Parameters
    ----------
    image : a volume or its file
    options : of which coordinates, window, modality and channel matter
    overrides : of :class:`~medseg.prompt.automatic.AutomaticConfig`
    axis : across which slices are taken
    reach : first and last slice to look at, in mm along the axis or in voxels
    networks : to use

    Raises
    ------
    DataError
        The image has several channels, or the reach lies outside of it.
    """
    from medseg.prompt.automatic import AutomaticConfig, segment_everything

    with open_image(image, options) as session:
        grid = Grid(session.scene, options.coordinates)
    across = choose_axis(grid.scene, ()) if axis is None else grid.axis(axis)
    first, last = (0, grid.scene.shape[across] - 1) if reach is None else grid.limits(reach, across)
    config = AutomaticConfig().with_overrides(overrides, "--set")
    models = (networks or Networks())(grid.scene)
    found = segment_everything(models, config, across, range(first, last + 1))
    return Found(grid.scene, found, across, tuple(models_at_work(models)))


@dataclass(frozen=True, eq=False)
class Found:
    """Everything in an image."""

    scene: "Scene"
    everything: "Everything"
    axis: int
    models: tuple[dict[str, str], ...]

    def names(self) -> tuple[str, ...]:
        """Return a name for each label."""
        width = len(str(len(self.everything.objects)))
        return tuple(f"object {each.label:0{width}d}" for each in self.everything.objects)

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of every object, as :func:`describe` does."""
        scale = 1e-12 if self.scene.geometry.unit == "micron" else 1e-3
        return [
            {
                "name": name,
                "label": each.label,
                "voxels": each.voxels,
                "volume_ml": float(f"{each.volume_mm3 * scale:.6g}"),
                "plane": PLANES[self.axis],
                "slices": each.last - each.first + 1,
                "confidence": round(each.iou, 4),
                "notes": [],
                "centre": [round(x, 2) for x in each.centre_mm],
            }
            for name, each in zip(self.names(), self.everything.objects, strict=True)
        ]

    def write(self, image: str, out: Path) -> None:
        """Write the label map, and beside it what its integers mean and how it came to be."""
        from medseg.prompt.automatic import restore_labels

        labels = LabelSet(entries={"background": 0, **{name: n for n, name in enumerate(self.names(), 1)}})
        content = {
            "input": image,
            "output": out.name,
            "labels": labels.to_dict(),
            "objects": self.rows(),
            "left_out": [vars(each) for each in self.everything.left_out],
            "provenance": {
                "medseg": metadata.version("medseg"),
                "image": self.scene.digest,
                "window": list(self.scene.window),
                "models": list(self.models),
            },
        }
        write(restore_labels(self.scene, self.everything.labels), out)
        write_text(report_path(out), json.dumps(content, indent=1))

    def write_sheet(self, path: Path, title: str) -> None:
        """Draw a contact sheet of all objects together and write it (PNG)."""
        png = draw_sheet(self.scene, self.sheet(), title, together=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(png)

    def sheet(self) -> list[Shown]:
        """Return what a contact sheet shows."""
        from scipy.ndimage import find_objects

        labels = self.everything.labels
        boxes = find_objects(labels.astype(np.int32))
        return [
            Shown(
                name,
                Region.at(labels[box] == n, (box[0].start, box[1].start, box[2].start), self.scene.shape),
                self.axis,
                note=f"{row['volume_ml']:,.4g} ml  ·  confidence {row['confidence']:.2f}",
            )
            for n, (name, row, box) in enumerate(zip(self.names(), self.rows(), boxes, strict=True), 1)
        ]
