"""Training cubes for the refiner: an object, the image around it, and prompts as a user would give them.

A sample is drawn from a label map, which is synthetic or was made for a real image; its image is the real
one, one painted onto the labels with random contrast, or a real one with a lesion put in. All of it is drawn
at the zoom and with the marks of `medseg.nets.refiner`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cc3d
import edt
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from medseg.nets.refiner import GRID, ball, show
from medseg.train.shapes import smooth_noise
from medseg.types import Array, BoolArray, FloatArray, IntArray

# The side of the prompted box in voxels of the cube: what a first look has, and what a closer look has.
FIRST_ZOOM = (10.0, 23.0)
CLOSER_ZOOM = (10.0, 37.0)
# Smaller objects than this (voxels of the label map) teach the grid, not the shape.
SMALLEST = 24
# How often a lesion is put into a real image instead of taking an object that its label map has.
LESIONS = 0.3
# Objects that stand out less than this (`_contrast`) teach to guess; only a few are kept.
FAINT = 0.5
# How often an object ends where no edge of the image says so, as the parts of an organ do: clicks tell.
CUT = 0.12
# How often, and how far (voxels of the cube), an object ends beside its edge: experts differ from edges all
# around an object, and one click has to say so.
MOVED, FARTHEST = 0.3, 1.6
# How often no flood is shown, so that the network does not come to lean on it.
DRY = 0.15


@dataclass(frozen=True, eq=False)
class Source:
    """A label map to draw objects from.

    Attributes
    ----------
    labels : (i, j, k) uint8
        What each voxel is made of; decides its painted intensity.
    objects : (i, j, k) int32
        Connected objects, 0 = none.
    boxes : sequence of (3, 2) int
        Half-open box of object n at n - 1; all zero for one that is too small.
    image : (i, j, k) float32, optional
        The real image.
    spacing : (float, float, float)
        Voxel size.
    """

    labels: IntArray
    objects: IntArray
    boxes: IntArray
    image: FloatArray | None
    spacing: tuple[float, float, float]


def make_source(
    labels: IntArray, image: FloatArray | None = None, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Source:
    """Find the objects of a label map."""
    objects = np.asarray(cc3d.connected_components(labels, connectivity=6), dtype=np.int32)
    counts = np.bincount(objects.ravel())[1:]
    boxes = np.zeros((len(counts), 3, 2), dtype=np.int64)
    for number, found in enumerate(ndimage.find_objects(objects)):
        if found is not None and counts[number] >= SMALLEST:
            boxes[number] = [(part.start, part.stop) for part in found]
    i, j, k = (float(s) for s in spacing)
    return Source(labels, objects, boxes, image, (i, j, k))


@dataclass(frozen=True, eq=False)
class Sample:
    """A cube with its answer.

    Attributes
    ----------
    image, slice_mask, box, previous : (GRID, GRID, GRID) float32
        As `medseg.nets.refiner.show` takes them.
    target : (GRID, GRID, GRID) bool
        The object.
    cut : bool
        The object ends where nothing in the image says so.
    """

    image: Tensor
    slice_mask: Tensor
    box: Tensor
    previous: Tensor
    target: Tensor
    cut: bool = False


def _contrast(sample: Sample) -> float:
    """Return how far the object and what surrounds it lie apart, in units of their own spread."""
    inside = sample.target.numpy()
    around = ndimage.binary_dilation(inside, iterations=2) & ~inside
    image = sample.image.numpy()
    if not around.any():
        return 0.0
    a, b = image[inside], image[around]
    return float(abs(a.mean() - b.mean()) / (0.5 * (a.std() + b.std()) + 1e-6))


def draw_sample(sources: Sequence[Source], rng: np.random.Generator) -> Sample:
    """Draw a sample; the slices of the cube run along its last axis."""
    while True:
        source = sources[int(rng.integers(len(sources)))]
        usable = np.flatnonzero(source.boxes[:, 0, 1])
        if source.image is not None and rng.random() < LESIONS:
            sample = _draw_lesion(source, rng)
        else:
            sample = _draw(source, int(rng.choice(usable)) + 1, rng) if usable.size else None
        if sample is not None and (_contrast(sample) > FAINT or rng.random() < 0.15):
            return sample


@dataclass(frozen=True)
class _Anchor:
    """The prompted slice of an object, in voxels of its source."""

    axis: int
    index: int
    low: FloatArray  # of the box: edges, the two in-plane axes
    high: FloatArray


def _draw(source: Source, number: int, rng: np.random.Generator) -> Sample | None:
    box = source.boxes[number - 1]
    inside = source.objects[tuple(slice(a, b) for a, b in box)] == number
    axis = _slice_axis(source, rng)
    anchor = _anchor(inside, box, axis, rng)
    closer = rng.random() < 0.4
    zoom = float(np.exp(rng.uniform(*np.log(CLOSER_ZOOM if closer else FIRST_ZOOM))))
    plane = [a for a in range(3) if a != axis]
    side = float(max((anchor.high - anchor.low) * np.array(source.spacing)[plane]))
    step = max(side / zoom, 0.3 * min(source.spacing))
    middle = _middle(inside, box, anchor, plane, closer, rng)
    if not closer:  # about what a first look does
        middle = middle + rng.uniform(-3, 3, 3) * step / np.array(source.spacing)
    grid = _Grid.draw(middle, axis, plane, step / np.array(source.spacing), rng)
    target = grid.sample((source.objects == number).astype(np.float32), "bilinear") > 0.5
    if rng.random() < MOVED:
        target = torch.from_numpy(_depth(target.numpy()) > rng.uniform(-FARTHEST, FARTHEST))
    cut = rng.random() < CUT
    if cut:
        target = target & _half(rng)
    if not target.any():
        return None
    thick = _thickness(source, axis, step, rng)
    image = _image(source, grid, thick, rng)
    sample = _prompted(image, target, round(grid.plane_of(anchor)), thick, closer, rng)
    return replace(sample, cut=cut) if sample is not None else None


def _half(rng: np.random.Generator) -> Tensor:
    """Return one side of a random, slightly bent plane through about the middle of the cube."""
    normal = rng.standard_normal(3)
    normal /= np.linalg.norm(normal)
    along = np.arange(GRID) - (GRID - 1) / 2
    grid = np.meshgrid(along, along, along, indexing="ij", sparse=True)
    height = sum(n * g for n, g in zip(normal, grid, strict=True))
    height = height + rng.uniform(0, 1.5) * smooth_noise((GRID,) * 3, 8.0, rng)
    return torch.from_numpy(np.asarray(height) < rng.uniform(0, 7))


def _draw_lesion(source: Source, rng: np.random.Generator) -> Sample | None:
    """Put a lesion of another brightness into a real image."""
    assert source.image is not None
    axis = _slice_axis(source, rng)
    plane = [a for a in range(3) if a != axis]
    step = float(np.exp(rng.uniform(np.log(0.15), np.log(1.5)))) * min(source.spacing)
    middle = rng.uniform(0.15, 0.85, 3) * source.image.shape
    grid = _Grid.draw(middle, axis, plane, step / np.array(source.spacing), rng)
    image = grid.sample(source.image, "bilinear")
    closer = rng.random() < 0.3
    depth = _lesion(rng)
    target = depth > (rng.uniform(-FARTHEST, FARTHEST) if rng.random() < MOVED else 0)
    spread = float(image[target].std()) + 0.25 * float(image.std()) if target.any() else 0.0
    if spread < 1e-3:  # outside the body
        return None
    soft = torch.sigmoid(depth * float(rng.uniform(0.7, 4)))
    bright = float(rng.uniform(0.8, 3)) * spread * float(rng.choice([-1, 1]))
    texture = torch.from_numpy(smooth_noise((GRID,) * 3, 2.0, rng)) * float(rng.uniform(0, 0.3))
    image = image + soft * bright * (1 + texture)
    thick = int(rng.integers(2, 7)) if rng.random() < 0.4 else 1
    image = _degrade(image, rng)
    if thick > 1:
        image = _as_slices(image, thick)
    return _prompted(image, target, int(target.sum((0, 1)).argmax()), thick, closer, rng)


def _lesion(rng: np.random.Generator) -> Tensor:
    """Return the depth, positive inside, of an irregular shape in about the middle of the cube."""
    middle = (GRID - 1) / 2 + rng.uniform(-4, 4, 3)
    radii = rng.uniform(*FIRST_ZOOM) / 2 * rng.uniform(0.5, 1.3, 3)
    axes = [(np.arange(GRID) - m) / r for m, r in zip(middle, radii, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    length = np.sqrt(sum(np.square(g) for g in grid))
    rough = rng.uniform(0, 0.35) * smooth_noise((GRID,) * 3, float(rng.uniform(2, 6)), rng)
    return torch.from_numpy(((1 - length + rough) * radii.mean()).astype(np.float32))


def _slice_axis(source: Source, rng: np.random.Generator) -> int:
    spacing = np.array(source.spacing)
    thickest = int(spacing.argmax())
    return thickest if spacing.max() > 1.5 * spacing.min() else int(rng.integers(3))


def _anchor(inside: BoolArray, box: IntArray, axis: int, rng: np.random.Generator) -> _Anchor:
    """Choose the slice (mostly the one with the largest area) and draw the box with jitter."""
    others = tuple(a for a in range(3) if a != axis)
    areas = inside.sum(axis=others)
    any_slice = int(rng.choice(len(areas), p=areas / areas.sum()))
    index = int(areas.argmax()) if rng.random() < 0.7 else any_slice
    plane = np.moveaxis(inside, axis, 0)[index]
    low, high = [], []
    for number, along in enumerate(others):
        hits = np.flatnonzero(plane.any(axis=1 - number)) + box[along, 0]
        side = hits[-1] + 1 - hits[0]
        jitter = rng.uniform(-0.05, 0.08, 2) * side + rng.uniform(-0.5, 0.7, 2)
        low.append(hits[0] - 0.5 - jitter[0])
        high.append(hits[-1] + 0.5 + jitter[1])
    return _Anchor(axis, index + int(box[axis, 0]), np.array(low), np.maximum(high, np.array(low) + 1))


def _middle(
    inside: BoolArray,
    box: IntArray,
    anchor: _Anchor,
    plane: Sequence[int],
    closer: bool,
    rng: np.random.Generator,
) -> FloatArray:
    """Return where the cube is centred: on the prompted box, or anywhere on the object."""
    if closer:
        voxels = np.argwhere(inside)
        return np.asarray(voxels[int(rng.integers(len(voxels)))] + box[:, 0], dtype=np.float64)
    middle = np.zeros(3)
    middle[anchor.axis] = anchor.index
    middle[list(plane)] = (anchor.low + anchor.high) / 2
    return middle


@dataclass(frozen=True, eq=False)
class _Grid:
    """The cube's voxels in the source: position = middle + matrix @ (voxel - (GRID - 1) / 2)."""

    middle: FloatArray
    matrix: FloatArray
    bend: FloatArray | None

    @classmethod
    def draw(
        cls, middle: FloatArray, axis: int, plane: Sequence[int], steps: FloatArray, rng: np.random.Generator
    ) -> "_Grid":
        """Turn in the plane, flip, stretch and sometimes bend; the slice axis becomes the last."""
        angle = rng.uniform(-np.pi, np.pi) if rng.random() < 0.3 else rng.integers(4) * np.pi / 2
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = np.zeros((3, 3))
        stretch = rng.uniform(0.85, 1.18, 3) * rng.choice([-1, 1], 3)
        # Isotropic in the world first, then voxels of the source.
        matrix[np.ix_(plane, (0, 1))] = turn * stretch[:2]
        matrix[axis, 2] = stretch[2] if rng.random() > 0.5 else stretch[2] * rng.uniform(0.6, 1.5)
        matrix *= steps[:, None]
        bend = None
        if rng.random() < 0.3:
            bend = np.stack([smooth_noise((GRID,) * 3, 10.0, rng) * rng.uniform(0, 1.5) for _ in range(2)])
        return cls(middle, matrix, bend)

    def positions(self) -> FloatArray:
        """Return the source voxel of each voxel of the cube, (GRID, GRID, GRID, 3)."""
        along = np.arange(GRID) - (GRID - 1) / 2
        cube = np.stack(np.meshgrid(along, along, along, indexing="ij"), -1)
        if self.bend is not None:
            cube[..., 0] += self.bend[0]
            cube[..., 1] += self.bend[1]
        return np.asarray(cube @ self.matrix.T + self.middle)

    def sample(self, array: Array, mode: str) -> Tensor:
        """Return the values of a source array, (i, j, k), on the cube; beyond the array, its border's."""
        at = torch.from_numpy(self.positions()).float()
        size = torch.tensor(array.shape, dtype=torch.float32)
        scaled = ((2 * at + 1) / size - 1).flip(-1)  # grid_sample wants the last axis first
        given = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
        padding = "zeros" if mode == "bilinear" and array.dtype == bool else "border"
        found = functional.grid_sample(
            given, scaled[None], mode=mode, padding_mode=padding, align_corners=False
        )
        return found[0, 0]

    def plane_of(self, anchor: _Anchor) -> float:
        """Return the cube's plane that the prompted slice falls on."""
        return float((anchor.index - self.middle[anchor.axis]) / self.matrix[anchor.axis, 2] + (GRID - 1) / 2)


