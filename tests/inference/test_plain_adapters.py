"""Adapters of plain PEFT, made by PEFT itself, opened as ours are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import chatllama
from chatllama.inference.folders import find_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def changed(folder: Path, copy: Path, **keys: Any) -> Path:
    """A copy of an adapter with other values in adapter_config.json; None removes a key."""
    shutil.copytree(folder, copy)
    file = copy / "adapter_config.json"
    values = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
    return copy


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{here}/gone", "gone is no folder here and no hub id: write where it lies"),
        ("models/base", "models/base is no folder here"),  # relative to elsewhere
        (None, "no base_model_name_or_path, so its base is not known"),
    ],
)
def test_a_base_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.parent.mkdir()
    named = None if base is None else base.format(here=tmp_path)
    file.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))
    with pytest.raises(ValueError, match=message):
        find_model(file.parent)
    file.write_text(json.dumps({"base_model_name_or_path": "someone/llama"}))
    assert find_model(file.parent)[1].backbone.path == "someone/llama"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[str, Any]:
    """Folders of a language adapter and a reward adapter, with what plain PEFT makes of a text."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("peft")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = TEMPLATE
    text = "user: the river\nassistant:"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found: dict[str, Any] = {}
    kinds: Any = {
        "CAUSAL_LM": (AutoModelForCausalLM, {}),
        "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1, "pad_token_id": 0}),
    }
    for kind, (family, options) in kinds.items():
        torch.manual_seed(5)
        model = family.from_pretrained(tiny_llama_dir, **options)
        lora = LoraConfig(
            r=4, lora_alpha=24, target_modules=["q_proj", "down_proj"], task_type=kind
        )
        model = get_peft_model(model, lora).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
        found[kind] = folder / kind
        with torch.no_grad():
            if kind == "CAUSAL_LM":
                new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
                found["text"] = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            else:
                talk = f"{text} a garden{tokenizer.eos_token}"
                row = torch.tensor([tokenizer(talk, add_special_tokens=False)["input_ids"]])
                found["score"] = float(model(row).logits[0, 0])
    return found


@pytest.mark.slow
def test_it_answers_and_scores_as_with_peft(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chatllama.load(made["CAUSAL_LM"])
    assert model.roles == ("base", "sft")
    said = model.chat("the river", temperature=0, max_new_tokens=8)
    assert said.strip() == made["text"].strip() and said.strip()
    assert "plain PEFT; what cannot be checked: that its base has" in capsys.readouterr().err
    judge = chatllama.load(made["SEQ_CLS"])
    assert judge.roles == ("base",)
    assert judge.score("the river", "a garden") == pytest.approx(made["score"], abs=1e-4)
    # Without a tokenizer of its own the base's template counts, and that is said.
    bare = changed(made["CAUSAL_LM"], tmp_path / "bare")
    for file in [*bare.glob("*token*"), *bare.glob("*.jinja")]:
        file.unlink()
    assert chatllama.load(bare).chat("the river", temperature=0, max_new_tokens=8) != said
    assert "so the base's is taken" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_no_plain_lora_of_this_base_is_refused(
    made: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "peft_type is 'IA3', only LORA": {"peft_type": "IA3"},
        "use_rslora is True": {"use_rslora": True},
        "use_dora is True": {"use_dora": True},
        "modules_to_save is .'lm_head'.": {"modules_to_save": ["lm_head"]},
        "r 8, .* has 4": {"r": 8},
    }
    for number, (message, keys) in enumerate(changes.items()):
        folder = changed(made["CAUSAL_LM"], tmp_path / str(number), **keys)
        with pytest.raises(ValueError, match=message):
            chatllama.load(folder).chat("a")
    folder = changed(made["CAUSAL_LM"], tmp_path / "pickle")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin can run code"):
        chatllama.load(folder).chat("a")
    folder = changed(made["CAUSAL_LM"], tmp_path / "words")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("river", "rivet"))
    text = json.loads(file.read_text())
    text["model"]["vocab"] = {
        f"{k}x" if v == 299 else k: v for k, v in text["model"]["vocab"].items()
    }
    text["model"]["merges"] = []
    file.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="its tokenizer has another vocabulary than its base's"):
        chatllama.load(folder).chat("a")
