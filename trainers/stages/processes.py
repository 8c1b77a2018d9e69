"""Runs a command to its end: signals stop it gracefully, and none of its processes is left."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from chatllama.runs.interruption import EXIT_CODE
from chatllama.runtime.lent_terminal import VARIABLE, Lender, lender
from chatllama.runtime.waiting import hide_line, now_doing

GRACE_SECONDS = 40.0
"""Time for processes to end after a signal; the launcher gives its ranks 30 s."""


def run_to_end(
    command: list[str],
    environment: Mapping[str, str],
    request_stop: Callable[[], bool],
    log: Path | None = None,
) -> int:
    """Exit code of the command; 128 + N after signal N.

    SIGINT, SIGTERM, SIGUSR1 or SIGHUP calls `request_stop`; after it only SIGINT ends the wait for
    the command. If that returns False, or after that SIGINT, all of the command's processes get
    SIGTERM (which, unlike SIGINT, prints no traceback per rank), time to end, and SIGKILL.

    Args:
        request_stop: makes the command save and end; False if that is impossible now.
        log: gets the command's output, except what those of its processes write that ask for the
            terminal. None: the output passes straight through.

    Raises:
        KeyboardInterrupt: SIGINT came, and the command did not end with code 75.
        SystemExit: with 128 + N, the same for the other signals.
    """
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays in force
        watched.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, note) for signum in watched}
    try:
        with ExitStack() as stack:
            lent: Lender | None = None
            output: dict[str, Any] = {}
            if log is not None:
                lent = stack.enter_context(lender())
                opened = stack.enter_context(log.open("ab"))
                output = {"stdout": opened, "stderr": opened}
                environment = {**environment, VARIABLE: lent.path}
            process = subprocess.Popen(
                command,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=_ignore_sigusr1,
                **output,
            )
            try:
                _wait(process, received, request_stop, lent)
            finally:
                hide_line(False)
                _end_group(process, terminate_first=bool(received))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    code = process.wait()
    if received and code != EXIT_CODE:
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received[0])
    return code if code >= 0 else 128 - code


def _ignore_sigusr1() -> None:
    """Schedulers send it to every process of a job; only the ranks handle it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _wait(
    process: subprocess.Popen,
    received: list[int],
    request_stop: Callable[[], bool],
    lent: Lender | None,
) -> None:
    """Returns when the command has ended or must be ended."""
    requested_after, hidden = 0, False
    # The launcher may be ended by the same signal; its ranks then save without it.
    while process.poll() is None or (requested_after and _living(process.pid)):
        if lent is not None and lent.serve() != hidden:
            hidden = not hidden
            hide_line(hidden)
            now_doing("ending the processes")
        if requested_after and signal.SIGINT in received[requested_after:]:
            return
        if received and not requested_after:
            if not request_stop():
                return
            requested_after = len(received)
        time.sleep(0.1 if process.poll() is None else 0.5)


def _end_group(process: subprocess.Popen, terminate_first: bool) -> None:
    """Ends the rest of the command's process group."""
    group = process.pid  # start_new_session made it the leader
    if terminate_first:
        _signal_group(group, signal.SIGTERM)
        _wait_for_group(process, GRACE_SECONDS)
    if _living(group):
        _signal_group(group, signal.SIGKILL)
        _wait_for_group(process, GRACE_SECONDS)
    process.wait()


def _wait_for_group(process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _living(process.pid) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _living(group: int) -> bool:
    """Whether a process of the group still runs; zombies, which wait for init, do not count."""
    import psutil

    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError):
            continue
    return False
