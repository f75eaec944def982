"""Draws progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

import signal
import sys
import time
from types import FrameType
from typing import Any

from medseg.log import Listener

# Nothing is drawn for work that is over sooner.
QUIET_SECONDS = 2.0
LINE_EVERY_SECONDS = 20.0


class TerminalListener(Listener):
    """Shows every task that takes longer than two seconds; the first Ctrl-C asks the work to stop."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.tasks: dict[int, _Shown] = {}
        self.bar: Any = None
        self.interrupted = False

    def watch_interrupt(self) -> None:
        """Turn the first Ctrl-C into a request, so that files are never left half-written."""

        def handle(_signal: int, _frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            sys.stderr.write("\nStopping after this step. Press Ctrl-C again to stop at once.\n")

        signal.signal(signal.SIGINT, handle)

    def started(self, key: int, label: str, total: int | None) -> None:
        """Remember the task; it is drawn when it has lasted."""
        self.tasks[key] = _Shown(label, total)

    def advanced(self, key: int, steps: int, note: str) -> None:
        """Update the bar, or print a line."""
        task = self.tasks[key]
        task.done += steps
        task.note = note or task.note
        if time.monotonic() - task.began < QUIET_SECONDS:
            return
        if self.console.is_terminal:
            self._draw(task)
        elif time.monotonic() - task.printed > LINE_EVERY_SECONDS:
            task.printed = time.monotonic()
            self.console.print(task.line(), soft_wrap=True)

    def finished(self, key: int) -> None:
        """Take the task off the display."""
        task = self.tasks.pop(key)
        if self.bar is not None and task.row is not None:
            self.bar.remove_task(task.row)
            if not self.tasks:
                self.bar.stop()
                self.bar = None

    def cancelled(self) -> bool:
        """Return whether Ctrl-C was pressed."""
        return self.interrupted

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


class _Shown:
    """One task on the display."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total = label, total
        self.done = 0
        self.note = ""
        self.row: Any = None
        self.began = self.printed = time.monotonic()

    def line(self) -> str:
        """Return the task as one line of text, with the time left."""
        if not self.total or not self.done:
            return f"{self.label}: {self.done}  {self.note}"
        seconds = (time.monotonic() - self.began) * (self.total - self.done) / self.done
        left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        return f"{self.label}: {100 * self.done // self.total} %, {left}  {self.note}".rstrip()
