"""Volume and model to labels or probabilities on the source grid."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from medseg.bundle import Bundle
from medseg.errors import BundleError
from medseg.infer.predictor import Options, Predictor
from medseg.infer.runtime import Runtime, choose_device, choose_runtime, cpu_has_bf16
from medseg.infer.sliding import sliding_window
from medseg.labels import LabelSet
from medseg.segmentation import Segmentation
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.exchange.monai_in import MonaiModel

__all__ = [
    "Options",
    "Predictor",
    "Runtime",
    "Segmenter",
    "choose_device",
    "choose_runtime",
    "cpu_has_bf16",
    "make_predictor",
    "sliding_window",
]


@runtime_checkable
class Segmenter(Protocol):
    """What every predictor can do, whoever made its models; it keeps the networks for the next volume."""

    options: Options

    @property
    def channels(self) -> tuple[str, ...]:
        """What each channel of an image must be."""

    @property
    def labels(self) -> LabelSet:
        """Meaning of the result's integers."""

    def prepare(self, volume: Volume) -> Any:
        """Return what the networks need of a volume; may run in another thread than the rest."""

    def segment_prepared(
        self,
        volume: Volume,
        prepared: Any,
        probabilities: PathLike | None = None,
        previous: Volume | None = None,
    ) -> Segmentation:
        """Segment a volume with the result of :meth:`prepare`.

        A model with a plan wants the voxels of `volume` again only for the first stage of a cascade.
        """

    def segment(
        self, volume: Volume, probabilities: PathLike | None = None, previous: Volume | None = None
    ) -> Segmentation:
        """Segment a volume; `previous` is the label map of a cascade's first stage."""

    def provenance(self) -> dict[str, Any]:
        """Return models, versions and settings as plain data."""


def make_predictor(
    models: "Sequence[Bundle | MonaiModel]", options: Options | None = None, **changes: Any
) -> Segmenter:
    """Make what segments volumes with one model, or with several whose probabilities are averaged.

    Parameters
    ----------
    models : from `medseg.exchange.load_model`
    options, changes : see :class:`Options`; keyword arguments make one

    Raises
    ------
    BundleError
        There is none, several do not fit together, or weights do not fit.
    ConfigError
        An option is out of range, or the device is not there.
    """
    bundles = [model for model in models if isinstance(model, Bundle)]
    others = [model for model in models if not isinstance(model, Bundle)]
    if not others:
        return Predictor(bundles, options, **changes)
    if len(models) > 1:
        raise BundleError(f"{others[0]}: a MONAI bundle is not averaged with other models. Pass it alone.")
    from medseg.infer.monai import MonaiPredictor

    return MonaiPredictor(others[0], options or Options(**changes))
