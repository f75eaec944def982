"""Make a trained bundle small enough for the package: ``python -m medseg.train.ship RUN TARGET.medseg``.

Weights become half precision; settings such as ``threshold=0.4`` say how maps become objects. With
``--tile 256`` tiles are larger than training patches: fewer of them show nothing but noise.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medseg.bundle import Bundle, StateDict, load_bundle, write_bundle
from medseg.instances.centre_model import CentreSettings
from medseg.types import PathLike


def ship(run: PathLike, target: PathLike, overrides: Sequence[str] = (), tile: int | None = None) -> Path:
    """Write the first fold of a run's bundle with half-precision weights; return the file.

    Parameters
    ----------
    overrides : settings of :class:`CentreSettings`
    tile : voxels of a tile along each axis, in place of the training patch
    """
    bundle = load_bundle(run)
    settings = CentreSettings.from_dict(dict(bundle.card["settings"])).with_overrides(overrides)
    card = {**bundle.card, "settings": settings.to_dict()}
    fold = bundle.folds[0]

    def halved() -> StateDict:
        return {name: value.half() for name, value in bundle.state_dict(fold).items()}

    plan = bundle.plan
    if tile is not None:
        wider = bundle.settings.replace(patch_size=(tile,) * bundle.settings.dimensions)
        plan = plan.replace(configurations={bundle.configuration: wider.to_dict()})
    small: Bundle = replace(bundle, plan=plan, weights={fold: halved}, card=card)
    write_bundle(target, small)
    return Path(target)


def main() -> None:
    """Ship what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("target")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--tile", type=int)
    given = parser.parse_args()
    path = ship(given.run, given.target, given.overrides, given.tile)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
