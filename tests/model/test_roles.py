from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import (
    FORMS,
    LORA,
    REWARD_LORA,
    TRAINED,
    joint_gradients,
    logits_of,
    ragged_batch,
    role_model,
    tiny_llama,
)

from chatllama.config.model import LoraSection
from chatllama.model import scoring
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    acting_as,
    adapter_parameters,
    adapter_state,
    lora_config,
    set_head,
)
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences

ADAPTERS: tuple[Role, ...] = ("reference", "policy", "reward", "value")


@pytest.fixture
def model() -> RoleModel:
    return role_model(tiny_llama())


def section_of(role: Role) -> LoraSection:
    return LORA if role in ("reference", "policy") else REWARD_LORA


# --- which weights act ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_adapter_it_is_the_base_bit_for_bit(dtype: torch.dtype):
    tokens = ragged_batch().tokens
    with torch.no_grad():
        expected = tiny_llama(dtype=dtype)(input_ids=tokens).logits
    assert torch.equal(logits_of(role_model(tiny_llama(dtype=dtype)), "base", tokens), expected)


def test_a_new_adapter_changes_nothing_yet():
    tokens = ragged_batch().tokens
    with torch.no_grad():
        expected = tiny_llama()(input_ids=tokens).logits
    fresh = RoleModel(tiny_llama(), {"policy": Adapter(LORA, trainable=True)})
    assert torch.equal(logits_of(fresh, "policy", tokens), expected)


def test_a_reference_without_adapter_is_the_base():
    model = RoleModel(tiny_llama(), {"policy": Adapter(LORA, trainable=True)})
    tokens = ragged_batch().tokens
    assert torch.equal(logits_of(model, "reference", tokens), logits_of(model, "base", tokens))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ADAPTERS)
def test_each_role_is_its_stand_alone_peft_model(form: str, role: Role):
    model, tokens = role_model(tiny_llama(form=form)), ragged_batch().tokens
    section = section_of(role)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    alone = get_peft_model(tiny_llama(form=form), config)
    loaded = set_peft_model_state_dict(alone, adapter_state(model, role))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora" in key]
    with torch.no_grad():
        expected = alone.eval()(input_ids=tokens).logits
    actual = logits_of(model, role, tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(actual, expected) or "window" in form  # other kernels for masks
    assert (actual - logits_of(model, "base", tokens)).abs().max() > 0.1


def test_roles_differ_from_each_other(model: RoleModel):
    tokens = ragged_batch().tokens
    seen = [logits_of(model, role, tokens) for role in ("base", *ADAPTERS)]
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert (first - second).abs().max() > 0.1


def test_a_shared_role_uses_the_other_adapter():
    model = RoleModel(
        tiny_llama(),
        {"policy": Adapter(LORA, trainable=True)},
        heads=("value",),
        shared={"value": "policy"},
    )
    for parameter in adapter_parameters(model, "policy"):
        parameter.data.normal_(std=0.2)
    tokens = ragged_batch().tokens
    assert torch.equal(logits_of(model, "value", tokens), logits_of(model, "policy", tokens))
    assert all(p.requires_grad for p in model.heads["value"].parameters())


def test_only_trainable_roles_and_their_heads_get_gradients(model: RoleModel):
    wanted = [*model.heads["value"].parameters()]
    wanted += [p for role in TRAINED for p in adapter_parameters(model, role)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in wanted}
    assert model.trainable_roles == TRAINED


def test_dropout_only_where_it_is_asked_for():
    section = LoraSection(r=2, dropout=0.5)
    assert lora_config(section).lora_dropout == 0.0
    assert lora_config(section, dropout=True).lora_dropout == 0.5
    model = RoleModel(tiny_llama(), {"policy": Adapter(section, trainable=True)})
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]


def test_train_mode_computes_what_eval_mode_computes(model: RoleModel):
    batch = ragged_batch()
    arguments = (model, "policy", batch.tokens, batch.mask, batch.response_mask, 1.0)
    model.eval()
    evaluated = response_logprobs(*arguments).logprobs
    model.train()
    assert torch.equal(response_logprobs(*arguments).logprobs, evaluated)


def test_state_is_loaded_and_must_fit(model: RoleModel):
    state = {name: tensor.clone() for name, tensor in adapter_state(model, "policy").items()}
    again = RoleModel(tiny_llama(), {"reference": Adapter(LORA, state)})
    tokens = ragged_batch().tokens
    assert torch.equal(logits_of(again, "reference", tokens), logits_of(model, "policy", tokens))

    first = sorted(state)[0]
    missing = {name: tensor for name, tensor in state.items() if name != first}
    with pytest.raises(ValueError, match=rf"role reference does not fit.*{first}"):
        RoleModel(tiny_llama(), {"reference": Adapter(LORA, missing)})
    with pytest.raises(ValueError, match=r"not expected \['odd'\]"):
        RoleModel(tiny_llama(), {"reference": Adapter(LORA, {**state, "odd": state[first]})})
    with pytest.raises(ValueError, match=rf"{first} has shape \(1, 1\), the backbone needs"):
        wrong = {**state, first: torch.zeros(1, 1)}
        RoleModel(tiny_llama(), {"reference": Adapter(LORA, wrong)})


def test_a_model_without_adapter_is_the_frozen_base():
    tokens = ragged_batch().tokens
    llama = tiny_llama().requires_grad_(True)
    model = RoleModel(llama, {})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = tiny_llama()(input_ids=tokens).logits
    for role in ("base", "reference"):
        assert torch.equal(logits_of(model, role, tokens), expected)
    assert adapter_parameters(model, "policy") == []


