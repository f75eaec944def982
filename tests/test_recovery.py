"""A folder that replaces another survives whatever happens between the two renames."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medseg.bundle import load_bundle, save_bundle
from medseg.files import atomic_folder, orphan_target, recover_folder
from tests.infer.models import tiny_plan, tiny_weights


def filled(target: Path, text: str) -> Path:
    with atomic_folder(target) as temporary:
        (temporary / f"{text}.txt").write_text(text)
    return target


def test_a_failing_second_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = filled(tmp_path / "folder", "old"), os.replace

    def refuse(source: Path, to: Path) -> None:
        if Path(to) == target and not Path(source).name.endswith(".old"):
            raise PermissionError(errno.EACCES, "no")
        replace(source, to)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        filled(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in target.iterdir()] == ["old.txt"]


KILLED = """
import os; from pathlib import Path; from medseg.files import atomic_folder
replace = os.replace
def once(source, to):
    replace(source, to)
    if str(to).endswith(".old"):
        os._exit(9)
os.replace = once
with atomic_folder({target!r}) as temporary:
    (temporary / "new.txt").write_text("new")
"""


def test_a_folder_survives_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from medseg.cli import app

    (tmp_path / "plan.yaml").write_text("")
    target = filled(tmp_path / "bundle", "old")
    filled(tmp_path / "bundle.b", "other")
    script = KILLED.format(target=str(target))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    (orphan,) = tmp_path.glob(".*.old")
    assert not target.exists() and orphan_target(orphan) == target
    assert CliRunner().invoke(app, ["clean", str(tmp_path)]).exit_code == 0
    assert orphan.exists() and len(list(tmp_path.glob(".*"))) == 1
    recover_folder(tmp_path / "bund")
    recover_folder(target)
    assert [p.name for p in target.iterdir()] == ["old.txt"] and not orphan.exists()


def test_a_writer_recovers_first_and_a_stale_copy_is_no_orphan(tmp_path: Path) -> None:
    target = filled(tmp_path / "folder", "old")
    target.rename(tmp_path / ".folder.abcdefgh.old")
    with pytest.raises(RuntimeError), atomic_folder(target):
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    (tmp_path / ".folder.abcdefgh.old").mkdir()
    assert orphan_target(tmp_path / ".folder.abcdefgh.old") is None


@pytest.mark.parametrize("given", ["run/bundle", "run"])
def test_a_bundle_whose_replacement_was_interrupted_is_found(tmp_path: Path, given: str) -> None:
    plan = tiny_plan()
    save_bundle(tmp_path / "run" / "bundle", plan, "3d_fullres", {"0": tiny_weights(plan)}, (), {})
    (tmp_path / "run" / "bundle").rename(tmp_path / "run" / ".bundle.abcdefgh.old")
    assert load_bundle(tmp_path / given).folds == ("0",)
    assert (tmp_path / "run" / "bundle").is_dir()
