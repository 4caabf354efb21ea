"""What is seen of long work, on a terminal and in a log."""

import io
import sys

import pytest

from rag_jax import progress
from rag_jax.progress import Counter, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """The clock: (seconds,)."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_counter_without_a_terminal_is_a_line_now_and_then(now, capsys):
    with Counter("passages", 3000, done=1000) as counter:
        for _ in range(20):
            now[0] += 8
            counter.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "passages: 1,300 of 3,000, 2:16 left",
        "passages: 1,600 of 3,000, 1:52 left",
        "passages: 1,900 of 3,000, 1:28 left",
        "passages: 2,200 of 3,000, 1:04 left",
        "passages: 2,500 of 3,000, 0:40 left",
        "passages: 2,800 of 3,000, 0:16 left",
    ]


def test_what_is_soon_done_is_not_worth_a_line(now, capsys):
    for num in (0, 1, 5):
        with Counter("passages", num) as counter:
            for _ in range(num):
                now[0] += 3
                counter.update(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_processes_are_silent(now, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with Counter("passages", 3, active=False) as counter:
        for _ in range(3):
            now[0] += 60
            counter.update(1)
    assert sys.stderr.getvalue() == "" and counter.done == 3


def test_a_counter_on_a_terminal_is_a_bar_that_leaves_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Counter("passages", 40, done=10) as counter:
        counter.update(30)
    text = sys.stderr.getvalue()
    assert "passages:  25%" in text and "10/40" in text and "\n" not in text
    assert text.endswith("\r") and not text.split("\r")[-2].strip()


def test_a_run_without_a_terminal_is_a_few_plain_lines(now, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run = Progress(total_steps=200, start_step=50)
    for step in range(51, 201):
        now[0] += 0.5
        run.update(step, 2.0)
    run.close()
    text = sys.stderr.getvalue()
    assert "\r" not in text
    assert text.splitlines() == [
        "step 51/200  loss 2.0000  0.50 s a step  1:14 left",
        "step 91/200  loss 2.0000  0.50 s a step  0:54 left",
        "step 131/200  loss 2.0000  0.50 s a step  0:34 left",
        "step 171/200  loss 2.0000  0.50 s a step  0:14 left",
        "step 200/200  loss 2.0000  0.50 s a step  0:00 left",
    ]


def test_a_run_on_a_terminal_is_a_bar_with_loss_and_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run = Progress(total_steps=4)
    run.update(2, 1.25)
    run.print("evaluated")
    run.update(4, 1.0)
    run.close()
    text = sys.stderr.getvalue()
    assert "4/4" in text and "loss 1.0000" in text and "evaluated\n" in text


def test_durations_read_as_clocks():
    assert [progress.clock(s) for s in (0.0, 59.6, 125.0, 3723.0)] == ["0:00", "1:00", "2:05", "1:02:03"]
