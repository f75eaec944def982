"""A session on disk: a journal of events that is only added to, and the masks that they led to.

::

    FOLDER/
      journal.jsonl          one event a line: {"n": 3, "crc": "5a0f1c22", "event": {...}}
      snapshots/HASH.json    a mask, packed, by the hash of its voxels
      lock                   held by the process that has the session open

An event is on the disk (fsync) before the session acts as if it had happened. What a kill in the middle of
a write leaves is an incomplete last line, which is dropped; a line that is damaged otherwise is an error,
since what follows it cannot be trusted. A lost mask is computed again (:mod:`medseg.prompt.session`).
Nothing here names a patient, a file or a folder: the image is known by its digest.
"""

import hashlib
import json
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from medseg.errors import OutputError, ReadError, ResourceError
from medseg.files import DISK_FULL, atomic_path, check_writable, is_disk_full
from medseg.log import logger
from medseg.prompt.prompts import Mask
from medseg.prompt.regions import Region, Triple
from medseg.prompt.state import FORMAT, Event

JOURNAL, LOCK, SNAPSHOTS, DAMAGED = "journal.jsonl", "lock", "snapshots", "journal.damaged.jsonl"
# A day of work is some hundred kB; a mask that is given as a prompt may be a few MB.
LARGEST_JOURNAL = 2**30
# A packed mask of 2**33 voxels, the largest that is accepted, as text.
LARGEST_SNAPSHOT = 2**31
# Of unpacked masks that are kept at hand.
CACHE_BYTES = 256 * 2**20
_EVENT: TypeAdapter[Any] = TypeAdapter(Event)


class Journal:
    """Events in their order: in a file, or in memory only (`folder` None).

    Use :meth:`open`; a journal with a folder holds its lock until :meth:`close`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.count = 0
        self._lines: list[bytes] = []  # without a folder
        self._lock: IO[bytes] | None = None
        self._stream: IO[bytes] | None = None
        self._size = 0

    @classmethod
    def open(cls, folder: Path | None, repair: bool = False) -> tuple["Journal", list[Any]]:
        """Open or begin a journal; return it and the events that it holds.

        Parameters
        ----------
        folder : made if need be; None: in memory
        repair : give up the events from a damaged line on (the whole file is kept beside)

        Raises
        ------
        OutputError
            The folder cannot be written, or another process has the session open.
        ReadError
            A line is damaged, or the journal is of a newer medseg.
        """
        journal = cls(folder)
        if folder is None:
            return journal, []
        check_writable(folder, folder=True)
        folder.mkdir(parents=True, exist_ok=True)
        journal._lock = _take_lock(folder / LOCK)
        try:
            return journal, journal._read(folder / JOURNAL, repair)
        except BaseException:
            journal.close()
            raise

    def append(self, event: Event) -> None:
        """Add an event; it is on the disk when this returns.

        Raises
        ------
        ResourceError, OutputError
            It could not be written; the journal is as it was.
        """
        line = _line(self.count, event)
        if self.folder is None:
            self._lines.append(line)
        else:
            self._write(line)
        self.count += 1

    def copy(self, folder: Path) -> None:
        """Write all events so far to a new journal in `folder`."""
        data = b"".join(self._lines) if self.folder is None else (self.folder / JOURNAL).read_bytes()
        with atomic_path(folder / JOURNAL) as temporary:
            _write_through(temporary, data)

    def close(self) -> None:
        """Let the folder go; nothing can be added any more. Closing twice is harmless."""
        for stream in (self._stream, self._lock):
            if stream is not None:
                stream.close()
        self._stream = self._lock = None

    def _read(self, path: Path, repair: bool) -> list[Any]:
        data = _read_bytes(path, LARGEST_JOURNAL) if path.exists() else b""
        events, good = [], 0
        for number, line in enumerate(_whole_lines(data)):
            try:
                events.append(_parse(line, number))
            except ValueError as error:
                self._give_up(path, data, number, error, repair)
                break
            good += len(line) + 1
        if good < len(data) and not self.notes:
            self.notes.append("The last event was not written completely (the program was stopped); dropped.")
        self.count, self._size = len(events), good
        self._stream = _open_to_append(path, good)
        return events

    def _give_up(self, path: Path, data: bytes, number: int, error: Exception, repair: bool) -> None:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, ReadError):
            raise error
        if not repair:
            raise ReadError(
                f"{path} line {number + 1}: damaged ({reason}). Restore the folder from a backup, or open "
                f"the session with repair=True, which keeps the {number} events before."
            ) from error
        with atomic_path(path.with_name(DAMAGED)) as temporary:
            _write_through(temporary, data)
        self.notes.append(f"Line {number + 1} of the journal was damaged: what followed it is in {DAMAGED}.")

    def _write(self, line: bytes) -> None:
        if self._stream is None:
            raise OutputError("this session is closed. Open it again to go on.")
        try:
            self._stream.write(line)
            os.fsync(self._stream.fileno())
        except OSError as error:
            with suppress(OSError):
                self._stream.truncate(self._size)
            if is_disk_full(error):
                raise ResourceError(f"{self.folder}: {DISK_FULL}") from error
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror}). Check it.") from error
        self._size += len(line)


class MaskStore:
    """Masks by the hash of their voxels, on a grid of `shape`: packed, in `folder` or (None) in memory.

    The last used are kept unpacked too, up to `cache_bytes`.
    """

    def __init__(self, folder: Path | None, shape: Triple, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.shape = folder, shape
        self.cache_bytes = cache_bytes
        self._packed: dict[str, Mask] = {}
        self._cache: OrderedDict[str, Region] = OrderedDict()

    def put(self, region: Region) -> str:
        """Keep a mask and return its hash."""
        key = key_of(region)
        self._remember(key, region)
        if self.folder is None:
            if key not in self._packed:
                self._packed[key] = Mask.of(region)
        elif not self._path(key).exists():
            self._save(key, Mask.of(region))
        return key

    def get(self, key: str) -> Region | None:
        """Return a mask; None where it is not there, or is damaged (then it is removed)."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        region = self._load(key)
        if region is not None:
            self._remember(key, region)
        return region

    def replace(self, key: str, region: Region) -> None:
        """Let `region` stand for a mask that is lost, though its voxels are others; in memory only."""
        self._packed[key] = Mask.of(region)

    def keep_only(self, keys: Iterable[str]) -> None:
        """Remove all other masks."""
        wanted = set(keys)
        for key in [key for key in self._packed if key not in wanted]:
            del self._packed[key]
        for path in [] if self.folder is None else self.folder.glob("*.json"):
            if path.stem not in wanted:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"

    def _save(self, key: str, mask: Mask) -> None:
        with atomic_path(self._path(key)) as temporary:
            _write_through(temporary, json.dumps(mask.to_dict()).encode())

    def _load(self, key: str) -> Region | None:
        if key in self._packed:
            return self._packed[key].region()
        if self.folder is None or not self._path(key).exists():
            return None
        try:
            mask = Mask.from_dict(json.loads(_read_bytes(self._path(key), LARGEST_SNAPSHOT)))
            # The grid first: a file from elsewhere could unpack to more than the memory holds.
            if mask.shape == tuple(self.shape) and key_of(region := mask.region()) == key:
                return region
        except (ValueError, RecursionError) as error:  # ConfigError and ReadError are ValueErrors
            logger.warning("a saved mask is damaged and is computed again: %s", error)
        self._path(key).unlink(missing_ok=True)
        return None

    def _remember(self, key: str, region: Region) -> None:
        self._cache[key] = region
        self._cache.move_to_end(key)
        total = sum(each.array.nbytes for each in self._cache.values())
        while total > self.cache_bytes and len(self._cache) > 1:
            total -= self._cache.popitem(last=False)[1].array.nbytes


