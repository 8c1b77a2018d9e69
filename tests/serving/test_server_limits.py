"""Requests beyond the server's limits and clients that mean harm: the others are answered."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving_setup import KEY, make_served_run, metric, post, serving

from chatllama.generation.decoding_batch import DecodingBatch
from chatllama.inference.load import LoadedRun, load_run
from chatllama.runs.folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def loaded(run: RunFolder) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="module")
def url(run: RunFolder) -> Iterator[str]:
    with serving(run, max_adapters=2) as address:
        yield address


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The model decodes nothing until this is left; gives the rows of every step made then."""
    go, rows, step = threading.Event(), [], DecodingBatch.step

    def waiting(self: DecodingBatch) -> Any:
        assert go.wait(60)
        rows.append(len(self.running))
        return step(self)

    monkeypatch.setattr(DecodingBatch, "step", waiting)
    try:
        yield rows
    finally:
        go.set()


class Asking:
    """A request on its way, in a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.told: tuple[int, Any] | None = None
        self._thread = threading.Thread(target=self._ask, args=(url, body))
        self._thread.start()

    def _ask(self, url: str, body: dict[str, Any]) -> None:
        self.told = post(url, "/v1/completions", body)

    def answer(self) -> tuple[int, Any]:
        self._thread.join(60)
        assert self.told is not None
        return self.told


def wait_for(url: str, **gauges: int) -> None:
    """Until the server's gauges stand so."""
    for _ in range(3000):
        if all(metric(url, name) == value for name, value in gauges.items()):
            return
        time.sleep(0.01)
    raise AssertionError(f"never {gauges}")


def test_a_full_queue_refuses_and_those_inside_are_answered(
    run: RunFolder, loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {"prompt": "the", "max_tokens": 4, "temperature": 0}
    with serving(run, loaded, max_rows=1, max_queue=1) as url:
        with held(monkeypatch):
            first = Asking(url, body)
            wait_for(url, running=1, waiting=0)
            second = Asking(url, body)
            wait_for(url, running=1, waiting=1)
            status, told = post(url, "/v1/completions", body)
            assert status == 503 and told["error"]["code"] == "overloaded"
            assert "the server is busy: 1 answers wait" in told["error"]["message"]
            status, told = post(url, "/v1/completions", {**body, "stream": True})
            assert status == 503 and told["error"]["type"] == "server_error"
        answers = [asking.answer() for asking in (first, second)]
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1]["choices"] == answers[1][1]["choices"]
        assert post(url, "/v1/completions", body)[0] == 200
        assert post(url, "/v1/completions", {**body, "prompt": ["a", "b"]})[0] == 200
        status, told = post(url, "/v1/completions", {**body, "n": 3, "temperature": 1})
        assert status == 400 and "at most 2 answers at a time" in told["error"]["message"]


def test_keys_and_values_stay_within_their_budget(
    run: RunFolder, loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 12, "n": 6, "seed": 3, "stop_token_ids": []}
    with serving(run, loaded) as url:
        free = post(url, "/v1/completions", body)[1]["choices"]
    # Two models of 16 tokens an answer: 40 tokens are room for two at a time, of either.
    with serving(run, loaded, cache_tokens=40) as url:
        with held(monkeypatch) as rows:
            asked = [Asking(url, {**body, "model": name}) for name in ("policy", "sft")]
            wait_for(url, running=2, waiting=10)
        (status, told), (other, _) = [asking.answer() for asking in asked]
        assert status == other == 200 and told["choices"] == free
        assert max(rows) == 2
        status, told = post(url, "/v1/completions", {**body, "n": 1, "max_tokens": 37})
        assert status == 400 and told["error"]["code"] == "context_length_exceeded"
        assert "the prompt leaves 36 of the 40 tokens that this server keeps" in str(told)
        assert post(url, "/v1/completions", {**body, "n": 1, "max_tokens": 36})[0] == 200


def test_too_many_connections_are_refused_until_some_are_closed(
    run: RunFolder, loaded: LoadedRun
) -> None:
    with serving(run, loaded, max_connections=4) as url:
        host, port = url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(4)]
        time.sleep(0.1)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/health", timeout=30)
        assert caught.value.code == 503
        for each in idle:
            each.close()
        for _ in range(200):
            try:
                assert json.load(urllib.request.urlopen(f"{url}/health", timeout=30))
                return
            except urllib.error.HTTPError:
                time.sleep(0.05)
    raise AssertionError("closed connections still count")


