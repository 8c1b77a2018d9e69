"""An OpenAI-compatible chat endpoint: one request with its retries, and the pace of all of them.

Plain HTTP of the standard library. What is asked, and what becomes of the answers, is in
`growing.py`.
"""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message as Headers
from http.client import HTTPException
from typing import Any, cast
from urllib.parse import urlsplit

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, unless the server asks for more."""
_SHOWN = 300  # characters of a server's complaint


class EndpointError(ValueError):
    """The endpoint cannot be used; the message says why."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str
    finished: bool
    """It ended by itself, not because it grew too long."""
    prompt_tokens: int
    completion_tokens: int


class Pace:
    """Lets requests go no faster than so many a minute, from any number of threads.

    Args:
        per_minute: requests. None: no limit.
        clock: seconds.
        sleep: waits for seconds.
    """

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
        """Returns when the next request may go."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently."""

    url: str
    """The API's root, such as http://127.0.0.1:8000/v1."""
    model: str
    key: str | None
    """Sent as bearer token."""
    pace: Pace
    retries: int = 6
    """Further tries after 429, 5xx, a broken connection or no answer in time."""
    timeout: float = 300.0
    """Seconds for one answer."""
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(
                f"--url {self.url}: expected an address such as http://host:8000/v1"
            )

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int
    ) -> Reply:
        """The answer to a conversation.

        Args:
            messages: with `role` and `content`.
            temperature: of sampling.
            max_tokens: of the answer.

        Raises:
            EndpointError: refused, or still failing after all retries.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        problem = ""
        for tries in range(self.retries + 1):
            self.pace.wait()
            try:
                return _reply(self._post(body), self.url)
            except urllib.error.HTTPError as error:
                problem, asked = _complaint(error), _retry_after(error.headers)
                if error.code != 429 and error.code < 500:
                    raise EndpointError(f"{self.url}: {problem}") from None
            except (OSError, HTTPException) as error:
                problem, asked = str(getattr(error, "reason", error)), 0.0
            if tries < self.retries:
                patience = min(LONGEST_WAIT, 2.0**tries) * random.uniform(0.5, 1.0)
                self.sleep(max(asked, patience))
        raise EndpointError(f"{self.url}: {problem} (given up after {self.retries + 1} tries)")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        handlers: list[Any] = [_NoRedirects()]
        if urlsplit(self.url).hostname in LOCAL_HOSTS:
            handlers.append(urllib.request.ProxyHandler({}))
        with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as answer:
            return cast(bytes, answer.read())


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
        shown = content[:_SHOWN].decode("utf-8", errors="replace")
        raise EndpointError(f"{url}: this is no chat completion: {shown!r}") from None


def _complaint(error: urllib.error.HTTPError) -> str:
    """Status and message of a refusal."""
    text = error.read().decode("utf-8", errors="replace")
    try:
        told = json.loads(text)["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError):
        pass
    return f"HTTP {error.code} {error.reason}: {text[:_SHOWN].strip()}"


def _retry_after(headers: Headers) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0  # a date: the backoff has to do
