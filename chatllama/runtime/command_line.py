"""Shared by the commands: their parsers, lines on stderr, text that is safe on a terminal."""

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from chatllama.runtime.waiting import above_the_line

SYNONYMS = {"train": "run", "start": "run", "list": "runs", "ls": "runs", "info": "env"}
"""Other tools' words for commands."""


class Parser(argparse.ArgumentParser):
    """Answers a misspelt command or choice with the nearest ones, and never abbreviates."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        match = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if match is not None:
            known = re.findall(r"[\w.-]+", match[2])
            near = (
                [SYNONYMS[match[1]]]
                if SYNONYMS.get(match[1]) in known
                else (difflib.get_close_matches(match[1], known))
            )
            message += f"\ndid you mean {' or '.join(near)}?" if near else ""
        super().error(message)


Command = Callable[[argparse.Namespace], None]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with control characters replaced, so that model output cannot steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def duration(seconds: float) -> str:
    """Time for people: `9 s`, `2 min 05 s`, `3 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def add_command(
    commands: "argparse._SubParsersAction[Any]", name: str, command: Command, help: str
) -> argparse.ArgumentParser:
    """The parser of one subcommand, with --debug."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.set_defaults(command=command, rest=None)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the config file and the settings that replace those in it."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    about = "settings that replace those of the file"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=about)
    parser.set_defaults(rest="overrides")


class _ShownOnly:
    """A text stream that drops what it cannot write: the pipe is closed, the terminal has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with above_the_line(text):
            self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError):  # what is buffered would fail again at exit, with code 120
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def shown_only(*names: str) -> Iterator[None]:
    """Keeps a failure of stdout or stderr from ending the work, for those that are only shown.

    Characters that a stream cannot encode are escaped in both.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if name in names:
            usable = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, _ShownOnly(usable))
    try:
        yield
    finally:
        for name in names:
            if isinstance(shown := getattr(sys, name), _ShownOnly):
                shown.flush()
                setattr(sys, name, before[name])


def tell(text: str) -> None:
    """Prints a line of progress on stderr."""
    print(printable(text), file=sys.stderr, flush=True)
