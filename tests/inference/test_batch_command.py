import json
import math
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from generation_runs import NEW, PROMPTS, TEXTS, answers, before_rewards, make_run, reopened
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chatllama import cli
from chatllama.config.loader import load_config
from chatllama.config.model import ChatSection
from chatllama.generation.decoding_batch import DecodingBatch, Sampled
from chatllama.generation.sampling import Sampling
from chatllama.inference import batch as generation_command
from chatllama.inference.answerer import Answerer, random_numbers, with_answer
from chatllama.inference.load import load_run
from chatllama.inference.options import GenerateOptions, best_of_kl
from chatllama.inference.prompt_files import Prompt
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import render
from chatllama.text.encoding import decode, encode
from chatllama.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture
def without_rewards(run: RunFolder, tmp_path: Path) -> RunFolder:
    return before_rewards(run, tmp_path)


# --- answers -------------------------------------------------------------------------------------


def test_a_line_for_each_prompt_in_order(run: RunFolder, tmp_path: Path) -> None:
    lines = answers(run, tmp_path / "a.jsonl", token_ids=True)
    assert [(line["id"], line["prompt"]) for line in lines] == list(enumerate(TEXTS))
    tokenizer = load_tokenizer(run.backbone)
    many = answers(run, tmp_path / "many.jsonl", num_samples=20, token_ids=True)
    for line in [*lines, *many]:
        ids = line["token_ids"]
        assert line["num_tokens"] == len(ids) <= NEW
        assert line["finished"] == (ids[-1] == 2) and (line["finished"] or len(ids) == NEW)
        assert line["response"] == decode(tokenizer, ids).strip()
    assert {line["finished"] for line in many} == {True, False}
    assert "logprob" not in lines[0] and "sample" not in lines[0] and "best_of" not in lines[0]


