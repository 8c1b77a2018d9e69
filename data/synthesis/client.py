"""An OpenAI-compatible chat endpoint: one request, and the pace of all of them.

HTTP and its retries are in `chatllama/runtime/http_client.py`; what is requested, and what becomes
of the answers, is in `generate.py` and `trainers/judging`.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from chatllama.runtime.command_line import tell
from chatllama.runtime.http_client import HttpClient, HttpError, complaint

Item = TypeVar("Item")
Result = TypeVar("Result")
CUT, FILTERED, HALF = "cut at max_tokens", "content filter", "half surrogates"
_SURROGATE = re.compile("[\ud800-\udfff]")
_USELESS = (401, 403, 404, 405, 429)
"""Status after which another prompt fares no better; so does every redirect."""


class EndpointError(ValueError):
    """The endpoint cannot be used, for the reason in the message."""


class BadReply(EndpointError):
    """One request got no usable answer; the next may."""


@dataclass(frozen=True)
class Reply:
    """The answer, and its tokens."""

    text: str
    fault: str | None
    """Why the text is not to be kept; None: it may be."""
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


@dataclass
class Endpoint:
    """A model behind an API."""

    http: HttpClient
    model: str
    limit_name: str = "max_tokens"
    """Newer models of OpenAI refuse it and take `max_completion_tokens`."""

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int
    ) -> Reply:
        """The answer to a conversation, whose turns have `role` and `content`.

        Raises:
            BadReply: this conversation is refused, or still fails after all retries, by an answer
                or for lack of one.
            EndpointError: so would every other.
        """
        name = self.limit_name
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            name: max_tokens,
        }
        try:
            return self.http.send("POST", "/chat/completions", body, _reply)
        except HttpError as error:
            if error.status == 400 and name == "max_tokens" and b"max_completion" in error.content:
                self.limit_name = "max_completion_tokens"
                return self.chat(messages, temperature=temperature, max_tokens=max_tokens)
            if error.status == 400 and b"content_filter" in error.content:
                return Reply("", FILTERED, 0, 0)
            redirected = 300 <= (error.status or 0) < 400
            useless = error.status in _USELESS or redirected or error.unreachable
            raise (EndpointError if useless else BadReply)(str(error)) from None


def _reply(content: bytes) -> Reply:
    """Raises ValueError if this is no chat completion."""
    errors = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
    with suppress(*errors):
        answer = json.loads(content)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text, ending = (choice["message"]["content"] or "").strip(), choice.get("finish_reason")
        fault = {"length": CUT, "content_filter": FILTERED}.get(ending, None if text else "empty")
        if _SURROGATE.search(text):
            fault = HALF
        sent, received = (int(usage.get(f"{of}_tokens") or 0) for of in ("prompt", "completion"))
        if ending != "error" and not answer.get("error"):
            return Reply(text, fault, sent, received)
    raise ValueError(f"this is no chat completion: {complaint(content)}")


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], parallel: int
) -> Iterator[tuple[Item, Result | None]]:
    """Each item with the function's result, in the order in which they are done.

    A bad reply is printed and gives None.

    Raises:
        EndpointError: of the first that failed, after those that were under way.
    """
    waiting = iter(items)
    failed: EndpointError | None = None
    running: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(parallel) as pool:
        while True:
            free = 0 if failed else parallel - len(running)
            running |= {pool.submit(function, item): item for item in islice(waiting, free)}
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    result = future.result()
                except BadReply as error:
                    tell(str(error))
                    yield item, None
                except EndpointError as error:
                    failed = failed or error
                else:
                    yield item, result
    if failed is not None:
        raise failed
