"""A run's outputs on a few conversations, which an export of it must reproduce."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatllama.inference.load import LoadedRun
from chatllama.model.roles import Role
from chatllama.model.scoring import response_logprobs, score_sequences
from chatllama.text.chat_format import Message, describe_contract, render

CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Write a note about the garden."}],
    [
        {"role": "user", "content": "What is 12 + 30?\nAnswer in one word."},
        {"role": "assistant", "content": "It is 42, isn't it?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who wrote this naïve letter?"},
        {"role": "assistant", "content": "Anna."},
    ],
)
"""One question, one answer, and two exchanges under a system prompt."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Token ids of conversations and the run's numbers for them."""

    contract: dict[str, Any]
    """The chat contract."""
    rendered: list[list[int]]
    """Of each conversation."""
    ids: list[list[int]]
    """The same, no longer than the model's positions."""
    logprobs: list[list[float]]
    """Of every token but the first, by the role."""
    base_logprobs: list[list[float]]
    scores: list[list[float]]
    """Of each member of the reward model: one a conversation."""


def is_prompt(messages: Sequence[Message]) -> bool:
    """Whether an answer comes next."""
    return messages[-1]["role"] == "user"


@torch.no_grad()
def reference_outputs(loaded: LoadedRun, role: Role) -> ReferenceOutputs:
    """The numbers of one role, of the base and of the loaded reward models."""
    model, tokenizer, chat = loaded.model, loaded.tokenizer, loaded.chat
    rendered = [
        render(
            tokenizer,
            chat,
            messages,
            add_generation_prompt=is_prompt(messages),
            last_answer_only=True,
        ).ids
        for messages in CONVERSATIONS
    ]
    ids = [row[: model.llama.config.max_position_embeddings] for row in rendered]
    rows = [torch.tensor([row]) for row in ids]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    pairs = list(zip(rows, masks, strict=True))

    def logprobs(role: Role) -> list[list[float]]:
        passes = [response_logprobs(model, role, *pair, pair[1][:, 1:], 1.0) for pair in pairs]
        return [scores.logprobs[0].tolist() for scores in passes]

    scores = [
        torch.cat([score_sequences(model, *pair, member) for pair in pairs]).tolist()
        for member in loaded.reward_roles
    ]
    contract = describe_contract(tokenizer, chat)
    return ReferenceOutputs(contract, rendered, ids, logprobs(role), logprobs("base"), scores)
