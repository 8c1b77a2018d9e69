import copy
import math
from typing import Any, cast

import pytest
import torch
from core_models import (
    HIDDEN,
    LORA,
    REWARD_LORA,
    TRAINED,
    Batch,
    head_of,
    ragged_batch,
    role_model,
    tiny_config,
    tiny_llama,
)
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForSequenceClassification

from chatllama import scoring
from chatllama.config import LoraSection
from chatllama.roles import (
    Adapter,
    Role,
    RoleModel,
    ScalarHead,
    acting_as,
    adapter_parameters,
    adapter_state,
    lora_config,
)
from chatllama.scoring import (
    hidden_states,
    last_token_index,
    policy_and_value,
    response_logprobs,
    response_values,
    score_sequences,
)

ADAPTERS: tuple[Role, ...] = ("reference", "policy", "reward", "value")


@pytest.fixture
def model() -> RoleModel:
    return role_model(tiny_llama())


def logits_of(model: RoleModel, role: Role, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), acting_as(model, role):
        return model.llama(input_ids=tokens).logits


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


@pytest.mark.parametrize("role", ADAPTERS)
def test_each_role_is_its_stand_alone_peft_model(model: RoleModel, role: Role):
    tokens = ragged_batch().tokens
    section = section_of(role)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    alone = get_peft_model(tiny_llama(), config)
    loaded = set_peft_model_state_dict(alone, adapter_state(model, role))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora" in key]
    with torch.no_grad():
        expected = alone.eval()(input_ids=tokens).logits
    actual = logits_of(model, role, tokens)
    assert torch.equal(actual, expected)
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
    assert lora_config(section, "policy").lora_dropout == 0.0
    assert lora_config(section, "policy", dropout=True).lora_dropout == 0.5
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
    # chatllama.roles assigns these two attributes. If PEFT renames one, the assignment would only
    # make a new, unread attribute.
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


