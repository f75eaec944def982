"""SAM as a finder: pictures in grey and colour, slices linked to objects, and what is left out."""

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import ConfigError
from medseg.instances.count import count_objects
from medseg.instances.sam import PICTURE, STACK, SamFinder, to_grey
from medseg.train.centre_measure import count_matches
from medseg.volume import Geometry, Volume
from tests.instances.test_count import nuclei, volume
from tests.instances.test_refine import truth


def test_discs_of_a_picture_are_found_without_a_prompt(mobile_sam_path: Path) -> None:
    quick = PICTURE.replace(points=8, size=512, least_area_mm2=10.0)
    finder = SamFinder("mobile-sam", {"mobile-sam": mobile_sam_path}, 1, quick)
    counted = count_objects(volume(nuclei(noise=3.0)), finder)
    true, _, missed = count_matches(truth(), counted.instances.labels.T)[0.5]
    assert true >= 6 and missed <= 2
    assert (counted.instances.scores > 0.8).all() and counted.instances.class_name(1) == "1"
    assert counted.instances.provenance["model"] == "mobile-sam"


def test_slices_of_a_volume_become_objects_in_3d(mobile_sam_path: Path) -> None:
    image = np.full((64, 64, 5), 20, np.float32)
    rows, columns = np.indices((64, 64))
    image[np.hypot(rows - 20, columns - 20) < 10, 1:4] = 180
    image[np.hypot(rows - 46, columns - 42) < 9, 0:2] = 150
    image += np.random.default_rng(0).normal(0, 3, image.shape).astype(np.float32)
    quick = STACK.replace(points=4, size=512, least_area_mm2=20.0, least_extent_mm=8.0)
    finder = SamFinder("mobile-sam", {"mobile-sam": mobile_sam_path}, 1, quick)
    found = finder.find(Volume(image[None], Geometry(image.shape, np.diag([1.0, 1, 3, 1]))))
    assert found.labels.shape == image.shape and found.labels.dtype == np.int32
    np.testing.assert_array_equal(found.labels[20, 20] > 0, [False, True, True, True, False])
    assert len(set(found.labels[20, 20, 1:4])) == 1 and not found.labels[46, 42].any()
    assert any("shorter than 8" in each.rule and each.count for each in found.dropped)  # two slices of 3 mm


def test_networks_of_boxes_strange_channels_and_wrong_sizes_are_refused(lite_medsam_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not understand clicks"):
        SamFinder("lite-medsam", {"lite-medsam": lite_medsam_path}).find(volume(nuclei()))
    with pytest.raises(ConfigError, match="diameter"):
        SamFinder("mobile-sam").find(volume(nuclei()), diameter=-1.0)
    with pytest.raises(ConfigError, match="5 channels"):
        to_grey(np.stack([nuclei() + c for c in range(5)]))


def test_colour_is_looked_at_in_grey_and_alpha_shows_nothing() -> None:
    colour = np.stack([np.full((2, 3), value, np.uint8) for value in (200, 100, 50)])
    assert to_grey(colour)[0, 0] == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    alpha = np.concatenate([colour, np.full((1, 2, 3), 255, np.uint8)])
    np.testing.assert_array_equal(to_grey(alpha), to_grey(colour))
    np.testing.assert_array_equal(to_grey(np.stack([colour[0], alpha[3]])), colour[0])
