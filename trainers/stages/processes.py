"""A command run to its end, signals passed on as people mean them, and no orphans left behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from types import FrameType

from chatllama.runs.interruption import EXIT_CODE

GRACE_SECONDS = 40.0
"""Time to end by themselves after a signal; the launcher gives its ranks 30 s."""


def run_to_end(
    command: list[str], environment: Mapping[str, str], ask_to_stop: Callable[[], bool]
) -> int:
    """Exit code of the command, whose output passes straight through; 128 + N if signal N ended it.

    On SIGINT, SIGTERM, SIGUSR1 or SIGHUP the command is asked to stop by itself; once asked, only
    SIGINT cuts the wait short. A command that cannot be asked, or will not wait, gets SIGTERM in
    all its processes (which, unlike SIGINT, prints no traceback per rank), time to end, and is then
    killed. None outlives this call.

    Args:
        command: what to run.
        environment: its environment.
        ask_to_stop: tells the command to save and end; False if it cannot be told now.

    Raises:
        KeyboardInterrupt: SIGINT came, and the command did not end by itself with code 75.
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
        process = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, preexec_fn=_ignore_sigusr1
        )
        try:
            _wait(process, received, ask_to_stop)
        finally:
            _end_group(process, ask_first=bool(received))
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
    """Schedulers send it to every process of a job; only the ranks, later, know what to do."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _wait(process: subprocess.Popen, received: list[int], ask_to_stop: Callable[[], bool]) -> None:
    """Returns when the command has ended, or must be ended."""
    asked_after = 0
    # The launcher may be ended by the same signal; its ranks then save without it.
    while process.poll() is None or (asked_after and _living(process.pid)):
        if asked_after and signal.SIGINT in received[asked_after:]:
            return
        if received and not asked_after:
            if not ask_to_stop():
                return
            asked_after = len(received)
        time.sleep(0.1 if process.poll() is None else 0.5)


def _end_group(process: subprocess.Popen, ask_first: bool) -> None:
    """Ends whatever is left of the command's process group."""
    group = process.pid  # start_new_session made it the leader
    if ask_first:
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
    """Whether a process of the group still runs (zombies, which wait for init, do not count)."""
    import psutil

    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError):
            continue
    return False
