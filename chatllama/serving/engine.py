"""The thread that owns the model: continuous batching over all requests, one batch a role.

Rows join a batch as others leave it; batches of different roles take turns, one token each. Other
work on the model (scores, loading and unloading adapters) runs between two steps.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from chatllama.generation.decoding_batch import DecodingBatch, Sampled
from chatllama.generation.sampling import RowSampling
from chatllama.model.roles import Role, RoleModel, sampling_as
from chatllama.serving.errors import ApiError, timed_out
from chatllama.serving.jobs import Delta, Job, Row
from chatllama.serving.metrics import Metrics

Result = TypeVar("Result")
PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, read in one forward pass (one prompt may be longer)."""


@dataclass(frozen=True)
class EngineLimits:
    """How much is worked on at a time."""

    rows: int
    """Answers decoded at a time, over all roles."""
    cache_tokens: int
    """Tokens in the KV caches, over all rows, at each row's greatest length."""
    queue: int
    """Answers that may wait for their turn."""


class _RoleBatch:
    """The batch of one role."""

    def __init__(self, model: RoleModel, max_rows: int) -> None:
        self.decoding = DecodingBatch(model.llama, max_rows)
        self.rows: dict[int, Row] = {}

    def longest(self) -> int:
        return max((row.length for row in self.rows.values()), default=0)

    def cache_tokens(self) -> int:
        return self.longest() * len(self.rows)


