"""Training patches: which case, which place, what it looks like after augmentation.

Every sample is a pure function of (seed, stream, number), so a run that was killed goes on with exactly
the samples it would have seen, several processes share one batch without talking, and loader threads
can be as many as one likes.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medseg.errors import TrainingError
from medseg.labels import LabelSet
from medseg.train import augment
from medseg.train.config import TrainConfig
from medseg.types import Array, FloatArray, IntArray

OUTSIDE = -1  # label of voxels that no image covers
LOADER_TIMEOUT_SECONDS = 600.0


class CaseArrays(Protocol):
    """A preprocessed case: arrays that can be sliced, in network order."""

    @property
    def data(self) -> Any:
        """(channel, a0, a1, a2) float."""

    @property
    def seg(self) -> Any:
        """(1, a0, a1, a2) int; -1 outside the image's nonzero region."""

    @property
    def locations(self) -> Mapping[str, IntArray]:
        """Voxels (n, 3) of each label entry, and of all annotated voxels under "annotated"."""

    @property
    def previous(self) -> Any | None:
        """(1, a0, a1, a2) labels of the previous stage, for a cascade."""


@dataclass(frozen=True)
class Sample:
    """One patch, ready for the network: image (c, *patch) float32 and seg (*patch) int16.

    Where a loss wants more than classes, seg holds what it wants, (k, *patch) float32.
    """

    image: FloatArray
    seg: Array


class PatchSource(Protocol):
    """Whatever draws patches for the loop."""

    @property
    def config(self) -> TrainConfig:
        """The recipe of the loop."""

    def sample(self, number: int, forced: bool) -> Sample:
        """Return patch `number` of the run, around an object if `forced`."""


