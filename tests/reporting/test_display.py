"""Progress of answers on stderr; the displays of stages are tested with the tracker."""

import io
import sys
from types import SimpleNamespace

import pytest

from chatllama.reporting import display
from chatllama.reporting.display import answer_progress


def test_a_log_gets_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([0.0, 1.0, 5.0, 9.0, 10.0])  # opened, then one reading a batch
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(display, "time", fake)
    with answer_progress(20, 2, shown=True) as advance:
        for _ in range(4):
            advance(3)
    assert capsys.readouterr() == ("", "8/20 answers\n14/20 answers\n")


def test_answers_that_are_shown_themselves_need_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    with answer_progress(2, 0, shown=False) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with answer_progress(7, 2, shown=True) as advance:
        advance(5)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "2/7" in shown and "7/7" in shown and "answers\n" not in shown
