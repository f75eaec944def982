"""A CT-like abdomen made by code, with known truth: no download, no patient, no two alike.

Anatomy is a list of shapes in canonical patient millimetres: x to the patient's right, y to the front,
z to the head (RAS+, like every world frame of medseg), origin in mid-abdomen. Each shape is a *depth*
field: millimetres inside its surface, negative outside. Depth gives partial volume for free: a voxel
whose centre lies `depth` inside a surface is covered by about ``0.5 + depth / voxel size`` of it.

A patient is a set of numbers drawn once (:func:`draw_patient`), a scan another (:func:`draw_scan`);
:func:`render` applies both and draws nothing.

Sizes, places and Hounsfield units (portal venous phase) are what anatomy and radiology textbooks give
for adults, rounded; they are plausible, not measured. Phantoms are for tests, demonstrations and timing,
never for a claim about patients.

>>> phantom = make_phantom(seed=7, size=32)
>>> phantom.image.geometry.matches(phantom.label.geometry)
True
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage

from medseg.errors import ConfigError
from medseg.files import atomic_folder, write_text
from medseg.io import write
from medseg.labels import LabelSet
from medseg.log import progress
from medseg.types import FloatArray, IntArray, PathLike
from medseg.volume import Geometry, Volume

ORGANS = ("liver", "spleen", "kidneys")
LABELS = LabelSet(entries={"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "lesion": 4})
SIDED_LABELS = LabelSet(
    entries={"background": 0, "liver": 1, "spleen": 2, "kidney_left": 3, "kidney_right": 4, "lesion": 5}
)

# Hounsfield units, and how much they vary between patients (standard deviation).
_HU: Mapping[str, tuple[float, float]] = {
    "fat": (-104, 4),
    "muscle": (58, 4),
    "marrow": (190, 30),
    "cortical": (520, 60),
    "disc": (85, 6),
    "canal": (28, 4),
    "lung": (-840, 20),
    "heart": (135, 8),
    "liver": (108, 9),
    "spleen": (122, 8),
    "cortex": (188, 14),
    "medulla": (150, 12),
    "pancreas": (92, 8),
    "bile": (8, 4),
    "bowel": (62, 6),
    "aorta": (158, 12),
    "vein": (150, 10),
    "portal": (172, 10),
    "lesion": (52, 10),
}
_AIR, _PADDING, _GAS = -1000.0, -1024.0, -930.0

# Centre and half-axes in mm.
_BLOBS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "liver right": ((72, -4, 20), (84, 84, 88)),
    "liver left": ((-4, 46, 50), (66, 30, 33)),
    "spleen": ((-100, -42, 34), (34, 48, 54)),
    "spleen hollow": ((-58, -12, 28), (38, 52, 74)),
    "kidney right": ((55, -58, -50), (27, 24, 54)),
    "kidney left": ((-58, -57, -36), (27, 24, 55)),
    "stomach": ((-50, 30, 34), (38, 36, 44)),
    "gallbladder": ((50, 52, -14), (13, 27, 17)),
    "heart": ((-16, 28, 142), (60, 48, 47)),
}
# Points along the middle in mm, and the radius at each.
_TUBES: Mapping[str, tuple[tuple[tuple[float, float, float, float], ...], str]] = {
    "aorta": (((-10, -42, 150, 11.5), (-10, -36, 40, 10.5), (-8, -32, -120, 8.5)), "aorta"),
    "vena cava": (((20, -22, 100, 12), (20, -30, 60, 12), (18, -34, -120, 10.5)), "vein"),
    "renal vein right": (((18, -34, -46, 5), (42, -52, -50, 4)), "vein"),
    "renal vein left": (((-14, -24, -34, 5), (-44, -50, -38, 4)), "vein"),
    "pancreas": (((34, 8, -12, 13), (6, 6, 4, 10), (-34, -6, 16, 10), (-70, -26, 26, 9)), "pancreas"),
    "splenic vein": (((6, -6, 6, 5), (-40, -18, 18, 4), (-76, -34, 30, 3.5)), "portal"),
    "colon right": (((112, -4, -120, 21), (112, 2, -70, 20), (100, 28, -46, 18)), "bowel"),
    "colon across": (((96, 48, -48, 17), (30, 72, -66, 17), (-40, 70, -52, 16), (-98, 24, -14, 15)), "bowel"),
    "colon left": (((-108, 0, -20, 15), (-114, -12, -120, 15)), "bowel"),
    "psoas right": (((30, -54, -10, 10), (40, -52, -70, 19), (52, -44, -130, 24)), "muscle"),
    "psoas left": (((-30, -54, -10, 10), (-40, -52, -70, 19), (-52, -44, -130, 24)), "muscle"),
}
_LIVER_VESSELS: Mapping[str, tuple[tuple[float, float, float, float], ...]] = {
    "portal trunk": ((10, -2, -6, 7), (24, 6, 14, 7.5), (48, 4, 22, 6.5)),
    "portal front": ((48, 4, 22, 6), (78, 30, 28, 4.5), (98, 44, 44, 2.5)),
    "portal back": ((48, 4, 22, 6), (80, -22, 12, 4.5), (104, -38, 4, 2.5)),
    "portal low": ((60, 4, 18, 5), (84, 12, -12, 3.5), (94, 20, -34, 2.5)),
    "portal left": ((26, 6, 16, 6), (6, 34, 40, 5), (-34, 50, 46, 2.5)),
    "hepatic right": ((22, -24, 84, 7), (62, -18, 66, 5), (104, -14, 34, 2.5)),
    "hepatic middle": ((20, -20, 84, 6.5), (44, 18, 62, 5), (62, 46, 30, 2.5)),
    "hepatic left": ((18, -18, 84, 6), (2, 24, 66, 4.5), (-30, 44, 56, 2.5)),
}
_BODY_MM = (165.0, 120.0, 118.0)  # half width, front and back
_RIB_STEP_MM, _VERTEBRA_STEP_MM = 25.0, 35.0
_N_BOWEL_LOOPS = 26
_WARP_REACH_MM = 240.0
# Depth of everything farther outside a shape than this.
_FAR_MM = 25.0


@dataclass(frozen=True, eq=False)
class Blob:
    """An ellipsoid: centre and half-axes in mm, columns of `turn` are its axes."""

    centre: FloatArray
    semi: FloatArray
    turn: FloatArray

    def depth(self, p: FloatArray) -> FloatArray:
        """Return mm inside the surface at `p` (3, n), to first order in the distance."""
        near = _near(p, self.centre - self.semi.max(), self.centre + self.semi.max())
        q = (self.turn.T.astype(np.float32) @ (p[:, near] - _column(self.centre))) + 1e-4
        ratio = np.linalg.norm(q / _column(self.semi), axis=0)
        slope = np.linalg.norm(q / _column(self.semi**2), axis=0)
        depth = np.full(p.shape[1], -_FAR_MM, np.float32)
        depth[near] = ratio * (1 - ratio) / slope
        return depth


@dataclass(frozen=True, eq=False)
class Tube:
    """A line through `points` (n, 3) mm with a radius at each."""

    points: FloatArray
    radii: FloatArray

    def depth(self, p: FloatArray) -> FloatArray:
        """Return mm inside the surface at `p` (3, n)."""
        depth = np.full(p.shape[1], -_FAR_MM, np.float32)
        for (a, near_radius), (b, far_radius) in pairwise(zip(self.points, self.radii, strict=True)):
            reach = max(near_radius, far_radius)
            near = _near(p, np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            q = p[:, near] - _column(a)
            along = np.clip((b - a).astype(np.float32) @ q / np.float32((b - a) @ (b - a)), 0, 1)
            inside = near_radius + (far_radius - near_radius) * along
            inside = inside - np.linalg.norm(q - _column(b - a) * along, axis=0)
            depth[near] = np.maximum(depth[near], inside)
        return depth


@dataclass(frozen=True, eq=False)
class Patient:
    """Everything that makes one anatomy; all lengths in mm.

    Attributes
    ----------
    scale : (3,) size relative to the canonical body
    warp : (3, 5, 5, 5) smooth displacement, at control points
    bumps : (2, 15, 15, 15) unevenness of organ surfaces, at control points
    hu : Hounsfield units by tissue
    """

    scale: FloatArray
    warp: FloatArray
    bumps: FloatArray
    fat: float
    wall: float
    rib_phase: float
    vertebra_phase: float
    hu: dict[str, float]
    blobs: dict[str, Blob]
    tubes: dict[str, Tube]
    vessels: dict[str, Tube]
    bowel: tuple[tuple[Blob, float], ...]
    lesions: tuple[Blob, ...] = ()


@dataclass(frozen=True, eq=False)
class Scan:
    """How a patient was scanned: grid, place of the patient on it, noise."""

    geometry: Geometry
    isocentre: FloatArray
    noise_hu: float
    noise_sigma_voxels: float
    noise_seed: int


@dataclass(frozen=True, eq=False)
class Phantom:
    """One case: CT in Hounsfield units (int16), its true labels (uint8), and what they mean."""

    image: Volume
    label: Volume
    labels: LabelSet = field(default=LABELS)


def make_phantom(
    seed: int | np.random.Generator,
    size: int = 72,
    *,
    orientation: str = "LPS",
    oblique_deg: float = 6.0,
    sided: bool = False,
) -> Phantom:
    """Make one patient and one scan of it.

    Parameters
    ----------
    seed : int or Generator
        The same seed gives the same phantom, bit for bit on one machine.
    size : int
        Voxels across the body; 72 is about 5 mm. The other axes follow from the body.
    orientation : str
        Where the voxel axes point, such as ``LPS`` (as most CT is stored), ``RAS`` or ``PIR``.
    oblique_deg : float
        Standard deviation of the tilt of the grid about each axis.
    sided : bool
        Label the kidneys apart (``kidney_left``, ``kidney_right``) instead of as one ``kidneys``.

    Raises
    ------
    ConfigError
        `size` is below 16, or `orientation` is not three different axes.
    """
    rng = np.random.default_rng(seed)
    patient = draw_patient(rng)
    scan = draw_scan(rng, patient, size, orientation, oblique_deg)
    return render(patient, scan, sided)


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw a body: size, shape, every organ, and one to three liver lesions."""
    patient = Patient(
        scale=rng.normal((1, 1, 1), (0.05, 0.06, 0.04)).clip(0.86, 1.14),
        warp=rng.normal(0, 6.0, (3, 5, 5, 5)).clip(-14, 14),
        bumps=rng.normal(0, 3.5, (2, 15, 15, 15)),
        fat=rng.uniform(10, 26),
        wall=rng.uniform(12, 16),
        rib_phase=rng.uniform(0, _RIB_STEP_MM),
        vertebra_phase=rng.uniform(0, _VERTEBRA_STEP_MM),
        hu={name: rng.normal(mean, spread) for name, (mean, spread) in _HU.items()},
        blobs={name: _draw_blob(rng, *blob) for name, blob in _BLOBS.items()},
        tubes={name: _draw_tube(rng, rows) for name, (rows, _) in _TUBES.items()},
        vessels={name: _draw_tube(rng, rows) for name, rows in _LIVER_VESSELS.items()},
        bowel=tuple(_draw_loop(rng) for _ in range(_N_BOWEL_LOOPS)),
    )
    return replace(patient, lesions=tuple(_draw_lesions(rng, patient)))