class Sampler:
    """Draws patches of `patch` from `cases`.

    Parameters
    ----------
    cases : sequence of CaseArrays
    patch : two or three numbers, network order; two mean slices across the first axis
    labels : the label set (entries decide which voxels may be forced)
    config : the recipe
    mirror_axes : patch axes that may be flipped
    masked_channels : channels that are zeroed outside the nonzero region (normalised with a mask)
    train : False for validation: no augmentation, and the final patch is where it is drawn
    """

    def __init__(
        self,
        cases: Sequence[CaseArrays],
        patch: tuple[int, ...],
        labels: LabelSet,
        config: TrainConfig,
        mirror_axes: tuple[int, ...] = (),
        masked_channels: tuple[int, ...] = (),
        train: bool = True,
    ) -> None:
        if not cases:
            raise TrainingError("no cases to draw patches from. Check the split and the dataset.")
        self.cases = cases
        self.patch = patch
        self.labels = labels
        self.config = config
        self.mirror_axes = mirror_axes
        self.masked_channels = masked_channels
        self.train = train
        self.initial = augment.initial_patch(patch, config.augment) if train else patch

    def sample(self, number: int, forced: bool) -> Sample:
        """Return patch `number` of the run; `forced` centres it on a labelled voxel."""
        rng = np.random.default_rng([self.config.seed, int(self.train), number])
        case = self.cases[int(rng.integers(len(self.cases)))]
        low = self._draw_place(case, rng, forced)
        spatial = None
        if self.train:
            spatial = augment.draw_spatial(rng, self.patch, self.config.augment)
        image, seg = self._read(case, low, spatial)
        if self.train:
            image[: self._n_channels(case)] = augment.augment_intensity(
                image[: self._n_channels(case)], rng, self.config.augment
            )
            flips = augment.draw_mirror(rng, self.mirror_axes, self.config.augment.p_mirror)
            image, seg = (_flip(a, flips, len(self.patch)).copy() for a in (image, seg))
            image = self._disturb(image, case, rng)
        for channel in self.masked_channels:
            image[channel][seg < 0] = 0
        return Sample(np.ascontiguousarray(image), np.ascontiguousarray(np.maximum(seg, 0)))

    def _n_channels(self, case: CaseArrays) -> int:
        return int(case.data.shape[0])

    def _draw_place(self, case: CaseArrays, rng: np.random.Generator, forced: bool) -> tuple[int, ...]:
        """Return the lower corner of the final patch (spec 1.12: forced and free patches)."""
        shape = tuple(case.data.shape[1:])
        voxel = _forced_voxel(case, rng, forced, self.labels.ignore is not None)
        in_plane = shape[-len(self.patch) :]
        lows = [_draw_axis(rng, *sizes) for sizes in zip(in_plane, self.patch, self.initial, strict=True)]
        if voxel is not None:
            focus = voxel[-len(self.patch) :]
            lows = [
                max(_lowest(n, p, i), int(v) - i // 2)
                for n, p, i, v in zip(in_plane, self.patch, self.initial, focus, strict=True)
            ]
        corner = [low + (i - p) // 2 for low, p, i in zip(lows, self.patch, self.initial, strict=True)]
        if len(self.patch) == 2:
            corner.insert(0, int(rng.integers(shape[0])) if voxel is None else int(voxel[0]))
        return tuple(corner)

    def _read(
        self, case: CaseArrays, low: tuple[int, ...], spatial: augment.Spatial | None
    ) -> tuple[FloatArray, IntArray]:
        size = self.patch if spatial is None else spatial.reach(self.patch)
        margin = [(s - p) // 2 for s, p in zip(size, self.patch, strict=True)]
        corner = list(low)
        corner[-len(size) :] = [c - m for c, m in zip(low[-len(size) :], margin, strict=True)]
        box = size if len(size) == 3 else (1, *size)
        image = read_box(case.data, corner, box, 0).astype(np.float32, copy=False)
        seg = read_box(case.seg, corner, box, OUTSIDE)[:1]
        if case.previous is not None:
            seg = np.concatenate([seg, read_box(case.previous, corner, box, 0)])
        if len(size) == 2:
            image, seg = image[:, 0], seg[:, 0]
        if spatial is not None:
            image, seg = augment.resample_patch(image, seg, spatial, self.patch)
        if case.previous is not None:
            earlier = np.stack([seg[1] == value for value in self.labels.foreground_values])
            image = np.concatenate([image, earlier.astype(np.float32)])
        return image, seg[0]

    def _disturb(self, image: FloatArray, case: CaseArrays, rng: np.random.Generator) -> FloatArray:
        if case.previous is None:
            return image
        n = self._n_channels(case)
        noisy = augment.disturb_previous(image[n:], rng, self.config.augment, len(self.patch))
        return np.concatenate([image[:n], noisy])


def read_box(array: Any, low: Sequence[int], size: Sequence[int], fill: float) -> Array:
    """Read ``array[:, low:low+size]``; what lies outside the array becomes `fill`."""
    shape = array.shape[1:]
    inside = [(max(0, a), min(n, a + s)) for a, s, n in zip(low, size, shape, strict=True)]
    result = np.full((array.shape[0], *size), fill, dtype=array.dtype)
    if all(b > a for a, b in inside):
        source = (slice(None), *[slice(a, b) for a, b in inside])
        target = (slice(None), *[slice(a - c, b - c) for (a, b), c in zip(inside, low, strict=True)])
        result[target] = array[source]
    return result


def batches(
    sampler: PatchSource, first_step: int, batch_size: int, rank: int, world: int, threads: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of each global batch, from `first_step` on, made ahead by threads.

    Yields
    ------
    images : (share, channel, *patch) float32
    segs : (share, *patch) int16, or what else the samples hold

    Raises
    ------
    TrainingError
        A batch did not come within ten minutes (a dead disk, say). An error while making one is
        raised here as it is.
    """
    free = round(batch_size * (1 - sampler.config.oversample_foreground))

    def make(step: int) -> tuple[Tensor, Tensor]:
        places = range(rank, batch_size, world)
        samples = [sampler.sample(step * batch_size + k, forced=k >= free) for k in places]
        images = torch.from_numpy(np.stack([s.image for s in samples]))
        return images, torch.from_numpy(np.stack([s.seg for s in samples]))

    executor = ThreadPoolExecutor(threads, "loader", torch.set_num_threads, (1,))
    try:
        waiting = deque(executor.submit(make, first_step + ahead) for ahead in range(threads))
        for step in count(first_step):
            waiting.append(executor.submit(make, step + threads))
            yield _made(waiting.popleft(), step)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _made(batch: Future[tuple[Tensor, Tensor]], step: int) -> tuple[Tensor, Tensor]:
    try:
        return batch.result(timeout=LOADER_TIMEOUT_SECONDS)
    except TimeoutError as error:
        raise TrainingError(
            f"batch {step} was not ready after {LOADER_TIMEOUT_SECONDS:.0f} s. "
            "Check that the disk with the run folder answers, then resume."
        ) from error


def validation_batches(
    sampler: PatchSource, samples: int, batch_size: int, rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same validation patches every time, a third of them centred on labelled voxels."""
    for start in range(rank * batch_size, samples, world * batch_size):
        numbers = range(start, min(samples, start + batch_size))
        drawn = [sampler.sample(n, forced=n % 3 == 0) for n in numbers]
        yield (
            torch.from_numpy(np.stack([s.image for s in drawn])),
            torch.from_numpy(np.stack([s.seg for s in drawn])),
        )


def to_target(seg: Tensor, labels: LabelSet) -> tuple[Tensor, Tensor | None]:
    """Turn (batch, *space) labels into what the loss wants, and the mask of voxels that count.

    Returns
    -------
    target : (batch, *space) int64 for classes, (batch, region, *space) uint8 for regions
    valid : (batch, *space) bool, or None where every voxel counts
    """
    valid = None if labels.ignore is None else seg != labels.ignore
    if not labels.has_regions:
        return seg.long(), valid
    members = [v if isinstance(v, tuple) else (v,) for v in labels.foreground.values()]
    regions = [torch.isin(seg, torch.tensor(m, dtype=seg.dtype, device=seg.device)) for m in members]
    return torch.stack(regions, 1).to(torch.uint8), valid


def _lowest(shape: int, patch: int, initial: int) -> int:
    """Return the lowest corner of the initial patch along one axis."""
    return (-_padding(shape, patch, initial)) // 2


def _padding(shape: int, patch: int, initial: int) -> int:
    return max(initial - patch, initial - shape)


def _draw_axis(rng: np.random.Generator, shape: int, patch: int, initial: int) -> int:
    pad = _padding(shape, patch, initial)
    highest = shape + pad // 2 + pad % 2 - initial
    return int(rng.integers((-pad) // 2, highest + 1))


def _forced_voxel(
    case: CaseArrays, rng: np.random.Generator, forced: bool, has_ignore: bool
) -> IntArray | None:
    present = [name for name, voxels in case.locations.items() if len(voxels) and name != "annotated"]
    annotated = case.locations.get("annotated")
    if forced and present:
        voxels = case.locations[present[int(rng.integers(len(present)))]]
    elif has_ignore and annotated is not None and len(annotated):
        voxels = annotated
    else:
        return None
    chosen: IntArray = voxels[int(rng.integers(len(voxels)))]
    return chosen


def _flip(array: Array, axes: tuple[int, ...], dims: int) -> Array:
    """Flip patch axes of (..., *patch)."""
    return np.flip(array, tuple(axis - dims for axis in axes)) if axes else array
