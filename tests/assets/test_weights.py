from pathlib import Path

from medseg.assets import ASSETS, check


def test_the_weights_that_other_tests_use_are_the_published_ones(
    lite_medsam_path: Path, mobile_sam_path: Path
) -> None:
    assert check(ASSETS["lite-medsam"], lite_medsam_path) is None
    assert check(ASSETS["mobile-sam"], mobile_sam_path) is None
