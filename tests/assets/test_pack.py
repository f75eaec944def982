"""One archive for a site without internet: what goes in comes out, and nothing else does."""

import json
import zipfile
from pathlib import Path

import pytest

import medseg.assets as module
from medseg import assets
from medseg.assets import Asset, Source, Url
from medseg.assets.pack import MANIFEST, is_pack
from medseg.errors import AssetError
from tests.assets.conftest import DATA, Shop


@pytest.fixture
def stocked(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Two assets that can be fetched once the network is asked."""

    def fetch(source: Source, asset: Asset, folder: Path) -> Path:
        path = folder / asset.filename
        path.write_bytes(DATA if asset.name == "tiny" else b"other")
        return path

    monkeypatch.setattr(module, "fetch", fetch)
    shop.stock(Url("there"))
    sha256 = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    shop.stock(Url("there"), name="other", filename="other.bin", size=5, sha256=sha256)
    return shop


def test_a_pack_fills_the_cache_of_a_machine_without_network(stocked: Shop, tmp_path: Path) -> None:
    pack = tmp_path / "site.zip"
    assert assets.pack(["tiny", "other", "tiny"], pack, stocked.cache) == ["tiny", "other"]
    there = tmp_path / "there"
    assert set(assets.unpack(pack, there)) == {"tiny", "other"}
    assert assets.find("tiny", cache=there, download=False).read_bytes() == DATA
    assert assets.find("other", cache=there, download=False).read_bytes() == b"other"
    entries = json.loads(zipfile.ZipFile(pack).read(MANIFEST))
    assert entries[0]["licence"] == "Apache-2.0" and entries[0]["citation"] == "Nobody, Never, 1900"


def test_without_names_all_that_the_cache_holds_is_packed(stocked: Shop, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="holds no assets to pack"):
        assets.pack([], tmp_path / "site.zip", stocked.cache)
    assets.find("other", cache=stocked.cache)
    assert assets.pack([], tmp_path / "site.zip", stocked.cache) == ["other"]


def test_equal_assets_make_equal_packs(stocked: Shop, tmp_path: Path) -> None:
    assets.pack(["tiny"], tmp_path / "a.zip", stocked.cache)
    assets.pack(["tiny"], tmp_path / "b.zip", stocked.cache)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_pack_can_be_given_as_the_source_of_one_asset(stocked: Shop, tmp_path: Path) -> None:
    pack = tmp_path / "site.zip"
    assets.pack(["tiny"], pack, stocked.cache)
    there = tmp_path / "there"
    path = assets.find("tiny", given=pack, cache=there)
    assert path == assets.cached(assets.ASSETS["tiny"], there) and path.read_bytes() == DATA
    with pytest.raises(AssetError, match="this pack holds no other"):
        assets.find("other", given=pack, cache=there)


def write_pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {MANIFEST: b"[]", **members}.items():
            archive.writestr(name, content)
    return path


def test_a_file_of_a_pack_that_is_another_than_its_name_says_is_refused_and_the_others_are_taken(
    stocked: Shop, tmp_path: Path
) -> None:
    tiny, other = assets.ASSETS["tiny"], assets.ASSETS["other"]
    for wrong in (DATA[::-1], DATA[:-1], DATA + b"."):
        members = {tiny.stored_name: wrong, other.stored_name: b"other"}
        pack = write_pack(tmp_path / "site.zip", members)
        there = tmp_path / "there"
        with pytest.raises(AssetError, match=r"site\.zip: tiny is damaged .* Copy the pack again"):
            assets.unpack(pack, there)
        assert not assets.cached(tiny, there).exists() and assets.cached(other, there).exists()
        with pytest.raises(AssetError, match="tiny is damaged"):
            assets.find("tiny", given=pack, cache=there)


def test_files_that_this_version_does_not_know_stay_unread(stocked: Shop, tmp_path: Path) -> None:
    tiny = assets.ASSETS["tiny"]
    pack = write_pack(tmp_path / "site.zip", {"01234567-newer.pt": b"?", tiny.stored_name: DATA})
    assert assets.unpack(pack, tmp_path / "there") == ["tiny"]
    assert not [path for path in (tmp_path / "there").iterdir() if "newer" in path.name]
    with pytest.raises(AssetError, match="no asset that this version of medseg knows"):
        assets.unpack(write_pack(tmp_path / "site.zip", {"01234567-newer.pt": b"?"}), tmp_path / "there")


@pytest.mark.parametrize("name", ["../tiny.pth", "/etc/tiny", "C:\\tiny"])
def test_a_pack_with_a_name_that_points_outside_is_refused(stocked: Shop, tmp_path: Path, name: str) -> None:
    members = {name: DATA, assets.ASSETS["tiny"].stored_name: DATA}
    with pytest.raises(AssetError, match="points outside"):
        assets.unpack(write_pack(tmp_path / "site.zip", members), tmp_path / "there")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no zip at all"])
def test_what_is_no_pack_is_refused(stocked: Shop, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.zip"
    path.write_bytes(content)
    with pytest.raises(AssetError, match="not a zip file, or damaged"):
        assets.unpack(path, tmp_path / "there")
    with pytest.raises(AssetError, match="is not tiny"):
        assets.find("tiny", given=path, cache=tmp_path / "there")


def test_weights_of_pytorch_are_zips_but_no_packs(stocked: Shop, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert not is_pack(path)
    with pytest.raises(AssetError, match="is no pack of assets"):
        assets.unpack(path, tmp_path / "there")
    with pytest.raises(AssetError, match="is not tiny"):
        assets.find("tiny", given=path, cache=tmp_path / "there")
