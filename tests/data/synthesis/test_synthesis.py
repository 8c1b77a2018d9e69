"""`chatllama data generate` against a small endpoint of our own on this machine."""

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_stub import Answer, Stub, endpoint_stub

from chatllama import cli
from chatllama.config.sources import DataSource
from chatllama.runtime.http_client import HttpClient
from data.reading.source import read_source
from data.similarity import Pool, rouge_l
from data.synthesis import command as synthesis_command
from data.synthesis.client import BadReply, Endpoint, EndpointError, Pace
from data.synthesis.command import estimate_answers, estimate_prompts
from data.synthesis.judging import verdict
from data.synthesis.ledger import OutputFile
from data.synthesis.options import SynthesisOptions

pytestmark = pytest.mark.usefixtures("data_cache")


@pytest.fixture
def stub() -> Iterator[Stub]:
    with endpoint_stub() as stub:
        yield stub


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture
def grow(stub: Stub, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on three prompts; the exit code."""
    rows = [{"prompt": text} for text in ("Name a river.", "Name a tree.", "Name a bird.")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(what: str, *words: str, yes: bool = True) -> int:
        command = ["data", "generate", what, "--file", str(tmp_path / "prompts.jsonl")]
        command += ["--out", str(tmp_path / "out.jsonl"), "--url", stub.url, "--model", "m"]
        return cli.main([*command, *(["--yes"] if yes else []), *words])

    return run


# --- similarity


def test_rouge_by_hand() -> None:
    # "the cat on mat" is common: 4 of 6 and 5 words.
    one, other = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "mat"]
    assert rouge_l(one, other) == rouge_l(other, one) == pytest.approx(2 * 4 / 11)
    assert rouge_l(one, one) == 1 and rouge_l(one, ["dog"]) == rouge_l([], one) == 0
    assert rouge_l(list("abcbdab"), list("bdcaba")) == pytest.approx(8 / 13)  # bcba


def test_pool_refuses_what_is_similar() -> None:
    pool = Pool(0.7, ["Name a big river in Europe."])
    assert not pool.add("name a river in europe")  # 2 * 5 / 11
    assert pool.add("Explain why leaves are green.")
    assert not pool.add("Explain why the leaves are green.")
    assert pool.add("Name a tree.") and pool.add("\u6211\u4eec\u53bb\u5317\u4eac")
    assert not pool.add("\u6211\u4eec\u53bb\u5357\u4eac")  # 4 of 5 characters


# --- the endpoint


def endpoint(stub: Stub, waits: list[float], **options: Any) -> Endpoint:
    options = {"retries": 6, "sleep": waits.append, "proxies": True} | options
    return Endpoint(HttpClient(stub.url, "secret", 30, **options), "m")


ASK: list[dict[str, str]] = [{"role": "user", "content": "Hello"}]


def test_what_is_sent_and_what_comes_back(stub: Stub) -> None:
    reply = endpoint(stub, []).chat(ASK, temperature=0.5, max_tokens=7)
    assert (reply.text, reply.fault) == ("Fine.", None)
    assert (reply.prompt_tokens, reply.completion_tokens) == (10, 3)
    assert stub.asked == [{"model": "m", "messages": ASK, "temperature": 0.5, "max_tokens": 7}]
    assert stub.headers[0]["path"] == "/v1/chat/completions"
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    stub.finish = "length"
    cut = endpoint(stub, []).chat(ASK, temperature=0.5, max_tokens=7)
    assert cut.fault == "cut at max_tokens"


def test_busy_and_broken_servers_are_asked_again(stub: Stub) -> None:
    answers: list[Answer] = [(429, {"Retry-After": "7"}, b"slow"), (503, {}, b""), "At last."]
    stub.reply = lambda body: answers.pop(0)
    waits: list[float] = []
    assert endpoint(stub, waits).chat(ASK, temperature=1, max_tokens=7).text == "At last."
    assert waits[0] == 7 and 1 <= waits[1] <= 2 and len(waits) == 2
    stub.reply = lambda body: (500, {}, b'{"error": {"message": "out of memory"}}')
    waits.clear()
    with pytest.raises(EndpointError, match=r"HTTP 500 .*: out of memory \(given up after 4 tries"):
        endpoint(stub, waits, retries=3).chat(ASK, temperature=1, max_tokens=7)
    assert len(waits) == 3
    nowhere = Endpoint(
        HttpClient("http://127.0.0.1:9/v1", None, 5, retries=1, sleep=waits.append), "m"
    )
    with pytest.raises(EndpointError, match=r"refused.*given up after 2 tries"):
        nowhere.chat(ASK, temperature=1, max_tokens=7)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b'{"error": "no such key"}'), "HTTP 401 Unauthorized: no such key"),
        ((404, {}, b"<html>"), "HTTP 404 Not Found: <html>"),
        ((302, {"Location": "http://elsewhere.invalid/"}, b""), "HTTP 302"),
        ((405, {}, b""), "HTTP 405 Method Not Allowed"),
    ],
)
def test_what_no_second_try_cures(stub: Stub, answer: Answer, message: str) -> None:
    stub.reply = lambda body: answer
    with pytest.raises(EndpointError, match=message):
        endpoint(stub, []).chat(ASK, temperature=1, max_tokens=7)
    assert len(stub.asked) == 1


GOOD = {"choices": [{"message": {"content": "Fine."}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"error": {"message": "overloaded", "code": 503}}', "overloaded"),
        (b'{"error": "no capacity", "choices": []}', "no capacity"),
        (json.dumps(GOOD | {"error": "cut off"}).encode(), "cut off"),
        (json.dumps(GOOD).replace("stop", "error").encode(), '{"choices": '),
        (b"hello", "hello"),
        (b'{"choices": []}', '{"choices": '),
        (b"[]", ""),
        (b"[" * 100_000, "["),
        (b'{"choices": [{"message": {"content": 5}}]}', '{"choices": '),
        (json.dumps(GOOD | {"usage": {"prompt_tokens": float("inf")}}).encode(), '{"choices": '),
    ],
)
def test_http_200_without_an_answer_is_tried_again(stub: Stub, bad: bytes, message: str) -> None:
    answers: list[Answer] = [(200, {}, bad), (200, {}, bad), "At last."]
    stub.reply = lambda body: answers.pop(0)
    waits: list[float] = []
    assert endpoint(stub, waits).chat(ASK, temperature=1, max_tokens=7).text == "At last."
    assert len(waits) == 2
    stub.reply = lambda body: (200, {}, bad)
    expected = re.escape(f"/chat/completions: this is no chat completion: {message}")
    with pytest.raises(BadReply, match=expected) as caught:
        endpoint(stub, waits, retries=1).chat(ASK, temperature=1, max_tokens=7)
    assert str(caught.value).endswith("(given up after 2 tries)")


@pytest.mark.parametrize(
    "complaint",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        "max_tokens is deprecated, use max_completion_tokens",
        "this model knows max_completion_tokens only",
    ],
)
def test_the_newer_name_of_the_limit_is_used_where_the_older_is_refused(
    stub: Stub, complaint: str
) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        if "max_tokens" in body:
            return (400, {}, json.dumps({"error": {"message": complaint}}).encode())
        return "Fine."

    stub.reply = reply
    model = endpoint(stub, [])
    for _ in range(2):
        assert model.chat(ASK, temperature=1, max_tokens=7).text == "Fine."
    assert [body.get("max_completion_tokens") for body in stub.asked] == [None, 7, 7]
    # A model that refuses both is asked once with each.
    stub.reply, before = lambda body: (400, {}, b"max_completion_tokens: 7"), len(stub.asked)
    with pytest.raises(BadReply, match="HTTP 400"):
        endpoint(stub, []).chat(ASK, temperature=1, max_tokens=7)
    assert len(stub.asked) - before == 2


def test_pace_by_hand() -> None:
    now, waits = [100.0], []
    pace = Pace(30, clock=lambda: now[0], sleep=waits.append)
    for _ in range(3):
        pace.wait()
    now[0] = 200.0
    pace.wait()
    assert waits == [2.0, 4.0]


# --- the three steps


def test_prompts_grow_until_there_are_enough(
    stub: Stub, grow: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = iter(range(1000))

    def reply(body: dict[str, Any]) -> str:
        i = next(number)
        topic = "".join(chr(97 + int(digit)) for digit in str(i))
        why, sing = f"Why is {topic} {topic}x like {topic}y?", f"Sing {topic}z {topic}q now"
        return f"Sure:\n1. Name a river.\n2. {why}\n3. hm\nx\n4) {sing}"

    stub.reply = reply
    assert grow("prompts", "--num", "5", "--parallel", "2") == 0
    out = tmp_path / "out.jsonl"
    made = [line["prompt"] for line in lines(out)]
    assert len(made) == 5 and "Name a river." not in made
    outcomes: Counter[str] = Counter()
    for entry in lines(tmp_path / "out.jsonl.ledger"):
        outcomes.update(entry["outcomes"])
    assert outcomes["kept"] == 5 and outcomes["similar"] >= 3
    assert outcomes["too short or long"] >= 2
    asked = stub.asked[0]["messages"][0]["content"]
    assert "3 instructions" in asked and all(
        f"Name a {what}." in asked for what in ("river", "tree")
    )
    assert "5 records" in capsys.readouterr().err
    # Two more, from where it was.
    assert grow("prompts", "--num", "7", "--parallel", "1") == 0
    assert [line["prompt"] for line in lines(out)][:5] == made and len(lines(out)) == 7
    assert read_source(DataSource(path=str(out)), "prompts")[1].num_kept == 7


def test_a_model_without_ideas_stops(
    stub: Stub, grow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda body: "1. Name a river.\n2. Name a tree."
    assert grow("prompts", "--num", "4", "--parallel", "1") == 2
    assert len(stub.asked) == 10
    assert "10 requests in a row gave no new instruction (0 of 4" in capsys.readouterr().err


def test_answers_go_on_where_they_stopped(
    stub: Stub, grow: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        return (403, {}, b"not today") if "tree" in asked else f"On {asked}"

    stub.reply = reply
    assert grow("answers", "--parallel", "1") == 2
    told = capsys.readouterr()
    assert "not today" in told.err and "the same command continues from here" in told.err
    out = tmp_path / "out.jsonl"
    assert [line["completion"] for line in lines(out)] == ["On Name a river."]
    # A line that was being written when the power failed.
    with out.open("a") as stream:
        stream.write('{"id": 1, "prom')
    stub.reply, before = lambda body: "Here.", len(stub.asked)
    assert grow("answers") == 0
    assert len(stub.asked) - before == 2
    assert {line["id"]: line["completion"] for line in lines(out)} == {
        0: "On Name a river.", 1: "Here.", 2: "Here.",
    }  # fmt: skip
    assert grow("answers") == 0 and len(stub.asked) - before == 2
    data, report = read_source(DataSource(path=str(out)), "sft")
    assert (len(data), report.format) == (3, "prompt_completion")
    assert grow("answers", "--temperature", "0.5") == 2
    assert "temperature was 1.0, is 0.5" in capsys.readouterr().err


def test_cut_and_empty_answers_are_not_kept(
    stub: Stub, grow: Callable[..., int], tmp_path: Path
) -> None:
    stub.finish = "length"
    assert grow("answers", "--num", "2") == 0
    stub.finish, stub.reply = "stop", lambda body: " "
    assert grow("answers", "--num", "2") == 0 and len(stub.asked) == 2  # decided
    assert grow("answers", "--num", "3") == 2  # another choice of prompts is another file
    assert grow("answers", "--out", str(tmp_path / "more.jsonl")) == 0
    more = lines(tmp_path / "more.jsonl.ledger")
    assert [entry["outcomes"] for entry in more] == [{"empty": 1}] * 3
    ledger = lines(tmp_path / "out.jsonl.ledger")
    assert [entry["outcomes"] for entry in ledger] == [{"cut at max_tokens": 1}] * 2
    assert not (tmp_path / "out.jsonl").read_text()


def completion(text: str, finish: str = "stop") -> Answer:
    """The answer as JSON with escapes only, as many servers send it."""
    choice = {"message": {"content": text}, "finish_reason": finish}
    return (200, {}, json.dumps({"choices": [choice]}).encode())


REFUSED = json.dumps({"error": {"message": "policy", "code": "content_filter"}}).encode()


@pytest.mark.parametrize(
    ("bad", "outcome", "requests"),
    [
        (completion("", "content_filter"), "content filter", 1),
        (completion("I will", "content_filter"), "content filter", 1),
        ((400, {}, REFUSED), "content filter", 1),
        (completion("Oak \ud83d"), "half surrogates", 1),
        (completion("\udc00 oak"), "half surrogates", 1),
        (completion("oak \ude00\ud83d"), "half surrogates", 1),
        ((400, {}, b"too long"), "failed", 0),
        ((422, {}, b""), "failed", 0),
        ((500, {}, b"out of memory"), "failed", 0),
        ((200, {}, b'{"error": "broken"}'), "failed", 0),
    ],
)
@pytest.mark.parametrize("what", ["answers", "pairs"])
def test_one_bad_reply_never_ends_the_command(
    what: str, bad: Answer, outcome: str, requests: int,
    stub: Stub, grow: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    count = iter(range(1000))

    def reply(body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        if "[Answer A]" in asked:
            return "A" if asked.index("Answer 1") < asked.index("Answer 2") else "B"
        return bad if "tree" in asked else f"Answer {next(count) % 2 + 1}"

    stub.reply = reply
    words = ("--retries", "0", "--parallel", "1")
    assert grow(what, *words) == 0
    out = tmp_path / "out.jsonl"
    assert [line["id"] for line in lines(out)] == [0, 2]
    ledger = lines(tmp_path / "out.jsonl.ledger")
    assert [entry["outcomes"] for entry in ledger] == [{"kept": 1}, {outcome: 1}, {"kept": 1}]
    assert ledger[1]["requests"] == (2 if requests and what == "pairs" else requests)
    said = capsys.readouterr().err
    assert f"1 {outcome}" in said
    # What failed is tried again by the same command, the rest is decided.
    assert ("1 prompts failed, and the same command tries them again" in said) == (requests == 0)
    stub.asked.clear()
    assert grow(what, *words) == 0 and bool(stub.asked) == (requests == 0)


def slowly() -> bytes:
    time.sleep(1.5)
    return b""


SILENCES = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", b"no HTTP at all\r\n\r\n"]


@pytest.mark.parametrize(
    ("silence", "place", "what"),
    [*itertools.product(SILENCES, (0, 1, 2), ("answers", "pairs")), (slowly, 0, "answers")],
)
def test_a_prompt_without_any_http_answer_is_passed_over_and_counted(
    silence: Answer, place: int, what: str,
    stub: Stub, grow: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(synthesis_command, "TIMEOUT", 1.0)
    silent, count = ("river", "tree", "bird")[place], iter(range(1000))

    def reply(body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        if "[Answer A]" in asked:
            return "A" if asked.index("Answer 1") < asked.index("Answer 2") else "B"
        return silence if silent in asked else f"Answer {next(count) % 2 + 1}"

    stub.reply = reply
    words = ("--retries", "0", "--parallel", "1")
    assert grow(what, *words) == 0
    out = tmp_path / "out.jsonl"
    assert [line["id"] for line in lines(out)] == [i for i in range(3) if i != place]
    assert "1 failed" in (said := capsys.readouterr().err)
    assert "1 prompts failed, and the same command tries them again" in said
    silent = "nothing"
    assert grow(what, *words) == 0 and {line["id"] for line in lines(out)} == {0, 1, 2}


def test_what_failed_before_comes_last(stub: Stub, grow: Callable[..., int]) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        return "Oak." if "bird" not in body["messages"][0]["content"] else (401, {}, b"")

    stub.reply = lambda body: b"" if "river" in body["messages"][0]["content"] else reply(body)
    words = ("--retries", "0", "--parallel", "1")
    assert grow("answers", *words) == 2  # the key does not hold for birds
    stub.asked.clear()
    stub.reply = lambda body: "Oak."
    assert grow("answers", *words) == 0
    asked = [body["messages"][0]["content"] for body in stub.asked]
    assert asked == ["Name a bird.", "Name a river."]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://nowhere.invalid/v1"])
@pytest.mark.parametrize("what", ["answers", "pairs", "prompts"])
def test_an_endpoint_that_was_never_there_ends_the_command_at_once(
    url: str, what: str, stub: Stub, grow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--retries", "0", "--parallel", "1", "--num", "3", "--url", url)
    assert grow(what, *words) == 2
    said = capsys.readouterr().err
    assert said.count(f"{url}/chat/completions: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize("after", [1, 5])
def test_an_endpoint_that_falls_silent_ends_the_command(
    after: int, stub: Stub, grow: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    stub.reply = lambda body: "Fine." if len(stub.asked) <= after else b""
    words = ("--file", str(many), "--retries", "0", "--parallel", "1")
    assert grow("answers", *words) == 2
    assert "10 prompts in a row failed" in capsys.readouterr().err
    assert len(stub.asked) <= after + 11 and len(lines(tmp_path / "out.jsonl")) == after


def test_an_endpoint_that_always_fails_ends_the_command(
    stub: Stub, grow: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda body: (400, {}, b"temperature must be 1")
    assert grow("answers", "--parallel", "1") == 2
    said = capsys.readouterr().err
    assert said.count("temperature must be 1") == 3
    assert "3 prompts in a row failed" in said and len(stub.asked) == 3
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    words = ("--file", str(many), "--out", str(tmp_path / "b.jsonl"), "--parallel", "1")
    assert grow("answers", *words) == 2
    assert "10 prompts in a row failed" in capsys.readouterr().err and len(stub.asked) <= 15


@pytest.mark.parametrize(
    ("bad", "outcome"),
    [
        (completion("1. Why is grass green here?", "content_filter"), "content filter"),
        (completion("1. Why is grass \ud83d green?"), "half surrogates"),
        ((400, {}, b"no"), "failed"),
        (b"", "failed"),
    ],
)
def test_one_bad_reply_never_ends_prompts(
    bad: Answer, outcome: str, stub: Stub, grow: Callable[..., int], tmp_path: Path
) -> None:
    answers = [bad, completion("1. Why is the sky blue?\n2. Count to five in French.")]
    stub.reply = lambda body: answers.pop(0)
    assert grow("prompts", "--num", "2", "--parallel", "1", "--retries", "0") == 0
    assert len(lines(tmp_path / "out.jsonl")) == 2
    ledger = lines(tmp_path / "out.jsonl.ledger")
    assert [entry["outcomes"] for entry in ledger] == [{outcome: 1}, {"kept": 2}]


def test_pairs_need_one_verdict_in_both_orders(
    stub: Stub, grow: Callable[..., int], tmp_path: Path
) -> None:
    count = iter(range(1000))

    def reply(body: dict[str, Any]) -> str:
        asked = body["messages"][0]["content"]
        if "[Answer A]" not in asked:
            return f"{'short' if next(count) % 2 else 'a long answer'} to: {asked}"
        assert body["model"] == "j" and body["temperature"] == 0
        if "tree" in asked:
            return "A"  # whatever comes first
        if "bird" in asked:
            return "I cannot say."
        return "Answer " + ("A" if asked.index("long answer") < asked.index("short") else "B")

    stub.reply = reply
    assert grow("pairs", "--judge-model", "j", "--parallel", "1") == 0
    out = tmp_path / "out.jsonl"
    (pair,) = lines(out)
    assert pair["chosen"].startswith("a long answer") and pair["rejected"].startswith("short")
    outcomes = [entry["outcomes"] for entry in lines(tmp_path / "out.jsonl.ledger")]
    assert outcomes == [{"kept": 1}, {"tied": 1}, {"no verdict": 1}]
    assert len(stub.asked) == 12
    assert read_source(DataSource(path=str(out)), "preferences")[1].format == "preference"
    assert grow("pairs", "--judge-model", "j") == 0 and len(stub.asked) == 12


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("B.", "B"), ("**C**", "C"), ("Answer A is wrong.\nB", "B"), ("A or B", None),
     ("BAD", None), ("", None), ("A rhyme is missing, B has none.\nMy verdict: [[A]]", "A"),
     ("A good answer is missing.", None), ("A is better", "A"), ("C: both are fine", "C")],
)  # fmt: skip
def test_verdicts(text: str, letter: str | None) -> None:
    assert verdict(text) == letter


# --- before it starts


def test_the_cost_is_told_and_agreed_to(
    stub: Stub,
    grow: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert grow("answers", yes=False) == 2
    told = capsys.readouterr()
    assert "about 3 requests" in told.err and "at most 3072 tokens from it" in told.err
    assert "price unknown" in told.err and "give --yes" in told.err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert grow("answers", "--price-in", "1", "--price-out", "1000", yes=False) == 2
    assert "at most about $3.07" in capsys.readouterr().err
    assert stub.asked == []
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert grow("answers", "--price-in", "1", "--price-out", "1000", yes=False) == 0
    # 3 requests of 10 tokens to the model and 3 from it: $.00003 + $.009
    assert "3 requests, 30 tokens to the model, 9 from it, $0.01" in capsys.readouterr().err


def test_estimates_by_hand() -> None:
    prompts = [[{"role": "user", "content": "one two three four five"}]] * 4  # 1.4 tokens a word
    answers = estimate_answers(prompts, 100, pairs=False)
    assert (answers.requests, answers.prompt_tokens, answers.completion_tokens) == (4, 28, 400)
    pairs = estimate_answers(prompts, 100, pairs=True)
    assert pairs.requests == 16 and pairs.completion_tokens == 1600
    assert pairs.prompt_tokens > 2 * 28 + 2 * 800
    assert estimate_prompts(["a b c"], 10, 100).requests == 3
    words: dict[str, Any] = {"what": "pairs", "file": "", "out": Path(), "url": "", "model": "m"}
    options = SynthesisOptions(**words, price_in=2.0, price_out=4.0)
    assert options.dollars(1e6, 5e5) == 4.0
    assert replace(options, price_out=None).dollars(1, 1) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts"], "--num: say how many"),
        (["answers", "--parallel", "0"], "--parallel 0: must be at least 1"),
        (["answers", "--similarity", "2"], "--similarity 2.0: must be at least 0.05 and at most 1"),
        (["answers", "--per-minute", "0"], "--per-minute 0.0: must be above 0"),
        (["answers", "--format", "xml"], "--format xml: known are alpaca"),
        (["pairs", "--temperature", "0"], "pairs of equal answers"),
        (["answers", "--out", "x.json"], "name it .jsonl"),
        (["answers", "--url", "ftp://x"], "ftp://x: expected an address"),
        (["answers", "--file", "none.jsonl"], "no data file 'none.jsonl'"),
    ],
)
def test_mistakes(
    words: list[str], message: str, grow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert grow(*words) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ValueError, match=r"exists, without out.jsonl.settings.json"):
        OutputFile(out, {})
    assert out.read_text() == "mine\n"
