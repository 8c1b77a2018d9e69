"""Models of every family are loaded as transformers' own; other families are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FORMS, ragged_batch, tiny_config, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from chatllama.config.model import BackboneSection
from chatllama.model.backbone import check_kernels, load_backbone
from chatllama.model.families import FAMILIES, family_of, smallest_window, window
from chatllama.model.packed_attention import within_window
from chatllama.text.tokenizer import load_tokenizer, within_positions


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_is_transformers_own(form: str, tmp_path: Path) -> None:
    tiny_llama(form=form).save_pretrained(tmp_path)
    ours = load_backbone(BackboneSection(path=str(tmp_path), dtype="float32"), str(tmp_path))
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    batch = ragged_batch()  # up to 14 tokens: longer than the windows
    expected = theirs(batch.tokens, attention_mask=batch.mask.long()).logits[batch.mask]
    found = ours(batch.tokens, attention_mask=batch.mask.long()).logits[batch.mask]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_layers_look_back_as_far_as_transformers_has_them() -> None:
    found = {
        form: [window(tiny_config(form=form), layer) for layer in range(2)]
        for form in FORMS
        if smallest_window(tiny_config(form=form))
    }
    assert found == {
        "mistral, window": [4, 4],
        "qwen2, tied, window in the last layer": [None, 4],
        "qwen3, biases, window": [5, 5],
    }
    # As Qwen 2.5 is published: a window in config.json that is not in use.
    values = tiny_config(form="qwen2").to_dict() | {"sliding_window": 4, "layer_types": None}
    assert smallest_window(type(tiny_config(form="qwen2")).from_dict(values)) is None


def test_a_window_is_the_last_tokens_of_what_a_query_sees() -> None:
    query, key = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 5, 8)
    assert within_window(None, query, key, 5) is None is within_window(None, query, key, None)
    last = within_window(None, query, key, 2)
    assert last is not None and last[0, 0].tolist() == [[False, False, False, True, True]]
    # Rows that begin in columns 1 and 3; then one whose token stands in column 2, as in a cache at
    # fixed addresses.
    seen = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = within_window(seen[:, None, None], query, key, 2)
    wanted = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    assert found is not None and torch.equal(found[:, 0, 0], wanted)
    whole = within_window(None, torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 4, 8), 2)
    assert whole is not None and whole[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_eager_attention_takes_no_windows() -> None:
    eager = BackboneSection(path="p", dtype="float32", attn_implementation="eager")
    check_kernels(eager, tiny_config(form="mistral"))
    with pytest.raises(ValueError, match=r"eager computes no sliding window .* 4 tokens; choose"):
        check_kernels(eager, tiny_config(form="mistral, window"))


def test_texts_may_be_longer_than_a_window(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "t")
    values = {"model_type": "mistral", "max_position_embeddings": 64, "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(values))
    assert within_positions(load_tokenizer(folder), 2048) == 64


class OwnConfig(LlamaConfig):
    """As code of a model has it."""

    model_type = "own"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MixtralConfig(), "a 'mixtral' model, .*: it has a mixture of experts"),
        (
            Qwen2MoeConfig(use_sliding_window=True),
            "a 'qwen2_moe' model, .*: it has a mixture of experts",
        ),
        (
            Qwen2MoeConfig(sliding_window=0),  # not damaged
            "a 'qwen2_moe' model, .*: it has a mixture of experts",
        ),
        (
            GPT2Config.from_dict({"head_dim": [1, 2]}),
            "a 'gpt2' model, not one of llama, mistral, qwen2, qwen3$",
        ),
    ],
)
def test_other_families_are_refused_by_name(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        family_of(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"backbone\.path: .* {reason}"):
        load_backbone(BackboneSection(path=str(tmp_path)), str(tmp_path))


def test_configs_that_derive_from_a_familys_are_of_it() -> None:
    assert family_of(OwnConfig()) is FAMILIES["llama"]