def draw_scan(
    rng: np.random.Generator, patient: Patient, size: int, orientation: str, oblique_deg: float
) -> Scan:
    """Draw a grid that holds the patient's upper abdomen, and the noise of the scanner."""
    if size < 16:
        raise ConfigError(f"size {size}: a phantom needs at least 16 voxels across the body.")
    half = np.array([_BODY_MM[0] + 22, _BODY_MM[1] + 30, 116.0]) * patient.scale
    in_plane = 2 * half[0] / size * rng.uniform(0.97, 1.03)
    spacing = np.array([in_plane, in_plane, in_plane * rng.uniform(0.9, 1.25)])
    shape = np.ceil(2 * half / spacing).astype(int)
    axes = _axes(orientation)
    world = _rotation(rng.normal(0, oblique_deg, 3)) @ axes * (np.abs(axes).T @ spacing)
    shape = np.abs(axes).T.astype(int) @ shape
    isocentre = rng.normal(0, 15, 3)
    centre = isocentre + np.array([0, 0, 6.0]) * patient.scale
    affine = np.eye(4)
    affine[:3, :3] = world
    affine[:3, 3] = centre - world @ ((shape - 1) / 2)
    return Scan(
        geometry=Geometry((int(shape[0]), int(shape[1]), int(shape[2])), affine),
        isocentre=isocentre,
        noise_hu=rng.uniform(9, 16),
        noise_sigma_voxels=rng.uniform(0.45, 0.7),
        noise_seed=int(rng.integers(2**31)),
    )


