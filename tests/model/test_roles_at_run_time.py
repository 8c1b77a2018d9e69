"""Roles that come and go while a model is in use."""

import pytest
import torch
from tiny_models import LORA, REWARD_LORA, ragged_batch, role_model, tiny_llama

from chatllama.config.model import LoraSection
from chatllama.model.roles import Adapter, Role, RoleModel, acting_as, adapter_state
from chatllama.model.scoring import response_logprobs


def logits_of(model: RoleModel, role: Role) -> torch.Tensor:
    with torch.no_grad(), acting_as(model, role):
        return model.llama(input_ids=ragged_batch().tokens).logits


def copied(model: RoleModel, role: Role) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(model, role).items()}


def test_an_added_role_computes_as_its_source_and_changes_no_other() -> None:
    model = role_model(tiny_llama())
    before = {role: logits_of(model, role) for role in ("base", "reference", "policy")}
    with acting_as(model, "reference"):
        model.add("served_1", Adapter(LORA, copied(model, "policy")))
        assert model.acting == "reference"
    assert torch.equal(logits_of(model, "served_1"), before["policy"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for role, logits in before.items():
        assert torch.equal(logits_of(model, role), logits)
    model.remove("served_1")
    assert not any("served_1" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="'served_1' is not loaded"), acting_as(model, "served_1"):
        pass
    for role, logits in before.items():
        assert torch.equal(logits_of(model, role), logits)


def test_an_added_role_may_adapt_layers_that_no_other_does() -> None:
    source = role_model(tiny_llama())
    model = RoleModel(tiny_llama(), {"reward": Adapter(REWARD_LORA)}).eval()
    base = logits_of(model, "base")
    model.add("served_1", Adapter(LORA, copied(source, "policy")))
    assert torch.equal(logits_of(model, "served_1"), logits_of(source, "policy"))
    assert torch.equal(logits_of(model, "base"), base)
    model.remove("served_1")
    assert torch.equal(logits_of(model, "base"), base)


def test_a_model_without_adapters_takes_its_first() -> None:
    source = role_model(tiny_llama())
    model = RoleModel(tiny_llama(), {}).eval()
    model.add("served_1", Adapter(LORA, copied(source, "policy")))
    assert torch.equal(logits_of(model, "served_1"), logits_of(source, "policy"))
    assert torch.equal(logits_of(model, "base"), logits_of(source, "base"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [(LoraSection(r=8), "has shape"), (LoraSection(target_modules=["nothing"]), "nothing")],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(lora: LoraSection, message: str) -> None:
    model = role_model(tiny_llama())
    before = {role: logits_of(model, role) for role in ("base", "policy")}
    with pytest.raises(ValueError, match=message):
        model.add("served_1", Adapter(lora, copied(model, "policy")))
    assert "served_1" not in model.adapter_names
    assert not any("served_1" in name for name, _ in model.named_parameters())
    for role, logits in before.items():
        assert torch.equal(logits_of(model, role), logits)


@pytest.mark.parametrize(
    ("dropout", "attention_dropout", "states"), [(0.0, 0.0, 0), (0.1, 0.0, 2), (0.0, 0.1, 2)]
)
def test_checkpointing_keeps_the_generators_state_only_for_dropout(
    dropout: float, attention_dropout: float, states: int, monkeypatch: pytest.MonkeyPatch
):
    lora = LORA.model_copy(update={"dropout": dropout})
    llama = tiny_llama()
    llama.config.attention_dropout = attention_dropout
    model = RoleModel(llama, {"policy": Adapter(lora, trainable=True)}, dropout=True).train()
    model.enable_gradient_checkpointing()
    kept: list[int] = []
    get = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: kept.append(1) or get())
    batch = ragged_batch()
    torch.manual_seed(0)
    scores = response_logprobs(model, "policy", batch.tokens, batch.mask, batch.response_mask, 1.0)
    assert len(kept) == states  # one a layer
    scores.logprobs.sum().backward()