# --- hostile clients -----------------------------------------------------------------------------


def raw(url: str, data: bytes, wait: float = 30.0) -> bytes:
    """What comes back for bytes on the wire, until the server closes or falls silent."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
                if b"\r\n\r\n" in found and b"100 Continue" not in found:
                    return found
        except TimeoutError:
            found += b"TIMEOUT"
        return found


def test_keys_hosts_types_and_sizes(run: RunFolder, loaded: LoadedRun) -> None:
    with serving(
        run, loaded, api_keys=(KEY,), max_body=2000, body_timeout=3.0, max_tokens=5
    ) as url:
        for key in ("wrong", "", KEY[:-1], KEY + "x"):
            with pytest.raises(openai.AuthenticationError, match="valid key"):
                OpenAI(base_url=f"{url}/v1", api_key=key or "x", max_retries=0).models.list()
        keyed = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert len(list(keyed.models.list())) == 3
        with pytest.raises(openai.BadRequestError, match="this server allows 5"):
            keyed.completions.create(model="base", prompt="a", max_tokens=6)
        with pytest.raises(openai.APIStatusError, match="over 2000 bytes"):
            keyed.completions.create(model="base", prompt="a" * 3000)
        assert urllib.request.urlopen(f"{url}/health", timeout=30).status == 200
        page = urllib.request.urlopen(f"{url}/", timeout=30)
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert KEY.encode() not in page.read()
        for path in (
            "/metrics",
            "/openapi.json",
            "/v1/votes",
            "/v1/run",
            "/../etc/passwd",
            "/page.css/..",
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(url + path, timeout=30)
            assert caught.value.code == 401
        auth = f"authorization: Bearer {KEY}\r\n".encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + auth
        typed = head + b"content-type: application/json\r\n"
        assert b" 415 " in raw(url, head + b"content-length: 2\r\n\r\n{}")
        assert b" 413 " in raw(url, typed + b"content-length: 99999999999\r\n\r\n{")
        assert b" 408 " in raw(url, typed + b"content-length: 50\r\n\r\n{")
        chunk = b"7d0\r\n" + b" " * 2000 + b"\r\n"
        assert b" 413 " in raw(url, typed + b"transfer-encoding: chunked\r\n\r\n" + chunk * 2)
        assert raw(url, b"POST /v1/comp", 20.0) == b""  # a head that never ends is cut off
        assert b" 400 " in raw(url, b"\x00\xff nonsense\r\n\r\n")
        assert keyed.models.retrieve("base").id == "base"


def test_without_keys_only_this_machine_s_names_are_heard(url: str) -> None:
    get = b"GET /v1/models HTTP/1.1\r\nhost: %s\r\n%s\r\n"
    assert b" 200 " in raw(url, get % (b"localhost:8000", b""))
    assert b" 403 " in raw(url, get % (b"evil.example", b""))
    assert b" 403 " in raw(url, get % (b"127.0.0.1", b"origin: https://evil.example\r\n"))
    assert b" 200 " in raw(url, get % (b"127.0.0.1", b"origin: http://127.0.0.1\r\n"))
    # Whole origins: the scheme, the port and what stands before the host count.
    for origin in (b"https://127.0.0.1", b"http://127.0.0.1:80", b"null", b"evil://127.0.0.1",
                   b"x://http://127.0.0.1", b"http://user@127.0.0.1"):  # fmt: skip
        assert b" 403 " in raw(url, get % (b"127.0.0.1", b"origin: %s\r\n" % origin)), origin


@pytest.mark.parametrize("length", [b"2", b"0", b"40"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/health"])
def test_two_lengths_of_one_body_are_refused(url: str, path: bytes, length: bytes) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % path
    both = b"content-length: %s\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" % length
    told = raw(url, head + both)
    assert b" 400 " in told
    assert b"connection: close" in told.lower()


def test_pages_of_allowed_origins_may_send_requests(run: RunFolder, loaded: LoadedRun) -> None:
    site = "https://chat.example"
    with serving(run, loaded, api_keys=(KEY,), allow_origins=(site,)) as url:

        def ask(method: str, origin: str, **headers: str) -> Any:
            more = {name.replace("_", "-"): value for name, value in headers.items()}
            request = urllib.request.Request(f"{url}/v1/models", headers={"origin": origin, **more})
            request.method = method
            try:
                return urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                return error

        preflight = {
            "access_control_request_method": "POST",
            "access_control_request_headers": "authorization,content-type,x-stainless-os",
        }
        allowed = ask("OPTIONS", site, **preflight)
        assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == site
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        key = {"authorization": f"Bearer {KEY}"}
        answered = ask("GET", site, **key)
        assert answered.status == 200 and answered.headers["access-control-allow-origin"] == site
        assert ask("GET", site).status == 401
        for other in ("https://chat.example.evil", "http://chat.example", "https://evil.example"):
            assert ask("GET", other, **key).status == 403
            assert "access-control-allow-origin" not in ask("OPTIONS", other, **preflight).headers


def test_a_client_that_never_reads_loses_its_place(run: RunFolder, loaded: LoadedRun) -> None:
    votes = run.root / "many.jsonl"
    votes.write_bytes(b"x" * (32 << 20))
    with serving(run, loaded, votes=votes, send_timeout=0.5, max_connections=3) as url:
        address = url.removeprefix("http://").split(":")
        silent = [socket.socket() for _ in range(2)]
        for each in silent:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect((address[0], int(address[1])))
            each.sendall(b"GET /v1/votes HTTP/1.1\r\nhost: localhost\r\n\r\n")
        time.sleep(4)
        assert len(urllib.request.urlopen(f"{url}/v1/votes", timeout=60).read()) == 32 << 20
        for each in silent:
            each.settimeout(10)
            found = 0
            with suppress(ConnectionResetError):
                while part := each.recv(1 << 20):
                    found += len(part)
            assert found < 32 << 20


@pytest.mark.parametrize(("size", "status"), [(1, b" 400 "), (3, b" 400 "), (4096, b" 200 ")])
def test_a_body_of_very_many_chunks_is_cut_short(url: str, size: int, status: bytes) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": 1}).encode().ljust(100_000)
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    found = raw(url, head + b"transfer-encoding: chunked\r\n\r\n" + data + b"0\r\n\r\n")
    assert status in found.split(b"\r\n")[0]


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"prompt": "\\ud800"}',
     b'{"prompt": [999999]}', b'{"prompt": [-1]}', b'{"prompt": []}', b'{"prompt": [[]]}',
     b'{"prompt": ["a", 1]}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "n": true}',
     b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b'{"prompt": "a", "model": "\\u0000"}',
     b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": "a", "logprobs": 21}'],
)  # fmt: skip
def test_broken_bodies_get_400(url: str, body: bytes) -> None:
    status, told = post(url, "/v1/completions", body)
    assert status in (400, 404), told
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in str(told) and "/chatllama/" not in str(told)


def test_time_runs_out(run: RunFolder, loaded: LoadedRun) -> None:
    with serving(run, loaded, timeout=0.001) as url:
        status, told = post(url, "/v1/completions", {"prompt": "a", "max_tokens": 200, "n": 32})
        assert status == 504 and told["error"]["code"] == "timeout"


def test_a_model_that_breaks_once_fails_one_request_and_no_other(
    run: RunFolder, loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(run, loaded) as url:
        asked = {"prompt": "the", "max_tokens": 4}
        with monkeypatch.context() as broken:
            broken.setattr(DecodingBatch, "step", lambda self: 1 / 0)
            status, told = post(url, "/v1/completions", asked)
        assert status == 500 and "division" not in str(told)
        assert post(url, "/v1/completions", asked)[0] == 200
        assert metric(url, "engine_errors_total") == 1


def test_it_stops_gracefully_while_it_answers(run: RunFolder, loaded: LoadedRun) -> None:
    told: list[Any] = []
    with serving(run, loaded, grace=300.0) as url:
        body = {"prompt": "the", "max_tokens": 150, "n": 16, "temperature": 0}
        thread = threading.Thread(target=lambda: told.append(post(url, "/v1/completions", body)))
        thread.start()
        while metric(url, "running") == 0 and not told:
            time.sleep(0.01)
    thread.join(60)
    assert told[0][0] == 200 and len(told[0][1]["choices"]) == 16
