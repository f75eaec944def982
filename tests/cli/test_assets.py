"""``medseg assets``: what a person types, reads and gets."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import medseg.assets as module
from medseg.assets import ASSETS, Asset, Source, Url
from medseg.cli import app
from medseg.errors import AssetError, OutputError

DATA = b"weights"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an asset `tiny` whose source has the right file."""

    def fetch(source: Source, asset: Asset, folder: Path) -> Path:
        path = folder / asset.filename
        path.write_bytes(DATA)
        return path

    sha256 = hashlib.sha256(DATA).hexdigest()
    tiny = Asset("tiny", "Tiny", "tiny.pth", "MIT", len(DATA), sha256, (Url("https://there"),), "Nobody")
    monkeypatch.setitem(ASSETS, "tiny", tiny)
    monkeypatch.setattr(module, "fetch", fetch)
    return tmp_path / "cache"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["assets", *map(str, words)])


def test_the_list_fits_a_terminal_of_80_columns(cache: Path) -> None:
    lines = run("list").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1]), "the last is the path of the cache"
    for asset in ASSETS.values():
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"{asset.name} ")]
        assert asset.licence in lines[index] and lines[index + 1] == f"  {asset.title}"


def test_the_list_says_what_is_in_the_cache(cache: Path) -> None:
    def line() -> str:
        return next(
            line for line in run("list", "--cache", cache).stdout.splitlines() if line.startswith("tiny ")
        )

    assert "cached" not in line()
    assert run("pull", "tiny", "--cache", cache).exit_code == 0
    assert "cached" in line()
    entries = json.loads(run("list", "--json", "--cache", cache).stdout)
    assert {entry["name"] for entry in entries if entry["cached"]} == {"tiny"}


def test_pull_prints_the_path_of_the_file(cache: Path) -> None:
    path = Path(run("pull", "tiny", "--cache", cache).stdout.strip())
    assert path.parent == cache and path.read_bytes() == DATA


def test_pull_from_a_file_copies_it_into_the_cache(cache: Path, tmp_path: Path) -> None:
    given = tmp_path / "brought on a stick.pth"
    given.write_bytes(DATA)
    path = Path(run("pull", "tiny", "--from", given, "--cache", cache).stdout.strip())
    assert path.parent == cache and path.read_bytes() == DATA and given.exists()
    given.write_bytes(b"another")
    refused = run("pull", "tiny", "--from", given, "--cache", cache)
    assert isinstance(refused.exception, AssetError) and refused.exception.exit_code == 10


def test_pull_asks_nothing_before_all_names_are_known(cache: Path) -> None:
    refused = run("pull", "tiny", "no-such", "--cache", cache)
    assert isinstance(refused.exception, AssetError) and not cache.exists()


def test_verify_tells_right_from_damaged_and_ends_with_an_error(cache: Path) -> None:
    assert "no assets here" in run("verify", "--cache", cache).stdout
    path = Path(run("pull", "tiny", "--cache", cache).stdout.strip())
    assert run("verify", "--cache", cache).stdout.split() == ["tiny", "right"]
    path.write_bytes(b"weighty")
    damaged = run("verify", "--cache", cache)
    assert "tiny" in damaged.stdout and "damaged" in damaged.stdout and not path.exists()
    assert isinstance(damaged.exception, AssetError) and "medseg assets pull tiny" in str(damaged.exception)
    assert isinstance(run("verify", "tiny", "--cache", cache).exception, AssetError), "named, and missing"


def test_pack_and_unpack_carry_assets_to_another_machine(cache: Path, tmp_path: Path) -> None:
    pack = tmp_path / "site.zip"
    assert "tiny" in run("pack", "tiny", "-o", pack, "--cache", cache).stdout
    there = tmp_path / "there"
    assert run("unpack", pack, "--cache", there).stdout.strip() == f"{there}: tiny"
    assert run("verify", "tiny", "--cache", there).exit_code == 0


def test_pack_refuses_an_output_before_it_fetches(cache: Path, tmp_path: Path) -> None:
    refused = run("pack", "tiny", "-o", tmp_path, "--cache", cache)
    assert isinstance(refused.exception, OutputError) and not cache.exists()