def key_of(region: Region) -> str:
    """Return the hash by which a mask is known: SHA-256 of its grid, its box and its voxels."""
    shape: Triple = (region.array.shape[0], region.array.shape[1], region.array.shape[2])
    key = hashlib.sha256(f"{tuple(region.shape)}{tuple(region.start)}{shape}".encode())
    key.update(np.packbits(region.array).tobytes())
    return key.hexdigest()


def _line(number: int, event: Event) -> bytes:
    data = event.to_dict()
    return json.dumps({"n": number, "crc": _crc(data), "event": data}, separators=(",", ":")).encode() + b"\n"


def _crc(event: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(event, separators=(',', ':')).encode()):08x}"


def _parse(line: bytes, number: int) -> Any:
    """Return the event of a line; ValueError where it is not what was written."""
    try:
        data = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(data, dict) or not isinstance(data.get("event"), dict):
        raise ValueError("not an event")
    event = data["event"]
    if data.get("crc") != _crc(event):
        raise ValueError("its checksum is wrong")
    if data.get("n") != number:
        raise ValueError(f"expected event {number}, found {str(data.get('n'))[:20]}")
    newer = event.get("format", FORMAT)
    if event.get("kind") == "opened" and isinstance(newer, int) and newer > FORMAT:
        raise ReadError(f"the session was saved by a newer medseg (format {newer}). Update medseg.")
    try:
        return _EVENT.validate_python(event)
    except ValidationError as error:
        raise ValueError(f"not an event of this version: {error.errors()[0]['msg']}") from error


def _whole_lines(data: bytes) -> Iterator[bytes]:
    """Yield what ends with a newline; the rest was never acknowledged."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start:end]
        start = end + 1


def _open_to_append(path: Path, size: int) -> IO[bytes]:
    """Open the journal for appending, cut to the part that is good."""
    try:
        new = not path.exists()
        stream = path.open("ab", buffering=0)
        stream.truncate(size)
        if new:
            _sync_folder(path.parent)
        return stream
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Check its permissions.") from error


def _read_bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if len(data) > most:
        raise ReadError(f"{path}: is larger than {most // 2**20} MB, so it is not of a session. Check it.")
    return data


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take_lock(path: Path) -> IO[bytes]:
    """Lock the folder for this process; the system lets go of it when the process ends, however it ends."""
    try:
        stream = path.open("ab")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Check its permissions.") from error
    try:
        _lock(stream)
    except (BlockingIOError, PermissionError) as error:
        stream.close()
        raise OutputError(
            f"{path.parent}: this session is open already, here or in another program. Close it there first, "
            "or choose another folder."
        ) from error
    except OSError:  # some network disks have no locks: better a session without than none
        logger.warning("%s: this disk has no locks; do not open the session twice", path.parent)
    return stream


def _lock(stream: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        stream.seek(0)
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