def test_greedy_is_what_transformers_says(run: RunFolder, tmp_path: Path) -> None:
    lines = answers(run, tmp_path / "a.jsonl", role="base", temperature=0.0, token_ids=True)
    model: Any = AutoModelForCausalLM.from_pretrained(run.backbone)
    answerer = reopened(run, "base")
    for line, prompt in zip(lines, PROMPTS, strict=True):
        ids = answerer.render(prompt.messages)
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        assert line["token_ids"] == output[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_size_changes_no_answer(run: RunFolder, tmp_path: Path, batch_size: int) -> None:
    expected = answers(run, tmp_path / "a.jsonl", num_samples=3, logprobs=True, batch_size=5)
    found = answers(run, tmp_path / "b.jsonl", num_samples=3, logprobs=True, batch_size=batch_size)
    for one, other in zip(found, expected, strict=True):
        for key, value in one.items():
            approximate = key in ("score", "logprob", "logprobs")
            assert (pytest.approx(value, abs=1e-4) if approximate else value) == other[key]


def test_samples_belong_to_seed_prompt_and_number(run: RunFolder, tmp_path: Path) -> None:
    four = answers(run, tmp_path / "4.jsonl", num_samples=4)
    two = answers(run, tmp_path / "2.jsonl", num_samples=2)
    assert [line["response"] for line in two] == [a["response"] for a in four if a["sample"] < 2]
    assert len({line["response"] for line in four if line["id"] == 0}) == 4
    other = answers(run, tmp_path / "o.jsonl", num_samples=2, seed=1)
    assert [line["response"] for line in two] != [line["response"] for line in other]
    twice = [Prompt(i, "Anna", "x") for i in range(2)]
    same = answers(run, tmp_path / "t.jsonl", twice)
    assert same[0]["response"] != same[1]["response"]


def test_random_numbers_are_those_of_a_longer_answer() -> None:
    short, long = random_numbers(1, 2, 3, 5), random_numbers(1, 2, 3, 50)
    assert torch.equal(long[:5], short) and long.dtype == torch.float32
    assert float(long.min()) >= 0 and float(long.max()) < 1
    others = [random_numbers(*place, 5) for place in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))]
    assert not any(torch.equal(short, other) for other in others)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_bare_sequence(
    run: RunFolder, tmp_path: Path, temperature: float
) -> None:
    lines = answers(
        run, tmp_path / "a.jsonl", temperature=temperature, logprobs=True, token_ids=True
    )
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(run.backbone)
    policy: Any = PeftModel.from_pretrained(base, str(run.policy_adapter)).eval()
    answerer = reopened(run)
    for line, prompt in zip(lines, PROMPTS, strict=True):
        ids = answerer.render(prompt.messages)
        with torch.no_grad():
            logits = policy(torch.tensor([[*ids, *line["token_ids"]]])).logits[0]
        expected = (logits / (temperature or 1.0)).log_softmax(-1)
        rows = torch.arange(len(ids) - 1, len(ids) - 1 + len(line["token_ids"]))
        picked = expected[rows, torch.tensor(line["token_ids"])].tolist()
        assert line["logprobs"] == pytest.approx(picked, abs=1e-4)
        assert line["logprob"] == pytest.approx(sum(picked), abs=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision(run: RunFolder, tmp_path: Path, dtype: str) -> None:
    """Log-probabilities and scores are those of float32, but for rounding."""
    options: dict[str, Any] = {"logprobs": True, "token_ids": True, "seed": 1}
    half = answers(run, tmp_path / "a.jsonl", **options, dtype=dtype)
    answerer = reopened(run)
    for line, prompt in zip(half, PROMPTS, strict=True):
        ids = answerer.render(prompt.messages)
        (whole,) = answerer.logprobs([ids], [line["token_ids"]], 1.0)
        off = max(abs(a - b) for a, b in zip(line["logprobs"], whole, strict=True))
        assert 0 < off < (0.02 if dtype == "float16" else 0.2)
        (score,) = answerer.scores([[*ids, *line["token_ids"]]])
        assert line["score"] == pytest.approx(score, abs=0.01 if dtype == "float16" else 0.1)
    with pytest.raises(ValueError, match=f"dtype was '{dtype}', is 'float32'"):
        answers(run, tmp_path / "a.jsonl", **options)


def reward_of(run: RunFolder, ids: list[int]) -> list[float]:
    """Scores of both members, read by plain PEFT."""
    from peft import PeftModel

    found = []
    for folder in run.reward_members():
        base = AutoModelForSequenceClassification.from_pretrained(run.backbone, num_labels=1)
        model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
        model.config.pad_token_id = 0
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).logits))
    return found


@pytest.mark.parametrize("combine", ["mean", "min"])
def test_scores_are_the_ensembles(run: RunFolder, combine: str) -> None:
    cfg = load_config(run.config, [f"ppo.reward_ensemble={combine}"])
    answerer = Answerer(load_run(run, cfg), "policy")
    uniforms = torch.stack([random_numbers(0, i, 0, NEW) for i in range(2)])
    sampling = generation_command_sampling()
    found = answerer.answer([p.messages for p in PROMPTS[:2]], uniforms, sampling, (), 2, False)
    for answer, prompt in zip(found, PROMPTS, strict=False):
        members = reward_of(run, [*answerer.render(prompt.messages), *answer.ids])
        assert members[0] != pytest.approx(members[1], abs=1e-2)
        expected = min(members) if combine == "min" else sum(members) / 2
        assert answer.score == pytest.approx(expected, abs=1e-4)


def generation_command_sampling() -> Any:
    from chatllama.generation.sampling import Sampling

    return Sampling(NEW)


