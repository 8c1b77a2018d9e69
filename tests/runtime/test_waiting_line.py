"""The line that says what is being done."""

import contextlib
import io
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from chatllama.runtime import waiting
from chatllama.runtime.command_line import shown_only
from chatllama.runtime.waiting import doing, hide_line, now_doing


class Terminal:
    """A terminal, and all that was written on it."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.stream = open(slave, "w", buffering=1)  # noqa: SIM115
        self.seen = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while data := os.read(self.master, 4096):
                self.seen += data.decode()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with contextlib.redirect_stdout(self.stream), contextlib.redirect_stderr(self.stream):
            yield

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while text not in self.seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert text in self.seen, self.seen


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    monkeypatch.setattr(waiting, "QUIET_SECONDS", 0.05)
    yield made
    made.stream.close()


def test_the_line_counts_seconds_and_goes(terminal: Terminal) -> None:
    with terminal.used(), doing("loading libraries"):
        terminal.wait_for("\r\x1b[2Kloading libraries ...")
        now_doing("reading")
        terminal.wait_for("reading ... 1 s")
        with doing("reading more"):
            terminal.wait_for("\x1b[2Kreading more ...")
        terminal.seen = ""
        terminal.wait_for("\x1b[2Kreading ...")
    print("done", file=terminal.stream)
    terminal.wait_for("\x1b[2Kdone\r\n")


def test_what_is_printed_stands_above_it_and_half_a_line_is_left_alone(terminal: Terminal) -> None:
    with terminal.used(), shown_only("stdout", "stderr"), doing("loading"):
        print("a fact")
        terminal.wait_for("\x1b[2Ka fact\r\n")
        terminal.wait_for("fact\r\n\r\x1b[2Kloading")
        print("half \x1b[?25h", end="", flush=True)
        terminal.wait_for("half \x1b[?25h")
        terminal.seen = ""
        time.sleep(0.2)
        assert not terminal.seen
        print(" a line\x1b[0m")
        terminal.wait_for("\x1b[2Kloading")


def test_another_process_may_have_the_terminal(terminal: Terminal) -> None:
    with terminal.used(), doing("starting"):
        terminal.wait_for("starting")
        hide_line(True)
        now_doing("ending")
        time.sleep(0.2)
        assert terminal.seen.endswith("\x1b[2K") and "ending" not in terminal.seen
        hide_line(False)
        terminal.wait_for("ending")


def test_nothing_is_shown_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with doing("loading"):
        now_doing("more")
    assert stream.getvalue() == ""
