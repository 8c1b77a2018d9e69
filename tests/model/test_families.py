"""Mistrals are LLaMAs within their window; other families are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from chatllama.config.model import BackboneSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model.backbone import load_backbone
from chatllama.model.families import as_llama
from chatllama.model.roles import RoleModel
from chatllama.model.scoring import response_logprobs
from chatllama.text.tokenizer import load_tokenizer, within_positions

FORMS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "window": {"sliding_window": 16},
    "a window as long as the positions": {"sliding_window": 64},
    "tied": {"sliding_window": 16, "tie_word_embeddings": True},
    "head_dim": {"sliding_window": None, "head_dim": 32},
}


def make_mistral(folder: Path, **changes: Any) -> MistralForCausalLM:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        mistral = MistralForCausalLM(MistralConfig(**(values | changes)))
    mistral.save_pretrained(folder)
    return mistral.eval()


def loaded(folder: Path) -> LlamaForCausalLM:
    return load_backbone(BackboneSection(path=str(folder), dtype="float32"), str(folder))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_mistral_within_its_window_is_itself(form: str, tmp_path: Path) -> None:
    mistral = make_mistral(tmp_path, **FORMS[form])
    llama = loaded(tmp_path)
    assert type(llama) is LlamaForCausalLM
    limit = llama.config.max_position_embeddings
    assert limit == min(64, FORMS[form]["sliding_window"] or 64)
    rows = torch.randint(300, (3, limit), generator=torch.Generator().manual_seed(1))
    expected = mistral(rows).logits
    torch.testing.assert_close(llama(rows).logits, expected, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(rows, dtype=torch.bool)
    scored = response_logprobs(RoleModel(llama, {}), "base", rows, mask, mask[:, 1:], 1.0)
    theirs = expected[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    torch.testing.assert_close(scored.logprobs, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sampling_is_transformers_own(tmp_path: Path) -> None:
    mistral: Any = make_mistral(tmp_path, sliding_window=16)
    llama = loaded(tmp_path)
    luck = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, 300, (int(length),), generator=luck).tolist()
        for length in torch.randint(1, 9, (6,), generator=luck)
    ]
    ours = generate(llama, prompts, Sampling(8, temperature=0.0), [2], torch.zeros(6, 8), 4)
    for prompt, answer in zip(prompts, ours, strict=True):
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        theirs = mistral.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert answer == theirs


@torch.no_grad()
def test_beyond_the_window_it_would_be_another_model(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So texts are not longer, in data, scoring and serving, which ask for these two limits."""
    mistral = make_mistral(tmp_path, sliding_window=16)
    llama = loaded(tmp_path)
    rows = torch.randint(300, (1, 17), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(llama(rows).logits[0, -1], mistral(rows).logits[0, -1], atol=1e-3)
    said = "a Mistral with a sliding window of 16 tokens: longer texts are refused or cut"
    assert said in capsys.readouterr().err
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    assert within_positions(load_tokenizer(tmp_path), 2048) == 16
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert within_positions(load_tokenizer(tmp_path), 2048) == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2Config(), "a 'qwen2' model, .*biases of queries, keys and values alone"),
        (Qwen3Config(), "a 'qwen3' model, .*norms of queries and keys"),
        (MixtralConfig(), "a 'mixtral' model, .*a mixture of experts"),
        (GPT2Config(), r"a 'gpt2' model, not a LLaMA \(or Mistral\)$"),
    ],
)
def test_other_families_are_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_llama(config, "here")
