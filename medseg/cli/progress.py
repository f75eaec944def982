"""Draws progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from threading import RLock
from typing import Any

from medseg.log import Listener

# Nothing is drawn for work that is over sooner.
QUIET_SECONDS = 2.0
LINE_EVERY_SECONDS = 20.0


class TerminalListener(Listener):
    """Shows every task that takes longer than two seconds; threads may report at the same time."""

    def __init__(self) -> None:
        self.console: Any = None
        self.tasks: dict[int, _Shown] = {}
        self.bar: Any = None
        self.interrupted = False
        self.printed = 0.0
        self.lock = RLock()

    def started(self, key: int, label: str, total: int | None) -> None:
        """Remember the task; it is drawn when it has lasted."""
        with self.lock:
            if not self.tasks:
                self.printed = time.monotonic()
            self.tasks[key] = _Shown(label, total)

    def advanced(self, key: int, steps: int, note: str) -> None:
        """Update the bar, or print a line."""
        with self.lock:
            task, now = self.tasks[key], time.monotonic()
            task.done += steps
            task.note = note or task.note
            lasting = [each for each in self.tasks.values() if each.is_shown(now)]
            if self._is_terminal():
                for each in lasting:
                    self._draw(each)
            elif lasting and now - self.printed > LINE_EVERY_SECONDS:
                self.printed = now
                self.say(" | ".join(each.line() for each in lasting))

    def finished(self, key: int) -> None:
        """Take the task off the display."""
        with self.lock:
            task = self.tasks.pop(key)
            if self.bar is not None and task.row is not None:
                self.bar.remove_task(task.row)
                if not any(other.row is not None for other in self.tasks.values()):
                    self.close()

    def cancelled(self) -> bool:
        """Return whether a signal asked the work to stop."""
        return self.interrupted

    def say(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        with self.lock:
            if self.bar is None:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
            else:
                self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar off the display."""
        with self.lock:
            if self.bar is not None:
                self.bar.stop()
                self.bar = None
            for task in self.tasks.values():
                task.row = None

    def _is_terminal(self) -> bool:
        """Return whether there is a terminal to draw on; the library that draws is only then imported."""
        if self.console is None and sys.stderr.isatty():
            from rich.console import Console

            self.console = Console(stderr=True, highlight=False)
        return self.console is not None and bool(self.console.is_terminal)

    def _draw(self, task: "_Shown") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        if self.bar is None:
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self.bar = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=15)),
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("left  {task.fields[note]}", table_column=rest),
                console=self.console,
                transient=True,
                expand=True,
            )
            self.bar.start()
        if task.row is None:
            task.row = self.bar.add_task(task.label, total=task.total, note=task.note)
        self.bar.update(task.row, completed=task.done, note=task.note)


class MessageHandler(logging.Handler):
    """Prints what medseg and its libraries have to say, without tearing the bar."""

    def __init__(self, listener: TerminalListener) -> None:
        super().__init__()
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        try:
            self.listener.say(self.format(record))
        except Exception:  # as the handlers of the standard library do
            self.handleError(record)


class _Shown:
    """One task on the display."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total = label, total
        self.done = 0
        self.note = ""
        self.row: Any = None
        self.began = time.monotonic()

    def is_shown(self, now: float) -> bool:
        """Return whether the task has lasted, and there is more to say than that it has begun or is over."""
        over = self.total is not None and (self.done >= self.total or self.total < 2)
        return now - self.began >= QUIET_SECONDS and not over

    def line(self) -> str:
        """Return the task as one line of text, with the time left."""
        if not self.total or not self.done:
            total = f" of {self.total}" if self.total else ""
            return f"{self.label}: {self.done}{total}  {self.note}".rstrip()
        seconds = (time.monotonic() - self.began) * (self.total - self.done) / self.done
        left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        return f"{self.label}: {100 * self.done // self.total} %, {left}  {self.note}".rstrip()
