"""A line at the bottom of the terminal that says what is being done while nothing is printed."""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
QUIET_SECONDS = 1.0
"""Without output before the line is drawn again below it."""


class _Line:
    """What the line says, and whether it stands there. One terminal, so one line."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.is_hidden = False
        self._began = self._written = 0.0
        self._is_drawn, self._at_start = False, True

    def say(self, text: str, at_once: bool = True) -> None:
        """Shows another text, with seconds from now."""
        self.text, self._began = text, time.monotonic()
        if at_once:
            self.draw()

    def draw(self) -> None:
        """Draws the line, unless it would stand in the middle of another or is hidden."""
        if self.text is None or self.is_hidden or not self._at_start:
            return
        seconds = int(time.monotonic() - self._began)
        shown = f"{self.text} ...{f' {seconds} s' if seconds else ''}"
        self._is_drawn = True
        _write(f"\r\x1b[2K{shown[: shutil.get_terminal_size().columns - 1]}")

    def clear(self) -> None:
        """Takes the line away."""
        if self._is_drawn:
            self._is_drawn = False
            _write("\r\x1b[2K")

    def note(self, text: str) -> None:
        """Output has been written."""
        self._written = time.monotonic()
        if seen := _CONTROL.sub("", text):
            self._at_start = seen.endswith("\n")

    def keep_drawn(self, ended: threading.Event) -> None:
        """Draws the line again and again, for a thread."""
        while not ended.wait(QUIET_SECONDS):
            if time.monotonic() - self._written >= QUIET_SECONDS:
                self.draw()


_line = _Line()


@contextmanager
def doing(text: str, at_once: bool = True) -> Iterator[None]:
    """Shows `text` and the seconds since, on stderr at a terminal; nothing elsewhere.

    Nothing of it stays. What is printed inside stands above it, where `shown_only` has wrapped the
    streams.

    Args:
        at_once: False: after a second without output.
    """
    if (before := _line.text) is not None:
        _line.say(text)
        yield
        _line.say(before)
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    _line.say(text, at_once)
    threading.Thread(target=_line.keep_drawn, args=(ended,), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _line.text = None
        _line.clear()


def now_doing(text: str) -> None:
    """Says something else inside `doing`; without effect outside."""
    if _line.text is not None:
        _line.say(text)


def hide_line(hidden: bool) -> None:
    """Takes the line away while another process writes on the terminal."""
    if hidden != _line.is_hidden:
        _line.is_hidden = hidden
        if hidden:
            _line.clear()
        elif _line.text is not None:
            _line.say(_line.text)


@contextmanager
def above_the_line(text: str) -> Iterator[None]:
    """Makes room for output that is written inside."""
    _line.clear()
    yield
    _line.note(text)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))
