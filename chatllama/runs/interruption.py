"""SIGTERM and SIGUSR1 at a stage: it saves after the step that runs and ends with exit code 75.

Schedulers send them before a time limit or a preemption. Where no steps are made (start, closing
evaluation) there is nothing to save, and the process ends at once. Signals belong to the process,
so what has come is kept in this module.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.files import write_json

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """The stage was told to stop. Not an Exception, so that no library takes it for an error."""


class _Signals:
    """What has come, and whether steps are being made."""

    def __init__(self) -> None:
        self.listener: int | None = None
        self.received: int | None = None
        self.in_steps = False
        self.ending = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Notes the signal; outside of steps ends the process by an exception."""
        if os.getpid() != self.listener:  # a worker process that inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self.ending:  # launchers repeat themselves
            return
        if self.in_steps:
            if self.received is None:
                name = signal.Signals(signum).name
                os.write(2, f"{name}: saving after this step, then ending\n".encode())
            self.received = signum
            return
        self.received = signum
        self.raise_outside_steps()

    def raise_outside_steps(self) -> NoReturn:
        """Ends what is no step."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        self.ending = True
        raise Interrupted(f"ended by {name} between steps: go on with --resume")


_signals = _Signals()


def listen() -> None:
    """From now on the signals are ours; main thread only."""
    _signals.listener = os.getpid()
    _signals.received, _signals.in_steps, _signals.ending = None, False, False
    for signum in SIGNALS:
        signal.signal(signum, _signals.handle)


def be_deaf() -> None:
    """From now on the signals end this process at once: its job has failed."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Signals that come inside wait for `stop_requested`."""
    begin_steps()
    try:
        yield
    finally:
        _signals.in_steps = False
    end_steps()


def begin_steps() -> None:
    """Signals wait for `stop_requested` from now on."""
    _signals.in_steps = True


def end_steps() -> None:
    """Signals end the process at once from now on.

    Raises:
        Interrupted: one came after the last step was asked about.
    """
    _signals.in_steps = False
    if _signals.received is not None:
        _signals.raise_outside_steps()


def stop_requested() -> bool:
    """True on all ranks once a signal has come to any; every rank must call, after each step."""
    from chatllama.runtime.distributed import all_any

    return all_any(_signals.received is not None)


def stop(run: RunFolder, stage: Stage, step: int) -> NoReturn:
    """Ends a stage whose checkpoint of `step` is written; every rank must call.

    RUN/<stage>/interrupted.json says so to `chatllama run`, whatever the launcher's exit code.

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
    raise Interrupted(f"{name}: stage {stage} is saved at step {step}; go on with --resume")
