"""Seeded tiny models of every family, and roles on them, with weights that let mistakes show."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    ScalarHead,
    acting_as,
    adapter_parameters,
)
from chatllama.model.scoring import policy_and_value, response_logprobs

VOCABULARY = 96
HIDDEN = 32

ROPES: dict[str, dict] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, llama3's rope": {"rope_parameters": ROPES["llama3"]},
    "llama, biases and tied": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12,
    },
    "mistral": {"sliding_window": None, "tie_word_embeddings": True},
    "mistral, window": {"sliding_window": 4, "head_dim": 12},
    "qwen2": {},
    "qwen2, tied, window in the last layer": {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "qwen3, biases, window": {
        "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 0,
    },
}  # fmt: skip
"""Name, which begins with the family's, -> keys of config.json."""
LORA = LoraSection(r=4, alpha=6.0)
REWARD_LORA = LoraSection(r=3, alpha=5.0, target_modules=["q_proj", "v_proj", "down_proj"])
TRAINED: tuple[Role, ...] = ("policy", "value")


def tiny_config(
    vocabulary: int = VOCABULARY,
    rope: str = "default",
    max_positions: int = 256,
    hidden: int = HIDDEN,
    initializer_range: float = 0.25,
    form: str = "llama",
) -> LlamaConfig:
    values = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters=dict(ROPES[rope]),
        initializer_range=initializer_range,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config = AutoConfig.for_model(form.split(",")[0], **(values | FORMS[form]))
    return cast(LlamaConfig, config)


def tiny_llama(
    vocabulary: int = VOCABULARY,
    rope: str = "default",
    dtype: torch.dtype = torch.float32,
    max_positions: int = 256,
    form: str = "llama",
) -> LlamaForCausalLM:
    """Seeded, frozen, grouped-query attention, eval mode; the same call gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = tiny_config(vocabulary, rope, max_positions, form=form)
        llama: Any = AutoModelForCausalLM.from_config(config)
        for name, parameter in llama.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                parameter.data += 0.3 * torch.randn_like(parameter)
    llama.requires_grad_(False)
    nn.Module.to(llama, dtype)
    return llama.eval()


def role_model(llama: LlamaForCausalLM, **kwargs) -> RoleModel:
    """All four roles, each with its own random adapter (A and B) and heads."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = RoleModel(
            llama,
            {
                "reference": Adapter(LORA),
                "policy": Adapter(LORA, trainable=True),
                "reward": Adapter(REWARD_LORA),
                "value": Adapter(REWARD_LORA, trainable=True),
            },
            heads=("reward", "value"),
            **kwargs,
        )
        for role in ("reference", "policy", "reward", "value"):
            for parameter in adapter_parameters(model, role):
                parameter.data.normal_(std=0.2)
        head_of(model, "value").bias.data.fill_(0.3)
    return model.eval()


def head_of(model: RoleModel, role: Role) -> ScalarHead:
    return cast(ScalarHead, model.heads[role])


@dataclass
class Batch:
    """Ragged prompts and responses in the layout of a rollout, and row by row without padding."""

    tokens: torch.Tensor
    mask: torch.Tensor
    response_mask: torch.Tensor
    prompts: list[list[int]]
    responses: list[list[int]]


def ragged_batch(
    prompt_lengths: tuple[int, ...] = (3, 9, 1, 6),
    response_lengths: tuple[int, ...] = (5, 2, 4, 1),
    extra_left: int = 0,
    extra_right: int = 0,
    pad_id: int | None = 0,
    vocabulary: int = VOCABULARY,
) -> Batch:
    """Left-padded prompts, right-padded responses; `pad_id` None fills with random real ids."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    prompts = [draw(n) for n in prompt_lengths]
    responses = [[*draw(n - 1), 2] for n in response_lengths]
    width = max(prompt_lengths) + extra_left
    room = max(response_lengths) + extra_right
    shape = (len(prompts), width + room)
    tokens = (
        torch.full(shape, pad_id)
        if pad_id is not None
        else torch.tensor(draw(shape[0] * shape[1])).view(shape)
    )
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, width - len(prompt) : width + len(response)] = torch.tensor(prompt + response)
        mask[row, width - len(prompt) : width + len(response)] = True
    return Batch(tokens, mask, mask[:, width:], prompts, responses)


def logits_of(model: RoleModel, role: Role, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), acting_as(model, role):
        return model.llama(input_ids=tokens).logits


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