def render(patient: Patient, scan: Scan, sided: bool = False) -> Phantom:
    """Paint a patient on the grid of a scan."""
    geometry = scan.geometry
    index = np.indices(geometry.shape, dtype=np.float32).reshape(3, -1)
    world = geometry.affine[:3, :3].astype(np.float32) @ index + geometry.affine[:3, 3:].astype(np.float32)
    scanner = world - _column(scan.isocentre)
    canvas = _Canvas(patient, _canonical(patient, scanner), float(np.mean(geometry.spacing)))
    labels = SIDED_LABELS if sided else LABELS
    _paint_couch(canvas, patient, scanner)
    _paint_wall(canvas, patient)
    _paint_chest(canvas, patient)
    _paint_bowel(canvas, patient)
    _paint_spine(canvas, patient)
    _paint_tubes(canvas, patient)
    _paint_spleen(canvas, patient, labels)
    _paint_liver(canvas, patient, labels)
    _paint_kidneys(canvas, patient, labels)
    circle = np.hypot(scanner[0], scanner[1]) > (_BODY_MM[0] + 30) * patient.scale[0]
    image = _add_noise(canvas.hu.reshape(geometry.shape), scan)
    image = np.where(circle.reshape(geometry.shape), _PADDING, image).round().astype(np.int16)
    return Phantom(Volume(image, geometry), Volume(canvas.label.reshape(geometry.shape), geometry), labels)


