"""Progress reaches the listener of its thread, and a listener can stop the work."""

from collections.abc import Iterator

import pytest

from medseg.errors import Cancelled
from medseg.log import Listener, check_cancelled, listening, progress, task


class Recorder(Listener):
    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[tuple[object, ...]] = []
        self.stop_after = stop_after

    def started(self, key: int, label: str, total: int | None) -> None:
        self.events.append(("started", label, total))

    def advanced(self, key: int, steps: int, note: str) -> None:
        self.events.append(("advanced", steps, note))

    def finished(self, key: int) -> None:
        self.events.append(("finished",))

    def cancelled(self) -> bool:
        steps = sum(event[0] == "advanced" for event in self.events)
        return self.stop_after is not None and steps >= self.stop_after


def test_a_loop_reports_its_length_and_every_step() -> None:
    recorder = Recorder()
    with listening(recorder):
        assert list(progress([1, 2], "count")) == [1, 2]
    assert recorder.events == [("started", "count", 2), *[("advanced", 1, "")] * 2, ("finished",)]


def test_a_generator_has_no_length_and_a_note_is_passed_on() -> None:
    def items() -> Iterator[int]:
        yield 1

    recorder = Recorder()
    with listening(recorder):
        assert list(progress(items(), "count")) == [1]
        with task("by hand", 5) as running:
            running.advance(3, "half")
    assert ("started", "count", None) in recorder.events
    assert recorder.events[-2:] == [("advanced", 3, "half"), ("finished",)]


def test_a_task_ends_for_its_listener_when_the_block_fails() -> None:
    recorder = Recorder()
    with listening(recorder), pytest.raises(RuntimeError), task("broken"):
        raise RuntimeError
    assert recorder.events[-1] == ("finished",)


def test_a_listener_stops_the_work_at_the_next_step() -> None:
    done = []
    with listening(Recorder(stop_after=2)), pytest.raises(Cancelled):
        for item in progress(range(9), "count"):
            done.append(item)
    assert done == [0, 1]


def test_listeners_nest_and_leave_with_their_block() -> None:
    outer, inner = Recorder(stop_after=0), Recorder()
    with listening(outer):
        with listening(inner):
            list(progress([1], "inside"))
        with pytest.raises(Cancelled):
            check_cancelled()
    check_cancelled()
    assert not outer.events and inner.events
