"""The first signal asks, the second ends; a training finishes its step, and all else ends in time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg.cli import app
from medseg.cli.progress import TerminalListener
from medseg.cli.signals import Signals, mortal


@pytest.fixture
def signals() -> Signals:
    return Signals(TerminalListener())


@pytest.mark.parametrize(
    ("verb", "patient"), [("train", True), ("demo", True), ("predict", False), ("check", False)]
)
def test_only_what_trains_is_given_all_the_time_it_wants(signals: Signals, verb: str, patient: bool) -> None:
    CliRunner().invoke(app, [verb, "nowhere", "--no-such-option"], obj=signals)
    assert signals.patient is patient


def test_a_training_is_asked_first_and_interrupted_then(signals: Signals) -> None:
    signals.patient = True
    signals.handle(signal.SIGTERM, None)
    assert signals.listener.cancelled() and signals.exit_code == 143
    with pytest.raises(KeyboardInterrupt):
        signals.handle(signal.SIGINT, None)
    assert signals.exit_code == 130


@pytest.mark.parametrize("stuck", [True, False])
def test_a_thread_that_is_still_busy_at_the_end_changes_neither_code_nor_output(stuck: bool) -> None:
    script = (
        "import atexit, sys, time\n"
        "from medseg import cli\n"
        "from medseg.infer.workers import in_order\n"
        "def work(signals):\n"
        f"    held.append(in_order(lambda n: time.sleep(n), [0, {60 * stuck}, 0], 2))\n"
        "    next(held[0])\n"
        f"    {'pass' if stuck else 'list(held[0])'}\n"
        "    print('all is done')\n"
        "    return 3\n"
        "held = []\n"
        "atexit.register(print, 'Python is taken down')\n"
        "cli._run = work\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    said = "all is done\n" if stuck else "all is done\nPython is taken down\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


def test_handlers_come_back_after_the_time_in_which_a_signal_kills() -> None:
    before = signal.getsignal(signal.SIGINT)
    with mortal():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


ENDLESS = """
import signal, sys, time
from pathlib import Path
from medseg.cli.progress import TerminalListener
from medseg.cli.signals import Signals
from medseg.files import atomic_path
Signals(TerminalListener()).watch()
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_who_does_not_stop_is_ended_and_leaves_nothing_unfinished(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "out.txt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.strip() == "Stopping."
    assert not list(tmp_path.iterdir())


def test_a_disk_that_hangs_does_not_keep_the_process() -> None:
    code = """
import time
from medseg.cli import signals
signals.discard_unfinished = lambda: time.sleep(60)
signals.leave(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 7
