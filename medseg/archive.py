"""Folders and zips from outside, read with every member checked first.

A model that somebody sent is a folder or a zip of a few descriptions and large weights. :func:`open_files`
gives both the same face and lets nothing through that points outside, is a link, is there twice, is
encrypted, or unpacks to more than it may.
"""

import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from medseg.errors import BundleError
from medseg.types import PathLike

# Text that describes a model is thousands of bytes; more describes none.
MAX_TEXT_BYTES = 32 * 2**20
# Float weights compress by a few per cent (a fresh norm layer a little more); a bomb by a thousand.
MAX_COMPRESSION = 50
# Below this a high ratio does no harm, and lists of equal numbers in JSON have one.
SMALL_BYTES = 2**20
# Five folds of the largest network of nnU-Net with two checkpoints each stay below a quarter of this.
MAX_TOTAL_BYTES = 256 * 2**30
# A published model holds dozens of files; one with all its validation results, thousands.
MAX_MEMBERS = 100_000


@dataclass(frozen=True)
class Limits:
    """What a folder or zip of one kind may hold; names are relative, with ``/``.

    Attributes
    ----------
    members : pattern that a name must match in full to be of any use
    weights : pattern of those that may be larger than `text_bytes`
    strangers : whether other names are left out of sight; else they are an error
    links : whether a folder may hold links (a zip never may)
    depth : folders below the root that are looked into
    text_bytes, total_bytes : most bytes of one description, and of all members together
    kind : what it is, for errors
    """

    members: re.Pattern[str]
    weights: re.Pattern[str]
    strangers: bool = False
    links: bool = False
    depth: int = 8
    text_bytes: int = MAX_TEXT_BYTES
    total_bytes: int = MAX_TOTAL_BYTES
    kind: str = "a bundle"

    def wants(self, name: str, where: Path) -> bool:
        """Return whether a member is of use.

        Raises
        ------
        BundleError
            It is not, and strangers are an error.
        """
        if self.members.fullmatch(name):
            return True
        if not self.strangers:
            raise BundleError(f"{where}: {name!r} does not belong into {self.kind}. Remove it.")
        return False

    def is_large(self, name: str) -> bool:
        """Return whether a member may be larger than a text."""
        return self.weights.fullmatch(name) is not None


class Files(Protocol):
    """Checked members of a folder or a zip."""

    @property
    def path(self) -> Path:
        """The folder or the zip."""

    def names(self) -> set[str]:
        """Return the names of all members that are of use."""

    def open(self, name: str) -> IO[bytes]:
        """Open a member for reading."""

    def local(self, name: str) -> Path | None:
        """Return the path of a member that is a file of its own, which can be mapped into memory."""


def open_files(path: PathLike, limits: Limits) -> Files:
    """Check the members of a folder or a zip and return them.

    Raises
    ------
    BundleError
        It is neither; or a member points outside, is a link, is there twice, is encrypted, is too large, or
        does not belong there.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path, limits)
    try:
        return _Zip(path, limits)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise BundleError(f"{path}: not a zip file, or damaged ({error}). Copy it again.") from error
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(
            f"{path}: cannot be read ({reason}). Check the path and its permissions."
        ) from error


def read_member(files: Files, name: str) -> bytes:
    """Return the content of a member.

    Raises
    ------
    BundleError
        It cannot be read, or is damaged.
    """
    with _reading(files, name) as stream:
        return stream.read()


def hash_member(files: Files, name: str) -> str:
    """Return the hexadecimal SHA-256 of a member; raises like :func:`read_member`."""
    sha = hashlib.sha256()
    with _reading(files, name) as stream:
        while chunk := stream.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


@contextmanager
def _reading(files: Files, name: str) -> Iterator[IO[bytes]]:
    try:
        with files.open(name) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"{files.path}: {name} is damaged ({error}). Copy it again.") from error
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(
            f"{files.path}: {name} cannot be read ({reason}). Check its permissions."
        ) from error


class _Folder:
    """A folder. Where links are refused, nothing outside it is ever read."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.path = root
        self.limits = limits
        found = (file.relative_to(root).as_posix() for file in self._walk(root, 0))
        self.members = {name for name in found if limits.wants(name, root)}

    def names(self) -> set[str]:
        return self.members

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            file = Path(entry.path)
            if entry.is_symlink() and not self.limits.links:
                raise BundleError(
                    f"{file}: is a link. {self.limits.kind.capitalize()} must hold its files itself; "
                    "copy them in."
                )
            if entry.is_dir():
                if depth < self.limits.depth:
                    yield from self._walk(file, depth + 1)
            elif entry.is_file():
                yield file

    def open(self, name: str) -> IO[bytes]:
        path = self.path / name
        size = path.stat().st_size
        if size > self.limits.text_bytes and not self.limits.is_large(name):
            raise BundleError(f"{path}: {size} bytes is no description of a model. Check the file.")
        return path.open("rb")

    def local(self, name: str) -> Path | None:
        return self.path / name


class _Zip:
    """A zip; every member is checked before anything is read, and nothing is ever unpacked to disk."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self.members: dict[str, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
        if len(listed) > MAX_MEMBERS:
            raise BundleError(f"{path}: lists {len(listed)} files, more than any model has. Do not trust it.")
        seen: set[str] = set()
        for member in listed:
            self._check_name(member, seen)
            if not member.is_dir() and limits.wants(member.filename, path):
                self._check_size(member)
                self.members[member.filename] = member
        total = sum(member.file_size for member in self.members.values())
        if total > limits.total_bytes:
            raise BundleError(f"{path}: unpacks to {total} bytes. Do not trust this file.")

    def _check_name(self, member: zipfile.ZipInfo, seen: set[str]) -> None:
        name = member.filename
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name or "\\" in member.orig_filename:
            raise BundleError(f"{self.path}: member {name!r} points outside it. Do not trust this file.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BundleError(f"{self.path}: member {name!r} is a link. Do not use this file.")
        if name in seen:
            raise BundleError(f"{self.path}: member {name!r} is there twice. Do not use this file.")
        seen.add(name)

    def _check_size(self, member: zipfile.ZipInfo) -> None:
        name, size = member.filename, member.file_size
        if member.flag_bits & 0x1:
            raise BundleError(f"{self.path}: member {name!r} is encrypted. Pack it without a password.")
        limit = max(member.compress_size * MAX_COMPRESSION, SMALL_BYTES)
        if size > (limit if self.limits.is_large(name) else min(limit, self.limits.text_bytes)):
            raise BundleError(
                f"{self.path}: member {name!r} unpacks to {size} bytes. Do not trust this file."
            )

    def names(self) -> set[str]:
        return set(self.members)

    def open(self, name: str) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open(self.members[name])

    def local(self, name: str) -> Path | None:
        return None
