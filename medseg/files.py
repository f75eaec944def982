"""Files that appear whole or not at all, and their hashes.

A file is replaced in one step. A folder that replaces another takes two renames; a process that is
killed between them leaves the old one as ``.NAME.XXXXXXXX.old``, and :func:`recover_folder` brings it back.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from medseg.errors import MedsegError, OutputError, ResourceError
from medseg.types import PathLike

DISK_FULL = "the disk is full. Free some space and run the same command again."
_ELSEWHERE = "Check the path and its permissions, or choose another output."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OLD = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.old")  # eight letters of tempfile.mkdtemp
# A reader that recovers the old folder between the two renames makes the writer try again.
_SWAPS = 3
# Temporary files and folders that threads of this process are writing.
_unfinished: set[Path] = set()


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that no more can be written, in Python's words or in a library's."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(f"os error {code}" in str(error) or os.strerror(code) in str(error) for code in _FULL)


def check_writable(path: PathLike, folder: bool = False) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Parameters
    ----------
    path : of the output
    folder : whether it is a folder; else it is a file

    Raises
    ------
    OutputError
        It exists as the other kind, or the first folder above it that exists takes no files.
    ResourceError
        The disk is full.
    """
    path = Path(path)
    with _said(path, path, *path.parents):
        nearest = _nearest_folder(path, folder)
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".medseg-"):
            pass


def check_distinct(outputs: Iterable[PathLike], inputs: Iterable[PathLike]) -> None:
    """Refuse outputs that would replace what is read.

    Raises
    ------
    OutputError
        An output is an input, be it under another name.
    """
    read = {Path(path).resolve() for path in inputs}
    for path in outputs:
        if Path(path).resolve() in read:
            raise OutputError(f"{path}: is read here, and would be replaced. Choose another output.")


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its name when the block ends well.

    The temporary name keeps the suffixes of `path` (writers choose a format by them). On any
    error it is removed and `path` is left as it was.

    Raises
    ------
    ResourceError
        The disk is full.
    OutputError
        The file cannot be written there.
    """
    path = Path(path)
    _make_parent(path, folder=False)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    _unfinished.add(temporary)
    try:
        with _said(path, temporary):
            temporary.touch()  # libraries have errors of their own for what is said here
            temporary.unlink()
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Like :func:`atomic_path` for a folder; an existing folder at `path` is replaced.

    For an instant there is no folder at `path`. What an interruption leaves then is the old folder under a
    name that :func:`recover_folder` knows, which this function and the reader of bundles call first.
    """
    path = Path(path)
    _make_parent(path, folder=True)
    recover_folder(path)
    with ExitStack() as stack:
        with _said(path, path.parent):
            temporary = stack.enter_context(scratch_folder(path))
        with _said(path, temporary):
            temporary.chmod(0o755)
            yield temporary
            _swap(temporary, path)


@contextmanager
def scratch_folder(path: PathLike) -> Iterator[Path]:
    """Yield a new hidden folder beside `path`, for what is needed to make it, and remove it in the end."""
    path = Path(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    _unfinished.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)


def discard_unfinished() -> None:
    """Remove what this process is still writing, for one that ends without a word to its threads."""
    for path in tuple(_unfinished):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _make_parent(path: Path, folder: bool) -> None:
    with _said(path, path, *path.parents):
        _nearest_folder(path, folder)
        path.parent.mkdir(parents=True, exist_ok=True)


def _nearest_folder(path: Path, folder: bool) -> Path:
    """Return the first folder on the way up from an output; refuse what stands in the way."""
    if folder and path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; expected a folder for the results. {_ELSEWHERE}")
    if not folder and path.is_dir():
        raise OutputError(f"{path}: is a folder; expected the name of a file. {_ELSEWHERE}")
    nearest = path.absolute() if folder else path.absolute().parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"{path}: cannot be written, since {nearest} is a file. {_ELSEWHERE}")
    return nearest


@contextmanager
def _said(path: Path, *roots: Path) -> Iterator[None]:
    """Turn what the system says about `roots` (or below them) into a sentence about `path`."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"{path}: {DISK_FULL}") from error
        if isinstance(error, OSError) and not isinstance(error, MedsegError) and _is_about(error, roots):
            reason = error.strerror or type(error).__name__
            raise OutputError(f"{path}: cannot be written ({reason}). {_ELSEWHERE}") from error
        raise


def _is_about(error: OSError, roots: tuple[Path, ...]) -> bool:
    """Return whether the error is one of the output: a block may also fail to read its input."""
    if not isinstance(error.filename, str | Path):
        return False
    named = Path(error.filename).absolute()
    return any(root.absolute() in (named, *named.parents) for root in roots)


def _swap(new: Path, path: Path) -> None:
    old = new.with_name(new.name + ".old")
    for attempt in range(_SWAPS):
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
            break
        except BaseException as error:
            recovered = path.exists() and not old.exists()
            if not path.exists() and old.exists():
                os.replace(old, path)
            if not (recovered and isinstance(error, OSError) and attempt < _SWAPS - 1):
                raise
    shutil.rmtree(old, ignore_errors=True)


def orphan_target(path: PathLike) -> Path | None:
    """Return the missing folder whose only copy `path` is after an interruption, else None."""
    path = Path(path)
    match = _OLD.fullmatch(path.name)
    target = path.with_name(match.group(1)) if match else None
    return None if target is None or target.exists() else target


def recover_folder(path: PathLike) -> None:
    """Bring back the folder at `path` if an interrupted replacement left only its old copy."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return
    old = [each for each in path.parent.glob(".*.old") if orphan_target(each) == path]
    if old:
        with suppress(OSError):  # a folder that may not be written: the caller says that nothing is there
            os.replace(max(old, key=lambda each: each.stat().st_mtime_ns), path)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
