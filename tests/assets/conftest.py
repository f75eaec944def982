"""An asset of a thousand bytes, in archives that real pip fetches from a folder, without a network."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from medseg.assets import ASSETS, Asset, Source, store

DATA = bytes(range(250)) * 4
SHA256 = hashlib.sha256(DATA).hexdigest()
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
SDIST = "tiny_weights-1.0.tar.gz"
MEMBER = "tiny_weights/tiny.pth"


def tiny(*sources: Source, **changes: object) -> Asset:
    fields: dict[str, object] = {
        **{"name": "tiny", "title": "Tiny weights", "filename": "tiny.pth", "licence": "Apache-2.0"},
        **{"size": len(DATA), "sha256": SHA256, "sources": sources, "citation": "Nobody, Never, 1900"},
    }
    return Asset(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class Shop:
    """A folder that pip takes archives from, and a cache."""

    folder: Path
    cache: Path
    enter: Callable[[Asset], None]
    hashes: dict[str, str] = field(default_factory=dict)

    def stock(self, *sources: Source, **changes: object) -> Asset:
        """Put an asset with these sources on the table."""
        asset = tiny(*sources, **changes)
        self.enter(asset)
        return asset

    def wheel(self, members: dict[str, bytes]) -> str:
        """Make a wheel that wants a Python of the far future; return its SHA-256."""
        info = "tiny_weights-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Python: >=99\n"
        kind = "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(self.folder / WHEEL, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(f"{info}/WHEEL", kind)
            archive.writestr(f"{info}/RECORD", "")
        return self._hash(WHEEL)

    def sdist(self, trace: Path, data: bytes = DATA) -> str:
        """Make a source archive whose build leaves a trace; return its SHA-256."""
        project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        backend = (
            "import pathlib\n"
            "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
            f"    pathlib.Path({str(trace)!r}).write_text('ran')\n"
            "    info = pathlib.Path(folder) / 'tiny_weights-1.0.dist-info'\n"
            "    info.mkdir()\n"
            "    text = 'Metadata-Version: 2.1\\nName: tiny-weights\\nVersion: 1.0\\n'\n"
            "    (info / 'METADATA').write_text(text)\n"
            "    return info.name\n"
            "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
            "    raise NotImplementedError\n"
        )
        root = "tiny_weights-1.0"
        metadata = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        with tarfile.open(self.folder / SDIST, "w:gz") as archive:
            _add(archive, f"{root}/pyproject.toml", project.encode())
            _add(archive, f"{root}/backend.py", backend.encode())
            _add(archive, f"{root}/PKG-INFO", metadata)
            _add(archive, f"{root}/{MEMBER}", data)
        return self._hash(SDIST)

    def _hash(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    folder = tmp_path / "shop"
    folder.mkdir()
    # pip of this machine, but of its settings only these: what it finds is in the folder.
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(store, "_shown", set())
    return Shop(folder, tmp_path / "cache", lambda asset: monkeypatch.setitem(ASSETS, asset.name, asset))
