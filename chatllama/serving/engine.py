"""The thread that owns the model: continuous batching over all requests, one batch a role.

Rows join a batch as others leave it; batches of different roles take turns, one token each. Other
work on the model (scores, adapters coming and going) is done between two steps.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from chatllama.generation.decoding_batch import DecodingBatch, Sampled
from chatllama.model.roles import (
    Role,
    RoleModel,
    acting_as,
    autocast,
)
from chatllama.serving.errors import ApiError
from chatllama.serving.jobs import Job, Piece, Row
from chatllama.serving.metrics import Metrics

Result = TypeVar("Result")
PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, that are read in one forward pass (one prompt may be longer)."""


@dataclass(frozen=True)
class EngineLimits:
    """How much is worked on at a time."""

    rows: int
    """Answers decoded at a time, over all roles."""
    cache_tokens: int
    """Tokens, over all rows, that the caches of keys and values may come to; no row has more."""
    queue: int
    """Answers that may wait for their turn."""


class _Lane:
    """The batch of one role."""

    def __init__(self, model: RoleModel, slots: int) -> None:
        self.batch = DecodingBatch(model.llama, slots)
        self.rows: dict[int, Row] = {}

    def longest(self) -> int:
        return max((row.length for row in self.rows.values()), default=0)

    def cache_tokens(self) -> int:
        return self.longest() * len(self.rows)


