import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medseg.errors import OutputError, ResourceError
from medseg.files import (
    atomic_folder,
    atomic_path,
    check_writable,
    discard_unfinished,
    is_disk_full,
    scratch_folder,
    sha256_file,
    write_text,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    write_text(target, "whole")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("other")
        raise RuntimeError
    assert target.read_text() == "whole" and len(list(target.parent.iterdir())) == 1


def test_the_temporary_name_keeps_the_suffixes(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.touch()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic_folder(target) as temporary:
            (temporary / f"{text}.txt").write_text(text)
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "where", ["file/a.txt", "file/deep/a.txt", "folder", "/proc/medseg/a.txt", "a" * 300]
)
def test_a_file_that_cannot_be_written_is_one_sentence_before_and_after(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="choose another output") as before:
        check_writable(tmp_path / where)
    with pytest.raises(OutputError, match="choose another output"):
        write_text(tmp_path / where, "text")
    assert before.value.exit_code == 9 and str(tmp_path / where) in str(before.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("where", ["file", "file/a", "/proc/a"])
def test_a_folder_that_cannot_be_written_is_one_sentence_before_and_after(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output"):
        check_writable(tmp_path / where, folder=True)
    with pytest.raises(OutputError, match="choose another output"), atomic_folder(tmp_path / where):
        pass


def test_a_place_that_can_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "new/a.txt", str(tmp_path / "new" / "deep" / "a.txt")):
        check_writable(name)
        check_writable(name, folder=True)
    assert not list(tmp_path.iterdir())


def test_a_library_is_not_asked_to_write_where_nobody_can() -> None:
    with pytest.raises(OutputError), atomic_path("/proc/a.nrrd"):
        raise RuntimeError("what a library says")


def test_an_input_that_is_missing_is_not_said_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "input").read_text()


def test_a_full_disk_is_one_sentence_whoever_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert is_disk_full(
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert not is_disk_full(OSError(errno.EACCES, "no"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file size")
@pytest.mark.parametrize("kind", ["plain", "safetensors", "nifti"])
def test_a_write_that_hits_the_limit_leaves_nothing(tmp_path: Path, kind: str) -> None:
    # The limit on file size stands in for a full disk: the kernel refuses the write in the same way.
    writes = {
        "plain": "write_text(target, 'x' * 10**6)",
        "safetensors": (
            "import torch; from medseg.train.state import save_weights; "
            "save_weights(target, torch.nn.Linear(500, 500))"
        ),
        "nifti": (
            "import numpy as np; from medseg import Geometry, Volume, write; "
            "write(Volume(np.random.rand(60, 60, 60), Geometry((60, 60, 60), np.eye(4))), target)"
        ),
    }
    script = (
        "import resource, signal; from pathlib import Path; from medseg.files import write_text\n"
        f"target = Path({str(tmp_path)!r}) / 'a.nii.gz'\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        f"from medseg.errors import ResourceError\ntry:\n    {writes[kind]}\n"
        "except ResourceError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "the disk is full" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_what_is_unfinished_can_be_removed_without_a_word_to_who_writes_it(tmp_path: Path) -> None:
    (tmp_path / "done").write_text("kept")
    with pytest.raises(OutputError), atomic_path(tmp_path / "a.txt") as file, scratch_folder(file) as folder:
        file.write_text("half")
        (folder / "part").write_text("half")
        discard_unfinished()
        assert [path.name for path in tmp_path.iterdir()] == ["done"]
    discard_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
