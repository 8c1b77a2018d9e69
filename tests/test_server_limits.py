"""What happens to requests beyond the server's limits, and to those within them meanwhile."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import make_served_run, metric, post, serving

from chatllama.decoding_batch import DecodingBatch
from chatllama.loading import LoadedRun, load_run
from chatllama.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def loaded(run: RunFolder) -> LoadedRun:
    return load_run(run)


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
