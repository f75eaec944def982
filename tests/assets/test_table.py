"""Being listed is being tested: every entry says what the sources, the cache and a reader need."""

import re

import pytest

from medseg.assets import ASSETS, Asset, Hub, Package, Url
from medseg.assets.pack import _LIMITS


@pytest.mark.parametrize("asset", ASSETS.values(), ids=list(ASSETS))
def test_an_entry_is_complete(asset: Asset) -> None:
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", asset.name)
    assert asset.licence and asset.citation and asset.title and asset.sources
    assert (asset.sha256 is None) == (asset.size is None)
    assert asset.sha256 is None or re.fullmatch("[0-9a-f]{64}", asset.sha256)
    assert _LIMITS.weights.fullmatch(asset.stored_name), "a pack would refuse it"
    for source in asset.sources:
        if isinstance(source, Package):
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", source.requirement)
            assert re.fullmatch("[0-9a-f]{64}", source.sha256)
            root = source.requirement.replace("-", "_").replace("==", "-") + "/"
            assert source.member.startswith(root) == source.sdist
        elif isinstance(source, Url):
            assert source.address.startswith("https://") and source.address.endswith(asset.filename)
        else:
            assert isinstance(source, Hub) and source.filename == asset.filename


def test_no_two_entries_share_a_file() -> None:
    assert len({asset.stored_name for asset in ASSETS.values()}) == len(ASSETS)
    assert len({asset.sha256 for asset in ASSETS.values()}) == len(ASSETS)


def test_the_entries_of_the_issue_are_there() -> None:
    assert {
        *("lite-medsam", "mobile-sam", "sam-vit-b", "medsam-vit-b", "medsam2", "niivue", "mni-t1"),
        *("sam2.1-tiny", "sam2.1-small", "sam2.1-base-plus", "sam2.1-large"),
        *("instanseg-brightfield", "instanseg-fluorescence"),
    } <= set(ASSETS)


def test_weights_that_are_not_free_for_every_use_say_so() -> None:
    assert "research" in ASSETS["medsam2"].licence and "research" in ASSETS["medsam2"].describe()
