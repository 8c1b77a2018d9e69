"""An OpenAI-compatible chat endpoint: one request, and the pace of all of them.

HTTP and its retries are in `chatllama/runtime/http_client.py`; what is requested, and what becomes
of the answers, is in `generate.py`.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chatllama.runtime.http_client import SHOWN, HttpClient, HttpError


class EndpointError(ValueError):
    """The endpoint cannot be used, for the reason in the message."""


@dataclass(frozen=True)
class Reply:
    """The answer, and its tokens."""

    text: str
    finished: bool
    """It ended by itself, not at the limit of tokens."""
    prompt_tokens: int
    completion_tokens: int


class Pace:
    """Limits the requests a minute (None: no limit) of any number of threads."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = -float("inf")
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when the next request may be sent."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API."""

    http: HttpClient
    model: str

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int
    ) -> Reply:
        """The answer to a conversation, whose turns have `role` and `content`.

        Raises:
            EndpointError: refused, or still failing after all retries.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        try:
            return _reply(self.http.send("POST", "/chat/completions", body), self.http.url)
        except HttpError as error:
            raise EndpointError(str(error)) from None


def _reply(content: bytes, url: str) -> Reply:
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        return Reply(
            text=(choice["message"]["content"] or "").strip(),
            finished=choice.get("finish_reason") != "length",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = content[:SHOWN].decode("utf-8", errors="replace")
        raise EndpointError(f"{url}: this is no chat completion: {shown!r}") from None
