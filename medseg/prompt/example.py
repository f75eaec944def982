"""One organ whose truth is known, pointed at as a user would: for demonstrations."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medseg.geometry.orient import to_ras
from medseg.metrics.overlap import mask_of
from medseg.prompt.cases import world_box
from medseg.prompt.results import write_result
from medseg.prompt.session import PromptSession
from medseg.prompt.sheet import write_sheet
from medseg.prompt.simulate import BOX_JITTER, cut_pair, draw_prompt
from medseg.types import BoolArray
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.results import Networks
    from medseg.prompt.workbench import Propagate

_AXIAL = 2


@dataclass(frozen=True)
class Example:
    """What came of one box: the Dice on its slice and in the volume, and how many slices the object has."""

    name: str
    dice: float
    slices: int


def point_at_known(
    image: Volume,
    truth: Volume,
    value: int | tuple[int, ...],
    name: str,
    out: Path,
    seed: int = 0,
    networks: "Networks | None" = None,
    propagate: "Propagate | None" = None,
) -> Example:
    """Draw a box, not quite tight, on the axial slice where an object is largest, and find it from that.

    Parameters
    ----------
    image, truth : of one grid
    value : of the object in `truth`
    name : of the object
    out : label map to write; its report and its contact sheet (PNG) go beside it
    seed : of the box
    networks, propagate : to use

    Raises
    ------
    DataError
        The truth has no such object.
    AssetError
        Weights cannot be had.
    """
    reference = mask_of(to_ras(truth).array[0], value)
    prompt = draw_prompt(reference, _AXIAL, np.random.default_rng(seed), BOX_JITTER)
    with PromptSession.open(image, models=networks, propagate=propagate) as session:
        session.add(name, world_box(session.scene, prompt))
        write_result(session, f"{name} of a phantom", out)
        write_sheet(session, out.with_suffix("").with_suffix(".png"))
        found = session.mask(name)
        return Example(name, dice_of(reference, found.full()), found.stop[_AXIAL] - found.start[_AXIAL])


def dice_of(reference: BoolArray, prediction: BoolArray) -> float:
    """Return the Dice of two masks of one grid; 0 where one of them is empty."""
    pair = cut_pair(reference, prediction)
    if pair is None:
        return 0.0
    total = np.count_nonzero(pair.reference) + np.count_nonzero(pair.prediction)
    return float(2 * np.count_nonzero(pair.reference & pair.prediction) / total)