def _thickness(source: Source, axis: int, step: float, rng: np.random.Generator) -> int:
    """Return how many planes of the cube one slice spans."""
    real = source.spacing[axis] / step
    if source.image is not None and real > 1.5:
        return max(1, round(real))
    return int(rng.integers(1, 9)) if rng.random() < 0.4 else 1


def _image(source: Source, grid: _Grid, thick: int, rng: np.random.Generator) -> Tensor:
    painted = source.image is None or rng.random() < 0.35
    if painted:
        image = _paint(grid.sample(source.labels, "nearest").long(), rng)
    else:
        assert source.image is not None
        image = grid.sample(source.image, "bilinear")
    image = _degrade(image, rng)
    if thick > 1:
        image = _as_slices(image, thick)
    return image


def _paint(labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Give every label a random intensity and texture."""
    count = int(labels.max()) + 1
    means = torch.from_numpy(rng.uniform(0, 1, count)).float()
    spreads = torch.from_numpy(rng.uniform(0, 0.12, count)).float()
    noise = torch.from_numpy(rng.standard_normal(labels.shape).astype(np.float32))
    texture = torch.from_numpy(smooth_noise(tuple(labels.shape), float(rng.uniform(1.0, 5.0)), rng))
    image = means[labels] + spreads[labels] * (texture if rng.random() < 0.5 else noise)
    blur = float(rng.uniform(0.2, 1.4))
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), blur))


def _degrade(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change contrast, add a bias field and noise, sometimes invert."""
    low, high = float(image.quantile(0.01)), float(image.quantile(0.99))
    image = ((image - low) / max(high - low, 1e-6)).clamp(-0.3, 1.3)
    if rng.random() < 0.3:
        image = 1 - image
    if rng.random() < 0.5:
        image = image.clamp(0, 1) ** float(np.exp(rng.uniform(-0.7, 0.7)))
    if rng.random() < 0.4:
        bias = smooth_noise(tuple(image.shape), 16.0, rng)
        image = image * (1 + 0.15 * torch.from_numpy(bias))
    if rng.random() < 0.3:
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), float(rng.uniform(0.3, 1.2))))
    if rng.random() < 0.6:
        noise = torch.from_numpy(rng.standard_normal(image.shape).astype(np.float32))
        image = image + noise * float(rng.uniform(0, 0.1))
    return image