class Engine:
    """Works on jobs until it is stopped.

    The model is in eval mode; after `start` only the engine's thread may use it.
    """

    def __init__(self, model: RoleModel, limits: EngineLimits, metrics: Metrics) -> None:
        self._model, self.limits, self._metrics = model, limits, metrics
        self._batches: dict[Role, _RoleBatch] = {}
        self._waiting: deque[Row] = deque()
        self._functions: deque[tuple[Callable[[], object], Future]] = deque()
        self._retired: set[Role] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends what is still running with an error, and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes work."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_running(self) -> int:
        """Answers being decoded."""
        return sum(len(batch.rows) for batch in list(self._batches.values()))

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their turn."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a job's rows; ApiError if the queue is full or the server is stopping."""
        with self._wake:
            if not self.alive:
                raise _stopping()
            free = max(0, self.limits.rows - self.num_running)
            if len(self._waiting) + len(job.rows) > self.limits.queue + free:
                busy = f"the server is busy: {len(self._waiting)} answers wait; try again later"
                raise ApiError(503, busy, "overloaded")
            self._waiting.extend(job.rows)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Drops a job; its rows make room for others."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def run(self, function: Callable[[], Result]) -> "Future[Result]":
        """Runs a function in the engine's thread, between two steps."""
        future: Future[Result] = Future()
        with self._wake:
            if not self.alive:
                raise _stopping()
            self._functions.append((function, future))
            self._wake.notify()
        return future

    def retire(self, role: Role) -> None:
        """Removes a role from the model after its last answer. Engine's thread only."""
        self._retired.add(role)

    # --- the thread ------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._functions or self._waiting or self._batches):
                    self._wake.wait()
                if self._stopping:
                    break
                functions, self._functions = self._functions, deque()
            for function, future in functions:
                _run(function, future)
            self._drop_rows()
            self._admit()
            for role, batch in list(self._batches.items()):
                if batch.rows:
                    self._guarded(role, batch, batch.decoding.step)
            self._remove_unused()
        for row in self._rows():
            self._fail(row.job, _stopping())
        for _, future in self._functions:
            future.set_exception(_stopping())

    def _rows(self) -> list[Row]:
        """Rows that run or wait."""
        running = [row for batch in self._batches.values() for row in batch.rows.values()]
        return [*running, *self._waiting]

    def _drop_rows(self) -> None:
        """Drops rows of jobs that were cancelled, failed or ran out of time."""
        now = time.monotonic()
        for row in self._rows():
            if not row.job.over and now > row.job.deadline:
                self._metrics.count("timeouts")
                self._fail(row.job, timed_out())
        for batch in self._batches.values():
            dropped = [number for number, row in batch.rows.items() if row.job.over]
            batch.decoding.drop(dropped)
            for number in dropped:
                del batch.rows[number]
        if any(row.job.over for row in self._waiting):
            with self._wake:
                self._waiting = deque(row for row in self._waiting if not row.job.over)

    def _admit(self) -> None:
        """Admits waiting rows while there is room, first come, first served."""
        while self._waiting:
            role = self._waiting[0].job.role
            group = self._next_group(role)
            if not group:
                return
            group = [row for row in group if self._can_be_sampled(row)]
            if not group:
                continue
            batch = self._batches.setdefault(role, _RoleBatch(self._model, self.limits.rows))
            self._read_prompts(role, batch, group)

    def _can_be_sampled(self, row: Row) -> bool:
        """Fails a row whose settings make no tensors, before it can fail a batch."""
        try:
            RowSampling([row.request.sampling])
        except Exception as error:
            self._break([row.job], error)
            return False
        return True

    def _next_group(self, role: Role) -> list[Row]:
        """Rows at the head of the queue, all of one role, that fit rows, cache and one pass."""
        others = sum(b.cache_tokens() for name, b in self._batches.items() if name != role)
        batch = self._batches.get(role)
        count, longest = (len(batch.rows), batch.longest()) if batch else (0, 0)
        running = self.num_running
        group: list[Row] = []
        widest = 0
        with self._wake:
            while self._waiting and self._waiting[0].job.role == role:
                row = self._waiting[0]
                widest = max(widest, len(row.request.prompt))
                longest = max(longest, row.length)
                total = others + longest * (count + len(group) + 1)
                if running + len(group) >= self.limits.rows or total > self.limits.cache_tokens:
                    break
                if group and widest * (len(group) + 1) > PREFILL_TOKENS:
                    break
                group.append(self._waiting.popleft())
        return group

    def _read_prompts(self, role: Role, batch: _RoleBatch, group: Sequence[Row]) -> None:
        """Reads prompts; if that raises, each half again, so that what raises fails alone."""
        group = [row for row in group if not row.job.over]
        if not group:
            return
        sampled: list[Sampled] | None = None
        try:
            with sampling_as(self._model, role):
                sampled = batch.decoding.admit([row.request for row in group])
        except Exception as error:
            if len(group) == 1:
                self._break([group[0].job], error)
                return
        if sampled is None:  # the error is gone, and with it the tensors that it held
            middle = len(group) // 2
            self._read_prompts(role, batch, group[:middle])
            self._read_prompts(role, batch, group[middle:])
            return
        batch.rows |= {one.row: row for one, row in zip(sampled, group, strict=True)}
        self._guarded(role, batch, lambda: sampled)

    def _guarded(self, role: Role, batch: _RoleBatch, work: Callable[[], list[Sampled]]) -> None:
        """Runs a batch's work and delivers; if it raises, only this batch's jobs fail."""
        try:
            with sampling_as(self._model, role):
                sampled = work()
            self._deliver(batch, sampled)
        except Exception as error:
            self._break([row.job for row in batch.rows.values()], error)
            self._batches.pop(role, None)

    def _deliver(self, batch: _RoleBatch, sampled: list[Sampled]) -> None:
        deltas: dict[Job, list[Delta]] = {}
        stopped: list[int] = []
        for one in sampled:
            row = batch.rows[one.row]
            try:
                delta = row.advance(one)
            except Exception as error:  # this row's alone
                self._break([row.job], error)
                delta = None
            else:
                deltas.setdefault(row.job, []).append(delta)
            if delta is None or delta.ended:
                del batch.rows[one.row]
                row.job.remaining -= 1
                if not one.ended:
                    stopped.append(one.row)
        batch.decoding.drop(stopped)
        self._metrics.count("generated_tokens", len(sampled))
        for job, some in deltas.items():
            if not (job.cancelled or job.failed):
                job.deliver(job, some)

    def _break(self, jobs: Sequence[Job], error: Exception) -> None:
        """Fails jobs by an exception, which is logged."""
        traceback.print_exception(error)
        self._metrics.count("engine_errors")
        for job in jobs:
            self._fail(job, error if isinstance(error, ApiError) else _broken())

    def _fail(self, job: Job, error: ApiError) -> None:
        if not (job.failed or job.cancelled):
            job.failed = True
            job.deliver(job, error)

    def _remove_unused(self) -> None:
        """Frees the memory of roles without rows, and removes retired adapters."""
        waiting = {row.job.role for row in self._waiting}
        for role in [role for role, batch in self._batches.items() if not batch.rows]:
            del self._batches[role]
        for role in self._retired - self._batches.keys() - waiting:
            self._retired.discard(role)
            self._model.remove(role)


def _run(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", "stopping")


def _broken() -> ApiError:
    return ApiError(500, "the model failed on this request", "internal")
