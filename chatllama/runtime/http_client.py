"""HTTP requests with JSON bodies: a bearer key, retries, no redirects, proxies only where wanted.

The key is in a header and in no message. The callers decide what a failure means.
"""

import json
import random
import ssl
import time
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

Result = TypeVar("Result")
Body = Mapping[str, object] | None
Parse = Callable[[bytes], Result]
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, unless the server requests more."""
SHOWN = 500
"""Characters of a server's answer that a message repeats."""


class HttpError(Exception):
    """No usable answer; the message begins with the address."""

    retry_after = 0.0
    """Seconds to wait before the next try, by the server."""
    unreachable = False
    """No connection could be made, and the server has never answered."""

    def __init__(self, message: str, status: int | None = None, content: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.content = status, content
        """Of the answer; the status is None if there was none."""


class HttpClient:
    """Requests to one server, from any number of threads.

    A redirect is a failure: following it would send the key to wherever it points.

    Args:
        url: root of the API, such as http://127.0.0.1:8000/v1.
        key: bearer key, or None.
        timeout: seconds to connect, and between two parts of an answer.
        proxies: use those of the environment, but not for this machine.
        retries: further tries after 429, 5xx, a broken connection or no answer in time.
        wait: returns when the next request may go.
        sleep: waits for seconds.

    Raises:
        ValueError: no such address, or no header can carry the key.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        *,
        proxies: bool = False,
        retries: int = 0,
        wait: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.retries, self._wait, self._sleep = retries, wait, sleep
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers["Connection"] = "close"
        if key := (key or "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ValueError(f"{url}: the API key has characters that no HTTP header carries")
            headers["Authorization"] = f"Bearer {key}"
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: expected an address such as http://host:8000/v1")
        self._answered = False
        self._client = httpx2.Client(
            headers=headers,
            timeout=timeout,
            verify=ssl.create_default_context(),
            proxy=_proxy(self.url) if proxies else None,
            trust_env=False,  # which would bring a proxy and keys from ~/.netrc
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def send(
        self, method: str, path: str, body: Body = None, parse: Parse[Result] = bytes
    ) -> Result:
        """What `parse` makes of the answer's body; a ValueError of it is followed by another try.

        Raises:
            HttpError: refused, redirected, or still failing after all retries.
        """
        for tries in range(self.retries + 1):
            self._wait()
            try:
                return self._send_once(method, self.url + path, body, parse)
            except HttpError as error:
                if 300 <= (error.status or 0) < 500 and error.status != 429:
                    raise
                if tries == self.retries:
                    if tries:
                        error.args = (f"{error} (given up after {tries + 1} tries)",)
                    raise
                patience = min(LONGEST_WAIT, 2.0**tries) * random.uniform(0.5, 1.0)
                self._sleep(max(error.retry_after, patience))
        raise AssertionError("the last try returns or raises")

    def _send_once(self, method: str, address: str, body: Body, parse: Parse[Result]) -> Result:
        content = None if body is None else json.dumps(body)
        try:
            response = self._client.request(method, address, content=content)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            failure = HttpError(f"{address}: {str(error) or type(error).__name__}")
            connecting = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL)
            failure.unreachable = isinstance(error, connecting) and not self._answered
            raise failure from None
        self._answered = True
        code, answer = response.status_code, response.content
        if response.is_success:
            try:
                return parse(answer)
            except ValueError as error:
                raise HttpError(f"{address}: {error}", code, answer) from None
        reason = f"HTTP {code} {response.reason_phrase}: {complaint(answer)}"
        failure = HttpError(f"{address}: {reason}", code, answer)
        failure.retry_after = _seconds(response.headers.get("retry-after", "0"))
        raise failure


def _proxy(url: str) -> str | None:
    """The environment's proxy for an address; None for this machine and where it is excluded."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or parts.hostname in LOCAL_HOSTS or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def complaint(content: bytes) -> str:
    """The message of an error body, in OpenAI's or vLLM's shape."""
    try:
        said = json.loads(content)
        said = said.get("error", said)
        text = str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, AttributeError, RecursionError):
        text = content.decode(errors="replace")
    return text[:SHOWN].strip()


def _seconds(retry_after: str) -> float:
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        return 0.0  # a date: the backoff has to do
