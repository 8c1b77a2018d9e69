"""Signals at a stage: it saves after the running step and exits with code 75, or 130 after Ctrl-C.

Schedulers send SIGTERM or SIGUSR1 before a time limit or a preemption, a terminal SIGINT (Ctrl-C;
a second one ends the stage at once) or, when it goes away, SIGHUP. Outside the training steps
(start, closing evaluation) there is nothing to save, and the process ends at once. Signal handlers
belong to the process, so the state is module-level here; `listen` resets it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.files import write_json
from chatllama.runtime.lent_terminal import is_lent

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
CTRL_C_CODE = 130
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Sent to every process of a terminal's job at once; `nohup` and `&` may have them ignored."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, *FROM_TERMINAL)


class Interrupted(BaseException):
    """A signal stopped the stage. Not an Exception, so that no library handles it as an error."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = CTRL_C_CODE if signum == signal.SIGINT else EXIT_CODE


class _Signals:
    """The signal received, and whether a training step is running."""

    def __init__(self) -> None:
        self.listener: int | None = None
        self.received: int | None = None
        self.in_steps = False
        self.ending = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Records the signal; outside the steps raises Interrupted."""
        if os.getpid() != self.listener:  # a worker process that inherited the handler
            if signum in FROM_TERMINAL:
                return  # the stage gets it too, and ends its workers
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self.ending:  # launchers send signals repeatedly
            return
        again = signum == signal.SIGINT and self.received is not None
        if self.in_steps and self.received is None:
            name = signal.Signals(signum).name
            if signum not in FROM_TERMINAL or os.environ.get("RANK", "0") == "0":
                _tell(f"{name}: saving after this step, then ending\n")
        self.received = self.received or signum  # launchers send SIGTERM after a SIGINT
        if again:
            self.ending = True
            raise Interrupted("ended by a second SIGINT: go on with --resume", signum)
        if not self.in_steps:
            self.raise_outside_steps()

    def raise_outside_steps(self) -> NoReturn:
        """Ends the process where no step is running."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        self.ending = True
        raise Interrupted(f"ended by {name} between steps: go on with --resume", self.received)


def _tell(text: str) -> None:
    """Writes at once: `print` may be interrupted in the middle of a line of its own."""
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        os.write(2 if is_lent() else sys.stderr.fileno(), text.encode())


_signals = _Signals()


def listen() -> None:
    """Installs the handlers and forgets earlier signals; main thread only."""
    _signals.listener = os.getpid()
    _signals.received, _signals.in_steps, _signals.ending = None, False, False
    for signum in SIGNALS:
        if signum not in FROM_TERMINAL or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _signals.handle)


def restore_default_handlers() -> None:
    """Restores the default signal handlers, which end this process at once."""
    for signum in SIGNALS:
        if signal.getsignal(signum) == _signals.handle:
            signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Makes signals wait for `stop_requested` inside; raises Interrupted where one still waits."""
    _signals.in_steps = True
    try:
        yield
    finally:
        _signals.in_steps = False
    if _signals.received is not None:
        _signals.raise_outside_steps()


def stop_requested() -> bool:
    """True on all ranks once any has received a signal; every rank must call, after each step."""
    from chatllama.runtime.distributed import all_any

    return all_any(_signals.received is not None)


def stop(run: RunFolder, stage: Stage, step: int) -> NoReturn:
    """Ends a stage whose checkpoint of `step` is written; every rank must call.

    `chatllama run` reads RUN/<stage>/interrupted.json, since launchers change the exit code.

    Raises:
        Interrupted: always.
    """
    from chatllama.runtime.distributed import all_gather_objects, barrier, rank

    received = next(each for each in all_gather_objects(_signals.received) if each is not None)
    name = signal.Signals(received).name
    if rank() == 0:
        write_json(run.interrupted(stage), {"step": step, "signal": name})
    barrier()
    _signals.ending = True
    message = f"{name}: stage {stage} is saved at step {step}; go on with --resume"
    raise Interrupted(message, received)
