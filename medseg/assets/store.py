"""The cache of verified files: where an asset lies, whether a file is one, and how it gets its name there."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from medseg.assets.sources import Unavailable, copy_stream
from medseg.assets.table import Asset
from medseg.errors import AssetError, MedsegError, ResourceError
from medseg.files import DISK_FULL, check_writable, is_disk_full, scratch_folder, sha256_file, write_text
from medseg.log import logger, task
from medseg.types import PathLike

# No download takes as long; a scratch folder that is older was left by a process that was killed.
_LEFTOVER_SECONDS = 24 * 3600.0
# Hashes of files that this process has read, until they change: (path, bytes, time of change) -> SHA-256.
_hashes: dict[tuple[str, int, int], str] = {}
# Licences that this process has shown.
_shown: set[str] = set()


def default_cache() -> Path:
    """Return the folder where this user's programs keep what can be fetched again."""
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "medseg" / "Cache" / "assets"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "medseg" / "assets"
    return Path.home() / ".cache" / "medseg" / "assets"


def cached(asset: Asset, cache: PathLike | None = None) -> Path:
    """Return where the cache keeps an asset, there or not."""
    return (default_cache() if cache is None else Path(cache)) / asset.stored_name


def check(asset: Asset, path: PathLike) -> str | None:
    """Return why a file is not the asset, as a phrase, or None if it is (or if no hash is published).

    Raises
    ------
    AssetError
        The file cannot be read.
    """
    path = Path(path)
    with _readable(path):
        size = path.stat().st_size
    if asset.size is not None and size != asset.size:
        return f"{size:,} bytes instead of {asset.size:,}"
    if asset.sha256 is not None and (found := hash_file(path)) != asset.sha256:
        return f"SHA-256 {found[:12]}... instead of {asset.sha256[:12]}..."
    return None


def hash_file(path: PathLike) -> str:
    """Return the SHA-256 of a file; one that has not changed is read once in a process.

    Raises
    ------
    AssetError
        The file cannot be read.
    """
    path = Path(path)
    with _readable(path):
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in _hashes:
            _hashes[key] = sha256_file(path)
    return _hashes[key]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):  # of a copy
            raise
        reason = error.strerror or error
        raise AssetError(f"{path}: cannot be read ({reason}). Check the path and its permissions.") from error


def take_cached(asset: Asset, cache: PathLike | None = None) -> Path | None:
    """Return the file in the cache if it is there and right; remove one that is wrong.

    Raises
    ------
    AssetError
        It is there but cannot be read.
    """
    path = cached(asset, cache)
    if asset.sha256 is None or not path.is_file():
        return None
    problem = check(asset, path)
    if problem is None:
        return path
    logger.warning("%s: is damaged (%s); removed.", path, problem)
    with suppress(OSError):  # of a shared cache that is read-only: the caller cannot store another either
        path.unlink()
    return None


@contextmanager
def storing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder beside a file of the cache, for what will become that file.

    Raises
    ------
    OutputError, ResourceError
        The cache cannot be written.
    """
    check_writable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with scratch_folder(target) as folder:
            yield folder
    except OSError as error:
        if is_disk_full(error) and not isinstance(error, MedsegError):
            raise ResourceError(f"{target}: {DISK_FULL}") from error
        raise


def _remove_leftovers(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}.*"):
        with suppress(OSError):  # another process may be as tidy
            if time.time() - folder.stat().st_mtime > _LEFTOVER_SECONDS:
                rmtree(folder)


def admit(asset: Asset, fetched: Path, target: Path) -> None:
    """Give a fetched file its name in the cache, if it is the right one.

    Processes that fetch the same asset at the same time do not see each other's halves: each renames a whole
    file, and the bytes are equal.

    Raises
    ------
    Unavailable
        It is not; it is removed.
    """
    problem = check(asset, fetched)
    if problem is not None:
        fetched.unlink()
        raise Unavailable(f"refused, {problem}")
    try:
        os.replace(fetched, target)
    except PermissionError:  # Windows, where another process has just stored it and reads it
        if not target.is_file() or check(asset, target) is not None:
            raise


def copy_into_cache(asset: Asset, path: Path, target: Path) -> None:
    """Copy a file that the user gave, and verify the copy: a stick or a share may fail halfway.

    Raises
    ------
    AssetError
        The copy is not the asset.
    """
    with storing(target) as folder, task(f"{asset.name}: copy", asset.size) as running:
        copy = folder / asset.filename
        try:
            with _readable(path), path.open("rb") as stream:
                copy_stream(stream, copy, asset.size or 0, running)
            admit(asset, copy, target)
        except Unavailable as error:
            raise AssetError(f"{path}: changed while it was read ({error}). Give it again.") from error


def show_licence(asset: Asset, cache: PathLike | None = None, keep: bool = True) -> None:
    """Say under which terms an asset may be used, before its first use on this machine.

    `keep` leaves a note beside the file in the cache, after which it is not said again.
    """
    note = cached(asset, cache).with_name(f"{asset.stored_name}.licence.txt")
    told = note.is_file()
    if not told and asset.name not in _shown:
        logger.info("%s", asset.describe())
    _shown.add(asset.name)
    if keep and not told:
        with suppress(MedsegError):  # a cache that is read-only: it is said by every process
            write_text(note, asset.describe() + "\n")
