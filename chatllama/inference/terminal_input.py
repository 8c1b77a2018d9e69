"""The messages that a user types: one a line, or several lines as one message."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

QUOTES = '"""'
PROMPT, MORE = "you> ", "...> "
BOLD, DIM, CYAN, GREEN = "1", "2", "1;36", "1;32"
"""Styles of `coloured`: parameters of the terminal's SGR sequence."""


def coloured(text: str, style: str) -> str:
    """`text` in a style where stdout is a terminal with colours; https://no-color.org holds."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\x1b[{style}m{text}\x1b[0m"


def read_messages() -> Iterator[str]:
    """Messages from the terminal, with editing and history of lines, or from a pipe.

    With GNU readline a pasted text of several lines is one message, sent by Enter.
    """
    if not sys.stdin.isatty():
        yield from join_lines(lambda prompt: next(sys.stdin, None))
        return
    with contextlib.suppress(ImportError):
        import readline  # gives `input` editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")  # off before 8.1
    yield from join_lines(_ask)


def join_lines(read: Callable[[str], str | None]) -> Iterator[str]:
    r"""Messages out of lines: from \"\"\" to \"\"\", or as long as lines end with a backslash.

    Ctrl-C drops what has been typed of a message. `read` is called with a prompt and returns the
    next line, None at the end.
    """
    while True:
        try:
            message = _read_message(read)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        if message is None:
            return
        yield message


def _read_message(read: Callable[[str], str | None]) -> str | None:
    line = read(PROMPT)
    if line is None:
        return None
    lines = [line.rstrip("\r\n")]
    quoted = lines[0].lstrip().startswith(QUOTES)
    if quoted:
        lines = [lines[0].lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES) if quoted else lines[-1].endswith("\\"):
        if not quoted:
            lines[-1] = lines[-1][:-1]
        more = read(MORE)
        if more is None:  # the input ends within the message
            return "\n".join(lines)
        lines.append(more.rstrip("\r\n"))
    if quoted:
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    text = "\n".join(lines)
    return text.strip("\n") if quoted else text


def _ask(prompt: str) -> str | None:
    # Between \x01 and \x02 is what readline must not count as width.
    shown = re.sub(r"(\x1b\[[\d;]*m)", "\x01\\1\x02", coloured(prompt, CYAN))
    try:
        return input(shown)
    except EOFError:
        print()
        return None
