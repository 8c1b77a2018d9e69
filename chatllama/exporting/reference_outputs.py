"""What a run computes on a few conversations: what an export of it must compute, too."""

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
class Probe:
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


@torch.no_grad()
def measure(loaded: LoadedRun, acting: Role) -> Probe:
    """The numbers of one role, of the base and of the loaded reward models."""
    rendered = []
    for messages in CONVERSATIONS:
        asks = messages[-1]["role"] == "user"
        parts = render(loaded.tokenizer, loaded.chat, messages, add_generation_prompt=asks)
        rendered.append(parts.ids)
    longest = loaded.model.llama.config.max_position_embeddings
    ids = [row[:longest] for row in rendered]

    def logprobs(role: Role) -> list[list[float]]:
        found = []
        for row in ids:
            tokens = torch.tensor([row])
            mask = torch.ones_like(tokens, dtype=torch.bool)
            scores = response_logprobs(loaded.model, role, tokens, mask, mask[:, 1:], 1.0)
            found.append(scores.logprobs[0].tolist())
        return found

    scores = []
    for role in loaded.reward_roles:
        rows = [torch.tensor([row]) for row in ids]
        masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        found = [
            score_sequences(loaded.model, row, mask, role)
            for row, mask in zip(rows, masks, strict=True)
        ]
        scores.append(torch.cat(found).tolist())
    return Probe(
        describe_contract(loaded.tokenizer, loaded.chat),
        rendered,
        ids,
        logprobs(acting),
        logprobs("base"),
        scores,
    )
