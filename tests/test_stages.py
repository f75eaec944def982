"""A belt overlaps its stages, holds one item in each, and can neither hang nor lose an item."""

import threading
import time
from contextlib import closing

import pytest

from medseg import log, stages
from medseg.errors import Cancelled, ReadError, ResourceError
from medseg.stages import Stage, convey


def late(item):
    return ReadError(f"{item}: too late")


def stage(name, work, timeout=30.0, vital=False):
    return Stage(name, work, timeout, late, vital)


def run(items, *line, admit=lambda item: True):
    with closing(convey(items, line, admit)) as belt:
        return list(belt)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("medseg ")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_items_pass_all_stages_in_their_order():
    outcomes = run(
        range(20),
        stage("double", lambda item, _: 2 * item),
        stage("add", lambda item, value: (item, value + 1)),
    )
    assert [(o.item, o.value, o.error) for o in outcomes] == [(n, (n, 2 * n + 1), None) for n in range(20)]


def test_nothing_to_do_is_done_at_once():
    assert run([], stage("never", lambda item, _: item)) == []


def test_stages_work_at_the_same_time_on_one_item_each():
    met, held, most = threading.Barrier(3, timeout=10), set(), []

    def work(place):
        def meet(item, _):
            held.add(item)
            most.append(len(held))
            if item == 2 - place:  # the third item enters while the first leaves
                met.wait()
            if place == 2:
                held.remove(item)

        return meet

    outcomes = run(range(6), *(stage(str(place), work(place)) for place in range(3)))
    assert [o.error for o in outcomes] == [None] * 6
    assert max(most) == 3


def test_an_item_that_fails_leaves_the_belt_and_the_others_go_on():
    def work(item, _):
        if item == 1:
            raise ValueError("odd")
        return item

    outcomes = run(range(3), stage("a", work), stage("b", lambda item, value: value))
    assert {o.item: o.value for o in outcomes if o.error is None} == {0: 0, 2: 2}
    assert [(o.item, str(o.error)) for o in outcomes if o.error] == [(1, "odd")]


@pytest.mark.parametrize("where", [0, 1])
def test_a_stage_that_hangs_is_given_up_and_another_thread_takes_over(where):
    release = threading.Event()

    def hang(item, _):
        if item == 1:
            release.wait(20)
        return item

    line = [stage("a", lambda item, _: item), stage("b", lambda item, _: item)]
    line[where] = stage("hang", hang, timeout=0.3)
    began = time.monotonic()
    outcomes = run(range(3), *line)
    release.set()
    assert {o.item: o.error and str(o.error) for o in outcomes} == {0: None, 1: "1: too late", 2: None}
    assert time.monotonic() - began < 5


def test_a_vital_stage_that_hangs_ends_the_belt():
    release = threading.Event()
    with pytest.raises(ReadError, match="0: too late"):
        run(range(3), stage("hang", lambda item, _: release.wait(20), timeout=0.3, vital=True))
    release.set()


def test_progress_is_a_sign_of_life():
    def slow(item, _):
        with log.task("slow") as task:
            for _ in range(8):
                time.sleep(0.1)
                task.advance()
        return item

    assert run([1], stage("slow", slow, timeout=0.5))[0].value == 1


def test_a_thread_that_ends_itself_is_an_error_of_its_item():
    def leave(item, _):
        raise SystemExit(3)

    assert isinstance(run([1], stage("leave", leave))[0].error, SystemExit)


def test_an_item_waits_until_it_is_admitted_or_the_belt_is_empty():
    under_way, most = [0], [0]

    def enter(item, _):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        return item

    def leave(item, _):
        time.sleep(0.02)
        under_way[0] -= 1
        return item

    outcomes = run(range(5), stage("a", enter), stage("b", leave), admit=lambda item: False)
    assert [o.item for o in outcomes] == list(range(5)) and most[0] == 1


class Stop(log.Listener):
    def __init__(self):
        self.wanted = False

    def cancelled(self):
        return self.wanted


def test_a_request_to_stop_is_heard_though_a_stage_does_not_listen():
    release, listener = threading.Event(), Stop()
    threading.Timer(0.3, lambda: setattr(listener, "wanted", True)).start()
    began = time.monotonic()
    with log.listening(listener), pytest.raises(Cancelled):
        run(range(3), stage("deaf", lambda item, _: release.wait(20)))
    assert time.monotonic() - began < 0.3 + stages.STOP_SECONDS + 0.5
    release.set()


def test_what_is_finished_while_stopping_is_not_lost():
    listener = Stop()

    def write(item, _):
        listener.wanted = True
        time.sleep(0.3)
        return item

    seen = []
    with (
        log.listening(listener),
        pytest.raises(Cancelled),
        closing(convey(range(3), (stage("w", write),))) as belt,
    ):
        for outcome in belt:
            seen.append(outcome.item)
    assert seen == [0]


def test_a_stage_that_listens_stops_by_itself():
    listener, stopped = Stop(), threading.Event()

    def tiles(item, _):
        listener.wanted = True
        try:
            for _ in log.progress(range(1000), "tiles"):
                time.sleep(0.01)
        except Cancelled:
            stopped.set()
            raise

    with log.listening(listener), pytest.raises(Cancelled):
        run(range(3), stage("tiles", tiles))
    assert stopped.is_set()


def test_closing_the_belt_stops_its_threads():
    stopped = threading.Event()

    def tiles(item, _):
        if item == 1:
            try:
                for _ in log.progress(range(1000), "tiles"):
                    time.sleep(0.01)
            finally:
                stopped.set()
        return item

    with pytest.raises(RuntimeError, match="disk"), closing(convey(range(3), (stage("t", tiles),))) as belt:
        for _ in belt:
            raise RuntimeError("disk")
    assert stopped.wait(5)


def test_a_system_without_threads_is_said(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="no more threads"):
        run([1], stage("a", lambda item, _: item))
