"""Fixtures: where the real data and the peers' outputs are."""

import os
from pathlib import Path

import pytest

from medseg import assets
from medseg.errors import AssetError

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden: compares with outputs of other programs (set by itself)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses `golden_dir`, so that ``make golden`` finds it without a list."""
    for item in items:
        if "golden_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        reason = f"{folder.name} is not on this machine (set MEDSEG_TEST_DATA to the folder that holds it)"
        if os.environ.get("MEDSEG_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def _shared() -> Path:
    given = os.environ.get("MEDSEG_TEST_DATA")
    return Path(given).parent if given else SHARED


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real images (hippocampus, ms_lesion, ...)."""
    return _present(_shared() / "data")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with outputs of nnU-Net and of metric packages."""
    return _present(_shared() / "golden")


def _asset(name: str, given: Path | None = None) -> Path:
    """Return published weights: a file beside the real data, or fetched once into the user's cache."""
    try:
        return assets.find(name, given=given if given and given.is_file() else None)
    except AssetError as error:
        if os.environ.get("MEDSEG_REQUIRE_DATA") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def lite_medsam_path() -> Path:
    """Weights of LiteMedSAM, which understands boxes (39 MB)."""
    return _asset("lite-medsam")


@pytest.fixture(scope="session")
def mobile_sam_path() -> Path:
    """Weights of MobileSAM, which understands clicks too (41 MB)."""
    return _asset("mobile-sam", _shared() / "weights" / "mobile_sam.pt")


@pytest.fixture(scope="session")
def instanseg_paths() -> dict[str, Path]:
    """InstanSeg's nets by the names of their assets (16 and 21 MB)."""
    return {name: _asset(name) for name in ("instanseg-fluorescence", "instanseg-brightfield")}


@pytest.fixture(scope="session")
def peer_python() -> Path:
    """Python of an environment that has nnU-Net 2.8.1 (``make peers``), or the one MEDSEG_PEERS names."""
    given = os.environ.get("MEDSEG_PEERS")
    python = Path(given) if given else Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no Python with nnU-Net at {python} (make peers, or set MEDSEG_PEERS to one)")
    return python
