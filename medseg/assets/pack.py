"""One archive with several assets, for a site without internet.

A pack is a zip without compression: the files under their names in the cache, and ``medseg-assets.json``,
which says for a reader what they are. Nothing in it is trusted: names that this version does not know stay
unread, and a file is taken only with the hash of medseg's own table.
"""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from medseg.archive import Files, Limits, open_files
from medseg.assets.sources import CHUNK_BYTES, Unavailable, copy_stream
from medseg.assets.store import admit, cached, storing
from medseg.assets.table import ASSETS, Asset
from medseg.errors import AssetError, BundleError
from medseg.files import atomic_path
from medseg.log import task
from medseg.types import PathLike

MANIFEST = "medseg-assets.json"
_LIMITS = Limits(
    members=re.compile(r"[^/]+"),
    weights=re.compile(r"[0-9a-f]{8}-[^/]+"),
    strangers=True,
    kind="a pack of assets",
)
# The earliest time that a zip can say: equal assets make equal packs.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_pack(files: Sequence[tuple[Asset, Path]], out: PathLike) -> None:
    """Write verified files as a pack.

    Raises
    ------
    OutputError, ResourceError
        It cannot be written.
    """
    total = sum(path.stat().st_size for _, path in files)
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST, _EPOCH), _manifest([asset for asset, _ in files]))
        with task("packing", total) as running:
            for asset, path in files:
                info = zipfile.ZipInfo(asset.stored_name, _EPOCH)
                with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                    while chunk := source.read(CHUNK_BYTES):
                        member.write(chunk)
                        running.advance(len(chunk), note=asset.name)


def _manifest(assets: Sequence[Asset]) -> str:
    fields = ("name", "title", "filename", "licence", "size", "sha256", "citation", "notes")
    return json.dumps([{key: getattr(asset, key) for key in fields} for asset in assets], indent=2) + "\n"


def is_pack(path: PathLike) -> bool:
    """Return whether a file is a zip that calls itself a pack; weights of PyTorch are zips too."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError):
        return False


def read_pack(path: PathLike, cache: PathLike | None = None) -> list[Asset]:
    """Put every asset of a pack into the cache and return them; what this version does not know is left.

    Raises
    ------
    AssetError
        It is no pack, or a file in it is another than its name says. The other files are in the cache.
    """
    files = _open(Path(path))
    known = [asset for asset in ASSETS.values() if asset.stored_name in files.names()]
    if not known:
        raise AssetError(f"{path}: holds no asset that this version of medseg knows. Check the file.")
    wrong = []
    for asset in known:
        try:
            _take(asset, files, cache)
        except AssetError as error:
            wrong.append(str(error))
    if wrong:
        raise AssetError(" ".join(wrong))
    return known


def take_from_pack(asset: Asset, path: PathLike, cache: PathLike | None = None) -> Path:
    """Put one asset of a pack into the cache and return its file there.

    Raises
    ------
    AssetError
        It is no pack, does not hold the asset, or the file in it is another.
    """
    files = _open(Path(path))
    if asset.stored_name not in files.names():
        raise AssetError(f"{path}: this pack holds no {asset.name}. Pack it where there is a network.")
    return _take(asset, files, cache)


def _open(path: Path) -> Files:
    try:
        files = open_files(path, _LIMITS)
    except BundleError as error:
        raise AssetError(str(error)) from error
    if MANIFEST not in files.names():
        raise AssetError(f"{path}: is no pack of assets (no {MANIFEST}). Give one of medseg assets pack.")
    return files


def _take(asset: Asset, files: Files, cache: PathLike | None) -> Path:
    target = cached(asset, cache)
    with storing(target) as folder:
        fetched = folder / asset.filename
        try:
            with files.open(asset.stored_name) as stream:
                copy_stream(stream, fetched, asset.size or 0)
            admit(asset, fetched, target)
        except (Unavailable, zipfile.BadZipFile, EOFError) as error:
            raise AssetError(
                f"{files.path}: {asset.name} is damaged ({error}). Copy the pack again."
            ) from error
    return target
