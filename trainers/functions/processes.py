"""Calls of a function in processes of their own, each with a time limit.

A process that takes too long is killed, and another takes its place.
"""

import asyncio
import inspect
import multiprocessing
import time
import traceback
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from chatllama.config.base import load_function

READY = "ready"


@dataclass(frozen=True)
class Call:
    """Arguments of a function."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    value: Any = None
    error: str | None = None
    """Why there is no value."""
    timed_out: bool = False


def described(error: Exception) -> str:
    """The error, and the line of the user's code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"


class ProcessPool:
    """`count` processes, started at the first use, that have imported one function.

    Args:
        name: of the function, as in the config.
        timeout: seconds of a call. None: no limit.
    """

    def __init__(self, name: str, count: int, timeout: float | None) -> None:
        self.name, self.count, self.timeout = name, count, timeout
        self._workers: list[_Worker] = []

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcomes, in order."""
        try:
            return self._run(calls)
        except BaseException:  # a signal: what the processes answer belongs to no one then
            self.close()
            raise

    def _run(self, calls: Sequence[Call]) -> list[Outcome]:
        while len(self._workers) < min(self.count, len(calls)):
            self._workers.append(_Worker(self.name))
        outcomes: dict[int, Outcome] = {}
        waiting = list(range(len(calls)))[::-1]
        while len(outcomes) < len(calls):
            for worker in self._workers:
                if worker.is_free and waiting:
                    worker.number = waiting.pop()
                    worker.send(calls[worker.number], self.timeout)
            busy = [
                worker
                for worker in self._workers
                if worker.number is not None or not worker.is_ready
            ]
            limit = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([w.pipe for w in busy], None if limit == float("inf") else max(0.0, limit))
            for place, worker in enumerate(self._workers):
                number = worker.number
                outcome = worker.receive() if worker.pipe in ready else worker.overdue()
                if outcome is None:
                    continue
                if number is None:
                    raise ValueError(f"a process of reward function {self.name}: {outcome.error}")
                outcomes[number] = outcome
                if worker.is_dead:
                    self._workers[place] = _Worker(self.name)
        return [outcomes[number] for number in range(len(calls))]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []


class _Worker:
    """One process, and the number of the call that it works on."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.number: int | None = None
        self.is_ready, self.is_dead = False, False
        self.deadline = float("inf")

    @property
    def is_free(self) -> bool:
        return self.is_ready and self.number is None

    def send(self, call: Call, timeout: float | None) -> None:
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self.pipe.send(call)

    def receive(self) -> Outcome | None:
        """What the process sends; None for its first word."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.kill()
            return Outcome(error=f"its process ended (code {self._process.exitcode})")
        if found == READY:
            self.is_ready = True
            return None
        self.number, self.deadline = None, float("inf")
        return found

    def overdue(self) -> Outcome | None:
        """The outcome of a call that has taken too long; None for others."""
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        return Outcome(timed_out=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.is_dead = True


def _serve(name: str, pipe: Connection) -> None:
    """Answers calls until the other end closes."""
    try:
        function = load_function(name, "ppo.rewards")
        pipe.send(READY)
        while True:
            call: Call = pipe.recv()
            try:
                value = function(*call.arguments, **call.keywords)
                if inspect.iscoroutine(value):
                    value = asyncio.run(cast("Coroutine[Any, Any, Any]", value))
                outcome = Outcome(value)
            except Exception as error:
                outcome = Outcome(error=described(error))
            try:
                pipe.send(outcome)
            except Exception as error:  # the value cannot be pickled
                pipe.send(Outcome(error=described(error)))
    except (EOFError, OSError, KeyboardInterrupt):
        return
