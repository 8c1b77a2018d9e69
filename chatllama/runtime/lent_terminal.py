"""Two places for the output of a stage: the terminal for ours, a log file for everybody else's.

The launcher passes nothing but its standard streams on to the ranks, and what it says itself goes
there, too. So these are the log file, and a rank asks `chatllama run` for the terminal over a
socket. Started by hand, a rank divides the streams that it has.
"""

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VARIABLE = "CHATLLAMA_TERMINAL"
"""Path of the socket."""
STREAMS = {"stdout": 1, "stderr": 2}


class Lender:
    """Gives this process's stdout and stderr to each process that connects."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.was_asked = False
        """Whether any process has taken the terminal."""
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)

    def serve(self) -> bool:
        """Answers those that wait; whether somebody has the terminal."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                self.was_asked = True
                self._connections.append(connection)
                with _descriptors() as given, contextlib.suppress(OSError):
                    socket.send_fds(connection, [b"."], given)
                connection.setblocking(False)
        self._connections = [each for each in self._connections if not _has_ended(each)]
        return bool(self._connections)

    def close(self) -> None:
        """Ends the listening."""
        for each in (self._listener, *self._connections):
            each.close()


@contextmanager
def lender() -> Iterator[Lender]:
    """A `Lender` whose socket only this user can reach."""
    with TemporaryDirectory(prefix="chatllama-") as folder:
        made = Lender(str(Path(folder) / "terminal"))
        try:
            yield made
        finally:
            made.close()


class _Own:
    """What this process has done with its streams."""

    connection: socket.socket | None = None
    divided = False


_own = _Own()


def take_terminal() -> None:
    """Makes sys.stdout and sys.stderr the terminal; 1 and 2 stay for libraries and their children.

    Where somebody has put other streams in their place, as tests do, all stays as it is.
    """
    path = os.environ.pop(VARIABLE, None)
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return
    if path is None or not _borrow(path):
        for name, number in STREAMS.items():
            with contextlib.suppress(OSError):  # closed, as in `>&-`
                _replace(name, os.dup(number))
    _own.divided = True


def is_lent() -> bool:
    """Whether `chatllama run` has lent its terminal."""
    return _own.connection is not None


def give_back() -> None:
    """Tells `chatllama run` that this process prints nothing more."""
    if _own.connection is not None:
        _own.connection.close()


def log_apart(log: Path | None) -> None:
    """Sends what libraries write from now on to the log; a no-op without `take_terminal`.

    Args:
        log: None, or if `chatllama run` has opened one: to where descriptor 2 leads.
    """
    if not _own.divided:
        return
    if log is not None and not is_lent():
        log.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in STREAMS.values():
            os.dup2(opened, number)
        os.close(opened)
    logging.lastResort = logging.StreamHandler(sys.__stderr__)
    logging.lastResort.setLevel(logging.WARNING)
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in (each for each in known if isinstance(each, logging.Logger)):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.__stderr__)
    warnings.showwarning = _show_warning


def _show_warning(message: Any, category: Any, file_name: str, line: int, *_: Any) -> None:
    if sys.__stderr__ is not None:
        sys.__stderr__.write(warnings.formatwarning(message, category, file_name, line))
        sys.__stderr__.flush()


def _borrow(path: str) -> bool:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        descriptors = socket.recv_fds(connection, 1, len(STREAMS))[1]
    except OSError:  # whoever lent it has ended
        return False
    for name, descriptor in zip(STREAMS, descriptors, strict=False):
        _replace(name, descriptor)
    _own.connection = connection
    return True


def _replace(name: str, descriptor: int) -> None:
    encoding = sys.__stdout__.encoding if sys.__stdout__ is not None else "utf-8"
    stream = os.fdopen(descriptor, "w", buffering=1, encoding=encoding, errors="backslashreplace")
    setattr(sys, name, stream)


@contextmanager
def _descriptors() -> Iterator[list[int]]:
    """The terminal's, or of nothing where this process has none."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        yield [number if _is_open(number) else nowhere for number in STREAMS.values()]
    finally:
        os.close(nowhere)


def _is_open(number: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(number)
        return True
    return False


def _has_ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
