"""Items on a belt: stages in threads, one item in each, and no wait without an owner and an end.

The thread that iterates over :func:`convey` owns every wait. It never waits longer than a tick, so it can be
stopped although a stage is deep in a library, and it gives up a stage that shows no sign of life.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Generic, TypeVar

from medseg import log
from medseg.errors import Cancelled, MedsegError, ResourceError

T = TypeVar("T")

# How often the owner looks whether it shall stop; what is finished wakes it at once.
TICK_SECONDS = 0.1
# How long stages that are asked to stop are waited for; a command ends within two seconds of Ctrl-C.
STOP_SECONDS = 1.0


@dataclass(frozen=True)
class Stage:
    """One station of the belt.

    Attributes
    ----------
    name : of its thread
    work : from an item and what the stage before returned (None in the first) to what the next one gets
    timeout : seconds without a sign of life (a step of progress, a look whether to stop) until it is given up
    late : the error that an item then gets
    vital : whether the belt stops with that error, since no other item can hope for more
    """

    name: str
    work: Callable[[Any, Any], Any]
    timeout: float
    late: Callable[[Any], MedsegError]
    vital: bool = False


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an item: the value of the last stage, or the error of any."""

    item: T
    value: Any = None
    error: BaseException | None = None


def convey(
    items: Iterable[T], stages: "tuple[Stage, ...]", admit: Callable[[T], bool] = lambda item: True
) -> Generator[Outcome[T], None, None]:
    """Send items through stages that work at the same time; yield each as it is done or has failed.

    A stage holds one item: the one at work, or one that is ready and waits for the next stage. Items keep
    their order but for those that fail. Close the iterator (`contextlib.closing`) to stop the stages.

    Parameters
    ----------
    items : one after the other
    stages : first to last; each has a thread of its own, which sees the progress listener of the caller
    admit : whether an item may start while others are under way; an empty belt takes any

    Raises
    ------
    Cancelled
        The listener asked for it. What was finished meanwhile has been yielded before.
    MedsegError
        A vital stage hangs.
    ResourceError
        The system gives no thread.
    """
    belt = _Belt(deque(items), stages, admit)
    try:
        while belt.loaded and not (belt.cancelled or log.is_cancelled()):
            belt.bell.clear()
            outcomes = belt.turn()
            yield from outcomes
            if not outcomes:
                belt.bell.wait(TICK_SECONDS)
        if belt.loaded:
            belt.stop()
            yield from belt.finished()
            raise Cancelled(log.STOPPED)
    finally:
        belt.stop()


class _Relay(log.Listener):
    """Passes progress on to the caller's listener, notes when, and tells one thread to stop."""

    def __init__(self, listener: log.Listener) -> None:
        self.listener = listener
        self.stopped = False
        self.pulse = 0.0

    def started(self, key: int, label: str, total: int | None) -> None:
        self.pulse = time.monotonic()
        self.listener.started(key, label, total)

    def advanced(self, key: int, steps: int, note: str) -> None:
        self.pulse = time.monotonic()
        self.listener.advanced(key, steps, note)

    def finished(self, key: int) -> None:
        self.pulse = time.monotonic()
        self.listener.finished(key)

    def cancelled(self) -> bool:
        self.pulse = time.monotonic()
        return self.stopped or self.listener.cancelled()


@dataclass(eq=False)
class _Job:
    item: Any
    value: Any
    began: float = field(default_factory=time.monotonic)
    done: bool = False
    error: BaseException | None = None

    def run(self, work: Callable[[Any, Any], Any]) -> None:
        """Replace the value by the result; nothing else holds on to either."""
        given, self.value = self.value, None
        try:
            self.value = work(self.item, given)
        except BaseException as error:  # handed to the thread that owns the belt
            self.error = error
        finally:
            del given
            self.done = True


class _Slot:
    """A stage with its thread and the one item that it holds."""

    def __init__(self, stage: Stage, bell: Event) -> None:
        self.stage, self.bell = stage, bell
        self.job: _Job | None = None
        self.hire()

    def hire(self) -> None:
        """Start a thread, in the place of one that hangs."""
        self.inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self.relay = _Relay(log.current_listener())
        # A daemon: a thread that never comes back from a dead disk must not keep the process.
        self.thread = Thread(
            target=copy_context().run,
            args=(_serve, self.stage, self.inbox, self.relay, self.bell),
            name=f"medseg {self.stage.name}",
            daemon=True,
        )
        try:
            self.thread.start()
        except RuntimeError as error:
            raise ResourceError("the system gives no more threads. Close other programs.") from error

    def start(self, item: Any, value: Any = None) -> None:
        self.job = _Job(item, value)
        self.inbox.put(self.job)

    def settle(self) -> _Job | None:
        """Return the job if it has ended, well or not; give it up if it is late."""
        job = self.job
        if job is None or job.done:
            return job
        if not self.thread.is_alive():
            job.error = RuntimeError(f"the thread that should {self.stage.name} it has died")
        elif time.monotonic() - max(job.began, self.relay.pulse) > self.stage.timeout:
            job.error = self.stage.late(job.item)
            if self.stage.vital:
                raise job.error
        else:
            return None
        self.dismiss()
        self.hire()
        return job

    def dismiss(self) -> None:
        """Tell the thread to leave as soon as it can."""
        self.relay.stopped = True
        self.inbox.put(None)


class _Belt:
    def __init__(self, items: deque[Any], stages: tuple[Stage, ...], admit: Callable[[Any], bool]) -> None:
        self.items, self.admit = items, admit
        self.bell = Event()
        self.cancelled = self.stopped = False
        self.slots: list[_Slot] = []
        for stage in stages:
            self.slots.append(_Slot(stage, self.bell))

    @property
    def loaded(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.items) or self.busy

    @property
    def busy(self) -> bool:
        return any(slot.job for slot in self.slots)

    def turn(self) -> list[Outcome[Any]]:
        """Move on what is ready, from the last stage to the first, and let a new item in."""
        left = []
        following: _Slot | None = None
        for slot in reversed(self.slots):
            left += self.move(slot, following)
            following = slot
        first = self.slots[0]
        if self.items and first.job is None and (not self.busy or self.admit(self.items[0])):
            first.start(self.items.popleft())
        return left

    def move(self, slot: _Slot, following: _Slot | None) -> list[Outcome[Any]]:
        """Hand what a slot has ready to the next, or return it where it leaves the belt."""
        job = slot.settle()
        if job is None:
            return []
        if isinstance(job.error, Cancelled):
            self.cancelled = True
            return []
        if job.error is None and following is not None:
            if following.job is None:
                slot.job = None
                following.start(job.item, job.value)
            return []
        slot.job = None
        return [Outcome(job.item, job.value, job.error)]

    def finished(self) -> list[Outcome[Any]]:
        """Return the item of the last stage, if it is done."""
        job = self.slots[-1].job
        return [Outcome(job.item, job.value)] if job and job.done and job.error is None else []

    def stop(self) -> None:
        """Ask all threads to leave, and wait a moment for those at work."""
        if self.stopped:
            return
        self.stopped = True
        for slot in self.slots:
            slot.dismiss()
        deadline = time.monotonic() + STOP_SECONDS
        for slot in self.slots:
            slot.thread.join(max(0.0, deadline - time.monotonic()))


def _serve(stage: Stage, inbox: "SimpleQueue[_Job | None]", relay: _Relay, bell: Event) -> None:
    """Do one job after the other; what a thread runs."""
    with log.listening(relay):
        while (job := inbox.get()) is not None:
            job.run(stage.work)
            del job  # so that its volumes are not held until the next one comes
            bell.set()
