"""Make a trained bundle small enough for the package: ``python -m medseg.train.ship RUN TARGET.medseg``.

Weights become half precision; settings such as ``threshold=0.4`` say how maps become objects.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medseg.bundle import Bundle, StateDict, load_bundle, write_bundle
from medseg.instances.centre_model import CentreSettings
from medseg.types import PathLike


def ship(run: PathLike, target: PathLike, overrides: Sequence[str] = ()) -> Path:
    """Write the first fold of a run's bundle with half-precision weights; return the file.

    Parameters
    ----------
    overrides : settings of :class:`CentreSettings`
    """
    bundle = load_bundle(run)
    settings = CentreSettings.from_dict(dict(bundle.card["settings"])).with_overrides(overrides)
    card = {**bundle.card, "settings": settings.to_dict()}
    fold = bundle.folds[0]

    def halved() -> StateDict:
        return {name: value.half() for name, value in bundle.state_dict(fold).items()}

    small: Bundle = replace(bundle, weights={fold: halved}, card=card)
    write_bundle(target, small)
    return Path(target)


def main() -> None:
    """Ship what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("target")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    path = ship(given.run, given.target, given.overrides)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
