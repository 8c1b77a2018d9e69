"""Adapters inside the weights for a while: the same answers, and a base that is not touched."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ppo_runs import STOPS, TinyRun, nudge
from tiny_models import ragged_batch, role_model, tiny_llama
from torch import nn

from chatllama.config.schema import GenerationSection
from chatllama.model.roles import RoleModel, acting_as, mergeable, merged_as
from trainers.ppo.rollout import sample_responses

SEED = (3, 1)


@pytest.fixture(scope="module")
def model() -> RoleModel:
    return role_model(tiny_llama())


@torch.no_grad()
def logits_of(model: RoleModel) -> torch.Tensor:
    batch = ragged_batch()
    return model.llama(input_ids=batch.tokens, attention_mask=batch.mask.long()).logits[batch.mask]


@pytest.mark.parametrize("role", ["policy", "reward", "base"])
def test_merged_equals_unmerged(model: RoleModel, role: str):
    with acting_as(model, role):
        expected = logits_of(model)
    with acting_as(model, "base"):
        base = logits_of(model)
    with merged_as(model, role):
        merged = logits_of(model)
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5)
    assert (role == "base") == bool((merged - base).abs().max() < 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_the_same_memory_afterwards_whatever_happened(dtype: torch.dtype):
    model = role_model(tiny_llama(dtype=dtype))
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with acting_as(model, "reference"):
        for _ in range(3):
            with pytest.raises(KeyError, match="stop"), merged_as(model, "policy"):
                assert any(p.data_ptr() != places[n] for n, p in model.named_parameters())
                raise KeyError("stop")
        assert model.acting == "reference"
        layer = model._lora_layers[0]
        assert layer._disable_adapters is False and layer._active_adapter == ["reference"]
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == places[name], name
        assert torch.equal(parameter, before[name]) and parameter.dtype == before[name].dtype


def test_quantised_and_split_weights_are_not_merged():
    class Quantised(nn.Linear):
        pass

    model = role_model(tiny_llama())
    assert mergeable(model)
    base = model._lora_layers[0].get_base_layer()
    base.__class__ = Quantised
    assert not mergeable(model)
    base.__class__ = nn.Linear
    base.weight.data = torch.empty(0)
    assert not mergeable(model)


def test_rollouts_are_the_same_merged_or_not(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = TinyRun.make(tmp_path, tiny_tokenizer_dir).trainer()
    nudge(trainer)

    def sample(**changes: object) -> list[list[int]]:
        generation = GenerationSection.model_validate({"max_new_tokens": 8, **changes})
        prompts = [[1, 80, 90], [1], [1, 70, 71]]
        return sample_responses(trainer.engine, "policy", prompts, generation, STOPS, SEED)

    assert sample(merge_lora="always") == sample(merge_lora="never") == sample()
    merged = []
    import trainers.ppo.rollout as module

    monkeypatch.setattr(module, "merged_as", lambda *_: merged.append(1) or acting_as(*_))
    sample(merge_lora="never")
    assert not merged
    sample()
    assert merged == [1]  # auto: the base is float32
    monkeypatch.setattr(trainer.engine, "is_zero3", lambda: True)
    monkeypatch.setattr(trainer.engine, "_gather", False)
    monkeypatch.setattr(trainer.engine, "whole_layers", nullcontext)
    sample()
    assert merged == [1]
    with pytest.raises(ValueError, match="merge_lora always: the backbone is quantised or split"):
        sample(merge_lora="always")
