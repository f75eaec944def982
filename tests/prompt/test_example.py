"""An organ of known truth, pointed at with one box."""

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import DataError
from medseg.io import read
from medseg.prompt.example import dice_of, point_at_known
from tests.phantoms import GEOMETRIES, ball, noise
from tests.prompt.fakes import fake_propagate


@pytest.mark.parametrize("name", ["straight", "oblique", "permuted"])
def test_the_dice_is_that_of_the_label_map_that_was_written(name: str, tmp_path: Path) -> None:
    image, truth = noise(GEOMETRIES[name]), ball(GEOMETRIES[name], 2)

    def propagate(models, target, propagator, config):
        return fake_propagate(models.scene, target, propagator, config)

    found = point_at_known(image, truth, 2, "ball", tmp_path / "out.nii.gz", propagate=propagate)
    written, known = read(tmp_path / "out.nii.gz").array[0] == 1, truth.array[0] == 2
    assert found.dice == pytest.approx(2 * (written & known).sum() / (written.sum() + known.sum()))
    assert found.dice > 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"out.nii.gz", "out.prompt.json", "out.png"}


def test_a_truth_without_the_object_is_refused(tmp_path: Path) -> None:
    image, truth = noise(GEOMETRIES["straight"]), ball(GEOMETRIES["straight"])
    with pytest.raises(DataError, match="no voxel"):
        point_at_known(image, truth, 5, "ball", tmp_path / "out.nii.gz")


def test_dice_of_nothing_is_nothing() -> None:
    empty = np.zeros((3, 3, 3), dtype=bool)
    assert dice_of(empty, empty) == 0.0 and dice_of(~empty, empty) == 0.0 and dice_of(~empty, ~empty) == 1.0