class Engine:
    """Answers jobs until it is stopped.

    Args:
        model: in eval mode; from `start` on only the engine's thread may touch it.
        limits: how much at a time.
        metrics: receives counts.
    """

    def __init__(self, model: RoleModel, limits: EngineLimits, metrics: Metrics) -> None:
        self._model, self.limits, self._metrics = model, limits, metrics
        self._lanes: dict[Role, _Lane] = {}
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._retired: set[Role] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
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
        """Whether the thread works."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_running(self) -> int:
        """Answers being decoded."""
        return sum(len(lane.rows) for lane in list(self._lanes.values()))

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their turn."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a job's rows.

        Raises:
            ApiError: too much is waiting already, or the server is stopping.
        """
        with self._wake:
            if not self.alive:
                raise _stopping()
            free = max(0, self.limits.rows - self.num_running)
            if len(self._waiting) + len(job.rows) > self.limits.queue + free:
                raise ApiError(
                    503,
                    f"the server is busy: {len(self._waiting)} answers wait; try again later",
                    "overloaded",
                    type="server_error",
                )
            self._waiting.extend(job.rows)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more: its rows make room for others."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def run(self, function: Callable[[], Result]) -> "Future[Result]":
        """Runs a function in the engine's thread, between two steps."""
        future: Future[Result] = Future()
        with self._wake:
            if not self.alive:
                raise _stopping()
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def retire(self, role: Role) -> None:
        """Removes a role from the model once its last answer is finished. Engine's thread only."""
        self._retired.add(role)

    # --- the thread ------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._calls or self._waiting or self._lanes):
                    self._wake.wait()
                if self._stopping:
                    break
                calls, self._calls = self._calls, deque()
            for function, future in calls:
                _answer(function, future)
            self._drop_unwanted()
            self._admit()
            for role, lane in list(self._lanes.items()):
                if lane.rows:
                    self._guarded(role, lane, lane.batch.step)
            self._forget_empty()
        running = [row for lane in self._lanes.values() for row in lane.rows.values()]
        for row in [*running, *self._waiting]:
            self._fail(row.job, _stopping())
        for _, future in self._calls:
            future.set_exception(_stopping())

    def _drop_unwanted(self) -> None:
        """Rows of jobs that were cancelled, failed or ran out of time."""
        now = time.monotonic()
        running = [row for lane in self._lanes.values() for row in lane.rows.values()]
        for row in [*running, *self._waiting]:
            if not row.job.over and now > row.job.deadline:
                self._metrics.count("timeouts")
                self._fail(
                    row.job,
                    ApiError(504, "the answer took too long", "timeout", type="server_error"),
                )
        for lane in self._lanes.values():
            dropped = [number for number, row in lane.rows.items() if row.job.over]
            if dropped:
                lane.batch.drop(dropped)
                for number in dropped:
                    del lane.rows[number]
        if any(row.job.over for row in self._waiting):
            with self._wake:
                self._waiting = deque(row for row in self._waiting if not row.job.over)

    def _admit(self) -> None:
        """Takes waiting rows in as far as there is room, first come, first served."""
        while self._waiting:
            role = self._waiting[0].job.role
            group = self._next_group(role)
            if not group:
                return
            lane = self._lanes.setdefault(role, _Lane(self._model, self.limits.rows))
            requests = [row.request for row in group]

            def read(lane: _Lane = lane, requests=requests, group=group) -> list[Sampled]:
                sampled = lane.batch.admit(requests)
                for one, row in zip(sampled, group, strict=True):
                    lane.rows[one.row] = row
                return sampled

            if not self._guarded(role, lane, read):
                for row in group:
                    self._fail(row.job, _broken())

    def _next_group(self, role: Role) -> list[Row]:
        """Rows at the head of the queue, all of one role, that fit rows, cache and one pass."""
        others = sum(lane.cache_tokens() for name, lane in self._lanes.items() if name != role)
        lane = self._lanes.get(role)
        count, longest = (len(lane.rows), lane.longest()) if lane else (0, 0)
        running = self.num_running
        group: list[Row] = []
        widest = 0
        with self._wake:
            while self._waiting and self._waiting[0].job.role == role:
                row = self._waiting[0]
                widest = max(widest, len(row.request.prompt))
                longest = max(longest, row.length)
                total = others + longest * (count + len(group) + 1)
                if running + len(group) >= self.limits.rows:
                    break
                if total > self.limits.cache_tokens:
                    break
                if group and widest * (len(group) + 1) > PREFILL_TOKENS:
                    break
                group.append(self._waiting.popleft())
        return group

    def _guarded(self, role: Role, lane: _Lane, work: Callable[[], list[Sampled]]) -> bool:
        """Does a lane's work and delivers; when it breaks, its jobs fail and the others go on."""
        try:
            with acting_as(self._model, role), autocast(self._model):
                sampled = work()
            self._deliver(lane, sampled)
        except Exception:
            traceback.print_exc()
            self._metrics.count("engine_errors")
            for row in lane.rows.values():
                self._fail(row.job, _broken())
            self._lanes.pop(role, None)
            return False
        return True

    def _deliver(self, lane: _Lane, sampled: list[Sampled]) -> None:
        pieces: dict[Job, list[Piece]] = {}
        stopped: list[int] = []
        for one in sampled:
            row = lane.rows[one.row]
            piece = row.advance(one)
            pieces.setdefault(row.job, []).append(piece)
            if piece.ended:
                del lane.rows[one.row]
                row.job.remaining -= 1
                if not one.ended:
                    stopped.append(one.row)
        if stopped:
            lane.batch.drop(stopped)
        self._metrics.count("generated_tokens", len(sampled))
        for job, some in pieces.items():
            if not (job.cancelled or job.failed):
                job.deliver(job, some)

    def _fail(self, job: Job, error: ApiError) -> None:
        if not (job.failed or job.cancelled):
            job.failed = True
            job.deliver(job, error)

    def _forget_empty(self) -> None:
        """Gives back the memory of roles that nobody asks, and the adapters to be removed."""
        wanted = {row.job.role for row in self._waiting}
        for role in [role for role, lane in self._lanes.items() if not lane.rows]:
            del self._lanes[role]
        for role in [role for role in self._retired if role not in self._lanes]:
            if role not in wanted:
                self._retired.discard(role)
                self._model.remove(role)


def _answer(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", "stopping", type="server_error")


def _broken() -> ApiError:
    return ApiError(500, "the model failed on this request", "internal", type="server_error")
