"""Ctrl-C and SIGTERM: the work is asked to stop, and the process ends in time whatever its threads do."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from medseg.cli.progress import TerminalListener
from medseg.files import discard_unfinished

# The work has this long to stop by itself; the command is gone within two seconds.
GRACE_SECONDS = 1.5
TIDY_SECONDS = 0.3
# These finish the step and save the state, however long that takes.
PATIENT = ("train", "demo")
HANDLED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Turns the first signal into a request, and sees to it that the request is met."""

    def __init__(self, listener: TerminalListener) -> None:
        self.listener = listener
        self.patient = False
        self.received: int | None = None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.received or signal.SIGINT)

    def watch(self) -> None:
        """Take over SIGINT and SIGTERM."""
        for number in HANDLED:
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Ask the work to stop; the second time, stop it."""
        again, self.received = self.received is not None, number
        self.listener.interrupted = True
        if again and self.patient:
            raise KeyboardInterrupt
        if again:
            self.leave()
        if self.patient:
            _say("\nStopping after this step. Press Ctrl-C again to stop at once.\n")
            return
        _say("\nStopping.\n")
        timer = threading.Timer(GRACE_SECONDS, self.leave)
        timer.daemon = True
        timer.start()

    def leave(self) -> NoReturn:
        """End the process without waiting for its threads."""
        leave(self.exit_code)


@contextmanager
def mortal() -> Iterator[None]:
    """Let a signal end the process as it ends any: while libraries load, Python answers none for seconds.

    For where nothing has been written yet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave(code: int) -> NoReturn:
    """End the process now: threads that compute, or wait for a dead disk, would be waited for otherwise."""
    tidying = threading.Thread(target=_tidy, daemon=True)
    with suppress(RuntimeError):  # no more threads
        tidying.start()
        tidying.join(TIDY_SECONDS)
    os._exit(code)


def _tidy() -> None:
    """Leave nothing half-written and the terminal as it was; any of it may hang."""
    discard_unfinished()
    if sys.stderr.isatty():
        _say("\x1b[?25h")  # a live display hides the cursor
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # closed, or in the middle of a write
            stream.flush()


def _say(text: str) -> None:
    """Write to stderr from a signal handler, where Python's own streams may be in the middle of a write."""
    with suppress(OSError):
        os.write(2, text.encode())
