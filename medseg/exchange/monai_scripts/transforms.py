"""There and back as nnU-Net does it: a volume to the network's grid, logits to labels on its own grid."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]

# nnU-Net: slices thicker than three in-plane voxels are resampled one by one.
ANISOTROPY = 3.0
EPSILON = 1e-8
RECORD = "network_grid"
"""Key of an image's metadata under which the way back is kept, as JSON."""


class ToNetworkGridd(MapTransform):  # type: ignore[misc]
    """Transpose, crop to nonzero, normalise and resample a (c, i, j, k) image.

    Parameters
    ----------
    transpose : network axis n is axis ``transpose[n]`` of the order (k, j, i)
    ras : turn the image by flips and swaps until i, j, k run to R, A, S, before all else
    spacing : voxel size on the network's grid; two numbers leave the distance of the slices as it is
    channels : a channel each, ``{"scheme": "ct", "low", "high", "mean", "std"}``, or ``zscore`` (of this
        image; with ``"masked"`` of its nonzero part), ``rescale-0-1``, ``rgb-0-1``, ``none``
    order, order_z : spline orders, the latter across slices that are resampled one by one
    """

    def __init__(
        self,
        keys: KeysCollection,
        transpose: Sequence[int],
        spacing: Sequence[float],
        channels: Sequence[Mapping[str, Any]],
        order: int = 3,
        order_z: int = 0,
        ras: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transpose, self.ras = tuple(transpose), ras
        self.spacing = tuple(spacing)
        self.channels = tuple(channels)
        self.order, self.order_z = order, order_z

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Convert the images of an item."""
        done = dict(data)
        for key in self.key_iterator(done):
            done[key] = self.convert(done[key])
        return done

    def convert(self, image: MetaTensor) -> MetaTensor:
        """Return (c, a0, a1, a2) float32 with the affine of the network's grid and the way back."""
        image = image[..., None] if image.ndim == 3 else image  # a slice is a volume of one
        self._check(image)
        affine = np.asarray(image.affine, dtype=np.float64)
        axes, flips = network_axes(affine, self.transpose, self.ras)
        array = np.array(turned(image.as_tensor().cpu().numpy(), axes, flips), np.float32, order="C")
        box, inside = crop_box(array)
        array = array[(slice(None), *(slice(*pair) for pair in box))]
        for channel, settings in zip(array, self.channels, strict=True):
            normalize(channel, inside, **settings)
        spacing = [voxel_size(affine)[axis] for axis in axes]
        new_spacing = [*spacing[: 3 - len(self.spacing)], *self.spacing]
        shape = [max(1, round(a / b * n)) for a, b, n in zip(spacing, new_spacing, inside.shape, strict=True)]
        separate = separate_axis(spacing, new_spacing)
        result = np.stack([resample(each, shape, self.order, separate, self.order_z) for each in array])
        record = {"shape": tuple(image.shape[1:]), "affine": affine.tolist(), "axes": axes, "flips": flips}
        record |= {"box": box, "spacing": spacing, "new_spacing": new_spacing}
        meta = {name: value for name, value in image.meta.items() if name != "affine"}
        meta[RECORD] = json.dumps(record)
        grid = affine @ to_source_voxels(image.shape[1:], axes, flips, box, shape)
        return MetaTensor(torch.from_numpy(result), affine=torch.from_numpy(grid), meta=meta)

    def _check(self, image: MetaTensor) -> None:
        if image.ndim != 4 or len(image) != len(self.channels):
            raise ValueError(
                f"image of shape {tuple(image.shape)}: expected three axes and {len(self.channels)} channels."
            )
        if not bool(torch.isfinite(image.as_tensor()).all()):
            raise ValueError("The image holds NaN or infinite voxels. Repair or re-export it.")


class ToLabelMapd(MapTransform):  # type: ignore[misc]
    """Bring logits (outputs, a0, a1, a2) to the grid of the source image and decide labels there.

    One class at a time is resampled, so memory never holds classes x volume.

    Parameters
    ----------
    keys, ref_key : logits, and the image from :class:`ToNetworkGridd`
    order, order_z : spline orders
    regions : for networks of overlapping regions, the label that each paints; else the largest logit wins
    dtype : of the label map
    """

    def __init__(
        self,
        keys: KeysCollection,
        ref_key: str = "image",
        order: int = 1,
        order_z: int = 0,
        regions: Sequence[int] | None = None,
        dtype: str = "uint8",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ref_key, self.regions, self.dtype = ref_key, regions, dtype
        self.order, self.order_z = order, order_z

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Replace logits by label maps (1, i, j, k)."""
        done = dict(data)
        image = done[self.ref_key]
        for key in self.key_iterator(done):
            done[key] = self.convert(done[key], image.meta)
            if "name" in done:  # of the case, for the name of the file
                done[key].meta["filename_or_obj"] = done["name"]
        return done

    def convert(self, logits: torch.Tensor, meta: Mapping[str, Any]) -> MetaTensor:
        """Return the label map of one image."""
        record = json.loads(meta[RECORD])
        plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
        shape = [stop - start for start, stop in record["box"]]
        axis = separate_axis(record["new_spacing"], record["spacing"])
        resampled = (
            resample(channel, shape, self.order, axis, self.order_z).astype(np.float16)
            for channel in plain.cpu().float().numpy()
        )
        labels = decide(resampled, shape, self.regions, self.dtype)
        result = np.zeros((1, *record["shape"]), self.dtype)
        view = turned(result, record["axes"], record["flips"])[0]
        view[tuple(slice(*pair) for pair in record["box"])] = labels
        affine = torch.tensor(record["affine"], dtype=torch.float64)
        kept = {name: meta[name] for name in ("filename_or_obj",) if name in meta}
        return MetaTensor(torch.from_numpy(result), affine=affine, meta=kept)


class CleanComponentsd(MapTransform):  # type: ignore[misc]
    """Apply what cross-validation chose: keep the largest component, remove small ones, close holes.

    Components are joined over faces, edges and corners.

    Parameters
    ----------
    steps : in order, ``{"kind": "keep_largest" | "remove_small" | "fill_holes", "labels", "min_mm3"}``
    """

    def __init__(
        self, keys: KeysCollection, steps: Sequence[Mapping[str, Any]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.steps = tuple(steps)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Change the label maps of an item."""
        done = dict(data)
        for key in self.key_iterator(done):
            image = done[key]
            labels = image.as_tensor().numpy()[0].copy()
            volume = abs(float(np.linalg.det(np.asarray(image.affine)[:3, :3])))
            for step in self.steps:
                clean(labels, volume, **step)
            done[key] = MetaTensor(torch.from_numpy(labels[None]), affine=image.affine, meta=image.meta)
        return done


def crop_box(array: Array) -> tuple[list[tuple[int, int]], Array]:
    """Return the box of what is not zero in any channel, and inside it the same with its holes filled."""
    mask = (array != 0).any(axis=0)
    if not mask.any():
        return [(0, n) for n in mask.shape], mask
    box = []
    for axis in range(3):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append((int(hits[0]), int(hits[-1]) + 1))
    return box, ndimage.binary_fill_holes(mask[tuple(slice(*pair) for pair in box)])


def normalize(
    channel: Array,
    inside: Array,
    scheme: str,
    masked: bool = False,
    low: float = 0.0,
    high: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> None:
    """Normalise one channel in place."""
    if scheme == "ct":
        np.clip(channel, low, high, out=channel)
        channel -= mean
        channel /= max(std, EPSILON)
    elif scheme == "zscore":
        where = inside if masked else np.ones_like(inside)
        if where.any():
            values = channel[where]
            channel[where] = (values - values.mean()) / max(values.std(), EPSILON)
    elif scheme == "rescale-0-1":
        channel -= channel.min()
        channel /= max(channel.max(), EPSILON)
    elif scheme == "rgb-0-1":
        if channel.min() < 0 or channel.max() > 255:
            raise ValueError("A colour channel has values outside 0..255.")
        channel /= 255.0
    elif scheme != "none":
        raise ValueError(f"unknown normalisation {scheme!r}.")


def separate_axis(spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
    """Return the axis across which slices are resampled one by one, or None."""
    for candidate in (spacing, new_spacing):
        if max(candidate) / min(candidate) > ANISOTROPY:
            coarse = [axis for axis, size in enumerate(candidate) if size == max(candidate)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample(channel: Array, shape: Sequence[int], order: int, axis: int | None, order_z: int) -> Array:
    """Resize (a0, a1, a2) as scikit-image's ``resize`` does; across `axis` slice by slice, if given."""
    if list(channel.shape) == list(shape):
        return np.array(channel, dtype=np.float32)
    if axis is None:
        return _resize(channel, shape, order)
    plane = [n for other, n in enumerate(shape) if other != axis]
    slices = np.moveaxis(channel, axis, 0)
    if order_z == 0:  # only the slices that are used
        positions = np.floor((np.arange(shape[axis]) + 0.5) * (len(slices) / shape[axis])).astype(int)
        used, repeat = np.unique(np.clip(positions, 0, len(slices) - 1), return_inverse=True)
        resized = np.stack([_resize(slices[number], plane, order) for number in used])[repeat]
    else:
        resized = np.stack([_resize(each, plane, order) for each in slices])
        resized = _zoom(resized, [shape[axis], *plane], order_z)
    return np.moveaxis(resized, 0, axis)


def _resize(array: Array, shape: Sequence[int], order: int) -> Array:
    if list(array.shape) == list(shape):
        return np.array(array, dtype=np.float32)
    return np.clip(_zoom(array, shape, order), array.min(), array.max())


def _zoom(array: Array, shape: Sequence[int], order: int) -> Array:
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    values = np.asarray(array, dtype=np.float64)
    zoom: Any = ndimage.zoom
    result: Array = zoom(values, factors, order=order, mode="nearest", grid_mode=True).astype(np.float32)
    return result


def decide(channels: Any, shape: Sequence[int], regions: Sequence[int] | None, dtype: str) -> Array:
    """Return the label of every voxel from logits that come one class after the other."""
    labels = np.zeros(shape, dtype)
    if regions is not None:
        for score, value in zip(channels, regions, strict=True):
            labels[score > 0] = value
        return labels
    best = None
    for number, score in enumerate(channels):
        if best is None:
            best = score
            continue
        labels[score > best] = number
        np.maximum(best, score, out=best)
    return labels


def clean(
    labels_map: Array, voxel_mm3: float, kind: str, labels: Sequence[int], min_mm3: float | None = None
) -> None:
    """Change a label map in place by one step of :class:`CleanComponentsd`."""
    if kind == "fill_holes":
        for label in labels:
            filled = ndimage.binary_fill_holes(labels_map == label)
            labels_map[filled & (labels_map == 0)] = label
        return
    find: Any = ndimage.label
    components, _ = find(np.isin(labels_map, list(labels)), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    small = sizes < sizes.max() if min_mm3 is None else sizes * voxel_mm3 < min_mm3
    labels_map[small[components] & (components > 0)] = 0


def voxel_size(affine: Array) -> list[float]:
    """Return the voxel size along i, j, k; headers hold float32, so a last digit beyond it is dropped."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    single = lengths.astype(np.float32).astype(np.float64)
    return [float(x) for x in np.where(np.abs(single - lengths) < 1e-9 * lengths, single, lengths)]


def network_axes(affine: Array, transpose: Sequence[int], ras: bool) -> tuple[list[int], list[bool]]:
    """Return for each axis of the network its voxel axis of the source, and whether it runs against it."""
    voxel, against = [0, 1, 2], [False] * 3
    if ras:
        found = io_orientation(affine)  # by voxel axis: world axis, direction
        voxel = [int(axis) for axis in np.argsort(found[:, 0])]
        against = [bool(found[axis, 1] < 0) for axis in voxel]
    return [voxel[2 - axis] for axis in transpose], [against[2 - axis] for axis in transpose]


def turned(array: Array, axes: Sequence[int], flips: Sequence[bool]) -> Array:
    """Return a view of a (c, i, j, k) array with the axes of the network."""
    view = array.transpose(0, *(axis + 1 for axis in axes))
    return view[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]


def to_source_voxels(
    source: Sequence[int],
    axes: Sequence[int],
    flips: Sequence[bool],
    box: Sequence[tuple[int, int]],
    shape: Sequence[int],
) -> Array:
    """Return the (4, 4) matrix from voxels of the network's grid to voxels (i, j, k) of the source."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for number, (axis, (start, stop)) in enumerate(zip(axes, box, strict=True)):
        ratio = (stop - start) / shape[number]
        first = start + ratio / 2 - 0.5
        matrix[axis, number] = -ratio if flips[number] else ratio
        matrix[axis, 3] = source[axis] - 1 - first if flips[number] else first
    return matrix
