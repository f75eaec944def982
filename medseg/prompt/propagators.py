"""The ways from prompts to an object in 3D, by name."""

from collections.abc import Callable
from typing import Any

from medseg.config import Config
from medseg.errors import ConfigError
from medseg.prompt.consensus import ConsensusConfig, propagate_consensus
from medseg.prompt.known import VolumeConfig
from medseg.prompt.memory import MemoryConfig, propagate_memory
from medseg.prompt.rasterise import check_prompts
from medseg.prompt.slicewise import (
    BoxConfig,
    MaskConfig,
    Models,
    PointsConfig,
    propagate_box,
    propagate_mask,
    propagate_points,
)
from medseg.prompt.target import Propagation, Target
from medseg.prompt.volumetric import propagate_volume

# Each function takes settings of the type beside it.
PROPAGATORS: dict[str, tuple[type[Config], Callable[[Models, Target, Any], Propagation]]] = {
    "volume": (VolumeConfig, propagate_volume),
    "box": (BoxConfig, propagate_box),
    "mask": (MaskConfig, propagate_mask),
    "points": (PointsConfig, propagate_points),
    "memory": (MemoryConfig, propagate_memory),
    "consensus": (ConsensusConfig, propagate_consensus),
}
DEFAULT = "volume"


def propagate(
    models: Models, target: Target, propagator: str = DEFAULT, config: Config | None = None
) -> Propagation:
    """Find an object in 3D from its prompts.

    Parameters
    ----------
    models : of the scene
    target : the object as its user has described it
    propagator : a key of :data:`PROPAGATORS`
    config : of the type beside it there; its defaults, if not given

    Raises
    ------
    ConfigError
        The propagator is unknown, or the settings are those of another.
    DataError
        A prompt cannot be meant: outside the volume, without area, on another grid.
    Cancelled
        The listener wants to stop.
    """
    if propagator not in PROPAGATORS:
        raise ConfigError(f"propagator {propagator!r} is unknown. Use one of {', '.join(PROPAGATORS)}.")
    settings, function = PROPAGATORS[propagator]
    if config is not None and not isinstance(config, settings):
        raise ConfigError(
            f"propagator {propagator!r} takes a {settings.__name__}, not a {type(config).__name__}. "
            "Give the settings of this propagator."
        )
    notes = check_prompts(models.scene, target.prompts)
    found = function(models, target, config or settings())
    return Propagation(found.region, found.confidence, (*notes, *found.notes))
