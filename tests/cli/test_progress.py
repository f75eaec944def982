import logging
import threading

import pytest

from medseg import log
from medseg.cli import progress
from medseg.errors import Cancelled


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_work_is_silent_and_long_work_says_what_is_left(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    listener = progress.TerminalListener()
    with log.listening(listener), log.task("Work", 100) as task:
        clock[0] = 1.0
        task.advance(10)
        assert capsys.readouterr().err == ""
        clock[0] = 30.0
        task.advance(15, "halfway there")
    captured = capsys.readouterr()
    assert captured.err.strip() == "Work: 25 %, 1:30 left  halfway there"
    assert captured.out == ""


def test_the_first_interrupt_asks_and_the_work_stops_at_its_next_step() -> None:
    listener = progress.TerminalListener()
    with log.listening(listener), log.task("Work") as task:
        task.advance()
        listener.interrupted = True
        task.advance(check=False)  # who works with other processes asks by itself
        assert log.is_cancelled()
        with pytest.raises(Cancelled):
            task.advance()


def test_the_bar_fits_eighty_columns(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    listener = progress.TerminalListener()
    listener.console = Console(file=StringIO(), force_terminal=True, width=80, color_system=None)
    with log.listening(listener), log.task("Training fold 0", 100) as task:
        clock[0] = 60.0
        task.advance(50, "loss 0.85  Dice " + " ".join(f"label_{n} 0.5" for n in range(20)))
        line = next(iter(listener.console.render_lines(listener.bar.get_renderable())))
        text = "".join(segment.text for segment in line)
    assert len(text) <= 80 and "Training fold 0" in text and "50%" in text and "loss 0.85" in text


def test_a_line_tells_of_all_that_is_under_way(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    listener = progress.TerminalListener()
    with log.listening(listener), log.task("Predict", 3) as cases:
        cases.advance(0, "ann")
        with log.task("Predict tiles", 100) as tiles:
            clock[0] = 1.0
            tiles.advance()
            clock[0] = 30.0
            tiles.advance(24)
            clock[0] = 31.0
            tiles.advance(75)
    assert capsys.readouterr().err == "Predict: 0 of 3  ann | Predict tiles: 25 %, 1:30 left\n"


def test_one_case_is_not_counted(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    listener = progress.TerminalListener()
    with log.listening(listener), log.task("Predict", 1) as cases:
        clock[0] = 30.0
        cases.advance(0, "ann")
        cases.advance()
    assert capsys.readouterr().err == ""


def test_messages_do_not_tear_the_bar(clock: list[float]) -> None:
    from io import StringIO

    from rich.console import Console

    listener = progress.TerminalListener()
    screen = StringIO()
    listener.console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    logger = logging.Logger("test")
    logger.addHandler(progress.MessageHandler(listener))
    with log.listening(listener), log.task("Predict", 100) as task:
        clock[0] = 60.0
        task.advance(50)
        logger.warning("[ann] %s", "is " + "long " * 30)
        assert listener.bar is not None
    assert listener.bar is None
    assert "[ann] is " + "long " * 29 + "long" in screen.getvalue()


def test_threads_may_report_at_the_same_time() -> None:
    listener = progress.TerminalListener()

    def work() -> None:
        with log.listening(listener):
            for _ in range(200):
                with log.task("Work", 1) as task:
                    task.advance()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not listener.tasks