def _as_slices(image: Tensor, thick: int) -> Tensor:
    """Average `thick` planes to one slice and interpolate between the slices, as a thick scan does."""
    padded = functional.pad(image[None, None], (0, -GRID % thick, 0, 0, 0, 0), mode="replicate")
    slices = functional.avg_pool3d(padded, (1, 1, thick))
    grown = functional.interpolate(slices, scale_factor=(1, 1, thick), mode="trilinear", align_corners=False)
    return grown[0, 0, :, :, :GRID].contiguous()


def _prompted(
    image: Tensor,
    target: Tensor,
    plane: int,
    thick: int,
    closer: bool,
    rng: np.random.Generator,
) -> Sample | None:
    """Give the prompts: on the planes of slice `plane`, and for a closer look the mask so far."""
    slice_mask, box = torch.zeros(2, *target.shape)
    known = slice(max(0, plane - (thick - 1) // 2), min(GRID, plane + thick // 2 + 1))
    seen = known.start < known.stop and 0 <= plane < GRID
    truth = target[:, :, plane].numpy() if seen else np.zeros((GRID, GRID), dtype=bool)
    if seen and truth.any():
        marks, frame = _slice_marks(truth, rng)
        slice_mask[:, :, known] = torch.from_numpy(marks)[:, :, None]
        box[:, :, known] = torch.from_numpy(frame)[:, :, None]
    elif not closer:
        return None
    previous = torch.zeros(target.shape)
    if closer:
        previous = torch.from_numpy(_previous(target.numpy(), slice_mask.numpy(), rng))
    return Sample(image, slice_mask, box, previous, target)


def _slice_marks(truth: BoolArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Return the mask that a 2D model would give of the slice, and the box, as +1 / -1."""
    hits = [np.flatnonzero(truth.any(axis=1 - axis)) for axis in range(2)]
    frame = -np.ones(truth.shape, dtype=np.float32)
    edges = []
    for along in hits:
        side = along[-1] + 1 - along[0]
        out = rng.uniform(-0.05, 0.08, 2) * side + rng.uniform(-0.5, 0.7, 2)
        edges.append(slice(max(0, round(along[0] - out[0])), max(1, round(along[-1] + 1 + out[1]))))
    frame[tuple(edges)] = 1
    marks = np.where(_wrong(truth, rng, frame > 0), 1, -1).astype(np.float32)
    if rng.random() < 0.08:  # no 2D model at hand, or one that saw nothing: the box alone
        marks[:] = 0
    return marks, frame


def _wrong(mask: BoolArray, rng: np.random.Generator, frame: BoolArray | None = None) -> BoolArray:
    """Return the mask with the mistakes of a model: wavy, too large, too small, leaked, cut."""
    kind = rng.random()
    if kind < 0.2 or not mask.any():
        return mask
    depth = _depth(mask)
    size = max(1.0, float(depth.max()))
    grade = float(rng.uniform(0.05, 0.5)) * min(size, 8.0)
    field = smooth_noise(mask.shape, float(rng.uniform(2, 8)), rng)
    wavy = depth + grade * field + float(rng.normal(0, 0.25)) * grade > 0
    if frame is not None:
        if kind > 0.93:  # all that the box holds
            wavy = _oval(frame)
        wavy = wavy & frame
    return wavy if wavy.any() else mask


def _oval(frame: BoolArray) -> BoolArray:
    rows, columns = (np.flatnonzero(frame.any(axis=1 - axis)) for axis in range(2))
    grid = np.meshgrid(*(np.arange(n) for n in frame.shape), indexing="ij", sparse=True)
    inside = sum(
        ((g - along.mean()) / max(1.0, len(along) / 2)) ** 2
        for g, along in zip(grid, (rows, columns), strict=True)
    )
    return np.asarray(inside) <= 1


def _depth(mask: BoolArray) -> FloatArray:
    """Return the distance to the surface in voxels, positive inside."""
    return np.asarray(edt.edt(mask) - edt.edt(~mask), dtype=np.float32)


def _previous(target: BoolArray, slice_mask: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return a mask so far: with mistakes, and often known in a part of the cube only."""
    wrong = _wrong(target, rng) if target.any() else target
    previous = np.where(wrong, 1, -1).astype(np.float32)
    if rng.random() < 0.7:
        axis, forward = int(rng.integers(3)), rng.random() < 0.5
        cut = int(rng.integers(6, GRID - 10))
        beyond = [slice(None)] * 3
        beyond[axis] = slice(cut, None) if forward else slice(0, GRID - cut)
        previous[tuple(beyond)] = 0
    return previous


def mark_click(clicks: Tensor, prediction: BoolArray, target: BoolArray, rng: np.random.Generator) -> bool:
    """Mark a click in about the middle of the largest error, in place; return whether there is one."""
    wrong = np.where(target & ~prediction, 1, np.where(prediction & ~target, 2, 0)).astype(np.uint8)
    parts = np.asarray(cc3d.connected_components(wrong, connectivity=6))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    number = int(sizes.argmax())
    if sizes[number] < 4:
        return False
    depth = edt.edt(parts == number, black_border=True)
    deep = np.argwhere(depth >= depth.max() * rng.uniform(0.5, 1.0))
    middle = deep[int(rng.integers(len(deep)))]
    ball(clicks, middle.tolist(), 1.0 if target[tuple(middle)] else -1.0)
    return True


def shown(
    sample: Sample, clicks: Tensor | None = None, previous: Tensor | None = None, flooding: bool = True
) -> Tensor:
    """Build the network's input of a sample, (7, GRID, GRID, GRID)."""
    return show(
        sample.image,
        sample.slice_mask,
        sample.box,
        torch.zeros_like(sample.box) if clicks is None else clicks,
        sample.previous if previous is None else previous,
        flooding,
    )
