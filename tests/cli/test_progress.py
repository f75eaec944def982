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
