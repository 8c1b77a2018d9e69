"""`chatllama judge`: answers of files and models, judged by functions, votes and an endpoint."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_stub import Stub, endpoint_stub
from generation_runs import make_run
from serving_setup import serving
from tiny_models import tiny_llama

from chatllama import cli
from chatllama.inference.folders import find_model
from chatllama.inference.load import load_run
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import Message
from chatllama.text.encoding import encode
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer
from trainers.functions.sample import Sample
from trainers.judging.reward_model import RewardModel
from trainers.judging.sides import sample_of

pytestmark = pytest.mark.usefixtures("data_cache")

ASKED = re.compile(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nReply", re.DOTALL)
Judge = Callable[..., int]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def stub() -> Iterator[Stub]:
    with endpoint_stub() as stub:
        yield stub


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Compares two files of 24 answers, the second's every other one longer; the exit code."""
    for name, texts in (
        ("first", [f"plain {i}" for i in range(24)]),
        ("second", [f"other {i}" + " and more" * (i % 2) for i in range(24)]),
    ):
        records = [{"id": i, "prompt": f"Say {i}.", "response": t} for i, t in enumerate(texts)]
        write(tmp_path / f"{name}.jsonl", records)

    def run(*words: str, out: str = "out") -> int:
        files = [str(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
        return cli.main(["judge", *files, "--out", str(tmp_path / out), *words])

    return run


@pytest.fixture
def ask(judge: Judge, stub: Stub) -> Judge:
    """The same by the stub."""

    def run(*words: str, yes: bool = True) -> int:
        model = ["--judge-url", stub.url, "--judge-model", "m/1", "--parallel", "1"]
        return judge(*model, *(["--yes"] if yes else []), *words)

    return run


def verdicts(decide: Callable[[str, str], str]) -> Callable[[dict[str, Any]], str]:
    """A judge that decides from the two texts that it is shown."""

    def reply(body: dict[str, Any]) -> str:
        match = ASKED.search(body["messages"][0]["content"])
        assert match is not None and body["temperature"] == 0
        return decide(*match.groups())

    return reply


def test_a_judge_that_takes_whatever_comes_first_is_found_out(
    ask: Judge, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda body: "A"
    assert ask() == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    assert found["win_rate"]["value"] == 0.5 and found["ties"] == 24
    assert found["position"]["first_shown"]["value"] == 1.0
    assert found["position"]["consistent"]["value"] == 0.0
    assert len(stub.asked) == found["requests"] == found["verdicts"] == 48
    assert (found["prompt_tokens"], found["completion_tokens"]) == (480, 144)
    assert "first shown wins   100.0 %" in capsys.readouterr().out


def test_a_judge_that_likes_length_is_found_out(ask: Judge, stub: Stub, tmp_path: Path) -> None:
    def longer(one: str, two: str) -> str:
        if len(one) == len(two):
            return "Neither.\n[[C]]"
        return "[[A]]" if len(one) > len(two) else "[[B]]"

    stub.reply = verdicts(longer)
    assert ask() == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    assert found["wins"] == 12 and found["ties"] == 12
    assert found["win_rate"]["low"] > 0.6
    assert found["longer_preferred"]["value"] == 1.0
    assert found["length_controlled"]["coefficient"]["low"] > 1
    controlled = found["length_controlled"]["win_rate"]
    assert controlled["low"] < 0.6 and controlled["value"] < found["win_rate"]["value"]
    assert found["position"]["consistent"]["value"] == 1.0


def test_the_right_side_wins_in_both_orders(ask: Judge, stub: Stub, tmp_path: Path) -> None:
    stub.reply = verdicts(lambda one, two: "B" if two.startswith("other") else "A")
    assert ask("--limit", "5") == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    assert found["wins"] == found["comparisons"] == 5 and found["losses"] == 0
    assert found["position"]["first_shown"]["value"] == 0.5
    (first, *_) = lines(tmp_path / "out/judge-comparisons.jsonl")
    assert first["first"] == "plain 0" and first["second"] == "other 0" and first["outcome"] == 1
    assert first["verdicts"] == ["B", "A"]


def test_what_cannot_be_read_is_counted_and_left_out(
    ask: Judge, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda body: "I like both." if "plain 3" in str(body) else "C"
    assert ask("--limit", "6") == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    assert (found["unreadable"], found["left_out"], found["comparisons"]) == (2, 1, 5)
    assert "not read           2 of 12" in capsys.readouterr().out
    stub.reply = lambda body: "Hm."
    assert ask("--limit", "2", "--judge-prompt", str(prompt_file(tmp_path))) == 2
    assert "decided none of 2 comparisons" in capsys.readouterr().err


def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("{question}? {curly} <{answer_a}> <{answer_b}>")
    return path


def test_replies_are_kept_and_never_paid_for_twice(
    ask: Judge, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> Any:
        if len(stub.asked) > 20:
            return (401, {}, b"no credit left")
        return (503, {}, b"busy") if len(stub.asked) == 3 else "A"

    stub.reply = reply
    prices = ("--price-in", "1000", "--price-out", "2000", "--retries", "2")
    assert ask("--judge-max-tokens", "9", *prices) == 2
    said = capsys.readouterr().err
    assert "about 48 requests" in said and "at most 432 tokens from it" in said
    assert "at most about $" in said and "19 replies are kept" in said
    cache = tmp_path / "out/judge-m-1.jsonl"
    with cache.open("a") as file:
        file.write('{"asked": "torn')  # killed while it wrote
    stub.reply = lambda body: "A"
    assert ask("--judge-max-tokens", "9", *prices) == 0
    assert len(stub.asked) == 21 + 29 and len(lines(cache)) == 48
    said = capsys.readouterr().err
    assert "19 of 48 replies are there" in said and "about 29 requests" in said
    assert "48 requests, 480 tokens to the model, 144 from it, $0.77" in said
    assert ask("--judge-max-tokens", "9", yes=False) == 0 and len(stub.asked) == 50
    assert ask("--judge-max-tokens", "8") == 2  # other replies could come
    assert "judge_max_tokens was 9" in capsys.readouterr().err


def test_no_request_is_sent_before_the_cost_is_agreed_to(
    ask: Judge, stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert ask(yes=False) == 2 and not stub.asked
    said = capsys.readouterr().err
    assert "about 48 requests" in said and "price unknown" in said and "give --yes" in said


def test_one_request_that_always_fails_is_left_out_and_tried_again(
    ask: Judge, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda body: (400, {}, b"too long") if "plain 2" in str(body) else "B"
    assert ask("--limit", "4", "--retries", "0") == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    assert (found["failed"], found["left_out"], found["unreadable"]) == (2, 1, 0)
    assert "2 requests failed, and the same command tries them again" in capsys.readouterr().err
    stub.reply = lambda body: "B"
    assert ask("--limit", "4") == 0
    assert json.loads((tmp_path / "out/judge.json").read_text())["left_out"] == 0


def test_a_function_in_a_file_judges(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "my_gold_of_length.py").write_text(
        "def gold(prompts, completions):\n    return [len(each) for each in completions]\n"
    )
    assert judge("--gold", f"{tmp_path}/my_gold_of_length.py:gold") == 0
    found = json.loads((tmp_path / "out/gold.json").read_text())
    assert (found["wins"], found["ties"], found["losses"]) == (12, 12, 0)
    assert found["win_rate"]["value"] == 0.75
    assert found["scores"]["difference"]["mean"] == pytest.approx(9 / 2)
    assert found["position"] is None


def test_a_reward_model_reads_each_conversation_once() -> None:
    """In another batch its score would round otherwise, and equal answers would not tie."""
    batches: list[list[str]] = []

    def score(samples: Sequence[Sample]) -> list[float]:
        batches.append([sample.response for sample in samples])
        return [len(sample.response) + 1e-6 * len(batches) for sample in samples]

    model = RewardModel("m", RunFolder(Path("m")), 2, 9, lambda sample: len(sample.response), score)
    asked: list[Message] = [{"role": "user", "content": "q"}]
    texts = ["same", "a", "four", "much too long", "same", "bb"]
    found = model.scores([sample_of(asked, text, "f:1") for text in texts])
    assert found[0] == found[4] is not None and found[3] is None
    assert sorted(text for batch in batches for text in batch) == ["a", "bb", "four", "same"]


def test_votes_of_the_page_are_counted_by_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def vote(prompt: str, better: str, worse: str, verdict: str) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": prompt}], "models": [better, worse],
                "answers": [f"by {better}", f"by {worse}"], "ranks": [0, 1], "verdict": verdict,
                "reason": "", "time": "2026-01-01T00:00:00Z"}  # fmt: skip

    votes = [vote("p", "policy", "sft", "a"), vote("q", "policy", "sft", "b"),
             vote("r", "sft", "policy", "a"), vote("r", "sft", "policy", "both_bad"),
             vote("s", "base", "policy", "a")]  # fmt: skip
    file = write(tmp_path / "votes.jsonl", votes)
    assert cli.main(["judge", "sft", "policy", "--votes", str(file)]) == 0
    found = json.loads((tmp_path / "judged/policy-vs-sft/votes.json").read_text())
    assert (found["wins"], found["ties"], found["losses"], found["prompts"]) == (2, 1, 1, 3)
    assert found["win_rate"]["value"] == 2.5 / 4
    assert found["left_side_wins"]["value"] == pytest.approx(2 / 3)
    assert cli.main(["judge", "sft", "ema", "--votes", str(file)]) == 2
    assert "no vote between sft and ema; there: base, policy, sft" in capsys.readouterr().err
    file.write_text('{"prompt": "p"}\n')
    assert cli.main(["judge", "sft", "ema", "--votes", str(file)]) == 2
    assert "votes.jsonl:1: this is no vote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give one judge of --reward, --gold, --votes, --judge-url; given: 0"),
        (("--gold", "a:b", "--reward", "r"), "given: 2"),
        (("--gold", "data.garden_notes:gold", "--judge-model", "m"), "--judge-model is not for"),
        (("--judge-url", "http://127.0.0.1:9/v1"), "needs --judge-model"),
        (("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-prompt", "PROMPT"),
         "it does not say where {one}, {two} goes"),
        (("--gold", "no_such_module:f"), "--gold"),
        (("--gold", "data.garden_notes:gold", "--temperature", "0.5"), "not for files of answers"),
        (("--votes", "v.jsonl", "--limit", "3"), "--limit is not for --votes"),
        (("--gold", "data.garden_notes:gold", "--data", "PROMPTS"), "has no answer to"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    words: tuple[str, ...], said: str, judge: Judge, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "prompt.txt").write_text("Which is better? {request}")
    write(tmp_path / "prompts.jsonl", [{"prompt": "Say something else."}])
    places = {"PROMPT": "prompt.txt", "PROMPTS": "prompts.jsonl"}
    typed = [str(tmp_path / places[word]) if word in places else word for word in words]
    assert judge(*typed) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("judged") / "run", tiny_tokenizer_dir)


@pytest.mark.slow
def test_roles_answer_both_turns_of_fastchats_questions(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [{"question_id": 80 + i, "category": ("writing", "math")[i % 2],
                  "turns": [f"the river {i}", "and the queen?"][: 1 + i % 2]}
                 for i in range(6)]  # fmt: skip
    file = write(tmp_path / "question.jsonl", questions)
    command = ["judge", str(run.root), "--data", str(file), "--reward", str(run.root)]
    assert cli.main(command) == 0
    folder = run.root / "judged" / "policy-vs-sft-on-question"
    found = json.loads((folder / "reward.json").read_text())
    assert (found["comparisons"], found["prompts"]) == (9, 6)
    assert {name: own["comparisons"] for name, own in found["turns"].items()} == {
        "turn 1": 6, "turn 2": 3}  # fmt: skip
    assert {name: own["comparisons"] for name, own in found["categories"].items()} == {
        "math": 6, "writing": 3}  # fmt: skip
    # The second turn stands behind each side's own first answer.
    answers = {name: lines(folder / f"{name}.jsonl") for name in ("first", "second")}
    later = lines(folder / "second-turn-2.jsonl")
    assert [turn["content"] for turn in later[0]["prompt"]] == [
        "the river 1", answers["second"][1]["response"], "and the queen?"]  # fmt: skip
    # A file of answers is the same as the side that wrote it: with its own seed, all ties.
    capsys.readouterr()
    command = ["judge", str(folder / "first.jsonl"), f"{run.root}:sft", "--reward",
               str(run.root), "--out", str(tmp_path / "same")]  # fmt: skip
    assert cli.main(command) == 0
    found = json.loads((tmp_path / "same" / "reward.json").read_text())
    assert found["ties"] == found["comparisons"] == 6
    assert found["win_rate"]["low"] < found["win_rate"]["value"] == 0.5 < found["win_rate"]["high"]
    assert cli.main(["judge", str(run.root), "--gold", "data.garden_notes:gold"]) == 2
    assert "has no held-out prompts: give --data FILE" in capsys.readouterr().err


def always_a(folder: Path, tokenizer_dir: Path) -> Path:
    """A LLaMA that answers "A" to everything: its hidden state is the last token's embedding."""
    tokenizer = load_tokenizer(tokenizer_dir)
    letter = next(i for i in encode(tokenizer, "A") if "A" in tokenizer.decode([i]))
    llama: Any = tiny_llama(vocabulary=300)
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        llama.model.embed_tokens.weight.fill_(1.0)
        llama.model.embed_tokens.weight[letter] = -1.0
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[letter] = 1.0
        llama.lm_head.weight[tokenizer.eos_token_id] = -1.0
    llama.config.max_position_embeddings = 512
    llama.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_a_judge_behind_our_own_server_decides(
    run: RunFolder, judge: Judge, tmp_path: Path, tiny_tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = always_a(tmp_path / "judge-model", tiny_tokenizer_dir)
    with serving(RunFolder(folder), load_run(*find_model(folder))) as url:
        command = ["--judge-url", f"{url}/v1", "--judge-model", "base", "--yes", "--limit", "6"]
        assert judge(*command, "--judge-max-tokens", "8") == 0
        found = json.loads((tmp_path / "out/judge.json").read_text())
        assert found["position"]["first_shown"]["value"] == 1.0
        assert found["ties"] == 6 and found["unreadable"] == 0
        assert found["completion_tokens"] == 24 and found["prompt_tokens"] > 12 * 50
    with serving(run) as url:  # random weights: nonsense, which is counted
        command = ["--judge-url", f"{url}/v1", "--judge-model", "policy", "--yes", "--limit", "6"]
        capsys.readouterr()
        command += ["--judge-prompt", str(prompt_file(tmp_path)), "--judge-max-tokens", "8"]
        code = judge(*command, out="nonsense")
        said = capsys.readouterr()
        assert (code == 2 and "decided none of 6" in said.err) or "not read" in said.out
        assert len(lines(tmp_path / "nonsense/judge-policy.jsonl")) == 12