def write_phantom_dataset(
    folder: PathLike,
    n_train: int = 14,
    n_test: int = 4,
    seed: int = 2026,
    size: int = 72,
    only: str | None = None,
) -> Path:
    """Write phantoms as an nnU-Net v2 raw dataset, with the truth of the test cases in ``labelsTs``.

    The folder appears when all cases are written.

    Parameters
    ----------
    folder : path
        For example ``Dataset900_Phantom``; replaced if it exists.
    n_train, n_test : int
        Cases in ``imagesTr`` and ``imagesTs``. Case k depends on `seed` and k only.
    size : int
        Voxels across the body, see :func:`make_phantom`.
    only : str, optional
        The one label to keep, as the value 1, such as ``lesion`` for a detector.

    Raises
    ------
    ConfigError
        There is no label `only`.
    """
    if only is not None and only not in LABELS.foreground:
        raise ConfigError(f"only={only}: expected {', '.join(LABELS.foreground)}.")
    labels = LABELS if only is None else LabelSet(entries={"background": 0, only: 1})
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        for number in progress(range(n_train + n_test), "Phantoms"):
            part = "Tr" if number < n_train else "Ts"
            phantom = make_phantom(np.random.default_rng([seed, number]), size)
            write(phantom.image, temporary / f"images{part}" / f"phantom_{number:03d}_0000.nii.gz")
            write(_keep(phantom, only), temporary / f"labels{part}" / f"phantom_{number:03d}.nii.gz")
        description = {
            "name": "Phantom abdomen",
            "description": "CT-like abdomens made by medseg.phantom; no patient data",
            "licence": "CC0-1.0",
            "channel_names": {"0": "CT"},
            "labels": labels.entries,
            "numTraining": n_train,
            "file_ending": ".nii.gz",
            "seed": seed,
            "size": size,
        }
        write_text(temporary / "dataset.json", json.dumps(description, indent=2))
    return folder


