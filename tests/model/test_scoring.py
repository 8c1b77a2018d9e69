"""What the roles say about sequences, row by row and in batches."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_models import (
    FORMS,
    HIDDEN,
    LORA,
    REWARD_LORA,
    Batch,
    head_of,
    joint_gradients,
    logits_of,
    ragged_batch,
    role_model,
    tiny_config,
    tiny_llama,
)
from transformers import AutoModelForSequenceClassification

from chatllama.model.roles import (
    Adapter,
    RoleModel,
    ScalarHead,
    acting_as,
    adapter_parameters,
    adapter_state,
)
from chatllama.model.scoring import (
    hidden_states,
    policy_and_value,
    response_logprobs,
    response_values,
    score_sequences,
)


@pytest.fixture
def model() -> RoleModel:
    return role_model(tiny_llama())


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_neighbours_change_nothing(layout: str, form: str):
    # PPO.md 2e: 4e-6 with mask and positions, 3.5 to 6 nats without the mask.
    model = role_model(tiny_llama(form=form))
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


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_a_classification_model(form: str):
    model = role_model(tiny_llama(form=form))
    batch = ragged_batch(pad_id=0)  # id 0 stands only in padding, so HF finds the last token
    config = tiny_config(form=form)
    config.num_labels, config.pad_token_id = 1, 0
    classifier: Any = AutoModelForSequenceClassification.from_config(config)
    classifier.load_state_dict(tiny_llama(form=form).state_dict(), strict=False)
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
    hidden = hidden_states(model, "policy", batch.tokens, batch.mask, batch.mask)
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
