"""Ctrl-C and SIGTERM end a prediction in under two seconds, whatever computes, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from medseg.bundle import save_bundle
from medseg.io import write
from tests.infer.models import image, tiny_plan, tiny_weights

# The promise to the user.
SECONDS = 2.0


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one tile that computes for many seconds, one broken image and a good one."""
    folder = tmp_path_factory.mktemp("slow")
    plan = tiny_plan(patch=(96, 96, 96))
    settings = plan.configuration("3d_fullres")
    wide = settings.replace(architecture=settings.architecture.replace(features_per_stage=(96, 96)))
    plan = plan.replace(configurations={"3d_fullres": wide})
    save_bundle(folder / "bundle", plan, "3d_fullres", {"0": tiny_weights(plan)}, (), {"precision": "fp32"})
    write(image((96, 96, 96)), folder / "images" / "big_0000.nii.gz")
    (folder / "images" / "abc_0000.nii.gz").write_bytes(b"broken")
    return folder


@dataclass
class Running:
    """A prediction whose first, broken case is reported and whose second is in the network."""

    process: "subprocess.Popen[str]"
    out: Path

    def end(self, *signals: int) -> tuple[float, str]:
        """Send signals; return the seconds until the process was gone, and what it had said."""
        began = time.monotonic()
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.1)
        said = self.process.communicate(timeout=60)[1]
        return time.monotonic() - began, said


@pytest.fixture
def running(slow: Path, tmp_path: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "medseg", "predict", str(slow / "images"), "-m", str(slow / "bundle")]
    command += ["-o", str(tmp_path / "out"), "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "predictions.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.0)  # the second case is read, and its tile begun
    yield Running(process, tmp_path / "out")
    process.kill()


def assert_nothing_is_left(running: Running) -> None:
    assert [path.name for path in running.out.iterdir()] == ["predictions.json"]
    rows = json.loads((running.out / "predictions.json").read_text())["cases"]
    assert [(row["case"], row["status"]) for row in rows] == [("abc", "failed")]
    with pytest.raises(ProcessLookupError):  # the session of the command holds no process
        os.killpg(running.process.pid, 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_prediction_within_two_seconds(running: Running, number: int, code: int) -> None:
    assert running.process.poll() is None, "the tile must still compute"
    seconds, said = running.end(number)
    assert seconds < SECONDS
    assert running.process.returncode == code
    assert "--resume" in said and "Traceback" not in said
    assert_nothing_is_left(running)


def test_a_second_interrupt_ends_at_once(running: Running) -> None:
    seconds, _ = running.end(signal.SIGINT, signal.SIGINT)
    assert seconds < 0.8
    assert running.process.returncode == 130
    assert_nothing_is_left(running)