def _keep(phantom: Phantom, only: str | None) -> Volume:
    """Return the label map, or of one label 1 where it is."""
    if only is None:
        return phantom.label
    kept = phantom.label.array == phantom.labels.entries[only]
    return phantom.label.with_array(kept.astype(np.uint8))


class _Canvas:
    """Voxels in a row: where they are in the canonical body, their HU and their label.

    The layers of the body wall (`body`, `muscle`, `cavity`), the depth under the diaphragm (`dome`) and
    the unevenness of surfaces (`bumps`) are needed by several organs, so they are kept.
    """

    def __init__(self, patient: Patient, p: FloatArray, edge_mm: float) -> None:
        self.p = p
        self.edge_mm = edge_mm
        self.hu = np.full(p.shape[1], _AIR, np.float32)
        self.label = np.zeros(p.shape[1], np.uint8)
        self.body, self.muscle, self.cavity = _layers(patient, p)
        self.dome = _below_dome(p)
        self.bumps = [_field(control, p) for control in patient.bumps]

    def paint(self, depth: FloatArray, hu: FloatArray | float, label: int | None = 0) -> None:
        """Lay a tissue over what is there; `label` None leaves the labels as they are."""
        cover = np.clip(0.5 + depth / self.edge_mm, 0, 1)
        self.hu += cover * (hu - self.hu)
        if label is not None:
            self.label[depth > 0] = label


def _paint_couch(canvas: _Canvas, patient: Patient, scanner: FloatArray) -> None:
    x, y, _ = scanner
    under = y + _BODY_MM[2] * patient.scale[1] + 12 - x**2 / 1500
    canvas.paint(np.minimum(6 - np.abs(under + 6), 185 - np.abs(x)), -780.0)
    canvas.paint(np.minimum(2.5 - np.abs(under), 185 - np.abs(x)), 60.0)


def _paint_wall(canvas: _Canvas, patient: Patient) -> None:
    """Skin, fat under it, muscle, and the fat between the organs."""
    hu = patient.hu
    canvas.paint(canvas.body, 20.0)
    canvas.paint(canvas.body - 2, hu["fat"])
    canvas.paint(canvas.muscle, hu["muscle"])
    canvas.paint(canvas.cavity, hu["fat"])
    x, y, _ = canvas.p
    back = 17 * (1 - np.hypot((np.abs(x) - 34) / 30, (y + 92) / 17))
    canvas.paint(np.minimum(back, canvas.body - 8), hu["muscle"])


def _paint_chest(canvas: _Canvas, patient: Patient) -> None:
    """Lung bases over the diaphragm, the heart between them, ribs in the wall."""
    p, hu = canvas.p, patient.hu
    above = np.minimum(-canvas.dome, canvas.cavity)
    canvas.paint(above + 2.5, hu["muscle"])
    canvas.paint(above, hu["lung"])
    canvas.paint(np.minimum(above, 24 - np.hypot(p[0], 0.35 * (p[1] + 10))), 30.0)
    canvas.paint(np.minimum(above, patient.blobs["heart"].depth(p)), hu["heart"])
    angle = np.arctan2(np.abs(p[0]), -p[1]) / np.pi  # 0 at the back, 1 in front
    height = p[2] + 80 * angle - patient.rib_phase
    across = np.mod(height, _RIB_STEP_MM) - _RIB_STEP_MM / 2
    rib = 5.5 - np.hypot(across, 1.5 * (canvas.muscle - 7))
    rib = np.where((height > 10) & (angle < 0.72), rib, -_FAR_MM)
    canvas.paint(rib, hu["cortical"])
    canvas.paint(rib - 3, hu["marrow"])


