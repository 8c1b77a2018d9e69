"""Checks before the routes: keys, hosts, sizes and times, before a body is parsed.

Plain ASGI, so that streams pass through unbuffered and a client's disconnect is noticed.
"""

import asyncio
import hmac
import time
from collections.abc import Sequence
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import (
    DEFAULT_MAX_INCOMPLETE_EVENT_SIZE,  # pyright: ignore[reportPrivateImportUsage]
    H11Protocol,
)

from chatllama.serving.errors import ApiError
from chatllama.serving.metrics import Metrics
from chatllama.serving.settings import ServerSettings

FREE_CHUNKS, LEAST_CHUNK = 1024, 256
"""Chunks of a body that may be of any size, and the mean size in bytes of all beyond them."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PAGE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}


class Guard:
    """Passes valid requests on to the application.

    Args:
        posted: those of them that take a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        open_paths: Sequence[str],
        routes: Sequence[str],
        posted: Sequence[str],
        metrics: Metrics,
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open, self._routes = frozenset(open_paths), frozenset(routes)
        self._posted = frozenset(posted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses one request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(k.encode(), v.encode()) for k, v in PAGE_HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_headers(scope, headers)
            body = await self._read_body(headers, receive)
            await self._app(scope, _replayed(body, receive), noting_send)
        except ApiError as error:
            ends = error.status in (408, 413) or error.detail.code == "wrong_framing"
            close = {"connection": "close"} if ends else {}
            if error.status == 401:
                close["www-authenticate"] = "Bearer"
            await error.response(close)(scope, receive, noting_send)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request(path, status)
            self._metrics.observe("request_seconds", time.monotonic() - started)

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError for a wrong key, host, origin or content type."""
        keys = self._settings.api_keys
        host = headers.get("host", "")
        if not keys:
            # DNS rebinding: a web site's name may resolve to this machine.
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.lower() not in (*LOCAL_NAMES, self._settings.host):
                raise ApiError(403, "this server is for its own machine only", "wrong_host")
        origin = headers.get("origin")
        own = f"{scope['scheme']}://{host.lower()}"
        if origin is not None and origin not in (own, *self._settings.allow_origins):
            text = "requests from other web sites are refused; --allow-origin allows one"
            raise ApiError(403, text, "wrong_origin")
        if "content-length" in headers and "transfer-encoding" in headers:
            text = "give one of Content-Length and Transfer-Encoding"
            raise ApiError(400, text, "wrong_framing")
        if keys and scope["path"] not in self._open:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
            if scheme.lower() != "bearer" or not any(right):
                text = "give a valid key as `Authorization: Bearer KEY`"
                raise ApiError(401, text, "invalid_api_key")
        if scope["method"] == "POST" and scope["path"] in self._posted:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                text = "the body must be sent as application/json"
                raise ApiError(415, text, "wrong_content_type")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._settings.max_body
        length = headers.get("content-length", "0")
        too_long = ApiError(413, f"the body is over {most} bytes", "body_too_long")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_long

        async def whole() -> bytes:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away", "disconnected")
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_long
                if not message.get("more_body"):
                    return bytes(body)

        seconds = self._settings.body_timeout
        try:
            return await asyncio.wait_for(whole(), seconds)
        except asyncio.TimeoutError:  # not yet the builtin one in Python 3.10
            text = f"the request did not arrive within {seconds:g} s"
            raise ApiError(408, text, "request_timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that returns the body once, then passes on what follows."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Connection(h11.Connection):
    """Refuses a body in very many small chunks, which would hold the event loop."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data) and self.our_state is h11.SEND_RESPONSE:
            self._chunks, self._bytes = (
                self._chunks + event.chunk_start,
                self._bytes + len(event.data),
            )
            if self._chunks > FREE_CHUNKS + self._bytes // LEAST_CHUNK:
                raise h11.RemoteProtocolError("the body comes in too many chunks")
        return event


class PatientProtocol(H11Protocol):
    """HTTP protocol of uvicorn with time limits for a request's head and for reading."""

    head_seconds = 20.0
    send_seconds = 60.0
    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the timers; that of the head closes a connection that sends nothing."""
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, DEFAULT_MAX_INCOMPLETE_EVENT_SIZE)
        self._arm()
        self._check_reader(0)

    def data_received(self, data: bytes) -> None:
        """Stops the timer once the head is complete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._arm()
        else:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._disarm()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def _check_reader(self, before: int) -> None:
        """Drops a client that read nothing since the last check; `before`: bytes unread then."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread >= before > 0:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(self.send_seconds, self._check_reader, unread)

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