def test_role_names_that_begin_alike_do_not_mix(model: RoleModel):
    sizes = {role: len(adapter_state(model, role)) for role in ADAPTERS}
    # 2 layers x (7 linear layers, or the 3 of REWARD_LORA) x (A, B)
    assert sizes == {"reference": 28, "policy": 28, "reward": 12, "value": 12}


# --- switching -----------------------------------------------------------------------------------


def test_acting_as_nests_and_restores(model: RoleModel):
    assert model.acting == "base"
    with acting_as(model, "policy"):
        with acting_as(model, "base"):
            assert model.acting == "base"
        assert model.acting == "policy"
    assert model.acting == "base"


def test_acting_as_restores_after_an_exception(model: RoleModel):
    tokens = ragged_batch().tokens
    before = logits_of(model, "base", tokens)
    with pytest.raises(RuntimeError, match="inside"), acting_as(model, "policy"):
        raise RuntimeError("inside")
    assert model.acting == "base"
    with torch.no_grad():
        assert torch.equal(model.llama(input_ids=tokens).logits, before)


def test_acting_as_never_flips_requires_grad(model: RoleModel):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for role in ("base", *ADAPTERS):
        with acting_as(model, role):
            assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_unknown_role_is_refused_by_name():
    model = RoleModel(tiny_llama(), {"policy": Adapter(LORA)})
    with (
        pytest.raises(ValueError, match=r"'reward' is not loaded; loaded: \['base', 'policy'"),
        acting_as(model, "reward"),
    ):
        pass


def test_private_names_of_peft_are_what_roles_sets(model: RoleModel):
    # chatllama.model.roles assigns these two attributes. If PEFT renames one, the assignment would
    # only make a new, unread attribute.
    assert "_active_adapter" in vars(BaseTunerLayer)
    assert "_disable_adapters" in vars(BaseTunerLayer)
    layers = [m for m in model.peft_model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    for role in ADAPTERS:
        with acting_as(model, role):
            for layer in layers:
                tuner = cast(BaseTunerLayer, layer)
                assert tuner.active_adapters == [role]
                assert tuner.disable_adapters is False
    assert all(cast(BaseTunerLayer, layer).disable_adapters is True for layer in layers)


# --- gradients -----------------------------------------------------------------------------------


def test_gradient_checkpointing_recomputes_under_the_forward_role(model: RoleModel):
    batch = ragged_batch()
    model.train()
    passes: list[Role] = []
    layer: Any = model.llama.model.layers[0].mlp  # a pre-hook: recomputation stops before the end
    layer.register_forward_pre_hook(lambda *_: passes.append(model.acting))

    plain = joint_gradients(model, batch)
    assert passes == ["policy", "value", "reference"]
    passes.clear()
    model.enable_gradient_checkpointing()
    checkpointed = joint_gradients(model, batch)
    assert passes[:3] == ["policy", "value", "reference"]
    assert sorted(passes[3:]) == ["policy", "value"]
    assert model.acting == "base"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_leaves_base_reference_and_reward_untouched(model: RoleModel):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = ragged_batch()
    joint_gradients(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1).step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == any(mark in name for mark in (".policy.", ".value.", "heads.value.")), name


def test_only_the_states_before_response_tokens_are_asked_for(model: RoleModel, monkeypatch):
    batch, asked = ragged_batch(extra_right=2), []
    inside = scoring.hidden_states

    def seen(model, role, tokens, mask, wanted):
        asked.append((tokens, wanted))
        return inside(model, role, tokens, mask, wanted)

    monkeypatch.setattr(scoring, "hidden_states", seen)
    policy_and_value(model, batch.tokens, batch.mask, batch.response_mask, 1.0)
    width, room = batch.tokens.shape[1], batch.response_mask.shape[1]
    before = torch.zeros(len(batch.tokens), width, dtype=torch.bool)
    before[:, width - room - 1 : -1] = batch.response_mask
    assert len(asked) == 2
    for tokens, wanted in asked:
        assert torch.equal(tokens, batch.tokens[:, :-1]) and torch.equal(wanted, before[:, :-1])


def test_padding_embedding_gets_no_gradient(model: RoleModel):
    batch = ragged_batch(extra_left=3, extra_right=2, pad_id=0)  # id 0 stands only in padding
    embedding: Any = model.llama.get_input_embeddings().weight
    embedding.requires_grad_(True)
    scores, values = policy_and_value(model, batch.tokens, batch.mask, batch.response_mask, 1.0)
    rewards = score_sequences(model, batch.tokens, batch.mask)
    assert values is not None
    (scores.logprobs.sum() + values.sum() + rewards.sum()).backward()
    assert embedding.grad is not None
    assert embedding.grad[0].abs().max() == 0.0
    assert embedding.grad[2:].abs().max() > 0.0


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 32), (32,), (1, 32, 1)])
def test_a_head_of_another_width_is_refused(model: RoleModel, shape: tuple[int, ...] | None):
    own = next(model.heads["value"].parameters())
    before = own.detach().clone()
    with pytest.raises(ValueError, match=r"adapter for role value.* head"):
        set_head(model, "value", None if shape is None else torch.ones(shape))
    assert torch.equal(own, before)
    set_head(model, "value", torch.full((1, 32), 0.5))
    assert own.unique().tolist() == [0.5]
