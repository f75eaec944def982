"""A rigid or affine registration of two images of one patient, with SimpleITK.

Mattes' mutual information (Mattes et al. 2003, IEEE TMI 22:120-128) from coarse to fine. It starts from the
best of three guesses: the scanners' frames, the middles of the images, their centres of mass. Sampling has a
fixed seed and one thread, so that the same images give the same transform.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medseg.errors import DataError, GeometryError
from medseg.geometry.affine import ras_to_lps
from medseg.geometry.orient import direction_cosines, is_orthonormal
from medseg.types import FloatArray
from medseg.volume import Volume

if TYPE_CHECKING:
    import SimpleITK

Registration = Literal["rigid", "affine"]

# Images are thinned to about this many voxels along their longest axis.
_VOXELS = 128
_BINS, _SAMPLED = 32, 0.25
_SHRINK = (4, 2, 1)
_ITERATIONS = 200
# A level is left out where an axis would have fewer voxels than this.
_FEWEST = 8


@dataclass(frozen=True, eq=False)
class Registered:
    """How one image lies on another.

    Attributes
    ----------
    matrix : (4, 4) float64
        From world positions (RAS+) of the fixed image to those of the moving one.
    start, end : float
        Mutual information before and after; larger is better.
    """

    matrix: FloatArray
    start: float
    end: float


def register_images(fixed: Volume, moving: Volume, kind: Registration = "rigid", seed: int = 0) -> Registered:
    """Find where each place of one image lies in another one.

    Parameters
    ----------
    fixed, moving : Volume
        First channels; both volumes, or both pictures.
    kind : "rigid" or "affine"
    seed : int
        Of the sampling, at least 0.

    Raises
    ------
    GeometryError
        A grid is sheared; or one image is a picture and the other a volume, or the units differ.
    DataError
        An image is constant, or the two do not overlap.
    """
    flat = fixed.shape[2] == 1
    if flat != (moving.shape[2] == 1) or fixed.geometry.unit != moving.geometry.unit:
        raise GeometryError("the two images must be both volumes or both pictures, in one unit.")
    first, second = (_thinned(_image(each, flat)) for each in (fixed, moving))
    try:
        transform, start = _best_start(first, second, flat, seed)
        transform, end = _optimised(first, second, transform, seed)
        if kind == "affine":
            transform, end = _optimised(first, second, _as_affine(transform, flat), seed)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"the images cannot be registered ({reason}). Register them elsewhere.") from error
    return Registered(_matrix_of(transform, flat), -start, -end)


def _image(volume: Volume, flat: bool) -> "SimpleITK.Image":
    import SimpleITK

    geometry = volume.geometry
    array = np.nan_to_num(volume.array[0].astype(np.float32))
    if float(array.min()) == float(array.max()):
        raise DataError(
            "an image is constant: there is nothing to register. Give the images, not the labels."
        )
    if not is_orthonormal(geometry.affine):
        raise GeometryError("an image's grid is sheared, which ITK does not take. Resample it first.")
    if flat:
        if not np.allclose(direction_cosines(geometry.affine), np.eye(3)):
            raise GeometryError("a picture's axes must be those of the world. Store it as TIFF or PNG.")
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array[:, :, 0].T))
        image.SetSpacing(geometry.spacing[:2])
        image.SetOrigin(geometry.affine[:2, 3].tolist())
        return image
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    affine = ras_to_lps(geometry.affine)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(direction_cosines(affine).ravel().tolist())
    return image


def _thinned(image: "SimpleITK.Image") -> "SimpleITK.Image":
    """Shrink the axes that have more voxels than the registration needs, after smoothing."""
    import SimpleITK

    step = max(s * n for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)) / _VOXELS
    factors = [max(1, round(step / s)) for s in image.GetSpacing()]
    if max(factors) == 1:
        return image
    sizes = zip(image.GetSpacing(), factors, strict=True)
    variances = [(0.4 * s * f) ** 2 if f > 1 else 0.0 for s, f in sizes]
    return SimpleITK.Shrink(SimpleITK.DiscreteGaussian(image, variances), factors)


def _best_start(
    fixed: "SimpleITK.Image", moving: "SimpleITK.Image", flat: bool, seed: int
) -> tuple[Any, float]:
    """Return the best of three starts, and the metric (smaller is better)."""
    import SimpleITK

    new = SimpleITK.Euler2DTransform if flat else SimpleITK.Euler3DTransform
    initialise = SimpleITK.CenteredTransformInitializer
    modes = SimpleITK.CenteredTransformInitializerFilter
    guesses = [initialise(fixed, moving, new(), mode) for mode in (modes.GEOMETRY, modes.MOMENTS)]
    same = new(guesses[0])
    same.SetTranslation([0.0] * (2 if flat else 3))
    scores = []
    for guess in (same, *guesses):
        method = _method(seed)
        method.SetInitialTransform(guess)
        try:
            scores.append(method.MetricEvaluate(fixed, moving))
        except RuntimeError:  # nothing of the two overlaps
            scores.append(np.inf)
    best = int(np.argmin(scores))
    if not np.isfinite(scores[best]):
        raise DataError("the images do not overlap at all. Are they of one patient?")
    return new((same, *guesses)[best]), float(scores[best])


def _method(seed: int) -> Any:
    import SimpleITK

    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(_SAMPLED, seed + 1)  # ITK takes 0 for the clock
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)  # the order of sums does not hang on the machine
    return method


def _optimised(
    fixed: "SimpleITK.Image", moving: "SimpleITK.Image", transform: Any, seed: int
) -> tuple[Any, float]:
    method = _method(seed)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, _ITERATIONS, 0.6, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    smallest = min(*fixed.GetSize(), *moving.GetSize())
    levels = [shrink for shrink in _SHRINK if shrink == 1 or smallest >= shrink * _FEWEST]
    method.SetShrinkFactorsPerLevel(levels)
    method.SetSmoothingSigmasPerLevel([(n / 2 if n > 1 else 0) * min(fixed.GetSpacing()) for n in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return transform, float(method.GetMetricValue())


def _as_affine(rigid: Any, flat: bool) -> Any:
    import SimpleITK

    affine = SimpleITK.AffineTransform(2 if flat else 3)
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetCenter(rigid.GetCenter())
    affine.SetTranslation(rigid.GetTranslation())
    return affine


def _matrix_of(transform: Any, flat: bool) -> FloatArray:
    """Return the transform as a matrix between RAS+ worlds, from where it takes the axes' ends."""
    n = 2 if flat else 3
    origin = np.array(transform.TransformPoint([0.0] * n))
    ends = [np.array(transform.TransformPoint(np.eye(n)[axis].tolist())) - origin for axis in range(n)]
    matrix = np.eye(4)
    matrix[:n, :n], matrix[:n, 3] = np.column_stack(ends), origin
    return matrix if flat else np.asarray(ras_to_lps(ras_to_lps(matrix.T).T))
