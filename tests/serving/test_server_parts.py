"""The parts of the server that need no model and no connection."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chatllama import cli
from chatllama.config.sources import DataSource
from chatllama.inference.load import LoadedRun
from chatllama.serving import requests as calls
from chatllama.serving import server, votes
from chatllama.serving.errors import of_validation, shown
from chatllama.serving.metrics import Metrics
from chatllama.serving.schema import ChatRequest, CompletionRequest, Vote
from chatllama.serving.server import open_socket
from chatllama.serving.settings import ServerSettings, check_settings, serve_settings
from chatllama.serving.votes import VoteFile, vote_record
from chatllama.text.detokenizing import TokenTexts
from chatllama.text.encoding import encode
from chatllama.text.tokenizer import load_tokenizer
from data.reading.source import read_source

SETTINGS = ServerSettings(run=Path("runs/x"))
KEY = "k" * 16
ASK = [{"role": "user", "content": "hi"}]


def settings_of(argv: list[str]) -> ServerSettings:
    return serve_settings(cli._parse(["serve", "runs/x", *argv]))


# --- how it is started ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.com"])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(ValueError, match=f"--host {host} is open to other machines"):
        check_settings(replace(SETTINGS, host=host))
    check_settings(replace(SETTINGS, host=host, api_keys=(KEY,)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    check_settings(replace(SETTINGS, host=host))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_keys": ("short",)}, "--api-key: at least 16"),
        ({"api_keys": ("sixteen chars or more",)}, "without blanks"),
        ({"port": 70000}, "--port 70000"),
        ({"max_rows": 0}, "--max-concurrency 0"),
        ({"timeout": 0.0}, "--timeout"),
        ({"max_queue": -1}, "--max-queue -1"),
        ({"allow_origins": ("https://a.example",)}, "--allow-origin: without a key"),
        ({"allow_origins": ("a.example",), "api_keys": (KEY,)}, "--allow-origin a.example"),
        ({"allow_origins": ("https://a/b",), "api_keys": (KEY,)}, "without a path"),
        ({"allow_origins": ("*",), "api_keys": (KEY,)}, "expected http://HOST"),
        ({"allow_origins": ("ftp://a.example",), "api_keys": (KEY,)}, "expected http://HOST"),
        ({"adapter_root": Path("/nowhere/at/all")}, "--adapter-root /nowhere/at/all: not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(replace(SETTINGS, **changes))


def test_words_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of([]) == SETTINGS
    monkeypatch.setenv("CHATLLAMA_API_KEY", KEY)
    assert settings_of([]).api_keys == (KEY,)
    given = settings_of(
        ["--api-key", "a", "--api-key", "b", "--max-concurrency", "3", "--grace", "1"]
    )
    assert (given.api_keys, given.max_rows, given.grace) == (("a", "b"), 3, 1.0)
    weights = settings_of(["--dtype", "float16", "--quantization", "int8"])
    assert (weights.dtype, weights.quantization) == ("float16", "int8")


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1 port {port}.*--port 0"):
            open_socket(replace(SETTINGS, port=port))


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": None},
        {"response_format": {"type": "text"}, "store": False, "user": "me"},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": True},
    ],
)
def test_arguments_that_ask_for_nothing_are_accepted(extra: dict[str, Any]) -> None:
    ChatRequest.model_validate({"messages": ASK, **extra})


@pytest.mark.parametrize(
    "extra",
    [{"frequency_penalty": 0.1}, {"logit_bias": {"5": 1}}, {"echo": True}, {"best_of": 2},
     {"response_format": {"type": "json_object"}}, {"presence_penalty": False}],
)  # fmt: skip
def test_arguments_that_would_be_ignored_are_refused_by_name(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(extra))}: not supported"):
        CompletionRequest.model_validate({"prompt": "a", **extra})


def test_messages_in_openai_s_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    back = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None}
    asked = ChatRequest.model_validate({"messages": [*messages, back]})
    assert [message.plain() for message in asked.messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": image}]})


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_in_openai_s_four_forms(prompt: object, found: object) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts() == found


def test_errors_name_the_field_and_repeat_no_more_than_a_little() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [{"role": "tool", "content": "x"}], "q" * 500: 1})
    detail = of_validation(caught.value.errors()).detail  # type: ignore[arg-type]
    assert detail.param == "messages.0.role" and len(detail.message) < 400
    assert shown("a\x1b[2J\ud800") == "a\ufffd[2J\ufffd"


# --- tokens, metrics, votes ----------------------------------------------------------------------


def test_bytes_of_tokens_make_the_text(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    texts = TokenTexts(tokenizer)
    text = "the river 🙂 naïve\n  x"
    ids = encode(tokenizer, text)
    assert b"".join(map(texts.bytes_of, ids)).decode() == " " + text
    assert texts.text_of(2) == "</s>"
    assert texts.longest >= len("river")


def test_metrics_in_prometheus_format() -> None:
    metrics = Metrics()
    metrics.request("/health", 200)
    metrics.request("/health", 200)
    metrics.count("generated_tokens", 7)
    for seconds in (0.02, 0.05, 400.0):
        metrics.observe("request_seconds", seconds)
    text = metrics.text(running=3)
    lines = text.splitlines()
    assert 'chatllama_requests_total{path="/health",status="200"} 2.0' in lines
    assert "chatllama_generated_tokens_total 7.0" in lines and "chatllama_running 3.0" in lines
    assert "chatllama_votes_total 0.0" in lines and "_created" not in text
    assert "# TYPE chatllama_votes_total counter" in lines
    assert "# HELP chatllama_running Answers being decoded." in lines
    assert not [line for line in lines if "chatllama_" not in line]  # nothing of the process
    for limit, count in (("0.01", 0), ("0.025", 1), ("0.05", 2), ("300.0", 2), ("+Inf", 3)):
        assert f'chatllama_request_seconds_bucket{{le="{limit}"}} {count}.0' in lines
    assert "chatllama_request_seconds_count 3.0" in lines
    assert "chatllama_request_seconds_sum 400.07" in lines
    assert 'path="/health"' not in Metrics().text()  # each server counts for itself


def test_votes_are_records_that_the_reward_stage_reads(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "deep" / "votes.jsonl")
    for number, verdict in enumerate(("a", "b", "tie", "both_bad")):
        vote = Vote.model_validate(
            {
                "messages": [{"role": "system", "content": "be kind"}, *ASK],
                "answers": [f"first {number}", f"second {number}"],
                "models": ["sft", "policy"],
                "verdict": verdict,
            }
        )
        assert file.append(vote_record(vote)) == number + 1
    source = DataSource(path=str(tmp_path / "deep" / "votes.jsonl"))
    data, report = read_source(source, "preferences")
    assert data["answers"][:] == [["first 0", "second 0"], ["second 1", "first 1"]]
    assert data["prompt"][0][0]["content"] == "be kind"
    assert "all answers are tied" in str(report.__dict__)
    assert json.loads(file.content().splitlines()[1])["models"] == ["policy", "sft"]


def vote(**changes: Any) -> Vote:
    body = {"messages": ASK, "answers": ["x", "y"], "models": ["sft", "policy"], "verdict": "a"}
    return Vote.model_validate(body | changes)


def test_votes_are_counted_without_reading_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_bytes(b"{}\n" * 5)
    file = VoteFile(path)
    assert [file.append(vote_record(vote())) for _ in range(2)] == [6, 7]
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))  # counted before, not read again
    with path.open("ab") as other:
        other.write(b"{}\n" * 3)
    assert file.append(vote_record(vote())) == 11
    path.unlink()
    assert file.append(vote_record(vote())) == 1
    monkeypatch.setattr(votes, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="the file of votes is full"):
        file.append(vote_record(vote()))
    assert file.content().count(b"\n") == 1


def test_votes_are_tallied_by_model(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    assert VoteFile(path).tally() == {"votes": 0, "better": {}, "tie": 0, "both_bad": 0}
    path.write_text('{"verdict": "a"}\n[[\n{"models": ["x", "y"], "verdict": "c"}\n')
    file = VoteFile(path)
    for verdict in ("a", "b", "b", "tie", "both_bad"):
        file.append(vote_record(vote(verdict=verdict)))
    found = {"votes": 8, "better": {"sft": 1, "policy": 2}, "tie": 1, "both_bad": 1}
    assert file.tally() == VoteFile(path).tally() == file.tally() == found
    with path.open("a") as other:
        other.write('{"models": ["sft", "policy"], "verdict": "a"}')  # no end of the line yet
    assert file.tally() == found
    with path.open("a") as other:
        other.write("\n")
    assert file.tally() == found | {"votes": 9, "better": {"sft": 2, "policy": 2}}
    path.unlink()
    assert file.tally()["votes"] == 0
    file.append(vote_record(vote(verdict="tie")))
    assert file.tally() == {"votes": 1, "better": {}, "tie": 1, "both_bad": 0}


@pytest.mark.parametrize("content", ["", "  \n", [{"type": "text", "text": ""}]])
def test_a_vote_with_an_empty_turn_is_refused(content: Any) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}, *ASK]
    with pytest.raises(ValidationError, match="message 0 is empty"):
        vote(messages=turns)


@pytest.mark.parametrize("answers", [["", "a"], ["a", " \n"], ["\t", "\u3000"]])
def test_a_vote_on_an_empty_answer_is_refused(answers: list[str]) -> None:
    with pytest.raises(ValidationError, match="an answer is empty"):
        vote(answers=answers)


@pytest.mark.parametrize("answers", [["a", "a"], ["a", " a\n"]])
def test_equal_answers_can_only_be_tied(answers: list[str]) -> None:
    for verdict in ("a", "b"):
        with pytest.raises(ValueError, match="both answers are the same"):
            vote_record(vote(answers=answers, verdict=verdict))
    assert [vote_record(vote(answers=answers, verdict=tie))["ranks"]
            for tie in ("tie", "both_bad")] == [[0, 0]] * 2  # fmt: skip


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b"])
def test_a_vote_is_one_line_to_every_reader(tmp_path: Path, text: str) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote_record(vote(answers=[text, "y"])))
    (line,) = file.content().decode().splitlines()
    assert json.loads(line)["answers"] == [text, "y"]


# --- clients that do not read --------------------------------------------------------------------


class Wire:
    """A connection whose client stops reading, or leaves, after the first bytes."""

    def __init__(self, leaves: bool) -> None:
        self.leaves, self.sent = leaves, 0

    async def receive(self) -> dict[str, Any]:
        while not (self.leaves and self.sent):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent += message["type"] == "http.response.body"
        if self.sent:
            await asyncio.sleep(3600)


@pytest.mark.parametrize(("leaves", "counted"), [(True, "disconnects"), (False, "timeouts")])
def test_a_stream_that_nobody_reads_ends_with_its_work(
    leaves: bool, counted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SEND_SLACK", 0.2)
    metrics, closed = Metrics(), []

    async def events() -> AsyncIterator[str]:
        while True:
            yield "{}"

    stream = calls.EventStream(events(), lambda: closed.append(True), metrics, 0.1)
    wire = Wire(leaves)
    asyncio.run(stream({"type": "http"}, wire.receive, wire.send))
    assert closed == [True] and f"chatllama_{counted}_total 1.0" in metrics.text()


@pytest.mark.parametrize(
    ("day", "shown"),
    [(None, "2024-01-02"), ("2030-05-06", "2030-05-06"), ("1999-12-31", "1999-12-31")],
)
def test_the_server_may_be_given_another_day_than_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, day: str | None, shown: str
) -> None:
    text = "run_dir: r\nbackbone: {path: m}\nchat: {template: tokenizer, date: 2024-01-02}\n"
    (tmp_path / "config.yaml").write_text(text)
    nothing: Any = None

    def service(_: object, loaded: LoadedRun) -> None:
        assert (loaded.chat.date, loaded.config.chat.date) == (shown, "2024-01-02")
        raise RuntimeError("opened")

    monkeypatch.setattr(
        server, "load_run", lambda _, cfg, **more: LoadedRun(nothing, nothing, cfg.chat, cfg, [])
    )
    monkeypatch.setattr(server, "describe_model", lambda *_: "")
    monkeypatch.setattr(server, "Service", service)
    with pytest.raises(RuntimeError, match="opened"):
        server.serve(ServerSettings(run=tmp_path, port=0, date=day))
    with pytest.raises(ValueError, match="date"):
        server.serve(ServerSettings(run=tmp_path, port=0, date="soon"))
