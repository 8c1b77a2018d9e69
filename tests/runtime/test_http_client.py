"""The HTTP client against servers on this machine: proxies, half answers, keys, retries."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from chatllama.runtime.http_client import HttpClient, HttpError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives each connection the next answer, byte for byte; what it was sent."""
    sent: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    sent.append(_request(connection))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", sent
        thread.join(5)


def _request(connection: socket.socket) -> str:
    """What was sent, up to the end of its body."""
    text = ""
    while True:
        text += connection.recv(65536).decode()
        head, blank, body = text.partition("\r\n\r\n")
        length = head.lower().partition("content-length: ")[2].partition("\r")[0]
        if blank and len(body) >= int(length or 0):
            return text


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_what_is_sent() -> None:
    with answering(OK, OK) as (url, sent):
        assert HttpClient(f"{url}/v1/", " secret\n", 5).send("POST", "/x", {"a": 1}) == b"hi"
        assert HttpClient(url, None, 5).send("GET", "/x") == b"hi"
    first, second = (text.lower() for text in sent)
    assert first.startswith("post /v1/x http/1.1") and first.endswith('\r\n\r\n{"a": 1}')
    assert "authorization: bearer secret\r\n" in first and "accept-encoding: identity" in first
    assert second.startswith("get /x ") and "authorization" not in second


def test_proxies_are_used_where_wanted_but_not_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(OK, OK) as (proxy, sent):
        monkeypatch.setenv("http_proxy", proxy.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", "excluded.invalid")
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        far = "http://far.invalid/v1"
        assert HttpClient(far, None, 5, proxies=True).send("GET", "/x") == b"hi"
        assert sent[0].startswith("GET http://far.invalid/v1/x ")
        for url, wanted in ((far, False), ("http://excluded.invalid", True)):
            with pytest.raises(HttpError, match=r"invalid/.*x: "):
                HttpClient(url, None, 5, proxies=wanted).send("GET", "/x")
        assert len(sent) == 1
        with answering(OK) as (near, _):
            assert HttpClient(near, None, 5, proxies=True).send("GET", "/x") == b"hi"
        HttpClient(far, None, 5, proxies=True).send("GET", "/x")


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal"
BUSY = b"HTTP/1.1 429 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
DATE = b"HTTP/1.1 503 Down\r\nRetry-After: Fri, 31 Dec 1999\r\nContent-Length: 0\r\n\r\n"
NOT_HTTP = b"SSH-2.0-OpenSSH\r\n\r\n"


def test_what_may_pass_is_tried_again() -> None:
    waits: list[float] = []
    turns: list[None] = []

    def client(url: str, retries: int) -> HttpClient:
        return HttpClient(
            url, "secret", 5, retries=retries, wait=lambda: turns.append(None), sleep=waits.append
        )

    with answering(HALF, BUSY, DATE, b"", NOT_HTTP, OK) as (url, _):
        assert client(url, 5).send("GET", "/x") == b"hi"
    assert len(turns) == 6 and waits[1] == 7
    for wait, longest in zip(waits, (1, 0, 4, 8, 16), strict=True):
        assert not longest or longest / 2 <= wait <= longest
    tried = pytest.raises(HttpError, match=r"/x: .*\(given up after 2 tries\)")
    with answering(HALF, HALF) as (url, _), tried as caught:
        client(url, 1).send("GET", "/x")
    assert caught.value.status is None and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"error": {"message": "no"}}', "HTTP 400 Bad: no"),
        (b'{"error": "no"}', "HTTP 400 Bad: no"),
        (b'{"message": "no", "object": "error"}', "HTTP 400 Bad: no"),
        (b'{"detail": "no"}', 'HTTP 400 Bad: {"detail": "no"}'),
        (b"[1]", r"HTTP 400 Bad: \[1\]"),
        (b"\xff" * 501, "HTTP 400 Bad: \ufffd{500}$"),
    ],
)
def test_refusals_say_why_once(answer: bytes, message: str) -> None:
    head = f"HTTP/1.1 400 Bad\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
    refused = pytest.raises(HttpError, match=message)
    with answering(head + answer) as (url, _), refused as caught:
        HttpClient(url, None, 5, retries=3).send("GET", "/x")
    assert caught.value.status == 400 and "tries" not in str(caught.value)


def test_redirects_are_not_followed() -> None:
    with answering(OK) as (other, sent):
        head = f"HTTP/1.1 307 Moved\r\nLocation: {other}/y\r\nContent-Length: 0\r\n\r\n"
        with answering(head.encode()) as (url, _), pytest.raises(HttpError, match="HTTP 307"):
            HttpClient(url, "secret", 5).send("POST", "/x", {})
        assert sent == []
        HttpClient(other, None, 5).send("GET", "/x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HttpClient("ftp://x", None, 5), "ftp://x: expected an address such as http"),
        (lambda: HttpClient("http:///v1", None, 5), "expected an address"),
        (lambda: HttpClient("http://x", "sec\nret", 5), "http://x: the API key has characters"),
        (lambda: HttpClient("http://x", "secr\u00e9t", 5), "the API key has characters"),
    ],
)
def test_mistakes_are_named_without_the_key(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "sec" not in str(caught.value)
