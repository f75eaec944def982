"""Messages, progress and cancellation: one hook that the CLI draws, a server streams, a worker records.

A library function calls :func:`progress` or :func:`task` in every loop that may be long. Without a
listener both cost next to nothing. The face that started the work installs a :class:`Listener` with
:func:`listening`; to stop the work it makes :meth:`Listener.cancelled` return True, and the next
step of any loop raises :class:`~medseg.errors.Cancelled`.
"""

import logging
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from medseg.errors import Cancelled

T = TypeVar("T")

STOPPED = "Stopped on request. Run the command again, with --resume where it has one."

logger = logging.getLogger("medseg")


class Listener:
    """Receives progress. Override what you need; the base class ignores everything."""

    def started(self, key: int, label: str, total: int | None) -> None:
        """A task of `total` steps (None: unknown) has begun; `key` names it from now on."""

    def advanced(self, key: int, steps: int, note: str) -> None:
        """Task `key` has done `steps` more steps; `note` is a short status text."""

    def finished(self, key: int) -> None:
        """Task `key` has ended, well or not."""

    def cancelled(self) -> bool:
        """Return True to make the running work raise Cancelled at its next step."""
        return False


_SILENT = Listener()
_listener: ContextVar[Listener] = ContextVar("medseg_listener", default=_SILENT)
_next_key = iter(range(1, 2**62))


class Task:
    """One running piece of work; made by :func:`task`."""

    def __init__(self, label: str, total: int | None) -> None:
        self.key = next(_next_key)
        self.listener = _listener.get()
        self.listener.started(self.key, label, total)

    def advance(self, steps: int = 1, note: str = "", check: bool = True) -> None:
        """Report `steps` more steps done.

        `check` False leaves it to the caller to ask :func:`is_cancelled`: processes that work together
        must stop at the same step.

        Raises
        ------
        Cancelled
            The listener wants the work to stop.
        """
        self.listener.advanced(self.key, steps, note)
        if check:
            check_cancelled()


@contextmanager
def task(label: str, total: int | None = None) -> Iterator[Task]:
    """Open a task that the block advances by hand."""
    running = Task(label, total)
    try:
        yield running
    finally:
        running.listener.finished(running.key)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, reporting one step after each."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(label, total) as running:
        for item in items:
            yield item
            running.advance()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send progress of the block (and of what it calls, in this thread) to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def current_listener() -> Listener:
    """Return the listener of this thread, for one that works on its behalf."""
    return _listener.get()


def is_cancelled() -> bool:
    """Return whether the current listener wants the work to stop."""
    return _listener.get().cancelled()


def check_cancelled() -> None:
    """Raise Cancelled if the current listener asks for it."""
    if is_cancelled():
        raise Cancelled(STOPPED)
