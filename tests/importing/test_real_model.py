"""A real instruct model, imported and taken through every stage and door (a few CPU minutes)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp_answers import llama_cpp_text
from openai import OpenAI
from real_model import real_gguf
from serving_setup import post, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_ppo
import train_rm
import train_sft
from chatllama.config.model import ChatSection
from chatllama.exporting.cli import ExportOptions
from chatllama.exporting.export import export_run
from chatllama.generation.sampling import Sampling
from chatllama.inference.chat_model import ChatModel
from chatllama.inference.load import load_run
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import Message, render
from chatllama.text.tokenizer import load_tokenizer

QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
THINGS = ("the river", "a garden", "bread", "music", "rain", "the sea")


def test_the_import_is_what_transformers_reads(real_model: Path) -> None:
    options = {"gguf_file": real_gguf().name, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(real_gguf().parent, **options).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    assert sum(each.numel() for each in ours.parameters()) == 134_515_008
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    stored = json.loads((real_model / "chatllama.json").read_text())["stored"]
    assert (stored["Q4_1"]["tensors"], stored["Q8_0"]["tensors"]) == (210, 1)
    assert 0.05 < stored["Q4_1"]["error"] < 0.12 and stored["Q8_0"]["error"] < 0.01


def test_rendering_is_apply_chat_templates(real_model: Path) -> None:
    """Token for token but for the line break behind the last turn, with both of its layouts."""
    tokenizer, plain = load_tokenizer(real_model), AutoTokenizer.from_pretrained(real_model)
    chatml = ChatSection(template="chatml", system="Be brief.")
    for number in range(200):
        texts = [
            f"{THINGS[(number + turn) % 6]} {number}?\n  naïve 日本 🙂"[turn:] for turn in range(6)
        ]
        messages: Any = [
            {"role": ("user", "assistant")[turn % 2], "content": text.strip()}
            for turn, text in enumerate(texts[: number % 6 + 1])
        ]
        asks = messages[-1]["role"] == "user"
        system = {"role": "system", "content": "Be brief."}
        for chat, given in (
            (ChatSection(template="tokenizer"), messages),
            (chatml, [system, *messages]),
        ):
            text = plain.apply_chat_template(given, tokenize=False, add_generation_prompt=asks)
            ids = plain(str(text), add_special_tokens=False).input_ids
            ours = render(tokenizer, chat, messages, add_generation_prompt=asks).ids
            assert ids == ours + ([] if asks else plain("\n").input_ids)


@pytest.fixture(scope="module")
def run(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two steps of each stage; rates so low that the model still knows its geography."""
    folder = tmp_path_factory.mktemp("run")
    subjects = [f"{thing} of {place}" for thing in THINGS for place in ("home", "Rome", "old")]
    records: dict[str, list[dict[str, str]]] = {
        "sft": [{"instruction": f"Describe {s}.", "output": f"It is {s}."} for s in subjects],
        "pairs": [{"prompt": f"{s}?", "chosen": "I love it.", "rejected": "No."} for s in subjects],
        "prompts": [{"prompt": f"Write about {s}."} for s in subjects],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"steps": 2, "warmup_steps": 0, "learning_rate": 1e-6, "eval_fraction": 0.3}
    stage = {**small, "batch_size": 2, "microbatch_size": 2, "max_length": 96}
    rollout = {"rollout_batch_size": 4, "minibatch_size": 4, "microbatch_size": 4, "epochs": 1}
    rloo = {"advantage": "rloo", "samples_per_prompt": 2, "score_normalization_samples": 4}

    def data(name: str, form: str) -> dict[str, Any]:
        return {"data": [{"path": str(folder / f"{name}.jsonl"), "format": form}]}

    config = {
        "run_dir": str(folder / "run"),
        "backbone": {"path": str(real_model), "dtype": "float32"},
        "chat": {"template": "tokenizer"},
        "lora": {"r": 4, "alpha": 8.0},
        "tracking": {"report_to": []},
        "generation": {"max_new_tokens": 8, "batch_size": 8},
        "evaluation": {"num_prompts": 1},
        "sft": {**stage, **data("sft", "alpaca")},
        "reward": {**stage, **data("pairs", "preference"), "allow_weak": True},
        "ppo": {**small, **data("prompts", "prompts"), **rollout, **rloo},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    for stage_main in (train_sft.main, train_rm.main, train_ppo.main):
        stage_main([str(file)])
    return RunFolder(folder / "run")


def test_the_stages_learn_from_finite_numbers(run: RunFolder) -> None:
    for stage in ("sft", "reward", "ppo"):
        lines = run.metrics(stage).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert max(row["step"] for row in rows) == 2
        numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
        assert numbers and all(map(math.isfinite, numbers))


def test_paris_through_every_door(run: RunFolder, real_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    text = str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, add_special_tokens=False).input_ids

    def plain(folder: Path) -> str:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        new = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        return tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)

    assert plain(real_model) == ANSWER
    loaded = load_run(run)
    chat = ChatModel(loaded, Sampling(12, temperature=0.0), torch.Generator())
    assert "".join(chat.answer(QUESTION, "policy")) == ANSWER
    with serving(run, loaded) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        asked: dict[str, Any] = {"model": "policy", "temperature": 0, "max_tokens": 12}
        messages: Any = QUESTION
        answer: Any = client.chat.completions.create(messages=messages, **asked)
        assert answer.choices[0].message.content == ANSWER
        body = {**asked, "prompt": "The capital of France is", "max_tokens": 2}
        _, completed = post(url, "/v1/completions", body)
        assert completed["choices"][0]["text"] == " Paris."
        assert completed["usage"]["prompt_tokens"] == 5  # no BOS
    out = export_run(run.root, ExportOptions(merged=True, gguf=True), tmp_path / "out")
    assert plain(out / "merged") == ANSWER
    assert (
        'SYSTEM """You are a helpful AI assistant named SmolLM'
        in (out / "gguf" / "Modelfile").read_text()
    )
    assert llama_cpp_text(out / "gguf" / "model.gguf", ids, 12).strip() == ANSWER