def test_best_of_keeps_what_the_reward_model_likes_best(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = answers(run, tmp_path / "n.jsonl", num_samples=8)
    best = answers(run, tmp_path / "b.jsonl", best_of=8, batch_size=30)
    assert len(best) == len(TEXTS)
    for line in best:
        own = [sample for sample in samples if sample["id"] == line["id"]]
        winner = max(own, key=lambda sample: sample["score"])
        assert line["response"] == winner["response"] and line["best_of"] == 8
        assert line["score"] == pytest.approx(winner["score"], abs=1e-4)
        mean = sum(sample["score"] for sample in own) / 8
        assert line["mean_candidate_score"] == pytest.approx(mean, abs=1e-4)
    error = capsys.readouterr().err
    # log 8 - 7/8 = 2.0794 - 0.875
    assert "KL to policy at most 1.204 nats" in error


def test_kl_bound_of_best_of_n() -> None:
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(1.3862943611 - 0.75)


def test_roles_are_different_models(run: RunFolder, tmp_path: Path) -> None:
    texts = {
        role: [a["response"] for a in answers(run, tmp_path / role, role=role, temperature=0.0)]
        for role in ("base", "sft", "policy", "ema")
    }
    assert len({tuple(text) for text in texts.values()}) == 4
    default = answers(run, tmp_path / "default", temperature=0.0)
    assert [line["response"] for line in default] == texts["policy"]


def test_a_run_without_rewards_answers_as_sft_without_scores(
    without_rewards: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answers(without_rewards, tmp_path / "a.jsonl")
    assert "score" not in lines[0]
    error = capsys.readouterr().err
    assert "6 answers by sft" in error and "score" not in error
    with pytest.raises(ValueError, match=r"--best-of 4: .* has no reward model"):
        answers(without_rewards, tmp_path / "b.jsonl", best_of=4)
    with pytest.raises(ValueError, match=r"--role ema: .* has none; .*policy-ema is missing"):
        answers(without_rewards, tmp_path / "b.jsonl", role="ema")
    assert not (tmp_path / "b.jsonl").exists()


# --- answers that are continued ------------------------------------------------------------------


def begun(prompt: Prompt, text: str) -> Prompt:
    turns = [*prompt.messages, {"role": "assistant", "content": text}]
    return Prompt(prompt.id, cast(Any, turns), prompt.where)


def test_a_begun_answer_is_continued(run: RunFolder, tmp_path: Path) -> None:
    texts = ["the river ", "Anna", "a garden. The"]
    prompts = [begun(p, text) for p, text in zip(PROMPTS, texts, strict=False)] + PROMPTS[3:]
    options: dict[str, Any] = {"temperature": 0.0, "token_ids": True}
    lines = answers(run, tmp_path / "a.jsonl", prompts, **options)
    assert lines[3:] == answers(run, tmp_path / "b.jsonl", **options)[3:]
    tokenizer = load_tokenizer(run.backbone)
    for line, prompt, text in zip(lines, prompts, texts, strict=False):
        opened = render(tokenizer, ChatSection(), prompt.messages, continue_final_message=True).ids
        whole = decode(tokenizer, [*opened, *line["token_ids"]])
        assert whole.endswith(text.rstrip() + line["response"]) and line["response"]
        # Scored as the whole answer.
        ids = [*opened, *line["token_ids"]]
        assert line["score"] == pytest.approx(sum(reward_of(run, ids)) / 2, abs=1e-4)
    number, found = next(
        (i, match)
        for i, line in enumerate(lines[:3])
        if (match := re.match("([ -~]*)([ -~])", line["response"]))
    )
    stopped = answers(run, tmp_path / "c.jsonl", prompts[:3], **options, stops=(found[2],))[number]
    assert stopped["response"] == lines[number]["response"].split(found[2])[0]
    turns = with_answer(prompts[number].messages, stopped["response"])
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    ids = render(tokenizer, ChatSection(), turns).ids
    assert stopped["score"] == pytest.approx(sum(reward_of(run, ids)) / 2, abs=1e-4)


def test_the_first_space_of_what_follows_is_kept(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatllama.inference import answerer as module

    answerer = reopened(run)
    tokenizer = answerer.loaded.tokenizer
    for text, follows in ((" a house", " a house"), ("s, too", "s, too"), ("\n\nNo", "\n\nNo")):
        ids = encode(tokenizer, text, continues=True)
        monkeypatch.setattr(module, "generate", lambda *_, ids=ids, **__: [ids, ids])
        talks = [PROMPTS[0].messages, begun(PROMPTS[0], "the river ").messages]
        uniforms = torch.zeros(2, 3)
        sampling = Sampling(3, temperature=0.0)
        alone, continued = answerer.answer(talks, uniforms, sampling, [], 2, False)
        assert (alone.text, continued.text) == (text.strip(), follows)
        assert with_answer(talks[1], follows)[-1]["content"] == "the river" + follows


# --- stop strings --------------------------------------------------------------------------------


def test_answers_end_before_the_stop_string(run: RunFolder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"token_ids": True, "num_samples": 4, "logprobs": True}
    before = answers(run, tmp_path / "a.jsonl", **options)
    number, found = next(
        (i, match)
        for i, line in enumerate(before)
        if (match := re.search(r"(?<=.)[ -~]{4}", line["response"]))
    )
    # Of several tokens: most have one character.
    whole, stop = before[number], found[0]
    after = answers(run, tmp_path / "b.jsonl", **options, stops=(stop,))
    line = after[number]
    assert line["response"] == whole["response"][: found.start()].strip() and line["finished"]
    taken = line["token_ids"]
    assert taken == whole["token_ids"][: len(taken)] and len(taken) < len(whole["token_ids"])
    tokenizer = load_tokenizer(run.backbone)
    assert stop in decode(tokenizer, taken) and stop not in decode(tokenizer, taken[:-1])
    assert len(line["logprobs"]) == line["num_tokens"] == len(taken)
    assert line["logprobs"] == pytest.approx(whole["logprobs"][: len(taken)], abs=1e-4)
    # Scored as the finished turn that the user gets.
    turn = [*PROMPTS[whole["id"]].messages, {"role": "assistant", "content": line["response"]}]
    ids = render(tokenizer, ChatSection(), cast(Any, turn)).ids
    assert ids[-1] == 2
    assert line["score"] == pytest.approx(sum(reward_of(run, ids)) / 2, abs=1e-4)
    untouched = [(a, b) for a, b in zip(before, after, strict=True) if stop not in a["response"]]
    assert untouched and all(a["response"] == b["response"] for a, b in untouched)


def test_sampling_ends_at_the_stop_string(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the text: whoever has said it is not decoded any further."""
    produced: list[int] = []
    for name in ("admit", "step"):
        method = getattr(DecodingBatch, name)

        def counting(self: DecodingBatch, *args: Any, method: Any = method) -> list[Sampled]:
            sampled = method(self, *args)
            produced.append(len(sampled))
            return sampled

        monkeypatch.setattr(DecodingBatch, name, counting)
    long = {"token_ids": True, "max_new_tokens": 40}
    before = answers(run, tmp_path / "a.jsonl", **long)
    assert sum(produced) == sum(line["num_tokens"] for line in before)
    produced.clear()
    stops = tuple("abcdefghijklmnopqrstuvwxyz")
    after = answers(run, tmp_path / "b.jsonl", **long, stops=stops)
    assert sum(produced) == sum(line["num_tokens"] for line in after)
    assert sum(produced) < 0.7 * sum(line["num_tokens"] for line in before)
    for line, whole in zip(after, before, strict=True):
        assert line["token_ids"] == whole["token_ids"][: line["num_tokens"]]
        assert not re.search("[a-z]", line["response"])


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit_are_named_before_any_answer(
    run: RunFolder, tmp_path: Path
) -> None:
    long = Prompt(1, "the river " * 60, "p.jsonl:2")
    out = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"p.jsonl:2: a prompt of \d+ tokens .* 256 positions$"):
        answers(run, out, [PROMPTS[0], long])
    with pytest.raises(ValueError, match=r"256 positions \(2 prompts are too long\)"):
        answers(run, tmp_path / "b.jsonl", [long, long])
    assert out.read_text() == ""
    room = 256 - len(reopened(run).render(PROMPTS[0].messages))
    assert answers(run, tmp_path / "fits.jsonl", PROMPTS[:1], max_new_tokens=room)
    with pytest.raises(ValueError, match=rf"--max-new-tokens {room + 1} do not fit"):
        answers(run, tmp_path / "d.jsonl", PROMPTS[:1], max_new_tokens=room + 1)
    turns: Any = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="p:3: message 1 has role 'user'"):
        answers(run, tmp_path / "c.jsonl", [Prompt(0, turns, "p:3")])


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1: must be 0, or between"),
        ({"temperature": 1e-39}, "--temperature 1e-39: must be 0, or between 0.0001 and 100"),
        ({"temperature": 1e3}, "--temperature 1000.0: must be 0, or"),
        ({"top_k": 2**63}, "--top-k 9223372036854775808: must be between 0 and 1000000"),
        ({"seed": 2**64}, "--seed 18446744073709551616: must be between"),
        ({"num_samples": 10**9}, "--n 1000000000: must be between 1 and 10000"),
        ({"max_new_tokens": 10**12}, "--max-new-tokens 1000000000000: must be between"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_p": 1.1}, "--top-p 1.1: must be above 0 and at most 1"),
        ({"top_k": -1}, "--top-k -1: must be between 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be between 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1: must be between 0"),
        ({"num_samples": 0}, "--n 0"),
        ({"best_of": 0}, "--best-of 0"),
        ({"num_samples": 2, "best_of": 4}, "--n 2 and --best-of 4: give one of the two"),
        ({"stops": ("x", "")}, r"--stop \('x', ''\): an empty string"),
        ({"num_samples": 2, "temperature": 0.0}, "--n 2 with temperature 0 would give 2 equal"),
        ({"best_of": 2, "temperature": 0.0}, "--best-of 2 with temperature 0"),
    ],
)
def test_options_out_of_range(
    run: RunFolder, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answers(run, tmp_path / "a.jsonl", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_passes_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(generation_command, "generate_command", lambda *args: seen.append(args))
    command = (
        "generate RUN first --role ema --temperature 0.5 --top-p 0.9 --top-k 7 "
        "--max-new-tokens 9 --batch-size 3 --seed 5 --n 2 --stop a"
    )
    words = [
        *command.split(),
        *("--stop", "b c", "--token-ids", "--logprobs", "--out", "o.jsonl", "second one"),
        *("--dtype", "float16", "--quantization", "int8", "--compile", "--continue-final-message"),
    ]
    assert cli.main(words) == 0
    ((folder, prompts, options, out),) = seen
    assert (folder, out) == (Path("RUN"), Path("o.jsonl"))
    assert [prompt.content for prompt in prompts] == ["first", "second one"]
    assert options == GenerateOptions(
        role="ema",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        max_new_tokens=9,
        batch_size=3,
        seed=5,
        stops=("a", "b c"),
        num_samples=2,
        token_ids=True,
        logprobs=True,
        dtype="float16",
        quantization="int8",
        compile=True,
        continue_final_message=True,
    )
    file = tmp_path / "p.txt"
    file.write_text("x\n")
    assert cli.main(["generate", "RUN", "--file", str(file), "--best-of", "4"]) == 0
    assert seen[1][1:] == ([Prompt(0, "x", f"{file}:1")], GenerateOptions(best_of=4), None)


def test_answers_on_the_terminal(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna\nthe river\n"))
    assert cli.main(["generate", str(run.root)]) == 0
    both = capsys.readouterr()
    lines = both.out.split("\n")
    assert lines[0] == "> Anna" and lines[1].startswith("< ") and "(score " in both.out
    assert "2 answers by policy" in both.err
    assert cli.main(["generate", str(run.root), "Anna"]) == 0
    alone = capsys.readouterr().out
    assert "> " not in alone and f"< {alone.strip()}" in both.out
    assert not any(ord(c) < 32 and c != "\n" and c != "\t" for c in both.out)
    assert cli.main(["generate", str(run.root / "nowhere"), "a"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_translations_of_a_run_are_scored(without_rewards: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "news.de").write_text("Anna malt.\nDer Fluss ist alt.\n")
    (tmp_path / "news.en").write_text("Anna paints.\nThe river is old.\n")
    command = ["eval", str(without_rewards.root), "--translation", str(tmp_path / "news")]
    command += ["--languages", "de", "en", "--max-new-tokens", "5"]
    assert cli.main(command) == 0
    file = without_rewards.root / "translation/news.2.de-en.sft.scores.json"
    scores = json.loads(file.read_text())
    assert scores["sentences"] == 2 and 0 <= scores["bleu"]["score"] < 20
    (line, _) = (file.parent / "news.2.de-en.sft.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"].endswith("from German to English.\n\nAnna malt.")
