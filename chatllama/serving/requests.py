"""One request at work: from the event loop to the engine's thread and back, and giving up on it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from chatllama.generation.decoding_batch import Request
from chatllama.model.roles import Role
from chatllama.serving.engine import Engine
from chatllama.serving.errors import ApiError
from chatllama.serving.jobs import Job, Piece, make_rows, merged
from chatllama.serving.metrics import Metrics

Result = TypeVar("Result")
SEND_SLACK = 10.0
"""Seconds beyond the time limit that a slow reader gets for what is ready."""


class Call:
    """The answers to one request, on their way.

    Args:
        engine: that answers.
        role: who answers.
        requests: the answers wanted.
        tokenizer: reads them.
        stops: strings that end them.
        seconds: limit for everything.
        metrics: receives latencies.

    Raises:
        ApiError: the engine takes no more.
    """

    def __init__(
        self,
        engine: Engine,
        role: Role,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerFast,
        stops: Sequence[str],
        seconds: float,
        metrics: Metrics,
    ) -> None:
        self._engine, self._metrics, self.seconds = engine, metrics, seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Piece] | ApiError] = asyncio.Queue()
        self._job = Job(role, self._deliver, time.monotonic() + seconds)
        make_rows(self._job, requests, tokenizer, stops)
        self._remaining = len(self._job.rows)
        engine.submit(self._job)

    def _deliver(self, job: Job, what: list[Piece] | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, what)

    def close(self) -> None:
        """Nobody reads any more: what has not ended is cancelled."""
        if self._remaining:
            self._engine.cancel(self._job)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Everything new, merged by answer, until all answers have ended.

        Raises:
            ApiError: the answer cannot be finished.
        """
        first = True
        while self._remaining:
            waiting = [await self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            new: list[Piece] = []
            for item in waiting:
                if isinstance(item, ApiError):
                    raise item
                new += item
            if first:
                seconds = time.monotonic() - self._job.submitted
                self._metrics.observe("first_token_seconds", seconds)
                first = False
            self._remaining -= sum(piece.ended is not None for piece in new)
            yield merged(new)

    async def all_pieces(self) -> list[Piece]:
        """The whole answers, in order."""
        found: list[Piece] = []
        async for pieces in self.pieces():
            found = merged([*found, *pieces])
        return sorted(found, key=lambda piece: piece.index)


async def unless_gone(
    http: HttpRequest, work: Awaitable[Result], metrics: Metrics, seconds: float
) -> Result:
    """The result of `work`, which is cancelled when the client leaves or time is up.

    Raises:
        ApiError: the client has left (nobody reads that), or time is up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            metrics.count("disconnects")
            raise ApiError(499, "the client went away", "disconnected")
        metrics.count("timeouts")
        raise ApiError(504, "the answer took too long", "timeout", type="server_error")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended with the work behind them when the client leaves or dawdles.

    Args:
        events: one message's data each.
        close: ends the work; called in any case.
        metrics: counts those who leave.
        seconds: limit for everything.
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
        """Sends until the end, or until nobody reads."""
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            limit = self._seconds + SEND_SLACK
            await asyncio.wait((writer, gone), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            else:
                self._metrics.count("disconnects" if gone.done() else "timeouts")
        finally:
            self._close()
            for task in (writer, gone):
                task.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._events:
            chunk = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
