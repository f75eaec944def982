"""Which file is taken: what the user gives, then the cache, then the sources; never another one."""

import errno
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import medseg.assets as module
from medseg import assets
from medseg.assets import ASSETS, Asset, Source, Url
from medseg.errors import AssetError, OutputError, ResourceError
from tests.assets.conftest import DATA, SHA256, Shop, tiny


@pytest.fixture
def fetched(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were asked; each sends what its name says."""
    asked: list[str] = []

    def fetch(source: Source, asset: Asset, folder: Path) -> Path:
        assert isinstance(source, Url)
        asked.append(source.address)
        path = folder / asset.filename
        path.write_bytes(DATA if source.address == "right" else source.address.encode())
        return path

    monkeypatch.setattr(module, "fetch", fetch)
    return asked


def test_a_given_file_is_used_where_it_lies(shop: Shop, fetched: list[str], tmp_path: Path) -> None:
    shop.stock(Url("right"))
    given = tmp_path / "any name"
    given.write_bytes(DATA)
    assert assets.find("tiny", given=given, cache=shop.cache) == given
    (tmp_path / "folder").mkdir()
    given = given.rename(tmp_path / "folder" / "tiny.pth")
    assert assets.find("tiny", given=given.parent, cache=shop.cache) == given
    assert fetched == []


def test_a_given_file_that_is_another_is_refused_and_neither_replaced_nor_removed(
    shop: Shop, fetched: list[str], tmp_path: Path
) -> None:
    shop.stock(Url("right"))
    given = tmp_path / "mine.pth"
    given.write_bytes(DATA[::-1])
    with pytest.raises(AssetError, match=r"mine\.pth: is not tiny \(SHA-256 .* instead of "):
        assets.find("tiny", given=given, cache=shop.cache)
    assert given.read_bytes() == DATA[::-1] and fetched == []


def test_a_given_file_that_changes_while_it_is_copied_does_not_get_into_the_cache(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.stock()
    given = tmp_path / "tiny.pth"
    given.write_bytes(DATA)
    assert assets.keep("tiny", given, shop.cache).read_bytes() == DATA
    monkeypatch.setattr(module, "_take_given", lambda asset, path, cache: path)
    for changed in (DATA[:-1], DATA[::-1], DATA + b"."):
        given.write_bytes(changed)
        with pytest.raises(AssetError, match="changed while it was read"):
            assets.keep("tiny", given, tmp_path / "other")
        assert not assets.cached(ASSETS["tiny"], tmp_path / "other").exists()


def test_a_disk_that_is_full_is_said_of_the_copy_and_not_of_the_given_file(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shop.stock()
    (tmp_path / "tiny.pth").write_bytes(DATA)
    monkeypatch.setattr(assets.store, "copy_stream", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        assets.keep("tiny", tmp_path / "tiny.pth", shop.cache)


def test_a_given_path_that_holds_nothing_is_named(shop: Shop, tmp_path: Path) -> None:
    shop.stock()
    with pytest.raises(AssetError, match="nowhere: cannot be read"):
        assets.find("tiny", given=tmp_path / "nowhere", cache=shop.cache)
    with pytest.raises(AssetError, match=r"holds no tiny\.pth"):
        assets.find("tiny", given=tmp_path, cache=shop.cache)


def test_what_is_in_the_cache_is_not_fetched_again(shop: Shop, fetched: list[str]) -> None:
    shop.stock(Url("right"))
    first = assets.find("tiny", cache=shop.cache)
    assert assets.find("tiny", cache=shop.cache, download=False) == first
    assert fetched == ["right"] and first.read_bytes() == DATA


@pytest.mark.parametrize("damage", [DATA[:-1], DATA[::-1], b""])
def test_a_damaged_file_in_the_cache_is_removed_and_fetched_again(
    shop: Shop, fetched: list[str], damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shop.stock(Url("right"))
    path = assets.find("tiny", cache=shop.cache)
    path.write_bytes(damage)
    with pytest.raises(AssetError, match="nothing may be downloaded"):
        assets.find("tiny", cache=shop.cache, download=False)
    assert not path.exists() and "is damaged" in caplog.text
    path.write_bytes(damage)
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA and fetched == ["right"] * 2


def test_sources_are_asked_in_order_until_one_has_the_right_file(shop: Shop, fetched: list[str]) -> None:
    shop.stock(Url("wrong"), Url("w" * len(DATA)), Url("right"), Url("never"))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    assert fetched == ["wrong", "w" * len(DATA), "right"]


def test_the_last_error_lists_what_was_tried_and_what_to_do(shop: Shop, fetched: list[str]) -> None:
    shop.stock(Url("one"), Url("three"))
    with pytest.raises(AssetError) as error:
        assets.find("tiny", cache=shop.cache)
    assert str(error.value) == (
        "tiny: cannot be had. Tried: one (refused, 3 bytes instead of 1,000); three (refused, 5 bytes "
        "instead of 1,000). Fetch tiny.pth elsewhere and give it: medseg assets pull tiny --from FILE."
    )
    assert list(shop.cache.iterdir()) == []


def test_without_a_published_hash_only_a_given_file_is_taken_and_its_hash_recorded(
    shop: Shop, fetched: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop.stock(Url("right"), sha256=None, size=None)
    with pytest.raises(AssetError, match="no hash is published for it, so only a file that you give is used"):
        assets.find("tiny", cache=shop.cache)
    given = tmp_path / "tiny.pth"
    given.write_bytes(DATA)
    with caplog.at_level(logging.INFO, logger="medseg"):
        assert assets.find("tiny", given=given, cache=shop.cache) == given
    assert SHA256 in caplog.text and fetched == []
    assert assets.provenance("tiny", given)["sha256"] == SHA256
    with pytest.raises(AssetError, match="Pass the path"):
        assets.provenance("tiny")


def test_provenance_names_the_file_that_was_used(shop: Shop, tmp_path: Path) -> None:
    shop.stock()
    assert assets.provenance("tiny") == {"name": "tiny", "licence": "Apache-2.0", "sha256": SHA256}
    other = tmp_path / "tuned.pth"
    other.write_bytes(b"tuned")
    assert assets.provenance("tiny", other)["sha256"] != SHA256


def test_a_file_is_hashed_again_only_when_it_changed(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    plain = assets.store.sha256_file
    monkeypatch.setattr(assets.store, "sha256_file", lambda path: read.append(path) or plain(path))
    path = tmp_path / "tiny.pth"
    path.write_bytes(DATA)
    assert [assets.check(tiny(), path) for _ in range(3)] == [None] * 3 and len(read) == 1
    path.write_bytes(DATA[::-1])
    os.utime(path, ns=(1, 1))
    assert assets.check(tiny(), path) is not None and len(read) == 2


def test_the_licence_is_shown_before_the_first_use_and_then_kept_beside_the_file(
    shop: Shop, fetched: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.stock(Url("wrong"), licence="CC-BY-SA-4.0", notes="For research.")
    caplog.set_level(logging.INFO, logger="medseg")
    with pytest.raises(AssetError):
        assets.find("tiny", cache=shop.cache)
    sentence = "tiny: Tiny weights. Licence: CC-BY-SA-4.0. For research. Cite: Nobody, Never, 1900."
    assert caplog.messages[0] == sentence, "it is shown before anything is fetched"
    shop.stock(Url("right"), licence="CC-BY-SA-4.0", notes="For research.")
    path = assets.find("tiny", cache=shop.cache)
    assert caplog.messages.count(sentence) == 1
    assert path.with_name(f"{path.name}.licence.txt").read_text() == sentence + "\n"
    monkeypatch.setattr(assets.store, "_shown", set())  # another process
    assets.find("tiny", cache=shop.cache)
    assert caplog.messages.count(sentence) == 1


def test_a_name_that_is_unknown_is_refused_with_the_nearest() -> None:
    with pytest.raises(AssetError, match=r"'light-medsam': no such asset\. Did you mean lite-medsam\?"):
        assets.find("light-medsam")
    with pytest.raises(AssetError, match=r"'\?': no such asset\. All names"):
        assets.find("?")


def test_a_cache_that_cannot_be_written_is_named(shop: Shop, fetched: list[str], tmp_path: Path) -> None:
    shop.stock(Url("right"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        assets.find("tiny", cache=tmp_path / "file" / "cache")
    assert fetched == []


def test_many_that_fetch_at_once_never_see_half_a_file(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = shop.stock(Url("slow"))
    target = assets.cached(asset, shop.cache)

    def fetch(source: Source, asset: Asset, folder: Path) -> Path:
        path = folder / asset.filename
        with path.open("wb") as out:
            for start in range(0, len(DATA), 100):
                out.write(DATA[start : start + 100])
                out.flush()
                time.sleep(0.002)
        return path

    monkeypatch.setattr(module, "fetch", fetch)
    seen, done = set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            if target.exists():
                seen.add(target.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: assets.find("tiny", cache=shop.cache), range(8)))
    done.set()
    watcher.join()
    assert set(paths) == {target} and seen <= {DATA} and target.read_bytes() == DATA
    assert not [path for path in shop.cache.iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_is_removed_after_a_day(shop: Shop, fetched: list[str]) -> None:
    asset = shop.stock(Url("right"))
    for name, age in (("old", 2 * 86400), ("young", 60)):
        folder = shop.cache / f".{asset.stored_name}.{name}"
        folder.mkdir(parents=True)
        (folder / "half").touch()
        os.utime(folder, (time.time() - age,) * 2)
    assets.find("tiny", cache=shop.cache)
    left = [path.name for path in shop.cache.iterdir() if path.is_dir()]
    assert left == [f".{asset.stored_name}.young"]


def test_the_default_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, parts in {
        "linux": (".cache", "medseg"),
        "darwin": ("Library", "Caches", "medseg"),
        "win32": ("AppData", "Local", "medseg"),
    }.items():
        monkeypatch.setattr(assets.store.sys, "platform", system)
        assert assets.default_cache().relative_to(Path.home()).parts[: len(parts)] == parts


def test_weights_are_found_under_the_name_that_the_table_gives(shop: Shop) -> None:
    assert all(name == asset.name for name, asset in ASSETS.items())
