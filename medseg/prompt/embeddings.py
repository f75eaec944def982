"""Image embeddings, kept in memory and on disk: a slice is encoded once for every object, click and day."""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medseg.errors import OutputError, ResourceError
from medseg.files import atomic_path
from medseg.log import logger
from medseg.types import PathLike

MEMORY_BYTES = 256 * 2**20
DISK_BYTES = 4 * 2**30
# An embedding of ViT-H at 1024 pixels is 4 MiB; a larger file was not written here.
_LARGEST_FILE = 64 * 2**20


def default_folder() -> Path:
    """Return where embeddings of sessions are kept.

    Beside the weights and not in the session: a session may be passed on, and has no picture in it.
    """
    from medseg.assets import default_cache

    return default_cache().parent / "embeddings"


class EmbeddingCache:
    """Tensors by key, least recently used first out, in memory and (with a folder) on disk.

    What comes out is bit for bit what went in. A file that is damaged is removed, as if it had never been.
    A disk that is full or read-only costs no result: the cache then lives in memory only. One cache may
    serve several threads, and one folder several processes. A key says all that its tensor depends on.

    Parameters
    ----------
    folder : where to keep files; None: only in memory
    memory_bytes, disk_bytes : most to keep
    """

    def __init__(
        self, folder: PathLike | None = None, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._held = 0
        self._written: int | None = None  # bytes on disk; None: not counted yet
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of `key`, or None."""
        with self._lock:
            found = self._memory.get(key)
            if found is not None:
                self._memory.move_to_end(key)
                return found
        found = self._read(key)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep `tensor`, which must not be changed afterwards."""
        self._remember(key, tensor)
        if self.folder is not None:
            self._write(key, tensor)

    def clear(self) -> None:
        """Forget everything, on disk too."""
        with self._lock:
            self._memory.clear()
            self._held = 0
            self._written = None
        for path in self._files():
            path.unlink(missing_ok=True)

    def _remember(self, key: str, tensor: Tensor) -> None:
        with self._lock:
            old = self._memory.pop(key, None)
            self._held += tensor.nbytes - (0 if old is None else old.nbytes)
            self._memory[key] = tensor
            while self._held > self.memory_bytes and self._memory:
                self._held -= self._memory.popitem(last=False)[1].nbytes

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    def _files(self) -> Iterator[Path]:
        return iter(()) if self.folder is None else self.folder.glob("??/*.safetensors")

    def _read(self, key: str) -> Tensor | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            found = _load(path, key)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s: a damaged embedding was removed (%s); it is computed again", path, error)
            path.unlink(missing_ok=True)
            return None
        now = time.time_ns()  # the system's own stamp is some milliseconds coarse
        with suppress(OSError):
            os.utime(path, ns=(now, now))  # files go in the order of their last use
        return found

    def _write(self, key: str, tensor: Tensor) -> None:
        path = self._path(key)
        assert path is not None
        if path.is_file():  # of another thread or process: the same, since its key is
            return
        content = tensor.detach().cpu().contiguous()
        data = save({"embedding": content}, {"key": key, "sha256": _digest(content)})
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
            self._make_room(len(data))
        except (OutputError, ResourceError, OSError) as error:
            logger.warning("embeddings are kept in memory only: %s", error)
            self.folder = None

    def _make_room(self, added: int) -> None:
        with self._lock:
            counted = self._written is not None
            self._written = (self._written or 0) + added
            if counted and self._written <= self.disk_bytes:
                return
            sizes = sorted(_sizes(self._files()))
            total = sum(size for _, size, _ in sizes)
            for _, size, path in sizes:
                if total <= self.disk_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size
            self._written = total


def embedding_key(**parts: Any) -> str:
    """Return the key of an embedding: a hash of everything that it depends on.

    >>> embedding_key(scene="ab12", axis=2, index=7)[:8]
    '92eb5472'
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _load(path: Path, key: str) -> Tensor:
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("larger than an embedding")
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        found: Tensor = file.get_tensor("embedding").clone()
    if notes.get("key") != key or notes.get("sha256") != _digest(found):
        raise ValueError("its content does not fit its name")
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()


def _sizes(paths: Iterator[Path]) -> Iterator[tuple[int, int, Path]]:
    """Last use in ns, bytes and path of each file that is still there."""
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        yield found.st_mtime_ns, found.st_size, path