def _paint_bowel(canvas: _Canvas, patient: Patient) -> None:
    """Stomach, small bowel and colon: a wall, fluid, and gas that has risen to the front."""
    gut = [(blob.depth(canvas.p), level) for blob, level in patient.bowel]
    gut.append((patient.blobs["stomach"].depth(canvas.p), 44.0))
    for name, level in (("colon right", 8.0), ("colon across", 72.0), ("colon left", 2.0)):
        gut.append((patient.tubes[name].depth(canvas.p), level))
    for depth, level in gut:
        depth = np.minimum(depth, canvas.cavity - 2)
        canvas.paint(depth, patient.hu["bowel"])
        canvas.paint(depth - 3, 24.0)
        canvas.paint(np.minimum(depth - 3, canvas.p[1] - level), _GAS)


def _paint_spine(canvas: _Canvas, patient: Patient) -> None:
    """Vertebral bodies and discs, the canal behind them, arches and processes."""
    x, y, z = canvas.p
    hu = patient.hu
    t = np.mod(z - patient.vertebra_phase, _VERTEBRA_STEP_MM) - _VERTEBRA_STEP_MM / 2  # 0 in mid-body
    waist = 1 - 0.10 * np.cos(2 * np.pi * t / _VERTEBRA_STEP_MM)
    body = (waist - np.hypot(x / 23, (y + 66) / 17)) * 18
    arch = 5 - np.abs(np.hypot(x, y + 90) - 12)
    arch = np.minimum(arch, 12 - np.abs(t))
    spinous = np.minimum.reduce([4 - np.abs(x), 9 - np.abs(t + 5), -y - 98, y + 112])
    transverse = np.minimum.reduce(
        [4.5 - np.hypot(t - 3, y + 84 + 0.2 * (np.abs(x) - 20)), np.abs(x) - 12, 42 - np.abs(x)]
    )
    for bone in (arch, spinous, transverse):
        canvas.paint(bone, 0.7 * hu["cortical"])
    canvas.paint(np.hypot(x, y + 88) * -1 + 8, hu["canal"])
    canvas.paint(body, hu["cortical"])
    canvas.paint(body - 2.5, hu["marrow"])
    canvas.paint(np.minimum(body, np.abs(t) - _VERTEBRA_STEP_MM / 2 + 4.5), hu["disc"])


def _paint_tubes(canvas: _Canvas, patient: Patient) -> None:
    """Great vessels, pancreas and psoas; the bowel has been painted."""
    for name, (_, tissue) in _TUBES.items():
        if tissue != "bowel":
            canvas.paint(np.minimum(patient.tubes[name].depth(canvas.p), canvas.body), patient.hu[tissue])


def _paint_spleen(canvas: _Canvas, patient: Patient, labels: LabelSet) -> None:
    """A crescent between the ribs and the stomach."""
    outer, hollow = patient.blobs["spleen"].depth(canvas.p), patient.blobs["spleen hollow"].depth(canvas.p)
    spleen = np.minimum(outer, -hollow) + 0.7 * canvas.bumps[1]
    spleen = np.minimum.reduce([spleen, canvas.cavity - 2, canvas.dome - 3])
    canvas.paint(spleen, patient.hu["spleen"], _value(labels, "spleen"))


def _paint_liver(canvas: _Canvas, patient: Patient, labels: LabelSet) -> None:
    """Parenchyma, its vessels (which belong to it), the gallbladder (which does not), and the lesions."""
    p, hu = canvas.p, patient.hu
    liver = _liver_depth(patient, p, canvas.bumps[0], canvas.cavity, canvas.dome)
    canvas.paint(liver, hu["liver"], _value(labels, "liver"))
    for name, tube in patient.vessels.items():
        tissue = hu["portal"] if name.startswith("portal") else hu["vein"]
        canvas.paint(np.minimum(tube.depth(p), liver), tissue, None)
    gallbladder = patient.blobs["gallbladder"].depth(p)
    canvas.paint(gallbladder + 1.5, hu["bowel"])
    canvas.paint(gallbladder, hu["bile"])
    for number, lesion in enumerate(patient.lesions):
        inside = np.minimum(lesion.depth(p) + 0.5 * canvas.bumps[1], liver)
        canvas.paint(inside, hu["lesion"] - 8 * number, _value(labels, "lesion"))


