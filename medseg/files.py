"""Files that appear whole or not at all, and their hashes."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import ResourceError
from medseg.types import PathLike

DISK_FULL = "the disk is full. Free some space and run the same command again."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that no more can be written, in Python's words or in a library's."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(f"os error {code}" in str(error) or os.strerror(code) in str(error) for code in _FULL)


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its name when the block ends well.

    The temporary name keeps the suffixes of `path` (writers choose a format by them). On any
    error it is removed and `path` is left as it was.

    Raises
    ------
    ResourceError
        The disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"{path}: {DISK_FULL}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Like :func:`atomic_path` for a folder; an existing folder at `path` is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"{path}: {DISK_FULL}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
