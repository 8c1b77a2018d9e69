"""`import chatllama`: a model opened, asked, scored and trained from Python."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generation_runs import TEXTS, answers, before_rewards, make_run

import chatllama
from chatllama.runs.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("api") / "run", tiny_tokenizer_dir)
    run.metrics("sft").write_text('{"step": 1, "sft/loss": 2.5}\n')
    run.metrics("ppo").write_text('{"step": 1}\n' * 2)
    return run


@pytest.fixture(scope="module")
def model(run: RunFolder) -> chatllama.Model:
    return chatllama.load(run.root)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, chatllama; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(Path(chatllama.__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "[]\n"
    line = next(line for line in found.stderr.splitlines() if line.endswith(" chatllama"))
    assert int(line.split("|")[1]) < 300_000  # microseconds, with all that it imports
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = chatllama.lod  # type: ignore[attr-defined]


def test_answers_are_those_of_the_command(model: chatllama.Model, run: RunFolder, tmp_path: Path):
    made = model.generate(TEXTS, role="sft", n=2, seed=5, temperature=0.9, logprobs=True)
    lines = answers(
        run, tmp_path / "o.jsonl", role="sft", num_samples=2, seed=5, temperature=0.9, logprobs=True
    )
    assert [len(each) for each in made] == [2] * len(TEXTS)
    flat = [answer for each in made for answer in each]
    assert [answer.text for answer in flat] == [line["response"] for line in lines]
    assert [answer.score for answer in flat] == pytest.approx([line["score"] for line in lines])
    assert flat[0].logprobs == pytest.approx(lines[0]["logprobs"])


def test_a_score_is_that_of_the_answer(model: chatllama.Model):
    ((whole,),) = model.generate(TEXTS[:1])
    ((answer,),) = model.generate(TEXTS[:1], stops=[whole.text[-2:]])
    assert answer.finished and answer.text  # so it is scored as a finished turn
    assert model.score(TEXTS[0], answer.text) == pytest.approx(answer.score, abs=1e-5)


def test_chat_takes_a_text_or_messages(model: chatllama.Model):
    assert model.roles == ("base", "sft", "policy", "ema")
    said = model.chat("the river", seed=1, max_new_tokens=8)
    messages = [{"role": "user", "content": "the river"}]
    assert said == model.chat(messages, role="policy", seed=1, max_new_tokens=8)  # type: ignore[arg-type]
    assert said != model.chat("the river", role="base", seed=1, max_new_tokens=8)
    with pytest.raises(ValueError, match="--temperature"):
        model.chat("the river", temperature=-1.0)


def test_metrics_are_a_table_of_all_stages(model: chatllama.Model, run: RunFolder):
    table = model.metrics
    assert list(table.stage) == ["sft", "ppo", "ppo"] and list(table.step) == [1, 1, 1]
    assert table["sft/loss"].tolist()[0] == 2.5 and table["sft/loss"].isna().sum() == 2
    with pytest.raises(ValueError, match="only training logs metrics"):
        _ = chatllama.load(run.backbone).metrics


def test_what_is_not_there_is_said(run: RunFolder, model: chatllama.Model, tmp_path: Path):
    with pytest.raises(ValueError, match="no reward model to score with"):
        chatllama.load(before_rewards(run, tmp_path).root).score("a", "b")
    with pytest.raises(ValueError, match="takes a list of prompts"):
        model.generate("the river")
    with pytest.raises(ValueError, match=r"--role policy: .* has none"):
        chatllama.load(run.sft_adapter).generate(["a"], role="policy")
    assert model.generate([]) == []


def length(prompt: str, response: str) -> float:
    return float(len(response))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> list[Any]:
    calls: list[Any] = []
    name = "trainers.stages.pipeline.run_pipeline"
    monkeypatch.setattr(name, lambda *given, **more: calls.append((given, more)))
    return calls


def test_a_function_is_the_reward(run: RunFolder, started: list[Any]):
    trained = chatllama.train(run.config, "ppo.steps=2", reward=length)
    ((path, overrides), options) = started[0]
    assert path == str(run.config) and overrides[0] == "ppo.steps=2"
    assert json.loads(overrides[1].partition("=")[2]) == [{"function": f"{__name__}:length"}]
    assert options["launch"].in_process and trained.folder.root == run.root
    chatllama.train(run.config, reward=length, num_gpus=2)
    assert started[1][1]["launch"].num_gpus == 2 and not started[1][1]["launch"].in_process


def test_a_function_that_ranks_cannot_import_is_refused(
    run: RunFolder, started: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def inner(prompt: str, response: str) -> float:
        return 0.0

    for function in (inner, lambda prompt, response: 0.0):
        with pytest.raises(ValueError, match="cannot be imported: define it with `def`"):
            chatllama.train(run.config, reward=function)
    monkeypatch.setattr(length, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "length", length, raising=False)
    chatllama.train(run.config, reward=length)
    with pytest.raises(ValueError, match="other processes do not import"):
        chatllama.train(run.config, reward=length, num_gpus=None)
    assert len(started) == 1
