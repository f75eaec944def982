"""Which values are drawn black and white: CT by target, MR and PET by percentiles, never a CT unwindowed.

The networks of SAM's family look at 256 grey levels. An image of 4,000 Hounsfield units squeezed into them
has no liver any more, so the window decides over the mask (medseg records it with every result).
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.errors import ConfigError, DataError
from medseg.geometry.orient import to_ras
from medseg.prompt.prompts import Box, Lasso, Mask, Point, Prompt, Scribble
from medseg.prompt.regions import Region, Triple
from medseg.prompt.scene import Scene
from medseg.types import Array, FloatArray, IntArray
from medseg.volume import Volume

Modality = Literal["CT", "MR", "PET"]

# Target -> (level, width) in Hounsfield units. Presets of the OHIF viewer (soft tissue, lung, liver, bone,
# brain) and of Radiopaedia, "Windowing (CT)" (mediastinum, subdural, stroke). "soft tissue" is also what
# LiteMedSAM was trained on (pre_CT_MR.py of its authors: level 40, width 400). The liver's level is that of
# the portal venous phase; without contrast take (-45, 105), Radiopaedia's 150 at 30.
WINDOWS: dict[str, tuple[float, float]] = {
    "soft tissue": (40, 400),
    "lung": (-600, 1500),
    "bone": (480, 2500),
    "brain": (40, 80),
    "liver": (90, 150),
    "mediastinum": (50, 350),
    "subdural": (75, 200),
    "stroke": (40, 40),
}
# `auto` on CT takes the first of these in which the middle of what was pointed at is neither black nor white.
_AUTO = ("soft tissue", "lung", "bone")
# Of the voxels above 0, as in LiteMedSAM's pre_CT_MR.py for everything that is not CT.
PERCENTILES = (0.5, 99.5)
# Air is -1000 HU, with noise (and padding of -1024 to -3024) around and below it.
_AIR_HU = -900.0
# Fat is -50 to -120 HU; a body without air in the picture (a cropped CT) still has some of it. MR and PET are
# not negative but for the noise and ringing of resampling, a few hundredths of their range.
_FAT_HU, _FAT_SHARE = -40.0, 0.02
# Percentiles of more voxels than this are not worth their time: every n-th voxel along each axis is taken.
_MOST_SAMPLES = 4_000_000
# Half the side of the cube that is looked at around a click.
_CLICK_MM = 3.0
# What a modality may be called. OTHER is all that is neither: ultrasound, microscopy, a photograph.
_NAMES = {
    **{"CT": "CT", "MR": "MR", "PET": "PET", "OTHER": "other"},
    **{"MRI": "MR", "PT": "PET", "T1": "MR", "T2": "MR", "FLAIR": "MR", "CBCT": "CT"},
}


@dataclass(frozen=True)
class Window:
    """The values drawn black (`low`) and white (`high`), and how they were found.

    Attributes
    ----------
    low, high : float
        In the units of the voxels (HU for CT).
    name : str
        The preset, ``percentiles``, or ``given``.
    modality : str
        ``CT``, ``MR``, ``PET``, or ``other``: told, or seen from the values.
    """

    low: float
    high: float
    name: str
    modality: str

    @property
    def values(self) -> tuple[float, float]:
        """The pair that a :class:`~medseg.prompt.scene.Scene` takes."""
        return (self.low, self.high)

    def to_dict(self) -> dict[str, float | str]:
        """Return plain data for provenance."""
        return {"low": self.low, "high": self.high, "name": self.name, "modality": self.modality}


def choose_window(
    volume: Volume,
    wanted: str | tuple[float, float] = "auto",
    modality: str | None = None,
    region: Region | None = None,
) -> tuple[float, float]:
    """Return the values that are drawn black and white; see :func:`find_window`."""
    return find_window(volume, wanted, modality, region).values


def find_window(
    volume: Volume,
    wanted: str | tuple[float, float] = "auto",
    modality: str | None = None,
    region: Region | None = None,
) -> Window:
    """Choose a window.

    Parameters
    ----------
    volume : one channel
    wanted : the name of a preset of :data:`WINDOWS` (CT), ``percentiles`` (anything else), the two values
        (black, white), ``LEVEL/WIDTH`` such as ``40/400``, or ``auto``: for CT the first of soft tissue,
        lung and bone that shows what lies in `region`, else percentiles 0.5 and 99.5 of the voxels above 0
    modality : ``CT``, ``MR``, ``PET`` or ``other``, where it is known; else it is seen from the values
    region : what was pointed at, on the grid of the volume turned to RAS (:func:`prompted_region`)

    Raises
    ------
    ConfigError
        The window or the modality is unknown, or the window has no width or is not one for this modality.
    DataError
        No voxel is finite.
    """
    array = to_ras(volume).array[0]
    kind = _modality(array, modality)
    if not isinstance(wanted, str) or "/" in wanted:
        return Window(*_given(wanted), "given", kind)
    name = _known(wanted, kind, told=modality is not None)
    if name == "percentiles":
        return Window(*_percentiles(_sample(array)), name, kind)
    if name == "auto":
        name = _shows(array, region)
    return Window(*edges(*WINDOWS[name]), name, kind)


def edges(level: float, width: float) -> tuple[float, float]:
    """Return the values drawn black and white of a window in the radiologists' words.

    >>> edges(40, 400)
    (-160.0, 240.0)
    """
    return (level - width / 2, level + width / 2)


def looks_like_ct(array: Array) -> bool:
    """Return whether values are Hounsfield units: some are air, or a share as low as fat."""
    sample = _sample(array)
    return bool(sample.min() <= _AIR_HU or np.mean(sample <= _FAT_HU) >= _FAT_SHARE)


def prompted_region(scene: Scene, prompts: Iterable[Prompt]) -> Region:
    """Return the box of voxels that prompts point at, for ``auto``: positive ones only, cut to the grid.

    Around a click it is a cube of 6 mm. Prompts that lie outside of the volume add nothing.
    """
    corners = [_corners(scene, prompt) for prompt in prompts if getattr(prompt, "positive", True)]
    boxes = [_cut(box, scene.shape) for box in corners]
    boxes = [box for box in boxes if (box[0] < box[1]).all()]
    if not boxes:
        return Region.empty(scene.shape)
    start, stop = np.min(boxes, axis=0)[0], np.max(boxes, axis=0)[1]
    i, j, k = (int(n) for n in start)
    return Region(scene.shape, (i, j, k), np.ones(tuple(stop - start), dtype=bool))


def _cut(box: FloatArray, shape: Triple) -> IntArray:
    """Return first and end voxel, (2, 3), of a box of lowest and highest voxels, cut to the grid."""
    low, high = np.floor(box + 0.5).astype(np.int64)
    return np.stack([np.maximum(low, 0), np.minimum(high + 1, shape)])


def _corners(scene: Scene, prompt: Prompt) -> FloatArray:
    """Return the lowest and the highest voxel of a prompt, (2, 3); of one that holds none, (0, -1)."""
    if isinstance(prompt, Mask):
        return np.array([prompt.start, np.add(prompt.start, prompt.size) - 1], dtype=float)
    if isinstance(prompt, Point):
        reach = _CLICK_MM / np.array(scene.spacing)
        voxel = scene.to_voxel(prompt.position_mm)
        return np.stack([voxel - reach, voxel + reach])
    if isinstance(prompt, Box):
        voxels = scene.to_voxel(np.array([prompt.corner_mm, prompt.opposite_mm]))
        low, high = voxels.min(axis=0) + 0.5, voxels.max(axis=0) - 0.5  # corners are edges of voxels
        flat = low > high  # along the normal of a box on a plane
        return np.where(flat, (low + high) / 2, np.stack([low, high]))
    if isinstance(prompt, Scribble | Lasso):
        voxels = scene.to_voxel(np.array(prompt.points_mm))
        return np.stack([voxels.min(axis=0), voxels.max(axis=0)])
    return np.array([[0.0] * 3, [-1.0] * 3])  # of another object: what it is made of has its own prompts


def _modality(array: Array, told: str | None) -> str:
    if told is None:
        return "CT" if looks_like_ct(array) else "other"
    name = told.strip().upper()
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_NAMES)}."
        raise ConfigError(f"modality {told!r}: unknown; {hint}")
    return _NAMES[name]


def _given(wanted: str | tuple[float, float]) -> tuple[float, float]:
    if isinstance(wanted, str):
        match = re.fullmatch(r"\s*(-?[\d.]+)\s*/\s*([\d.]+)\s*", wanted)
        try:
            low, high = edges(float(match[1]), float(match[2])) if match else (0.0, 0.0)
        except ValueError:
            low, high = 0.0, 0.0
    else:
        low, high = (float(value) for value in wanted)
    if not (np.isfinite((low, high)).all() and low < high):
        raise ConfigError(
            f"window {wanted!r}: expected two values (black, white) with black below white, "
            "or LEVEL/WIDTH such as 40/400. Correct it."
        )
    return low, high


def _known(wanted: str, kind: str, told: bool) -> str:
    """Return the window's name, with ``auto`` resolved for what is not CT; refuse one of another modality."""
    name = " ".join(re.split(r"[\s_-]+", wanted.strip().lower()))
    if name == "auto":
        return "auto" if kind == "CT" else "percentiles"
    if name == "percentiles" and kind == "CT":
        raise ConfigError(
            f"window 'percentiles': a CT is always seen through a window in HU. Take one of "
            f"{', '.join(WINDOWS)}, LEVEL/WIDTH, or auto."
        )
    if name in WINDOWS and kind != "CT":
        found = f"this image is {kind}" if told else "the values of this image do not look like CT"
        raise ConfigError(
            f"window {wanted!r}: a window of CT, but {found}. Take auto, or say modality CT if it is one."
        )
    if name not in WINDOWS and name != "percentiles":
        near = difflib.get_close_matches(name, WINDOWS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: auto, {', '.join(WINDOWS)}, percentiles."
        raise ConfigError(f"window {wanted!r}: unknown; {hint}")
    return name


def _shows(array: Array, region: Region | None) -> str:
    """Return the first preset of `auto` in which the median of the region is neither black nor white."""
    if region is None or min(region.array.shape) == 0:
        return _AUTO[0]
    if region.shape != array.shape:
        raise DataError(f"a region on a grid of {region.shape} does not fit an image of {array.shape}.")
    inside = _finite(array[region.slices][region.array])
    if inside.size == 0:
        return _AUTO[0]
    median = float(np.median(inside))
    for name in _AUTO:
        low, high = edges(*WINDOWS[name])
        if low <= median <= high:
            return name
    return _AUTO[1] if median < 0 else _AUTO[-1]  # air, metal


def _percentiles(sample: Array) -> tuple[float, float]:
    seen = sample
    if sample.min() >= 0 and (sample > 0).any():  # an image that was normalised has tissue below 0
        seen = sample[sample > 0]
    low, high = (float(value) for value in np.percentile(seen, PERCENTILES))
    if low < high:
        return low, high
    low, high = float(sample.min()), float(sample.max())
    return (low, high) if low < high else (low, low + 1.0)  # a constant image is black


def _sample(array: Array) -> Array:
    """Return finite voxels, at most some millions, the same ones for a volume in each order of its axes."""
    step = max(1, int(np.ceil((array.size / _MOST_SAMPLES) ** (1 / 3))))
    steps: Triple = (step, step, step)
    thin = [slice(None, None, min(s, max(1, n // 8))) for s, n in zip(steps, array.shape, strict=True)]
    found = _finite(array[tuple(thin)])
    if found.size == 0:
        found = _finite(array)
    if found.size == 0:
        raise DataError("the image has no finite voxel. Re-export it.")
    return found


def _finite(values: Array) -> Array:
    flat = np.asarray(values).reshape(-1)
    return flat if flat.dtype.kind not in "fc" else flat[np.isfinite(flat)]
