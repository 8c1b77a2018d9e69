"""A request in progress: between the event loop and the engine's thread, until it ends or fails."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from chatllama.generation.decoding_batch import Request
from chatllama.model.roles import Role
from chatllama.serving.engine import Engine
from chatllama.serving.errors import ApiError, timed_out
from chatllama.serving.jobs import Delta, Job, merged
from chatllama.serving.metrics import Metrics

Result = TypeVar("Result")
SEND_SLACK = 10.0
"""Seconds beyond the time limit that a slow client gets to read what is ready."""


class PendingAnswers:
    """The answers to one HTTP request while the engine generates them; ApiError if it cannot.

    Args:
        stops: strings that end an answer.
        seconds: time limit for all of them.
    """

    def __init__(
        self,
        engine: Engine,
        role: Role,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerFast,
        stops: Sequence[str],
        continues: bool,
        seconds: float,
        metrics: Metrics,
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Delta] | ApiError] = asyncio.Queue()
        self._job = Job(role, self._deliver, time.monotonic() + seconds)
        self._job.add_rows(requests, tokenizer, stops, continues)
        self._remaining = len(requests)
        engine.submit(self._job)

    def _deliver(self, job: Job, what: list[Delta] | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is no reader
            self._loop.call_soon_threadsafe(self._queue.put_nowait, what)

    def close(self) -> None:
        """Cancels what has not ended."""
        if self._remaining:
            self._engine.cancel(self._job)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Everything new, merged by answer, until all have ended; ApiError if one cannot."""
        first = True
        while self._remaining:
            waiting = [await self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            new: list[Delta] = []
            for item in waiting:
                if isinstance(item, ApiError):
                    raise item
                new += item
            if first:
                seconds = time.monotonic() - self._job.submitted
                self._metrics.observe("first_token_seconds", seconds)
                first = False
            self._remaining -= sum(delta.ended is not None for delta in new)
            yield merged(new)

    async def whole(self) -> list[Delta]:
        """The whole answers, in order."""
        found: list[Delta] = []
        async for deltas in self.deltas():
            found = merged([*found, *deltas])
        return sorted(found, key=lambda delta: delta.index)


async def unless_gone(
    receive: Receive, work: Awaitable[Result], metrics: Metrics, seconds: float
) -> Result:
    """The result of `work`, cancelled with an ApiError at the client's disconnect or time limit."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            metrics.count("disconnects")
            raise ApiError(499, "the client went away", "disconnected")
        metrics.count("timeouts")
        raise timed_out()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the work behind them ends when the client disconnects or is too slow.

    Args:
        events: data of one message each.
        close: ends the work; called in any case.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[], None],
        metrics: Metrics,
        seconds: float,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close
        self._metrics, self._seconds = metrics, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, the time limit or the client's disconnect."""
        limit = self._seconds + SEND_SLACK
        try:
            with contextlib.suppress(ApiError):
                await unless_gone(receive, self._write(send), self._metrics, limit)
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._events:
            chunk = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