def _paint_kidneys(canvas: _Canvas, patient: Patient, labels: LabelSet) -> None:
    """Cortex and medulla in a coat of fat, with a notch towards the middle."""
    hu = patient.hu
    for side, sign in (("right", 1.0), ("left", -1.0)):
        blob = patient.blobs[f"kidney {side}"]
        whole = blob.depth(canvas.p)
        sinus = Blob(blob.centre - [sign * 25, -6, 0], np.array([21.0, 11.0, 19.0]), np.eye(3))
        kidney = np.minimum(whole + 0.4 * canvas.bumps[0], -sinus.depth(canvas.p))
        name = "kidneys" if "kidneys" in labels.entries else f"kidney_{side}"
        canvas.paint(np.minimum(whole + 6, canvas.cavity), hu["fat"])
        canvas.paint(kidney, hu["cortex"], _value(labels, name))
        canvas.paint(kidney - 8, hu["medulla"], None)


def _layers(patient: Patient, p: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Depth under the skin, under the fat, and inside the cavity."""
    x, y, z = p
    half_depth = np.where(y > 0, _BODY_MM[1], _BODY_MM[2])
    waist = 1 - 0.06 * np.exp(-(((z + 70) / 60) ** 2))
    ratio = (np.abs(x / (_BODY_MM[0] * waist)) ** 2.5 + np.abs(y / half_depth) ** 2.5) ** 0.4 + 1e-6
    body = np.hypot(x, y) * (1 / ratio - 1)
    behind = np.clip(-y / _BODY_MM[2], 0, 1)
    muscle = body - patient.fat * (1 - 0.35 * behind)
    return body, muscle, np.minimum(muscle - patient.wall, y + 96)


def _below_dome(p: FloatArray) -> FloatArray:
    """Return mm under the diaphragm, whose two domes are highest over liver and spleen."""
    x, y, z = p
    right = 98 - 75 * (((x - 66) / 92) ** 2 + ((y - 6) / 100) ** 2)
    left = 88 - 75 * (((x + 72) / 84) ** 2 + ((y + 4) / 96) ** 2)
    return np.asarray((np.maximum(right, left).clip(-60) - z) * 0.75)


def _liver_depth(
    patient: Patient, p: FloatArray, bumps: FloatArray, cavity: FloatArray, dome: FloatArray
) -> FloatArray:
    """Two lobes, grown together, cut by the diaphragm above and by a slanting plane below."""
    right, left = patient.blobs["liver right"].depth(p), patient.blobs["liver left"].depth(p)
    blend = np.clip(0.5 + (right - left) / 24, 0, 1)
    lobes = left + blend * (right - left) + 12 * blend * (1 - blend)
    slant = 0.55 * p[0] + 0.16 * p[1] + 0.8 * p[2] + 30
    return np.asarray(np.minimum.reduce([lobes + bumps, slant + bumps, cavity - 2, dome - 3]))


def _canonical(patient: Patient, points: FloatArray) -> FloatArray:
    """Take points in the scanner (3, n) to the canonical body: undo size and shape of this patient."""
    p = (points / _column(patient.scale)).astype(np.float32)
    return p + np.stack([_field(control, p) for control in patient.warp])


def _field(control: FloatArray, p: FloatArray) -> FloatArray:
    """Return values of a smooth field at `p`; `control` spans a cube of 2 x 240 mm."""
    at = (p / _WARP_REACH_MM + 1) * (0.5 * (control.shape[0] - 1))
    return np.asarray(ndimage.map_coordinates(control, at, order=3, mode="nearest", output=np.float32))


def _draw_blob(
    rng: np.random.Generator,
    centre: tuple[float, float, float],
    semi: tuple[float, float, float],
) -> Blob:
    return Blob(
        rng.normal(centre, 4.0),
        np.array(semi) * rng.normal(1, 0.08, 3).clip(0.8, 1.2),
        _rotation(rng.normal(0, 7.0, 3)),
    )


def _draw_tube(rng: np.random.Generator, rows: tuple[tuple[float, float, float, float], ...]) -> Tube:
    table = np.array(rows)
    shift = rng.normal(0, 3.0, (len(rows), 3))
    shift[0] *= 0.3  # branches stay on their trunk
    return Tube(table[:, :3] + shift, table[:, 3] * rng.normal(1, 0.08))


def _draw_loop(rng: np.random.Generator) -> tuple[Blob, float]:
    """Draw a piece of small bowel and the height of its fluid level."""
    centre = rng.uniform((-84, -14, -124), (84, 66, -34))
    blob = Blob(centre, rng.uniform(11, 24, 3), _rotation(rng.uniform(-90, 90, 3)))
    return blob, float(centre[1] + rng.choice([3.0, 40.0], p=[0.3, 0.7]))


def _draw_lesions(rng: np.random.Generator, patient: Patient) -> Iterator[Blob]:
    """Draw one to three lesions that lie well inside the liver and apart from each other."""
    chosen: list[tuple[FloatArray, float]] = []
    wanted = int(rng.integers(1, 4))
    for _ in range(200):
        radius = rng.uniform(10, 24)
        centre = rng.uniform((0, -60, -30), (125, 65, 90))
        turn = _rotation(rng.uniform(-90, 90, 3))
        semi = radius * rng.uniform(0.85, 1.15, 3)
        inside = _liver_depth_at(patient, centre) > 0.75 * radius
        if inside and all(np.linalg.norm(centre - c) > radius + r + 6 for c, r in chosen):
            chosen.append((centre, radius))
            yield Blob(centre, semi, turn)
        if len(chosen) == wanted:
            return


def _liver_depth_at(patient: Patient, centre: FloatArray) -> float:
    p = _column(centre)
    bumps, cavity = _field(patient.bumps[0], p), _layers(patient, p)[2]
    return float(_liver_depth(patient, p, bumps, cavity, _below_dome(p))[0])


def _add_noise(hu: FloatArray, scan: Scan) -> FloatArray:
    """Add noise with the short correlation of a soft reconstruction kernel; air stops at -1024."""
    noise = np.random.default_rng(scan.noise_seed).standard_normal(hu.shape).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, scan.noise_sigma_voxels)
    return np.asarray(np.maximum(hu + noise * (scan.noise_hu / noise.std()), _PADDING))


def _axes(orientation: str) -> FloatArray:
    """Return the (3, 3) matrix whose columns are the world directions of i, j, k."""
    directions = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    if sorted(directions.get(letter, -1) for letter in orientation) != [0, 1, 2]:
        raise ConfigError(
            f"orientation {orientation!r}: expected one letter each of R/L, A/P and S/I, such as 'LPS'."
        )
    axes = np.zeros((3, 3))
    for voxel, letter in enumerate(orientation):
        axes[directions[letter], voxel] = 1.0 if letter in "RAS" else -1.0
    return axes


def _rotation(degrees: FloatArray) -> FloatArray:
    """Return the (3, 3) rotation about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        a, b = [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _near(p: FloatArray, low: FloatArray, high: FloatArray) -> IntArray:
    """Return the indices of the points in a box with a margin; only there is a depth worth computing."""
    low, high = _column(low - _FAR_MM), _column(high + _FAR_MM)
    return np.flatnonzero(((p > low) & (p < high)).all(axis=0))


def _column(values: FloatArray) -> FloatArray:
    return np.asarray(values, dtype=np.float32).reshape(3, 1)


def _value(labels: LabelSet, name: str) -> int:
    value = labels.entries[name]
    assert isinstance(value, int)
    return value


__all__ = [
    "LABELS",
    "ORGANS",
    "SIDED_LABELS",
    "Blob",
    "Patient",
    "Phantom",
    "Scan",
    "Tube",
    "draw_patient",
    "draw_scan",
    "make_phantom",
    "render",
    "write_phantom_dataset",
]