def joint_gradients(model: RoleModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Policy and value in one backward, while the model was last used as the reference."""
    model.zero_grad()
    scores, values = policy_and_value(model, batch.tokens, batch.mask, batch.response_mask, 0.7)
    with torch.no_grad():
        response_logprobs(model, "reference", batch.tokens, batch.mask, batch.response_mask, 0.7)
    assert values is not None
    (scores.logprobs.sum() + values.square().sum()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    return {name: gradient.clone() for name, gradient in gradients.items()}


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


def test_nan_outside_the_response_mask_gets_no_gradient(model: RoleModel, monkeypatch):
    batch = ragged_batch(extra_right=2)
    clean = joint_gradients(model, batch)
    whole = scoring.hidden_states

    def poisoned(model, role, tokens, mask):
        hidden = whole(model, role, tokens, mask)
        window = torch.zeros_like(mask)
        room = batch.response_mask.shape[1]
        window[:, -room - 1 : -1] = batch.response_mask
        return torch.where(window[..., None], hidden, torch.nan)

    monkeypatch.setattr(scoring, "hidden_states", poisoned)
    dirty = joint_gradients(model, batch)
    for name, gradient in clean.items():
        assert torch.equal(dirty[name], gradient), name


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


# --- what is computed ----------------------------------------------------------------------------


@torch.no_grad()
def row_by_row(model: RoleModel, batch: Batch, temperature: float) -> list[dict[str, Any]]:
    """Each row alone, without padding, from the whole model's logits and hidden states."""
    rows = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        tokens = torch.tensor([prompt + response])
        logits = logits_of(model, "policy", tokens)[0, len(prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        with acting_as(model, "value"):
            before = model.llama.model(input_ids=tokens).last_hidden_state[0, len(prompt) - 1 : -1]
        with acting_as(model, "reward"):
            last = model.llama.model(input_ids=tokens).last_hidden_state[0, -1]
        head, score = head_of(model, "value"), head_of(model, "reward")
        rows.append(
            {
                "logprobs": logprobs[torch.arange(len(response)), torch.tensor(response)],
                "entropy": -(logprobs.exp() * logprobs).sum(-1),
                "values": before @ head.weight[0] + head.bias,
                "scores": last @ score.weight[0],
            }
        )
    return rows


@torch.no_grad()
def batched(model: RoleModel, batch: Batch, temperature: float) -> list[dict[str, Any]]:
    scores, values = policy_and_value(
        model, batch.tokens, batch.mask, batch.response_mask, temperature
    )
    assert values is not None
    rewards = score_sequences(model, batch.tokens, batch.mask)
    outside = ~batch.response_mask
    for tensor in (scores.logprobs, scores.entropy, values):
        assert tensor.dtype == torch.float32
        assert (tensor[outside] == 0).all()
    return [
        {
            "logprobs": scores.logprobs[row][inside],
            "entropy": scores.entropy[row][inside],
            "values": values[row][inside],
            "scores": rewards[row],
        }
        for row, inside in enumerate(batch.response_mask)
    ]


LAYOUTS = {
    "own padding": {},
    "more on both sides": {"extra_left": 17, "extra_right": 9},
    "pad id is the EOS": {"extra_left": 2, "extra_right": 3, "pad_id": 2},
    "padding is any id": {"extra_left": 40, "extra_right": 5, "pad_id": None},
}


@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_neighbours_change_nothing(layout: str, rope: str):
    # PPO.md 2e: 4e-6 with mask and positions, 3.5 to 6 nats without the mask.
    model = role_model(tiny_llama(rope=rope))
    batch = ragged_batch(**LAYOUTS[layout])
    alone, together = row_by_row(model, batch, 0.7), batched(model, batch, 0.7)
    for expected, actual in zip(alone, together, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_for_padding_on_either_side(model: RoleModel, side: str):
    batch = ragged_batch()
    rows = [p + r for p, r in zip(batch.prompts, batch.responses, strict=True)]
    width = max(map(len, rows)) + 3
    tokens = torch.full((len(rows), width), 2)  # pad = EOS
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = torch.tensor(row), True
    with torch.no_grad():
        actual = score_sequences(model, tokens, mask)
    expected = torch.stack([row["scores"] for row in row_by_row(model, batch, 1.0)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_scores_are_those_of_a_classification_model(model: RoleModel):
    batch = ragged_batch(pad_id=0)  # id 0 stands only in padding, so HF finds the last token
    config = tiny_config()
    config.num_labels, config.pad_token_id = 1, 0
    classifier = LlamaForSequenceClassification(config)
    classifier.load_state_dict(tiny_llama().state_dict(), strict=False)
    wrapped = get_peft_model(
        classifier,
        LoraConfig(
            r=REWARD_LORA.r,
            lora_alpha=REWARD_LORA.alpha,  # type: ignore[arg-type]
            target_modules=REWARD_LORA.target_modules,
            task_type="SEQ_CLS",
        ),
    )
    head = {"base_model.model.score.weight": head_of(model, "reward").weight.detach()}
    set_peft_model_state_dict(wrapped, {**adapter_state(model, "reward"), **head})
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=batch.tokens, attention_mask=batch.mask.long()).logits
        actual = score_sequences(model, batch.tokens, batch.mask)
    torch.testing.assert_close(actual, expected[:, 0], rtol=0, atol=1e-5)
    assert actual.std() > 0.1


def test_values_are_of_the_state_before_the_token(model: RoleModel):
    batch = ragged_batch()
    changed = copy.deepcopy(batch)
    first = batch.tokens.shape[1] - batch.response_mask.shape[1]
    row, t = 0, 2
    changed.tokens[row, first + t] = 50 if batch.tokens[row, first + t] != 50 else 51
    with torch.no_grad():
        before = response_values(model, batch.tokens, batch.mask, batch.response_mask)
        after = response_values(model, changed.tokens, changed.mask, changed.response_mask)
    assert torch.equal(before[row, : t + 1], after[row, : t + 1])
    assert (before[row, t + 1 :] - after[row, t + 1 :]).abs().min() > 1e-4


def test_entropy_has_no_gradient_and_is_not_above_log_v(model: RoleModel):
    batch = ragged_batch()
    scores = response_logprobs(
        model, "policy", batch.tokens, batch.mask, batch.response_mask, 100.0
    )
    assert scores.logprobs.requires_grad and not scores.entropy.requires_grad
    # At temperature 100 the distribution is flat: log V nats.
    inside = scores.entropy[batch.response_mask]
    torch.testing.assert_close(
        inside, torch.full_like(inside, math.log(tiny_config().vocab_size)), rtol=0, atol=0.02
    )
    assert (inside <= math.log(tiny_config().vocab_size) + 1e-5).all()


def test_a_model_without_value_head_gives_no_values():
    model = RoleModel(tiny_llama(), {"policy": Adapter(LORA, trainable=True)})
    batch = ragged_batch()
    scores, values = policy_and_value(model, batch.tokens, batch.mask, batch.response_mask, 1.0)
    assert values is None and scores.logprobs.shape == batch.response_mask.shape


def test_forward_runs_the_named_function(model: RoleModel):
    batch = ragged_batch()
    with torch.no_grad():
        rewards = model(score_sequences, batch.tokens, batch.mask)
        assert torch.equal(rewards, score_sequences(model, batch.tokens, batch.mask))
        scores, _ = model(policy_and_value, batch.tokens, batch.mask, batch.response_mask, 0.7)
        direct = response_logprobs(
            model, "policy", batch.tokens, batch.mask, batch.response_mask, 0.7
        )
    assert torch.equal(scores.logprobs, direct.logprobs)


def test_a_second_reward_model_has_its_own_adapter_and_head():
    model = RoleModel(
        tiny_llama(),
        {"reward": Adapter(REWARD_LORA), "safety": Adapter(REWARD_LORA)},
        heads=("reward", "safety"),
    )
    batch = ragged_batch()
    first = score_sequences(model, batch.tokens, batch.mask)
    second = score_sequences(model, batch.tokens, batch.mask, "safety")
    assert (first - second).abs().min() > 1e-3
    for parameter in [*adapter_parameters(model, "safety"), head_of(model, "safety").weight]:
        parameter.data += 1.0
    assert torch.equal(score_sequences(model, batch.tokens, batch.mask), first)
    assert (score_sequences(model, batch.tokens, batch.mask, "safety") != second).all()


def test_a_response_mask_without_any_token_is_zero(model: RoleModel):
    batch = ragged_batch()
    nothing = torch.zeros_like(batch.response_mask)
    scores, values = policy_and_value(model, batch.tokens, batch.mask, nothing, 1.0)
    assert values is not None
    assert not scores.logprobs.any() and not scores.entropy.any() and not values.any()


def test_last_token_index_on_either_side():
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 1],  # left padding: column 4
            [1, 1, 1, 0, 0],  # right padding: column 2
            [0, 1, 0, 0, 0],  # one token between: column 1
            [1, 0, 0, 1, 0],  # a hole: the last True, column 3
        ]
    ).bool()
    assert last_token_index(mask).tolist() == [4, 2, 1, 3]


# --- number types --------------------------------------------------------------------------------


def test_bfloat16_backbone_keeps_adapters_and_heads_float32():
    model = role_model(tiny_llama(dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        own = "lora_" in name or name.startswith("heads.")
        assert parameter.dtype == (torch.float32 if own else torch.bfloat16), name
    batch = ragged_batch()
    for gradient in joint_gradients(model, batch).values():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    low, exact = batched(model, batch, 1.0), batched(role_model(tiny_llama()), batch, 1.0)
    for actual, expected in zip(low, exact, strict=True):
        for name, tensor in expected.items():
            assert actual[name].dtype == torch.float32
            torch.testing.assert_close(actual[name], tensor, rtol=0.05, atol=0.3, msg=name)
    hidden = hidden_states(model, "policy", batch.tokens, batch.mask)
    assert hidden.dtype == torch.bfloat16


def test_the_head_computes_in_float32_whatever_comes_in():
    torch.manual_seed(0)
    head = ScalarHead(HIDDEN, bias=True)
    hidden = torch.randn(3, 5, HIDDEN).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(hidden)
    assert scores.shape == (3, 5) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, hidden.float() @ head.weight[0] + head.bias)


def test_head_init_has_the_stated_deviation():
    torch.manual_seed(0)
    # N(0, 1 / sqrt(4095 + 1)) = N(0, 1/64); the deviation of 4095 draws is within 3.3 % (3 sigma).
    head = ScalarHead(4095, bias=True)
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.034)
    assert head.bias.item() == 0.0
    assert ScalarHead(8, bias=False).bias is None
